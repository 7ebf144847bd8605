"""`StrictModel`: what the schemas of config and study files have in common."""

from __future__ import annotations

import inspect
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from scalora.runs.field_values import converted
from scalora.runs.paths import expanded


class StrictModel(BaseModel):
    """The keys of a file or section: no others, and their values by the rules of `scalora.runs.field_values`."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _of_its_type(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic alone would take true for 1, and yes for true in some fields and not in others."""
        field = cls.model_fields[str(info.field_name)]
        if value is None and field.default_factory is not None:
            return {}  # YAML reads a section as null if all of its keys are commented out
        if isinstance(value, dict) or (value is None and field.is_required()):
            return value  # sections have types of their own, and a required key is missing to pydantic
        annotation = inspect.formatannotation(field.annotation)
        try:
            return converted(value, annotation)
        except ValueError as error:
            if isinstance(value, str) and "Literal" in annotation:
                return value  # pydantic lists what there is to choose from
            raise PydanticCustomError("value", "{words}", {"words": str(error)}) from None


def expanded_field(value: str) -> str:
    """A path of a model's field with ``~`` and variables replaced, for validators.

    Args:
        value: the text of the config.

    Raises:
        PydanticCustomError: there is no such user or variable.
    """
    try:
        return expanded(value)
    except ValueError as error:
        raise PydanticCustomError("path", "{words}", {"words": str(error)}) from None
