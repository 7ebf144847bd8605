"""Which values make sense for the settings of other libraries, which check theirs late or never.

Each limit is one that the library, or torch below it, breaks on or reads as something else. They are checked when a
config is read, before a model is loaded or a folder touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from scalora.config import STARTS_THAT_CHANGE_THE_BASE

LARGEST_SEED = 2**32 - 1
"""NumPy's: `transformers.set_seed` seeds it together with torch and Python."""

# Starts that change the base weights and have a method of their name, which says what its results are. Under any other
# method the adapter would be written as an ordinary one, which is wrong on the original base.
_METHODS_OF_STARTS = ("pissa", "lora_ga")
_STARTS = (True, False, "gaussian", "orthogonal", "mica")

# Training arguments that a run sets itself, with what to do instead of giving them.
_SET_BY_THE_RUN = {
    "output_dir": "leave it out, and set output_dir at the top level; checkpoints are in its folder trainer",
    "resume_from_checkpoint": "leave it out, and go on with the run in its own output_dir with --resume",
    "reward_weights": "leave it out, and set reward.weights",
}


class Limit(NamedTuple):
    """Which values of a key make sense.

    Attributes:
        holds: whether a number is allowed.
        words: what is allowed, after "must be".
    """

    holds: Callable[[float], bool]
    words: str


def _at_least(low: int) -> Limit:
    return Limit(lambda value: value >= low, f"at least {low}")


_POSITIVE = Limit(lambda value: value > 0, "above 0")
_SHARE = Limit(lambda value: 0 <= value < 1, "at least 0 and below 1")
_SEED = Limit(lambda value: 0 <= value <= LARGEST_SEED, f"from 0 to {LARGEST_SEED}")
_INTERVAL = Limit(
    lambda value: 0 < value < 1 or (value >= 1 and value == int(value)),
    "a whole number of steps, or a share of the run between 0 and 1",
)

_TRAINING: Mapping[str, Limit] = {
    **dict.fromkeys(("learning_rate", "num_train_epochs", "ddp_timeout"), _POSITIVE),
    **dict.fromkeys(
        (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "eval_accumulation_steps",
            "torch_empty_cache_steps",
            "dataloader_prefetch_factor",
            "ddp_bucket_cap_mb",
            "dataset_num_proc",
            "max_length",
            "pad_to_multiple_of",
            # Transformers takes 0 for no limit, and would keep everything.
            "save_total_limit",
        ),
        _at_least(1),
    ),
    **dict.fromkeys(
        (
            "weight_decay",
            "adam_epsilon",
            "max_grad_norm",
            "neftune_noise_alpha",
            "router_aux_loss_coef",
            "dataloader_num_workers",
            "eval_delay",
        ),
        _at_least(0),
    ),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), _SHARE),
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps"), _INTERVAL),
    **dict.fromkeys(("seed", "data_seed"), _SEED),
    # Transformers takes 0 for no limit, and would train for num_train_epochs.
    "max_steps": Limit(lambda value: value == -1 or value >= 1, "at least 1, or -1 for num_train_epochs"),
    "warmup_ratio": Limit(lambda value: 0 <= value <= 1, "from 0 to 1"),
    # Transformers rounds 1.5 down to one step.
    "warmup_steps": Limit(
        lambda value: 0 <= value < 1 or (value >= 1 and value == int(value)),
        "a whole number of steps, or a share of the run from 0 to below 1",
    ),
}

_LORA: Mapping[str, Limit] = {
    "r": _at_least(1),
    "lora_alpha": _POSITIVE,
    "lora_dropout": _SHARE,
    "qalora_group_size": _at_least(1),
    "layers_to_transform": _at_least(0),
    "trainable_token_indices": _at_least(0),
    "alpha_pattern": _POSITIVE,
    "rank_pattern": Limit(lambda value: value >= 1 and value == int(value), "a whole number of at least 1"),
}

_LIMITS = {"training": _TRAINING, "lora": _LORA}

SHARPER_TYPES: Mapping[str, str] = {
    "lora.lora_alpha": "float",  # declared as an integer, but only ever divided
    "lora.rank_pattern": "dict[str, int] | None",
    "lora.alpha_pattern": "dict[str, float] | None",
    "training.fsdp": "bool | str | None",  # declared as a text, but documented and used as true
}
"""Types of keys for which the libraries declare another, or less than they need."""

