"""The schema of a config file: its keys, their defaults, and the checks that need no library to be imported.

A flag on the command line beats the file, the file beats the default, and an unknown key stops the run.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import yaml
from pydantic import Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from scalora.config import Dtype, ScaLoraConfig
from scalora.rivals import METHODS, home_of
from scalora.runs.errors import InputError
from scalora.runs.field_values import converted
from scalora.runs.library_fields import UNKNOWN, LibraryField, dataclass_fields
from scalora.runs.limits import SHARPER_TYPES, check_limits, check_together, without_effect
from scalora.runs.paths import expanded
from scalora.runs.sections import DataSettings, EvaluateSettings, NeedsSettings, RewardSettings
from scalora.runs.strict_model import StrictModel, expanded_field
from scalora.runs.tasks import CLASSES, LABELLED, WITH_HEAD, Task
from scalora.runs.yaml_file import parse_yaml, parsed_overrides, read_yaml, refuse_repeated, set_dotted

if TYPE_CHECKING:
    from scalora.rivals.method import Method

_MOST_LISTED = 20  # an error lists the known keys of a section with at most so many

# Keys of the section training that hold paths, or paths among other things.
_PATHS_IN_TRAINING = ("logging_dir", "chat_template_path", "accelerator_config", "deepspeed", "fsdp_config")

# Templates of the section data, and what each makes no examples without.
_TEMPLATES_NEED = (
    ("prompt", "completion"),
    ("completion", "prompt"),
    ("choices", "answer"),
    ("answer", "choices"),
    ("choices", "prompt"),
)


class Settings(StrictModel):
    """The settings of one run."""

    model: str = Field(description="Base model: hub id, local folder, or GGUF file.")
    task: Task = Field(
        "sft",
        description="sft: supervised fine-tuning of a causal language model. classification and regression: a model "
        "with a head for one label per text. dpo and orpo: a causal language model on pairs of a preferred and a "
        "rejected answer; kto: on answers that are good or bad. reward: a model with a head that scores answers, on "
        "such pairs. grpo: a causal language model on rewards of its own answers. All but classification and "
        "regression are trained by TRL.",
    )
    method: str = Field("scalora", description=f"Fine-tuning method: {', '.join(METHODS)}.")
    method_options: dict[str, Any] = Field(
        default_factory=dict,
        description="Options of the method; `scalora config --method NAME` prints them. ScaLoRA's settings are in the "
        "section scalora.",
    )
    optimizer: Literal["pair_adamw"] | None = Field(
        None,
        description="pair_adamw: scalora.PairAdamW for the adapter, and AdamW for everything else that is trained; "
        "with the method scalora, also scalora.mode: matrix. Its learning rates are those of full fine-tuning. null: "
        "pair_adamw with scalora.mode: matrix, and with the method block_signs for sft, classification and regression; "
        "but training.optim where that is set.",
    )
    head_learning_rate: float | None = Field(
        None,
        gt=0,
        description="Peak learning rate of the new head (classification, regression and reward). null: "
        "training.learning_rate, and ten times it with the optimizer pair_adamw, whose rates are those of full "
        "fine-tuning. A head that learns too slowly can hide what a method does: give all methods of a comparison the "
        "same.",
    )
    dtype: Dtype = Field(
        "float32",
        description="dtype of the base weights. float32 by default, because merges into half-precision weights round.",
    )
    quantization: Literal["nf4", "int8"] | None = Field(
        None,
        description="Quantise the base with bitsandbytes: nf4 (4-bit NormalFloat, as QLoRA) or int8. Not for GGUF "
        "files. null: no quantisation.",
    )
    trust_remote_code: bool = Field(
        False, description="Run code that comes with the model. Set it only for models that you trust."
    )
    output_dir: str = Field("runs/latest", description="Run folder, in which all results are written.")
    save_model: bool = Field(
        True, description="Write the trained weights at the end. false: write only logs and scores."
    )
    track_updates: int | Literal["auto"] = Field(
        "auto",
        description="Number of times per run to measure the rank of the total update in a few layers, for the report. "
        "auto: at the end, and at up to 20 evenly spaced steps before it as long as measuring takes under 1 % of the "
        "training time.",
    )
    data: DataSettings = Field(
        default_factory=DataSettings,
        description="The examples. For sft they need a column messages, or prompt and completion, or plain text; for "
        "other tasks see docs/data.md.",
    )
    reward: RewardSettings = Field(
        default_factory=RewardSettings, description="What is rewarded in generated answers (grpo, which needs it)."
    )
    lora: dict[str, Any] = Field(default_factory=dict, description="Any field of peft.LoraConfig.")
    scalora: dict[str, Any] = Field(
        default_factory=dict,
        description="Any field of scalora.ScaLoraConfig. Used by the method scalora and its controls. Without a "
        "mode, the method scalora takes matrix for sft, classification and regression, unless training.optim or "
        "DeepSpeed is set; auto is the paper's column scaling.",
    )
    training: dict[str, Any] = Field(
        default_factory=dict,
        description="Any field of transformers.TrainingArguments (classification and regression), or of TRL's class "
        "for the task: trl.SFTConfig, DPOConfig, KTOConfig, RewardConfig, GRPOConfig or "
        "trl.experimental.orpo.ORPOConfig.",
    )
    evaluate: EvaluateSettings = Field(
        default_factory=EvaluateSettings, description="How `scalora evaluate` scores a model."
    )
    needs: NeedsSettings = Field(
        default_factory=NeedsSettings,
        description="What is known of model and data beforehand. With it, GPU, memory, disk, token and packages are "
        "checked before anything is downloaded.",
    )

    @field_validator("track_updates", mode="before")
    @classmethod
    def _number_of_times(cls, value: Any) -> Any:
        """One error for the field, where a union would report one for each of its types."""
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value != "auto" and not (number and value >= 0 and float(value).is_integer()):
            raise PydanticCustomError("number_of_times", "must be auto or a number of times, at least 0")
        return value

    @field_validator("model", "output_dir")
    @classmethod
    def _path(cls, value: str) -> str:
        return expanded_field(value)


def load_settings(path: Path, overrides: Sequence[str] = (), options: Sequence[str] = ()) -> Settings:
    """Read a config file, apply overrides, and check every key.

    Args:
        path: path of the YAML file.
        overrides: command-line words, ``--key value`` or ``--key=value`` with dotted keys, which replace keys of the
            file.
        options: the options of the command, such as ``"--overwrite"``, to suggest for a mistyped one.

    Raises:
        InputError: the file is missing or not YAML, or a key or value is wrong.
    """
    return overridden(read_yaml(path, "config"), overrides, options)


def overridden(content: dict[str, Any], overrides: Sequence[str], options: Sequence[str] = ()) -> Settings:
    """Apply the overrides of a command line to the keys and values of a config, and check all of them.

    Args:
        content: nested keys and values; modified.
        overrides: as for `load_settings`.
        options: as for `load_settings`.

    Raises:
        InputError: a key or value is wrong.
    """
    given = []
    words = list(parsed_overrides(overrides, options))
    task = next((value for key, value in words if key == "task"), content.get("task"))
    for key, value in words:
        given.append(_dotted(task, key, options))
        set_dotted(content, given[-1], value)
    refuse_repeated(given)
    return checked_settings(content)


def checked_settings(content: Mapping[str, Any]) -> Settings:
    """Make settings of the keys and values of a config, and check all of them.

    Args:
        content: nested keys and values.

    Raises:
        InputError: a key or value is wrong.
    """
    try:
        settings = Settings.model_validate(content)
    except ValidationError as error:
        raise InputError(first_problem(error)) from None
    return check_nested(settings)


def run_settings(folder: Path) -> Settings:
    """The settings of a run, from its folder.

    Args:
        folder: the run folder.

    Raises:
        InputError: the folder has no config, or the config is not that of a run.
    """
    path = folder / "config.yaml"
    try:
        settings = Settings.model_validate(parse_yaml(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise InputError(f"{str(folder)!r} holds no config.yaml: it is not the folder of a run") from None
    except ValidationError as error:
        raise InputError(f"{str(path)!r} is not the config of a run: {first_problem(error)}") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{str(path)!r} can't be read: {error}") from None
    require_method(settings.method)
    return settings


def section_fields(section: str, task: Task = "sft", method: str = "scalora") -> Mapping[str, LibraryField]:
    """The keys of a section that are the fields of a dataclass, by name.

    Args:
        section: ``"lora"``, ``"scalora"``, ``"training"`` or ``"method_options"``.
        task: selects the class of the training arguments.
        method: selects the class of the method's options.
    """
    if section == "method_options":
        # ScaLoRA's own settings have a section to themselves.
        return {name: field for name, field in dataclass_fields(*home_of(method)).items() if name != "config"}
    if section == "training":
        return dataclass_fields(CLASSES[task].module, CLASSES[task].arguments)
    return dataclass_fields(*_SECTION_CLASSES[section])


_SECTION_CLASSES = {"lora": ("peft", "LoraConfig"), "scalora": ("scalora.config", "ScaLoraConfig")}


def training_class(task: Task) -> type:
    """The class of the training arguments: TRL's, or Transformers' for classification and regression."""
    cls: type = getattr(import_module(CLASSES[task].module), CLASSES[task].arguments)
    return cls


def check_keys(section: str, keys: Iterable[str], known: Iterable[str]) -> None:
    """Refuse the first unknown key, and suggest a known one.

    Args:
        section: the section's name and a dot, or nothing for the top level.
        keys: the keys that were given.
        known: the keys that there are.

    Raises:
        InputError: a key is unknown.
    """
    known = list(known)
    for key in keys:
        if key not in known:
            raise InputError(f"unknown key {section + key!r}: {_hint(key, known)}")


def check_nested(settings: Settings) -> Settings:
    """Check the method, and the sections whose keys are the fields of other classes.

    Args:
        settings: the settings, of which those sections are as they were read.

    Returns:
        The settings with the values of those sections as their types want them.

    Raises:
        InputError: a method or key is unknown, or a value is of the wrong type or makes no sense.
    """
    require_method(settings.method)
    sections = {}
    for section in ("method_options", "lora", "scalora", "training"):
        given = getattr(settings, section)
        known = section_fields(section, settings.task, settings.method) if given else {}
        if section == "method_options":
            _check_options(settings.method, given, known)
        check_keys(f"{section}.", given, known)
        sections[section] = {key: _checked_value(section, known[key], value) for key, value in given.items()}
    try:
        check_together(settings.task, settings.method, sections["lora"], sections["training"])
    except ValueError as error:
        raise InputError(str(error)) from None
    try:
        ScaLoraConfig.from_dict(sections["scalora"])
    except ValueError as error:
        raise InputError(f"scalora: {error}") from None
    _check_data(settings)
    _name_unused(settings, sections["training"])
    _check_start(settings, sections["method_options"])
    _check_reward(settings.task, settings.reward)
    return settings.model_copy(update=sections)


def _check_options(method: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse options of another method, as of a config that was written for that."""
    for key in given:
        owners = [name for name in METHODS if key not in known and key in section_fields("method_options", method=name)]
        if owners:
            raise InputError(
                f"method_options.{key} is an option of {', '.join(owners)}, not of the method {method}: delete it; "
                f"`scalora config --method {method}` prints the options"
            )


