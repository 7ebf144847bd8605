"""Reads files of examples as they were written: a text stays that text, and what has no clear meaning is refused.

pandas and datasets guess types: they would read the class 01 as 1, the word NA as a missing value, a date as a time.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from datasets import Dataset, Features, Value

from scalora.runs import json_values
from scalora.runs.json_values import JsonValue
from scalora.saving.errors import short_repr

_CHUNK = 1000  # rows that become columns at a time: Arrow's texts of a chunk must stay under 2 GiB
_SHOWN = 60  # characters of a value that an error shows

# The mark of UTF-32 begins with that of UTF-16.
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)

_ARROW_TYPES = {str: "string", bool: "bool", int: "int64", float: "float64"}
_INT64 = range(-(2**63), 2**63)


def read_examples(path: Path) -> Dataset:
    """Read a file of examples, whose format is that of its name's end.

    As datasets does it, the examples are held in a file of its cache, next to which what is made of them is written.
    That file is named by what is in it.

    Args:
        path: the file, of one of `SUFFIXES`.

    Raises:
        ValueError: something in the file has no clear meaning; with the row or line.
        NotImplementedError: a column of a Parquet file has a type that datasets does not know.
        OSError: the file can't be read, or the cache not written.
    """
    digest = _digest(path)
    cached = Path(datasets.config.HF_DATASETS_CACHE) / "scalora" / digest / "examples.arrow"
    if not cached.is_file():
        table = _READERS[path.suffix.lower()](path)
        if _digest(path) != digest:
            raise ValueError("it has changed while it was read")
        _write(table, cached)
    return Dataset.from_file(str(cached))


def stream_examples(path: Path) -> Iterator[dict[str, Any]]:
    """Read the rows of a file of examples one by one, of which few are in memory at a time.

    Args:
        path: the file, of one of `SUFFIXES`; of JSON, with one object per line.

    Yields:
        The rows, each with its own keys alone.

    Raises:
        ValueError: something in the file has no clear meaning; with the row or line.
        OSError: the file can't be read.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        with pq.ParquetFile(path) as file:
            _require_distinct(file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=_CHUNK):
                yield from batch.to_pylist()
        return
    reader = _csv_lines if suffix == ".csv" else partial(_json_rows, lists=False)
    try:
        with path.open(encoding=_encoding(path), newline="\n") as lines:
            yield from reader(lines)
    except UnicodeDecodeError:
        raise ValueError(_undecodable(path)) from None
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None


def dataset_of(rows: Sequence[Mapping[str, Any]]) -> Dataset:
    """Rows as a dataset in memory, with the types that `read_examples` would give their columns.

    Args:
        rows: the rows.

    Raises:
        ValueError: a text in a column is none.
    """
    return Dataset(_table(iter(rows)))


def _digest(path: Path) -> str:
    """Identifies what a file says: its bytes, the format in which they are read, and the code that reads them."""
    digest = hashlib.sha256(path.suffix.lower().encode())
    for source in (Path(__file__), Path(json_values.__file__), path):
        with source.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()[:32]


