from __future__ import annotations

import filecmp

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fapo.data.testbed import make_problem
from megatron_fapo.data.tokenizer import build_testbed_tokenizer, init_tiny_model


@settings(max_examples=300, deadline=None)
@given(text=st.text())
def test_any_unicode_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), noise=st.text(max_size=5))
def test_phrases_and_noise_mixed_round_trip(tokenizer, seed, noise):
    text = noise.join(make_problem(seed, 0).question.split(" ")) + "\n\n" + noise
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_every_digit_is_one_token(tokenizer):
    text = "12 figs, <paragraph_10>\n index of -1 (which 305"
    tokens = [tokenizer.decode([i]) for i in tokenizer.encode(text, add_special_tokens=False)]
    assert [token for token in tokens if any(c.isdigit() for c in token)] == list("12101305")


def test_build_is_deterministic_bytes(tokenizer_dir, tmp_path):
    build_testbed_tokenizer(tmp_path)
    names = sorted(path.name for path in tokenizer_dir.iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir())
    assert filecmp.cmpfiles(tokenizer_dir, tmp_path, names, shallow=False)[0] == names


def test_vocabulary_is_padded_and_every_id_decodes(tokenizer):
    assert len(tokenizer) % 64 == 0
    assert all(tokenizer.convert_ids_to_tokens(i) is not None for i in range(len(tokenizer)))


def test_chat_template_and_special_tokens(tokenizer):
    messages = [{"role": "user", "content": "Mia has 7 figs."}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>user\nMia has 7 figs.<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == (
        "user\nMia has 7 figs.\nassistant\n"
    )


def test_a_problem_is_few_tokens(tokenizer):
    lengths = [len(tokenizer.encode(make_problem(0, i).question)) for i in range(100)]
    assert max(lengths) < 40


def test_tiny_model_is_deterministic_and_loads(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    first, second, other = (tmp_path / name for name in ("first", "second", "other"))
    init_tiny_model(first, seed=1)
    init_tiny_model(second, seed=1)
    init_tiny_model(other, seed=2, tie_word_embeddings=True)
    names = sorted(path.name for path in first.iterdir())
    assert filecmp.cmpfiles(first, second, names, shallow=False)[0] == names
    assert not filecmp.cmp(first / "model.safetensors", other / "model.safetensors", shallow=False)
    model = AutoModelForCausalLM.from_pretrained(first)
    tokenizer = AutoTokenizer.from_pretrained(first)
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    ids = torch.tensor([tokenizer.encode("Mia has 7 figs.")])
    assert torch.isfinite(model(ids).logits).all()
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
