"""The `fapo` command: one thin function per verb, each importing what it needs when it is called.

Exit codes: 0 done, 1 failure, 2 bad input, 75 stopped by a signal and 130 by Ctrl-C, both with everything saved, 76 a
process or node was lost.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from megatron_fapo import __version__
from megatron_fapo.config import Config
from megatron_fapo.config.load import ConfigError, load_config
from megatron_fapo.config.preflight import preflight
from megatron_fapo.config.root import Purpose
from megatron_fapo.errors import UserError
from megatron_fapo.processes import ProcessDiedError
from megatron_fapo.training.signals import EXIT_LOST
from megatron_fapo.windtunnel.arms import CRITIC_STEPS, EXAMPLES, SEEDS, STEPS, choose

EXIT_BAD_INPUT = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code."""
    args = parse(argv)
    try:
        return int(args.verb(args))
    except UserError as error:
        print(f"fapo: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except ProcessDiedError as error:  # of a verb that leaves nothing behind; training and evaluation report it
        print(f"fapo: {error}", file=sys.stderr)
        return EXIT_LOST if error.lost else 1


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """
    Raises:
        SystemExit: 2, with the usage on stderr.
    """
    parser = _parser()
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:2] == ["plan", "refit"]:  # beside `plan CONFIG`, which argparse cannot have in one parser
        words[:2] = ["plan refit"]
    args, rest = parser.parse_known_args(_plain_resume(words))
    # argparse fills a list of positionals once, so overrides that follow a later option arrive as leftovers.
    stray = [word for word in rest if word.startswith("-") or "=" not in word or not hasattr(args, "overrides")]
    if stray:
        parser.error(f"unrecognized arguments: {' '.join(stray)}")
    if rest:
        args.overrides += rest
    return args


def _plain_resume(argv: Sequence[str]) -> list[str]:
    """`--resume KEY=VALUE`: argparse would take the override for the value of --resume."""
    return [
        "--resume=newest" if word == "--resume" and after not in ("newest", "auto") else word
        for word, after in zip(argv, [*argv[1:], ""], strict=False)
    ]


def checked_config(args: argparse.Namespace) -> Config:
    """The configuration of a parsed verb, once neither it nor the files it names show a problem: all are reported
    together."""
    problems: list[str] = []
    try:
        loaded = load_config(args.config, [*args.overrides, *args.implied], args.purpose)
    except ConfigError as error:
        if error.loaded is None:
            raise
        loaded, problems = error.loaded, error.problems
    problems += preflight(loaded.config, args.purpose)
    if problems:
        raise ConfigError(problems, loaded)
    return loaded.config


def _train(args: argparse.Namespace) -> int:
    config = checked_config(args)
    from megatron_fapo.training.loop import train_command

    return train_command(config, resume=args.resume)


def _genrm_label(args: argparse.Namespace) -> int:
    config = checked_config(args)
    from megatron_fapo.training.label import label_command

    return label_command(config, out=args.out, yes=args.yes, dry_run=args.dry_run)


def _genrm_serve(args: argparse.Namespace) -> int:
    config = checked_config(args)
    from megatron_fapo.training.serve import serve_command

    return serve_command(config, path=args.rendezvous, router_port=args.router)


def _windtunnel(args: argparse.Namespace) -> int:
    from megatron_fapo.windtunnel.command import Tunnel, windtunnel_command

    try:
        arms = choose(args.arms, args.quick)
    except ValueError as error:
        raise UserError(f"--arms: {error}") from None
    if min(args.jobs, args.steps, args.critic_steps) < 1:
        raise UserError("--jobs, --steps and --critic-steps must be 1 or more")
    seeds = args.seeds or (SEEDS[:1] if args.quick else SEEDS)
    out, policy, genrm = (path.resolve() for path in (args.out, args.policy, args.genrm))
    tunnel = Tunnel(out, args.jobs, args.steps, args.critic_steps, policy, genrm, tuple(args.config))
    return windtunnel_command(arms, seeds, tunnel)


