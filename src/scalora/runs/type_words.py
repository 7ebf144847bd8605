"""Types in words: ``Optional[list[str]]`` as "list of text | null"."""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence

_WORDS = {
    "str": ("text",),
    "int": ("integer",),
    "float": ("number",),
    "bool": ("true", "false"),
    "dict": ("mapping",),
    "None": ("null",),
    "Any": ("anything",),
}


def type_words(annotation: str, named: Sequence[str] = ()) -> str:
    """The alternatives of a type in the words of YAML, separated by bars.

    Args:
        annotation: the type, as Python source.
        named: the values of the enumeration that the type names, if it names one.
    """
    return _words(ast.parse(annotation, mode="eval").body, named)


def _words(annotation: ast.expr, named: Sequence[str]) -> str:
    alternatives: list[str] = []
    for part in _alternatives(annotation):
        outer = _last_name(part.value if isinstance(part, ast.Subscript) else part)
        if isinstance(part, ast.Subscript) and outer == "list":
            alternatives.append(f"list of {_words(part.slice, named)}")
        elif isinstance(part, ast.Subscript) and outer == "Literal":
            values = [ast.literal_eval(element) for element in _elements(part.slice)]
            alternatives += [value if isinstance(value, str) else json.dumps(value) for value in values]
        elif outer in _WORDS:
            alternatives += _WORDS[outer]
        else:
            alternatives += named or [ast.unparse(part)]
    if named and "text" in alternatives:
        alternatives.remove("text")  # the values' own type
    return " | ".join(sorted(dict.fromkeys(alternatives), key=lambda word: word == "null"))


def _alternatives(annotation: ast.expr) -> list[ast.expr]:
    """The members of a union, or the type itself."""
    if isinstance(annotation, ast.BinOp):
        return [*_alternatives(annotation.left), *_alternatives(annotation.right)]
    outer = _last_name(annotation.value) if isinstance(annotation, ast.Subscript) else ""
    if not isinstance(annotation, ast.Subscript) or outer not in ("Optional", "Union"):
        return [annotation]
    members = _elements(annotation.slice) + ([ast.Constant(None)] if outer == "Optional" else [])
    return [part for member in members for part in _alternatives(member)]


def _elements(index: ast.expr) -> list[ast.expr]:
    return index.elts if isinstance(index, ast.Tuple) else [index]


def _last_name(name: ast.expr) -> str:
    """The last part of a dotted name."""
    return ast.unparse(name).rpartition(".")[2]
