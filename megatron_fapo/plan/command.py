"""`fapo plan`: the output of a plan as text, JSON and a timeline."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_fapo.config.root import Config, asks_genrm
from megatron_fapo.errors import UserError
from megatron_fapo.plan.calibrate import calibrate, fitted
from megatron_fapo.plan.hardware import GIB, KINDS, parse_cluster
from megatron_fapo.plan.layouts import PHASES, SEED, Planner, Step, alternatives
from megatron_fapo.plan.lengths import find_lengths
from megatron_fapo.plan.shapes import find_shape
from megatron_fapo.policy.hf_config import layout_problems
from megatron_fapo.training.placement import Placement

_SHOWN = 8
"""Alternatives in the text; the JSON has all."""
_STEPS = 3
"""Simulated steps that the times are means of."""
_NAMES = {"train": "policy", "rollout": "engines", "genrm": "GenRM"}
_REMEDIES = {
    "rollout": "engines generate: give them more GPUs, or shorten the tail of responses",
    "score_tail": "GenRM servers judge after the last token: give them more GPUs, or shorten critiques",
    "logprobs": "the policy takes log-probabilities: give it more GPUs or a layout with fewer tensor ranks",
    "train": "the policy updates: give it more GPUs, a layout with fewer tensor ranks, or less recomputation",
    "refit": "new weights travel to the engines: give each node of engines more GPUs, whose NICs share them",
}


def plan_command(
    config: Config, *, model: str | None, cluster: str, lengths: str | None, rates: Path | None, json_path: Path | None,
    timeline: Path | None,
) -> int:  # fmt: skip
    """Print the plan; returns 0, or 1 when the configuration as it is cannot run on the cluster.

    Raises:
        UserError: an argument or a model that cannot be understood.
    """
    if timeline is not None and timeline.suffix not in (".png", ".svg", ".html"):
        raise UserError(f"--timeline {timeline}: its name must end in .png, .svg or .html")
    positions = config.policy.max_position_embeddings
    shape, origin = find_shape(model or config.policy.model_path, "policy.model_path", positions)
    judge, judge_origin = None, ""
    if asks_genrm(config) and config.genrm.servers > 0:
        judge, judge_origin = find_shape(config.genrm.model_path or "", "genrm.model_path")
    hardware = parse_cluster(cluster)
    planner = Planner(config, shape, judge, hardware, find_lengths(lengths, config, judge is not None))
    if rates is not None:
        planner = calibrate(planner, rates)
    problems = planner.problems()
    lines = [f"policy  {origin}: {shape.parameters / 1e9:.2f} B parameters"]
    lines += [f"GenRM   {judge_origin}: {judge.parameters / 1e9:.2f} B parameters"] if judge else []
    lines += [
        f"cluster {planner.hardware}: {hardware.gpus} GPUs",
        f"lengths {planner.lengths.text}",
        "",
        "As configured",
    ]
    lines += [f"  {line}" for line in _memory_lines(planner)] if not _broken(planner) else []
    lines += [f"  DOES NOT RUN: {problem}" for problem in problems]
    placed = not _broken(planner) and isinstance(planner.placement, Placement)
    steps = [planner.step(planner.drawn(SEED + i)) for i in range(_STEPS)] if placed else []
    lines += [f"  {line}" for line in _step_lines(planner, steps)] if steps else []
    divisible = not hardware.is_cpu and hardware.gpus >= len(planner.gpus)
    ranking = alternatives(planner) if divisible else []
    lines += ["", *_ranking_lines(ranking, config)] if ranking else []
    if divisible and not ranking:
        lines += ["", f"No layout of this model and these roles fits {hardware}."]
    lines += ["", *_assumption_lines(planner)]
    print("\n".join(lines))
    if json_path is not None:
        json_path.write_text(json.dumps(_as_json(planner, problems, steps, ranking), indent=1) + "\n", encoding="utf-8")
    if timeline is not None and steps:
        draw_timeline(planner, steps[0], timeline)
    return 1 if problems else 0


def _broken(planner: Planner) -> bool:
    """Whether the layout does not even give whole shards, so that nothing about it can be worked out."""
    return bool(layout_problems(planner.shape, planner.config.policy.parallel))


def _layout(planner: Planner) -> str:
    p = planner.config.policy
    sequence = "+SP" if p.parallel.sequence_parallel else ""
    layout = p.parallel
    more = {"CP": layout.context, "PP": layout.pipeline, "VPP": layout.virtual_pipeline, "EP": layout.expert}
    shown = "".join(f" {name}{ranks}" for name, ranks in more.items() if ranks > 1)
    return f"TP{layout.tensor}{sequence}{shown} DP{layout.data} {p.recompute}"


def _memory_lines(planner: Planner) -> list[str]:
    memory, phases = planner.hardware.rates.memory_gib, planner.policy.phases
    lines = [f"policy {_layout(planner)} recomputation; fullest rank (stage {planner.policy.stage}), GiB of {memory:g}"]
    for phase, parts in phases.items():
        shown = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items() if size >= 0.05 * GIB)
        lines.append(f"  {phase:<11}{planner.policy.total(phase) / GIB:>7.1f}  {shown}")
    host = ", ".join(f"{name} {size / GIB:.0f}" for name, size in planner.host_bytes().items() if size)
    lines.append(f"  host memory of a node, GiB: {host}")
    samples = planner.drawn()
    engines, judges = planner.speeds(samples)
    for name, server, stage in (("engines", planner.engine, engines), ("GenRM servers", planner.server, judges)):
        if server is None or stage is None:
            continue
        held = ", ".join(f"{part} {size / GIB:.1f}" for part, size in server.parts.items())
        lines.append(
            f"{name}: {stage.count}, each GPU {held} GiB = {server.kv_tokens:,} tokens; {stage.speed.slots} sequences"
            f" of the expected length at once"
        )
    return lines


def _mean_phases(steps: list[Step]) -> dict[str, float]:
    return {name: sum(step.phases[name] for step in steps) / len(steps) for name in PHASES}


def _step_lines(planner: Planner, steps: list[Step]) -> list[str]:
    phases = _mean_phases(steps)
    total = sum(phases.values())
    worst = max(phases, key=lambda name: phases[name])
    busy = planner.busy(steps[0])
    return [
        f"step {total:.1f} s: " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in phases.items()),
        f"MFU of the updates {steps[0].mfu:.2f}; busy: "
        + ", ".join(f"{_NAMES[role]} {share:.0%} of {planner.gpus[role]}" for role, share in busy.items()),
        f"bottleneck: {worst}, {phases[worst] / total:.0%} of the step: {_REMEDIES[worst]}",
    ]


def _ranking_lines(ranking: list[tuple[Planner, Step]], configured: Config) -> list[str]:
    lines = [
        f"All ways to divide the cluster, the {min(_SHOWN, len(ranking))} fastest of {len(ranking)}",
        f"  {'step s':>7} {'GPUs: policy + engines + GenRM':>31}  {'policy':<30} {'engines':<9}"
        + "".join(f"{name:>11}" for name in PHASES),
    ]
    for planner, step in ranking[:_SHOWN]:
        gpus = " + ".join(str(count) for count in planner.gpus.values())
        rollout = planner.config.rollout
        engines = f"{rollout.replicas} x TP{rollout.tensor_parallel}"
        lines.append(
            f"  {step.total_s:>7.1f} {gpus:>31}  {_layout(planner):<30} {engines:<9}"
            + "".join(f"{step.phases[name]:>11.1f}" for name in PHASES)
        )
    lines += ["  the fastest as overrides:", f"    {' '.join(overrides(ranking[0][0], configured))}"]
    return lines


def overrides(planner: Planner, configured: Config) -> list[str]:
    """The alternative as arguments of `fapo train` beside the file: whatever differs from it."""

    def leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        for name, value in values.items():
            if isinstance(value, dict) and value:
                yield from leaves(value, f"{prefix}{name}.")
            else:
                yield prefix + name, value

    before, after = (dict(leaves(c.model_dump())) for c in (configured, planner.config))
    changes = {name: value for name, value in after.items() if value != before[name]}
    return [f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in changes.items()]


def _assumption_lines(planner: Planner) -> list[str]:
    rates, sources = planner.hardware.rates, planner.hardware.sources
    assumed = ("assumed",) if planner.hardware.kind == "H100" else ("assumed", "fitted")
    guesses = [f"{name} {value:g}" for name, value in asdict(rates).items() if sources[name].startswith(assumed)]
    lines = ["Rates that are assumed (docs/sizing.md; --calibrate replaces them): " + ", ".join(guesses)]
    if changed := fitted(KINDS[planner.hardware.kind], rates):
        lines.append("Rates fitted or given: " + ", ".join(f"{name} {value:.4g}" for name, value in changed.items()))
    return lines


def _as_json(
    planner: Planner, problems: list[str], steps: list[Step], ranking: list[tuple[Planner, Step]]
) -> dict[str, Any]:
    configured: dict[str, Any] = {"problems": problems}
    if steps:
        configured |= {
            "policy_bytes": planner.policy.phases,
            "engine_bytes": planner.engine.parts,
            "engine_kv_tokens": planner.engine.kv_tokens,
            "genrm_bytes": planner.server.parts if planner.server else None,
            "genrm_kv_tokens": planner.server.kv_tokens if planner.server else None,
            "host_bytes": planner.host_bytes(),
            "phases_s": _mean_phases(steps),
            "mfu": steps[0].mfu,
            "busy": planner.busy(steps[0]),
            "gpus": planner.gpus,
        }
    rates, sources = asdict(planner.hardware.rates), planner.hardware.sources
    return {
        "cluster": str(planner.hardware),
        "lengths": planner.lengths.text,
        "rates": {name: {"value": value, "source": sources[name]} for name, value in rates.items()},
        "configured": configured,
        "ranking": [
            {
                "step_s": s.total_s,
                "phases_s": s.phases,
                "mfu": s.mfu,
                "gpus": p.gpus,
                "overrides": overrides(p, planner.config),
            }
            for p, s in ranking
        ],
    }


def draw_timeline(planner: Planner, step: Step, path: Path) -> None:
    """One step: running sequences of engines and servers over time, and the policy's phases."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    roles = [("engines", step.rollout.engine_trace), ("GenRM", step.rollout.judge_trace)]
    roles = [(name, trace) for name, trace in roles if trace]
    figure, axes = plt.subplots(len(roles) + 1, 1, figsize=(10, 2 + 1.6 * len(roles)), sharex=True)
    for axis, (name, trace) in zip(axes, roles, strict=False):
        times, running = zip(*trace, strict=True)
        axis.fill_between((*times, step.total_s), (*running, 0), step="post", alpha=0.6)
        axis.set_ylabel(f"{name}:\nsequences")
    at = 0.0
    for place, (name, seconds) in enumerate(step.phases.items()):
        axes[-1].barh(0, seconds, left=at, color=f"C{place}", label=f"{name} {seconds:.1f} s")
        at += seconds
    axes[-1].set(yticks=[], ylabel="phases", xlabel="seconds")
    axes[-1].legend(ncols=len(PHASES), loc="upper center", bbox_to_anchor=(0.5, -0.55), frameon=False, fontsize=8)
    axes[0].set_title(f"{planner.hardware}, {_layout(planner)}: one step, {step.total_s:.1f} s")
    if path.suffix == ".html":
        text = io.StringIO()
        figure.savefig(text, format="svg", bbox_inches="tight")
        path.write_text(f"<!doctype html><title>fapo plan</title>{text.getvalue()}", encoding="utf-8")
    else:
        figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
