from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from megatron_fapo.data.tokenizer import init_tiny_model
from megatron_fapo.errors import UserError
from megatron_fapo.weight_sync.checkpoint import checkpoint_shapes


@pytest.mark.parametrize("tied", [False, True])
def test_shapes_are_those_of_the_model(tmp_path, tied):
    from transformers import AutoModelForCausalLM

    init_tiny_model(tmp_path, 0, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if tied:
        del wanted["lm_head.weight"]
    assert checkpoint_shapes(str(tmp_path)) == wanted


def test_several_files_are_read(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.zeros(2)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.zeros(3, 1)}, tmp_path / "model-00002-of-00002.safetensors")
    assert checkpoint_shapes(str(tmp_path)) == {"a": (2,), "b": (3, 1)}


def test_a_folder_without_weights_is_named(tmp_path):
    with pytest.raises(UserError, match=rf"{tmp_path}.*safetensors"):
        checkpoint_shapes(str(tmp_path))
