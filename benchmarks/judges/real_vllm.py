"""The case of one real server: vLLM with a tiny random model, its critiques dictated (`dictated.py`)."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.judges.cases import Outcome, drive, row
from benchmarks.judges.problems import make_problem
from benchmarks.judges.systems import Setting, make_system
from megatron_fapo.config.genrm import GenRMConfig
from megatron_fapo.data.tokenizer import init_tiny_model
from megatron_fapo.genrm.server import GenRMServer

CASE = "vllm"
SLOTS, CONTEXT, WARM_UP = 8, 3072, 8


def real_vllm(systems: list[str], problems: int) -> Iterator[dict[str, Any]]:
    """A row for each system; they ask the same server in turn."""
    with tempfile.TemporaryDirectory() as folder:
        init_tiny_model(folder, 0, max_position_embeddings=CONTEXT)
        options = {"max_num_seqs": SLOTS, "logits_processors": "benchmarks.judges.dictated:Dictated"}
        config = GenRMConfig(model_path=folder, max_model_len=CONTEXT, vllm=options)
        os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        server = GenRMServer(config, device="cpu", dtype="float32", log_path=f"{folder}/vllm.log")
        url = server.start().removesuffix("/v1")
        try:
            for name in systems:
                yield row(name, CASE, [asyncio.run(_ask(name, url, problems))])
        finally:
            server.stop()


async def _ask(name: str, url: str, count: int) -> Outcome:
    system = make_system(name, Setting(p50_s=0.5, slots=SLOTS, max_tokens=256))
    problems = [make_problem(0, number, paragraphs=3) for number in range(WARM_UP + count)]
    await system.open([url])
    try:
        await drive(system, problems[:WARM_UP], SLOTS, 60, {})
        outcome = await drive(system, problems[WARM_UP:], SLOTS, 300, {})
    finally:
        await system.close()
    outcome.notes, outcome.requests = dict(system.notes), count
    return outcome
