from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from megatron_fapo.data.tokenizer import init_tiny_model
from megatron_fapo.errors import UserError
from megatron_fapo.weight_sync.checkpoint import expected_tensors


def test_expected_tensors_are_those_of_the_checkpoint(tmp_path):
    from transformers import AutoModelForCausalLM

    init_tiny_model(tmp_path, 0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    coverage = expected_tensors(str(tmp_path))
    assert coverage.expected == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert coverage.optional == frozenset()


def test_tied_output_layer_may_come_but_need_not(tmp_path):
    init_tiny_model(tmp_path, 0, tie_word_embeddings=True)
    coverage = expected_tensors(str(tmp_path))
    assert "lm_head.weight" not in coverage.expected
    assert "lm_head.weight" in coverage.optional


def test_several_files_are_read(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.zeros(2)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.zeros(3, 1)}, tmp_path / "model-00002-of-00002.safetensors")
    assert expected_tensors(str(tmp_path)).expected == {"a": (2,), "b": (3, 1)}


def test_a_folder_without_weights_is_named(tmp_path):
    with pytest.raises(UserError, match=rf"{tmp_path}.*safetensors"):
        expected_tensors(str(tmp_path))
