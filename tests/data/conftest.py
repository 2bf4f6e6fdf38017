from __future__ import annotations

import pytest

from megatron_fapo.data.tokenizer import build_testbed_tokenizer


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("tokenizer")
    build_testbed_tokenizer(out_dir)
    return out_dir


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_dir)
