"""`answered`: a model's own greedy answers to the prompts of examples, for the scores that compare them."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from scalora.runs.errors import InputError
from scalora.runs.formats import require_columns
from scalora.runs.kept import Kept
from scalora.runs.model_limits import positions, require_known_tokens
from scalora.runs.prompts import Prompt, equal_length_batches, prompt_tokens, template_options, use_training_tokens
from scalora.runs.sections import EvaluateSettings
from scalora.runs.settings import Settings
from scalora.runs.track import share, track
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
class Question:
    """What is asked, and the expected answer.

    Attributes:
        row: number of the example, from 1.
        prompt: what is asked, as the example has it.
        tokens: the tokens of the prompt.
        expected: the expected answer, as it would be decoded if the model generated it.
    """

    row: int
    prompt: Prompt
    tokens: list[int]
    expected: str


@dataclass(frozen=True)
class Answered:
    """Questions and a model's answers.

    Attributes:
        questions: the questions that can be asked.
        texts: the answer to each, without special tokens.
        finished: whether each came to an end within ``evaluate.max_new_tokens``.
        left_out: number of examples that can't be asked.
        shortened: number of prompts of which only the end fits the model's positions.
    """

    questions: list[Question]
    texts: list[str]
    finished: list[bool]
    left_out: int
    shortened: int

    def counts(self, metric: str) -> dict[str, int]:
        """The numbers of examples that were left out, shortened and not finished, by the names of a score.

        Args:
            metric: name of the score.
        """
        return {
            f"{metric}_left_out": self.left_out,
            f"{metric}_shortened": self.shortened,
            f"{metric}_unfinished": self.finished.count(False),
        }


def answered(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Dataset,
    name: str,
    settings: Settings,
    metric: str,
    kept: Kept,
    check: Callable[[str, str], object],
) -> Answered:
    """Have a model answer the prompts of examples.

    Args:
        model: the causal language model.
        tokenizer: the model's tokenizer.
        examples: the examples: ``prompt`` and ``completion``, or ``messages`` of which the last is the expected answer.
        name: name of the data, for messages.
        settings: the config, of which ``evaluate`` and the tokens of ``training`` matter.
        metric: the score that needs the answers, for messages.
        kept: the answers that there are already, and where new ones are kept.
        check: called with each expected answer and the name of its row, before any question is asked: raises an error
            if the answer is of no use.

    Raises:
        InputError: an example can't be used, or none can.
    """
    use_training_tokens(model, tokenizer, settings.training)
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    ends = [str(tokenizer.decode([token])) for token in _end_tokens(model, tokenizer)]
    questions, left_out = _questions(examples, name, tokenizer, metric, check, special, ends)
    room = _room(model, settings.evaluate)
    prompts = [question.tokens if room is None else question.tokens[-room:] for question in questions]
    shortened = sum(len(used) < len(q.tokens) for used, q in zip(prompts, questions, strict=True))
    _warn(name, metric, left_out, shortened, room)
    require_known_tokens(Dataset.from_dict({"input_ids": prompts}), name, tokenizer, model)
    found = _generated(model, tokenizer, prompts, settings.evaluate, metric, kept)
    return Answered(questions, [text for text, _ in found], [end for _, end in found], left_out.total(), shortened)


def _questions(
    examples: Dataset,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    metric: str,
    check: Callable[[str, str], object],
    special: list[str],
    ends: list[str],
) -> tuple[list[Question], Counter[str]]:
    """The questions that can be asked, and why how many others can't be."""
    if "messages" not in examples.column_names:
        require_columns(examples, name, ["prompt", "completion"])
    questions, left_out = [], Counter[str]()
    for number, row in enumerate(examples, start=1):
        where = f"data {name!r}, row {number:,}"
        prompt, answer = _prompt_and_answer(row, where, metric)
        if answer is None or not (answer := _decoded(answer, special, ends)).strip():
            left_out["expected answer"] += 1
        elif not prompt or not (tokens := prompt_tokens(tokenizer, prompt, template_options(row), where)):
            left_out["prompt"] += 1
        else:
            check(answer, where)
            questions.append(Question(number, prompt, tokens, answer))
    if not questions:
        raise InputError(
            f"data {name!r}: {metric} has nothing to score: no example has a prompt and an expected answer"
        )
    return questions, left_out


def _prompt_and_answer(row: dict[str, Any], where: str, metric: str) -> tuple[Prompt | None, str | None]:
    """What is asked, and the expected answer; None where the example has none."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if "messages" in row:
        messages = row["messages"] or []
        asked = not messages or messages[-1].get("role") != "assistant"
        prompt, completion = (messages, []) if asked else (messages[:-1], messages[-1:])
    if isinstance(completion, list):
        if len(completion) > 1:
            raise InputError(f"{where}: the completion has {len(completion)} messages; {metric} needs a single answer")
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


def _warn(name: str, metric: str, left_out: Counter[str], shortened: int, room: int | None) -> None:
    for what, count in left_out.items():
        warnings.warn(f"data {name!r}: {metric} leaves out {count:,} examples without {what}", stacklevel=4)
    if shortened:
        warnings.warn(
            f"data {name!r}: {metric} uses only the last {room:,} tokens of {shortened:,} prompts, since the "
            "model's positions hold no more besides evaluate.max_new_tokens",
            stacklevel=4,
        )


@torch.no_grad()
def _generated(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    settings: EvaluateSettings,
    metric: str,
    kept: Kept,
) -> list[tuple[str, bool]]:
    """The model's greedy answers, and whether each came to an end before it had the maximum length."""
    model.eval()
    own = model.generation_config
    honoured = {key: getattr(own, key) for key, none in _HONOURED.items() if getattr(own, key, None) not in none}
    if honoured:
        changed = ", ".join(f"{key}={value}" for key, value in honoured.items())
        warnings.warn(f"{metric} generates with the model's own {changed}", stacklevel=4)
    ends = _end_tokens(model, tokenizer)
    stops = [own.stop_strings] if isinstance(own.stop_strings, str) else own.stop_strings or []
    greedy = {key: value for key, value in _GREEDY.items() if hasattr(own, key)}  # versions have different ones
    by = json.dumps([settings.max_new_tokens, ends, honoured], default=str)
    keys = [sha256(f"{by}{prompt}".encode()).hexdigest() for prompt in prompts]
    batches = equal_length_batches([len(prompt) for prompt in prompts], settings.batch_size)
    # Whole batches are done, by one process each, and done again: an answer is then always that of the same batch.
    missing = [batch for batch in batches if not all(keys[place] in kept for place in batch)]
    for batch in track(share(missing), "generating"):
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
        answers = {}
        for place, tokens in zip(batch, output[:, given.shape[1] :].tolist(), strict=True):
            end = next((index for index, token in enumerate(tokens) if token in ends), None)
            text = str(tokenizer.decode(tokens[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False))
            stopped = end is not None
            for stop in stops:
                text, found, _ = text.partition(stop)
                stopped |= bool(found)
            answers[keys[place]] = (text, stopped)
        kept.add(answers)
    kept.exchange()
    return [(text, end) for text, end in (kept[key] for key in keys)]


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: those of the model's generation config, and the one that training puts at ends."""
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    return list(dict.fromkeys(token for token in (*own, tokenizer.eos_token_id) if token is not None))
