"""The training loop: rollout, score, advantage, log-probabilities, updates, refit; and around it what a run keeps.

`train` is the algorithm, top to bottom. Everything that it calls is a room of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from megatron_fapo.algorithm.metrics import step_metrics
from megatron_fapo.config.root import Config
from megatron_fapo.config.show import dump_yaml
from megatron_fapo.data.cursor import DataCursor
from megatron_fapo.data.datasets import load_prompts
from megatron_fapo.data.records import Group
from megatron_fapo.errors import CheckpointError, UserError
from megatron_fapo.observe.drift import DriftWatch
from megatron_fapo.observe.log import setup_logging
from megatron_fapo.observe.loggers import Loggers
from megatron_fapo.observe.metrics import FILE as METRICS_FILE
from megatron_fapo.observe.metrics import MetricsWriter, read_metrics
from megatron_fapo.observe.progress import Progress
from megatron_fapo.observe.report import write_report
from megatron_fapo.observe.samples import write_samples
from megatron_fapo.observe.spans import Span
from megatron_fapo.observe.stall import WAITS, StallWatch
from megatron_fapo.observe.trace import DRIVER, TRACER, summarize, wall, write_step
from megatron_fapo.policy.group import PolicyGroup
from megatron_fapo.policy.hf_config import read_model_shape
from megatron_fapo.processes import ProcessDiedError
from megatron_fapo.training.ahead import Ahead
from megatron_fapo.training.checkpoint import Checkpoints, DamagedCheckpointError, RunState, files_of, require_space
from megatron_fapo.training.cluster import Cluster, launch
from megatron_fapo.training.evaluation import EvaluationSets, evaluate, load_evaluation_sets
from megatron_fapo.training.failure import EXIT_FAILED, forget_failure, report_failure
from megatron_fapo.training.rollouts import Rolled, rollout
from megatron_fapo.training.signals import EXIT_INTERRUPTED, EXIT_SAVED, StopRequest, StopRequestedError
from megatron_fapo.training.step import mini_batches, training_samples
from megatron_fapo.training.update import GATED, update

log = logging.getLogger(__name__)


class TooManyUnscoredError(RuntimeError):
    """A step had a larger share of unscored samples than reward.max_unscored_share."""


class Run:
    """What the loop writes to: metrics, samples, checkpoints, progress; and the state between steps."""

    def __init__(self, config: Config, cursor: DataCursor, state: RunState, progress: Progress, metrics: MetricsWriter):
        self.config, self.cursor, self.state, self.progress, self.writer = config, cursor, state, progress, metrics
        self.dir = Path(config.run_dir)
        self.checkpoints = Checkpoints(self.dir, config.training.checkpoint)
        self.saved_step = state.step if self.checkpoints.complete() else -1
        self.saving: asyncio.Task[None] | None = None
        """The save under way in the background."""
        self.between_steps = True
        """False while the policy is being updated: its weights are then no step's."""
        self.phases: dict[str, float] = {}
        self.drift = DriftWatch(config.observe.drift_window, config.observe.drift_threshold)
        self.mismatch: float | None = None
        """What the newest step that measured it has of the gated metric."""
        for record in read_metrics(self.dir) if (self.dir / METRICS_FILE).exists() else []:
            self.drift.add(record)
            self.mismatch = record.get(GATED, self.mismatch)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase of the step and show it."""
        self.progress.phase(name)
        began = time.monotonic()
        try:
            yield
        finally:
            self.spent(name, began, time.monotonic())

    def spent(self, name: str, began: float, ended: float) -> None:
        """Note a phase of the step, from one moment of time.monotonic to another."""
        self.phases[f"phase_s/{name}"] = self.phases.get(f"phase_s/{name}", 0.0) + ended - began
        TRACER.add(DRIVER, [Span(name, wall(began), wall(ended))])

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """The step's line of metrics; phase times start anew."""
        metrics = metrics | self.phases | {"phase_s/total": sum(self.phases.values())}
        metrics["observe/stalls"], WAITS.stalls = float(WAITS.stalls), 0
        self.phases = {}
        taken = TRACER.take()
        traced = summarize(step, taken, TRACER.tracks)
        metrics |= {f"trace/idle_share/{name}": share for name, share in traced.idle_share.items()}
        alarms, said = self.drift.add(metrics)
        for each in said:
            log.warning("drift: %s", each)
        self.writer.write(step, metrics | alarms)
        self.mismatch = metrics.get(GATED, self.mismatch)
        if step:
            self.progress.step(metrics)
        if due(step, self.config.observe.trace_every_steps, 0):
            write_step(self.dir, taken, TRACER.tracks, traced)

    async def save(self, cluster: Cluster) -> None:
        """Begin a checkpoint of the state after the last finished step, unless there is one; `saved` waits for it.

        Raises:
            CheckpointError: this one cannot be begun, or the one before could not be written.
        """
        await self.saved()
        if self.saved_step == self.state.step:
            return
        assert cluster.policy is not None
        # Asked first: what a full disk does to a rank in the middle of a save is a stack trace from deep inside mcore.
        require_space(self.dir, 16 * read_model_shape(self.config.policy.model_path).parameters)
        with self._told(self.state.step):
            partial = self.checkpoints.begin(self.state.step).resolve()
            (partial / "config.yaml").write_text(dump_yaml(self.config))
            await cluster.enter("checkpoint")
            await cluster.policy.save(partial / "policy")
        self.saving = asyncio.create_task(self._finish(cluster.policy, self.state))
        if not self.config.training.checkpoint.asynchronous:
            await self.saved()

    async def _finish(self, policy: PolicyGroup, state: RunState) -> None:
        began = time.monotonic()
        with self._told(state.step):
            written = {f"policy/{name}": file for name, file in (await policy.saved()).items()}
            path = await asyncio.to_thread(self.checkpoints.finish, state, written)
        self.saved_step = state.step
        size, seconds = sum(file.size for file in written.values()), time.monotonic() - began
        log.info("checkpoint %s: %.3f GB in %.1f s", path, size / 1e9, seconds)

    async def saved(self, *, wait: bool = True) -> None:
        """Wait for the save under way, if any; or only hear of it if it has ended.

        Raises:
            CheckpointError: it could not be written.
        """
        if self.saving is not None and (wait or self.saving.done()):
            task, self.saving = self.saving, None
            await task

    async def give_up_saving(self) -> None:
        """Forget a save that cannot be finished; what it has written is removed by the next resume."""
        if self.saving is not None:
            self.saving.cancel()
            await asyncio.gather(self.saving, return_exceptions=True)

    @contextlib.contextmanager
    def _told(self, step: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written: {error}; mend it, then go on with "
                f"--resume from step {max(self.saved_step, 0)}"
            ) from error


