"""Seconds of the policy's phases: log-probabilities, updates, refit. Pure arithmetic on the real micro-batches.

The samples of a step are dealt to data ranks and packed by the very functions that a run uses (`policy/batch.py`), so
padding and uneven ranks are in. Tensor-parallel communication is not overlapped, as in the policy; a pipeline's bubble
is its longest micro-batch times the stages before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_fapo.config.root import Config
from megatron_fapo.plan.hardware import Hardware
from megatron_fapo.plan.memory import buffer_elements, tensor_sizes
from megatron_fapo.policy.batch import plan_micro_batches, split_over_data_ranks
from megatron_fapo.policy.hf_config import ModelShape


def layer_flops(shape: ModelShape, tokens: int, width: int) -> float:
    """Forward FLOPs of all layers: two per weight and token, and the causal half of the attention scores."""
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    weights = shape.hidden * (2 * q + 2 * kv) + 3 * shape.hidden * shape.ffn
    return float(tokens) * shape.layers * (2 * weights + 2 * width * q)


def head_flops(shape: ModelShape, tokens: int) -> float:
    """Forward FLOPs of the output layer."""
    return 2.0 * tokens * shape.hidden * shape.vocab


def train_flops(shape: ModelShape, lengths: Sequence[int]) -> float:
    """Of forward and backward over samples of these lengths, without padding and recomputation: what MFU counts."""
    return sum(3 * (layer_flops(shape, n, n) + head_flops(shape, n)) for n in lengths)


@dataclass(frozen=True)
class PolicyTimes:
    """Seconds of a step's policy phases."""

    logprobs_s: float
    train_s: float
    mfu: float
    """Of the train phase, over all policy GPUs."""


class PolicyWork:
    """The policy of one configuration on one cluster."""

    def __init__(self, config: Config, shape: ModelShape, hardware: Hardware, element: int) -> None:
        self.config, self.shape, self.hardware, self.element = config, shape, hardware, element
        parallel = config.policy.parallel
        self.parallel, self.rates = parallel, hardware.rates
        self.elements = buffer_elements(tensor_sizes(shape, parallel, 0), parallel.data)

    def times(self, lengths: Sequence[int]) -> PolicyTimes:
        """Of a step with samples of these lengths (prompt and response), in the order of their groups."""
        cfg, passes = self.config, 2 if self.config.algorithm.kl_coef > 0 else 1
        logprobs = passes * self._run(lengths, cfg.policy.logprob_micro_batch_tokens, train=False)
        size = cfg.training.prompts_per_mini_batch * cfg.rollout.samples_per_prompt
        parts = [lengths[i : i + size] for i in range(0, len(lengths), size)]
        train = sum(self._run(part, cfg.policy.micro_batch_tokens, train=True) + self.update_s() for part in parts)
        peak = self.rates.peak_tflops * 1e12 * self.parallel.world_size
        return PolicyTimes(logprobs, train, train_flops(self.shape, lengths) / train / peak)

    def _run(self, lengths: Sequence[int], max_tokens: int, *, train: bool) -> float:
        """Seconds of the slowest data rank over its micro-batches."""
        slowest = 0.0
        for part in split_over_data_ranks(lengths, self.parallel.data):
            own = [lengths[i] for i in part]
            passes = [
                self._micro_batch_s(len(batch), max(own[i] for i in batch), train)
                for batch in plan_micro_batches(own, max_tokens)
            ]
            bubble = (self.parallel.pipeline - 1) * max(passes, default=0.0)
            slowest = max(slowest, sum(passes) + bubble)
        return slowest

    def _micro_batch_s(self, count: int, width: int, train: bool) -> float:
        """Seconds of one stage; the last one's softmax sets the pace of all."""
        t, p = self.parallel.tensor, self.parallel.pipeline
        tokens, full = count * width, self.config.policy.recompute == "full"
        layers = layer_flops(self.shape, tokens, width)
        flops = (4 if full else 3) * layers + 3 * head_flops(self.shape, tokens) if train else layers
        flops += 0 if train else head_flops(self.shape, tokens)
        rates = self.rates
        mfu, logit_s = (rates.train_mfu, rates.logit_train_s) if train else (rates.forward_mfu, rates.logit_forward_s)
        logits_s = tokens * self.shape.padded_vocab(t) / t * logit_s
        # Two all-reduces a layer each way (with sequence parallelism as gather and scatter, once more in backward).
        passes = (2 + full + 0.5 * self.parallel.sequence_parallel) if train else 1
        reduced = 2 * passes * self.shape.layers / p * tokens * self.shape.hidden * self.element * 2 * (t - 1) / t
        return logits_s + flops / (t * p) / (rates.peak_tflops * 1e12 * mfu) + reduced / (rates.link_gbs * 1e9)

    def update_s(self) -> float:
        """One optimizer update: gradients reduced, shares stepped, weights gathered."""
        d, inside = self.parallel.data, self.parallel.tensor * self.parallel.data <= self.hardware.gpus_per_node
        link = (self.rates.link_gbs if inside else self.rates.network_gbs) * 1e9
        exchanged = (4 + self.element) * self.elements * (d - 1) / d / link
        # Gradients cleared and read, weights and moments read and written.
        touched = (8 * self.elements + 32 * self.elements / d) / (self.rates.memory_gbs * 1e9)
        return exchanged + touched + self.rates.update_s

    def refit_s(self, other_nodes: float) -> float:
        """New weights to the engines: through shared memory on a node, and one copy to each other node."""
        size = self.shape.parameters * self.element
        return (
            self.rates.refit_s + size / (self.rates.host_gbs * 1e9) + size * other_nodes / (self.rates.store_gbs * 1e9)
        )
