"""`data`: which prompts are trained on and evaluated."""

from __future__ import annotations

from pydantic import Field

from megatron_fapo.config.section import Section


class DataConfig(Section):
    train: list[str] = []
    """Prompt datasets (JSONL or parquet in the recipe's row schema), read as one, in this order."""
    eval: dict[str, str] = {}
    """Evaluation datasets: name in the metrics -> path. Empty: no evaluation."""
    question_key: str | None = None
    """For plain rows such as GSM8K's: the column with the question. Unset: rows follow the recipe's schema."""
    answer_key: str | None = None
    """For plain rows: the column with the answer; the text after `####`, if there is one, is the ground truth."""
    instruction: str = "Please reason step by step, and put your final answer within \\boxed{}."
    """Appended to each plain question after a blank line."""
    max_prompt_tokens: int = Field(2048, gt=0)
    """Longest tokenised prompt. Longer rows are refused with their line numbers, or left out: see overlong_prompts."""
    overlong_prompts: str = Field("drop", pattern="^(drop|error)$")
    """`drop` leaves out prompts over max_prompt_tokens and reports how many; `error` refuses the dataset."""
    bad_rows: str = Field("error", pattern="^(error|skip)$")
    """Malformed rows: `error` refuses the dataset and lists them; `skip` leaves them out, counted and listed in the
    log."""
    merge_repeats: bool = False
    """Leave out rows that are an earlier row over again (data_source, index, prompt and ground truth). For the recipe's
    repeated files: read each question once, and repeat it with rollout.samples_per_prompt or
    training.evaluation.samples_per_prompt."""
    shuffle: bool = True
    """A new permutation of the prompts in each epoch, from `seed`."""
    eval_limit: int | None = Field(None, gt=0)
    """Use only the first so many rows of each evaluation set."""
