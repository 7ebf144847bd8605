"""Loads examples and checks them before anything expensive happens."""

from __future__ import annotations

import hashlib
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from datasets import Dataset, DatasetDict, concatenate_datasets, load_dataset
from transformers import PreTrainedTokenizerBase

from scalora.runs.data_files import SUFFIXES, read_examples
from scalora.runs.errors import InputError
from scalora.runs.formats import require_columns, require_texts, used_columns
from scalora.runs.json_values import JsonValue
from scalora.runs.labels import ClassIndex, class_names_in, number
from scalora.runs.messages import without_message
from scalora.runs.model_limits import TextLimit
from scalora.runs.names import SetNames, listed, row_name
from scalora.runs.sections import DataSettings
from scalora.runs.tasks import Task
from scalora.runs.templates import templated
from scalora.saving.errors import short_repr

_SHOWN = 60  # characters of an example's value that an error shows

# A hub id or folder, its configuration and the split to take, as datasets writes it: openai/gsm8k:main@train[:100].
_HUB_NAME = re.compile(r"(?P<path>.+?)(?::(?P<config>[^:@/]+))?(?:@(?P<split>[^@/]+))?")


def load_examples(name: str, split: str) -> Dataset:
    """Load examples from a local file, as they were written, or from the hub.

    Args:
        name: path of a jsonl, json, csv or parquet file, or hub id of a dataset, or a folder in the form that the hub
            has; of these two with a configuration and a split where they have several, as in
            ``nyu-mll/glue:mnli@validation_matched``. A path is no pattern.
        split: the split to take from a dataset whose name says none; a local file has only one.

    Raises:
        InputError: the file or dataset is missing, unreadable, empty, or in another format.
    """
    path = local_path(name)
    examples = _from_hub(name, split) if path is None or path.is_dir() else _from_file(path, name)
    if not len(examples):
        raise InputError(f"data {name!r} has no data: no example is in it")
    return examples


class Examples(NamedTuple):
    """The examples of a split.

    Attributes:
        rows: the examples; of several sets one set after the other, each once.
        name: file or hub id of the data, or the names of several.
    """

    rows: Dataset
    name: str


def load_sets(value: str | list[str] | dict[str, float], split: str, first: int | None = None) -> Examples:
    """Load the examples of a split, from one set or several.

    Args:
        value: value of ``data.train`` or ``data.eval``.
        split: the split to take from hub datasets.
        first: how many to take of each set, from its first; None for all.

    Raises:
        InputError: a set can't be read, or a column has values that can't be put together with those of another set.
    """
    names = set_names(value)
    sets = [first_examples(Examples(load_examples(name, split), name), first).rows for name in names]
    if len(sets) == 1:
        return Examples(sets[0], names[0])
    for column in dict.fromkeys(column for rows in sets for column in rows.column_names):
        types = [rows.features[column] for rows in sets if column in rows.column_names]
        if any(type_ != types[0] for type_ in types):
            sets = [_with_any_values(rows, column, name) for name, rows in zip(names, sets, strict=True)]
    return Examples(concatenate_datasets(sets), SetNames(names, [len(rows) for rows in sets]))


def examples_of(data: DataSettings, value: str | list[str] | dict[str, float], split: str) -> Examples:
    """The examples of a split as a config has them: no more than it wants, as its templates make them.

    Args:
        data: the section ``data`` of the config.
        value: value of ``data.train`` or ``data.eval``.
        split: the split to take from hub datasets whose names say none.

    Raises:
        InputError: a set can't be read, or a template can't be filled.
    """
    rows, name = load_sets(value, split, data.first)
    return Examples(templated(rows, name, data), name)


def first_examples(examples: Examples, count: int | None) -> Examples:
    """The first examples of a split.

    Args:
        examples: the examples.
        count: how many; None: all.
    """
    rows, name = examples
    return Examples(rows if count is None else rows.select(range(min(count, len(rows)))), name)


def set_names(value: str | list[str] | dict[str, float]) -> list[str]:
    """The names in a value of ``data.train`` or ``data.eval``.

    Args:
        value: the value.
    """
    return [value] if isinstance(value, str) else list(value)


def _with_any_values(rows: Dataset, column: str, name: str) -> Dataset:
    """The examples with a column of values of any type, of which the check of rows says more."""
    if column not in rows.column_names or isinstance(rows.features[column], JsonValue):
        return rows
    try:
        values = [JsonValue().encode_example(value) for value in rows[column][:]]
    except TypeError as error:
        raise InputError(f"data {name!r}: column {column!r} has another type than in other sets: {error}") from None
    return rows.remove_columns(column).add_column(column, values, feature=JsonValue())