def _check_data(settings: Settings) -> None:
    data = settings.data
    for key, needed in _TEMPLATES_NEED:
        if getattr(data, key) is not None and getattr(data, needed) is None:
            raise InputError(f"data.{key} needs data.{needed}: set both, or leave both out")
    if data.prompt is not None and settings.task != "sft":
        raise InputError(f"data.prompt: only task: sft takes templates, not {settings.task!r}; leave it out")
    if not data.streaming:
        return
    if data.first is not None:
        raise InputError(f"data.first={data.first}: a stream is as long as training.max_steps; leave it out")
    if settings.task in (*LABELLED, "orpo"):
        why = "TRL's ORPOTrainer takes no streams" if settings.task == "orpo" else "it needs the labels of all examples"
        raise InputError(f"data.streaming=True: not for task {settings.task!r}, because {why}; leave it out")
    if settings.training.get("max_steps", -1) == -1:
        raise InputError("data.streaming=True needs training.max_steps: a stream has no length")
    if isinstance(data.train, list) and len(data.train) > 1:
        raise InputError(
            "data.streaming=True: a stream does not know how long its sets are: give data.train weights, such as "
            f"{{{', '.join(f'{name}: 1' for name in data.train)}}}"
        )
    if settings.training.get("precompute_ref_log_probs"):
        raise InputError("training.precompute_ref_log_probs=True: not of a stream, which has no end; leave it out")


