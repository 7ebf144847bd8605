"""Fields of the libraries' dataclasses, read from their source: importing PEFT, Transformers or TRL takes seconds.

A class is followed to its definition, and to those of its bases, through the imports of the modules on the way. Where
the source can't be followed, the class is imported after all, with the same result.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from importlib import import_module
from importlib.util import find_spec, resolve_name
from pathlib import Path
from typing import Any, Final, NamedTuple

UNKNOWN: Final = ...
"""In place of a default that is missing, or computed, or an object."""

_HEADINGS = ("Args", "Attributes", "Parameters", "Raises", "Returns", "Example", "Examples", "Note")
_DOCUMENTED = re.compile(r"(\w+) ?(?:\(.*\))?:(?:\s+(.*))?")
_UNCAPITALISED = re.compile(r"\A[a-z]+(?= )")  # a plain word, not a name such as lora_B
_PLAIN = (str, int, float, bool, list, dict, tuple, type(None))
_NO_FIELD = re.compile(r"(\w+\.)?(ClassVar|InitVar|KW_ONLY)\b")


@dataclass(frozen=True)
class LibraryField:
    """A field of a dataclass.

    Attributes:
        name: name of the field.
        annotation: its type, as Python source.
        default: its default value, if that is plain data; else `UNKNOWN`.
        help: its meaning; empty if the class does not document it.
        module: dotted name of the module that defines the field, where the names in `annotation` are known.
    """

    name: str
    annotation: str
    default: Any
    help: str
    module: str


class _Source(NamedTuple):
    """A parsed module, with its name and that of its package."""

    module: str
    package: str
    tree: ast.Module


class _UnreadableError(Exception):
    """The source can't be followed."""


# What finding, reading and parsing source can raise.
_FAILURES = (_UnreadableError, ImportError, OSError, RecursionError, SyntaxError, ValueError)


@cache
def dataclass_fields(module: str, name: str) -> Mapping[str, LibraryField]:
    """The fields of a dataclass, by name and in order.

    Args:
        module: dotted name of a module in which the class can be found, such as ``"peft"``.
        name: name of the class, such as ``"LoraConfig"``.

    Raises:
        ImportError: the module is not installed.
    """
    try:
        source, definition = _definition(module, name)
        return _read_fields(source, definition)
    except _FAILURES:
        return _imported_fields(module, name)


def named_values(field: LibraryField) -> tuple[str, ...]:
    """The values of the enumerations and of the aliases of `Literal` that a field's annotation names.

    Args:
        field: one of `dataclass_fields`.

    Returns:
        The values in order; none if the annotation names nothing of the kind.
    """
    names = [node.id for node in ast.walk(ast.parse(field.annotation, mode="eval")) if isinstance(node, ast.Name)]
    return tuple(value for name in names if not hasattr(builtins, name) for value in _values(field.module, name))


def _definition(module: str, name: str) -> tuple[_Source, ast.ClassDef | ast.Assign]:
    """The statement that defines a name, and the module in which it stands."""
    source = _source(module)
    found: list[ast.ClassDef | ast.Assign] = []
    origins = set()
    for statement in _statements(source.tree.body):
        if isinstance(statement, ast.ImportFrom):
            where = resolve_name("." * statement.level + (statement.module or ""), source.package)
            origins |= {(where, alias.name) for alias in statement.names if name == (alias.asname or alias.name)}
        elif isinstance(statement, (ast.Assign, ast.ClassDef)) and name in _defined_names(statement):
            found.append(statement)
    if len(found) == 1 and not origins:
        return source, found[0]
    if len(origins) == 1 and not found:
        return _definition(*origins.pop())
    raise _UnreadableError(f"{name} is not defined once in {module}")


