"""The policy: megatron-core actors. Only this package imports megatron."""
