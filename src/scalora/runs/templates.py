"""Makes prompts and answers of any columns: a Jinja template each, as the hub's data sets need them.

Jinja is the language of chat templates. The templates come from a config and run in its sandbox.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

from datasets import Dataset
from jinja2 import StrictUndefined, Template, TemplateError, UndefinedError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from scalora.runs.errors import InputError
from scalora.runs.names import listed, row_name
from scalora.runs.sections import DataSettings
from scalora.saving.errors import short_repr

TEMPLATES = ("prompt", "completion", "choices", "answer")
"""The keys of the section ``data`` that are templates; the columns that they make have the same names."""

_SHOWN = 60  # characters of a value that an error shows

Maker = Callable[[Mapping[str, Any], str], dict[str, Any]]
"""Makes the columns of the templates from a row, given where it stands."""

_Sources = tuple[tuple[str, str], ...]  # keys and templates


def maker(data: DataSettings) -> Maker | None:
    """What makes the columns of a config's templates from a row; None if it has no templates.

    Args:
        data: the section ``data`` of the config.

    Raises:
        InputError: a template can't be read.
    """
    sources = _sources(data)
    return partial(_made, _compiled(sources)) if sources else None


def templated(rows: Dataset, name: str, data: DataSettings) -> Dataset:
    """The examples as a config's templates make them of their columns; as they are without templates.

    Args:
        rows: the examples, with any columns.
        name: file or hub id of the data, for errors.
        data: the section ``data`` of the config.

    Raises:
        InputError: a template can't be read, or can't be filled from a row.
    """
    sources = _sources(data)
    if not sources:
        return rows
    _compiled(sources)
    # By a function of the module and plain texts, which datasets has the same digest of in every process: the runs of a
    # study then share what is made.
    return rows.map(
        _filled,
        with_indices=True,
        fn_kwargs={"name": name, "sources": sources},
        remove_columns=rows.column_names,
        desc="Filling templates",
    )


def _sources(data: DataSettings) -> _Sources:
    return tuple((key, getattr(data, key)) for key in TEMPLATES if getattr(data, key) is not None)


@lru_cache(maxsize=32)
def _compiled(sources: _Sources) -> Mapping[str, Template]:
    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, keep_trailing_newline=True, finalize=_not_missing
    )
    templates = {}
    for key, source in sources:
        try:
            templates[key] = environment.from_string(source)
        except TemplateError as error:
            raise InputError(f"data.{key} is not a template: {error}") from None
    return templates


def _not_missing(value: Any) -> Any:
    """A value that a template writes. Rows that lack a column have None there, as have those with null."""
    if value is None:
        raise UndefinedError("a value is null, or the row has none (default('', true) puts another in its place)")
    return value


def _filled(row: dict[str, Any], place: int, name: str, sources: _Sources) -> dict[str, Any]:
    return _made(_compiled(sources), row, row_name(name, place))


def _made(templates: Mapping[str, Template], row: Mapping[str, Any], where: str) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, template in templates.items():
        try:
            made[key] = template.render(**row)
        except TemplateError as error:
            raise InputError(
                f"{where}: data.{key} can't be filled: {error}; the columns are {listed([*row])}"
            ) from None
        except Exception as error:  # whatever a filter or method of a value raises
            raise InputError(f"{where}: data.{key} can't be filled: {type(error).__name__}: {error}") from None
    if "choices" in made:
        made["choices"] = _list(made["choices"], where)
    return made


def _list(text: str, where: str) -> list[str]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(choice, str) for choice in found):
        raise InputError(
            f"{where}: data.choices makes {short_repr(text, _SHOWN)}, not a JSON list of texts: end it with | tojson"
        )
    return found
