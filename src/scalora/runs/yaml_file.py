"""YAML as people write configs: files, the ``--key value`` words of a command line, and texts that read back the same.

Plain scalars are read as YAML 1.2 and Python read them, not as YAML 1.1: ``1e-3`` and ``1_000`` are numbers, ``no`` and
``on`` texts, ``12:30`` and dates texts too. What two readers would read as two things is refused with its line.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from scalora.runs.errors import InputError

_TAG = "tag:yaml.org,2002:"
_LEADING_ZERO = "!leading-zero"
_DIGITS = "[0-9]+(_[0-9]+)*"

# Tag, pattern and possible first characters of the plain scalars that are not texts.
_SCALARS = (
    (f"{_TAG}null", r"(~|null|Null|NULL|)", ["~", "n", "N", ""]),
    (f"{_TAG}bool", r"(true|True|TRUE|false|False|FALSE)", list("tTfF")),
    (
        f"{_TAG}int",
        r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*|0o[0-7]+|0x[0-9a-fA-F]+|0b[01]+)",
        list("-+0123456789"),
    ),
    # To YAML 1.1 and C it is octal, to YAML 1.2 decimal, to Python an error.
    (_LEADING_ZERO, r"[-+]?0[0-9_]*[0-9]", list("-+0")),
    (
        f"{_TAG}float",
        rf"[-+]?({_DIGITS}\.({_DIGITS})?|\.{_DIGITS}|{_DIGITS}(?=[eE]))([eE][-+]?[0-9]+)?",
        list("-+.0123456789"),
    ),
    (f"{_TAG}float", r"([-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))", list("-+.")),
    (f"{_TAG}merge", "<<", ["<"]),
)
_PLAIN = {f"{_TAG}{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map", "merge")}


class _Loader(yaml.SafeLoader):
    """Reads plain scalars by `_SCALARS`."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - the parent's attribute


class _Dumper(yaml.SafeDumper):
    """Quotes every text that `_Loader` or a reader of YAML 1.1 would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write what occurs twice out twice, as people would."""
        return True


for _tag, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(f"^({_pattern})$"), _first)


def _integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(node.value, 0)


def _number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    return float(re.sub(r"\.(?=inf|nan)", "", node.value.lower()))


_Loader.add_constructor(f"{_TAG}int", _integer)
_Loader.add_constructor(f"{_TAG}float", _number)


class _Problem(ValueError):
    """What is wrong with a text, without its name."""