async def train(config: Config, cluster: Cluster, run: Run, sets: EvaluationSets, stop: StopRequest) -> None:
    """Steps `run.state.step + 1` to `training.steps`. Between steps, `run.state` and the policy are all that counts:
    what was generated ahead can be generated again."""
    cfg = config.training
    TRACER.begin()
    with run.phase("refit"):
        await cluster.refit(run.state.weight_version)
    evaluates = bool(sets) and cfg.evaluation.every_steps > 0
    # Before the first step, and where the run was stopped in the middle of an evaluation.
    if evaluates and due(run.state.step, cfg.evaluation.every_steps, cfg.steps) and not run.state.evaluation:
        with run.phase("evaluate"):
            evaluation = await stop.race(cluster.while_judged(evaluate(config, cluster, sets)))
            run.state = replace(run.state, evaluation=evaluation)
        run.phases = {}
        TRACER.begin()
        run.writer.amend(run.state.step, run.state.evaluation)
        run.checkpoints.amend(run.state)

    def start(step: int) -> Coroutine[Any, Any, Rolled]:
        taken, cursor = run.cursor.take(cfg.prompts_per_step), run.cursor.state_dict()
        return cluster.while_judged(rollout(config, cluster, run.progress, ahead, step, taken, cursor))

    try:
        async with Ahead(start, run.state.step, cfg.steps, cfg.asynchrony.max_staleness) as ahead:
            await take_steps(config, cluster, run, sets, stop, ahead)
    finally:
        TRACER.end()
    await run.saved()