def _write(table: pa.Table, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: another process may be writing the same.
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        temporary = str(Path(scratch) / path.name)
        with pa.OSFile(temporary, "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
        os.replace(temporary, path)


def _read_csv(path: Path) -> pa.Table:
    """Commas between columns, the names of which are the first row. Every value is a text."""
    try:
        # Carriage returns alone end no lines: within a value they may be meant, and without quotes csv refuses them.
        with path.open(encoding=_encoding(path), newline="\n") as file:
            return _table(_csv_lines(file))
    except UnicodeDecodeError:
        raise ValueError(_undecodable(path)) from None


def _read_json(path: Path) -> pa.Table:
    """An object per line, or one list of objects.

    A column has a type of Arrow if all of its values are texts, truth values, integers or fractions; of another column
    every value keeps its own type.
    """
    try:
        with path.open(encoding=_encoding(path), newline="\n") as file:
            return _table(_json_rows(file))
    except UnicodeDecodeError:
        raise ValueError(_undecodable(path)) from None
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None


def _read_parquet(path: Path) -> pa.Table:
    with pq.ParquetFile(path) as file:
        _require_distinct(file.schema_arrow.names)
        table = file.read()
    # datasets has no type for what pandas calls categories.
    plain = [
        field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field
        for field in table.schema
    ]
    return table.cast(pa.schema(plain, metadata=table.schema.metadata))


_READERS: Mapping[str, Callable[[Path], pa.Table]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}

SUFFIXES = tuple(_READERS)
"""How the names of files of examples end."""


def _encoding(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(4)
    return next((name for mark, name in _BYTE_ORDER_MARKS if start.startswith(mark)), "utf-8")


def _undecodable(path: Path) -> str:
    """What can't be decoded of a file, and in which line: the error of an open file does not know."""
    encoding, content = _encoding(path), path.read_bytes()
    try:
        content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return f"line {line} is not {encoding.removesuffix('-sig').upper()} ({error.reason}): save it as UTF-8"
    raise AssertionError("the file has changed while it was read")


def _csv_lines(lines: Iterator[str]) -> Iterator[dict[str, str]]:
    allowed = csv.field_size_limit(sys.maxsize)
    try:
        yield from _csv_rows(csv.reader(lines, strict=True))
    finally:
        csv.field_size_limit(allowed)


def _csv_rows(reader: Any) -> Iterator[dict[str, str]]:
    number, blank = 0, None
    try:
        header: list[str] = next(reader, [])
        _require_distinct(header)
        for number, values in enumerate(reader, start=1):
            if not values and blank is None:
                blank = number, reader.line_num
            if values and blank is not None:  # blank lines at the end are no rows
                raise ValueError(f"row {blank[0]} (line {blank[1]}) is blank")
            if values and len(values) != len(header):
                raise ValueError(
                    f"row {number} (line {reader.line_num}) has {len(values)} values, but the header names "
                    f"{len(header)} columns: {', '.join(header)}"
                )
            if values:
                yield dict(zip(header, values, strict=True))
    except csv.Error as error:
        reason = str(error).partition(" - ")[0]  # then follows advice to who calls csv
        raise ValueError(f"row {number + 1} (line {reader.line_num}): {reason}") from None


def _json_rows(lines: Iterator[str], *, lists: bool = True) -> Iterator[dict[str, Any]]:
    first = True
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if first and line.lstrip().startswith("["):
            if not lists:
                raise ValueError("a list can't be streamed: write one object per line")
            values = _parsed(line + "".join(lines), number)
            yield from (_object(value, f"row {row}") for row, value in enumerate(values, start=1))
            return
        first = False
        yield _object(_parsed(line.rstrip("\r\n"), number), f"line {number}")


def _parsed(text: str, line: int) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_with_distinct_keys)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {line + error.lineno - 1}, column {error.colno}: {error.msg}") from None
    except ValueError as error:
        raise ValueError(f"line {line}: {error}") from None


def _with_distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice!r} is there twice in {short_repr(made, _SHOWN)}")
    return made


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {short_repr(value, _SHOWN)}, not an object with a key per column")
    return value


def _require_distinct(columns: Sequence[str]) -> None:
    if twice := [column for column, count in Counter(columns).items() if count > 1]:
        raise ValueError(f"it has the column {twice[0]!r} twice")


def _table(rows: Iterator[Mapping[str, Any]]) -> pa.Table:
    """The columns of rows, in the order in which they first occur; without a value where a row has no such key."""
    pieces: dict[str, list[_Piece]] = {}
    done = 0
    while chunk := list(islice(rows, _CHUNK)):
        for name in dict.fromkeys(chain(pieces, *chunk)):
            if name not in pieces:
                pieces[name] = [_Piece("null", pa.nulls(done))]
            pieces[name].append(_piece([row.get(name) for row in chunk], name, done))
        done += len(chunk)
    features, columns = Features(), []
    for name, parts in pieces.items():
        kinds = {part.kind for part in parts} - {"null"}
        kind = kinds.pop() if len(kinds) == 1 else "json" if kinds else "null"
        features[name] = JsonValue() if kind == "json" else Value(kind)
        columns.append(pa.chunked_array([part.of_kind(kind) for part in parts], features[name].pa_type))
    return pa.Table.from_arrays(columns, schema=features.arrow_schema)


class _Piece(NamedTuple):
    """Consecutive values of a column.

    Attributes:
        kind: name of a type of Arrow, or ``"json"`` for values of several types.
        values: the values.
    """

    kind: str
    values: pa.Array

    def of_kind(self, kind: str) -> pa.Array:
        """The values as those of a column that has values of another kind too."""
        if kind == self.kind:
            return self.values
        if self.kind == "null":
            return pa.nulls(len(self.values), JsonValue.pa_type if kind == "json" else kind)
        return _json_array([JsonValue().encode_example(value) for value in self.values.to_pylist()])


def _json_array(texts: list[str | None]) -> pa.Array:
    return JsonValue().cast_storage(pa.array(texts, pa.string()))


def _piece(values: list[Any], name: str, before: int) -> _Piece:
    """The values of a column in consecutive rows, of which `before` is the number of rows before them."""
    types = {type(value) for value in values} - {type(None)}
    kind = "json" if types else "null"
    if len(types) == 1:
        (of_all,) = types
        if of_all is not int or all(value is None or value in _INT64 for value in values):
            kind = _ARROW_TYPES.get(of_all, "json")
    if kind == "json":
        values = [JsonValue().encode_example(value) for value in values]
    try:
        return _Piece(kind, _json_array(values) if kind == "json" else pa.array(values, kind))
    except UnicodeEncodeError:
        row = next(row for row, value in enumerate(values, start=before + 1) if value and not _is_unicode(value))
        raise ValueError(f"row {row}: column {name!r} has half of a surrogate pair, which is no character") from None


def _is_unicode(text: str) -> bool:
    try:
        return bool(text.encode())
    except UnicodeEncodeError:
        return False
