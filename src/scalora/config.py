"""`ScaLoraConfig`: the settings of the method (paper, section 3), validated, each default with its reason."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from scalora.maths.mode import Mode, Optimum

Merge = Literal["auto", "dense", "dense_8bit", "stochastic", "factored"]
"""Where the remainder goes: ``"dense"``, ``"dense_8bit"`` and ``"stochastic"`` into the base weights, ``"factored"``
into low-rank factors beside them, ``"auto"`` to one of the first and the last, by the base weights."""

MERGES_INTO_THE_BASE: tuple[Merge, ...] = ("dense", "dense_8bit", "stochastic")
"""The kinds that change the base weights, which must not be quantised."""

Dtype = Literal["float32", "bfloat16", "float16"]
"""Names of the dtypes in which the commands load base weights and export models."""

DEFAULT_TARGET_NORM = 1.0
"""Unit columns. Of 0.5, 1 and 2, the only norm without a clear disadvantage on the measured tasks: 0.5 trains no better
than LoRA, and 2 has the lowest accuracy (docs/defaults.md)."""

DEFAULT_LEARNING_RATE = 1e-3
"""For LoRA with AdamW. The libraries' 2e-5 and 5e-5 are meant for full fine-tuning. At 2e-3 the training loss is lower
but the evaluation loss higher, with and without ScaLoRA (docs/defaults.md)."""

_WEIGHT_RATE_TIMES_WIDTH = 4e-4 * 576

DEFAULT_RANK = 8
"""The rank of the paper's experiments on large models, and PEFT's default."""

DEFAULT_TARGET_MODULES = "all-linear"
"""As in the paper. Leaving layers out is the first thing to show in a comparison with full fine-tuning."""

STARTS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""What those ``init_lora_weights`` begin with for which PEFT 0.21 subtracts something from the base weights, or
quantises them, when it makes the adapter. It computes them anew for every model that it wraps."""


def changes_the_base(start: Any) -> bool:
    """Whether an adapter with this ``init_lora_weights`` begins with a change of the base weights.

    Args:
        start: the setting, such as ``"pissa_niter_4"``.
    """
    return str(start).lower().startswith(STARTS_THAT_CHANGE_THE_BASE)


LORA_DEFAULTS: dict[str, Any] = {
    "r": DEFAULT_RANK,
    "lora_alpha": DEFAULT_RANK,  # a scaling of 1, the paper's
    "target_modules": DEFAULT_TARGET_MODULES,
}
"""The fields of `peft.LoraConfig` for which scalora's commands have their own defaults."""


def default_weight_rate(width: float, *, block_signs: bool = False) -> float:
    """The learning rate of `scalora.PairAdamW` to begin with.

    The best rate of Adam for a matrix falls with its width: as the inverse, if all else is equal (Yang et al., arXiv
    2203.03466), and with about the 0.8th power of it in fine-tuning of Llama models (`LoRA Without Regret
    <https://thinkingmachines.ai/blog/lora/>`_). The constant is from SmolLM2-135M, whose width is 576: there 4e-4 is of
    the size of full fine-tuning's best rates (docs/defaults.md). With block signs a step of the same size has a smaller
    largest singular value, and the best rates were 2 to 7 times as high (docs/tuning.md).

    Args:
        width: the model's hidden size: the number of inputs of most of its layers.
        block_signs: whether the updates have block signs.

    Returns:
        ``0.23/width``: 4e-4 for a width of 576, 5.6e-5 for one of 4,096. Twice that with block signs.
    """
    return _WEIGHT_RATE_TIMES_WIDTH / width * (2 if block_signs else 1)


