"""Loads examples and checks them before anything expensive happens."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, DatasetDict, load_dataset
from transformers import PreTrainedTokenizerBase

from scalora.runs.data_files import SUFFIXES, read_examples
from scalora.runs.errors import InputError
from scalora.runs.labels import ClassIndex, class_names_in, number
from scalora.runs.messages import without_message
from scalora.runs.model_limits import TextLimit
from scalora.runs.settings import DataSettings, Task
from scalora.saving.errors import short_repr

_SHOWN = 60  # characters of an example's value that an error shows

# Columns that mean something to TRL besides those with the texts of a conversation.
_WITH_CONVERSATIONS = ("tools", "chat_template_kwargs")
# Columns that TRL or Transformers would use, and that are not what a text model is trained on here.
_REFUSED = {
    **dict.fromkeys(("image", "images"), "sft trains on texts alone"),
    **dict.fromkeys(
        ("input_ids", "completion_mask", "assistant_masks", "position_ids", "seq_lengths"),
        "the examples must be texts, which are tokenised here",
    ),
}


def load_examples(name: str, split: str) -> Dataset:
    """Load examples from a local file, as they were written, or from the hub.

    Args:
        name: path of a jsonl, json, csv or parquet file, or hub id of a dataset. A path is no pattern.
        split: the split to take from a hub dataset; a local file has only one.

    Raises:
        InputError: the file or dataset is missing, unreadable, empty, or in another format.
    """
    path = _local(name)
    examples = _from_hub(name, split) if path is None else _from_file(path, name)
    if not len(examples):
        raise InputError(f"data {name!r} has no data: no example is in it")
    return examples


def _local(name: str) -> Path | None:
    """The path of a local file or folder; None if the name is a hub id."""
    try:
        if (path := Path(name)).exists() or (path := path.expanduser()).exists() or path.suffix.lower() in SUFFIXES:
            return path
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"data {short_repr(name, _SHOWN)} is not the name of a file: {error}") from None
    return None


def _from_file(path: Path, name: str) -> Dataset:
    if path.is_dir():
        raise InputError(f"data file {name!r} does not exist: it is a folder")
    if not path.is_file():
        raise InputError(f"data file {name!r} does not exist")
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"data file {name!r} must end in {', '.join(SUFFIXES)}")
    if not path.stat().st_size:
        raise InputError(f"data file {name!r} is empty")
    try:
        return read_examples(path)
    except (OSError, ValueError, NotImplementedError) as error:  # those of pyarrow are among them
        kind = path.suffix.lower().removeprefix(".").replace("jsonl", "json")
        raise InputError(f"data file {name!r} can't be read as {kind}: {error}") from None


def _from_hub(name: str, split: str) -> Dataset:
    try:
        loaded = load_dataset(name)
    except Exception as error:  # the libraries below have classes of their own
        raise InputError(f"data {name!r} is not a local file, and downloading it failed: {error}") from None
    if isinstance(loaded, DatasetDict) and split not in loaded:
        raise InputError(f"dataset {name!r} has no split {split!r}; it has {', '.join(loaded)}")
    return loaded[split]


def used_columns(examples: Dataset, name: str, data: DataSettings, task: Task) -> list[str]:
    """The columns that a task uses: for sft those of one of TRL's formats.

    The formats are ``messages``, ``prompt`` and ``completion``, and plain text, of which the first is taken that the
    examples have; a setting ``data.text`` other than the default stands for plain text.

    Args:
        examples: the examples, with any columns.
        name: file or hub id of the data, for errors.
        data: names of the columns.
        task: the task.

    Raises:
        InputError: a column is missing, for sft those of every format; or there is one that can't be used.
    """
    have = examples.column_names
    if task != "sft":
        columns = [data.text, *([data.text_pair] if data.text_pair else []), data.label]
        require_columns(examples, name, columns)
        return columns
    if data.max_tokens is not None:
        raise InputError(f"data.max_tokens={data.max_tokens}: for sft, set training.max_length instead")
    for column, reason in _REFUSED.items():
        if column in have:
            raise InputError(f"data {name!r} has a column {column!r}: {reason}; leave the column out")
    formats = [c for c in (["messages"], ["prompt", "completion"], [data.text]) if set(have) >= set(c)]
    if formats and data.text != DataSettings.model_fields["text"].default:
        require_columns(examples, name, [data.text])
        return [data.text]
    for columns in formats[:1]:
        extra = _WITH_CONVERSATIONS if is_conversational(examples.select_columns(columns)) else ()
        return columns + [column for column in extra if column in have]
    raise InputError(
        f"data {name!r} has no column 'messages', no pair 'prompt' and 'completion', and no column {data.text!r}; "
        f"it has {_listed(have)}"
    )


def warn_about_unused(examples: Dataset, name: str, used: list[str]) -> None:
    """Name the columns that are not used.

    Args:
        examples: the examples, with any columns.
        name: file or hub id of the data.
        used: the columns that are used.
    """
    if unused := [column for column in examples.column_names if column not in used]:
        warnings.warn(f"data {name!r}: columns ignored: {_listed(unused)}", stacklevel=2)


def sft_examples(examples: Dataset, name: str, data: DataSettings) -> Dataset:
    """Keep the columns of one of TRL's formats, as `used_columns` finds it, and what TRL uses with conversations.

    Args:
        examples: the examples, with any columns.
        name: file or hub id of the data, for errors.
        data: names of the columns.

    Raises:
        InputError: the columns of every format are missing, or an example has a value that can't be tokenised.
    """
    chosen = examples.select_columns(used_columns(examples, name, data, "sft"))
    columns = chosen.column_names
    if not is_conversational(chosen):
        _require_texts(chosen, name, columns)
        return chosen
    for row, example in enumerate(_rows(chosen), start=1):
        where = f"data {name!r}, row {row:,}"
        for column in columns:
            _CHECKS.get(column, _require_conversation)(example[column], where, column)
    return chosen


def is_conversational(examples: Dataset) -> bool:
    """Whether examples in one of TRL's formats are conversations.

    Args:
        examples: the examples, of which the first tells.
    """
    columns = examples.column_names
    return "messages" in columns or ("prompt" in columns and isinstance(examples[0]["prompt"], list))


def _require_conversation(value: Any, where: str, column: str) -> None:
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


def _require_tools(value: Any, where: str, column: str) -> None:
    tools = value
    if isinstance(value, str):  # TRL reads it as JSON
        try:
            tools = json.loads(value)
        except ValueError as error:
            raise InputError(f"{where}: column {column!r} is not JSON: {error}") from None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise InputError(f"{where}: column {column!r} is {short_repr(value, _SHOWN)}, not a list of objects")


def _require_arguments(value: Any, where: str, column: str) -> None:
    if not isinstance(value, dict):  # TRL fails on a missing value too
        raise InputError(
            f"{where}: column {column!r} is {short_repr(value, _SHOWN)}, not an object: write {{}} for none"
        )


_CHECKS = {"tools": _require_tools, "chat_template_kwargs": _require_arguments}


def _require_texts(examples: Dataset, name: str, columns: list[str]) -> None:
    for row, example in enumerate(_rows(examples.select_columns(columns)), start=1):
        for column in columns:
            value = example[column]
            if not isinstance(value, str):
                what = "has no value" if value is None else f"is {short_repr(value, _SHOWN)}, not a text"
                raise InputError(f"data {name!r}, row {row:,}: column {column!r} {what}")
            if not value.strip():
                raise InputError(f"data {name!r}, row {row:,}: column {column!r} is {value!r}: there must be a text")


def _rows(examples: Dataset) -> Iterator[dict[str, Any]]:
    """The examples one by one, of which few are in memory at a time."""
    for batch in examples.iter(batch_size=1000):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


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
            raise InputError(f"data {name!r} has no column {column!r}; it has {_listed(examples.column_names)}")


def _listed(columns: list[str]) -> str:
    """Names of columns, in quotes where they would not be seen for what they are."""
    return ", ".join(column if column == column.strip() and column else repr(column) for column in columns)


def label_names(examples: Dataset, name: str, data: DataSettings) -> list[str]:
    """The names of the classes in a training set, in the order of `scalora.runs.labels.class_names_in`.

    Args:
        examples: the training examples.
        name: file or hub id of the data, for errors.
        data: name of the column with the label, and what similar labels are.

    Raises:
        InputError: the column is missing or has gaps, labels are similar, or there is only one class.
    """
    require_columns(examples, name, [data.label])
    return class_names_in(examples[data.label][:], name, data.label, data.similar_labels)


_TOKENS = "tokens before truncation"  # a column


class TokenisedTexts(NamedTuple):
    """Examples for classification or regression.

    Attributes:
        examples: the examples, with the columns ``input_ids``, ``attention_mask`` and ``labels``.
        truncated: number of examples that were truncated.
    """

    examples: Dataset
    truncated: int


def tokenized_for_classification(
    examples: Dataset,
    name: str,
    data: DataSettings,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    labels: list[str] | None,
    limit: TextLimit | None,
) -> TokenisedTexts:
    """Tokenise examples for classification or regression: ``input_ids``, ``attention_mask`` and ``labels``.

    Args:
        examples: the examples, with a text, or two, and a label.
        name: file or hub id of the data, for errors.
        data: names of the columns.
        task: ``"classification"`` or ``"regression"``.
        tokenizer: the model's tokenizer.
        labels: names of the classes in order; None for regression.
        limit: where texts are truncated, which is said with the number of texts; None: nowhere.

    Raises:
        InputError: a column is missing, a text is no text or has nothing in it, or a label is not a known class or
            finite number.
    """
    columns = used_columns(examples, name, data, task)[:-1]
    _require_texts(examples, name, columns)
    classes = None if labels is None else ClassIndex(labels, data.similar_labels)

    def encode(row: dict[str, Any], place: int) -> dict[str, Any]:
        texts = [row[column] for column in columns]
        encoded = dict(tokenizer(*texts))
        tokens = len(encoded["input_ids"])
        if limit is not None and tokens > limit.tokens:
            encoded = dict(tokenizer(*texts, truncation=True, max_length=limit.tokens))
        where = f"data {name!r}, row {place + 1:,}"
        value = row[data.label]
        goal = number(value, where, data.label) if classes is None else classes.place(value, where, data.label)
        return {**encoded, "labels": goal, _TOKENS: tokens}

    # It says that a text is longer than the model allows before the text is truncated.
    with without_message("transformers.tokenization_utils_base", "Token indices sequence length is longer"):
        tokenised = examples.map(encode, with_indices=True, remove_columns=examples.column_names, desc="Tokenizing")
    truncated = 0 if limit is None else sum(tokens > limit.tokens for tokens in tokenised[_TOKENS][:])
    if limit is not None and truncated:
        _warn_about_truncated(truncated, len(examples), name, limit)
    return TokenisedTexts(tokenised.remove_columns(_TOKENS), truncated)


def _warn_about_truncated(count: int, examples: int, name: str, limit: TextLimit) -> None:
    more = "all that the model takes"
    if limit.most is None or limit.tokens < limit.most:
        more = "set data.max_tokens to keep more" + ("" if limit.most is None else f", at most {limit.most:,}")
    warnings.warn(
        f"data {name!r}: {count:,} of {examples:,} texts are truncated to {limit.tokens:,} tokens ({more})",
        stacklevel=3,
    )