_OF_LABELS = ("text_pair", "label", "similar_labels")
"""Keys of ``data`` that are for tasks with labels alone."""


def _name_unused(settings: Settings, training: Mapping[str, Any]) -> None:
    """Warn of keys that do nothing here. They are not refused: a config may be one for several tasks."""
    task, data = settings.task, settings.data
    unused: dict[str, str] = {}
    if task not in LABELLED:
        changed = [key for key in _OF_LABELS if getattr(data, key) != DataSettings.model_fields[key].default]
        unused = {f"data.{key}": "tasks with labels" for key in changed}
    if settings.head_learning_rate is not None and task not in WITH_HEAD:
        unused["head_learning_rate"] = "tasks with a new head"
    if task != "sft" and settings.evaluate.metrics != EvaluateSettings().metrics:
        unused["evaluate.metrics"] = "task sft"
    for key, what in unused.items():
        warnings.warn(f"{key} is for {what}, and does nothing for {task!r}", stacklevel=2)
    for warning in without_effect(training, evaluates=data.eval is not None):
        warnings.warn(warning, stacklevel=2)


def _check_start(settings: Settings, options: Mapping[str, Any]) -> None:
    """Refuse starts from a gradient where there is none before training."""
    if settings.task != "grpo":
        return
    has_none = "the gradient of training batches, and GRPO has none before its model answers"
    if settings.method == "lora_ga":
        raise InputError(f"method 'lora_ga' starts from {has_none}; take another")
    if options.get("start") == "oracle":
        raise InputError(f"method_options.start='oracle': it is of {has_none}; leave it out")


