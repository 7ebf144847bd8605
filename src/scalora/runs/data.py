"""Loads examples and checks them before anything expensive happens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset
from transformers import PreTrainedTokenizerBase

from scalora.runs.errors import InputError
from scalora.runs.settings import DataSettings, Task
from scalora.saving.errors import short_repr

_SHOWN = 60  # characters of an example's value that an error shows

# Texts for classification and regression are cut off here, or earlier where the tokenizer says so: some tokenizers
# give 1e30 as the model's maximum.
_LONGEST_TEXT = 512

_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def load_examples(name: str, split: str) -> Dataset:
    """Load examples from a local file or the hub.

    Args:
        name: path of a jsonl, json, csv or parquet file, or hub id of a dataset.
        split: the split to take from a hub dataset; a local file has only one.

    Raises:
        InputError: the file or dataset is missing, unreadable, empty, or in another format.
    """
    path = Path(name).expanduser()
    if path.suffix in _FORMATS or path.exists():
        if not path.is_file():
            raise InputError(f"data file {name!r} does not exist")
        if path.suffix not in _FORMATS:
            raise InputError(f"data file {name!r} must end in {', '.join(_FORMATS)}")
        if not path.stat().st_size:
            raise InputError(f"data file {name!r} is empty")
        try:
            examples = load_dataset(_FORMATS[path.suffix], data_files=str(path), split="train")
        except Exception as error:
            cause = error.__cause__ or error
            raise InputError(f"data file {name!r} can't be read as {_FORMATS[path.suffix]}: {cause}") from None
    else:
        try:
            loaded = load_dataset(name)
        except (OSError, ValueError) as error:
            raise InputError(f"data {name!r} is not a local file, and downloading it failed: {error}") from None
        if isinstance(loaded, DatasetDict) and split not in loaded:
            raise InputError(f"dataset {name!r} has no split {split!r}; it has {', '.join(loaded)}")
        examples = loaded[split]
    if not len(examples):
        raise InputError(f"data {name!r} has no examples")
    return examples


def sft_examples(examples: Dataset, name: str, data: DataSettings) -> Dataset:
    """Keep the columns of one of TRL's formats: ``messages``, ``prompt`` and ``completion``, or plain text.

    Args:
        examples: the examples, with any columns.
        name: file or hub id of the data, for errors.
        data: names of the columns.

    Raises:
        InputError: the columns of every format are missing, or an example has a value that can't be tokenised.
    """
    have = set(examples.column_names)
    for columns in (["messages"], ["prompt", "completion"], [data.text]):
        if have >= set(columns):
            chosen = examples.select_columns(columns)
            _require_trainable(chosen, name, data)
            return chosen
    raise InputError(
        f"data {name!r} has no column 'messages', no pair 'prompt' and 'completion', and no column {data.text!r}; "
        f"it has {', '.join(examples.column_names)}"
    )


def _require_trainable(examples: Dataset, name: str, data: DataSettings) -> None:
    """Raise `InputError` for the first example that TRL could not tokenise."""
    columns = examples.column_names
    if columns == [data.text]:
        _require_texts(examples, name, columns)
        return
    conversations = columns == ["messages"] or isinstance(examples[0]["prompt"], list)
    for column in columns:
        if not conversations:
            _require_texts(examples, name, [column])
            continue
        for number, value in enumerate(examples[column][:], start=1):
            if not _is_conversation(value):
                raise InputError(
                    f"data {name!r}, example {number}: column {column!r} is {short_repr(value, _SHOWN)}, not a list of "
                    "messages with 'role' and 'content'"
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


def _require_texts(examples: Dataset, name: str, columns: list[str]) -> None:
    for column in columns:
        for number, value in enumerate(examples[column][:], start=1):
            if not isinstance(value, str):
                raise InputError(
                    f"data {name!r}, example {number}: column {column!r} is {short_repr(value, _SHOWN)}, not a text"
                )


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
            raise InputError(f"data {name!r} has no column {column!r}; it has {', '.join(examples.column_names)}")


def label_names(examples: Dataset, name: str, data: DataSettings) -> list[str]:
    """The names of the classes in a training set, sorted.

    Args:
        examples: the training examples.
        name: file or hub id of the data, for errors.
        data: name of the column with the label.

    Raises:
        InputError: the column is missing or has gaps, or there is only one class.
    """
    require_columns(examples, name, [data.label])
    column = examples[data.label][:]
    if odd := [value for value in column if isinstance(value, (list, dict))]:
        raise InputError(f"data {name!r} has a label that is not a class name or number: {short_repr(odd[0], _SHOWN)}")
    values = set(column)
    if None in values:
        raise InputError(f"data {name!r} has examples without a value in column {data.label!r}")
    if len(values) < 2:
        raise InputError(f"data {name!r} has only one class in column {data.label!r}: {values.pop()!r}")
    return [str(value) for value in sorted(values)]


def tokenized_for_classification(
    examples: Dataset,
    name: str,
    data: DataSettings,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    labels: list[str] | None,
) -> Dataset:
    """Tokenise examples for classification or regression: ``input_ids``, ``attention_mask`` and ``labels``.

    Args:
        examples: the examples, with a text, or two, and a label.
        name: file or hub id of the data, for errors.
        data: names of the columns.
        task: ``"classification"`` or ``"regression"``.
        tokenizer: the model's tokenizer.
        labels: names of the classes in order; None for regression.

    Raises:
        InputError: a column is missing, a text is not a string, or a label is not a known class or number.
    """
    columns = [data.text] + ([data.text_pair] if data.text_pair else [])
    require_columns(examples, name, [*columns, data.label])
    _require_texts(examples, name, columns)
    longest = longest_text(tokenizer)

    def encode(row: dict[str, object]) -> dict[str, object]:
        encoded = dict(tokenizer(*(row[column] for column in columns), truncation=True, max_length=longest))
        encoded["labels"] = _label(row[data.label], name, task, labels)
        return encoded

    return examples.map(encode, remove_columns=examples.column_names, desc="Tokenizing")


def longest_text(tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens after which a text for classification or regression is cut off.

    Args:
        tokenizer: the model's tokenizer.
    """
    return min(int(tokenizer.model_max_length), _LONGEST_TEXT)


def _label(value: object, name: str, task: Task, labels: list[str] | None) -> float | int:
    if task == "regression" or labels is None:
        try:
            return float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            raise InputError(f"data {name!r} has a label that is not a number: {value!r}") from None
    if str(value) not in labels:
        raise InputError(f"data {name!r} has a label {value!r}; the classes are {', '.join(labels)}")
    return labels.index(str(value))
