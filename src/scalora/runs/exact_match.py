"""``exact_match``: the share of prompts that a model answers, on its own, exactly as expected."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from scalora.runs.errors import InputError
from scalora.runs.formats import require_columns
from scalora.runs.model_limits import positions, require_known_tokens
from scalora.runs.prompts import Prompt, equal_length_batches, prompt_tokens, template_options, use_training_tokens
from scalora.runs.sections import EvaluateSettings
from scalora.runs.settings import Settings
from scalora.runs.track import of_all, share, track
from scalora.saving.errors import short_repr

_SHOWN = 60  # characters of an example's value that an error shows

# Whatever the model's generation config says, an answer is the greedy one, and only max_new_tokens and the model's end
# tokens limit it. What draws at random, searches among several answers, or goes by the clock is switched off.
_GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "num_beam_groups": None,
    "num_return_sequences": 1,
    "constraints": None,
    "force_words_ids": None,
    "penalty_alpha": None,
    "dola_layers": None,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
    "use_mtp": None,
    "token_healing": False,  # it replaces the end of the prompt
    "max_length": None,
    "max_time": None,
    "return_dict_in_generate": False,
}

# Settings of a generation config that change what a greedy answer says, with the values that change nothing. They are
# part of the model as its author published it, and `generate` applies them for everybody who uses the model.
_HONOURED: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (None, 1.0),
    "encoder_repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None, []),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "sequence_bias": (None, {}),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": (None,),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "guidance_scale": (None, 1.0),
    "watermarking_config": (None,),
    "stop_strings": (None, []),
}


@dataclass(frozen=True)
class _Question:
    """What is asked, and the expected answer."""

    prompt: list[int]
    answer: str


def exact_match_score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Dataset, name: str, settings: Settings
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

    Returns:
        ``"exact_match"``, and numbers of examples: ``"exact_match_left_out"`` (no prompt or no expected answer), which
        the score does not count; and, among those counted, ``"exact_match_shortened"`` (prompts of which only the end
        fits), ``"exact_match_unfinished"`` (answers that reached ``max_new_tokens``) and ``"exact_match_unmatched"``
        (answers in which ``answer_pattern`` found nothing, which are wrong).

    Raises:
        InputError: an expected answer can't be used, or no example can.
    """
    use_training_tokens(model, tokenizer, settings.training)
    pattern = settings.evaluate.answer_pattern
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    ends = [str(tokenizer.decode([token])) for token in _end_tokens(model, tokenizer)]
    questions, left_out = _questions(examples, name, tokenizer, pattern, special, ends)
    room = _room(model, settings.evaluate)
    prompts = [question.prompt if room is None else question.prompt[-room:] for question in questions]
    shortened = sum(len(kept) < len(q.prompt) for kept, q in zip(prompts, questions, strict=True))
    _warn(name, left_out, shortened, room)
    require_known_tokens(Dataset.from_dict({"input_ids": prompts}), name, tokenizer, model)
    answers, unfinished = _generated(model, tokenizer, prompts, settings.evaluate)
    found = [_extracted(answer, pattern) for answer in answers]
    expected = [_extracted(question.answer, pattern) for question in questions]
    return {
        "exact_match": sum(a == b for a, b in zip(found, expected, strict=True)) / len(questions),
        "exact_match_left_out": left_out.total(),
        "exact_match_shortened": shortened,
        "exact_match_unfinished": unfinished,
        "exact_match_unmatched": found.count(None),
    }


def _questions(
    examples: Dataset,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    pattern: str | None,
    special: list[str],
    ends: list[str],
) -> tuple[list[_Question], Counter[str]]:
    """The questions that can be asked, and why how many others can't be."""
    if "messages" not in examples.column_names:
        require_columns(examples, name, ["prompt", "completion"])
    questions, left_out = [], Counter[str]()
    for number, row in enumerate(examples, start=1):
        where = f"data {name!r}, row {number:,}"
        prompt, answer = _prompt_and_answer(row, where)
        if answer is None or not (answer := _decoded(answer, special, ends)).strip():
            left_out["expected answer"] += 1
        elif not prompt or not (tokens := prompt_tokens(tokenizer, prompt, template_options(row), where)):
            left_out["prompt"] += 1
        elif _extracted(answer, pattern) is None:
            raise InputError(
                f"{where}: evaluate.answer_pattern={pattern!r} finds no answer in the expected answer "
                f"{short_repr(answer, _SHOWN)}"
            )
        else:
            questions.append(_Question(tokens, answer))
    if not questions:
        raise InputError(
            f"data {name!r}: exact_match has nothing to score: no example has a prompt and an expected answer"
        )
    return questions, left_out


