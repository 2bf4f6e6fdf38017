"""`fapo demo`: a whole run on this machine, from nothing to a report, with models small enough to train on the way.

1. Write the testbed's prompts.
2. Train the tiny policy with FAPO against a live GenRM pool (`fapo train -c examples/tiny_cpu.yaml`).
3. With --compare, train it again with flawed_penalty 0: the baseline, in which the GenRM only measures.
4. Write the report, and say what the testbed's oracle thinks of the GenRM's verdicts.

The two models it starts from lie in examples/models. `fapo demo --rebuild` makes them anew from random weights with
`fapo warmup`, the policy's own training code, on demonstrations and critiques of the testbed.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from megatron_fapo.data.datasets import write_testbed
from megatron_fapo.data.demonstrations import genrm_sft_examples, policy_sft_examples
from megatron_fapo.data.oracle import first_wrong_step
from megatron_fapo.data.testbed import parse_question
from megatron_fapo.data.tokenizer import init_tiny_model
from megatron_fapo.errors import UserError
from megatron_fapo.genrm.prompts import judge_messages
from megatron_fapo.observe.metrics import read_metrics
from megatron_fapo.observe.report import write_report
from megatron_fapo.observe.samples import read_samples, sample_steps

EXAMPLES = Path(__file__).parents[1] / "examples"
MODELS = EXAMPLES / "models"
TRAIN_PROMPTS, EVAL_PROMPTS, SEED = 2000, 64, 1
POLICY_ROWS, GENRM_ROWS, LAYERS = 10_000, 20_000, 2


def demo_command(*, out: Path, compare: bool, rebuild: bool) -> int:
    """Run the demo under `out`; returns the exit code. Runs of an earlier demo there are replaced.

    Raises:
        UserError: not in a checkout of the repository, or a run of it failed.
    """
    if not (EXAMPLES / "tiny_cpu.yaml").is_file():
        raise UserError(f"{EXAMPLES}/tiny_cpu.yaml not found: the demo runs from a checkout of the repository")
    if not rebuild and not all((MODELS / name / "config.json").is_file() for name in ("policy", "genrm")):
        raise UserError(f"{MODELS} lacks the demo's models: check it out again, or make them with fapo demo --rebuild")
    began = time.monotonic()
    if rebuild:
        _say("building the tiny models anew")
        _build_models(out)
    write_testbed(out / "data", TRAIN_PROMPTS, EVAL_PROMPTS, SEED)
    _say("FAPO run starts: importing megatron, vLLM and Ray takes a minute or so")
    runs = [_train(out, "fapo")]
    if compare:
        _say("baseline run starts: same seed, flawed_penalty 0")
        runs.append(_train(out, "baseline", "reward.flawed_penalty=0"))
    report = out / "report.html"
    write_report(runs, report)
    print()
    for run in runs:
        _summarise(run)
    _say(f"{report}  ({time.monotonic() - began:.0f} s in all)")
    return 0


def _say(text: str) -> None:
    print(f"[demo] {text}", file=sys.stderr, flush=True)


def _build_models(out: Path) -> None:
    work = out / "warmup"
    shutil.rmtree(work, ignore_errors=True)
    demonstrations = {
        "policy": policy_sft_examples(POLICY_ROWS, SEED + 1),
        "genrm": genrm_sft_examples(GENRM_ROWS, SEED + 2, functools.partial(judge_messages, form="tagged")),
    }
    warmups = []
    for name, examples in demonstrations.items():
        init_tiny_model(work / f"{name}-init", SEED, num_hidden_layers=LAYERS)
        data = work / f"{name}.jsonl"
        rows = ({"messages": messages, "response": response} for messages, response in examples)
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        arguments = [
            "warmup",
            "-c",
            EXAMPLES / f"tiny_warmup_{name}.yaml",
            "--data",
            data,
            "--out",
            work / f"{name}-hf",
        ]
        overrides = [f"policy.model_path={work / f'{name}-init'}", f"run_dir={work / name}"]
        warmups.append(_start(work / f"{name}.out", *arguments, *overrides))
    try:
        for process, log in warmups:
            _wait(process, log)
    finally:
        for process, _ in warmups:
            process.terminate()
    for name in demonstrations:  # only now that both are there
        shutil.rmtree(MODELS / name, ignore_errors=True)
        shutil.copytree(work / f"{name}-hf", MODELS / name)


def _start(log: Path, *arguments: object) -> tuple[subprocess.Popen[bytes], Path]:
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "megatron_fapo.cli", *map(str, arguments)]
    with log.open("wb") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | _quiet()), log


def _quiet() -> dict[str, str]:
    return {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def _wait(process: subprocess.Popen[bytes], log: Path) -> None:
    if process.wait() != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        raise UserError(f"warm-up failed with exit code {process.returncode}; the end of {log}:\n{tail}")


def _train(out: Path, name: str, *overrides: str) -> Path:
    run = out / name
    shutil.rmtree(run, ignore_errors=True)
    paths = {
        "run_dir": run,
        "policy.model_path": MODELS / "policy",
        "genrm.model_path": MODELS / "genrm",
        "data.train": f"[{out / 'data' / 'train.jsonl'}]",
        "data.eval.testbed": out / "data" / "eval.jsonl",
    }
    arguments = [f"{key}={value}" for key, value in paths.items()]
    command = [sys.executable, "-m", "megatron_fapo.cli", "train", "-c", str(EXAMPLES / "tiny_cpu.yaml")]
    process = subprocess.Popen([*command, *arguments, *overrides], env=os.environ | _quiet())
    # The run answers the signals, by saving; this process waits for it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to both
    signal.signal(signal.SIGTERM, lambda number, frame: process.send_signal(number))
    code = process.wait()
    if code != 0:
        raise UserError(f"the {name} run ended with exit code {code}; its logs are in {run}/logs")
    return run


def _summarise(run: Path) -> None:
    """First and last tenth of the run, and the GenRM against the oracle over all samples it judged."""
    steps = [record for record in read_metrics(run) if record["step"] > 0]
    tenth = max(len(steps) // 10, 1)

    def mean(records: list[dict[str, float]], name: str) -> float:
        values = [record[name] for record in records if name in record]
        return sum(values) / len(values) if values else float("nan")

    print(f"{run.name}: {len(steps)} steps, {mean(steps, 'phase_s/total'):.1f} s each")
    for label, name in (("accuracy", "score/accuracy"), ("flawed-positive ratio", "score/flawed_positive_ratio")):
        print(f"  {label:<22} {mean(steps[:tenth], name):6.1%} -> {mean(steps[-tenth:], name):6.1%}")
    right = missed = invented = flawed = 0
    for step in sample_steps(run):
        for sample in read_samples(run, step):
            if sample["verdict"] is None:
                continue
            truly = first_wrong_step(parse_question(sample["question"]), sample["text"]) != -1
            flawed += truly
            right += truly == sample["flawed"]
            missed += truly and not sample["flawed"]
            invented += sample["flawed"] and not truly
    judged = right + missed + invented
    if judged:
        print(f"  GenRM against the oracle: {judged} verdicts, {right / judged:.1%} agree;")
        print(f"  {flawed} truly flawed, {missed} of them missed, {invented} invented")
