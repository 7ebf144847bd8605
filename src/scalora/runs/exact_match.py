"""``exact_match``: the share of prompts that a model answers, on its own, exactly as expected."""

from __future__ import annotations

import re
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from scalora.runs.answers import answered
from scalora.runs.errors import InputError
from scalora.runs.kept import Kept
from scalora.runs.settings import Settings
from scalora.saving.errors import short_repr

_SHOWN = 60  # characters of an example's value that an error shows


def exact_match_score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Dataset,
    name: str,
    settings: Settings,
    kept: Kept | None = None,
) -> dict[str, float]:
    """Share of greedily generated answers that equal the expected ones.

    Both are compared without special tokens and without white space at the ends, or, with an ``answer_pattern``, by
    what it finds in them: its first group if it has one, else the whole match, in each case the first in the text.

    Args:
        model: the causal language model.
        tokenizer: the model's tokenizer.
        examples: the examples: ``prompt`` and ``completion``, or ``messages`` of which the last is the expected answer.
        name: name of the data, for error messages.
        settings: the config, of which ``evaluate`` and the tokens of ``training`` matter.
        kept: where answers are kept, and the outputs for each example. None: nowhere.

    Returns:
        ``"exact_match"``, and numbers of examples: ``"exact_match_left_out"`` (no prompt or no expected answer), which
        the score does not count; and, among those counted, ``"exact_match_shortened"`` (prompts of which only the end
        fits), ``"exact_match_unfinished"`` (answers that reached ``max_new_tokens``) and ``"exact_match_unmatched"``
        (answers in which ``answer_pattern`` found nothing, which are wrong).

    Raises:
        InputError: an expected answer can't be used, or no example can.
    """
    kept = kept or Kept()
    pattern = settings.evaluate.answer_pattern

    def check(answer: str, where: str) -> None:
        if _extracted(answer, pattern) is None:
            raise InputError(
                f"{where}: evaluate.answer_pattern={pattern!r} finds no answer in the expected answer "
                f"{short_repr(answer, _SHOWN)}"
            )

    given = answered(model, tokenizer, examples, name, settings, "exact_match", kept, check)
    rows: list[dict[str, Any]] = [
        {
            "row": question.row,
            "prompt": question.prompt,
            "answer": text,
            "expected": question.expected,
            "found": (found := _extracted(text, pattern)),
            "right": found == _extracted(question.expected, pattern),
            "finished": finished,
        }
        for question, text, finished in zip(given.questions, given.texts, given.finished, strict=True)
    ]
    kept.write("exact_match", rows)
    return {
        "exact_match": sum(row["right"] for row in rows) / len(rows),
        **given.counts("exact_match"),
        "exact_match_unmatched": sum(row["found"] is None for row in rows),
    }


def _extracted(text: str, pattern: str | None) -> str | None:
    if pattern is None:
        return text.strip()
    match = re.search(pattern, text)
    if match is None:
        return None
    found = match.group(1) if match.re.groups else match.group(0)
    return None if found is None else str(found).strip()
