"""Bytes of one policy rank, by phase and category; of an engine and of a GenRM server. Pure arithmetic.

It counts what `policy/` does: mcore's DDP buffers and distributed optimizer, the micro-batches of `policy/batch.py`,
the chunked log-probabilities of `policy/vocab_parallel.py`, the gathers of a refit and of a checkpoint. Two sets of
kernels are known: `fused` (Transformer Engine, flash attention) and megatron's own, which keep all attention scores.
`benchmarks/plan_check.py` compares all of it with real allocations; docs/sizing.md has the errors.

Shapes: n padded tokens of a micro-batch, e bytes of an element, t tensor ranks, h hidden, f FFN, q and kv widths.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_fapo.config.policy import ParallelConfig, PolicyConfig
from megatron_fapo.config.root import Config
from megatron_fapo.policy.hf_config import ModelShape

_CHUNK = 2**26
"""Logits that vocab_parallel.py works on at once."""
BATCH_BYTES = 16 + 16 + 5 * 4
"""Of one token in the tensors of a micro-batch: ids, positions, indexes, targets, and float32 per-token values."""

Parts = dict[str, int]
"""Category -> bytes."""


@dataclass(frozen=True)
class MicroBatch:
    """Geometry of one forward-backward pass: `count` samples padded to `width`."""

    width: int
    count: int

    @property
    def tokens(self) -> int:
        return self.width * self.count


@dataclass(frozen=True)
class PolicyMemory:
    """The fullest rank: its pipeline stage, and what each phase holds."""

    stage: int
    phases: dict[str, Parts]

    def total(self, phase: str) -> int:
        return sum(self.phases[phase].values())

    @property
    def peak(self) -> int:
        return max(self.total(phase) for phase in self.phases)


def tensor_sizes(shape: ModelShape, parallel: ParallelConfig, stage: int) -> list[int]:
    """Elements of every parameter that a rank of pipeline `stage` holds."""
    t, h, d = parallel.tensor, shape.hidden, shape.head_dim
    qkv = (shape.heads + 2 * shape.kv_heads) * d // t
    layer = [h, qkv * h, shape.heads * d // t * h, h, 2 * shape.ffn // t * h, shape.ffn // t * h]
    layer += [qkv] if shape.qkv_bias else []
    layer += [d, d] if shape.qk_norm else []
    first, last = stage == 0, stage == parallel.pipeline - 1
    vocabulary = shape.padded_vocab(t) // t * h
    sizes = layer * (shape.layers // parallel.pipeline) + [vocabulary] * first + [h] * last
    return sizes + [vocabulary] * (last and not (shape.tied and first))


def buffer_elements(sizes: list[int], data: int) -> int:
    """Elements of mcore's flat buffer: parameters start at multiples of 64, the end divides over data ranks."""
    end = sum(-(-size // 64) * 64 for size in sizes[:-1]) + sizes[-1]
    divisor = math.lcm(data, 128)
    return -(-end // divisor) * divisor


def rank_state(shape: ModelShape, parallel: ParallelConfig, stage: int, element: int) -> Parts:
    """Weights, float32 gradients, and this data rank's share of float32 Adam (with float32 weights if they are not)."""
    elements = buffer_elements(tensor_sizes(shape, parallel, stage), parallel.data)
    per_share = 8 if element == 4 else 12
    return {
        "weights": element * elements,
        "gradients": 4 * elements,
        "optimizer": per_share * elements // parallel.data,
    }


@dataclass(frozen=True)
class LayerBytes:
    """What one layer keeps from forward to backward, and what passes through it meanwhile."""

    attention: int
    mlp: int
    core: int
    """Of `attention`: what recomputing the attention alone leaves out."""
    scores: int
    """One tensor of all heads' attention scores; 0 where they never exist."""
    checkpoint: int
    """The layer's input: all that full recomputation keeps."""
    qkv: int
    """One tensor of queries, keys and values: the attention's code holds it while the scores are worked out."""
    passing: int
    """Beside what is kept, while the backward of the MLP runs."""

    def kept(self, recompute: str) -> int:
        both = self.attention + self.mlp
        return {"none": both, "selective": both - self.core, "full": self.checkpoint}[recompute]

    def inside(self, recompute: str) -> int:
        """The most beside `kept` while one layer's backward runs, its recomputation included."""
        again = {"none": 0, "selective": 0, "full": self.attention + self.mlp - self.checkpoint}[recompute]
        core = self.core if recompute == "selective" else 0
        attention = again + core - self.mlp + 2 * self.scores + 5 * self.checkpoint + (self.qkv if again else 0)
        return max(again + self.passing, attention)


def layer_bytes(
    shape: ModelShape, parallel: ParallelConfig, batch: MicroBatch, element: int, fused: bool
) -> LayerBytes:
    """For a micro-batch on one tensor rank."""
    t, n, e, d = parallel.tensor, batch.tokens, element, shape.head_dim
    h = shape.hidden / (t if parallel.sequence_parallel else 1)
    heads, kv_heads, f = shape.heads / t, shape.kv_heads / t, shape.ffn / t
    q, kv = heads * d, kv_heads * d
    scores = 0.0 if fused else heads * batch.width
    if fused:  # a norm's input and output; q, k, v, context; gate and up, and their product
        attention = 2 * h + 2 * q + 2 * kv + (q + kv) * shape.qk_norm
        attention += (1 + heads + (heads + kv_heads) * shape.qk_norm) * 4 / e
        mlp, core = 2 * h + 3 * f + 4 / e, heads * 4 / e
    else:  # a norm's input, scaled input and output; with QK norms likewise, and their slices hold all of QKV
        attention = 3 * h + 1 + 4 * q + scores  # q, repeated k and v, context
        attention += 4 * d / batch.count  # sines and cosines, for q and for k
        attention += (3 * q + 3 * kv + heads + kv_heads) if shape.qk_norm else 0
        mlp = 3 * h + 1 + 5 * f  # gate and up as one, silu, up, their product
        core = 2 * q + scores - kv - (0 if shape.qk_norm else q + 2 * kv)
    passing = max(n * (2 * shape.hidden + (2 if fused else 3) * f), 2 * n * shape.hidden + 2 * f * shape.hidden)
    return LayerBytes(
        *(int(e * x) for x in (n * attention, n * mlp, n * core, n * scores, n * h, n * (q + 2 * kv), passing))
    )


def _head(shape: ModelShape, cfg: PolicyConfig, batch: MicroBatch, responses: int, element: int, train: bool) -> int:
    """The most that the output layer and the log-probabilities hold at once, forward and (for training) backward."""
    t = cfg.parallel.tensor
    rows = shape.padded_vocab(t) // t
    logits = batch.tokens * rows * element
    chunk = 4 * rows * min(responses, max(1, _CHUNK // rows))
    several = responses > max(1, _CHUNK // rows)
    transposed = 2 if batch.count > 1 else 1
    forward = max(transposed * logits, logits + chunk * (4 if several else 2))
    if not train:
        return forward
    hidden = batch.tokens * shape.hidden * element
    function = 2 * logits + int(chunk * (5 if several else 4.5 if element < 4 else 4))
    linear = transposed * logits + 2 * hidden + rows * shape.hidden * element
    return max(forward, function, linear)


def in_flight(pipeline: int, stage: int, micro_batches: int) -> int:
    """Micro-batches whose activations a stage holds at once under 1F1B."""
    return min(pipeline - stage, micro_batches)


def train_working(
    shape: ModelShape, cfg: PolicyConfig, stage: int, batch: MicroBatch, responses: int, micro_batches: int,
    element: int, fused: bool,
) -> Parts:  # fmt: skip
    """Activations and logits at the fullest moment of forward and backward."""
    layer = layer_bytes(shape, cfg.parallel, batch, element, fused)
    layers = shape.layers // cfg.parallel.pipeline * in_flight(cfg.parallel.pipeline, stage, micro_batches)
    kept, inside = layers * layer.kept(cfg.recompute), layer.inside(cfg.recompute)
    if stage < cfg.parallel.pipeline - 1:
        return {"activations": kept + inside, "logits": 0}
    head = _head(shape, cfg, batch, responses, element, train=True)
    norm = layer.checkpoint * (2 if fused else 3)
    if norm + head >= inside:
        return {"activations": kept + norm, "logits": head}
    return {"activations": kept + inside, "logits": 0}


def logprob_working(
    shape: ModelShape, cfg: PolicyConfig, stage: int, batch: MicroBatch, responses: int, micro_batches: int,
    element: int, fused: bool,
) -> Parts:  # fmt: skip
    """Likewise for the forward-only pass, which keeps nothing from layer to layer. mcore's schedule holds the logits
    of one micro-batch until the next one's are there."""
    t, n = cfg.parallel.tensor, batch.tokens
    layer = layer_bytes(shape, cfg.parallel, batch, element, fused)
    q, kv, f = (x // t for x in (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.ffn))
    attention = 2 * layer.scores + element * n * (3 * shape.hidden + (2 * (q + 2 * kv) if fused else 7 * q + 3 * kv))
    mlp = element * n * (2 * shape.hidden + (3 if fused else 5) * f)
    head = _head(shape, cfg, batch, responses, element, train=False) if stage == cfg.parallel.pipeline - 1 else 0
    hidden = 3 * n * shape.hidden * element  # the embeddings, the last layer's output, the norm's
    before = n * shape.padded_vocab(t) // t * element if head and micro_batches > 1 else 0
    if head + hidden >= max(attention, mlp):
        return {"activations": hidden, "logits": head + before}
    return {"activations": max(attention, mlp), "logits": before}


def refit_working(shape: ModelShape, parallel: ParallelConfig, element: int, bucket_mb: int, transport: str) -> int:
    """One bucket of full tensors and the gather of the next; with `cuda_ipc` also the two buffers that engines read."""
    largest = max(shape.vocab, 2 * shape.ffn) * shape.hidden * element
    if parallel.tensor == 1:
        gathered = 2 * shape.ffn * shape.hidden * element  # split fused tensors, copied
    else:
        gathered = max(bucket_mb * 2**20, largest) + 2 * largest
    return gathered + (2 * max(bucket_mb * 2**20, largest) if transport == "cuda_ipc" else 0)


def policy_memory(
    config: Config, shape: ModelShape, *, element: int, fused: bool, context: int, transport: str = "shm"
) -> PolicyMemory:
    """The fullest rank of a policy, for micro-batches as full as the configuration lets them become.

    Args:
        element: bytes of a weight, 2 or 4.
        fused: Transformer Engine kernels, else megatron's own.
        context: bytes of the CUDA context, libraries and communicators, outside PyTorch's allocator.
        transport: of the refit (weight_sync.protocol.choose_transport).
    """
    cfg, parallel = config.policy, config.policy.parallel
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    # Samples of half the limit fill a micro-batch as well as one of the limit, and their logits are copied once more.
    train = fullest(cfg.micro_batch_tokens, longest, fused)
    scoring = fullest(cfg.logprob_micro_batch_tokens, longest, fused)
    updates = config.training.prompts_per_step // config.training.prompts_per_mini_batch
    samples = config.training.prompts_per_step * config.rollout.samples_per_prompt // parallel.data
    tokens = samples * longest
    micro_batches = max(1, -(-tokens // updates // train.tokens))
    plans = []
    for stage in {0, parallel.pipeline - 1}:
        rest = {"context": context} | rank_state(shape, parallel, stage, element)
        if not fused:  # megatron keeps one buffer for scores
            rest["scores buffer"] = max(
                layer_bytes(shape, parallel, b, element, fused).scores for b in (train, scoring)
            )
        working = train_working(shape, cfg, stage, train, train.tokens, micro_batches, element, fused)
        phases = {
            "train": rest | {"batch": BATCH_BYTES * tokens // updates} | working,
            "logprobs": rest
            | {"batch": BATCH_BYTES * tokens}
            | logprob_working(shape, cfg, stage, scoring, scoring.tokens, tokens // scoring.tokens, element, fused),
            "refit": rest
            | {"gathered": refit_working(shape, parallel, element, config.weight_sync.bucket_mb, transport)},
            # mcore gathers one kind of the optimizer's state at a time over the data ranks, in float32.
            "checkpoint": rest | {"gathered": rest["gradients"] + rest["gradients"] // parallel.data},
        }
        if config.algorithm.kl_coef > 0:
            phases["reference"] = phases["logprobs"] | {"own weights": rest["weights"]}
        plans.append(PolicyMemory(stage, phases))
    return max(plans, key=lambda plan: plan.peak)


def fullest(max_tokens: int, longest: int, fused: bool) -> MicroBatch:
    """The micro-batch of at most `max_tokens` (or one sample, if that is longer) that takes most memory."""
    if max_tokens < longest:
        return MicroBatch(longest, 1)
    count = max_tokens // longest
    return MicroBatch(max_tokens // 2, 2) if fused and count == 1 else MicroBatch(longest, count)


def checkpoint_host_bytes(shape: ModelShape, parallel: ParallelConfig, ranks_of_node: int) -> int:
    """Host memory of one node while a checkpoint is written: float32 weights and moments of every rank's shard, whole
    on each data rank, and one gathered copy more."""
    stages = (0, parallel.pipeline - 1)
    elements = max(buffer_elements(tensor_sizes(shape, parallel, stage), parallel.data) for stage in stages)
    return int(min(ranks_of_node, parallel.world_size) * (3 + 2 + 3 / parallel.data) * 4 * elements)


def kv_bytes_per_token(shape: ModelShape, tensor_parallel: int, element: int) -> int:
    """Of the KV cache on one GPU of an engine; KV heads are copied where there are fewer than GPUs."""
    return 2 * shape.layers * max(1, shape.kv_heads // tensor_parallel) * shape.head_dim * element


@dataclass(frozen=True)
class EngineMemory:
    """One GPU of a vLLM engine or server."""

    parts: Parts
    kv_tokens: int
    """Tokens that the KV cache holds."""
    fits: bool
    """Whether weights and working space leave room for one longest sequence."""

    def sequences(self, tokens: float, limit: int) -> int:
        """How many sequences of `tokens` run at once, at most `limit`."""
        return max(0, min(limit, int(self.kv_tokens // max(tokens, 1))))


def engine_memory(
    shape: ModelShape, *, tensor_parallel: int, memory: int, share: float, batched_tokens: int, max_num_seqs: int,
    longest: int, element: int,
) -> EngineMemory:  # fmt: skip
    """vLLM takes `share` of the GPU's `memory`: weights, the working space of its largest batch, and KV for the rest.

    Args:
        batched_tokens: tokens of one forward pass (max_num_batched_tokens).
        longest: longest sequence, prompt and answer.
    """
    t = tensor_parallel
    weights = shape.parameters * element // t
    # Hidden states in and out, and the FFN's gate, up and product; float32 logits of the sampled rows, twice.
    working = batched_tokens * element * (2 * shape.hidden + 3 * shape.ffn // t)
    working += 2 * 4 * max_num_seqs * shape.vocab
    kv = int(memory * share) - weights - working
    tokens = max(0, kv // kv_bytes_per_token(shape, t, element))
    return EngineMemory({"weights": weights, "working": working, "kv cache": max(0, kv)}, tokens, tokens >= longest)
