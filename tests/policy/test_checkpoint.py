"""Saving and loading: 2 + 2 steps equal 4, bitwise; any layout goes on from what any other saved."""

from __future__ import annotations

import hashlib
import itertools
import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_fapo.checksums import damaged, sum_file
from megatron_fapo.config.policy import OptimizerConfig, PolicyConfig
from megatron_fapo.errors import CheckpointError
from megatron_fapo.policy import checkpoint
from megatron_fapo.policy.optimizer_shards import get_step, optimizer_parts, sharded_state
from megatron_fapo.policy.parallel import Rank
from tests.policy.models import VOCAB, make_samples, write_model
from tests.policy.ranks import Ranks, make_worker, packs_of, policy_config

SCHEDULE = OptimizerConfig(lr=1e-3, warmup_steps=2, schedule="cosine", decay_steps=6)
Whole = dict[str, np.ndarray]


def _pieces(worker: Any) -> list[tuple[str, tuple[int, ...], tuple[int, ...], np.ndarray]]:
    """Weights, master weights and moments of this rank: (name, whole shape, offset, values)."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    weights = checkpoint._sharded_weights(worker)
    moments = [sharded_state(part, weights, copy=False)[0] for part in optimizer_parts(worker.optimizer)]
    apply_factories({"weights": weights})
    found = []
    for each in nested_values([weights, moments]):
        if isinstance(each, ShardedTensor):
            shape = (1,) * (len(each.global_shape) - each.data.dim()) + tuple(each.data.shape)
            values = each.data.detach().float().numpy().reshape(shape).copy()
            found.append((each.key, each.global_shape, each.global_offset, values))
    return found


def _whole(ranks: list[Any]) -> Whole:
    """The tensors of the model, put together from the pieces of all ranks; where these overlap they must agree."""
    tensors: Whole = {}
    for name, shape, offset, values in itertools.chain.from_iterable(ranks):
        tensor = tensors.setdefault(name, np.full(shape, np.nan, np.float32))
        place = tensor[tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))]
        assert (np.isnan(place) | (place == values)).all(), f"replicas of {name} differ"
        place[:] = values
    for name in tensors:
        if "word_embeddings" in name or "output_layer" in name:
            tensors[name] = tensors[name][:VOCAB]  # the padding depends on the layout
    assert not [name for name, tensor in tensors.items() if np.isnan(tensor).any()], "not all of the model is there"
    return tensors


def _random_digest() -> str:
    state = checkpoint._random_state()
    parts = [state["torch"].numpy().tobytes(), state["numpy"][1].tobytes(), repr(state["python"]).encode()]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def job(rank: Rank, cfg: PolicyConfig, load: str | None, save: str | None, steps: int) -> dict[str, Any]:
    # megatron's hybrid optimizer takes no float32 model
    worker = make_worker(rank, cfg, dtype="bfloat16" if cfg.optimizer.offload_fraction else "float32")
    if load:
        checkpoint.load(worker, load)
    loaded, drawn = _pieces(worker), _random_digest()
    _, packs = packs_of(worker, make_samples())
    results = [worker.train(packs) for _ in range(steps)]
    torch.rand(rank.rank + 1), np.random.rand(), random.random()  # the ranks' generators go their own ways
    files = checkpoint.save(worker, save) if save else {}
    found = {
        "norms": [r.grad_norm for r in results],
        "rates": [r.lr for r in results],
        "loaded": loaded,
        "drawn": (drawn, _random_digest()),
        "pieces": _pieces(worker),
        "schedule": worker.scheduler.state_dict(),
        "groups": [part.state_dict() for part in optimizer_parts(worker.optimizer)],
        "step": get_step(optimizer_parts(worker.optimizer)),
        "files": files,
    }
    worker.close()
    return found


def _equal(a: Whole, b: Whole) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("layout", "offload"),
    [({"tensor": 2, "data": 2}, 0.0), ({"pipeline": 2, "virtual_pipeline": 2}, 0.0), ({"data": 2}, 0.5)],
)
def test_two_and_two_steps_are_four_bitwise(
    ranks: Ranks, qwen3: str, tmp_path: Path, layout: dict[str, int], offload: float
) -> None:
    optimizer = SCHEDULE.model_copy(update={"offload_fraction": offload})
    cfg = policy_config(qwen3, layout, optimizer=optimizer)
    path = str(tmp_path / "ck")
    world = cfg.parallel.world_size
    four = ranks.run(world, job, cfg, None, None, 4)
    first = ranks.run(world, job, cfg, None, path, 2)
    second = ranks.run(world, job, cfg, path, None, 2)
    assert first[0]["norms"] + second[0]["norms"] == four[0]["norms"]
    assert first[0]["rates"] + second[0]["rates"] == four[0]["rates"]
    assert len(set(four[0]["rates"])) == 4  # the schedule moved, so a forgotten one would show
    assert [r["schedule"] for r in second] == [r["schedule"] for r in four]
    assert [r["groups"] for r in second] == [r["groups"] for r in four]
    assert _equal(_whole([r["pieces"] for r in second]), _whole([r["pieces"] for r in four]))
    assert [r["drawn"][0] for r in second] == [r["drawn"][1] for r in first]
    assert len({r["drawn"][1] for r in first}) == world

    files = first[0]["files"]
    assert {p.name for p in Path(path).iterdir()} == files.keys()
    assert all(sum_file(Path(path) / name) == written for name, written in files.items())
    sizes = sorted(file.size for name, file in files.items() if name.endswith(".distcp"))
    assert len(sizes) == world
    assert layout.get("data", 1) == 1 or sizes[0] > 0.8 * sizes[-1], "data ranks share the writing"


DENSE: dict[str, dict[str, Any]] = {
    "one rank": {},
    "PP2": {"pipeline": 2},
    "PP2+VPP2": {"pipeline": 2, "virtual_pipeline": 2},
    "TP2xPP2": {"tensor": 2, "pipeline": 2},
    "DP2": {"data": 2},
    "CP2": {"context": 2},
}
EXPERTS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "EP2": {"data": 2, "expert": 2},
    "ETP2": {"tensor": 2, "sequence_parallel": True, "expert_tensor": 2},
    "EP2xPP2+VPP2": {"data": 2, "expert": 2, "pipeline": 2, "virtual_pipeline": 2},
}


def _check_layouts(ranks: Ranks, model: str, path: str, saved: dict[str, Any], others: dict[str, Any]) -> None:
    """Whatever was saved is loaded bitwise by every layout, and saved by each for the next one."""
    cfg = policy_config(model, saved, optimizer=SCHEDULE)
    result = ranks.run(cfg.parallel.world_size, job, cfg, None, f"{path}/first", 2)
    whole = _whole([r["pieces"] for r in result])
    prefix = "optimizer.state.fp32_param."
    masters = {name.removeprefix(prefix): tensor for name, tensor in whole.items() if name.startswith(prefix)}
    assert _equal(masters, {name: tensor for name, tensor in whole.items() if name.startswith("model.")})
    expected = ranks.run(cfg.parallel.world_size, job, cfg, f"{path}/first", None, 2)[0]["norms"]
    source = f"{path}/first"
    for name, layout in others.items():
        cfg = policy_config(model, layout, optimizer=SCHEDULE)
        # Loaded from the layout before it, and nothing trained in between: an error would be handed on.
        again = ranks.run(cfg.parallel.world_size, job, cfg, source, f"{path}/{name}", 0)
        assert _equal(_whole([r["loaded"] for r in again]), whole), name
        source = f"{path}/{name}"
        result = ranks.run(cfg.parallel.world_size, job, cfg, source, None, 2)
        # A fresh optimizer or schedule would change the third step's update, and with it the fourth gradient.
        assert {r["step"] for r in result} == {4}
        assert result[0]["norms"] == pytest.approx(expected, rel=2e-4), name


def test_any_layout_goes_on_from_any_other(ranks: Ranks, qwen3: str, tmp_path: Path) -> None:
    _check_layouts(ranks, qwen3, str(tmp_path), {"tensor": 2, "data": 2}, DENSE)


def test_any_layout_of_experts_goes_on_from_any_other(ranks: Ranks, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "qwen3_moe", tied=False)
    _check_layouts(ranks, model, str(tmp_path), {"data": 2, "expert": 2}, EXPERTS)


def snapshot_job(rank: Rank, cfg: PolicyConfig, path: str) -> tuple[bool, float, bool]:
    """Trains on while nothing of the save has been written yet."""
    worker = make_worker(rank, cfg, dtype="bfloat16")
    _, packs = packs_of(worker, make_samples())
    worker.train(packs)
    before = _bytes(worker)
    goes_on, original = threading.Event(), checkpoint.SummedFile.write

    def write(self: Any, data: Any) -> int:
        goes_on.wait(60)
        return original(self, data)

    checkpoint.SummedFile.write = write  # type: ignore[method-assign]
    try:
        saver = checkpoint.Saver(worker)
        saver.begin(Path(path))
        worker.train(packs)
        writing = saver.part() is None
        goes_on.set()
        part = saver.part(wait=True)
    finally:
        checkpoint.SummedFile.write = original  # type: ignore[method-assign]
    parts: list[Any] = [None] * rank.world_size
    torch.distributed.all_gather_object(parts, part)
    if rank.rank == 0:
        saver.complete(parts)
    torch.distributed.barrier()
    changed = sum(a != b for a, b in zip(before, _bytes(worker), strict=True)) / len(before)
    checkpoint.load(worker, path)
    same = _bytes(worker) == before
    worker.close()
    return writing, changed, same


def _bytes(worker: Any) -> list[bytes]:
    """Of every weight, master weight and moment of the rank."""
    state = [
        tensor
        for part in optimizer_parts(worker.optimizer)
        for group in part.optimizer.param_groups
        for p in group["params"]
        for tensor in (p, *(value for value in part.optimizer.state[p].values() if value.dim()))
    ]
    tensors = [*(p for chunk in worker.chunks for p in chunk.parameters()), *state]
    return [tensor.detach().view(torch.uint8).numpy().tobytes() for tensor in tensors]


def test_what_is_written_is_the_state_of_the_moment(ranks: Ranks, tmp_path: Path, qwen3: str) -> None:
    cfg = policy_config(qwen3, {"data": 2}, optimizer=SCHEDULE)
    for writing, changed, same in ranks.run(2, snapshot_job, cfg, str(tmp_path / "ck")):
        assert writing, "training went on while the save was being written"
        assert changed > 0.5, "training changed what the save had copied"
        assert same


def failure_job(rank: Rank, cfg: PolicyConfig, path: str) -> str:
    worker = make_worker(rank, cfg)
    saver = checkpoint.Saver(worker)
    (Path(path) / "__0_0.distcp").mkdir(parents=True)  # in the way
    saver.begin(Path(path))
    try:
        saver.part(wait=True)
    except CheckpointError as error:
        return str(error)
    finally:
        worker.close()
    return ""


def test_a_failure_in_the_background_is_told(ranks: Ranks, tmp_path: Path, qwen3: str) -> None:
    (told,) = ranks.run(1, failure_job, policy_config(qwen3), str(tmp_path / "ck"))
    assert "rank 0 could not write" in told
    assert str(tmp_path) in told


def test_every_kind_of_damage_is_found_by_one_rank(tmp_path: Path) -> None:
    files = {f"{i}.distcp": f"content of {i}" for i in range(7)}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    sums = {name: sum_file(tmp_path / name).sha256 for name in files}
    assert damaged(tmp_path, sums, sums) == []
    (tmp_path / "1.distcp").write_text("content of l")
    (tmp_path / "4.distcp").unlink()
    (tmp_path / "6.distcp").write_text("content of")
    found = [checkpoint.verify(tmp_path, sums, rank, 3) for rank in range(3)]
    assert sorted(problem.split()[0] for problem in itertools.chain(*found)) == ["1.distcp", "4.distcp", "6.distcp"]