def read_yaml(path: Path, kind: str) -> dict[str, Any]:
    """The keys and values of a YAML file; empty for an empty file.

    Args:
        path: path of the file.
        kind: name of the kind of file for error messages: ``"config"`` or ``"study"``.

    Raises:
        InputError: the file is missing, is not YAML, is not a mapping, has a key twice, or holds something that is not
            plain data.
    """
    if not path.is_file():
        raise InputError(f"{kind} file {str(path)!r} does not exist")
    name = f"{kind} file {str(path)!r}"
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{name} is not valid YAML: {error}") from None
    except _Problem as problem:
        raise InputError(f"{name}: {problem}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"{name} must hold keys and values, not a {type(content).__name__}")
    return content


def parse_yaml(text: str) -> Any:
    """The plain data that a text in YAML stands for; None for an empty text.

    Args:
        text: the text.

    Raises:
        ValueError: a key is there twice, or a value is ambiguous or not plain data.
        yaml.YAMLError: it is not YAML.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node)
        return _unshared(loader.construct_document(node))
    except RecursionError:
        raise _Problem("it is nested too deeply") from None
    finally:
        loader.dispose()


def yaml_dump(content: Any, **style: Any) -> str:
    """Write plain data as YAML that `read_yaml`, and any other reader, reads back the same.

    Args:
        content: nested keys and values.
        **style: further arguments of `yaml.dump`, such as ``width``.
    """
    text: str = yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, **style)
    return text


def parsed_overrides(words: Sequence[str], options: Sequence[str] = ()) -> list[tuple[str, Any]]:
    """Parse the words ``--key value`` and ``--key=value`` into dotted keys and values.

    A value that begins with a bracket, brace or quotation mark is YAML. Any other is one scalar, so that ``#``, ``*``
    or ``: `` in a text needs no quotes.

    Args:
        words: the words of the command line that are left over when its options have been parsed.
        options: the options of the command, such as ``"--overwrite"``, to suggest for a mistyped one.

    Raises:
        InputError: a word is not a key, a key has no value, or a value is not YAML.
    """
    pairs = []
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        if not word.startswith("--"):
            raise InputError(f"expected --key value, got {word!r}")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not remaining or remaining[0].startswith("--"):
                near = difflib.get_close_matches(word, options, n=1)
                raise InputError(
                    f"unknown option {word!r}: did you mean {near[0]!r}?" if near else f"{word} needs a value"
                )
            value = remaining.pop(0)
        if not value.strip():
            raise InputError(f"--{key} needs a value; null stands for none")
        try:
            pairs.append((key.replace("-", "_"), parse_yaml(value) if value.lstrip()[0] in "[{'\"" else _scalar(value)))
        except yaml.YAMLError as error:
            raise InputError(f"--{key} {value}: the value is not valid YAML: {error}") from None
        except _Problem as problem:
            raise InputError(f"--{key} {value}: {problem}") from None
    return pairs


def as_written(content: Mapping[str, Any], dotted: str) -> str:
    """A dotted key of the command line, in which hyphens have become underscores, as a file has its names.

    Args:
        content: the file's keys and values.
        dotted: the key with its sections, such as ``"methods.scalora_I.scalora.interval"``.

    Returns:
        The key with the names that the file has, such as ``"methods.scalora-I.scalora.interval"``.
    """
    first, dot, rest = dotted.partition(".")
    if first not in content:
        first = next((n for n in content if isinstance(n, str) and n.replace("-", "_") == first), first)
    inner = content.get(first)
    return f"{first}.{as_written(inner if isinstance(inner, dict) else {}, rest)}" if dot else first


def set_dotted(content: dict[str, Any], dotted: str, value: Any) -> None:
    """Set a key of a config, creating the sections it lies in.

    Args:
        content: nested keys and values, modified in place.
        dotted: the key with its sections, such as ``"training.max_steps"``.
        value: the new value.

    Raises:
        InputError: a key on the way to it is not a section.
    """
    *sections, key = dotted.split(".")
    for section in sections:
        if content.get(section) is None:
            content[section] = {}
        content = content[section]
        if not isinstance(content, dict):
            raise InputError(f"--{dotted}: {section!r} is not a section")
    content[key] = value


def refuse_repeated(keys: Sequence[str]) -> None:
    """Check that no key was set twice on a command line, itself or with the section it lies in.

    Args:
        keys: the dotted keys in the order in which they were set.

    Raises:
        InputError: one of them replaces another.
    """
    for index, later in enumerate(keys):
        for earlier in keys[:index]:
            if earlier == later:
                raise InputError(f"--{later} is given twice: give it once")
            if earlier.startswith(f"{later}."):
                raise InputError(f"--{later} replaces --{earlier}, which stands before it: give one of them")


def _scalar(word: str) -> Any:
    loader = _Loader("")
    text = word.strip()
    node = yaml.ScalarNode(loader.resolve(yaml.ScalarNode, text, (True, False)), text)  # type: ignore[no-untyped-call]
    _check(node)
    return loader.construct_document(node) if node.tag in _PLAIN - {f"{_TAG}merge", f"{_TAG}str"} else word


def _check(root: yaml.Node) -> None:
    """Raise `_Problem` for what YAML allows and a config does not."""
    seen: set[int] = set()

    def visit(node: yaml.Node, path: tuple[str, ...], above: tuple[int, ...]) -> None:
        if id(node) in above:
            raise _Problem(f"{_named(path)}{_line(node)} contains itself")
        if id(node) in seen:
            return
        seen.add(id(node))
        if node.tag == _LEADING_ZERO:
            raise _Problem(
                f"{_named(path)}{_line(node)} is {node.value}, which is octal to some and decimal to others: write the "
                "number without the leading zero, or a text in quotes"
            )
        if node.tag not in _PLAIN:
            raise _Problem(f"{_named(path)}{_line(node)} has the tag {node.tag!r}: only plain values can be used")
        if isinstance(node, yaml.ScalarNode) and node.tag in (f"{_TAG}int", f"{_TAG}float"):
            _require_number(node, path)
        for part, child in _children(node, path):
            visit(child, (*path, part), (*above, id(node)))

    visit(root, (), ())


def _children(node: yaml.Node, path: tuple[str, ...]) -> Iterator[tuple[str, yaml.Node]]:
    """The nodes in a node, each with its key or index."""
    if isinstance(node, yaml.SequenceNode):
        yield from ((str(index), child) for index, child in enumerate(node.value))
    if not isinstance(node, yaml.MappingNode):
        return
    first: dict[str, yaml.Node] = {}
    for key, child in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag not in (f"{_TAG}str", f"{_TAG}merge"):
            shown = repr(key.value) if isinstance(key, yaml.ScalarNode) else "a list or mapping"
            raise _Problem(f"{_named(path)}{_line(key)} has the key {shown}, which is not a text: write it in quotes")
        if (earlier := first.setdefault(key.value, key)) is not key:
            raise _Problem(
                f"the key {'.'.join((*path, key.value))!r} is there twice, on lines {earlier.start_mark.line + 1} and "
                f"{key.start_mark.line + 1}: merge the two"
            )
        yield key.value, child


def _require_number(node: yaml.ScalarNode, path: tuple[str, ...]) -> None:
    try:
        (_integer if node.tag.endswith("int") else _number)(_Loader, node)  # type: ignore[arg-type]
    except ValueError:
        raise _Problem(f"{_named(path)}{_line(node)} is {node.value!r}, which is not a number") from None


def _named(path: tuple[str, ...]) -> str:
    return f"{'.'.join(path)!r}" if path else "the value"


def _line(node: yaml.Node) -> str:
    return "" if node.start_mark is None else f" on line {node.start_mark.line + 1}"


def _unshared(value: Any) -> Any:
    """A copy in which no two keys share a list or mapping, as they do after an alias: setting one must not set both."""
    if isinstance(value, dict):
        return {key: _unshared(inner) for key, inner in value.items()}
    return [_unshared(inner) for inner in value] if isinstance(value, list) else value
