"""A column type of datasets whose values are any JSON, read back as they were written."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
from datasets import Json
from datasets.features.features import register_feature


@dataclass
class JsonValue(Json):  # type: ignore[misc]
    """Values of any JSON type, stored as their text.

    As a struct of Arrow, each object would get the keys of all others. The type `datasets.Json` rounds numbers, and
    takes a text that happens to be JSON for what it says.
    """

    _type: str = field(default="ScaloraJson", init=False, repr=False)

    def encode_example(self, example_data: Any) -> str | None:
        """The text that is stored.

        Args:
            example_data: any JSON value.
        """
        return None if example_data is None else json.dumps(example_data, ensure_ascii=False)

    def decode_example(self, example_data: str | None, token_per_repo_id: Any = None) -> Any:
        """The value that was stored.

        Args:
            example_data: the stored text.
            token_per_repo_id: not used; datasets gives it to every type.
        """
        return None if example_data is None else json.loads(example_data)

    def cast_storage(self, storage: pa.Array) -> pa.Array:
        """The stored texts as an array of Arrow's type for JSON.

        Args:
            storage: the texts, of that type or of type string.
        """
        if storage.type == self.pa_type:
            return storage
        return pa.ExtensionArray.from_storage(self.pa_type, storage.cast(pa.string()))


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # datasets 5.2 calls the registration of types experimental
    register_feature(JsonValue, "ScaloraJson")