def _prompt_and_answer(row: dict[str, Any], where: str) -> tuple[Prompt | None, str | None]:
    """What is asked, and the expected answer; None where the example has none."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if "messages" in row:
        messages = row["messages"] or []
        asked = not messages or messages[-1].get("role") != "assistant"
        prompt, completion = (messages, []) if asked else (messages[:-1], messages[-1:])
    if isinstance(completion, list):
        if len(completion) > 1:
            raise InputError(
                f"{where}: the completion has {len(completion)} messages; exact_match needs a single answer"
            )
        completion = completion[0].get("content") if completion else None
    for column, value in (("prompt", prompt), ("expected answer", completion)):
        if value is not None and not isinstance(value, str if column != "prompt" else (str, list)):
            raise InputError(f"{where}: the {column} is {short_repr(value, _SHOWN)}, not a text")
    return prompt, completion


def _decoded(text: str, special: list[str], ends: list[str]) -> str:
    """A text as it would be decoded from a generated answer: without an end token, and without special tokens."""
    for end in ends:
        text = text.removesuffix(end)
    for token in special:
        text = text.replace(token, "")
    return text


def _room(model: PreTrainedModel, settings: EvaluateSettings) -> int | None:
    """Tokens that the model has for a prompt; None without a limit."""
    longest = positions(model).tokens
    if longest is None:
        return None
    if settings.max_new_tokens >= longest:
        raise InputError(
            f"evaluate.max_new_tokens={settings.max_new_tokens} leaves no room for a prompt: the model has {longest} "
            "positions for both; set it to less"
        )
    return longest - settings.max_new_tokens


def _warn(name: str, left_out: Counter[str], shortened: int, room: int | None) -> None:
    for what, count in left_out.items():
        warnings.warn(f"data {name!r}: exact_match leaves out {count:,} examples without {what}", stacklevel=3)
    if shortened:
        warnings.warn(
            f"data {name!r}: exact_match uses only the last {room:,} tokens of {shortened:,} prompts, since the "
            "model's positions hold no more besides evaluate.max_new_tokens",
            stacklevel=3,
        )


@torch.no_grad()
def _generated(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], settings: EvaluateSettings
) -> tuple[list[str], int]:
    """The model's greedy answers, and how many of them reached the maximum length without an end."""
    model.eval()
    own = model.generation_config
    if changed := [
        f"{key}={getattr(own, key)}" for key, none in _HONOURED.items() if getattr(own, key, None) not in none
    ]:
        warnings.warn(f"exact_match generates with the model's own {', '.join(changed)}", stacklevel=3)
    ends = _end_tokens(model, tokenizer)
    stops = [own.stop_strings] if isinstance(own.stop_strings, str) else own.stop_strings or []
    greedy = {key: value for key, value in _GREEDY.items() if hasattr(own, key)}  # versions have different ones
    answered: list[tuple[int, str, bool]] = []  # place, text, whether it has come to an end
    batches = equal_length_batches([len(prompt) for prompt in prompts], settings.batch_size)
    for batch in track(share(batches), "generating"):  # whole ones, so that an answer is that of one process
        given = torch.tensor([prompts[place] for place in batch], device=model.device)
        output = model.generate(
            input_ids=given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=settings.max_new_tokens,
            eos_token_id=ends or None,
            pad_token_id=next((t for t in (tokenizer.pad_token_id, *ends) if t is not None), None),
            tokenizer=tokenizer,
            **greedy,
        )
        for place, tokens in zip(batch, output[:, given.shape[1] :].tolist(), strict=True):
            end = next((index for index, token in enumerate(tokens) if token in ends), None)
            text = str(tokenizer.decode(tokens[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False))
            stopped = end is not None
            for stop in stops:
                text, found, _ = text.partition(stop)
                stopped |= bool(found)
            answered.append((place, text, stopped))
    answered = sorted(of_all(answered))
    return [text for _, text, _ in answered], sum(not stopped for _, _, stopped in answered)


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: those of the model's generation config, and the one that training puts at ends."""
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    return list(dict.fromkeys(token for token in (*own, tokenizer.eos_token_id) if token is not None))


def _extracted(text: str, pattern: str | None) -> str | None:
    if pattern is None:
        return text.strip()
    match = re.search(pattern, text)
    if match is None:
        return None
    found = match.group(1) if match.re.groups else match.group(0)
    return None if found is None else str(found).strip()
