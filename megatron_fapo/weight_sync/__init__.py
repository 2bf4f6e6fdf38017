"""New policy weights into the engines: buckets, the version protocol, the policy's side and the engine's."""
