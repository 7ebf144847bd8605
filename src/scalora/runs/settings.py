"""What a config file may say: the schema, its defaults with their reasons, and overrides from the command line.

A flag beats the file, the file beats the default, and an unknown key stops the run.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from scalora.runs.errors import InputError

if TYPE_CHECKING:
    from scalora.rivals.method import Method

Task = Literal["sft", "classification", "regression"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class DataSettings(_Strict):
    """Where the examples are, and what their columns are called."""

    train: str | None = Field(None, description="jsonl, json, csv or parquet file, or hub id. Needed to train.")
    eval: str | None = Field(None, description="The same for evaluation; without it training does not evaluate.")
    text: str = Field("text", description="Column of the text (sft on plain text, classification, regression).")
    text_pair: str | None = Field(None, description="Column of a second text, for pair tasks.")
    label: str = Field("label", description="Column of the label: class names, class numbers, or a float.")


class EvaluateSettings(_Strict):
    """How `scalora evaluate` scores."""

    metrics: list[Literal["loss", "exact_match", "multiple_choice"]] = Field(
        default=["loss"],
        description="For sft. Loss only by default, because it needs nothing but the training columns. Classification "
        "and regression always report all of their metrics.",
    )
    max_new_tokens: int = Field(64, gt=0, description="Longest generated answer: enough for a short answer.")
    batch_size: int = Field(16, gt=0, description="Examples generated together.")
    limit: int | None = Field(None, gt=0, description="Score only the first so many examples; all when null.")
    answer_pattern: str | None = Field(
        None, description="Regular expression; its first group (or whole match) is compared instead of the whole text."
    )


class Settings(_Strict):
    """One run."""

    model: str = Field(description="Hub id, local folder, or GGUF file.")
    task: Task = Field("sft", description="Supervised fine-tuning of a causal model, or a sequence-level task.")
    method: str = Field("scalora", description="scalora, lora, full, or a rival: a key of scalora.rivals.METHODS.")
    method_options: dict[str, Any] = Field(
        default_factory=dict, description="Fields of the method's class in scalora.rivals; ScaLoRA's are in `scalora`."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Of the base weights. float32, because every merge into bfloat16 rounds."
    )
    quantization: Literal["nf4", "int8"] | None = Field(
        None,
        description="Load the base quantised by bitsandbytes: 4-bit NormalFloat (QLoRA's) or 8-bit. Needs bitsandbytes "
        "and a base that is not a GGUF file.",
    )
    trust_remote_code: bool = Field(False, description="Run code that comes with the model: only if you trust it.")
    output_dir: str = Field("runs/latest", description="The run folder.")
    save_model: bool = Field(True, description="Write the trained model; a comparison wants only the figures.")
    track_updates: int = Field(
        0,
        ge=0,
        description="How often over the run the rank of the total update of a few layers is measured (updates.jsonl). "
        "0, because each time takes some seconds of singular value decompositions.",
    )
    data: DataSettings = Field(default_factory=DataSettings)
    lora: dict[str, Any] = Field(default_factory=dict, description="Any field of peft.LoraConfig.")
    scalora: dict[str, Any] = Field(default_factory=dict, description="Any field of scalora.ScaLoraConfig.")
    training: dict[str, Any] = Field(
        default_factory=dict, description="Any field of trl.SFTConfig (sft) or transformers.TrainingArguments."
    )
    evaluate: EvaluateSettings = Field(default_factory=EvaluateSettings)


_BOOL = "tag:yaml.org,2002:bool"


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 as text and no as false; people mean the number, and ``save_strategy: no`` the word."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - the parent's attribute
        first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(_BOOL, re.compile("^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_settings(path: Path, overrides: Sequence[str] = ()) -> Settings:
    """Read a config file, apply ``--key value`` overrides, check everything.

    Raises:
        InputError: the file is missing or not YAML, or a key or value is wrong; names it.
    """
    content = read_yaml(path, "config")
    for key, value in parsed_overrides(overrides):
        _assign(content, key, value)
    try:
        settings = Settings.model_validate(content)
    except ValidationError as error:
        raise InputError(first_problem(error)) from None
    check_nested(settings)
    return settings


def read_yaml(path: Path, kind: str) -> dict[str, Any]:
    """The keys and values of a YAML file; none of an empty one.

    Args:
        path: of the file.
        kind: what an error calls it: ``"config"``, ``"study"``.

    Raises:
        InputError: it is missing or not YAML, or holds something else.
    """
    if not path.is_file():
        raise InputError(f"{kind} file {str(path)!r} does not exist")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{kind} file {str(path)!r} is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{kind} file {str(path)!r} must hold keys and values, not a {type(content).__name__}")
    return content


def run_settings(folder: Path) -> Settings:
    """The settings in a run folder, as they were resolved when it was made.

    Raises:
        InputError: there are none, or they were edited to something that is none.
    """
    path = folder / "config.yaml"
    try:
        settings = Settings.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise InputError(f"{str(folder)!r} holds no config.yaml: it is not the folder of a run") from None
    except ValidationError as error:
        raise InputError(f"{str(path)!r} is not the config of a run: {first_problem(error)}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{str(path)!r} can't be read: {error}") from None
    method_class(settings)
    return settings


def training_class(task: Task) -> type:
    """The class of training arguments: TRL's for sft, Transformers' otherwise."""
    if task == "sft":
        from trl import SFTConfig

        return SFTConfig  # type: ignore[no-any-return]
    from transformers import TrainingArguments

    return TrainingArguments  # type: ignore[no-any-return]


def check_keys(section: str, keys: Iterable[str], known: Iterable[str]) -> None:
    """Refuse the first key that is not known, with the nearest that is.

    Raises:
        InputError: names the section and the key.
    """
    known = list(known)
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "see its documentation for the fields"
            raise InputError(f"unknown key {section + key!r}: {hint}")


def check_nested(settings: Settings) -> None:
    """Check the sections whose fields are those of other classes, and the method.

    Raises:
        InputError: an unknown method or key, or a text where a number or a truth value is wanted.
    """
    from peft import LoraConfig

    from scalora.config import ScaLoraConfig

    options = [f.name for f in fields(method_class(settings)) if f.name != "config"]
    check_keys("method_options.", settings.method_options, options)
    for section, cls in (
        ("lora", LoraConfig),
        ("scalora", ScaLoraConfig),
        ("training", training_class(settings.task)),
    ):
        types = {f.name: str(f.type) for f in fields(cls)}
        check_keys(f"{section}.", getattr(settings, section), types)
        for key, value in getattr(settings, section).items():
            if isinstance(value, str) and (wanted := _instead_of_text(types[key], value)):
                raise InputError(f"{section}.{key}={value!r}: write {wanted}")


def method_class(settings: Settings) -> type[Method]:
    """The class of a run's method.

    Raises:
        InputError: there is no such method.
    """
    from scalora.rivals import METHODS

    if settings.method not in METHODS:
        raise InputError(f"method={settings.method!r}: the methods are {', '.join(METHODS)}")
    return METHODS[settings.method]


def _instead_of_text(annotation: str, value: str) -> str | None:
    """What a dataclass field wants where a text was given; None if the text may be right. The libraries don't check."""
    words = set(re.findall(r"[A-Za-z]+", annotation)) - {"class", "None", "NoneType", "Optional"}
    if "bool" in words and (words == {"bool"} or value.lower() in ("yes", "no", "on", "off")):
        return "true or false"
    return "a number" if words <= {"int", "float"} else None