@cache
def _source(module: str) -> _Source:
    top, *rest = module.split(".")
    spec = find_spec(top)
    if spec is None or not spec.submodule_search_locations:
        raise _UnreadableError(f"{top} is not a package with source files")
    for location in spec.submodule_search_locations:
        path = Path(location, *rest)
        for file, package in ((path / "__init__.py", module), (path.with_suffix(".py"), module.rpartition(".")[0])):
            if file.is_file():
                return _Source(module, package, ast.parse(file.read_bytes()))
    raise _UnreadableError(f"{module} has no source file")


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a body and of the blocks in it, but not of the functions and classes."""
    for statement in body:
        yield statement
        if not isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            for block in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(statement, block, ()))
            for handler in getattr(statement, "handlers", ()):
                yield from _statements(handler.body)


def _defined_names(statement: ast.Assign | ast.ClassDef) -> list[str | None]:
    if isinstance(statement, ast.ClassDef):
        return [statement.name]
    return [_identifier(target) for target in statement.targets]


def _identifier(node: ast.AST) -> str | None:
    """The last part of a plain or dotted name; None for other expressions."""
    if isinstance(node, ast.Name):
        return node.id
    return node.attr if isinstance(node, ast.Attribute) else None


def _read_fields(source: _Source, definition: ast.stmt) -> dict[str, LibraryField]:
    if not isinstance(definition, ast.ClassDef):
        raise _UnreadableError(f"line {definition.lineno} of {source.module} is not a class")
    found: dict[str, LibraryField] = {}
    for base in reversed(definition.bases):
        found |= _inherited(source, base)
    decorators = {
        _identifier(decorator.func if isinstance(decorator, ast.Call) else decorator)
        for decorator in definition.decorator_list
    }
    if decorators - {"dataclass"}:
        raise _UnreadableError(f"{definition.name} has decorators of unknown effect")
    return found | _own_fields(source, definition) if decorators else found


def _inherited(source: _Source, base: ast.expr) -> dict[str, LibraryField]:
    if not isinstance(base, ast.Name):
        raise _UnreadableError(f"a base in {source.module} is not a plain name")
    if hasattr(builtins, base.id):
        return {}
    for statement in _statements(source.tree.body):
        if isinstance(statement, ast.ImportFrom) and base.id in (
            alias.asname or alias.name for alias in statement.names
        ):
            top = (statement.module or "").partition(".")[0]
            if not statement.level and top in sys.stdlib_module_names:
                return {}  # ABC, Generic and the like have no fields
    return _read_fields(*_definition(source.module, base.id))


def _own_fields(source: _Source, definition: ast.ClassDef) -> dict[str, LibraryField]:
    documented = _documented_arguments(ast.get_docstring(definition) or "")
    found = {}
    for statement, following in zip(definition.body, [*definition.body[1:], None], strict=True):
        if not isinstance(statement, ast.AnnAssign):
            if any(isinstance(inner, ast.AnnAssign) for inner in _statements([statement])):
                raise _UnreadableError(f"{definition.name} declares a field on a condition")
            continue
        name = _identifier(statement.target)
        annotation = statement.annotation
        text = annotation.value if isinstance(annotation, ast.Constant) else ast.unparse(annotation)
        if name is None or not isinstance(text, str):
            raise _UnreadableError(f"line {statement.lineno} of {source.module} does not declare a plain field")
        if _NO_FIELD.match(text):
            continue
        default, help_text = _default_and_help(statement.value)
        if not help_text:
            help_text = _attribute_docstring(following) or documented.get(name, "")
            help_text = _UNCAPITALISED.sub(lambda word: word[0].capitalize(), help_text, count=1)
        found[name] = LibraryField(name, text, default, " ".join(help_text.split()), source.module)
    return found


def _default_and_help(value: ast.expr | None) -> tuple[Any, str]:
    """The default and the help text of a field, from the right-hand side of its declaration."""
    if not (isinstance(value, ast.Call) and _identifier(value.func) == "field"):
        return _literal(value), ""
    given = {keyword.arg: keyword.value for keyword in value.keywords}
    factory = _identifier(given.get("default_factory", value))
    default = {"list": [], "dict": {}}.get(factory or "", _literal(given.get("default")))
    metadata = given.get("metadata")
    entries = zip(metadata.keys, metadata.values, strict=True) if isinstance(metadata, ast.Dict) else ()
    texts = [_literal(text) for key, text in entries if isinstance(key, ast.Constant) and key.value == "help"]
    return default, texts[0] if texts and isinstance(texts[0], str) else ""


def _attribute_docstring(statement: ast.stmt | None) -> str:
    """The text that a statement consists of; empty if it is another statement."""
    text = _literal(statement.value) if isinstance(statement, ast.Expr) else None
    return text if isinstance(text, str) else ""


def _literal(value: ast.expr | None) -> Any:
    try:
        return UNKNOWN if value is None else ast.literal_eval(value)
    except (TypeError, ValueError):
        return UNKNOWN


def _documented_arguments(docstring: str) -> dict[str, str]:
    """What a docstring says of each argument, in Google's style or Transformers': ``name (type, ...): meaning``."""
    found: dict[str, str] = {}
    current, depth = "", 0
    for line in docstring.splitlines():
        text = line.strip()
        indent = len(line) - len(line.lstrip())
        if not text:
            continue
        if current and indent > depth:
            found[current] += f" {text}"
            continue
        match = _DOCUMENTED.fullmatch(text)
        current = ""
        if match and match[1] not in _HEADINGS:
            current, depth = match[1], indent
            found[current] = match[2] or ""
    return found


def _values(module: str, name: str) -> list[str]:
    """The values of an enumeration, or of an alias of `Literal`; none of anything else."""
    try:
        _, definition = _definition(module, name)
    except _FAILURES:
        return []
    if isinstance(definition, ast.Assign):
        alias = definition.value
        if not isinstance(alias, ast.Subscript) or _identifier(alias.value) != "Literal":
            return []
        members = alias.slice.elts if isinstance(alias.slice, ast.Tuple) else [alias.slice]
    elif any((_identifier(base) or "").endswith("Enum") for base in definition.bases):
        members = [statement.value for statement in definition.body if isinstance(statement, ast.Assign)]
    else:
        return []
    return [member.value for member in members if isinstance(member, ast.Constant) and isinstance(member.value, str)]


def _imported_fields(module: str, name: str) -> dict[str, LibraryField]:
    cls = getattr(import_module(module), name)
    found = {}
    for field in fields(cls):
        annotation = field.type if isinstance(field.type, str) else inspect.formatannotation(field.type)
        default = field.default
        if field.default_factory in (list, dict):
            default = field.default_factory()
        home = next(base for base in cls.__mro__ if field.name in inspect.get_annotations(base))
        found[field.name] = LibraryField(
            field.name,
            annotation,
            default if type(default) in _PLAIN else UNKNOWN,
            " ".join(field.metadata.get("help", "").split()),
            home.__module__,
        )
    return found