def local_path(name: str) -> Path | None:
    """The path of a local file or folder; None if the name is a hub id.

    Args:
        name: value of ``data.train`` or ``data.eval``, or a name in it.

    Raises:
        InputError: no file can have that name.
    """
    try:
        if (path := Path(name)).exists() or (path := path.expanduser()).exists() or path.suffix.lower() in SUFFIXES:
            return path
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"data {short_repr(name, _SHOWN)} is not the name of a file: {error}") from None
    return None


def _from_file(path: Path, name: str) -> Dataset:
    require_file(path, name)
    try:
        return read_examples(path)
    except (OSError, ValueError, NotImplementedError) as error:  # those of pyarrow are among them
        raise unreadable(path, name, error) from None


def require_file(path: Path, name: str) -> None:
    """Check that a file of examples is one.

    Args:
        path: its path.
        name: what the config calls it.

    Raises:
        InputError: it is missing or empty, a folder, or of no known format.
    """
    if path.is_dir():
        raise InputError(f"data file {name!r} does not exist: it is a folder")
    if not path.is_file():
        raise InputError(f"data file {name!r} does not exist")
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"data file {name!r} must end in {', '.join(SUFFIXES)}")
    if not path.stat().st_size:
        raise InputError(f"data file {name!r} is empty")


def unreadable(path: Path, name: str, error: Exception) -> InputError:
    """The error about a file that can't be read.

    Args:
        path: the file.
        name: what the config calls it.
        error: why not.
    """
    kind = path.suffix.lower().removeprefix(".").replace("jsonl", "json")
    return InputError(f"data file {name!r} can't be read as {kind}: {error}")


def hub_name(name: str) -> tuple[str, str | None, str | None]:
    """What the name of a hub dataset, or of a folder in that form, says.

    Args:
        name: value of ``data.train`` or ``data.eval``, or a name in it.

    Returns:
        The hub id or folder, and the configuration and the split, each None if the name says none.
    """
    if Path(name).is_dir():
        return name, None, None
    found = _HUB_NAME.fullmatch(name)
    return (name, None, None) if found is None else (found["path"], found["config"], found["split"])


def _cache_of(folder: Path) -> str:
    """Where datasets may keep what it reads of a folder: its own names for that tell no folders of one name apart."""
    digest = hashlib.sha256(str(folder.resolve()).encode())
    for path in sorted(folder.rglob("*")):
        digest.update(f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    return str(Path(datasets.config.HF_DATASETS_CACHE) / "scalora" / digest.hexdigest()[:32])


def _from_hub(name: str, split: str) -> Dataset:
    path, config, own_split = hub_name(name)
    local = local_path(path)
    if local is not None and not local.is_dir():
        raise InputError(f"data {name!r}: a file has no configurations and splits; write {path!r}")
    cache = None if local is None else _cache_of(local)
    try:
        loaded = load_dataset(path if local is None else str(local), config, split=own_split, cache_dir=cache)
    except Exception as error:  # the libraries below have classes of their own
        what = (
            "is not a local file, and downloading it" if local is None else "does not exist as a file, and loading it"
        )
        raise InputError(f"data {name!r} {what} failed: {error}") from None
    if not isinstance(loaded, DatasetDict):
        return loaded
    if split not in loaded:
        raise InputError(
            f"dataset {name!r} has no split {split!r}; it has {', '.join(loaded)}: name one, as in "
            f"{name}@{next(iter(loaded))}"
        )
    return loaded[split]


def warn_about_unused(examples: Dataset, name: str, used: list[str]) -> None:
    """Name the columns that are not used.

    Args:
        examples: the examples, with any columns.
        name: file or hub id of the data.
        used: the columns that are used.
    """
    if unused := [column for column in examples.column_names if column not in used]:
        warnings.warn(f"data {name!r}: columns ignored: {listed(unused)}", stacklevel=2)


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
    require_texts(examples, name, columns)
    classes = None if labels is None else ClassIndex(labels, data.similar_labels)

    def encode(row: dict[str, Any], place: int) -> dict[str, Any]:
        texts = [row[column] for column in columns]
        encoded = dict(tokenizer(*texts))
        tokens = len(encoded["input_ids"])
        if limit is not None and tokens > limit.tokens:
            encoded = dict(tokenizer(*texts, truncation=True, max_length=limit.tokens))
        where = row_name(name, place)
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
