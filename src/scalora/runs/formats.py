"""The formats of examples that TRL's trainers take: which columns a task uses, and what must stand in them.

Checked with TRL 1.16, which takes most of what is wrong without a word, or fails at it after the model was loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from datasets import Dataset

from scalora.runs.errors import InputError
from scalora.runs.names import listed, row_name
from scalora.runs.sections import DataSettings
from scalora.runs.tasks import LABELLED, Task
from scalora.saving.errors import short_repr

_SHOWN = 60  # characters of an example's value that an error shows

# Columns that mean something to TRL besides those with the texts of a conversation.
_WITH_CONVERSATIONS = ("tools", "chat_template_kwargs")

# Columns that TRL or Transformers would use for sft, and that are not what a text model is trained on here.
_TOKENS = ("input_ids", "completion_mask", "assistant_masks", "position_ids", "seq_lengths")

_PAIRS = (["prompt", "chosen", "rejected"], ["chosen", "rejected"])

# The columns of each task's formats, of which the first is taken that the data have, and what an error calls them.
_FORMATS: Mapping[Task, tuple[tuple[list[str], ...], str]] = {
    "dpo": (_PAIRS, "no pair 'chosen' and 'rejected'"),
    "orpo": (_PAIRS, "no pair 'chosen' and 'rejected'"),
    "reward": (_PAIRS, "no pair 'chosen' and 'rejected'"),
    "kto": (
        (["prompt", "completion", "label"], *_PAIRS),
        "neither 'prompt', 'completion' and 'label' nor a pair 'chosen' and 'rejected'",
    ),
    "grpo": ((["prompt"],), "no column 'prompt'"),
}

# What TRL calls a reward function with, besides the columns of the data.
_GIVEN_TO_REWARDS = (
    "prompts",
    "completions",
    "completion_ids",
    "trainer_state",
    "log_extra",
    "log_metric",
    "environments",
)

# Where TRL's own column for the answer a model generates would be.
_NOT_GIVEN_TO_REWARDS = ("completion",)

Check = Callable[[Any, str, str], Any]
"""Checks a value of an example, given where it stands and its column, and returns it as TRL wants it."""


class Format(NamedTuple):
    """What a task uses of examples.

    Attributes:
        columns: the columns that it uses.
        conversational: whether the texts are conversations.
        checks: what checks the values of a column, by column; others may have any value.
        implicit: whether a conversation's prompt must be what the two answers of a pair begin with.
    """

    columns: list[str]
    conversational: bool
    checks: Mapping[str, Check]
    implicit: bool = False

    def checked(self, example: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The values of an example that the task uses, as TRL wants them.

        Args:
            example: the example, with any columns.
            where: names the data and the row, for errors.

        Raises:
            InputError: a value can't be used.
        """
        values: dict[str, Any] = {column: example.get(column) for column in self.columns}
        for column, check in self.checks.items():
            values[column] = check(values[column], where, column)
        if self.implicit and values["chosen"][:1] != values["rejected"][:1]:
            raise InputError(
                f"{where}: 'chosen' and 'rejected' begin with different messages, and there is no column 'prompt': let "
                "both begin with the prompt, or write it in a column of its own"
            )
        return values


def used_columns(examples: Dataset, name: str, data: DataSettings, task: Task) -> list[str]:
    """The columns that a task uses, as `format_of` finds them for the tasks that TRL trains.

    Args:
        examples: the examples, with any columns.
        name: file or hub id of the data, for errors.
        data: names of the columns.
        task: the task.

    Raises:
        InputError: a column is missing, of several formats those of each; or there is one that can't be used.
    """
    if task not in LABELLED:
        return format_of(examples, name, data, task).columns
    columns = [data.text, *([data.text_pair] if data.text_pair else []), data.label]
    require_columns(examples, name, columns)
    return columns


def format_of(examples: Dataset, name: str, data: DataSettings, task: Task) -> Format:
    """Which of TRL's formats examples for a task have.

    For sft the formats are ``messages``, ``prompt`` and ``completion``, and plain text, of which the first is taken
    that the examples have; a setting ``data.text`` other than the default stands for plain text.

    Args:
        examples: the examples, with any columns, of which the first tells whether they are conversations.
        name: file or hub id of the data, for errors.
        data: names of the columns.
        task: a task that TRL trains.

    Raises:
        InputError: the columns of every format are missing, or there is one that can't be used.
    """
    have = examples.column_names
    if data.max_tokens is not None:
        raise InputError(f"data.max_tokens={data.max_tokens}: for {task}, set training.max_length instead")
    refused = dict.fromkeys(("image", "images"), f"{task} trains on texts alone")
    if task == "sft":
        refused |= dict.fromkeys(_TOKENS, "the examples must be texts, which are tokenised here")
    if task == "grpo":
        refused |= dict.fromkeys(_GIVEN_TO_REWARDS, "TRL gives reward functions something else by that name; rename it")
    for column, reason in refused.items():
        if column in have:
            raise InputError(f"data {name!r} has a column {column!r}: {reason}; leave the column out")
    if task == "sft":
        formats = (["messages"], ["prompt", "completion"], [data.text])
        missing = f"no column 'messages', no pair 'prompt' and 'completion', and no column {data.text!r}"
    else:
        formats, missing = _FORMATS[task]  # type: ignore[assignment]
    columns = next((columns for columns in formats if set(have) >= set(columns)), None)
    if columns is None:
        raise InputError(f"data {name!r} has {missing}; it has {listed(have)}")
    if task == "sft" and data.text != DataSettings.model_fields["text"].default:
        require_columns(examples, name, [data.text])
        columns = [data.text]
    return _format(examples, columns, task)


