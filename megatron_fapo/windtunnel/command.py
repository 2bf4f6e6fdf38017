"""`fapo bench windtunnel`: the data, the models and the runs of the wind tunnel, then their summary.

A run that is finished is not repeated, one that was stopped goes on from its checkpoint, and one that was made with
other settings is refused. Runs are `fapo train` in processes of their own, `jobs` at a time: a tiny run alternates
between its engine and its policy and keeps about one core busy.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_fapo.config.load import load_config
from megatron_fapo.data.datasets import write_prompts, write_testbed
from megatron_fapo.data.demonstrations import critic_rows, genrm_sft_examples
from megatron_fapo.data.tokenizer import init_tiny_model
from megatron_fapo.errors import UserError
from megatron_fapo.genrm.prompts import judge_messages
from megatron_fapo.observe.files import write_atomically
from megatron_fapo.observe.metrics import FILE, read_metrics
from megatron_fapo.observe.samples import read_samples
from megatron_fapo.rollout.guard import Guard
from megatron_fapo.training.signals import StopRequest, StopRequestedError
from megatron_fapo.windtunnel.arms import ARMS, CRITIC_STEPS, EXAMPLES, STEPS, Arm
from megatron_fapo.windtunnel.report import write_report
from megatron_fapo.windtunnel.summary import read, summarise

PROMPTS, CRITIC_ROWS, CRITIC_WARMUP_ROWS, CRITIC_WARMUP_STEPS, DATA_SEED = 2000, 2000, 8000, 250, 11


@dataclass(frozen=True)
class Tunnel:
    """Where the runs go, and what they have in common."""

    out: Path
    jobs: int = 2
    """Runs at a time."""
    steps: int = STEPS
    critic_steps: int = CRITIC_STEPS
    policy: Path = EXAMPLES / "models" / "policy"
    """What policies start from: a model that has learned to write solutions of the testbed, carelessly."""
    genrm: Path = EXAMPLES / "models" / "genrm"
    configs: tuple[Path, ...] = ()
    """Read after examples/windtunnel.yaml: other hardware, other model sizes."""

    def steps_of(self, arm: Arm) -> int:
        return self.critic_steps if arm.kind == "critic" else self.steps

    def run_dir(self, arm: Arm, seed: int) -> Path:
        return self.out / f"{arm.name}-seed{seed}"

    def arguments(self, arm: Arm, seed: int) -> tuple[list[Path], list[str]]:
        """Configuration files and overrides of a run."""
        critic = arm.kind == "critic"
        model, data = (self.out / "critic-base", "critic.jsonl") if critic else (self.policy, "train.jsonl")
        overrides = [
            f"run_dir={self.run_dir(arm, seed)}",
            f"seed={seed}",
            f"policy.model_path={model}",
            f"data.train=[{self.out / 'data' / data}]",
            f"training.steps={self.steps_of(arm)}",
            *(override.format(genrm=self.genrm, steps=self.steps) for override in arm.overrides),
        ]
        return [EXAMPLES / ("windtunnel_critic.yaml" if critic else "windtunnel.yaml"), *self.configs], overrides


Run = tuple[Arm, int]
"""An arm and a seed."""


def windtunnel_command(arms: Sequence[Arm], seeds: Sequence[int], tunnel: Tunnel) -> int:
    """Run what is missing, write summary.json and report.html; returns the exit code.

    Raises:
        UserError: not in a checkout of the repository, or there are runs that were made with other settings.
    """
    if not (EXAMPLES / "windtunnel.yaml").is_file():
        raise UserError(f"{EXAMPLES}/windtunnel.yaml not found: the wind tunnel runs from a checkout of the repository")
    return asyncio.run(_windtunnel(arms, seeds, tunnel))


async def _windtunnel(arms: Sequence[Arm], seeds: Sequence[int], tunnel: Tunnel) -> int:
    began, out = time.monotonic(), tunnel.out
    runs = [(arm, seed) for seed in dict.fromkeys(seeds) for arm in arms]
    with StopRequest() as stop, _alone(out):
        try:
            await stop.race(_prepare(runs, tunnel))
            refuse_other_settings(runs, tunnel)
            failed = await stop.race(_run_all(runs, tunnel))
        except StopRequestedError:
            _say("stopped; the same command goes on")
            return stop.exit_code
    if failed:
        _say("failed: " + ", ".join(f"{run.name} (its log: {run}/console.log)" for run in failed))
        return 1
    readings = []
    for arm, seed in runs:
        run = tunnel.run_dir(arm, seed)
        steps = [int(record["step"]) for record in read_metrics(run) if record["step"] > 0]
        readings.append(read(arm, seed, {step: read_samples(run, step) for step in steps}))
    summary = {"seconds": round(time.monotonic() - began), "seeds": list(seeds)} | summarise(readings)
    write_atomically(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    text = write_report(summary, readings, out / "report.html")
    print(text)
    _say(f"{out}/report.html and summary.json  ({time.monotonic() - began:.0f} s)")
    return 0


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """
    Raises:
        UserError: another wind tunnel writes to `out`.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out} is in use by another wind tunnel: wait for it, or choose another --out") from None
        yield