async def take_steps(
    config: Config, cluster: Cluster, run: Run, sets: EvaluationSets, stop: StopRequest, ahead: Ahead[Rolled]
) -> None:
    """The steps of `train`."""
    assert cluster.policy is not None
    policy, cfg = cluster.policy, config.training
    evaluates = bool(sets) and cfg.evaluation.every_steps > 0
    for step in range(run.state.step + 1, cfg.steps + 1):
        if not cluster.serving:  # a checkpoint put colocated engines to sleep
            with run.phase("refit"):
                await cluster.refit(run.state.weight_version)
        ahead.begin(step)
        rolled = await stop.race(next_rollout(run, ahead, step))
        groups = rolled.groups
        metrics = step_metrics(groups, config.reward.task) | rolled.scoring
        if cfg.log_samples_every_steps and step % cfg.log_samples_every_steps == 0:
            # A slow filesystem must not hold up rollouts ahead: deadlines of what they have asked for would pass.
            await asyncio.to_thread(write_samples, run.dir, step, [s for group in groups for s in group.samples])
        try:
            refuse_unscored(groups, config.reward.max_unscored_share, step)
        except TooManyUnscoredError:
            cluster.require_servers(all_of_them=True)  # one that is gone is the reason, and worth another attempt
            raise

        if profiled := step in config.observe.profile_steps:
            await policy.profile(step)

        def check() -> None:
            stop.check()
            ahead.check()

        batches = mini_batches(training_samples(groups, config), cfg.prompts_per_mini_batch)
        metrics |= await update(config, cluster, run, batches, check)

        version = run.state.weight_version + 1
        run.state, run.between_steps = RunState(step, version, rolled.cursor), True
        try:
            if profiled:
                with run.phase("profile"):
                    await policy.profile(None)
            if ahead.generating and not config.weight_sync.in_flight:
                with run.phase("drain"):
                    await stop.race(ahead.idle())
            ahead.check()
            with run.phase("refit"):
                metrics |= await cluster.refit(version)
            if evaluates and due(step, cfg.evaluation.every_steps, cfg.steps):
                with run.phase("evaluate"):
                    evaluation = await stop.race(cluster.while_judged(evaluate(config, cluster, sets)))
                    run.state = replace(run.state, evaluation=evaluation)
                metrics |= run.state.evaluation
            if due(step, cfg.checkpoint.every_steps, cfg.steps):
                with run.phase("checkpoint"):
                    await run.save(cluster)
        finally:  # the step is finished and will not be repeated, whatever came after its updates
            run.write(step, metrics | cluster.take_memory())
        stop.check()
        await run.saved(wait=False)
        cluster.require_servers()


async def next_rollout(run: Run, ahead: Ahead[Rolled], step: int) -> Rolled:
    """The rollout of the step; the time that it is waited for counts as `rollout`, from its last sample on as
    `score_tail`."""
    run.progress.phase("rollout")
    began = time.monotonic()
    rolled = await ahead.groups(step)
    generated = max(began, rolled.generated_at)
    run.spent("rollout", began, generated)
    run.spent("score_tail", generated, time.monotonic())
    return rolled


def refuse_unscored(groups: list[Group], limit: float, step: int) -> None:
    """
    Raises:
        TooManyUnscoredError: the share of unscored samples is above `limit`; says which reasons.
    """
    reasons = [s.score.unscored_reason for group in groups for s in group.samples if s.score.unscored_reason]
    total = sum(len(group.samples) for group in groups)
    if len(reasons) > limit * total:
        counts = ", ".join(f"{reasons.count(r)} {r}" for r in sorted(set(reasons)))
        raise TooManyUnscoredError(
            f"step {step}: {len(reasons)} of {total} samples are unscored ({counts}), over reward.max_unscored_share="
            f"{limit}; docs/genrm.md says what each reason means. Mend it and go on with --resume"
        )


def due(step: int, every: int, last: int) -> bool:
    """Whether something periodic happens after this step: every so many steps, and after the last."""
    return step == last or (every > 0 and step % every == 0)


def log_best(run: Run) -> None:
    """Say at the end which checkpoint training.checkpoint.best_metric chose, or that it could choose none."""
    cfg, best = run.config.training.checkpoint, run.checkpoints.best()
    if best is not None:
        log.info("best checkpoint by %s: %s", cfg.best_metric, best)
    elif cfg.best_metric is not None:
        budget = "" if cfg.best_max_tokens is None else f" and at most {cfg.best_max_tokens:g} response tokens"
        text = "no best checkpoint: no step with a checkpoint was evaluated with a value of %s%s; let the periods of "
        log.warning(
            text + "training.evaluation and training.checkpoint meet, or change the choice", cfg.best_metric, budget
        )