def parsed_overrides(words: Sequence[str]) -> list[tuple[str, Any]]:
    """Dotted keys and values out of ``--key value`` and ``--key=value`` words.

    Raises:
        InputError: a word that is no key, or a key without a value.
    """
    pairs = []
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        if not word.startswith("--"):
            raise InputError(f"expected --key value, got {word!r}")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not remaining:
                raise InputError(f"--{key} needs a value")
            value = remaining.pop(0)
        pairs.append((key.replace("-", "_"), yaml.load(value, _Loader)))
    return pairs


def _assign(content: dict[str, Any], dotted: str, value: Any) -> None:
    """Set a dotted key; a bare key that is no top-level one is meant for the training arguments."""
    *sections, key = dotted.split(".")
    if not sections and key not in Settings.model_fields:
        check_keys("", [key], [*Settings.model_fields, *(f.name for f in fields(training_class(_task(content))))])
        sections = ["training"]
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise InputError(f"--{dotted}: {section!r} is not a section")
    content[key] = value


def _task(content: dict[str, Any]) -> Task:
    return "sft" if content.get("task", "sft") == "sft" else "classification"


def first_problem(error: ValidationError) -> str:
    """One line that names the key, the value and what is wrong with it."""
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        section: Any = (
            Settings if len(problem["loc"]) == 1 else Settings.model_fields[str(problem["loc"][0])].annotation
        )
        known = list(getattr(section, "model_fields", {}))
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
        return f"unknown key {key!r}: " + (f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(known)}")
    if problem["type"] == "missing":
        return f"{key!r} is missing from the config"
    where = f"{key}={problem['input']!r}" if key else repr(problem["input"])
    return f"{where}: {problem['msg'].lower()}"