async def _prepare(runs: Sequence[Run], tunnel: Tunnel) -> None:
    """Problems, and for the critic's arms their rows and a GenRM that has learned half of its trade."""
    out = tunnel.out
    # No prompt is drawn twice; and the same file whichever arms are asked for, so that arms can be added later.
    drawn = tunnel.steps * load_config(*tunnel.arguments(ARMS[0], 0)).config.training.prompts_per_step
    write_testbed(out / "data", max(PROMPTS, drawn), 64, DATA_SEED)
    base = out / "critic-base"
    if all(arm.kind == "policy" for arm, _ in runs):
        return
    write_prompts(
        out / "data" / "critic.jsonl",
        critic_rows(CRITIC_ROWS, DATA_SEED + 1, functools.partial(judge_messages, form="tagged")),
    )
    if (base / "model.safetensors.index.json").is_file():  # written last
        return
    _say(f"warming up a GenRM for {CRITIC_WARMUP_STEPS} updates: good enough to find flaws, not to place them")
    init_tiny_model(out / "critic-init", DATA_SEED, num_hidden_layers=2)
    demonstrations = out / "data" / "critic_warmup.jsonl"
    rows = genrm_sft_examples(CRITIC_WARMUP_ROWS, DATA_SEED + 2, functools.partial(judge_messages, form="tagged"))
    write_prompts(demonstrations, ({"messages": messages, "response": response} for messages, response in rows))
    run = out / "critic-warmup"
    arguments = ["warmup", "-c", str(EXAMPLES / "tiny_warmup_genrm.yaml"), "--data", str(demonstrations)]
    steps = f"training.steps={CRITIC_WARMUP_STEPS}", f"policy.optimizer.decay_steps={CRITIC_WARMUP_STEPS}"
    overrides = [f"policy.model_path={out / 'critic-init'}", f"run_dir={run}", *steps]
    (run / FILE).unlink(missing_ok=True)  # of a warm-up that was stopped: it has no checkpoints to go on from
    code = await _fapo([*arguments, "--out", str(base), *overrides], out / "critic-warmup.log")
    if code != 0:
        raise UserError(f"the GenRM's warm-up ended with exit code {code}: see {out}/critic-warmup.log")


def refuse_other_settings(runs: Sequence[Run], tunnel: Tunnel) -> None:
    """
    Raises:
        UserError: a run directory was made with another configuration than its arm has now, or from other models or
            data under the same paths.
    """
    used = [tunnel.out / "data" / "train.jsonl", tunnel.policy, tunnel.genrm]
    used += [tunnel.out / "data" / "critic.jsonl", tunnel.out / "critic-base"]
    found = {str(path): digest for path in used if (digest := _digest(path))}
    record = tunnel.out / "inputs.json"
    before = json.loads(record.read_text()) if record.is_file() else {}
    changed = [path for path in before if path in found and before[path] != found[path]]
    if changed:
        raise UserError(f"{tunnel.out}: {', '.join(changed)} changed since its runs were made: choose another --out")
    write_atomically(record, json.dumps(before | found, indent=2) + "\n")
    for each in runs:
        made_with = tunnel.run_dir(*each) / "config.yaml"
        if made_with.is_file() and load_config([made_with], []).config != load_config(*tunnel.arguments(*each)).config:
            raise UserError(f"{made_with.parent} was made with other settings: choose another --out, or delete it")


async def _run_all(runs: Sequence[Run], tunnel: Tunnel) -> list[Path]:
    """Finish every run; returns those that failed. One failure does not stop the others."""
    places, failed, done = asyncio.Semaphore(tunnel.jobs), [], 0

    async def one(arm: Arm, seed: int) -> None:
        nonlocal done
        run, steps = tunnel.run_dir(arm, seed), tunnel.steps_of(arm)
        async with places:
            if _steps_done(run) < steps:
                began = time.monotonic()
                files, overrides = tunnel.arguments(arm, seed)
                verb = ["genrm", "train"] if arm.kind == "critic" else ["train"]
                resume = ["--resume"] * any((run / "checkpoints").glob("step_*[0-9]/state.json"))
                if not resume:
                    (run / FILE).unlink(missing_ok=True)  # of a run that was killed before its first checkpoint
                configs = [argument for file in files for argument in ("-c", str(file))]
                code = await _fapo([*verb, *configs, *resume, *overrides], run / "console.log")
                if code != 0 or _steps_done(run) < steps:
                    failed.append(run)
                _say(f"{run.name}: {'failed' if run in failed else 'done'} in {time.monotonic() - began:.0f} s")
            done += 1
            _say(f"{done} of {len(runs)} runs")

    async with asyncio.TaskGroup() as group:
        for each in runs:
            group.create_task(one(*each))
    return failed


def _digest(path: Path) -> str:
    """Of a file, or of a model's weights and tokenizer; empty when there is none."""
    files = [path] if path.is_file() else sorted([*path.glob("*.safetensors"), *path.glob("tokenizer.json")])
    digests = []
    for file in files:
        with file.open("rb") as content:
            digests.append(hashlib.file_digest(content, "sha256").hexdigest())
    return "/".join(digests)


def _steps_done(run: Path) -> int:
    return int(read_metrics(run)[-1]["step"]) if (run / FILE).is_file() and read_metrics(run) else 0


async def _fapo(arguments: Sequence[str], log: Path) -> int:
    """One `fapo` process with its output in `log`; asked to save and stop when this task is cancelled."""
    log.parent.mkdir(parents=True, exist_ok=True)
    guard = Guard()  # the run does not outlive a killed tunnel: the same command would start a second one beside it
    environment = os.environ | guard.environment | {"OMP_NUM_THREADS": "1"}
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(log.open("ab"))
        stack.callback(guard.release)
        # A session of its own: Ctrl-C in the terminal reaches it once, through this process.
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "megatron_fapo.cli", *arguments),
            stdout=file,
            stderr=file,
            env=environment,
            start_new_session=True,
        )
        try:
            return await process.wait()
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()
                await process.wait()


def _say(text: str) -> None:
    print(f"[windtunnel] {time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)