_NOT_EMPTY = ("target_modules", "exclude_modules", "modules_to_save", "target_parameters")


def check_limits(section: str, key: str, value: Any) -> None:
    """Check a value against what makes sense for its key.

    Args:
        section: ``"lora"`` or ``"training"``; other sections check their own values.
        key: the key.
        value: its value, of the right type.

    Raises:
        ValueError: it makes no sense; says what is allowed.
    """
    limit = _LIMITS.get(section, {}).get(key)
    if limit is not None and not all(map(limit.holds, _numbers(value))):
        raise ValueError(f"must be {limit.words}")
    if section == "lora" and key in _NOT_EMPTY:
        _require_names(key, value)


def check_together(task: str, method: str, lora: Mapping[str, Any], training: Mapping[str, Any]) -> None:
    """Check what makes no sense for a task or method, or does nothing here.

    Args:
        task: task of the run.
        method: method of the run.
        lora: the section ``lora``.
        training: the section ``training``.

    Raises:
        ValueError: names the key, its value and what to write instead.
    """
    if "init_lora_weights" in lora:
        _check_start(lora["init_lora_weights"], method)
    if lora.get("inference_mode"):
        raise ValueError("lora.inference_mode=True: it freezes the adapter, and nothing would be trained; leave it out")
    if training.get("label_smoothing_factor") and task == "regression":
        raise ValueError(
            f"training.label_smoothing_factor={training['label_smoothing_factor']!r}: a regression has no classes to "
            "smooth over; leave it out"
        )
    if (field := training.get("dataset_text_field", "text")) != "text":
        raise ValueError(f"training.dataset_text_field={field!r}: leave it out, and set data.text")
    for key, instead in _SET_BY_THE_RUN.items():
        if training.get(key) is not None:
            raise ValueError(f"training.{key}={training[key]!r}: {instead}")


def without_effect(training: Mapping[str, Any], *, evaluates: bool) -> Iterator[str]:
    """What is set in the section ``training`` and does nothing.

    Args:
        training: the section.
        evaluates: whether there is evaluation data.

    Yields:
        A line for each key.
    """
    # A config with all keys written out has the libraries' 500 and null.
    for key, strategy, default in (("save_steps", "save_strategy", "no"), ("eval_steps", "eval_strategy", "epoch")):
        if training.get(key) not in (None, 500) and (chosen := training.get(strategy, default)) != "steps":
            yield (
                f"training.{key}={training[key]!r} does nothing with {strategy} {chosen!r}: set training.{strategy}: "
                "steps"
            )
    if training.get("load_best_model_at_end") and not evaluates:
        yield "training.load_best_model_at_end=True does nothing without data.eval"


def _check_start(start: Any, method: str) -> None:
    name = start.lower() if isinstance(start, str) else start
    changing = STARTS_THAT_CHANGE_THE_BASE
    family = next((known for known in changing if isinstance(name, str) and name.startswith(known)), None)
    own = family if family in _METHODS_OF_STARTS else None
    if family is not None and method != own:
        raise ValueError(
            f"lora.init_lora_weights={start!r}: it changes the base weights, so the adapter would be wrong on the "
            f"original base; {f'use method: {own}' if own else 'leave it out'}"
        )
    if name == "eva":
        raise ValueError(
            f"lora.init_lora_weights={start!r}: PEFT computes this start only when a program calls "
            "initialize_lora_eva_weights; leave it out"
        )
    if family is None and name not in _STARTS:
        known = ", ".join(str(value).lower() for value in _STARTS)
        raise ValueError(f"lora.init_lora_weights={start!r}: must be one of {known}")


def _numbers(value: Any) -> list[float]:
    """The numbers in a value."""
    if isinstance(value, (dict, list)):
        inner = value.values() if isinstance(value, dict) else value
        return [number for part in inner for number in _numbers(part)]
    return [value] if isinstance(value, (int, float)) else []


def _require_names(key: str, value: Any) -> None:
    if key == "target_modules" and value in ([], ""):
        raise ValueError("must name at least one module; all-linear stands for all linear layers")
    if "" in (value if isinstance(value, list) else ()):
        raise ValueError("must not hold an empty name")