def _format(examples: Dataset, columns: list[str], task: Task) -> Format:
    texts = [column for column in columns if column != "label"]
    conversational = is_conversational(examples.select_columns(texts))
    checks: dict[str, Check] = dict.fromkeys(texts, _require_conversation if conversational else _require_text)
    extra: tuple[str, ...] = _WITH_CONVERSATIONS if conversational and task not in ("orpo", "grpo") else ()
    if task == "reward":
        extra += ("margin",)
    if "label" in columns:
        checks["label"] = _desirable
    chosen = [*columns, *(column for column in extra if column in examples.column_names)]
    if task == "grpo":
        more = (column for column in examples.column_names if column not in (*columns, *_NOT_GIVEN_TO_REWARDS))
        chosen = [*columns, *more]
    checks |= {column: check for column, check in _CHECKS.items() if column in chosen and task != "grpo"}
    return Format(
        chosen, conversational, checks, conversational and "prompt" not in columns and task in ("dpo", "kto", "orpo")
    )


def trl_examples(examples: Dataset, name: str, data: DataSettings, task: Task) -> Dataset:
    """Keep the columns of one of TRL's formats, as `format_of` finds it, with the values that TRL wants.

    Args:
        examples: the examples, with any columns.
        name: file or hub id of the data, for errors.
        data: names of the columns.
        task: a task that TRL trains.

    Raises:
        InputError: the columns of every format are missing, or an example has a value that can't be used.
    """
    form = format_of(examples, name, data, task)
    chosen = examples.select_columns(form.columns)
    labels = []
    for place, example in enumerate(rows_of(chosen)):
        values = form.checked(example, row_name(name, place))
        if "label" in form.checks:
            labels.append(values["label"])
    if labels and chosen.features["label"].dtype != "bool":
        chosen = chosen.remove_columns("label").add_column("label", labels)
    return chosen


def is_conversational(examples: Dataset) -> bool:
    """Whether examples in one of TRL's formats are conversations.

    Args:
        examples: the examples, of which the first tells.
    """
    columns = examples.column_names
    if "messages" in columns:
        return True
    return any(isinstance(examples[0][column], list) for column in ("prompt", "chosen") if column in columns)


def require_columns(examples: Dataset, name: str, columns: list[str]) -> None:
    """Check that columns exist.

    Args:
        examples: the examples.
        name: file or hub id of the data, for the error.
        columns: names of the columns.

    Raises:
        InputError: a column is missing; names it and those that exist.
    """
    for column in columns:
        if column not in examples.column_names:
            raise InputError(f"data {name!r} has no column {column!r}; it has {listed(examples.column_names)}")


def require_texts(examples: Dataset, name: str, columns: list[str]) -> None:
    """Check that every example has a text in each of some columns, of which not all are empty.

    Args:
        examples: the examples.
        name: file or hub id of the data, for the error.
        columns: names of the columns; of a pair, one may be empty, as questions of GLUE's QQP are.

    Raises:
        InputError: a value is no text, or has nothing in it.
    """
    for place, example in enumerate(rows_of(examples.select_columns(columns))):
        empty = all(isinstance(example[column], str) and not example[column].strip() for column in columns)
        for column in columns:
            if empty or not isinstance(example[column], str):
                _require_text(example[column], row_name(name, place), column)


def _require_text(value: Any, where: str, column: str) -> Any:
    if not isinstance(value, str):
        what = "has no value" if value is None else f"is {short_repr(value, _SHOWN)}, not a text"
        raise InputError(f"{where}: column {column!r} {what}")
    if not value.strip():
        raise InputError(f"{where}: column {column!r} is {value!r}: there must be a text")
    return value


def _require_conversation(value: Any, where: str, column: str) -> Any:
    if not _is_conversation(value):
        raise InputError(
            f"{where}: column {column!r} is {short_repr(value, _SHOWN)}, not a list of messages with 'role' and "
            "'content'"
        )
    for message in value:
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise InputError(
                f"{where}: the content of a message in column {column!r} is {short_repr(content, _SHOWN)}, not a text"
            )
    return value


def _is_conversation(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and (message.get("content") is not None or message.get("tool_calls"))
            for message in value
        )
    )


def _require_tools(value: Any, where: str, column: str) -> Any:
    tools = value
    if isinstance(value, str):  # TRL reads it as JSON
        try:
            tools = json.loads(value)
        except ValueError as error:
            raise InputError(f"{where}: column {column!r} is not JSON: {error}") from None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise InputError(f"{where}: column {column!r} is {short_repr(value, _SHOWN)}, not a list of objects")
    return value


def _require_arguments(value: Any, where: str, column: str) -> Any:
    if not isinstance(value, dict):  # TRL fails on a missing value too
        raise InputError(
            f"{where}: column {column!r} is {short_repr(value, _SHOWN)}, not an object: write {{}} for none"
        )
    return value


def _require_number(value: Any, where: str, column: str) -> Any:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise InputError(f"{where}: column {column!r} is {short_repr(value, _SHOWN)}, not a number")
    return value


def _desirable(value: Any, where: str, column: str) -> bool:
    """Whether an answer is good: a truth value, as the words of CSV or as 1 and 0 too."""
    known = {"true": True, "false": False, "1": True, "0": False}
    found = known.get(str(value).strip().casefold())
    if found is None:
        raise InputError(
            f"{where}: column {column!r} is {short_repr(value, _SHOWN)}: write true for a good answer, or false"
        )
    return found


_CHECKS: Mapping[str, Check] = {
    "tools": _require_tools,
    "chat_template_kwargs": _require_arguments,
    "margin": _require_number,
}


def rows_of(examples: Dataset) -> Any:
    """The examples one by one, of which few are in memory at a time.

    Args:
        examples: the examples.
    """
    for batch in examples.iter(batch_size=1000):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))
