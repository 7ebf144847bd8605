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


def alternatives(annotation: ast.expr) -> list[tuple[str, ast.expr]]:
    """The members of a union, or the type itself, each with its name without what is in brackets.

    Args:
        annotation: the type, as a parsed expression.
    """
    parts = _alternatives(annotation)
    return [(_last_name(part.value if isinstance(part, ast.Subscript) else part), part) for part in parts]


def _words(annotation: ast.expr, named: Sequence[str]) -> str:
    found: list[str] = []
    for outer, part in alternatives(annotation):
        if isinstance(part, ast.Subscript) and outer == "list":
            found.append(f"list of {_words(part.slice, named)}")
        elif isinstance(part, ast.Subscript) and outer == "Literal":
            values = [ast.literal_eval(element) for element in _elements(part.slice)]
            found += [value if isinstance(value, str) else json.dumps(value) for value in values]
        elif outer in _WORDS:
            found += _WORDS[outer]
        else:
            found += named or [ast.unparse(part)]
    if named and "text" in found:
        found.remove("text")  # the values' own type
    return " | ".join(sorted(dict.fromkeys(found), key=lambda word: word == "null"))


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
    last = ast.unparse(name).rpartition(".")[2]
    return "None" if last == "NoneType" else last
