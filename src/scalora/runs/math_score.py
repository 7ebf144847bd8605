"""``math``: the share of prompts whose final answer a model gets right, as mathematics and not as text.

Final answers are found by the marks of GSM8K, MetaMathQA and MATH; whether two are equal is math-verify's judgement.
"""

from __future__ import annotations

import importlib.util
import re
import threading
import warnings
from collections.abc import Callable
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from scalora.runs.answers import answered
from scalora.runs.errors import InputError
from scalora.runs.kept import Kept
from scalora.runs.settings import Settings
from scalora.runs.track import track

SECONDS = 5
"""Longest time for reading an answer, and for comparing two: math-verify's own default."""

_NUMBER = r"[-+]?\$?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d))(?:\s*/\s*\d+)?"

# GSM8K: a number alone on the rest of the line. Else headings of Markdown would be answers.
_OF_GSM8K = re.compile(rf"####[ \t]*({_NUMBER})[ \t]*%?\.?[ \t]*$", re.MULTILINE)

# Without the colon only where an answer follows at once: not in "the answer is easy to find".
_OF_METAMATH = re.compile(r"the (?:final )?answer is(?::|(?=[ \t]+[-+$\\\d({\[]))[ \t]*(\S[^\n]*)", re.IGNORECASE)

_SENTENCE = re.compile(r"\.(?:\s|$)")

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")

_LAST_NUMBER = re.compile(rf"(?<![\w.]){_NUMBER}")


def math_score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Dataset,
    name: str,
    settings: Settings,
    kept: Kept | None = None,
) -> dict[str, float]:
    """Share of greedily generated answers whose final answer equals that of the expected one.

    Args:
        model: the causal language model.
        tokenizer: the model's tokenizer.
        examples: the examples: ``prompt`` and ``completion``, or ``messages`` of which the last is the expected answer.
        name: name of the data, for messages.
        settings: the config, of which ``evaluate`` and the tokens of ``training`` matter.
        kept: where answers are kept, and the outputs for each example. None: nowhere.

    Returns:
        ``"math"``, and numbers of examples: ``"math_left_out"``, ``"math_shortened"`` and ``"math_unfinished"`` as for
        exact_match; ``"math_unmatched"``, answers without a final answer, and ``"math_timed_out"``, comparisons that
        took longer than `SECONDS`, all of which are wrong.

    Raises:
        InputError: math-verify is not installed, an expected answer can't be used, or no example can.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise InputError("evaluate.metrics: math needs math-verify: pip install 'scalora[math]'")
    kept = kept or Kept()

    def check(answer: str, where: str) -> None:
        if not expected_answer(answer):
            raise InputError(f"{where}: the expected answer has nothing after its mark of a final answer")

    given = answered(model, tokenizer, examples, name, settings, "math", kept, check)
    rows: list[dict[str, Any]] = []
    timed_out = 0
    asked = zip(given.questions, given.texts, given.finished, strict=True)
    for question, text, finished in track(asked, "comparing", total=len(given.questions)):
        found, expected = final_answer(text), expected_answer(question.expected)
        right = None if found is None else same_answer(found, expected)
        timed_out += found is not None and right is None
        rows.append(
            {
                "row": question.row,
                "prompt": question.prompt,
                "answer": text,
                "expected": question.expected,
                "found": found,
                "wanted": expected,
                "right": bool(right),
                "finished": finished,
            }
        )
    if timed_out:
        warnings.warn(
            f"data {name!r}: {timed_out:,} answers count as wrong for math, because comparing them took longer than "
            f"{SECONDS} s",
            stacklevel=2,
        )
    kept.write("math", rows)
    return {
        "math": sum(row["right"] for row in rows) / len(rows),
        **given.counts("math"),
        "math_unmatched": sum(row["found"] is None for row in rows),
        "math_timed_out": timed_out,
    }


def final_answer(text: str) -> str | None:
    r"""The final answer that a text gives.

    The first of these that it has: a number on its own after ``####`` (the first one, as GSM8K is scored); what follows
    ``The answer is:`` (the last one, as MetaMathQA's authors score, without the full stop); the content of the last
    ``\boxed{…}`` (as MATH is scored); the last number.

    Args:
        text: the text.

    Returns:
        The answer as it is written; None if there is none.
    """
    if (marked := _marked(text)) is not None:
        return marked
    numbers = [number for number in _LAST_NUMBER.findall(text) if number]
    return str(numbers[-1]) if numbers else None


def expected_answer(text: str) -> str:
    """The final answer of an expected text: after one of the marks of `final_answer`, or else all of it.

    Args:
        text: the text.
    """
    marked = _marked(text)
    return _trimmed(text) if marked is None else marked


def _marked(text: str) -> str | None:
    if found := _OF_GSM8K.search(text):
        return found[1]
    if said := _OF_METAMATH.findall(text):
        answer = _trimmed(_SENTENCE.split(said[-1])[0])
        return _boxed(answer) or answer
    return _boxed(text)


def _boxed(text: str) -> str | None:
    """The content of the last box whose braces are closed."""
    for box in reversed(list(_BOX.finditer(text))):
        depth = 1
        for place in range(box.end(), len(text)):
            depth += (text[place] == "{") - (text[place] == "}")
            if not depth:
                return _trimmed(text[box.end() : place])
    return None


def _trimmed(text: str) -> str:
    r"""A text without the full stop, and the ``$`` or ``\(…\)`` around it."""
    text = text.strip().rstrip(".").strip()
    for before, after in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        inside = text[len(before) : len(text) - len(after)]
        if (
            len(text) > len(before + after)
            and text.startswith(before)
            and text.endswith(after)
            and before not in inside
        ):
            return inside.strip().rstrip(".").strip()
    return text


def same_answer(found: str, expected: str) -> bool | None:
    """Whether two answers are the same, as texts or, by math-verify, as mathematics.

    Args:
        found: the answer of the model.
        expected: the right one.

    Returns:
        None if reading one of them or comparing them took longer than `SECONDS`.

    Raises:
        RuntimeError: it is called in a thread, where math-verify can't measure time.
    """
    if found == expected:
        return True
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("math-verify limits its time by a signal, which only the main thread gets")
    from math_verify import parse, verify
    from math_verify.errors import TimeoutException

    try:
        gold, given = (_read(text, parse) for text in (expected, found))
        try:
            return bool(verify(gold, given, timeout_seconds=SECONDS, raise_on_error=True))
        except Exception:  # whatever SymPy raises about what it can't compare; as texts they may still be equal
            return bool(verify(gold, given, timeout_seconds=SECONDS))
    except TimeoutException:
        return None


def _read(text: str, parse: Callable[..., list[Any]]) -> list[Any]:
    """An answer as SymPy and as a text; as a text alone, where SymPy can't read it."""
    try:
        return parse(rf"\boxed{{{text}}}", parsing_timeout=SECONDS, raise_on_error=True)  # all of a box is the answer
    except Exception:  # whatever SymPy and the parser raise
        return [text]
