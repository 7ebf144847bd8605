"""Loads examples and checks their columns before anything expensive happens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset
from transformers import PreTrainedTokenizerBase

from scalora.runs.errors import InputError
from scalora.runs.settings import DataSettings, Task
from scalora.saving.errors import short_repr

_SHOWN = 60  # characters of an example's value that an error shows

_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def load_examples(name: str, split: str) -> Dataset:
    """Examples from a local file or the hub.

    Args:
        name: path of a jsonl, json, csv or parquet file, or a hub id.
        split: of a hub dataset; local files have only one.

    Raises:
        InputError: the file is missing, of another format, unreadable, or empty.
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
            raise InputError(f"data {name!r} is no local file, and the hub did not give it: {error}") from None
        if isinstance(loaded, DatasetDict) and split not in loaded:
            raise InputError(f"dataset {name!r} has no split {split!r}; it has {', '.join(loaded)}")
        examples = loaded[split]
    if not len(examples):
        raise InputError(f"data {name!r} has no examples")
    return examples


def sft_examples(examples: Dataset, name: str, data: DataSettings) -> Dataset:
    """Keep the columns of one of TRL's formats: ``messages``, ``prompt`` + ``completion``, or plain text.

    Raises:
        InputError: no format's columns are there, naming those that are; or an example has something else in them.
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
    """Raise `InputError` with the first example that TRL could not make tokens of."""
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
    """Raise `InputError` with the first column that is missing and those that are there."""
    for column in columns:
        if column not in examples.column_names:
            raise InputError(f"data {name!r} has no column {column!r}; it has {', '.join(examples.column_names)}")


def label_names(examples: Dataset, name: str, data: DataSettings) -> list[str]:
    """The classes in a training set, sorted, as text.

    Raises:
        InputError: the column is missing, has gaps, or there is only one class.
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
    """``input_ids``, ``attention_mask`` and ``labels`` for a sequence classifier.

    Raises:
        InputError: a column is missing, or a label is not a known class or not a number.
    """
    columns = [data.text] + ([data.text_pair] if data.text_pair else [])
    require_columns(examples, name, [*columns, data.label])
    _require_texts(examples, name, columns)
    longest = min(tokenizer.model_max_length, 512)  # some tokenizers say 1e30 for "unlimited"

    def encode(row: dict[str, object]) -> dict[str, object]:
        encoded = dict(tokenizer(*(row[column] for column in columns), truncation=True, max_length=longest))
        encoded["labels"] = _label(row[data.label], name, task, labels)
        return encoded

    return examples.map(encode, remove_columns=examples.column_names, desc="Tokenizing")


def _label(value: object, name: str, task: Task, labels: list[str] | None) -> float | int:
    if task == "regression" or labels is None:
        try:
            return float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            raise InputError(f"data {name!r} has a label that is not a number: {value!r}") from None
    if str(value) not in labels:
        raise InputError(f"data {name!r} has a label {value!r}; the classes are {', '.join(labels)}")
    return labels.index(str(value))
