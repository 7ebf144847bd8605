"""`ScaLoraConfig`: every setting of the method, validated, each default with its reason. Plain data, no tensors."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from scalora.maths.mode import Mode

Merge = Literal["auto", "dense", "factored"]
"""Where the remainder goes: ``"dense"`` into the base weights, ``"factored"`` beside them."""

DEFAULT_TARGET_NORM = 1.0
"""Unit columns: with Adam their common length changes nothing that a learning rate does not (docs/defaults.md)."""

DEFAULT_RANK = 8
"""The rank of the paper's large-model experiments, and PEFT's own default."""

DEFAULT_TARGET_MODULES = "all-linear"
"""As in the paper: leaving layers out is what a comparison with full fine-tuning notices first."""

LORA_DEFAULTS: dict[str, Any] = {
    "r": DEFAULT_RANK,
    "lora_alpha": DEFAULT_RANK,  # a scaling of 1, the paper's
    "target_modules": DEFAULT_TARGET_MODULES,
}
"""Fields of `peft.LoraConfig` for which scalora's commands have defaults of their own."""


@dataclass(frozen=True)
class ScaLoraConfig:
    """Settings of ScaLoRA (arXiv 2510.23818).

    Raises:
        ValueError: a value is out of range, or both `smoothness` and `target_norm` are given.
    """

    interval: int = field(
        default=1,
        metadata={
            "help": "Optimizer steps from one rescale to the next. 1 is the paper's ScaLoRA; with 10 a rescale costs "
            "next to nothing and the paper finds it nearly lossless."
        },
    )
    smoothness: float | None = field(
        default=None,
        metadata={
            "help": "The paper's L > 0. The target norm is then 1/sqrt(L·η·s²), with η the base (unscheduled) learning "
            "rate and s the adapter's scaling. Excludes target_norm; None uses target_norm."
        },
    )
    target_norm: float | None = field(
        default=None,
        metadata={
            "help": "Norm of the adapter's columns that the scaling aims at, 1/sqrt(L·η). None, without smoothness: 1."
        },
    )
    warmup_steps: int = field(
        default=10,
        metadata={
            "help": "Optimizer steps before the first rescale, which needs an adapter that has left its zero start."
        },
    )
    mode: Mode = field(
        default="auto",
        metadata={
            "help": "'auto' scales each column where that optimum is positive, else the whole factor, else nothing: "
            "the paper's rule, with the best residual. 'column' and 'scalar' try only the one."
        },
    )
    merge: Merge = field(
        default="auto",
        metadata={
            "help": "Where the remainder goes: 'dense' merges it into the base weights (the paper's way), 'factored' "
            "keeps it beside an untouched base. 'auto' is dense for a float32 base, factored for a quantised one, and "
            "for a half-precision base factored where that takes at most half the memory."
        },
    )
    remainder_rank: int = field(
        default=64,
        metadata={
            "help": "Columns that a factored remainder keeps. Measured updates have a numerical rank of 15 to 54 "
            "(docs/precision.md), so 64 loses next to nothing, and costs a few per cent of a large layer's memory "
            "and time."
        },
    )
    native: bool = field(
        default=False,
        # How the same is computed: a run may go on with the other.
        compare=False,
        metadata={
            "help": "On CPUs, do the work of a rescale in C++ (docs/cost.md): half the time in float32, a quarter in "
            "bfloat16. Not the default, because it needs a C++ compiler, for ten seconds at the first use, and a "
            "rescale is a few per cent of a step. No effect on other devices."
        },
    )

    def __post_init__(self) -> None:
        """Check every value, so that a wrong one is found before any training."""
        for name, low in (("interval", 1), ("warmup_steps", 0), ("remainder_rank", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}")
        for name in ("smoothness", "target_norm"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and 0 < value < math.inf):
                raise ValueError(f"{name} must be a positive finite number, got {value!r}")
        if self.smoothness is not None and self.target_norm is not None:
            raise ValueError(
                f"give smoothness={self.smoothness} or target_norm={self.target_norm}, not both: "
                "target_norm is 1/sqrt(smoothness·η·s²)"
            )
        for name, allowed in (("mode", get_args(Mode)), ("merge", get_args(Merge))):
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")

    def rescales_at(self, step: int) -> bool:
        """Whether an optimizer step rescales.

        Args:
            step: counted from 1.
        """
        since_warmup = step - self.warmup_steps
        return since_warmup >= 1 and since_warmup % self.interval == 0

    def column_norm(self, scaling: float, learning_rate: float) -> float:
        """The target norm of the adapter's columns: ``1/(s·√(Lη))`` where the smoothness is given.

        Args:
            scaling: s, the adapter's.
            learning_rate: η, the base (unscheduled) one.
        """
        if self.smoothness is None:
            return self.target_norm or DEFAULT_TARGET_NORM
        return 1 / (scaling * math.sqrt(self.smoothness * learning_rate))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON and YAML."""
        return asdict(self)

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> ScaLoraConfig:
        """The inverse of `to_dict`.

        Args:
            settings: some or all of the fields; the others keep their defaults.

        Raises:
            ValueError: an unknown key, or a value out of range.
        """
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(settings) - known):
            raise ValueError(f"unknown ScaLoRA setting {unknown[0]!r}; the settings are {', '.join(sorted(known))}")
        return cls(**settings)
