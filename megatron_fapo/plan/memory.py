"""Bytes of one policy rank, by phase and category; of an engine and of a GenRM server. Pure arithmetic.

It counts what `policy/` does: mcore's DDP buffers and distributed optimizer, packs without padding, log-probabilities
of `policy/vocab_parallel.py` in blocks, the buckets of a refit, the phases of `policy/memory.py`. Two sets of kernels
are known: `fused` (Transformer Engine) and megatron's own with `policy/attention.py`.
`benchmarks/plan_check.py` compares all of it with real allocations; docs/sizing.md has the errors.

Shapes: n tokens of a pack on one context rank, e bytes of an element, t tensor ranks, h hidden, f FFN, q and kv widths.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_fapo.config.policy import OptimizerConfig, ParallelConfig, PolicyConfig
from megatron_fapo.config.root import Config
from megatron_fapo.policy.hf_config import ModelShape, stage_layers
from megatron_fapo.policy.memory import PARTS, PLAN
from megatron_fapo.policy.vocab_parallel import CHUNK_BYTES

BATCH_BYTES = 4 * 8 + 4 * 4
"""Of one token in the tensors of a micro-batch: ids, indexes, places, targets, and float32 per-token values."""

Parts = dict[str, int]
"""Category -> bytes."""


@dataclass(frozen=True)
class Pack:
    """A micro-batch on one context rank."""

    tokens: int
    responses: int
    """Of them, those that predict a token of a response."""


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


def tensor_sizes(
    shape: ModelShape, parallel: ParallelConfig, stage: int, chunk: int = 0
) -> tuple[list[int], list[int]]:
    """Elements of every parameter that a rank of pipeline `stage` holds in model chunk `chunk`: (those of experts are
    apart, since other ranks share them)."""
    t, h, d, moe = parallel.tensor, shape.hidden, shape.head_dim, shape.experts
    qkv = (shape.heads + 2 * shape.kv_heads) * d // t
    layer = [h, qkv * h, shape.heads * d // t * h, h]
    layer += [moe.count * h] if moe else [2 * shape.ffn // t * h, shape.ffn // t * h]
    layer += [qkv] if shape.qkv_bias else []
    layer += [d, d] if shape.qk_norm else []
    local = moe.ffn // parallel.expert_tensor * h if moe else 0
    experts = [2 * local, local] * (moe.count // parallel.expert) if moe else []
    split = stage_layers(shape.layers, parallel)
    layers = split[stage][chunk]
    first, last = (stage, chunk) == (0, 0), (stage, chunk) == (parallel.pipeline - 1, len(split[stage]) - 1)
    vocabulary = shape.padded_vocab(t) // t * h
    sizes = layer * layers + [vocabulary] * first + [h] * last
    return sizes + [vocabulary] * (last and not (shape.tied and first)), experts * layers


def buffer_elements(sizes: list[int], data: int) -> int:
    """Elements of mcore's flat buffer: parameters start at multiples of 64, the end divides over data ranks."""
    if not sizes:
        return 0
    end = sum(-(-size // 64) * 64 for size in sizes[:-1]) + sizes[-1]
    divisor = math.lcm(data, 128)
    return -(-end // divisor) * divisor


def stage_elements(shape: ModelShape, parallel: ParallelConfig, stage: int) -> tuple[int, int]:
    """(elements in the buffers of a rank, those of them whose optimizer state is this rank's share).

    Context ranks share the state as data ranks do. Expert parameters are shared by fewer ranks.
    """
    whole = parallel.context * parallel.data
    sharing = (whole, parallel.tensor * whole // (parallel.expert * parallel.expert_tensor))
    elements = share = 0
    for chunk in range(parallel.virtual_pipeline):
        for sizes, ranks in zip(tensor_sizes(shape, parallel, stage, chunk), sharing, strict=True):
            elements += (count := buffer_elements(sizes, max(1, ranks)))
            share += count // max(1, ranks)
    return elements, share


_STATE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1}


def optimizer_bytes(cfg: OptimizerConfig, element: int) -> tuple[float, float]:
    """Of a weight in this rank's share: (on the device, on the host). Float32 weights are their own main weights."""
    main = 0 if element == 4 else _STATE_BYTES[cfg.main_dtype]
    away = cfg.offload_fraction  # weight, gradient and moments are there, all float32
    return (1 - away) * (main + 2 * _STATE_BYTES[cfg.moments_dtype]), away * 16


def rank_state(shape: ModelShape, cfg: PolicyConfig, stage: int, element: int) -> Parts:
    """Weights, float32 gradients, and this rank's share of Adam (with main weights if the weights are not float32)."""
    elements, share = stage_elements(shape, cfg.parallel, stage)
    return {
        "weights": element * elements,
        "gradients": 4 * elements,
        "optimizer": int(optimizer_bytes(cfg.optimizer, element)[0] * share),
    }


@dataclass(frozen=True)
class LayerBytes:
    """What one layer keeps from forward to backward, and what passes through it meanwhile."""

    attention: int
    mlp: int
    core: int
    """Of `attention`: what recomputing the attention alone leaves out."""
    checkpoint: int
    """The layer's input: all that full recomputation keeps."""
    qkv: int
    """One tensor of queries, keys and values, which the attention's backward holds."""
    passing: int
    """Beside what is kept, while the backward of the MLP runs."""

    def kept(self, recompute: str) -> int:
        both = self.attention + self.mlp
        return {"none": both, "selective": both - self.core, "full": self.checkpoint}[recompute]

    def inside(self, recompute: str) -> int:
        """The most beside `kept` while one layer's backward runs, its recomputation included."""
        again = {"none": 0, "selective": 0, "full": self.attention + self.mlp - self.checkpoint}[recompute]
        core = self.core if recompute == "selective" else 0
        attention = again + core - self.mlp + 5 * self.checkpoint + (self.qkv if again else 0)
        return max(again + self.passing, attention)


def layer_bytes(shape: ModelShape, parallel: ParallelConfig, pack: Pack, element: int, fused: bool) -> LayerBytes:
    """For a pack on one tensor rank."""
    t, n, e, d, moe = parallel.tensor, pack.tokens, element, shape.head_dim, shape.experts
    h = shape.hidden / (t if parallel.sequence_parallel else 1)
    heads, kv_heads = shape.heads / t, shape.kv_heads / t
    q, kv = heads * d, kv_heads * d
    # Experts: tokens are copied to each of theirs, evenly, and the router's scores are kept in float32.
    copies = moe.per_token * parallel.expert_tensor / t if moe else 0
    f = copies * moe.ffn / parallel.expert_tensor if moe else shape.ffn / t
    routed = copies * shape.hidden + 2 * moe.count / t * 4 / e if moe else 0
    if fused:  # a norm's input and output; q, k, v, context; gate and up, and their product
        attention = 2 * h + 2 * q + 2 * kv + (q + kv) * shape.qk_norm
        attention += (1 + heads + (heads + kv_heads) * shape.qk_norm) * 4 / e
        mlp, core = 2 * h + 3 * f + 4 / e, heads * 4 / e
    else:  # a norm's input, scaled input and output; QKV as one, rotated q and k, context before and after packing
        attention = 3 * h + 1 + 4 * q + 3 * kv + heads * 4 / e
        attention += 4 * d  # sines and cosines, for q and for k
        attention += 2 * kv * parallel.context if parallel.context > 1 else 0  # of all context ranks
        attention += (2 * q + 2 * kv + heads + kv_heads) if shape.qk_norm else 0
        mlp = 3 * h + 1 + 5 * f  # gate and up as one, silu, up, their product
        core = q + heads * 4 / e
    weight_gradient = 0 if fused else 2 * shape.hidden * (moe.ffn if moe else f)  # else added within the product
    passing = max(n * (2 * shape.hidden + (2 if fused else 3) * f), 2 * n * shape.hidden + weight_gradient)
    return LayerBytes(
        *(int(e * x) for x in (n * attention, n * (mlp + routed), n * core, n * h, n * (q + 2 * kv), passing))
    )


def _head(shape: ModelShape, cfg: PolicyConfig, pack: Pack, element: int, fused: bool, *, train: bool) -> int:
    """The most that the log-probabilities hold at once, forward and (for training) backward: blocks of float32 logits,
    the hidden states of responses with their gradient in float32, the gradient of the output weight; and, if training
    keeps them, the logits of all blocks."""
    rows = shape.padded_vocab(cfg.parallel.tensor) // cfg.parallel.tensor
    states, h = max(pack.responses, 1), shape.hidden
    width = min(rows, max(1, CHUNK_BYTES // (4 * max(states, h)) // 128) * 128)
    block = 4 * states * width
    gathered = pack.tokens * h * element * (cfg.parallel.tensor > 1 and cfg.parallel.sequence_parallel)
    forward = gathered + states * h * element + int((1 if fused else 3) * block)  # logits; scaled; their exponentials
    if not train:
        return forward
    kept = 4 * states * rows - block if cfg.output_layer == "keep" else 0
    gradients = states * h * (element + 4) + rows * h * element
    # Logits, and on CPUs log-probabilities, probabilities, and which column is the target: then the gradient.
    softmax = int((1 + element / 4 if fused else 4.25) * block)
    product = block * element // 4 + 4 * states * h
    end = pack.tokens * h * element + states * h * element
    return gathered + max(kept + forward - gathered, gradients + max(kept + softmax, kept + product, end))


def layers_in_flight(layers: int, parallel: ParallelConfig, stage: int, micro_batches: int) -> int:
    """Layers whose activations a stage of so many layers holds at once: of one micro-batch for each stage from here to
    the last, or interleaved, as many chunks as mcore's schedule runs ahead."""
    ahead, chunks = parallel.pipeline - stage - 1, parallel.virtual_pipeline
    if chunks > 1:
        ahead = 2 * ahead + (chunks - 1) * parallel.pipeline
    return -(-min(ahead + 1, micro_batches * chunks) * layers // chunks)


def train_working(
    shape: ModelShape, cfg: PolicyConfig, stage: int, pack: Pack, micro_batches: int, element: int, fused: bool
) -> Parts:
    """Activations and log-probabilities at the fullest moment of forward and backward."""
    parallel = cfg.parallel
    layer = layer_bytes(shape, parallel, pack, element, fused)
    layers = layers_in_flight(sum(stage_layers(shape.layers, parallel)[stage]), parallel, stage, micro_batches)
    kept, inside = layers * layer.kept(cfg.recompute), layer.inside(cfg.recompute)
    if stage < parallel.pipeline - 1:
        return {"activations": kept + inside, "logits": 0}
    # The gradient of a tied weight waits for the embedding's, which comes last.
    tied = shape.tied and stage == 0
    waiting = tied * shape.padded_vocab(parallel.tensor) // parallel.tensor * shape.hidden * element
    head = _head(shape, cfg, pack, element, fused, train=True)
    norm = layer.checkpoint * (2 if fused else 3)
    moments = (
        {"activations": kept + norm, "logits": head},
        {"activations": kept + inside, "logits": waiting},
        {"activations": layer.checkpoint, "logits": 2 * waiting},
    )
    return max(moments, key=lambda parts: sum(parts.values()))


def logprob_working(shape: ModelShape, cfg: PolicyConfig, stage: int, pack: Pack, element: int, fused: bool) -> Parts:
    """Likewise for the forward-only pass, which keeps nothing from layer to layer."""
    t, n, moe = cfg.parallel.tensor, pack.tokens, shape.experts
    q, kv = shape.heads * shape.head_dim // t, shape.kv_heads * shape.head_dim // t
    attention = 2 * (q + 2 * kv) if fused else 5 * q + (3 + shape.qk_norm) * kv
    mlp = (3 if fused else 5) * shape.ffn // t + (0 if fused else shape.hidden)
    if moe:  # all experts at once, or one after the other between copies of the tokens
        copies = moe.per_token * shape.hidden // t
        mlp = copies + 3 * moe.per_token * moe.ffn // t if fused else 3 * (shape.hidden + copies)
        mlp += 0 if fused else 5 * moe.per_token * moe.ffn // moe.count // t
    body = element * n * (3 * shape.hidden + max(attention, mlp))
    last = stage == cfg.parallel.pipeline - 1
    head = _head(shape, cfg, pack, element, fused, train=False) if last else 0
    hidden = 3 * n * shape.hidden * element  # the embeddings, the last layer's output, the norm's
    if head + hidden >= body:
        return {"activations": hidden, "logits": head}
    return {"activations": body, "logits": 0}


def refit_working(bucket_mb: int, weights: int, *, alone: bool, mirrored: bool) -> int:
    """Packed chunks on their way to other cards, and on CPUs two mirrors that engines map.

    Args:
        weights: bytes of the rank's own; no bucket has more.
        alone: policy and engine are one process each, on one card, where the weights themselves are mapped.
    """
    return (2 * mirrored + (not alone)) * min(bucket_mb * 2**20, weights)


def policy_memory(
    config: Config, shape: ModelShape, *, element: int, fused: bool, context: int, alone: bool = False
) -> PolicyMemory:
    """The fullest rank of a policy, for micro-batches as full as the configuration lets them become.

    Args:
        element: bytes of a weight, 2 or 4.
        fused: Transformer Engine kernels, else megatron's own.
        context: bytes of the CUDA context, libraries and communicators, outside PyTorch's allocator.
        alone: of the refit, see `refit_working`.
    """
    cfg, parallel = config.policy, config.policy.parallel
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    train, scoring = (
        # All of it responses: the prompts of a pack of long ones are a small part.
        Pack(*[-(-max(most, longest) // parallel.context)] * 2)
        for most in (cfg.micro_batch_tokens, cfg.logprob_micro_batch_tokens)
    )
    samples = config.training.prompts_per_mini_batch * config.rollout.samples_per_prompt
    tokens = -(-samples * longest // (parallel.data * parallel.context))
    micro_batches = max(1, -(-tokens // train.tokens))
    plans = []
    for stage in range(parallel.pipeline):
        state = rank_state(shape, cfg, stage, element)
        phases: dict[str, Parts] = {
            "train": train_working(shape, cfg, stage, train, micro_batches, element, fused)
            | {"batch": BATCH_BYTES * train.tokens},
            "logprobs": logprob_working(shape, cfg, stage, scoring, element, fused)
            | {"batch": BATCH_BYTES * scoring.tokens},
            "refit": {
                "buckets": refit_working(
                    config.weight_sync.bucket_mb, state["weights"], alone=alone, mirrored=not fused
                )
            },
            "rollout": {},
        }
        if config.algorithm.kl_coef > 0:
            phases["reference"] = phases["logprobs"] | {"own weights": state["weights"]}
        owners = dict(zip(state, PARTS, strict=True))
        for phase, working in phases.items():
            here = PLAN["logprobs" if phase == "reference" else phase] if cfg.offload else PARTS
            held = {name: size for name, size in state.items() if owners[name] in here}
            phases[phase] = {"context": context} | held | working
        plans.append(PolicyMemory(stage, phases))
    return max(plans, key=lambda plan: plan.peak)


def host_bytes(shape: ModelShape, cfg: PolicyConfig, ranks_of_node: int, element: int) -> Parts:
    """Host memory of one node of the policy, by what it is for: state that an offloading optimizer steps there, pinned
    copies of what leaves the device between phases, and a checkpoint's copy of every rank's share while it is written
    (weights are shared out over data ranks)."""
    parts: Parts = {}
    for stage in range(cfg.parallel.pipeline):
        state, share = rank_state(shape, cfg, stage, element), stage_elements(shape, cfg.parallel, stage)[1]
        each = {
            "optimizer": int(optimizer_bytes(cfg.optimizer, element)[1] * share),
            "offload": (state["weights"] + state["optimizer"]) * cfg.offload,
            "checkpoint": (element + 4 + 2 * _STATE_BYTES[cfg.optimizer.moments_dtype]) * share,
        }
        parts = {name: max(size, parts.get(name, 0)) for name, size in each.items()}
    return {name: size * min(ranks_of_node, cfg.parallel.world_size) for name, size in parts.items()}


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
    ffn = shape.experts.per_token * shape.experts.ffn if shape.experts else shape.ffn
    working = batched_tokens * element * (2 * shape.hidden + 3 * ffn // t)
    working += 2 * 4 * max_num_seqs * shape.vocab
    kv = int(memory * share) - weights - working
    tokens = max(0, kv // kv_bytes_per_token(shape, t, element))
    return EngineMemory({"weights": weights, "working": working, "kv cache": max(0, kv)}, tokens, tokens >= longest)
