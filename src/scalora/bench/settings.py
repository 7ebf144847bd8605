"""The options of ``scalora bench`` and ``scalora estimate``, with their defaults. Imports neither torch nor PEFT."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from scalora.config import DEFAULT_RANK, DEFAULT_TARGET_MODULES, Dtype, Merge, ScaLoraConfig
from scalora.rivals import METHODS
from scalora.runs.errors import InputError

Quantization = Literal["none", "nf4", "int8"]

StateOf = Literal["adamw", "pair_adamw"]
"""Optimizers whose state is estimated."""

Parallel = Literal["ddp", "fsdp2", "zero1", "zero2", "zero3"]
"""Ways to train on several GPUs: PyTorch's DistributedDataParallel and FSDP2, and DeepSpeed's ZeRO."""

H100_BANDWIDTH = 3350.0
"""Memory bandwidth in GB/s, from NVIDIA's H100 datasheet (SXM)."""

H100_TFLOPS: dict[Dtype, float] = {"float32": 67.0, "bfloat16": 989.0, "float16": 989.0}
"""Peak TFLOP/s of dense matrix products, from the same datasheet. float32 is without tensor cores, as torch computes by
default; for half precision the datasheet prints the doubled rate of sparse products."""

ACHIEVED = 0.4
"""Share of the peak rate that training reaches: 38 to 43 % on H100s in the training of Llama 3 (arXiv 2407.21783)."""


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """What `scalora bench` measures.

    The first values of the options that take several are the base case. Every further value is measured in a case that
    differs from the base case in that option alone.

    Attributes:
        model: folder or hub id of a causal language model; None: a Llama with random weights.
        methods: methods to measure besides LoRA, as keys of `scalora.rivals.METHODS`; ``scalora:10`` is ScaLoRA with an
            interval of 10. By default the two intervals of the paper.
        width: hidden sizes of the random Llama. A step of the default takes under half a second on two CPU
            cores.
        layers: numbers of layers of the random Llama.
        rank: ranks of the adapter.
        sequence: tokens per sequence.
        dtype: dtypes of the base weights.
        merge: where ScaLoRA's remainder goes.
        batch: sequences per step.
        rounds: rounds of interleaved steps.
        memory: whether to measure peak memory too, in a separate process per method.
        native: whether ScaLoRA rescales in C++.
        device: device to train on.
        threads: CPU threads that torch uses.

    Raises:
        InputError: an unknown method, dtype or merge.
    """

    model: str | None = None
    methods: tuple[str, ...] = ("scalora", "scalora:10")
    width: tuple[int, ...] = (512,)
    layers: tuple[int, ...] = (4,)
    rank: tuple[int, ...] = (DEFAULT_RANK,)
    sequence: tuple[int, ...] = (256,)
    dtype: tuple[Dtype, ...] = ("float32",)
    merge: tuple[Merge, ...] = (ScaLoraConfig.merge,)
    batch: int = 4
    device: str
    rounds: int = 5
    memory: bool = True
    threads: int
    native: bool = False

    def __post_init__(self) -> None:
        for name in self.methods:
            try:
                parse_contender(name)
            except ValueError as error:
                raise InputError(f"--method {name!r}: {error}") from None
        if unknown := sorted(set(self.dtype) - set(get_args(Dtype))):
            raise InputError(f"--dtype {unknown[0]!r}: the dtypes are {', '.join(get_args(Dtype))}")
        if wrong := sorted(set(self.merge) - set(get_args(Merge))):
            raise InputError(f"--merge {wrong[0]!r}: must be one of {', '.join(get_args(Merge))}")


class ContenderName(NamedTuple):
    """What the name of a contender says.

    Attributes:
        method: a key of `scalora.rivals.METHODS`.
        pair_adamw: whether `scalora.PairAdamW` trains it in place of AdamW; ScaLoRA then has ``mode="matrix"``.
        interval: the interval between rescales, in steps; 1 for methods that do not rescale.
    """

    method: str
    pair_adamw: bool
    interval: int


def parse_contender(name: str) -> ContenderName:
    """Read the name of a contender: ``lora``, ``scalora:10``, ``scalora+pair_adamw`` or ``scalora+pair_adamw:10``.

    Args:
        name: a key of `scalora.rivals.METHODS`, optionally followed by ``+pair_adamw``, and by a colon and the interval
            between rescales.

    Raises:
        ValueError: there is no such method or optimizer, or the interval is not a positive integer.
    """
    with_optimizer, _, interval = name.partition(":")
    method, plus, optimizer = with_optimizer.partition("+")
    if method not in METHODS:
        raise ValueError(f"the methods are {', '.join(METHODS)}")
    if plus and optimizer != "pair_adamw":
        raise ValueError("the optimizer after the plus sign can only be pair_adamw")
    if interval and (not interval.isdigit() or int(interval) < 1):
        raise ValueError("the interval after the colon must be an integer of at least 1")
    return ContenderName(method, bool(plus), int(interval or 1))


def interval_of(name: str) -> int:
    """The interval between the rescales of a contender, in steps; 1 for methods that do not rescale.

    Args:
        name: the name of a contender.
    """
    return parse_contender(name).interval


