"""Conversion: bitwise both ways, loadable by any layout, verified by transformers, complete or absent, streaming."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.distributed.checkpoint import FileSystemReader

from megatron_fapo.checksums import SUMS, format_sums, sum_file
from megatron_fapo.config.policy import PolicyConfig
from megatron_fapo.errors import UserError
from megatron_fapo.policy import checkpoint, convert, stored, streams, verify
from megatron_fapo.policy.actor import copy_model_files
from megatron_fapo.policy.hf_weights import HFCheckpoint
from megatron_fapo.policy.parallel import Rank
from megatron_fapo.policy.streams import HFTensor, deal
from tests.policy.models import FAMILIES, make_samples, write_model
from tests.policy.ranks import Ranks, make_worker, packs_of, policy_config

SIZES = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Path]:
    """Checkpoints of every family in bfloat16, with an odd vocabulary; by family and whether they are tied."""
    root = tmp_path_factory.mktemp("families")
    kinds = itertools.product(FAMILIES, (True, False))
    return {(f, tied): Path(write_model(root / f"{f}-{tied}", f, tied, dtype="bfloat16")) for f, tied in kinds}


def _hashes(directory: Path) -> dict[str, str]:
    source = HFCheckpoint(directory)
    return {name: _hash(source[name]) for name in source.names()}


def _hash(tensor: torch.Tensor) -> str:
    raw = tensor.detach().contiguous().view(torch.uint8).numpy()
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(raw).hexdigest()}"


def _to_megatron(hf: Path, out: Path, sizes: tuple[int, int, int] = (1, 1, 1)) -> int:
    tensor, pipeline, expert = sizes
    return convert.hf_to_megatron(hf, out, tensor=tensor, pipeline=pipeline, expert=expert, verify=False)


def round_trip_job(rank: Rank, models: dict[tuple[str, bool], Path], root: Path) -> dict[Any, Any]:
    del rank
    wrong = {}
    for (family, tied), hf in models.items():
        expected = _hashes(hf)
        for sizes in SIZES + ([(1, 1, 2), (2, 2, 2)] if family == "qwen3_moe" else []):
            megatron, back = root / "megatron", root / "back"
            _to_megatron(hf, megatron, sizes)
            convert.megatron_to_hf(megatron, back, verify=False)
            files = len([*megatron.glob("release/*.distcp")])
            if _hashes(back) != expected or files != max(sizes[0], sizes[2]) * sizes[1]:
                wrong[family, tied, sizes] = files
            shutil.rmtree(megatron)
            shutil.rmtree(back)
    return wrong


def test_every_family_comes_back_bitwise_from_every_layout(
    ranks: Ranks, models: dict[tuple[str, bool], Path], tmp_path: Path
) -> None:
    """One file per model-parallel rank, tied and untied, with a vocabulary that two ranks have to pad."""
    assert ranks.run(1, round_trip_job, models, tmp_path) == [{}]


def convert_job(rank: Rank, hf: Path, out: Path, sizes: tuple[int, int, int]) -> int:
    del rank
    return _to_megatron(hf, out, sizes)


def load_job(rank: Rank, cfg: PolicyConfig, directory: Path) -> bool:
    """Whether a rank that has lost its weights gets the same from the converted checkpoint as it had from HF."""
    from megatron.core import dist_checkpointing

    worker = make_worker(rank, cfg, dtype="bfloat16")
    before = [p.detach().clone() for chunk in worker.chunks for p in chunk.parameters()]
    for chunk in worker.chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(7)
    wanted = {str(i): chunk.sharded_state_dict() for i, chunk in enumerate(worker.chunks)}
    loaded = dist_checkpointing.load(wanted, str(directory / "release"))
    for i, chunk in enumerate(worker.chunks):
        chunk.load_state_dict(loaded[str(i)])
    after = [p.detach() for chunk in worker.chunks for p in chunk.parameters()]
    same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    common = (loaded["checkpoint_version"], loaded["iteration"])
    worker.close()
    return same and common == (3.0, 0)


@pytest.mark.parametrize(
    ("family", "sizes", "layout"),
    [
        ("qwen3", (2, 2, 1), {"tensor": 1}),
        ("qwen2", (2, 2, 1), {"pipeline": 2, "virtual_pipeline": 2}),
        ("qwen3_moe", (1, 2, 2), {"tensor": 2, "sequence_parallel": True}),
        ("qwen3_moe", (2, 2, 1), {"expert": 2, "data": 2}),
    ],
)
def test_another_layout_loads_what_was_cut_for_one(
    ranks: Ranks,
    models: dict[tuple[str, bool], Path],
    tmp_path: Path,
    family: str,
    sizes: tuple[int, int, int],
    layout: dict[str, Any],
) -> None:
    hf = models[family, family == "qwen2"]
    ranks.run(1, convert_job, hf, tmp_path / "megatron", sizes)
    cfg = policy_config(str(hf), layout)
    assert all(ranks.run(cfg.parallel.world_size, load_job, cfg, tmp_path / "megatron"))
    keys = FileSystemReader(tmp_path / "megatron" / "release").read_metadata().state_dict_metadata
    assert "decoder.final_layernorm._extra_state/shard_0_1" in keys  # which Transformer Engine's norms ask for
    own_norm = "decoder.layers.pre_mlp_layernorm._extra_state/shard_3_4"
    assert (own_norm in keys) == (family == "qwen3_moe")


def run_job(rank: Rank, cfg: PolicyConfig, directory: Path) -> dict[str, str]:
    """Train a step, save as a run does; hashes of the weights that this stage exports."""
    worker = make_worker(rank, cfg)
    worker.train(packs_of(worker, make_samples())[1])
    checkpoint.save(worker, directory)
    weights = {name: _hash(tensor) for name, tensor in worker.export()}
    worker.close()
    return weights


def to_hf_job(rank: Rank, megatron: Path, out: Path) -> dict[str, str] | str:
    del rank
    try:
        convert.megatron_to_hf(megatron, out, verify=False)
    except UserError as error:
        return str(error)
    return _hashes(out)


def test_a_checkpoint_of_a_run_is_what_it_trained(ranks: Ranks, qwen3: str, tmp_path: Path) -> None:
    """With its optimizer, saved by another layout; and not when a byte of it has changed."""
    step = tmp_path / "step_000001"
    cfg = policy_config(qwen3, {"tensor": 2, "pipeline": 2})
    exported: dict[str, str] = {}
    for weights in ranks.run(4, run_job, cfg, step / "policy"):
        exported |= weights
    copy_model_files(Path(qwen3), step / "policy" / "hf")
    files = [path for path in step.rglob("*") if path.is_file()]
    (step / SUMS).write_text(format_sums({str(p.relative_to(step)): sum_file(p).sha256 for p in files}))
    (tmp_path / "best").symlink_to(step.name)
    assert ranks.run(1, to_hf_job, tmp_path / "best", tmp_path / "hf") == [exported]
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "float32"
    assert exported != _hashes(Path(qwen3))

    data = bytearray((step / "policy" / "__1_0.distcp").read_bytes())
    data[len(data) // 2] ^= 1
    (step / "policy" / "__1_0.distcp").write_bytes(data)
    (message,) = ranks.run(1, to_hf_job, step, tmp_path / "damaged")
    assert "is damaged: policy/__1_0.distcp is not as it was written" in message
    assert not (tmp_path / "damaged").exists()


def verify_job(rank: Rank, models: dict[tuple[str, bool], Path], root: Path) -> list[Any]:
    """Agreement of every model with its conversion; of one with that of a model that differs in one row of q_proj."""
    del rank
    found = []
    for (family, tied), hf in models.items():
        _to_megatron(hf, root / f"{family}-{tied}", (2, 1, 1))
        found.append(verify.compare(hf, root / f"{family}-{tied}" / "release"))
    other = root / "other"
    shutil.copytree(models["qwen3", False], other)
    file = other / "model.safetensors"
    tensors = {name: HFCheckpoint(other)[name].clone() for name in HFCheckpoint(other).names()}
    tensors["model.layers.3.self_attn.q_proj.weight"][[0, 1]] = tensors["model.layers.3.self_attn.q_proj.weight"][
        [1, 0]
    ]
    from safetensors.torch import save_file

    save_file(tensors, file, {"format": "pt"})
    return [*found, verify.compare(other, root / "qwen3-False" / "release")]


def test_verification_tells_rounding_from_a_wrong_place(
    ranks: Ranks, models: dict[tuple[str, bool], Path], tmp_path: Path
) -> None:
    chosen = {key: models[key] for key in models if key[1] == (key[0] in ("qwen2", "qwen3_moe")) or key[0] == "qwen3"}
    ((*same, different),) = ranks.run(1, verify_job, chosen, tmp_path)
    assert len(same) == 5
    assert all(each.largest < verify.LIMIT / 50 for each in same), same
    assert different.largest > 5 * verify.LIMIT


def life_job(rank: Rank, hf: Path, root: Path) -> None:
    """What an interruption, a failed verification and their repetition leave."""
    del rank
    out, partial, written = root / "m", root / "m.partial", convert.write_megatron

    def interrupted(directory: Path, *args: Any, **kwargs: Any) -> None:
        written(directory, *args, **kwargs)
        raise KeyboardInterrupt

    convert.write_megatron = interrupted
    with pytest.raises(KeyboardInterrupt):
        _to_megatron(hf, out)
    convert.write_megatron = written
    assert partial.is_dir()
    assert not out.exists()
    with pytest.raises(UserError, match=r"m\.partial was not completed"):
        convert.megatron_to_hf(partial, root / "h", verify=False)

    compared = convert.compare
    for largest in (float("nan"), 2 * verify.LIMIT):
        convert.compare = lambda *_, largest=largest: verify.Agreement(64, largest, 0.0)
        assert convert.hf_to_megatron(hf, out, tensor=1, pipeline=1, expert=1, verify=True) == 1
        assert partial.is_dir()
        assert not out.exists()
    convert.compare = compared
    assert convert.hf_to_megatron(hf, out, tensor=1, pipeline=1, expert=1, verify=True) == 0
    assert not partial.exists()
    with pytest.raises(UserError, match="not empty"):
        _to_megatron(hf, out)
    assert convert.megatron_to_hf(out, root / "h", verify=True) == 0


def test_a_conversion_is_complete_or_absent(ranks: Ranks, models: dict[tuple[str, bool], Path], tmp_path: Path) -> None:
    ranks.run(1, life_job, models["llama", True], tmp_path)


def memory_job(rank: Rank, hf: Path, root: Path) -> tuple[int, int, list[str]]:
    """Most tensors that were alive at once, of those that were written and of those that were read."""
    del rank
    alive: list[Any] = []
    most = [0, 0]

    def count(which: int, tensors: list[torch.Tensor]) -> None:
        alive.extend(weakref.ref(tensor.untyped_storage()) for tensor in tensors)
        most[which] = max(most[which], sum(ref() is not None for ref in alive))

    resolve, load = streams._Planner.resolve_data, stored.StoredWeights.load

    def counted_resolve(self: Any, item: Any) -> Any:
        data = resolve(self, item)
        if isinstance(data, torch.Tensor):
            count(0, [data])
        return data

    def counted_load(self: Any, parameters: Any) -> list[torch.Tensor]:
        tensors = load(self, parameters)
        count(1, tensors)
        return tensors

    streams._Planner.resolve_data, stored.StoredWeights.load = counted_resolve, counted_load
    stored._BATCH_BYTES, convert.SHARD_BYTES = 1, 400_000
    try:
        _to_megatron(hf, root / "m")
        convert.megatron_to_hf(root / "m", root / "h", verify=False)
    finally:
        streams._Planner.resolve_data, stored.StoredWeights.load = resolve, load
        stored._BATCH_BYTES, convert.SHARD_BYTES = 500_000_000, 5_000_000_000
    return (*most, sorted(path.name for path in (root / "h").glob("*.safetensors")))


def test_memory_holds_a_tensor_and_not_the_model(
    ranks: Ranks, models: dict[tuple[str, bool], Path], tmp_path: Path
) -> None:
    hf = models["qwen3", False]
    ((written, read, files),) = ranks.run(1, memory_job, hf, tmp_path)
    assert written <= 2
    assert read <= 2
    # A view would be saved with all that it is a view of.
    converted = sum(path.stat().st_size for path in tmp_path.glob("m/release/*.distcp"))
    assert converted < 1.3 * (hf / "model.safetensors").stat().st_size
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "h" / "model.safetensors.index.json").read_text())["weight_map"]
    for name, file in index.items():
        with safe_open(tmp_path / "h" / file, "pt") as handle:
            assert torch.equal(handle.get_tensor(name), HFCheckpoint(hf)[name])
    assert index.keys() == set(HFCheckpoint(hf).names())


def refusal_job(rank: Rank, hf: Path, out: Path) -> str:
    del rank
    with pytest.raises(UserError) as error:
        _to_megatron(hf, out, (3, 3, 2))
    assert not out.with_name(out.name + ".partial").exists()
    return str(error.value)


def test_everything_wrong_is_said_at_once(ranks: Ranks, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    hf = Path(write_model(tmp_path / "hf", "llama", tied=False))
    source = HFCheckpoint(hf)
    tensors = {name: source[name].clone() for name in source.names()}
    del tensors["model.norm.weight"]
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:-1].clone()
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(128)
    save_file(tensors, hf / "model.safetensors", {"format": "pt"})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    (message,) = ranks.run(1, refusal_job, hf, tmp_path / "out")
    for part in (
        "2 KV heads do not divide by --tp 3",
        "4 layers do not divide by --pp 3",
        "--ep 2: LlamaForCausalLM has no experts",
        "tensor model.norm.weight is missing",
        "tensor model.embed_tokens.weight has shape (514, 128) where config.json asks for (515, 128)",
        "tensor model.layers.0.self_attn.q_proj.bias belongs to no parameter of a LlamaForCausalLM",
        "out exists and is not empty",
    ):
        assert part in message


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a megatron checkpoint"):
        stored.weights_of(tmp_path)


def test_tensors_fill_files_in_order() -> None:
    def tensor(name: str, count: int) -> HFTensor:
        return HFTensor(name, (count,), torch.bfloat16)

    tensors = [tensor("a", 20), tensor("b", 30), tensor("c", 1), tensor("d", 70), tensor("e", 50)]
    files = deal(tensors, 100)
    assert [[each.name for each in file] for file in files] == [["a", "b"], ["c"], ["d"], ["e"]]
    assert deal([], 100) == []
