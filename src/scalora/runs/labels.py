"""The classes and numbers that examples are labelled with: named as they are written, and refused where unclear."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from scalora.runs.errors import InputError
from scalora.runs.names import row_name
from scalora.saving.errors import short_repr

SimilarLabels = Literal["refuse", "merge", "separate"]

_SHOWN = 60  # characters of a label that an error shows
_LISTED = 20  # an error lists so many classes at most
_LARGEST = 3.4e38  # labels become float32, in which a larger number is infinite


class _Spelling(NamedTuple):
    """A way in which a class is written: 1, 1.0 and "1" of JSON are three.

    Attributes:
        type: the type of the label.
        name: what the class is called.
    """

    type: type
    name: str


def class_names_in(values: Iterable[Any], name: str, column: str, similar: SimilarLabels) -> list[str]:
    """The names of the classes in a training set: in the order of the numbers if all are integers, else of the letters.

    A text is its own name. Numbers and truth values are called as JSON writes them.

    Args:
        values: the label of each example.
        name: file or hub id of the data, for errors.
        column: the column with the labels, for errors.
        similar: what labels are that differ in nothing but case, white space or JSON's quotes: an error, one class with
            the name that comes first without white space at its ends, or a class each.

    Raises:
        InputError: an example has no label or no class name, labels are similar, or there is only one class.
    """
    first: dict[_Spelling, int] = {}
    for row, value in enumerate(values, start=1):
        first.setdefault(_spelling(value, row_name(name, row - 1), column), row)
    forms: dict[str, list[_Spelling]] = {}
    for spelling in first:
        forms.setdefault(spelling.name if similar == "separate" else _form(spelling), []).append(spelling)
    if similar == "merge":
        names = [spellings[0].name.strip() for spellings in forms.values()]
    else:
        if unclear := [spellings for spellings in forms.values() if len(spellings) > 1]:
            written = " and ".join(f"{_written(s)} (row {first[s]:,})" for s in unclear[0][:_LISTED])
            either = "" if similar == "separate" else "or separate (a class each) "
            raise InputError(
                f"data {name!r}, column {column!r}: the labels {written} differ in nothing but case, white space or "
                f"quotes: write them alike, or set data.similar_labels to merge (one class) {either}".rstrip()
            )
        names = [spelling.name for spelling in first]
    if len(names) < 2:
        raise InputError(f"data {name!r} has only one class in column {column!r}: {names[0]!r}")
    if all(re.fullmatch(r"-?[0-9]+", name) for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


class ClassIndex:
    """Finds the place of a label among the classes.

    Args:
        names: names of the classes in order.
        similar: as in `class_names_in`.
    """

    def __init__(self, names: list[str], similar: SimilarLabels) -> None:
        self._names = names
        self._places = {name: place for place, name in enumerate(names)}
        self._similar = {_bare(name): place for place, name in reversed(list(enumerate(names)))}
        self._merges = similar == "merge"

    def place(self, value: Any, where: str, column: str) -> int:
        """The place of the class that a label names.

        Args:
            value: the label.
            where: names the data and the row, for errors.
            column: the column with the labels, for errors.

        Raises:
            InputError: it names none of the classes.
        """
        label = _spelling(value, where, column).name
        if label in self._places:
            return self._places[label]
        near = self._similar.get(_bare(label))
        if near is not None and self._merges:
            return near
        more = f", … ({len(self._names):,} in all)" if len(self._names) > _LISTED else ""
        hint = "" if near is None else f"; write {self._names[near]!r}, or set data.similar_labels to merge"
        raise InputError(
            f"{where}: the label {short_repr(value, _SHOWN)} is none of the classes "
            f"{', '.join(self._names[:_LISTED])}{more}{hint}"
        )


def number(value: Any, where: str, column: str) -> float:
    """The number that an example of a regression is labelled with.

    Args:
        value: a number, or a text with one.
        where: names the data and the row, for errors.
        column: the column with the labels, for errors.

    Raises:
        InputError: it is no number, or not finite in float32.
    """
    found = math.nan
    # Python would also read 1_000 as a number, and true as 1.
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\s*", value):
        found = float(value)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        found = float(value) if abs(value) <= _LARGEST else math.inf
    if not abs(found) <= _LARGEST:
        raise InputError(f"{where}: column {column!r} is {short_repr(value, _SHOWN)}, not a finite number")
    return found


def _spelling(value: Any, where: str, column: str) -> _Spelling:
    if value is None:
        raise InputError(f"{where}: column {column!r} has no value")
    if isinstance(value, bool):
        return _Spelling(bool, str(value).lower())
    if isinstance(value, str) and value.strip():
        return _Spelling(str, value)
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return _Spelling(type(value), str(value))
    raise InputError(f"{where}: column {column!r} is {short_repr(value, _SHOWN)}, not a class name or number")


def _form(spelling: _Spelling) -> str:
    """What similar spellings have in common."""
    return _bare(spelling.name.removesuffix(".0") if spelling.type is float else spelling.name)


def _written(spelling: _Spelling) -> str:
    return repr(spelling.name) if spelling.type is str else spelling.name


def _bare(name: str) -> str:
    """A name without case, white space and what can't be seen."""
    text = unicodedata.normalize("NFC", name).casefold()
    return "".join(c for c in text if not c.isspace() and unicodedata.category(c) != "Cf")
