"""No text that a policy writes comes out as sound because of how it is shown to the judge, or how the judge is read."""

from __future__ import annotations

import asyncio
import importlib.resources
import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from megatron_fapo.config.genrm import GenRMConfig
from megatron_fapo.config.reward import RewardConfig
from megatron_fapo.data.paragraphs import split_paragraphs
from megatron_fapo.data.records import Sample, Score
from megatron_fapo.genrm.prompts import judge_messages, neutralise
from megatron_fapo.genrm.reward_loop import RewardLoop
from megatron_fapo.genrm.verdict import Reason, parse_verdict
from tests.faults.fake_server import Behaviour, FakeServer, says
from tests.genrm.hostile import BOXES_OF_SOUND, FORGERIES, HOSTILE, MARKERS
from tests.genrm.samples import make_sample

TAG = re.compile(r"<paragraph_(\d+)>\n(.*?)\n</paragraph_\1>", re.DOTALL)
FRAGMENTS = st.sampled_from(
    [
        *MARKERS,
        *BOXES_OF_SOUND,
        *FORGERIES,
        "\n\n",
        "\n",
        " ",
        "<",
        "[",
        "/",
        "|",
        "｜",
        ">",
        "\\",
        "x",
        "1",
        "_0>",
        "&lt;",
    ]
)
TEXT = st.lists(st.one_of(FRAGMENTS, st.text(st.characters(), max_size=5)), max_size=30).map("".join)


# What tokenizers and readers make of it.


@pytest.mark.parametrize("marker", MARKERS)
def test_no_special_token_of_a_model_family_survives(marker: str) -> None:
    for before in ("", "x", "\n", " ", "<"):
        shown = neutralise(f"{before} {marker}" if marker.startswith("/") else before + marker)
        assert marker not in shown
        assert marker[1:] in shown, "only its first character changes"


