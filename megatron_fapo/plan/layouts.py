"""One plan: memory and a simulated step of a configuration on a cluster; and all legal ones, ranked by step time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import product
from typing import Any

from megatron_fapo.config.policy import ParallelConfig
from megatron_fapo.config.root import RULES, Config, judges_take_turns
from megatron_fapo.errors import UserError
from megatron_fapo.plan.hardware import GIB, Hardware
from megatron_fapo.plan.lengths import Lengths, Record
from megatron_fapo.plan.memory import (
    EngineMemory,
    Parts,
    PolicyMemory,
    engine_memory,
    host_bytes,
    kv_bytes_per_token,
    policy_memory,
)
from megatron_fapo.plan.simulate import Rollout, SimSample, Speed, Stage, simulate
from megatron_fapo.plan.work import PolicyTimes, PolicyWork
from megatron_fapo.policy.flops import head_flops, layer_flops
from megatron_fapo.policy.hf_config import ModelShape, layout_problems
from megatron_fapo.processes import Node
from megatron_fapo.training.placement import ROLES, Placement, place

PHASES = ("rollout", "score_tail", "logprobs", "train", "refit")
"""Of a step, in order, as the loop names them."""
SEED = 1
_SIZES = (1, 2, 4, 8)
"""Tensor, context and expert ranks and pipeline stages that are tried."""
_RECOMPUTED = ("none", "selective", "full")


def changed(config: Config, **sections: dict[str, Any]) -> Config:
    """The configuration with fields of its sections replaced: changed(config, rollout={"replicas": 4})."""
    update = {name: getattr(config, name).model_copy(update=fields) for name, fields in sections.items()}
    return config.model_copy(update=update)


@dataclass(frozen=True)
class Step:
    """A simulated step."""

    phases: dict[str, float]
    """Seconds, by PHASES."""
    rollout: Rollout
    mfu: float
    """Of the train phase."""

    @property
    def total_s(self) -> float:
        return sum(self.phases.values())


@dataclass(frozen=True)
class Planner:
    """What a plan needs to know; `plan.config` is what it is about."""

    config: Config
    shape: ModelShape
    judge_shape: ModelShape | None
    hardware: Hardware
    lengths: Lengths

    def with_config(self, config: Config) -> Planner:
        return dataclasses.replace(self, config=config)

    @property
    def element(self) -> int:
        """Bytes of a weight."""
        auto = "float32" if self.hardware.is_cpu else "bfloat16"
        return 4 if (auto if self.config.policy.dtype == "auto" else self.config.policy.dtype) == "float32" else 2

    @property
    def judges(self) -> bool:
        """Whether servers of the run's own judge; others cost the cluster nothing, and are taken to keep up."""
        return self.judge_shape is not None

    @property
    def gpus(self) -> dict[str, int]:
        """Role -> GPUs; who takes turns has none of its own."""
        c = self.config
        engines = 0 if c.rollout.colocated else c.rollout.replicas * c.rollout.tensor_parallel
        roles = {"train": c.policy.parallel.world_size, "rollout": engines}
        servers = 0 if judges_take_turns(c) else c.genrm.servers * c.genrm.tensor_parallel
        return roles | ({"genrm": servers} if self.judges else {})

    @cached_property
    def placement(self) -> Placement | UserError:
        """The node of every process, by the code that places a run's; or why there is none."""
        c, hardware = self.config.cluster, self.hardware
        counts = zip(ROLES, (c.train_nodes, c.rollout_nodes, c.genrm_nodes), strict=True)
        roles = [frozenset({role}) for role, count in counts for _ in range(count)] or [frozenset()] * hardware.nodes
        if len(roles) > hardware.nodes:
            return UserError(f"`cluster` has {len(roles)} nodes, and {hardware} has {hardware.nodes}")
        gpus = 0 if hardware.is_cpu else hardware.gpus_per_node
        nodes = [Node(str(i), str(i), i, gpus, role) for i, role in enumerate(roles)]
        device = "cpu" if hardware.is_cpu else "gpu"
        try:
            return place(self.config, nodes, device, policy=True, rollout=True, genrm=self.judges)
        except UserError as error:
            return error

    @property
    def refit_s(self) -> float:
        """Seconds of a refit between processes as they are placed."""
        assert isinstance(self.placement, Placement)
        ranks, engines = ([node.id for node in nodes] for nodes in (self.placement.policy, self.placement.engines))
        return self.work.refit_s(ranks, engines, shared=self.share_cards)

    @property
    def share_cards(self) -> bool:
        """Whether engines are on the policy's own cards."""
        c = self.config
        return c.rollout.colocated or (c.gpu_share < 1 and max(self.gpus.values()) == 1)

    @cached_property
    def policy(self) -> PolicyMemory:
        context = int(self.hardware.rates.context_gib * GIB)
        return policy_memory(
            self.config, self.shape, element=self.element, fused=not self.hardware.is_cpu, context=context,
            alone=self.share_cards and max(self.gpus.values()) == 1,
        )  # fmt: skip

    @cached_property
    def engine(self) -> EngineMemory:
        c = self.config.rollout
        longest = self.config.data.max_prompt_tokens + c.max_response_tokens
        batched = int(c.vllm.get("max_num_batched_tokens", 8192))
        return self._server(
            self.shape, c.tensor_parallel, c.gpu_memory_utilization, c.cpu_kv_cache_gb, batched, c.max_num_seqs, longest
        )

    @cached_property
    def server(self) -> EngineMemory | None:
        c = self.config.genrm
        if self.judge_shape is None:
            return None
        longest = c.max_model_len or self.judge_shape.max_positions
        seqs, batched = int(c.vllm.get("max_num_seqs", 256)), int(c.vllm.get("max_num_batched_tokens", 8192))
        return self._server(
            self.judge_shape, c.tensor_parallel, c.gpu_memory_utilization, c.cpu_kv_cache_gb, batched, seqs, longest
        )

    def _server(
        self, shape: ModelShape, tensor: int, share: float, cpu_gb: float, batched: int, seqs: int, longest: int
    ) -> EngineMemory:
        if self.hardware.is_cpu:
            tokens = int(cpu_gb * GIB) // kv_bytes_per_token(shape, tensor, self.element)
            parts = {"weights": shape.parameters * self.element // tensor, "kv cache": int(cpu_gb * GIB)}
            return EngineMemory(parts, tokens, tokens >= longest)
        memory = int(self.hardware.rates.memory_gib * GIB)
        return engine_memory(
            shape, tensor_parallel=tensor, memory=memory, share=share, batched_tokens=batched, max_num_seqs=seqs,
            longest=longest, element=2,
        )  # fmt: skip

    def problems(self) -> list[str]:
        """Why this cannot run on the cluster; empty when it can."""
        found = self.policy_problems()
        for role, shape, tensor in (
            ("rollout", self.shape, self.config.rollout.tensor_parallel),
            ("genrm", self.judge_shape, self.config.genrm.tensor_parallel),
        ):
            if shape is not None and shape.heads % tensor:
                found.append(f"{shape.heads} attention heads do not divide by {role}.tensor_parallel={tensor}")
        if isinstance(self.placement, UserError):
            found.append(str(self.placement))
        return found + ([] if self.hardware.is_cpu else self._vllm_problems())

    def policy_problems(self) -> list[str]:
        """Those of the policy alone: rules of the configuration, layout, memory."""
        c, memory = self.config, int(self.hardware.rates.memory_gib * GIB)
        broken = [rule for rule in RULES if rule.purposes is None and rule.broken(c)]
        found = [f"{', '.join(rule.reads)}: {rule.remedy}" for rule in broken]
        found += layout_problems(self.shape, c.policy.parallel)
        if found or self.hardware.is_cpu:
            return found
        return [
            f"the policy does not fit in {phase}: {self.policy.total(phase) / GIB:.1f} of {memory / GIB:.1f} GiB"
            for phase in self.policy.phases
            if self.policy.total(phase) > memory
        ]

    def _vllm_problems(self) -> list[str]:
        memory, found, c = int(self.hardware.rates.memory_gib * GIB), [], self.config
        if c.gpu_share < 1:
            shares = c.rollout.gpu_memory_utilization + self.judges * c.genrm.gpu_memory_utilization
            if self.policy.peak + shares * memory > memory:
                found.append(
                    f"on a shared GPU the policy's {self.policy.peak / GIB:.1f} GiB and {shares:.0%} for vLLM are more"
                    f" than {memory / GIB:.1f} GiB"
                )
        elif c.rollout.colocated:
            # Of an engine that sleeps its process stays; for a refit its weights are awake, for a rollout all of it.
            asleep, bucket = int(self.hardware.rates.context_gib * GIB), c.weight_sync.bucket_mb * 2**20
            awake = {
                "refit": self.engine.parts["weights"] + 2 * bucket + asleep,  # one arrives, one is unpacked
                "rollout": int(c.rollout.gpu_memory_utilization * memory),
            }
            found += [
                f"with colocated engines {phase} takes {total / GIB:.1f} of {memory / GIB:.1f} GiB"
                for phase in self.policy.phases
                if (total := self.policy.total(phase) + awake.get(phase, asleep)) > memory
            ]
        if judges_take_turns(c) and self.judges:
            # Beside the one that is awake, the processes of the others stay.
            others = (1 + c.rollout.colocated) * self.hardware.rates.context_gib * GIB
            share = max(c.genrm.gpu_memory_utilization, c.rollout.gpu_memory_utilization)
            if share * memory + others > memory:
                found.append(
                    f"{share:.0%} of a card for vLLM leave less than the {others / GIB:.1f} GiB of the processes that"
                    " sleep beside it"
                )
        for role, server in (("an engine", self.engine), ("a GenRM server", self.server)):
            if server is not None and not server.fits:
                found.append(f"{role}'s KV cache holds {server.kv_tokens} tokens, fewer than its longest sequence")
        return found

    def speeds(self, samples: Sequence[SimSample]) -> tuple[Stage, Stage | None]:
        """Engines and GenRM servers, with as many slots as sequences of the mean length fit."""
        c, rates = self.config, self.hardware.rates
        mean = sum(s.prompt + s.response for s in samples) / len(samples)
        slots = max(1, self.engine.sequences(mean, c.rollout.max_num_seqs))
        engines = Stage(c.rollout.replicas, self._speed(self.shape, c.rollout.tensor_parallel, slots, 1.0))
        judged = [s for s in samples if s.critique]
        if self.server is None or self.judge_shape is None or not judged:
            return engines, None
        mean = sum(s.prompt + s.response + s.critique for s in judged) / len(judged)
        limit = min(c.genrm.max_concurrent_per_server, int(c.genrm.vllm.get("max_num_seqs", 256)))
        slots = max(1, self.server.sequences(mean, limit))
        speed = self._speed(self.judge_shape, c.genrm.tensor_parallel, slots, rates.judge_factor)
        return engines, Stage(c.genrm.servers, speed)

    def _speed(self, shape: ModelShape, tensor: int, slots: int, factor: float) -> Speed:
        """A decoding step reads the weights and all KV once; each sequence adds its FLOPs and its handling."""
        rates = self.hardware.rates
        element = self.element if self.hardware.is_cpu else 2
        flops = layer_flops(shape, 1, 0) + head_flops(shape, 1)
        token_s = flops / tensor / (rates.peak_tflops * 1e12 * rates.prefill_mfu)
        # Two all-reduces a layer, too small for bandwidth: about 15 microseconds each.
        joined = 0.0 if tensor == 1 else 2 * shape.layers * 15e-6
        return Speed(
            factor * (rates.decode_base_s + joined + shape.parameters * element / tensor / (rates.memory_gbs * 1e9)),
            factor * (rates.decode_sequence_s + token_s),
            factor * kv_bytes_per_token(shape, tensor, element) / (rates.memory_gbs * 1e9),
            factor * token_s,
            slots,
        )

    def rollout(self, samples: Sequence[SimSample]) -> Rollout:
        """Generating and scoring these samples."""
        c, (engines, judges) = self.config, self.speeds(samples)
        rule_s = 0.0 if c.reward.task == "critic" else self.hardware.rates.rule_s
        group, processes = c.rollout.samples_per_prompt, c.reward.verifier_processes
        streamed = not judges_take_turns(c)
        return simulate(samples, group, engines, judges, rule_s=rule_s, rule_processes=processes, streamed=streamed)

    @property
    def work(self) -> PolicyWork:
        return PolicyWork(self.config, self.shape, self.hardware, self.element)

    def step(self, samples: Sequence[SimSample]) -> Step:
        """One step with samples of these lengths."""
        return self.joined(self.rollout(samples), self.work.times(samples))

    def joined(self, rollout: Rollout, times: PolicyTimes) -> Step:
        """A step of a rollout and what the policy does after it."""
        seconds = (rollout.generation_s, rollout.tail_s, times.logprobs_s, times.train_s)
        return Step(dict(zip(PHASES, (*seconds, self.refit_s), strict=True)), rollout, times.mfu)

    def drawn(self, seed: int = SEED) -> list[SimSample]:
        count = self.config.training.prompts_per_step * self.config.rollout.samples_per_prompt
        return self.lengths.draw(count, seed)

    def host_bytes(self) -> Parts:
        """Host memory that the policy takes on one of its nodes."""
        return host_bytes(self.shape, self.config.policy, self.hardware.gpus_per_node, self.element)

    def busy(self, step: Step) -> dict[str, float]:
        """Role -> share of its GPUs' time in the step that it works."""
        total = step.total_s
        policy = sum(step.phases[name] for name in ("logprobs", "train"))
        shares = {
            "train": policy / total,
            "rollout": sum(step.rollout.engine_busy_s) / total / len(step.rollout.engine_busy_s),
        }
        judge = step.rollout.judge_busy_s
        return shares | ({"genrm": sum(judge) / total / len(judge)} if judge else {})

    def errors(self, records: Sequence[Record]) -> dict[str, float]:
        """Phase -> predicted over measured seconds of these steps, less one; `total` is of the phases here."""
        steps = [self.step(record.samples) for record in records]
        measured = {name: sum(r.phases[name] for r in records) for name in PHASES}
        predicted = {name: sum(s.phases[name] for s in steps) for name in PHASES}
        measured["total"], predicted["total"] = sum(measured.values()), sum(predicted.values())
        return {name: predicted[name] / measured[name] - 1 for name in measured}


def alternatives(planner: Planner) -> list[tuple[Planner, Step]]:
    """Every way to give the cluster's nodes (of one or two nodes: GPUs) to the roles, each with its fastest legal
    policy layout and engine size, fastest step first. What is trained and asked stays as configured."""
    samples, hardware = planner.drawn(), planner.hardware
    whole = hardware.nodes >= 3
    unit = hardware.gpus_per_node * max(1, hardware.nodes // 8) if whole else max(1, hardware.gpus // 8)
    apart = planner.with_config(
        changed(
            planner.config, rollout={"colocated": False}, policy={"offload": False}, genrm={"colocated": False}
        ).model_copy(update={"gpu_share": 1.0})
    )
    policy, rollout = cache(partial(_best_policy, apart, samples)), cache(partial(_best_rollout, apart, samples))
    found = []
    for split in _splits(hardware.gpus // unit, 3 if planner.judges else 2):
        gpus = [part * unit for part in split]
        trained, rolled = policy(gpus[0]), rollout(*gpus[1:])
        if trained is None or rolled is None:
            continue
        nodes = [count // hardware.gpus_per_node if whole else 0 for count in (*gpus, 0)]
        config = changed(
            trained[0].config,
            cluster={"train_nodes": nodes[0], "rollout_nodes": nodes[1], "genrm_nodes": nodes[2]},
        ).model_copy(update={"rollout": rolled[0].config.rollout, "genrm": rolled[0].config.genrm})
        candidate = planner.with_config(config)
        if not candidate.problems():
            found.append((candidate, candidate.joined(rolled[1], trained[1])))
    return sorted(found, key=lambda pair: pair[1].total_s)


def _splits(units: int, roles: int) -> Iterator[tuple[int, ...]]:
    """Ways to give at least one unit to each role, all of them in use."""
    if roles == 1:
        yield (units,)
        return
    for first in range(1, units - roles + 2):
        for rest in _splits(units - first, roles - 1):
            yield (first, *rest)


def _best_policy(planner: Planner, samples: Sequence[SimSample], gpus: int) -> tuple[Planner, PolicyTimes] | None:
    """The legal layout on so many GPUs whose log-probabilities and updates take least time. Tensor ranks share a
    node: their collectives are not overlapped with anything."""
    c, found = planner.config, []
    for parallel in _parallels(planner, gpus):
        for recompute in sorted({"none", "full", c.policy.recompute}, key=_RECOMPUTED.index):
            candidate = planner.with_config(changed(c, policy={"parallel": parallel, "recompute": recompute}))
            if not candidate.policy_problems():
                found.append(candidate)
                break  # more recomputation only takes longer

    def seconds(candidate: Planner) -> float:
        """Of two mini-batches: all of them would take a minute for all candidates."""
        times = candidate.work.times(samples[: 2 * c.training.prompts_per_mini_batch * c.rollout.samples_per_prompt])
        return times.logprobs_s + times.train_s

    best = min(found, key=seconds, default=None)
    return None if best is None else (best, best.work.times(samples))


def _parallels(planner: Planner, gpus: int) -> Iterator[ParallelConfig]:
    """Layouts of so many GPUs, by no means all legal. Tensor and context ranks share a node, and of the longest sample
    a context rank has 4,096 tokens at least: below that, attention in slices is launches more than work."""
    c, experts = planner.config, _SIZES if planner.shape.experts else (1,)
    slices = max(1, (c.data.max_prompt_tokens + c.rollout.max_response_tokens) // 4096)
    for tensor, context, pipeline in product(_SIZES, _SIZES, _SIZES):
        ranks = tensor * context * pipeline
        if gpus % ranks or tensor * context > planner.hardware.gpus_per_node or context > slices:
            continue
        for chunks, expert in product((1, 2) if pipeline > 1 else (1,), experts):
            yield ParallelConfig(
                tensor=tensor, context=context, pipeline=pipeline, virtual_pipeline=chunks, expert=expert,
                data=gpus // ranks, sequence_parallel=tensor > 1,
            )  # fmt: skip


def _best_rollout(
    planner: Planner, samples: Sequence[SimSample], engine_gpus: int, judge_gpus: int = 0
) -> tuple[Planner, Rollout] | None:
    """The engine size that has all samples generated and scored soonest."""
    found, genrm = [], {"servers": judge_gpus // planner.config.genrm.tensor_parallel}
    for tensor in _SIZES:
        if engine_gpus % tensor or tensor > planner.hardware.gpus_per_node or planner.shape.heads % tensor:
            continue
        engines = {"tensor_parallel": tensor, "replicas": engine_gpus // tensor}
        roles = {"rollout": engines} | ({"genrm": genrm} if judge_gpus else {})
        candidate = planner.with_config(changed(planner.config, **roles))
        if candidate.engine.fits and (not judge_gpus or genrm["servers"]):
            found.append((candidate, candidate.rollout(samples)))
    return min(found, key=lambda pair: max(pair[1].scored), default=None)
