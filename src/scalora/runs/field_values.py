"""Values of a config by the types of their keys: what can only mean one thing is converted, all else is refused.

The libraries don't check the types of their own settings: a wrong one fails late, or means something else.
"""

from __future__ import annotations

import ast
import math
from typing import Any

from scalora.runs.type_words import alternatives, type_words

_KNOWN = {"str", "int", "float", "bool", "dict", "list", "tuple", "set", "Literal", "None"}
_LISTS = ("list", "tuple", "set")
_ANY = ast.Name("Any")


def converted(value: Any, annotation: str, *, nullable: bool = False) -> Any:
    """A value as its key's type wants it.

    A whole number such as ``1e3`` is an integer where one is wanted, and a single text or number is a list of one where
    only a list is possible.

    Args:
        value: a value as it was read from YAML.
        annotation: the type of the key, as Python source.
        nullable: whether null is allowed even if the type does not say so.

    Raises:
        ValueError: the value can't be of that type; says what to write instead.
    """
    if value is None and nullable:
        return None
    return _converted(value, ast.parse(annotation, mode="eval").body)


def _converted(value: Any, annotation: ast.expr) -> Any:
    types: dict[str, ast.expr] = {}
    for name, part in alternatives(annotation):
        types.setdefault(name.lower() if name in ("List", "Dict", "Tuple", "Set") else name, part)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("write a finite number")
    if "Any" in types or any(type(value) is type(literal) and value == literal for literal in _literals(types)):
        return _plain(value)
    if value is None and "None" in types:
        return value
    found = _of_type(value, types)
    if found is not None:
        return found
    for name in _LISTS:  # the last resort, so that it is one only where nothing else fits
        if name in types and isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return _list([value], types[name])
    raise ValueError(f"write {_wanted(value, types, annotation)}")


def _of_type(value: Any, types: dict[str, ast.expr]) -> Any:
    """The value as one of the types; None if it is of none of them."""
    other = bool(set(types) - _KNOWN)  # an enumeration or a class of settings: the library itself checks those
    if isinstance(value, bool):
        return value if "bool" in types else None
    if isinstance(value, float) and "float" not in types:
        return int(value) if "int" in types and value.is_integer() else None
    if isinstance(value, (int, float)):
        return value if {"int", "float"} & set(types) else None
    if isinstance(value, str):
        return value if "str" in types or other or _may_be_literal(value, types) else None
    if isinstance(value, dict):
        return _mapping(value, types["dict"]) if "dict" in types else (_plain(value) if other else None)
    if isinstance(value, list):
        return next((_list(value, types[name]) for name in _LISTS if name in types), _plain(value) if other else None)
    return None


def _plain(value: Any) -> Any:
    """The value of a key that takes anything, of which the numbers in it must be numbers all the same."""
    if isinstance(value, dict):
        return {key: _converted(inner, _ANY) for key, inner in value.items()}
    return [_converted(inner, _ANY) for inner in value] if isinstance(value, list) else value


def _literals(types: dict[str, ast.expr]) -> list[Any]:
    part = types.get("Literal")
    if not isinstance(part, ast.Subscript):
        return []
    elements = part.slice.elts if isinstance(part.slice, ast.Tuple) else [part.slice]
    return [ast.literal_eval(element) for element in elements]


def _may_be_literal(value: str, types: dict[str, ast.expr]) -> bool:
    """Whether a text is one of the texts allowed, or may be one that the type only describes."""
    if "Literal" in types and "bool" in types:
        return value.lower() not in ("yes", "no", "on", "off")
    return value in _literals(types)


def _list(values: list[Any], part: ast.expr) -> list[Any]:
    typed = isinstance(part, ast.Subscript) and not isinstance(part.slice, ast.Tuple)
    inner = part.slice if typed else _ANY  # type: ignore[attr-defined]
    return [_converted(value, inner) for value in values]


def _mapping(values: dict[str, Any], part: ast.expr) -> dict[str, Any]:
    typed = isinstance(part, ast.Subscript) and isinstance(part.slice, ast.Tuple)
    inner = part.slice.elts[-1] if typed else _ANY  # type: ignore[attr-defined]
    return {key: _converted(value, inner) for key, value in values.items()}


def _wanted(value: Any, types: dict[str, ast.expr], annotation: ast.expr) -> str:
    names = set(types) - {"None"}
    if "bool" in names and (names == {"bool"} or isinstance(value, str)):
        return "true or false"
    if names <= {"int", "float"}:
        return "a whole number" if names == {"int"} and not isinstance(value, str) else "a number"
    if names == {"str"} and not isinstance(value, (dict, list)) and value is not None:
        return "a text, in quotes if it looks like something else"
    return f"one of: {type_words(ast.unparse(annotation))}"