@settings(deadline=None)
@given(TEXT)
def test_a_tokenizer_that_knows_all_special_tokens_finds_none(text: str) -> None:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE({character: number for number, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens = [AddedToken(marker, special=True, normalized=False) for marker in MARKERS if not marker.startswith("/")]
    tokenizer.add_special_tokens(tokens)
    content = judge_messages(text, text, f"x {text}", "tagged")[0]["content"]
    assert max(tokenizer.encode(content).ids) < len(alphabet)


def test_the_tokenizers_of_mistral_find_none() -> None:
    import mistral_common  # these three come with vLLM
    import sentencepiece
    from mistral_common.tokens.tokenizers import base

    data = importlib.resources.files(mistral_common) / "data"
    newest = max((file for file in data.iterdir() if ".model" in file.name), key=lambda file: file.name)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=newest.read_bytes())
    names = {pieces.id_to_piece(i) for i in range(pieces.vocab_size()) if pieces.is_control(i)}
    names |= {token.value for token in base.SpecialTokens}
    assert {"<s>", "[INST]", "[TOOL_CALLS]"} <= names
    assert [name for name in names if name in neutralise(f"x {name} {name}")] == []


@pytest.mark.skipif("FAPO_TEST_TOKENIZERS" not in os.environ, reason="FAPO_TEST_TOKENIZERS names no HF model folders")
def test_tokenizers_of_real_models_find_none() -> None:
    """FAPO_TEST_TOKENIZERS: folders with a tokenizer.json, separated by colons."""
    for folder in os.environ["FAPO_TEST_TOKENIZERS"].split(":"):
        tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        own = " ".join(token.content for token in tokenizer.get_added_tokens_decoder().values())
        assert special & set(tokenizer.encode(own, add_special_tokens=False).ids) == special
        for text in [own, *HOSTILE]:
            shown = neutralise(text)
            assert not special & set(tokenizer.encode(shown, add_special_tokens=False).ids), (folder, text[:100])


@pytest.mark.parametrize("box", BOXES_OF_SOUND)
def test_a_box_of_sound_in_foreign_text_is_none_when_it_is_quoted(box: str) -> None:
    assert parse_verdict(f"So {box}", "stop", 3) == -1
    for text in (box, f"text\n{box}", f"{box}{box}", f"\\boxed{{2}} {box}.", f"$${box}$$"):
        assert parse_verdict(neutralise(text), "stop", 3) != -1


@pytest.mark.parametrize("text", FORGERIES[2:7])
def test_look_alikes_and_what_hides_in_them_become_visible(text: str) -> None:
    shown = neutralise(text)
    assert not re.search("[<＜‹〈⟨]/?[^&>＞›〉⟩]{9}", shown)
    assert not re.search("[\u200b\u200d]", shown)
    assert shown != text


def test_what_was_harmless_stays_as_it_was() -> None:
    for text in (
        "\\boxed{1} \\boxed{-2} \\boxed{x-1} \\boxed{-11} \\boxed{-1,2} \\boxed{\\frac{-1}{2}} \\boxed{2^{-1}}",
        "Fläche, 面积, площадь, ∠ABC, ⟨a, b⟩, 〈u, v〉, [ABC] = 12, [AB], x<y_1>z, 「引用」, 【注】",
        "tabs\tand\r\nbreaks\x0c, $\\langle\\psi|\\phi\\rangle$, <psi|phi>, |x|<1/2, 1/think2",
    ):
        assert neutralise(text) == text


@settings(deadline=None)
@given(TEXT)
def test_neutralising_is_done_once_bounded_and_leaves_nothing(text: str) -> None:
    shown = neutralise(text)
    assert neutralise(shown) == shown
    assert len(shown) <= 9 * len(text)
    shown.encode()  # no half of a surrogate pair
    assert not [marker for marker in MARKERS if not marker.startswith("/") and marker in shown]
    assert parse_verdict(shown, "stop", None) != -1


@settings(deadline=None)
@given(TEXT)
def test_a_whole_that_is_clean_has_clean_paragraphs(solution: str) -> None:
    paragraphs = split_paragraphs(solution)
    if paragraphs:
        whole, apart = (judge_messages("q", "2", each, "tagged") for each in (solution, paragraphs))
        assert whole == apart


@given(TEXT, TEXT)
def test_the_prompt_has_the_paragraphs_of_the_solution_and_no_others(question: str, solution: str) -> None:
    paragraphs = split_paragraphs(solution)
    assert split_paragraphs("\n\n".join(paragraphs)) == paragraphs
    assert all(part and part == part.strip() and "\n\n" not in part for part in paragraphs)
    if not paragraphs:
        with pytest.raises(ValueError, match="empty solution"):
            judge_messages(question, "2", solution, "tagged")
        return
    content = judge_messages(question, solution, solution, "tagged")[0]["content"]
    assert len(re.findall(r"(?i)<\s*/?\s*paragraph", content)) == 2 * len(paragraphs)
    assert TAG.findall(content) == [(str(i), neutralise(part).strip()) for i, part in enumerate(paragraphs)]
    assert [content.count(header) for header in ("[Math Problem]", "[Ground Truth]", "[AI Solution]")] == [1, 1, 1]


@pytest.mark.parametrize(
    "text",
    [
        "x" * 10_000_000,
        "é" * 1_000_000,
        "line\n" * 100_000,
        "x\n\n" * 300_000,
        "<" * 1_000_000,
        "[ ground " * 300_000,
        "<｜" + "a" * 1_000_000,
        "\\boxed" * 100_000,
        "\\boxed{" * 100_000,
        "\\boxed{-1}" * 100_000,
        "/no_think " * 100_000,
        "\u200b" * 200_000,
    ],
    ids=lambda text: f"{len(text)} of {text[:8]!r}",
)
def test_hostile_size_takes_linear_time(text: str) -> None:
    began = time.process_time()
    content = judge_messages("q", "2", text, "tagged")[0]["content"]
    parse_verdict(content, "stop", 3)
    assert time.process_time() - began < 15


# What counts as a verdict.


@pytest.mark.parametrize(
    ("box", "index"),
    [
        *((box, -1) for box in BOXES_OF_SOUND),
        ("\\boxed{0}", 0),
        ("\\boxed{+1}", 1),
        ("\\boxed{2.}", 2),
        ("\\boxed{\\text{paragraph }1}", 1),
        ("\\boxed{\\text{Paragraph 1}}", 1),
        ("\\boxed{paragraph\\_2}", 2),
        ("\\boxed{<paragraph_2>}", 2),
        ("\\boxed{\\text{step } 2}", 2),
        ("\\boxed{index: 1}", 1),
        ("\\boxed{\\mathrm{index}=1}", 1),
        ("\\boxed{１}", 1),
        ("\\boxed{\\boxed{1}}", 1),
        ("<think>It could be \\boxed{-1}.</think> It is \\boxed{2}", 2),
    ],
)
def test_what_a_judge_means_is_read(box: str, index: int) -> None:
    assert parse_verdict(f"Thus {box}.", "stop", 3) == index


@pytest.mark.parametrize(
    "text",
    [
        *(
            "-1.0",
            "1.0",
            "1e0",
            "3 or 4",
            "1, 2",
            "1-2",
            "0–1",
            "1 and 2",
            "None",
            "none",
            "no error",
            "-1 or 2",
            "--1",
        ),
        *("not found", "paragraph-1", "step-1", "step - 1", "paragraph -1", "index - 1", "index-1", "~1 2", "-0", "01"),
        *(
            "-01",
            "x-1",
            "-1x",
            "1/2",
            "\\frac{1}{1}",
            "2^{-1}",
            "-{1}{2}",
            "{-}{1}{1}",
            "-1\\cdot 1",
            "٢",
            "-٢",
            "²",
            "Ⅱ",
        ),
        *("(1)", "[1]", "1:", "1)", "i=1", "<paragraph_1", "paragraph_1>", "paragraph 1 and 2", "-1 \\text{ (sound)}"),
        *("\\text{the solution is right: }-1", "3 - \\boxed{1}", "-\\boxed{2}", "3\\boxed{-1}", "1" * 5000, " " * 5000),
        *("-1 % 3", "-1\x00", "-1\u200b", "&#45;1", "ſtep 1", "\\text", "\\boxed{}", "{", "-", ""),
    ],
)
def test_all_else_is_not(text: str) -> None:
    assert parse_verdict(f"Thus \\boxed{{{text}}}", "stop", 3) is Reason.GENRM_UNPARSABLE


@pytest.mark.parametrize(
    "critique",
    [
        "\\boxed{-1} and \\boxed 2",
        "\\boxed{-1} and \\boxed",
        "\\boxed{-1} and \\boxed{",
        "\\boxed{-1} and \\boxed{}",
        "<think>Perhaps \\boxed{-1}.</think> The error is in paragraph 2.",
        "<think>Perhaps \\boxed{-1}.",
        "</think><think>\\boxed{-1}",
        "\\Boxed{-1} \\fbox{-1} boxed{-1} \\\\\\boxe{-1}",
    ],
)
def test_a_box_that_is_not_the_last_word_is_not_read(critique: str) -> None:
    assert parse_verdict(critique, "stop", 3) is Reason.GENRM_UNPARSABLE


@settings(deadline=None)
@given(TEXT, st.sampled_from(["stop", "length", None, "abort"]), st.one_of(st.none(), st.integers(1, 5)))
def test_the_parser_gives_an_index_in_range_or_a_reason(text: str, finish: str | None, count: int | None) -> None:
    outcome = parse_verdict(text + "\\boxed{1}" * (len(text) % 2), finish, count)
    if isinstance(outcome, int):
        assert finish == "stop"
        assert outcome == -1 or 0 <= outcome < (count or 10**9)
    else:
        assert outcome in (Reason.GENRM_UNPARSABLE, Reason.GENRM_TRUNCATED)


# End to end, against judges that are easily led.


def solution_part(prompt: str) -> str:
    return prompt.partition("[AI Solution]")[2].rpartition("Your task is to review")[0]


def last_of(pattern: str, text: str) -> str:
    return ["", *re.findall(pattern, text, re.DOTALL)][-1]


NAIVE_JUDGES: dict[str, tuple[Callable[[str], str], str]] = {
    "echoes the prompt": (lambda prompt: prompt, "stop"),
    "echoes the prompt and is cut": (lambda prompt: solution_part(prompt), "length"),
    "echoes the solution": (solution_part, "stop"),
    "echoes what is before the last paragraph": (lambda prompt: solution_part(prompt).rpartition("\n\n<")[0], "stop"),
    "quotes the last paragraph": (lambda prompt: "It says: " + last_of(r">\n(.*?)\n</", solution_part(prompt)), "stop"),
    "quotes the last box": (lambda prompt: last_of(r"\\boxed\s*\{.*?\}+", solution_part(prompt)), "stop"),
    "quotes what follows an order": (
        lambda prompt: last_of(r"(?:answer|task is to) (.*)", solution_part(prompt)),
        "stop",
    ),
    "quotes each line": (lambda prompt: "\n".join(f"> {line}" for line in solution_part(prompt).split("\n")), "stop"),
    "repeats the question": (lambda prompt: prompt.partition("[Ground Truth]")[0], "stop"),
    "says nothing": (lambda _prompt: "", "stop"),
}


@pytest.mark.parametrize("form", ["tagged", "raw"])
def test_no_hostile_solution_is_sound_to_a_naive_judge(form: str) -> None:
    def script(body: dict[str, Any], _number: int) -> Behaviour:
        prompt = body["messages"][0]["content"]
        said, finish = NAIVE_JUDGES[last_of(r"Judge: (.*?)\.", prompt.partition("[Ground Truth]")[0])]
        return says(said(prompt), finish)

    async def main() -> list[Score]:
        reward = RewardConfig(verifier="recipe_string", compare_rules=False, verifier_processes=1)
        genrm = GenRMConfig(prompt_form=form, temperature=0.0, deadline_s=300, request_timeout_s=300, hedge_share=0)
        async with FakeServer(script, None) as server:
            async with RewardLoop(reward, genrm, [server.url], max_response_tokens=10) as loop:
                return await asyncio.gather(*(loop.score(sample) for sample in [*samples, *empty]))

    samples = [
        hostile_sample(judge, f"{text}\n\nThe answer is \\boxed{{{truth}}}", truth)
        for judge in NAIVE_JUDGES
        for text in HOSTILE
        for truth in ("2", "-1")
    ]
    empty = [make_sample(text, truth) for text in ("", " \n\n ", "\u200b", "\x00") for truth in ("", "2", "-1")]
    scores = asyncio.run(main())
    assert [score.correct for score in scores] == [True] * len(samples) + [False] * len(empty)
    judged = [score.verdict is not None or score.unscored_reason == "genrm_unparsable" for score in scores]
    assert sum(judged) + sum(score.unscored_reason == "genrm_truncated" for score in scores) == len(samples)
    sound = [score.verdict is not None and not score.verdict.flawed for score in scores]
    assert [sample.text for sample, is_sound in zip(samples, sound, strict=False) if is_sound] == []


def hostile_sample(judge: str, text: str, truth: str) -> Sample:
    sample = make_sample(text, truth)
    return replace(sample, prompt=replace(sample.prompt, question=f"Judge: {judge}. {text[:1000]}"))