@dataclass(frozen=True)
class EstimateSettings:
    """What `scalora estimate` estimates, and for which machine.

    Attributes:
        config: a model's config.json, or the folder that holds it.
        r: rank of the adapter.
        target_modules: modules to adapt: ``"all-linear"``, as in the paper, or names separated by commas.
        dtype: dtype of the base weights. bfloat16 by default, because models large enough to need an estimate are
            published in it.
        quantization: how bitsandbytes quantises the base's linear layers, as in `scalora train`.
        optimizer: whose state is counted. AdamW's by default, because it is the larger one.
        merge: where ScaLoRA's remainder goes.
        remainder_rank: columns that a factored remainder keeps.
        tokens: tokens per step. The default is one sequence of Llama 2's length; with more, a rescale is a smaller
            share of a step.
        bandwidth: memory bandwidth of the machine in GB/s. The default is that of an H100 SXM.
        tflops: TFLOP/s that training reaches in the base's dtype. None: `ACHIEVED` times the peak of an H100 SXM.
        float32_tflops: TFLOP/s reached in float32, in which a rescale computes whatever the base's dtype. None:
            `tflops` for a float32 base, otherwise `ACHIEVED` times the peak of an H100 SXM.
        gpus: number of GPUs that share the model's copy; each takes `tokens`.
        parallel: how they train. FSDP2 by default, because DDP needs no estimate: every GPU holds what a single one
            does.
        link: GB/s that a GPU receives from the others. The default is one 400 Gb/s port for each GPU, as in NVIDIA's
            DGX H100; within a node it is several times that.
        interval: intervals between rescales to estimate, in steps. The defaults are the library's, every step, and 10,
            at which a rescale costs next to nothing.

    Raises:
        InputError: a value is out of range.
        ValueError: the merge or the remainder's rank is invalid.
    """

    config: Path
    r: int = DEFAULT_RANK
    target_modules: str = DEFAULT_TARGET_MODULES
    dtype: Dtype = "bfloat16"
    quantization: Quantization = "none"
    optimizer: StateOf = "adamw"
    merge: Merge = ScaLoraConfig.merge
    remainder_rank: int = ScaLoraConfig.remainder_rank
    tokens: int = 4096
    bandwidth: float = H100_BANDWIDTH
    tflops: float | None = None
    float32_tflops: float | None = None
    gpus: int = 1
    parallel: Parallel = "fsdp2"
    link: float = 50.0
    interval: tuple[int, ...] = (1, 10)

    def __post_init__(self) -> None:
        for name in ("r", "tokens", "gpus"):
            if (value := getattr(self, name)) < 1:
                raise InputError(f"--{name} must be at least 1, got {value}")
        for name in ("bandwidth", "tflops", "float32_tflops", "link"):
            if (rate := getattr(self, name)) is not None and not 0 < rate < math.inf:
                raise InputError(f"--{name.replace('_', '-')} must be a positive finite number, got {rate}")
        if wrong := [interval for interval in self.interval if interval < 1]:
            raise InputError(f"--interval must be at least 1, got {wrong[0]}")
        if self.dtype not in get_args(Dtype):
            raise InputError(f"--dtype {self.dtype!r}: the dtypes are {', '.join(get_args(Dtype))}")
        if self.quantization not in (known := get_args(Quantization)):
            raise InputError(f"--quantization {self.quantization!r}: must be one of {', '.join(known)}")
        if self.optimizer not in (known := get_args(StateOf)):
            raise InputError(f"--optimizer {self.optimizer!r}: must be one of {', '.join(known)}")
        if self.parallel not in (known := get_args(Parallel)):
            raise InputError(f"--parallel {self.parallel!r}: must be one of {', '.join(known)}")
        if self.gpus > 1 and self.quantization != "none" and self.parallel in ("fsdp2", "zero3"):
            raise InputError(
                f"--parallel {self.parallel}: {self.quantization} weights are not split over GPUs, and their memory is "
                "not known; use ddp, zero1 or zero2"
            )
        if self.gpus > 1 and self.optimizer == "pair_adamw" and self.parallel.startswith("zero"):
            raise InputError(
                f"--optimizer pair_adamw with --parallel {self.parallel}: DeepSpeed cuts the factors up, and PairAdamW "
                "steps whole ones; use adamw, or fsdp2 or ddp"
            )
        ScaLoraConfig(merge=self.merge, remainder_rank=self.remainder_rank)

    @property
    def rate(self) -> float:
        """Floating-point operations per second that training reaches."""
        return _operations_per_second(self.tflops, self.dtype)

    @property
    def rescale_rate(self) -> float:
        """Floating-point operations per second that a rescale reaches, in float32."""
        if self.dtype == "float32" and self.float32_tflops is None:
            return self.rate
        return _operations_per_second(self.float32_tflops, "float32")


def _operations_per_second(tflops: float | None, dtype: Dtype) -> float:
    return 1e12 * (H100_TFLOPS[dtype] * ACHIEVED if tflops is None else tflops)
