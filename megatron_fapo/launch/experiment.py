"""What `fapo launch` runs: one task, or several that build on one another, checked whole before anything is submitted.

    tasks:
      - {name: genrm, verb: genrm train, config: [genrm.yaml], overrides: [run_dir=runs/genrm]}
      - {name: export, verb: convert, source: runs/genrm/checkpoints/best, target: runs/genrm/hf, after: [genrm]}
      - {name: policy, verb: train, config: [fapo.yaml], overrides: [genrm.model_path=runs/genrm/hf], after: [export]}

A task starts when all tasks of its `after` have ended well. `config` is relative to the file, as `extends` is; all
other paths are relative to the directory of the command. A training may name a model that an earlier conversion will
write: until then the model that the converted training starts from stands in for it, which has the same shape.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, ValidationError

from megatron_fapo.config import Config
from megatron_fapo.config.load import ConfigError, LoadedConfig, load_config
from megatron_fapo.config.preflight import preflight
from megatron_fapo.config.section import Section
from megatron_fapo.errors import UserError

Verb = Literal["train", "genrm train", "convert"]


class TaskSpec(Section):
    """A task as it is written."""

    # NeMo-Run takes what follows the last dot of a job's name for the task's, and names files by it.
    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    verb: Verb
    config: list[Path] = []
    overrides: list[str] = []
    source: Path | None = None
    """Of a conversion: the checkpoint of an earlier training."""
    target: Path | None = None
    """Of a conversion: the HF checkpoint, in the run_dir of that training; one that is there is replaced."""
    after: list[str] = []


class _File(Section):
    tasks: list[TaskSpec] = Field(min_length=1)


@dataclass(frozen=True)
class Task:
    """A task that was checked."""

    spec: TaskSpec
    loaded: LoadedConfig
    """Its configuration; a conversion has that of the training it converts."""

    @property
    def config(self) -> Config:
        return self.loaded.config

    @property
    def gpus_per_node(self) -> int | None:
        """To ask of Slurm. A login node cannot know what `device: auto` finds, so only `cpu` asks for none."""
        return None if self.config.device == "cpu" else self.config.cluster.gpus_per_node

    def nodes(self, asked: int | None) -> int:
        """To ask of Slurm.

        Raises:
            UserError: `asked` contradicts the roles that the configuration gives to nodes.
        """
        cluster = self.config.cluster
        if self.spec.verb == "convert":
            return 1
        if asked is not None and cluster.train_nodes and asked != cluster.nodes:
            raise UserError(
                f"task {self.spec.name}: --nodes {asked}, and cluster.train_nodes, rollout_nodes and genrm_nodes give "
                f"roles to {cluster.nodes}: leave --nodes out or change these"
            )
        return asked or cluster.nodes


def task_spec(verb: Verb, config: Sequence[Path], overrides: Sequence[str]) -> TaskSpec:
    """A task that stands alone."""
    return TaskSpec(name=verb.replace(" ", "-"), verb=verb, config=[*config], overrides=[*overrides])


def read_tasks(path: Path, overrides: Sequence[str]) -> list[TaskSpec]:
    """The tasks of an experiment file; `overrides` are added to those of each training.

    Raises:
        UserError: all problems of the file's form.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from error
    try:
        tasks = _File.model_validate(tree).tasks
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False)]
        raise UserError("\n  ".join([f"{path}:", *problems])) from None
    return [
        task.model_copy(
            update={
                "config": [path.parent / file for file in task.config],
                "overrides": task.overrides + (list(overrides) if task.verb != "convert" else []),
            }
        )
        for task in tasks
    ]


def check_tasks(specs: Sequence[TaskSpec], *, look_for_gpu: bool) -> list[Task]:
    """The tasks in an order in which they can run, once neither they nor their configurations show a problem.

    Args:
        look_for_gpu: they are to run on this machine, so `device: gpu` needs one here.
    Raises:
        UserError: all problems of all tasks.
    """
    problems = _order_problems(specs)
    by_name = {spec.name: spec for spec in specs}
    ordered = not problems
    order = [*TopologicalSorter(_graph(specs)).static_order()] if ordered else [*by_name]
    checked: dict[str, Task] = {}
    writers = {spec.target.resolve(): spec.name for spec in specs if spec.target is not None}
    for spec in (by_name[name] for name in order):
        # Without an order all others count as earlier: what is wrong with the configurations is said all the same.
        earlier = _earlier(spec, by_name) if ordered else set(by_name)
        found: list[str] = []
        if spec.verb == "convert":
            task = _checked_conversion(spec, [checked[n] for n in order if n in checked and n in earlier], found)
        else:
            task = _checked_training(spec, {n: checked.get(n) for n in earlier}, writers, look_for_gpu, found)
            for other in checked.values():
                same = task is not None and Path(other.config.run_dir).resolve() == Path(task.config.run_dir).resolve()
                if same and other.spec.verb != "convert":
                    found.append(f"run_dir is that of task {other.spec.name}; each training needs its own")
        if task is not None:
            checked[spec.name] = task
        problems += [f"task {spec.name}: {problem}" for problem in found]
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError("\n  ".join([f"{count} in what is to be launched:", *problems]))
    return [checked[name] for name in order]


def _graph(specs: Iterable[TaskSpec]) -> dict[str, list[str]]:
    return {spec.name: spec.after for spec in specs}


