"""Kill -9 at random moments of checkpoints, and resume from what is left: `python -m tests.training.killed_saves`.

This process imports megatron once and starts no process group; each attempt is a fork of it. An attempt does what a run
does: look for the newest checkpoint, verify and load it, train, save in the background while it trains on. It tells
what it does through a pipe, and is killed within a random phase of its save, after a random part of the time that the
phase takes undisturbed.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import random
import select
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any


def state_digest(worker: Any) -> str:
    """Of everything that a checkpoint holds of this rank."""
    from megatron_fapo.policy.optimizer_shards import optimizer_parts, owned, state_of

    sha = hashlib.sha256()
    for chunk in worker.chunks:
        for parameter in chunk.parameters():
            sha.update(parameter.detach().numpy().tobytes())
    for part in optimizer_parts(worker.optimizer):
        for parameter, _, _ in owned(part):
            for tensor in state_of(part, parameter).values():
                sha.update(tensor.detach().numpy().tobytes())
        sha.update(json.dumps(part.state_dict(), default=str).encode())
    sha.update(json.dumps(worker.scheduler.state_dict(), default=str).encode())
    return sha.hexdigest()


def attempt(run_dir: Path, model: str, say: Any) -> None:
    """Resume, then train and save until killed."""
    from megatron_fapo.config.training import CheckpointConfig
    from megatron_fapo.policy import checkpoint
    from megatron_fapo.policy.parallel import Rank
    from megatron_fapo.training.checkpoint import Checkpoints, RunState, files_of
    from tests.policy.models import make_samples
    from tests.policy.ranks import free_port, make_worker, packs_of, policy_config

    worker = make_worker(Rank(0, 1, "127.0.0.1", free_port()), policy_config(model))
    checkpoints, step = Checkpoints(run_dir, CheckpointConfig(keep=1)), 0
    if checkpoints.exist():
        checkpoints.tidy()
        path, state = checkpoints.newest()
        wrong = checkpoint.verify(path, files_of(path), 0, 1)
        checkpoint.load(worker, path / "policy")
        step = state.step
        say("resumed", step=step, digest=state_digest(worker), wrong=wrong)
    _, packs = packs_of(worker, make_samples(4))
    saver = checkpoint.Saver(worker)
    while True:
        worker.train(packs)
        step += 1
        say("saving", step=step, digest=state_digest(worker))
        saver.begin(checkpoints.begin(step) / "policy")
        say("copied")
        worker.train(packs)  # goes on while the copy is written, and changes what was copied
        part = saver.part(wait=True)
        assert part is not None
        say("written")
        files = {f"policy/{name}": file for name, file in saver.complete([part]).items()}
        say("indexed")
        checkpoints.finish(RunState(step, step, {}), files)
        say("finished", step=step)
        checkpoint.load(worker, run_dir / "checkpoints" / f"step_{step:06d}" / "policy")  # the step after this one


def fork(run_dir: Path, model: str) -> tuple[int, Any]:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)

        def say(what: str, **facts: Any) -> None:
            os.write(writer, (json.dumps({"what": what, **facts}) + "\n").encode())

        try:
            attempt(run_dir, model, say)
        except BaseException as error:
            say("failed", error=repr(error))
        os._exit(1)
    os.close(writer)
    return pid, os.fdopen(reader, "rb", buffering=0)


PHASES = ("saving", "copied", "written", "indexed")
"""What an attempt says as it begins to copy, to write and hash, to write the index, to sum up and rename."""


def main(run_dir: Path, model: str, kills: int, seed: int) -> dict[str, Any]:
    """Returns what was seen; raises AssertionError at the first attempt that does not resume as it must."""
    random_ = random.Random(seed)
    digests: dict[int, str] = {}
    finished, length_s = 0, {}
    reached: Counter[str] = Counter()
    for number in range(kills + 2):  # the first is timed, the last only resumes
        pid, pipe = fork(run_dir, model)
        last, since, kill_at = "", time.monotonic(), float("inf")
        phase = random_.choice(PHASES)
        while True:
            ready, _, _ = select.select([pipe], [], [], max(0.0, min(60.0, kill_at - time.monotonic())))
            if not ready:
                assert time.monotonic() >= kill_at, f"attempt {number} says nothing after {last!r}"
                break
            line = pipe.readline()
            assert line, f"attempt {number} ended by itself after {last!r}"
            told, now = json.loads(line), time.monotonic()
            length_s[last] = now - since
            last, since = told["what"], now
            assert last != "failed", told["error"]
            if last == "resumed":
                # The newest that was finished, or the one after it if the kill came between the rename and its word.
                assert told["wrong"] == []
                assert told["step"] in (finished, finished + 1), (told, finished)
                assert told["digest"] == digests[told["step"]], f"step {told['step']} is not what was saved"
                finished = told["step"]
                if number == kills + 1:
                    break
            elif last == "saving":
                digests[told["step"]] = told["digest"]
            elif last == "finished":
                finished = told["step"]
                if number == 0 and finished == 2:  # the first save plans for the others
                    break
            if last == phase and number:
                kill_at = now + random_.uniform(0.0, 1.1 * length_s[phase])
                phase = ""
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        pipe.close()
        if 0 < number <= kills:
            reached[last] += 1
    left = sorted(p.name for p in (run_dir / "checkpoints").iterdir())
    return {"kills": kills, "seconds": length_s, "reached": dict(reached), "steps": finished, "left": left}


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    from megatron_fapo.policy import cpu_backend

    cpu_backend.install()
    for name in (  # what an attempt would import is imported once
        "megatron.core.dist_checkpointing.strategies.fully_parallel",
        "megatron.core.optimizer_param_scheduler",
        "megatron.core.pipeline_parallel",
        "megatron_fapo.policy.checkpoint",
        "megatron_fapo.policy.model",
        "megatron_fapo.policy.worker",
        "megatron_fapo.training.checkpoint",
        "tests.policy.models",
        "tests.policy.ranks",
    ):
        importlib.import_module(name)
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
