"""The testbed's tokenizer and tiny models, as ordinary Hugging Face folders.

The tokenizer is byte-level without merges, so that any text round-trips exactly and every digit is one token; on top,
each phrase of the testbed and of the GenRM prompts is one token. A tiny model then reads a judged solution in about
200 tokens in place of 1,500, which is what makes training it on one CPU core take minutes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_fapo.data.testbed import GAINS, LOSSES, NAMES, OBJECTS

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Only speed depends on these phrases matching the texts elsewhere: a phrase that no longer occurs costs tokens, never
# correctness. None contains a digit, because digits must stay single tokens.
_PHRASES = (
    *NAMES,
    *(f" {objects}" for objects in OBJECTS),
    *(f" {verb} " for verb in ("has", *GAINS, *LOSSES)),
    " packs the",
    " into boxes of ",
    "How many",
    " are left over?",
    "Please reason step by step, and put your final answer within \\boxed{}.",
    ". ",
    ".\n\n",
    "\n\n",
    ": ",
    ", ",
    " = ",
    " + ",
    " - ",
    " * ",
    "Boxes of ",
    ", so \\boxed{",
    "That makes ",
    "It must be \\boxed{",
    "\\boxed{",
    "}.",
    "user\n",
    "assistant\n",
    "The following is a math problem with its ground truth answer, along with an AI solution (split into paragraphs, "
    "enclosed with tags and indexed from ",
    "The following is a math problem with its ground truth answer, along with an AI solution (split into steps):",
    "):\n\n[Math Problem]\n\n",
    "[Math Problem]\n\n",
    "\n\n[Ground Truth]\n\n",
    "\n\n[AI Solution]\n\n",
    "<paragraph_",
    "\n</paragraph_",
    ".\n</paragraph_",
    ">\n\n<paragraph_",
    ">\n\n",
    ">\n",
    ", should be ",
    ", right.\n",
    ", wrong.\n",
    "\\boxed{-",
    ", box ",
    "Your task is to review and critique the solution paragraph by paragraph. Once you identify an error in a "
    "paragraph, return the index of the paragraph where the earliest error occurs. Otherwise, return the index of -",
    "Your task is to review and critique the solution step by step. Once you identify an error in a step, return the "
    "index of the step where the earliest error occurs. Otherwise, return the index of -",
    " (which typically denotes 'not found').\n\n",
    "Please reason step by step, put your final answer (i.e., the index) in \\boxed{}.",
)


def build_testbed_tokenizer(out_dir: str | Path) -> Any:
    """Write the testbed's tokenizer to `out_dir` (the same bytes every time) and return it.

    Ids 0..255 are bytes, then phrases, then special tokens; reserved tokens fill up to a multiple of 64, so that a
    model whose vocabulary is padded to it for tensor parallelism cannot sample an id that the tokenizer lacks.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    phrases = list(dict.fromkeys(phrase for phrase in _PHRASES if len(phrase) > 1))
    specials = [PAD, START, END]
    specials += [f"<|reserved_{i}|>" for i in range(-(len(alphabet) + len(phrases) + len(specials)) % 64)]
    tokenizer.add_tokens([AddedToken(phrase, normalized=False, special=False) for phrase in phrases])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(str(out_dir))
    return fast


def tiny_model_config(vocab_size: int, **overrides: Any) -> Any:
    """A Qwen3 configuration of about 0.7M parameters; `overrides` replace any of its fields.

    Layers divide by 2 and 4 (pipeline stages), heads by 4 and KV groups by 2 (tensor ranks); head_dim 32 is the
    smallest that vLLM's CPU attention takes.
    """
    from transformers import Qwen3Config

    fields: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 1024,
        # Narrow models start far too near zero at the usual 0.02: at 0.06 they learn to copy and add in half the steps.
        "initializer_range": 0.06,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "architectures": ["Qwen3ForCausalLM"],
        "dtype": "float32",
    }
    return Qwen3Config(**(fields | overrides))


def init_tiny_model(out_dir: str | Path, seed: int, **overrides: Any) -> None:
    """Write a randomly initialised tiny model (config, safetensors, tokenizer); equal seeds give equal bytes."""
    import torch
    from transformers import Qwen3ForCausalLM

    tokenizer = build_testbed_tokenizer(out_dir)
    config = tiny_model_config(
        len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **overrides
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(str(out_dir))