def _check_reward(task: Task, reward: RewardSettings) -> None:
    given = [key for key, value in reward if value not in (None, [])]
    if task != "grpo":
        if given:
            raise InputError(f"reward.{given[0]}: only task: grpo takes rewards, not {task!r}; leave it out")
        return
    if (reward.file is None) == (reward.pattern is None):
        found = "both are set" if reward.file is not None else "neither is set"
        raise InputError(f"task 'grpo' needs either reward.file or reward.pattern: {found}")
    if reward.file is not None and not reward.functions:
        raise InputError("reward.functions is missing: name the functions of reward.file, such as [good]")
    if reward.weights is not None and len(reward.weights) != len(reward.functions):
        raise InputError(
            f"reward.weights={reward.weights!r}: there must be one for each of reward.functions, which are "
            f"{len(reward.functions)}"
        )
    if reward.answer is not None and reward.pattern is None:
        raise InputError(f"reward.answer={reward.answer!r}: it belongs to reward.pattern; leave it out")


def _checked_value(section: str, field: LibraryField, value: Any) -> Any:
    """The value of a key in one of the sections that are other classes, as its type wants it."""
    annotation = SHARPER_TYPES.get(f"{section}.{field.name}", field.annotation)
    try:
        value = converted(value, annotation, nullable=field.default in (None, UNKNOWN))
        check_limits(section, field.name, value)
        path = section == "training" and field.name in _PATHS_IN_TRAINING and isinstance(value, str)
        return expanded(value) if path and not value.startswith("{") else value
    except ValueError as error:
        shown = "null" if value is None else repr(value)
        raise InputError(f"{section}.{field.name}={shown}: {error}") from None


def method_class(settings: Settings) -> type[Method]:
    """The class of a run's method.

    Raises:
        InputError: there is no such method.
    """
    require_method(settings.method)
    return METHODS[settings.method]


def require_method(name: str) -> None:
    """Check that there is a method of a name.

    Args:
        name: value of the key ``method``.

    Raises:
        InputError: there is no such method.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(f"method={name!r}: the methods are {', '.join(METHODS)}{hint}")


def _dotted(task: Any, key: str, options: Sequence[str]) -> str:
    """A key of the command line with its section; a bare one that is not a top-level one is a training argument."""
    if "." in key or key in Settings.model_fields:
        return key
    training = section_fields("training", task if task in get_args(Task) else "sft")
    if key not in training:
        near = [*_elsewhere(_OTHER_WORDS.get(key, key)), *difflib.get_close_matches(f"--{key}", options)]
        hint = f"did you mean {near[0]!r}?" if near else _hint(key, [*Settings.model_fields, *training])
        raise InputError(f"unknown key {key!r}: {hint}")
    return f"training.{key}"


_OTHER_WORDS = {
    "lr": "learning_rate",
    "rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "steps": "max_steps",
}
"""What people call keys of PEFT and Transformers."""


def _hint(key: str, known: Sequence[str]) -> str:
    """The known key that was probably meant; else where the known keys are listed."""
    if (word := _OTHER_WORDS.get(key)) in known:
        return f"did you mean {word!r}?"
    if near := difflib.get_close_matches(key, known, n=1):
        return f"did you mean {near[0]!r}?"
    if len(known) <= _MOST_LISTED:
        return f"the keys are {', '.join(known)}" if known else "there are no keys here"
    return "`scalora config --all` lists the keys"


def _elsewhere(key: str) -> list[str]:
    """The dotted names under which sections know a key that the top level does not."""
    sections: dict[str, Iterable[str]] = {
        "data": DataSettings.model_fields,
        "evaluate": EvaluateSettings.model_fields,
        "reward": RewardSettings.model_fields,
        **{section: section_fields(section) for section in ("training", "lora", "scalora")},
    }
    return [f"{section}.{key}" for section, known in sections.items() if key in known]


def first_problem(error: ValidationError) -> str:
    """One line that names the key, its value and what is wrong with it.

    Args:
        error: from the validation of `Settings` or of a study.
    """
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        section: Any = Settings
        if len(problem["loc"]) > 1:
            section = Settings.model_fields[str(problem["loc"][0])].annotation
        elif elsewhere := _elsewhere(key):
            return f"unknown key {key!r}: did you mean {elsewhere[0]!r}?"
        return f"unknown key {key!r}: {_hint(str(problem['loc'][-1]), list(section.model_fields))}"
    if problem["type"] == "missing" or (problem["type"] == "string_type" and problem["input"] is None):
        return f"{key!r} is missing from the config"
    where = f"{key}={problem['input']!r}" if key else repr(problem["input"])
    return f"{where}: {problem['msg'][0].lower()}{problem['msg'][1:]}"