def _order_problems(specs: Sequence[TaskSpec]) -> list[str]:
    names = [spec.name for spec in specs]
    problems = [f"task {name}: named twice" for name in sorted({n for n in names if names.count(n) > 1})]
    problems += [
        f"task {spec.name}: after: no task {name}; there are {', '.join(names)}"
        for spec in specs
        for name in spec.after
        if name not in names
    ]
    try:
        TopologicalSorter(_graph(specs)).prepare()
    except CycleError as error:
        problems.append(f"tasks wait for one another: {' -> '.join(reversed(error.args[1]))}")
    return problems


def _earlier(spec: TaskSpec, by_name: Mapping[str, TaskSpec]) -> set[str]:
    """The tasks that have ended well when this one starts."""
    return {*spec.after}.union(*(_earlier(by_name[name], by_name) for name in spec.after))


def _checked_training(
    spec: TaskSpec,
    earlier: Mapping[str, Task | None],
    writers: Mapping[Path, str],
    look_for_gpu: bool,
    problems: list[str],
) -> Task | None:
    if spec.source or spec.target:
        problems.append("source and target belong to `verb: convert`")
    critic = ["reward.task=critic"] if spec.verb == "genrm train" else []
    try:
        loaded = load_config(spec.config, [*spec.overrides, *critic], "train")
    except ConfigError as error:
        problems += error.problems
        if error.loaded is None:
            return None
        loaded = error.loaded
    stand_in: dict[str, dict[str, object]] = {"policy": {}, "genrm": {}}
    for section in stand_in:
        path = getattr(loaded.config, section).model_path
        writer = writers.get(Path(path).resolve()) if path else None
        if writer is not None and writer not in earlier:
            problems.append(f"{section}.model_path = {path} is written by task {writer}: name it in `after`")
        elif writer is not None and (conversion := earlier[writer]) is not None:
            stand_in[section]["model_path"] = conversion.config.policy.model_path
    config = loaded.config.model_copy(
        update={name: getattr(loaded.config, name).model_copy(update=value) for name, value in stand_in.items()}
        | ({} if look_for_gpu else {"device": "auto"})
    )
    problems += preflight(config, "train")
    return Task(spec, loaded)


def _checked_conversion(spec: TaskSpec, earlier: Sequence[Task], problems: list[str]) -> Task | None:
    if spec.source is None or spec.target is None:
        problems.append("`verb: convert` needs source, a checkpoint of an earlier training, and target")
        return None
    if spec.config or spec.overrides:
        problems.append("config and overrides belong to trainings")
    place = spec.source.parent.resolve()  # of the link itself: checkpoints/best may lead elsewhere by then
    for task in earlier:
        run_dir = Path(task.config.run_dir).resolve()
        if task.spec.verb == "convert" or run_dir not in (place, *place.parents):
            continue
        if run_dir not in spec.target.resolve().parents:
            problems.append(f"target = {spec.target} is not in {task.config.run_dir}, the run_dir of its training")
        if spec.source.name == "best" and task.config.training.checkpoint.best_metric is None:
            problems.append(f"{spec.source}: task {task.spec.name} has no training.checkpoint.best_metric to choose by")
        return Task(spec, task.loaded)
    problems.append(f"source = {spec.source} is in the run_dir of no training that comes before; name it in `after`")
    return None


def script(task: Task | TaskSpec, *, environment: Mapping[str, str], directory: Path, python: str) -> str:
    """The shell text that runs a task, in `directory`, on this machine or as the first process of a Slurm job.

    FAPO_PID_FILE is where it says its process id, FAPO_EXECUTOR is `slurm` under our Slurm executor.
    """
    spec = task.spec if isinstance(task, Task) else task
    fapo = [python, "-m", "megatron_fapo.cli"]
    lines = ["set -eu", f"cd {shlex.quote(str(directory))}"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    if spec.verb == "convert":
        beside = f"{spec.target}.partial"
        new, old = shlex.quote(beside), shlex.quote(str(spec.target))
        # Complete or absent, and made anew when the training has gone on.
        lines.append(f"rm -rf {new}")
        lines.append(shlex.join([*fapo, "convert", "megatron-to-hf", "--megatron", str(spec.source), "--out", beside]))
        lines.append(f"rm -rf {old} && mv {new} {old}")
        return "\n".join(lines) + "\n"
    arguments = [word for file in spec.config for word in ("-c", str(file))] + spec.overrides
    job = [python, "-m", "megatron_fapo.launch.job", *spec.verb.split()]
    here = [*fapo, *spec.verb.split(), "--resume", "auto"]
    lines.append('echo $$ > "${FAPO_PID_FILE:-/dev/null}"')
    lines.append(f'if [ "${{FAPO_EXECUTOR:-}}" = slurm ]; then exec {shlex.join([*job, *arguments])}; fi')
    lines.append(f"exec {shlex.join([*here, *arguments])}")
    return "\n".join(lines) + "\n"


def refuse_rewritten_paths(texts: Iterable[str]) -> None:
    """
    Raises:
        UserError: NeMo-Run would put its own directory in the place of a path in one of `texts`: it replaces the text
            /nemo_run wherever a script has it.
    """
    for text in texts:
        if "/nemo_run" in text:
            raise UserError(
                f"NeMo-Run rewrites every /nemo_run in what it submits, also in {text!r}: rename that directory or "
                "write the path without it (NEMORUN_HOME says where NeMo-Run keeps its files)"
            )
