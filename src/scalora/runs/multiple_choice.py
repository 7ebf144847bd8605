"""``multiple_choice``: the share of examples whose correct choice a model finds likeliest, by the rules of lm_eval.

Its rules, checked with lm_eval 0.4.13: `TemplateLM._encode_pair` and `loglikelihood` for the tokens,
`HFLM._loglikelihood_tokens` for what is too long, `ConfigurableTask.process_results` for ``acc`` and ``acc_norm``.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from itertools import takewhile
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from scalora.runs.errors import InputError
from scalora.runs.formats import require_columns
from scalora.runs.kept import Kept
from scalora.runs.model_limits import positions
from scalora.runs.prompts import (
    Prompt,
    chat_text,
    equal_length_batches,
    template_options,
    text_tokens,
    use_training_tokens,
)
from scalora.runs.settings import Settings
from scalora.runs.track import share, track
from scalora.saving.errors import short_repr

_SHOWN = 60  # characters of an example's value that an error shows

Encoded = tuple[tuple[int, ...], tuple[int, ...]]
"""The tokens of a context, and those of what is scored after it."""


@dataclass(frozen=True)
class _Question:
    prompt: Prompt
    options: dict[str, Any]
    choices: list[str]
    answer: int


def multiple_choice_score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Dataset,
    name: str,
    settings: Settings,
    kept: Kept | None = None,
) -> dict[str, float]:
    """Share of examples whose correct choice has the highest log-likelihood after the prompt.

    Where several choices share the highest one, the first of them counts as the model's.

    Args:
        model: the causal language model.
        tokenizer: the model's tokenizer.
        examples: the examples, with the columns ``prompt`` (text or messages), ``choices`` (texts, or a dict of them as
            ``text`` with their names as ``label``), and ``answer`` (place from 0, text or label of the correct choice).
        name: name of the data, for error messages.
        settings: the config, of which ``evaluate.batch_size`` and the tokens of ``training`` matter.
        kept: where log-likelihoods are kept, and the outputs for each example. None: nowhere.

    Returns:
        ``"multiple_choice"`` and ``"acc"``, which are the same; ``"acc_norm"``, by log-likelihoods divided by the
        choices' numbers of characters; and, of the examples that these count, the numbers of those where choices share
        the highest log-likelihood (``"multiple_choice_ties"``) and where only the end of the prompt fits the model's
        positions (``"multiple_choice_shortened"``).

    Raises:
        InputError: an example can't be used.
    """
    kept = kept or Kept()
    require_columns(examples, name, ["prompt", "choices", "answer"])
    use_training_tokens(model, tokenizer, settings.training)
    questions = [_question(row, f"data {name!r}, row {number:,}") for number, row in enumerate(examples, start=1)]
    _warn_about_missing_spaces(questions, name)
    longest = positions(model).tokens
    encoded, shortened = [], 0
    for number, question in enumerate(questions, start=1):
        where = f"data {name!r}, row {number:,}"
        pairs = _encoded_choices(tokenizer, question, where)
        fitting = pairs if longest is None else [_end_of_context(pair, longest, where) for pair in pairs]
        shortened += fitting != pairs
        encoded.append(fitting)
    if shortened:
        warnings.warn(
            f"data {name!r}: multiple_choice uses only the end of {shortened:,} prompts, since the model has "
            f"{longest:,} positions",
            stacklevel=2,
        )
    likelihoods = _log_likelihoods(
        model, sorted({pair for pairs in encoded for pair in pairs}), settings.evaluate.batch_size, kept
    )
    rows: list[dict[str, Any]] = []
    ties = 0
    for number, (question, pairs) in enumerate(zip(questions, encoded, strict=True), start=1):
        found = [likelihoods[pair] for pair in pairs]
        if any(map(math.isnan, found)):
            raise InputError(f"data {name!r}, row {number:,}: the model's log-likelihoods are not numbers (NaN)")
        each = [value / len(choice) for value, choice in zip(found, question.choices, strict=True)]
        choice, by_length = found.index(max(found)), each.index(max(each))
        ties += found.count(max(found)) > 1
        rows.append(
            {
                "row": number,
                "prompt": question.prompt,
                "choices": question.choices,
                "log_likelihoods": found,
                "choice": choice,
                "choice_norm": by_length,
                "answer": question.answer,
                "right": choice == question.answer,
                "right_norm": by_length == question.answer,
            }
        )
    kept.write("multiple_choice", rows)
    acc, acc_norm = (sum(row[right] for row in rows) / len(rows) for right in ("right", "right_norm"))
    return {
        "multiple_choice": acc,
        "acc": acc,
        "acc_norm": acc_norm,
        "multiple_choice_ties": ties,
        "multiple_choice_shortened": shortened,
    }


def _question(row: dict[str, Any], where: str) -> _Question:
    prompt: Any = row["prompt"]
    choices: Any = row["choices"]
    labels: Any = None
    if not isinstance(prompt, (str, list)):
        raise InputError(f"{where}: the prompt is {short_repr(prompt, _SHOWN)}, not a text or a list of messages")
    if isinstance(choices, dict):
        choices, labels = choices.get("text"), choices.get("label")
    for what, values in (("choices", choices), ("labels of the choices", labels)):
        if values is not None and not (isinstance(values, list) and all(isinstance(v, str) and v for v in values)):
            raise InputError(
                f"{where}: the {what} are {short_repr(values, _SHOWN)}, not texts of at least one character"
            )
    if not choices or len(choices) < 2:
        raise InputError(f"{where}: the choices are {short_repr(choices, _SHOWN)}; there must be at least two")
    if labels is not None and len(labels) != len(choices):
        raise InputError(f"{where}: there are {len(choices)} choices and {len(labels)} labels")
    places = _places(row["answer"], choices, labels)
    if len(places) != 1:
        said = "fits several of" if places else "is neither the place (from 0) nor the text nor the label of one of"
        raise InputError(
            f"{where}: the answer {short_repr(row['answer'], _SHOWN)} {said} the {len(choices)} choices "
            f"{short_repr(choices, _SHOWN)}"
        )
    return _Question(prompt, template_options(row), choices, places.pop())


def _places(answer: Any, choices: list[str], labels: list[str] | None) -> set[int]:
    """The places of the choices that an answer may mean."""
    if isinstance(answer, float) and answer.is_integer():  # as a column of integers with a gap is read
        answer = int(answer)
    everywhere = set(range(len(choices)))
    if isinstance(answer, int) and not isinstance(answer, bool):
        return ({answer} & everywhere) | _equal(str(answer), labels or [])
    if not isinstance(answer, str):
        return set()
    return _equal(answer, labels or []) or _equal(answer, choices)


def _equal(text: str, candidates: list[str]) -> set[int]:
    return {place for place, candidate in enumerate(candidates) if candidate == text}


def _warn_about_missing_spaces(questions: list[_Question], name: str) -> None:
    """A prompt and a choice are joined as they are: where a word of one touches a word of the other, say so."""
    touching = [
        (question.prompt, choice)
        for question in questions
        if isinstance(question.prompt, str)
        for choice in question.choices
        if re.search(r"[A-Za-z0-9.,:;?!]$", question.prompt) and re.match(r"[A-Za-z0-9]", choice)
    ]
    if touching:
        prompt, choice = touching[0]
        warnings.warn(
            f"data {name!r}: {len(touching):,} choices touch their prompt without a space, the first as "
            f"{(prompt[-10:] + choice)[:40]!r}: write one at the end of the prompt or before the choice if one belongs "
            "there",
            stacklevel=3,
        )


def _encoded_choices(tokenizer: PreTrainedTokenizerBase, question: _Question, where: str) -> list[Encoded]:
    def bare(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    encode: Callable[[str], list[int]]
    context, encode = question.prompt, partial(text_tokens, tokenizer)
    if not isinstance(context, str):
        context, encode = (
            chat_text(tokenizer, context, question.options, where),
            bare,
        )  # the template writes the special tokens itself
    first = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None][:1]
    pairs = [_encoded_pair(context, choice, encode, bare, first) for choice in question.choices]
    for (before, after), choice in zip(pairs, question.choices, strict=True):
        if not before:
            raise InputError(f"{where}: the prompt has no tokens, and the tokenizer has no token to begin a text with")
        if not after:
            raise InputError(f"{where}: the choice {short_repr(choice, _SHOWN)} has no tokens")
    return pairs


def _encoded_pair(
    context: str,
    choice: str,
    encode: Callable[[str], list[int]],
    bare: Callable[[str], list[int]],
    first: list[int],
) -> Encoded:
    """The tokens before a choice and those of the choice.

    White space at the end of the context goes with the choice, and the choice is what the whole has beyond the length
    of the context. Where that is nothing, because the choice merges with the end of the context, it is what differs.

    Args:
        context: what stands before the choice.
        choice: the choice.
        encode: tokenises a text with the special tokens at its beginning.
        bare: tokenises a text without special tokens.
        first: the token to begin with where nothing stands before the choice.
    """
    kept = context.rstrip()
    choice, context = context[len(kept) :] + choice, kept
    given = encode(context) if context else []
    if not given:
        whole = bare(choice)
        skip = 1 if len(whole) > 1 and whole[:1] == first else 0
        return tuple(whole[:skip] or first), tuple(whole[skip:])
    whole = encode(context + choice)
    if len(whole) > len(given):
        return tuple(given), tuple(whole[len(given) :])
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(given, whole, strict=False)))
    same = min(same, len(whole) - 1)
    return tuple(whole[:same] or first), tuple(whole[same:])


def _end_of_context(pair: Encoded, longest: int, where: str) -> Encoded:
    """What fits a model's positions, which the last token of the choice needs no more."""
    before, after = pair
    if len(after) > longest:
        raise InputError(f"{where}: a choice has {len(after):,} tokens, and the model {longest:,} positions")
    return before[-(longest + 1 - len(after)) :], after


@torch.no_grad()
def _log_likelihoods(model: PreTrainedModel, pairs: list[Encoded], batch_size: int, kept: Kept) -> dict[Encoded, float]:
    model.eval()
    given = [(*before, *after)[:-1] for before, after in pairs]
    keys = [sha256(str(pair).encode()).hexdigest() for pair in pairs]
    batches = equal_length_batches([len(ids) for ids in given], batch_size)
    # Whole batches are done, by one process each, and done again: a figure is then always that of the same batch.
    missing = [batch for batch in batches if not all(keys[place] in kept for place in batch)]
    for batch in track(share(missing), "multiple choice"):
        ids = torch.tensor([given[place] for place in batch], device=model.device)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        found = {}
        for place, row in zip(batch, logits, strict=True):
            after = torch.tensor(pairs[place][1], device=row.device)
            each = row[-len(after) :].float().log_softmax(-1).gather(-1, after[:, None])
            found[keys[place]] = float(each.sum())
        kept.add(found)
    kept.exchange()
    return {pair: kept[key] for pair, key in zip(pairs, keys, strict=True)}