def _launch(args: argparse.Namespace) -> int:
    from megatron_fapo.launch.experiment import check_tasks, read_tasks, task_spec

    if (args.experiment is None) == (not args.config):
        raise UserError("launch: give either --experiment FILE or -c FILE")
    if find_spec("nemo_run") is None:
        raise UserError("launch: NeMo-Run is not installed; install the extra `launch`")
    for_slurm = ("nodes", "partition", "account", "time", "dependency", "container", "mounts", "sbatch", "detach")
    if args.executor == "local" and (stray := [f"--{name}" for name in for_slurm if getattr(args, name)]):
        raise UserError(f"launch: {', '.join(stray)} only with --executor slurm")
    if bad := [word for word in args.env if "=" not in word]:
        raise UserError(f"--env: write KEY=VALUE, not {', '.join(bad)}")
    if args.executor == "slurm" and not args.dry_run and shutil.which("sbatch") is None:
        raise UserError("--executor slurm: no sbatch on this machine; submit from a login node, or --dry-run")
    if args.experiment is not None:
        specs = read_tasks(args.experiment, args.overrides)
    else:
        specs = [task_spec("genrm train" if args.genrm else "train", args.config, args.overrides)]
    tasks = check_tasks(specs, look_for_gpu=args.executor == "local" and not args.dry_run)
    # NeMo-Run reads it when it is imported. All nodes write there, and the directory of the runs is on all nodes.
    home = Path(tasks[0].config.run_dir).resolve().parent / ".nemo_run"
    os.environ.setdefault("NEMORUN_HOME", str(home))
    from megatron_fapo.launch.nemo import run_local, run_slurm

    title = "fapo" if args.experiment is None else args.experiment.stem
    environment = dict(word.split("=", 1) for word in args.env)
    if args.executor == "local":
        return run_local(title, tasks, environment, dry_run=args.dry_run)
    sbatch = {key: value if equals else True for key, equals, value in (word.partition("=") for word in args.sbatch)}
    named = ("partition", "account", "time", "dependency", "container", "mounts")
    options = {"sbatch": sbatch, **{name: getattr(args, name) for name in named}}
    return run_slurm(title, tasks, environment, args.nodes, options, detach=args.detach, dry_run=args.dry_run)


def _data_prepare(args: argparse.Namespace) -> int:
    from megatron_fapo.data.prepare import prepare_command

    return prepare_command(args.sets, out=args.out, sources=args.source, seed=args.seed)


def _warmup(args: argparse.Namespace) -> int:
    config = checked_config(args)
    if not args.data.is_file():
        raise UserError(f"--data: no file {args.data}")
    from megatron_fapo.training.warmup import warmup_command

    return warmup_command(config, data=args.data, out=args.out)


def _evaluate(args: argparse.Namespace) -> int:
    config = checked_config(args)
    from megatron_fapo.training.evaluation import evaluate_command

    return evaluate_command(config)


def _hush() -> None:
    """megatron and torch warn of GPUs that a conversion does not use and of their own deprecations, at length."""
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")


def _hf_to_megatron(args: argparse.Namespace) -> int:
    if min(args.tp, args.pp, args.ep) < 1:
        raise UserError("--tp, --pp and --ep must be 1 or more")
    _hush()
    from megatron_fapo.policy.convert import hf_to_megatron

    return hf_to_megatron(args.hf, args.out, tensor=args.tp, pipeline=args.pp, expert=args.ep, verify=args.verify)


def _megatron_to_hf(args: argparse.Namespace) -> int:
    _hush()
    from megatron_fapo.policy.convert import megatron_to_hf

    return megatron_to_hf(args.megatron, args.out, verify=args.verify)


def _demo(args: argparse.Namespace) -> int:
    from megatron_fapo.demo import demo_command

    return demo_command(out=args.out, compare=args.compare, rebuild=args.rebuild)


def _report(args: argparse.Namespace) -> int:
    from megatron_fapo.observe.comparison import as_text
    from megatron_fapo.observe.report import evaluation_table, write_report

    out = args.out or args.runs[0] / "report.html"
    write_report(args.runs, out)
    if table := evaluation_table(args.runs):
        print(as_text(table))
    print(out)
    return 0


def _trace(args: argparse.Namespace) -> int:
    from megatron_fapo.observe.where import trace_command

    return trace_command(args.run, args.steps)


def _plan(args: argparse.Namespace) -> int:
    config = load_config([args.file], args.overrides).config  # neither models nor data have to be here
    from megatron_fapo.plan.command import plan_command

    return plan_command(
        config,
        model=args.model,
        cluster=args.cluster,
        lengths=args.lengths,
        rates=args.calibrate,
        json_path=args.json,
        timeline=args.timeline,
    )


