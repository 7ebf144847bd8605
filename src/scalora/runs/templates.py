"""Makes prompts and answers of any columns: a Jinja template each, as the hub's data sets need them.

Jinja is the language of chat templates. The templates come from a config and run in its sandbox.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from datasets import Dataset
from jinja2 import StrictUndefined, Template, TemplateError
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


def maker(data: DataSettings) -> Maker | None:
    """What makes the columns of a config's templates from a row; None if it has no templates.

    Args:
        data: the section ``data`` of the config.

    Raises:
        InputError: a template can't be read.
    """
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    templates: dict[str, Template] = {}
    for key in TEMPLATES:
        if (source := getattr(data, key)) is not None:
            try:
                templates[key] = environment.from_string(source)
            except TemplateError as error:
                raise InputError(f"data.{key} is not a template: {error}") from None
    return partial(_made, templates) if templates else None


def templated(rows: Dataset, name: str, data: DataSettings) -> Dataset:
    """The examples as a config's templates make them of their columns; as they are without templates.

    Args:
        rows: the examples, with any columns.
        name: file or hub id of the data, for errors.
        data: the section ``data`` of the config.

    Raises:
        InputError: a template can't be read, or can't be filled from a row.
    """
    make = maker(data)
    if make is None:
        return rows

    def fill(row: dict[str, Any], place: int) -> dict[str, Any]:
        return make(row, row_name(name, place))

    return rows.map(fill, with_indices=True, remove_columns=rows.column_names, desc="Filling templates")


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
