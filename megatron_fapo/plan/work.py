"""Seconds of the policy's phases: log-probabilities, updates, refit. Pure arithmetic on the real micro-batches.

The samples of a step are dealt to data ranks and packed by the very function that a run uses (`policy/packing.py`), so
padding and uneven ranks are in. Communication of tensor, context and expert ranks is taken as not overlapped. A
pipeline's bubble is its longest micro-batch times the stages before it, divided by the chunks of a stage.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from megatron_fapo.config.root import Config
from megatron_fapo.plan.hardware import Hardware
from megatron_fapo.plan.memory import stage_elements
from megatron_fapo.plan.simulate import SimSample
from megatron_fapo.policy.flops import head_flops, layer_flops, train_flops
from megatron_fapo.policy.hf_config import ModelShape
from megatron_fapo.policy.packing import CostModel, schedule_for

_packed = lru_cache(maxsize=512)(schedule_for)
"""Fits of rates and layouts that differ in nothing but recomputation ask for the same schedule again and again."""


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
        self.elements, self.share = stage_elements(shape, parallel, 0)

    def times(self, samples: Sequence[SimSample]) -> PolicyTimes:
        """Of a step with these samples, in the order of their groups."""
        cfg, budget = self.config, self.config.policy.logprob_micro_batch_tokens
        size = cfg.training.prompts_per_mini_batch * cfg.rollout.samples_per_prompt
        # The first mini-batch has them from its training; with old_logprobs: engine the gate is taken to hold.
        asked = samples[size:] if cfg.algorithm.old_logprobs == "policy" else ()
        logprobs = self._run(asked, budget, train=False)
        logprobs += self._run(samples, budget, train=False) if cfg.algorithm.kl_coef > 0 else 0.0
        parts = [samples[i : i + size] for i in range(0, len(samples), size)]
        train = sum(self._run(part, cfg.policy.micro_batch_tokens, train=True) + self.update_s() for part in parts)
        peak = self.rates.peak_tflops * 1e12 * self.parallel.world_size
        flops = train_flops(self.shape, [s.prompt + s.response for s in samples], sum(s.response for s in samples))
        return PolicyTimes(logprobs, train, flops / train / peak)

    def _run(self, samples: Sequence[SimSample], max_tokens: int, *, train: bool) -> float:
        """Seconds of the slowest data rank over its micro-batches; ranks that share experts wait at each of them."""
        p = self.parallel
        lengths = tuple(s.prompt + s.response for s in samples)
        packs = _packed(p, CostModel.from_shape(self.shape), lengths, max_tokens).micro_batches
        rows = [[self._pack_s([samples[i] for i in pack], train) for pack in rank] for rank in packs]
        if p.expert * p.expert_tensor > p.tensor * p.context:
            rows = [[max(passes) for passes in zip(*rows, strict=True)]]
        bubble = (p.pipeline - 1) / p.virtual_pipeline
        return max(sum(passes) + bubble * max(passes) for passes in rows)

    def _pack_s(self, samples: Sequence[SimSample], train: bool) -> float:
        """Seconds of one stage; the last one's softmax sets the pace of all."""
        parallel, rates, shape = self.parallel, self.rates, self.shape
        t, c, p = parallel.tensor, parallel.context, parallel.pipeline
        tokens, responses = sum(s.prompt + s.response for s in samples), sum(s.response for s in samples)
        layers = sum(layer_flops(shape, s.prompt + s.response, s.prompt + s.response) for s in samples)
        full = self.config.policy.recompute == "full"
        # Forward and twice that backward; what is worked out again in backward once more.
        again = self.config.policy.output_layer == "recompute"
        flops = (3 + full) * layers + (3 + again) * head_flops(shape, responses) if train else layers
        flops += 0 if train else head_flops(shape, responses)
        mfu, logit_s = (rates.train_mfu, rates.logit_train_s) if train else (rates.forward_mfu, rates.logit_forward_s)
        logits_s = responses / c * shape.padded_vocab(t) / t * logit_s
        passes, backward = (2 + full, 1) if train else (1, 0)
        token = shape.layers / p * tokens / c * self.element  # bytes of one number of every token, in all layers
        # Two all-reduces a layer each way (with sequence parallelism as gather and scatter, once more in backward).
        reduced = 2 * (passes + 0.5 * backward * parallel.sequence_parallel) * token * shape.hidden * 2 * (t - 1) / t
        # Keys and values go round the context ranks, in backward with their gradients.
        reduced += (passes + backward) * token * 2 * shape.kv_heads * shape.head_dim / t * (c - 1)
        link_s = reduced / (rates.link_gbs * 1e9)
        if shape.experts:  # every token to its experts and back
            ep = parallel.expert
            sent = 2 * passes * token * shape.hidden / t * shape.experts.per_token * (ep - 1) / ep
            link_s += sent / (self._link(ep) * 1e9)
        return logits_s + flops / (t * c * p) / (rates.peak_tflops * 1e12 * mfu) + link_s

    def _link(self, ranks: int) -> float:
        """GB/s within a group of so many consecutive ranks."""
        return self.rates.link_gbs if ranks <= self.hardware.gpus_per_node else self.rates.network_gbs

    def update_s(self) -> float:
        """One optimizer update: gradients reduced, shares stepped, weights gathered."""
        p = self.parallel
        sharing = p.context * p.data
        exchanged = (
            (4 + self.element) * self.elements * (sharing - 1) / sharing / (self._link(p.tensor * sharing) * 1e9)
        )
        # Gradients cleared and read; weights and moments of this rank's share read and written.
        touched = (8 * self.elements + 32 * self.share) / (self.rates.memory_gbs * 1e9)
        return exchanged + touched + self.rates.update_s

    def refit_s(self, ranks: Sequence[str], engines: Sequence[str], *, shared: bool) -> float:
        """New weights to the engines, as `weight_sync/plan.py` has them go: what the node's own ranks hold over its
        links, the rest over the network once for each node, through the NICs of all its workers.

        Args:
            ranks, engines: the node of each policy rank and of each engine.
            shared: whether an engine's worker is on the card of a policy rank.
        """
        parallel, rates, workers = self.parallel, self.rates, self.config.rollout.tensor_parallel
        size = self.shape.parameters * self.element
        stages: dict[str, set[int]] = {}
        for rank, node in enumerate(ranks):
            stages.setdefault(node, set()).add(rank * parallel.pipeline // len(ranks))
        # Of each worker from the rank on its card, if the two have slices of one another.
        aligned = shared and (parallel.tensor in (1, workers) or workers == 1)
        local = aligned * size / max(parallel.tensor, workers) / parallel.pipeline
        seconds = 0.0
        for node, count in Counter(engines).items():
            away = size * (1 - len(stages.get(node, ())) / parallel.pipeline)
            far = max(away / (count * workers), away / len(ranks))  # or all leave the ranks once
            near = size / workers - local - away / (count * workers)
            sent = max(near / rates.link_gbs, far / rates.network_gbs)
            seconds = max(seconds, (2 * local / rates.memory_gbs + sent) / 1e9)
        return rates.refit_s + seconds