def _plan_refit(args: argparse.Namespace) -> int:
    from megatron_fapo.plan.refit import refit_command

    return refit_command(
        model=args.model,
        train=args.train,
        rollout=args.rollout,
        gpus_per_node=args.gpus_per_node,
        colocated=args.colocated,
        kind=args.kind,
        json_path=args.json,
    )


def _doctor(args: argparse.Namespace) -> int:
    from megatron_fapo.launch.doctor import doctor_command

    if not args.slurm and (args.partition or args.nodes):
        raise UserError("doctor: --partition and --nodes only with --slurm")
    return doctor_command(
        as_json=args.json,
        deep=args.deep,
        directory=args.dir,
        over_slurm=args.slurm,
        partition=args.partition,
        nodes=args.nodes,
    )


def _config_show(args: argparse.Namespace) -> int:
    from megatron_fapo.config.show import show

    print(show(load_config(args.config, args.overrides), docs=args.docs), end="")
    return 0


def _config_diff(args: argparse.Namespace) -> int:
    from megatron_fapo.config.show import diff

    # A run directory stands for the configuration that it ran with.
    a, b = (path / "config.yaml" if path.is_dir() else path for path in (args.a, args.b))
    print(diff(load_config([a], []), load_config([b], [])), end="")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fapo", description="Flawed-Aware Policy Optimization.")
    parser.add_argument("--version", action="version", version=f"fapo {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    train = _with_config(verbs.add_parser("train", help="train a policy"), "train")
    _with_resume(train)
    train.set_defaults(verb=_train)

    genrm = verbs.add_parser("genrm", help="train the GenRM, make its data, serve it").add_subparsers(
        metavar="VERB", required=True
    )
    genrm_train = _with_config(
        genrm.add_parser("train", help="train a GenRM on FAPO-Critic rows, step-wise reward"),
        "train",
        implied=["reward.task=critic"],
    )
    _with_resume(genrm_train)
    genrm_train.set_defaults(verb=_train)
    label = _with_config(
        genrm.add_parser("label", help="make critic rows: sample, keep right answers, judge, agree"), "label"
    )
    label.add_argument("-o", "--out", type=Path, required=True, metavar="FILE", help=".jsonl or .parquet")
    label.add_argument("--yes", action="store_true", help="do not ask after the estimate")
    label.add_argument("--dry-run", action="store_true", help="only the estimate")
    label.set_defaults(verb=_genrm_label)

    serve = _with_config(
        genrm.add_parser("serve", help="GenRM servers for several runs, found through a file"), "serve"
    )
    serve.add_argument("--rendezvous", type=Path, required=True, metavar="FILE", help="where runs find the service")
    serve.add_argument("--router", type=int, metavar="PORT", help="also one address for all, by vllm-router")
    serve.set_defaults(verb=_genrm_serve)

    launch = _with_config(verbs.add_parser("launch", help="train through NeMo-Run, here or as jobs of Slurm"))
    launch.add_argument("--executor", choices=("local", "slurm"), required=True)
    launch.add_argument("--experiment", type=Path, metavar="FILE", help="several tasks; docs/nemo_run.md has the form")
    launch.add_argument("--genrm", action="store_true", help="`fapo genrm train` in place of `fapo train`")
    launch.add_argument("--dry-run", action="store_true", help="print configuration and script; submit nothing")
    launch.add_argument("--detach", action="store_true", help="return when submitted; else follow, Ctrl-C to leave")
    launch.add_argument("--nodes", type=int, metavar="N", help="default: as config.cluster says")
    for option in ("partition", "account", "time", "dependency"):
        launch.add_argument(f"--{option}", help=f"as in sbatch --{option}")
    launch.add_argument("--container", metavar="IMAGE", help="for pyxis; default: this Python environment")
    launch.add_argument("--mounts", default="", metavar="A:B,...", help="of the container, beside this directory")
    launch.add_argument("--env", action="append", default=[], metavar="KEY=VALUE", help="for the run's processes")
    launch.add_argument("--sbatch", action="append", default=[], metavar="KEY[=VALUE]", help="option of sbatch")
    launch.set_defaults(verb=_launch)

    data = verbs.add_parser("data", help="make data sets").add_subparsers(metavar="VERB", required=True)
    prepare = data.add_parser("prepare", help="the recipe's data sets and the GenRM's benchmarks as parquet")
    prepare.add_argument("sets", nargs="+", metavar="SET", help="dapo-math, aime24, ...: docs/data.md lists them")
    prepare.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="parquet files, manifest.json")
    prepare.add_argument("--source", action="append", default=[], metavar="SET=PATH", help="read a local copy")
    prepare.add_argument("--seed", type=int, default=0, metavar="N", help="of the order of GPQA's options (default 0)")
    prepare.set_defaults(verb=_data_prepare)

    warmup = _with_config(
        verbs.add_parser("warmup", help="supervised warm-up of a policy or GenRM (cross-entropy)"), "warmup"
    )
    warmup.add_argument("--data", type=Path, required=True, metavar="FILE", help="JSONL of prompts and solutions")
    warmup.add_argument("--out", type=Path, required=True, metavar="DIR", help="HF checkpoint to write")
    warmup.set_defaults(verb=_warmup)

    evaluate = _with_config(
        verbs.add_parser("evaluate", help="score policy.model_path on the sets of data.eval"), "evaluate"
    )
    evaluate.set_defaults(verb=_evaluate)

    convert = verbs.add_parser("convert", help="turn a checkpoint into the other format").add_subparsers(
        metavar="DIRECTION", required=True
    )
    to_megatron = convert.add_parser("hf-to-megatron", help="HF to what Megatron-LM's --load takes")
    to_megatron.add_argument("--hf", type=Path, required=True, metavar="DIR", help="with safetensors and tokenizer")
    for option, of in (("tp", "tensor"), ("pp", "pipeline"), ("ep", "expert")):
        help_text = f"{of}-parallel size that the files are cut for (default 1); any other can load them"
        to_megatron.add_argument(f"--{option}", type=int, default=1, metavar="N", help=help_text)
    to_megatron.set_defaults(verb=_hf_to_megatron)
    to_hf = convert.add_parser("megatron-to-hf", help="a run's or Megatron-LM's checkpoint to HF")
    to_hf.add_argument("--megatron", type=Path, required=True, metavar="DIR", help="any layout, optimizer or not")
    to_hf.set_defaults(verb=_megatron_to_hf)
    for direction in (to_megatron, to_hf):
        direction.add_argument("--out", type=Path, required=True, metavar="DIR", help="new directory")
        direction.add_argument("--verify", action="store_true", help="compare log-probabilities with transformers'")

    config = verbs.add_parser("config", help="look at configurations").add_subparsers(metavar="VERB", required=True)
    show = _with_config(config.add_parser("show", help="the resolved tree, with the origin of each value"))
    show.add_argument("--docs", action="store_true", help="put the meaning of each field above it")
    show.set_defaults(verb=_config_show)
    diff = config.add_parser("diff", help="the values that differ between two files or runs")
    diff.add_argument("a", type=Path, metavar="A")
    diff.add_argument("b", type=Path, metavar="B")
    diff.set_defaults(verb=_config_diff)

    report = verbs.add_parser("report", help="one self-contained HTML file of one or several runs")
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directories; several are overlaid")
    report.add_argument("-o", "--out", type=Path, metavar="FILE", help="default: report.html in the first run")
    report.set_defaults(verb=_report)

    trace = verbs.add_parser("trace", help="where the time of a run's steps goes, and what each GPU waits for")
    trace.add_argument("run", type=Path, metavar="RUN", help="run directory")
    trace.add_argument("--steps", metavar="5-20", help="a step or several; default: all that were traced")
    trace.set_defaults(verb=_trace)

    plan = verbs.add_parser("plan", help="memory, step time, bottleneck and layouts of a run, before it starts")
    plan.add_argument("file", type=Path, metavar="CONFIG", help="YAML; its models need not be on disk")
    plan.add_argument("overrides", nargs="*", metavar="section.key=value", help="override one value")
    plan.add_argument("--cluster", required=True, metavar="8x8xH100", help="nodes x GPUs x H100, H200, A100 or cpu")
    plan.add_argument("--model", metavar="NAME_OR_PATH", help="in place of policy.model_path")
    plan.add_argument("--lengths", metavar="RUN|KEY=N,..", help="a run's directory, or mean=900,p99=4000,prompt=200,..")
    plan.add_argument("--calibrate", type=Path, metavar="FILE", help="JSON of rates, or a run to fit them to")
    plan.add_argument("--json", type=Path, metavar="FILE", help="all numbers, all alternatives")
    plan.add_argument("--timeline", type=Path, metavar="FILE", help="one step as .png, .svg or .html")
    plan.set_defaults(verb=_plan)

    refit = verbs.add_parser("plan refit", help="bytes and seconds of new weights on their way to the engines")
    refit.add_argument("--model", required=True, metavar="NAME_OR_PATH", help="as in `fapo plan --model`")
    refit.add_argument("--train", default="", metavar="tp=4,pp=4,dp=2", help="the policy: tp, pp, vpp, cp, ep, etp, dp")
    refit.add_argument("--rollout", default="", metavar="tp=4,replicas=8", help="the engines")
    refit.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="default 8")
    refit.add_argument(
        "--colocated", action="store_true", help="engines on the policy's GPUs; else on those after them"
    )
    refit.add_argument("--kind", default="H100", help="of GPU: H100 (default), H200, A100 or cpu")
    refit.add_argument("--json", type=Path, metavar="FILE", help="all numbers")
    refit.set_defaults(verb=_plan_refit)

    doctor = verbs.add_parser("doctor", help="what this machine or a partition has, its speed, what is missing")
    doctor.add_argument("--json", action="store_true", help="for scripts")
    doctor.add_argument("--deep", action="store_true", help="import torch, megatron, Ray and vLLM too")
    doctor.add_argument("--dir", type=Path, default=Path(), metavar="DIR", help="disk to measure; shared, with --slurm")
    doctor.add_argument("--slurm", action="store_true", help="look at idle nodes of a partition, with one srun")
    doctor.add_argument("--partition", metavar="P", help="default: Slurm's")
    doctor.add_argument("--nodes", type=int, metavar="N", help="default: all that are idle")
    doctor.set_defaults(verb=_doctor)

    bench = verbs.add_parser("bench", help="measure the method").add_subparsers(metavar="VERB", required=True)
    tunnel = bench.add_parser(
        "windtunnel", help="FAPO and its variants against the baseline, judged by an exact oracle"
    )
    tunnel.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="runs, summary.json, report.html")
    tunnel.add_argument("--quick", action="store_true", help="one seed, baseline and oracle-judged FAPO")
    tunnel.add_argument("--arms", nargs="+", metavar="ARM", help="only these; see windtunnel/arms.py")
    tunnel.add_argument("--seeds", nargs="+", type=int, metavar="N", help="default: 1 2 3, with --quick 1")
    for option, value, text in (
        ("--jobs", 2, "runs at a time; two keep two cores busy"),
        ("--steps", STEPS, "of each policy run"),
        ("--critic-steps", CRITIC_STEPS, "of each GenRM training run"),
    ):
        tunnel.add_argument(option, type=int, default=value, metavar="N", help=f"{text} (default {value})")
    models = EXAMPLES / "models"
    tunnel.add_argument(
        "--policy", type=Path, default=models / "policy", metavar="MODEL", help="HF checkpoint to train"
    )
    tunnel.add_argument(
        "--genrm", type=Path, default=models / "genrm", metavar="MODEL", help="HF checkpoint that judges"
    )
    tunnel.add_argument(
        "-c", "--config", action="append", default=[], type=Path, metavar="FILE", help="YAML for all runs"
    )
    tunnel.set_defaults(verb=_windtunnel)

    demo = verbs.add_parser("demo", help="a whole run with tiny models, on this machine")
    demo.add_argument(
        "--compare",
        action="store_true",
        help="also run the baseline (no penalty) and plot both",
    )
    demo.add_argument("--rebuild", action="store_true", help="first make the models of examples/models anew")
    demo.add_argument("-o", "--out", type=Path, default=Path("runs/demo"), metavar="DIR")
    demo.set_defaults(verb=_demo)
    return parser


def _with_resume(parser: argparse.ArgumentParser) -> None:
    text = "go on from the newest checkpoint of run_dir; with `auto`, begin anew when there is none"
    parser.add_argument("--resume", nargs="?", const="newest", choices=("newest", "auto"), metavar="auto", help=text)


def _with_config(
    parser: argparse.ArgumentParser, purpose: Purpose | None = None, implied: Sequence[str] = ()
) -> argparse.ArgumentParser:
    parser.set_defaults(purpose=purpose, implied=implied)
    parser.add_argument(
        "-c", "--config", action="append", default=[], type=Path, metavar="FILE", help="YAML; later files win"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override one value")
    return parser


if __name__ == "__main__":
    sys.exit(main())