async def run_to_end(run: Run, sets: EvaluationSets, checkpoint: Path | None, stop: StopRequest) -> int:
    """Start the processes, train, end the processes; returns the exit code.

    What ended the run is said at once: saving may hang with whatever failed, and ending processes takes minutes.

    Raises:
        Exception: what is neither a stop nor a process's end, already in failure.json unless it is for the user.
    """
    ended: Exception | None = None
    code = 0
    try:
        async with contextlib.AsyncExitStack() as processes:
            watch = await processes.enter_async_context(StallWatch(run.config.observe, run.dir))
            cluster = await watch.race(stop.race(processes.enter_async_context(launch(run.config))))
            assert cluster.policy is not None
            processes.push_async_callback(run.give_up_saving)
            if checkpoint is not None:
                await watch.race(cluster.enter("checkpoint"))
                path = checkpoint.resolve()
                if wrong := await watch.race(cluster.policy.verify(path, files_of(path))):
                    raise run.checkpoints.damaged(checkpoint, wrong)
                await watch.race(cluster.policy.load(path / "policy"))
                log.info("resumed from %s", checkpoint)
            try:
                await watch.race(train(run.config, cluster, run, sets, stop))
            except Exception as error:
                ended, code = error, report(run, error, stop)
                try:
                    await save_finished(run, cluster, watch, error)
                except Exception as also:
                    ended, code = also, report(run, also, stop)
                    raise
                raise
    except Exception as error:
        if ended is None:
            ended, code = error, report(run, error, stop)
        elif error is not ended:
            log.error("the processes of the run could not be ended: %s", error, exc_info=error)
    if isinstance(ended, StopRequestedError):
        log.info("stopped on request after step %d; go on with --resume", run.state.step)
    elif ended is not None and not isinstance(ended, TooManyUnscoredError | ProcessDiedError):
        raise ended
    return code


def report(run: Run, error: Exception, stop: StopRequest) -> int:
    """Say what ended the run, unless it was asked to stop or the command line says it; returns the exit code."""
    if isinstance(error, StopRequestedError):
        return stop.exit_code
    return EXIT_FAILED if isinstance(error, UserError) else report_failure(run.dir, error, run.state.step)


async def save_finished(run: Run, cluster: Cluster, watch: StallWatch, error: Exception) -> None:
    """Keep the finished steps, whatever ended the run elsewhere.

    Raises:
        ProcessDiedError: a process ended meanwhile; not if one was what ended the run, which then is the news.
        CheckpointError: they cannot be written.
    """
    lost_policy = isinstance(error, ProcessDiedError) and error.process.role == "policy"
    if lost_policy or isinstance(error, CheckpointError):
        return
    try:
        if run.between_steps:
            await watch.race(run.save(cluster))
        await watch.race(run.saved())
    except ProcessDiedError as also:
        log.error("step %d could not be saved: %s", run.state.step, also)
        if not isinstance(error, ProcessDiedError):
            raise also from error


Resume = Literal["newest", "auto"]
"""Go on from the newest checkpoint. `auto`, for jobs that nobody watches: or begin anew when there has been none,
whatever else an earlier attempt wrote; and from the one before a damaged one, which is set aside."""


def train_command(config: Config, *, resume: Resume | None) -> int:
    """`fapo train`: returns the exit code.

    Raises:
        DamagedCheckpointError: the newest checkpoint is not as it was written, and `resume` is not `auto`.
    """
    while True:
        try:
            return asyncio.run(_train(config, resume))
        except DamagedCheckpointError as error:
            if resume != "auto":
                raise
            log.error("%s", error)
            log.error("set aside as %s; its steps are repeated", error.set_aside())


async def _train(config: Config, resume: Resume | None) -> int:
    from transformers import AutoTokenizer

    run_dir = Path(config.run_dir)
    setup_logging(run_dir, "driver", terminal=True)
    forget_failure(run_dir)
    tokenizer = AutoTokenizer.from_pretrained(config.policy.model_path)
    prompts = load_prompts(config.data.train, tokenizer, config.data, task=config.reward.task)
    for note in prompts.left_out():
        log.warning("data.train: %s", note)
    sets = load_evaluation_sets(config, tokenizer)
    cursor = DataCursor(prompts.prompts, config.seed, config.data.shuffle)
    checkpoint, state = None, RunState(0, 0, cursor.state_dict())
    resume_step = None if resume is None else -1
    checkpoints = Checkpoints(run_dir, config.training.checkpoint)
    if resume == "newest" or (resume == "auto" and checkpoints.exist()):
        checkpoints.tidy()
        checkpoint, state = checkpoints.newest()
        resume_step = state.step
        try:
            cursor.load_state_dict(state.cursor)
        except ValueError as error:
            raise UserError(str(error)) from error
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(MetricsWriter(run_dir, resume_step))
        loggers = stack.enter_context(Loggers(config, resume_step))
        writer.followers.append(loggers.put)
        (run_dir / "config.yaml").write_text(dump_yaml(config))
        stop = stack.enter_context(StopRequest())
        progress = stack.enter_context(Progress(config.training.steps, state.step))
        run = Run(config, cursor, state, progress, writer)
        if code := await run_to_end(run, sets, checkpoint, stop):
            loggers.failed = code not in (EXIT_SAVED, EXIT_INTERRUPTED)
            return code
    log_best(run)
    write_report([run_dir], run_dir / "report.html")
    log.info("done: %s", run_dir / "report.html")
    return 0
