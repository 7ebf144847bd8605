"""Prompts as a model saw them in training: tokenised with the special tokens and the chat template of TRL's trainer."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.chat_template_utils import clone_chat_template, get_training_chat_template

from scalora.runs.errors import InputError

# In a chat template, around what the assistant says, for training on that alone.
_MARKS_ANSWERS = re.compile(r"{%-?\s*generation\s*-?%}")

Prompt = str | list[dict[str, Any]]
"""A text, or the messages of a conversation."""


def use_training_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, training: dict[str, Any]) -> None:
    """Give a tokenizer the special tokens and the chat template that TRL gives it for a run's training arguments.

    The tokenizer of a finished run has them already; that of its base model does not.

    Args:
        model: the model, which gets embeddings for the tokens that a cloned chat template adds.
        tokenizer: the model's tokenizer; changed in place.
        training: the training arguments, of which ``eos_token``, ``pad_token``, ``chat_template_path`` and
            ``assistant_only_loss`` matter.

    Raises:
        InputError: the tokenizer has no such token, or there is no such template.
    """
    for key in ("eos_token", "pad_token"):
        if (token := training.get(key)) is not None:
            if token not in tokenizer.get_vocab():
                raise InputError(f"training.{key}={token!r} is not in the vocabulary of the tokenizer")
            setattr(tokenizer, key, token)
    template = training.get("chat_template_path")
    if template is not None and Path(template).suffix in (".jinja", ".j2"):
        if not Path(template).is_file():
            raise InputError(f"training.chat_template_path={template!r} does not exist")
        tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
    elif template is not None:
        clone_chat_template(model, tokenizer, template)
    template = tokenizer.chat_template
    if training.get("assistant_only_loss") and isinstance(template, str) and not _MARKS_ANSWERS.search(template):
        try:
            tokenizer.chat_template = get_training_chat_template(tokenizer)
        except ValueError as error:
            raise InputError(f"training.assistant_only_loss=True: {error}") from None


def template_options(row: Mapping[str, Any]) -> dict[str, Any]:
    """What an example gives its chat template besides messages, as TRL reads it.

    Args:
        row: the example, which may have ``tools`` (a list, or one as JSON) and ``chat_template_kwargs``.
    """
    tools = row.get("tools")
    return {"tools": json.loads(tools) if isinstance(tools, str) else tools} | (row.get("chat_template_kwargs") or {})


def chat_text(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], options: dict[str, Any], where: str
) -> str:
    """A conversation as text, up to where the assistant is to speak.

    Args:
        tokenizer: the model's tokenizer.
        messages: the messages.
        options: what else the chat template is given, from `template_options`.
        where: names the data and the example, for errors.

    Raises:
        InputError: the tokenizer has no chat template, or it refuses the messages.
    """
    return str(_templated(tokenizer, messages, options, where, tokenize=False))


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, options: dict[str, Any], where: str) -> list[int]:
    """The tokens of a prompt, as TRL's trainer tokenises them for training.

    Args:
        tokenizer: the model's tokenizer.
        prompt: text or messages.
        options: what else the chat template of messages is given, from `template_options`.
        where: names the data and the example, for errors.

    Raises:
        InputError: the prompt is a conversation, and the tokenizer has no chat template or it refuses the messages.
    """
    if isinstance(prompt, str):
        return text_tokens(tokenizer, prompt)
    ids: list[int] = _templated(tokenizer, prompt, options, where, tokenize=True, return_dict=True)["input_ids"]
    return ids


def text_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text that goes on: with what the tokenizer puts before a text, without what it puts after it.

    A text that begins with such a token (a beginning-of-sequence token, say) does not get a second one.

    Args:
        tokenizer: the model's tokenizer.
        text: the text.
    """
    before, after = _added_tokens(tokenizer)
    bare: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if before and bare[: len(before)] == before:
        return bare
    whole: list[int] = tokenizer(text)["input_ids"]
    return whole[: len(whole) - len(after)]


def equal_length_batches(lengths: list[int], size: int) -> list[list[int]]:
    """Places of sequences, in batches of sequences of one length.

    A batch without padding has the scores of its sequences alone. Padding would show where a model keeps a recurrent
    state, and where a repetition penalty of the model's own also counts the padding tokens.

    Args:
        lengths: length of each sequence.
        size: largest number of sequences in a batch.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    batches: list[list[int]] = []
    for place in order:
        if not batches or len(batches[-1]) == size or lengths[batches[-1][0]] != lengths[place]:
            batches.append([])
        batches[-1].append(place)
    return batches


def _templated(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    options: dict[str, Any],
    where: str,
    **output: Any,
) -> Any:
    if tokenizer.chat_template is None:
        raise InputError(
            f"{where} is a conversation, and the tokenizer has no chat template: set one with "
            "training.chat_template_path"
        )
    try:
        return tokenizer.apply_chat_template(messages, **options | output | {"add_generation_prompt": True})
    except TemplateError as error:
        raise InputError(f"{where}: the tokenizer's chat template refuses the messages: {error}") from None


def _added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What a tokenizer puts before and after every text."""
    bare, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []
