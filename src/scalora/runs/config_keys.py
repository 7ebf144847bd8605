"""The keys of a config with their types, defaults and meaning, from the declarations.

Those are `Settings`, `ScaLoraConfig`, the classes of the methods, and the classes of PEFT, Transformers and TRL.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from scalora.config import DEFAULT_LEARNING_RATE, LORA_DEFAULTS, default_weight_rate
from scalora.rivals import METHODS
from scalora.runs.errors import InputError
from scalora.runs.library_fields import UNKNOWN, LibraryField, named_values
from scalora.runs.settings import Settings, require_method, section_fields
from scalora.runs.tasks import RATE_SHARES, Task
from scalora.runs.training_defaults import DEPENDENT_DEFAULTS, TRAINING_DEFAULTS, takes_pair_adamw
from scalora.runs.type_words import type_words
from scalora.runs.yaml_file import yaml_dump

COMMON_KEYS = {
    "lora": ("r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save"),
    "training": (
        "learning_rate",
        "num_train_epochs",
        "max_steps",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "max_length",
        "beta",
        "loss_type",
        "num_generations",
        "max_completion_length",
        "lr_scheduler_type",
        "warmup_steps",
        "weight_decay",
        "max_grad_norm",
        "optim",
        "seed",
        "bf16",
        "logging_steps",
        "eval_strategy",
        "per_device_eval_batch_size",
        "save_strategy",
        "report_to",
    ),
}
"""Of the many keys of the sections that are other libraries' classes, those that are set most."""


_MODE = ("matrix", "default: matrix if the optimizer can be PairAdamW; the library's: auto")


def _rate_by_width(method: str | None) -> tuple[float, str]:
    """An example of the default learning rate of `scalora.PairAdamW`, and its words."""
    signs = method == "block_signs"
    narrow, wide = (default_weight_rate(width, block_signs=signs) for width in (576, 4096))
    words = f"{576 * narrow:.2g} by the model's hidden size: {narrow:.2g} for 576, {wide:.2g} for 4,096"
    return narrow, words


class Key(NamedTuple):
    """A key of a config.

    Attributes:
        name: name of the key.
        type: its type, in words.
        value: its default value; an example of a value where the default depends on other things.
        default: its default, in words.
        help: its meaning.
        fixed: whether setting the key to `value` is the same as leaving it out.
    """

    name: str
    type: str
    value: Any
    default: str
    help: str
    fixed: bool = True


class Section(NamedTuple):
    """A section of a config.

    Attributes:
        name: name of the section; empty for the top level.
        help: its meaning.
        keys: its keys.
    """

    name: str
    help: str
    keys: list[Key]


def config_sections(
    task: Task = "sft", method: str | None = None, *, libraries: Literal["none", "common", "all"] = "none"
) -> list[Section]:
    """The sections of a config, the top level first.

    Args:
        task: task of the run.
        method: method of the run, whose class is imported; None is ScaLoRA and imports nothing.
        libraries: which keys of the sections ``lora`` and ``training`` are wanted.

    Raises:
        InputError: the method is unknown, or a package that it needs is not installed.
    """
    if method is not None:
        require_method(method)
    chosen = {"task": task, "method": method or "scalora"}
    top, sections = Section("", "", []), []
    for name, info in Settings.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            keys = [_own_key(key, inner) for key, inner in info.annotation.model_fields.items()]
        elif name in COMMON_KEYS:
            keys = _library_keys(name, task, method, libraries)
        elif info.default_factory is dict:
            keys = [_field_key(field, {}) for field in section_fields(name, task, chosen["method"]).values()]
            if name == "scalora" and chosen["method"] == "scalora" and takes_pair_adamw(task, "scalora"):
                keys = [_dependent(key, *_MODE) if key.name == "mode" else key for key in keys]
        else:
            key = _own_key(name, info)
            top.keys.append(key._replace(value=chosen.get(name, key.value)))
            continue
        sections.append(Section(name, info.description or "", keys))
    return [top, *sections]


def our_defaults(section: str, method: str | None = None, task: Task = "sft") -> dict[str, Any]:
    """The keys of ``lora`` or ``training`` for which scalora has a default of its own, whatever the rest of the config.

    The learning rate of `scalora.PairAdamW` depends on the model and is not among them.

    Args:
        section: name of the section.
        method: method of the run; None is ScaLoRA.
        task: task of the run.
    """
    if section == "lora":
        return LORA_DEFAULTS
    rate = DEFAULT_LEARNING_RATE if method is None else METHODS[method].learning_rate
    if rate is None or takes_pair_adamw(task, method or "scalora"):
        return TRAINING_DEFAULTS
    return {"learning_rate": rate * RATE_SHARES.get(task, 1.0), **TRAINING_DEFAULTS}


def value_text(value: Any) -> str:
    """A value as in YAML, but a text without quotes."""
    return value if isinstance(value, str) else yaml_text(value)


def yaml_text(value: Any) -> str:
    """A value in YAML, on one line."""
    return yaml_dump(value, default_flow_style=True, width=math.inf).removesuffix("...\n").strip()


def _own_key(name: str, info: FieldInfo) -> Key:
    words = type_words(inspect.formatannotation(info.annotation))
    for bound in info.metadata:
        for limit, sign in (("gt", ">"), ("ge", ">=")):
            if hasattr(bound, limit):
                words = words.replace("integer", f"integer {sign} {getattr(bound, limit)}")
    if info.is_required():
        return Key(name, words, None, "required", info.description or "")
    value = info.get_default(call_default_factory=True)
    return Key(name, words, value, f"default: {value_text(value)}", info.description or "")


def _library_keys(
    section: str, task: Task, method: str | None, libraries: Literal["none", "common", "all"]
) -> list[Key]:
    """The keys of a section that is a class of another library, the common ones first."""
    if libraries == "none":
        return []
    fields = section_fields(section, task)
    names = [name for name in COMMON_KEYS[section] if name in fields]
    if libraries == "all":
        names += [name for name in fields if name not in names]
    ours = our_defaults(section, method, task)
    by_method = _set_by_method(section, method)
    keys = []
    for name in names:
        key = _field_key(fields[name], ours)
        if name in by_method:
            key = _dependent(key, by_method[name], f"set by the method {method}")
        elif name in DEPENDENT_DEFAULTS:
            value, words = DEPENDENT_DEFAULTS[name]
            key = _dependent(key, value, f"default: {words}")
        elif name == "learning_rate" and takes_pair_adamw(task, method or "scalora"):
            value, words = _rate_by_width(method)
            key = _dependent(key, value, f"default of {method or 'scalora'}: {words}")
        elif name == "learning_rate":
            key = key._replace(default=key.default.replace("default", f"default of {method or 'scalora'}", 1))
        keys.append(key)
    return keys


def _dependent(key: Key, value: Any, words: str) -> Key:
    """A key whose default depends on other things, with an example of a value."""
    return key._replace(value=value, default=words, fixed=False)


def _field_key(field: LibraryField, ours: Mapping[str, Any]) -> Key:
    """The key that sets a field, with the default of scalora where it has one, else with the field's own."""
    words = type_words(field.annotation, named_values(field))
    value = ours.get(field.name, field.default)
    if value is UNKNOWN:
        return Key(field.name, words, None, "default: set by the library", field.help, fixed=False)
    default = f"default: {value_text(value)}"
    if value != field.default:
        default += f"; the library's: {value_text(field.default)}"
    return Key(field.name, words, value, default, field.help)


def _set_by_method(section: str, method: str | None) -> Mapping[str, Any]:
    """The keys of a section that a method sets."""
    if section != "training" or method is None:
        return {}
    try:
        return METHODS[method]().training_defaults()
    except ImportError as error:
        raise InputError(f"method={method!r}: {error}") from None