@dataclass(frozen=True)
class ScaLoraConfig:
    """Settings of ScaLoRA (arXiv 2510.23818).

    Args:
        interval: optimizer steps from one rescale to the next. 1 is the paper's ScaLoRA; with 10, rescales cost next to
            nothing, and the paper finds it nearly lossless.
        smoothness: the paper's L > 0, which determines the target norm: ``1/√(L·η·s²)``, with η the base (unscheduled)
            learning rate and s the adapter's scaling. Can't be combined with `target_norm`.
        target_norm: norm of the adapter's columns that the scaling aims at, ``1/√(L·η)``. If this and `smoothness` are
            None, 1.
        warmup_steps: optimizer steps without rescales; the first is at step ``warmup_steps + interval``. PEFT starts
            ``lora_B`` at zero, where there is no optimum.
        mode: ``"auto"`` is the paper's rule: column scaling if its optimum is positive, else scalar scaling if that one
            is, else none. ``"column"`` and ``"scalar"`` try only the one. ``"matrix"`` is beyond the paper: an r × r
            matrix for each factor (`scalora.maths.matrix`). It needs an optimizer whose state such a change can carry:
            `scalora.PairAdamW`; or SGD with momentum, Muon or Lion, with `target_norm` or `smoothness` set.
        optimum: which matrices, with ``mode="matrix"``: ``"polar"`` makes both factors orthonormal, ``"exact"``
            minimises the loss bound over all matrices.
        turn: with ``mode="matrix"`` and `scalora.PairAdamW`, the angle in radians by which a step at the base learning
            rate turns a column, which determines the target norm of each layer. Without effect if `target_norm` or
            `smoothness` is set.
        merge: where the remainder goes: ``"dense"`` merges it into the base weights, as in the paper, and keeps the
            rounding errors of half-precision weights in 2 bytes each; ``"dense_8bit"`` keeps them in 1 byte;
            ``"stochastic"`` in none, and rounds up or down by chance; ``"factored"`` keeps the remainder beside the
            weights in low-rank factors. ``"auto"`` is dense for a float32 base, factored for a quantised one, and for a
            half-precision base factored where that takes at most half the memory of dense.
        remainder_rank: the most columns that a compression of a factored remainder keeps.
        native: whether to do the work of a rescale on CPUs in C++, which needs a C++ compiler.

    Raises:
        ValueError: a value is out of range, or both `smoothness` and `target_norm` are given.
    """

    interval: int = field(
        default=1,
        metadata={
            "help": "Optimizer steps from one rescale to the next. 1 is the paper's ScaLoRA. With 10, rescales cost "
            "next to nothing, and the paper finds it nearly lossless."
        },
    )
    smoothness: float | None = field(
        default=None,
        metadata={
            "help": "The paper's L > 0. The target norm is then 1/sqrt(L·η·s²), with η the base (unscheduled) learning "
            "rate and s the adapter's scaling. Can't be combined with target_norm; None: target_norm is used."
        },
    )
    target_norm: float | None = field(
        default=None,
        metadata={
            "help": "Norm of the adapter's columns that the scaling aims at, 1/sqrt(L·η). None: 1, unless smoothness "
            "is set."
        },
    )
    warmup_steps: int = field(
        default=10,
        metadata={
            "help": "Optimizer steps without rescales; the first is at step warmup_steps + interval. PEFT starts "
            "lora_B at zero, where there is no optimum; a few steps later there is one. At a high learning rate, a "
            "rescale in the first steps can set a language model back (docs/defaults.md)."
        },
    )
    mode: Mode = field(
        default="auto",
        metadata={
            "help": "'auto' is the paper's rule: a factor for each column of a layer if their optimum is positive, "
            "else one for lora_A and one for lora_B if theirs is, else none. 'column' and 'scalar' try only the one. "
            "'matrix' is beyond the paper: an r × r matrix for each factor, which needs the optimizer PairAdamW; or "
            "SGD with momentum, Muon or Lion, with target_norm or smoothness set."
        },
    )
    optimum: Optimum = field(
        default="polar",
        metadata={
            "help": "With mode: matrix, 'polar' makes both factors orthonormal; 'exact' minimises the loss bound over "
            "all matrices. polar by default: it is within 1.4 % of the optimum's residual (docs/method.md), needs no "
            "solve and never waits for the device."
        },
    )
    turn: float = field(
        default=0.2,
        metadata={
            "help": "With mode: matrix and the optimizer PairAdamW, the angle in radians by which a step at the base "
            "learning rate turns a column. It determines the target norm of each layer, unless target_norm or "
            "smoothness is set."
        },
    )
    merge: Merge = field(
        default="auto",
        metadata={
            "help": "Where the remainder goes: 'dense' merges it into the base weights, as in the paper, and keeps the "
            "rounding errors of half-precision weights in 2 bytes each; 'dense_8bit' keeps them in 1 byte; "
            "'stochastic' in none, and rounds up or down by chance (docs/precision.md); 'factored' keeps the remainder "
            "beside the weights in low-rank factors. 'auto' is dense for a float32 base, factored for a quantised one, "
            "and for a half-precision base factored where that takes at most half the memory of dense."
        },
    )
    remainder_rank: int = field(
        default=64,
        metadata={
            "help": "The most columns that a compression of a factored remainder keeps. In a measured run, only "
            "rounding errors were left beyond 32 columns (docs/precision.md). 64 columns add 5 % to the time of a "
            "4096 × 4096 layer (docs/cost.md). Raise it if the metric scalora/discarded exceeds 0.001."
        },
    )
    native: bool = field(
        default=False,
        # Does not change results: a run may be resumed with the other value.
        compare=False,
        metadata={
            "help": "On CPUs, do the work of a rescale in C++, in half the time in float32 and a quarter in bfloat16 "
            "(docs/cost.md). Not the default, because it needs a C++ compiler, which takes ten seconds at first use, "
            "and a rescale is only a few per cent of a step. No effect on other devices."
        },
    )

    def __post_init__(self) -> None:
        """Check every value."""
        for name, low in (("interval", 1), ("warmup_steps", 0), ("remainder_rank", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}")
        for name in ("smoothness", "target_norm"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and 0 < value < math.inf):
                raise ValueError(f"{name} must be a positive finite number, got {value!r}")
        if isinstance(self.turn, bool) or not (isinstance(self.turn, (int, float)) and 0 < self.turn < math.inf):
            raise ValueError(f"turn must be a positive finite number, got {self.turn!r}")
        if self.smoothness is not None and self.target_norm is not None:
            raise ValueError(
                f"give either smoothness={self.smoothness} or target_norm={self.target_norm}, not both: smoothness "
                "sets the target norm to 1/sqrt(smoothness·η·s²)"
            )
        for name, allowed in (("mode", get_args(Mode)), ("optimum", get_args(Optimum)), ("merge", get_args(Merge))):
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")

    def rescales_at(self, step: int) -> bool:
        """Whether there is a rescale at an optimizer step.

        Args:
            step: number of the step, counted from 1.

        Returns:
            True if there is one before the optimizer takes this step.
        """
        since_warmup = step - self.warmup_steps
        return since_warmup >= 1 and since_warmup % self.interval == 0

    @property
    def first_rescale(self) -> int:
        """The step at which the first rescale is."""
        return self.warmup_steps + self.interval

    @property
    def norm_from_turn(self) -> bool:
        """Whether the target norms are those for `turn`."""
        return self.mode == "matrix" and self.smoothness is None and self.target_norm is None

    @property
    def norm_from_rates(self) -> bool:
        """Whether the target norms depend on the base learning rates."""
        return self.smoothness is not None or self.norm_from_turn

    def column_norm(self, scaling: float, learning_rate: float) -> float:
        """The target norm of the adapter's columns: ``1/(s·√(Lη))`` if `smoothness` is set, else `target_norm` or 1.

        Args:
            scaling: s, the adapter's scaling; used only with `smoothness`.
            learning_rate: η, the base (unscheduled) learning rate; used only with `smoothness`.

        Returns:
            The norm.
        """
        if self.smoothness is None:
            return self.target_norm or DEFAULT_TARGET_NORM
        return 1 / (scaling * math.sqrt(self.smoothness * learning_rate))

    def to_dict(self) -> dict[str, Any]:
        """The settings as numbers and strings, for JSON and YAML.

        Returns:
            All fields by name.
        """
        return asdict(self)

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> ScaLoraConfig:
        """Create a config from a dict, such as the one from `to_dict`.

        Args:
            settings: values of some or all fields, by name; the others keep their defaults.

        Returns:
            The config.

        Raises:
            ValueError: a key is unknown, or a value is out of range.
        """
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(settings) - known):
            raise ValueError(f"unknown ScaLoRA setting {unknown[0]!r}; the settings are {', '.join(sorted(known))}")
        return cls(**settings)
