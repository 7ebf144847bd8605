"""``scalora estimate``: what training a model would take, from its config alone. No weight is read, none is made."""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from scalora.bench.floor import rescale_work_of
from scalora.config import DEFAULT_RANK, DEFAULT_TARGET_MODULES, Merge, ScaLoraConfig
from scalora.model.adapters import LoraPair, by_shape, find_lora_pairs
from scalora.model.layers import ADAPTABLE, LINEAR
from scalora.model.placement import resolve_merge
from scalora.rescale.remainder import HALF
from scalora.runs.errors import InputError
from scalora.studies.table_markdown import grid

Quantization = Literal["none", "nf4", "int8"]

# NVIDIA's H100 datasheet, the SXM column: memory bandwidth in GB/s; TFLOP/s of dense matrix products (it prints the
# double of bfloat16's, for sparse ones), in float32 without tensor cores, as torch computes by default.
_H100_BANDWIDTH = 3350.0
_H100_TFLOPS = {"float32": 67.0, "bfloat16": 989.0, "float16": 989.0}

# Of the datasheet's rate that training reaches: Llama 3's reached 38 to 43 % on H100s (arXiv 2407.21783).
_ACHIEVED = 0.4

# bitsandbytes' 4-bit weights have a float32 scale for each block of so many entries (no double quantisation here).
_NF4_BLOCK = 64

# Of an adapter's entry, which is float32 whatever the base is, and of an entry of the solver's float64 copies.
_SINGLE, _DOUBLE = 4, 8

# Adam's.
_MOMENTS = 2

# Of a factored remainder, whose columns grow from `remainder_rank` to twice that between two compressions.
_MEAN_COLUMNS = 1.5


@dataclass(frozen=True)
class EstimateSettings:
    """What to estimate, and on which machine.

    Attributes:
        config: a model's config.json, or the folder that holds it.
        r: rank of the adapter; 8 is PEFT's own default.
        target_modules: ``"all-linear"``, which is where the paper adapts too, or names of modules with commas between.
        dtype: of the base weights; bfloat16, because models of a size that asks for an estimate are published in it.
        quantization: of the base's linear layers, as `scalora train` has it done by bitsandbytes; none unless wanted.
        merge: where ScaLoRA's remainder goes; its own default.
        remainder_rank: of a factored remainder; its own default.
        tokens: per step; 4096, one sequence of Llama 2's length. The more they are, the smaller a share is a rescale.
        bandwidth: of the machine's memory, GB/s; the H100 SXM's.
        tflops: that the machine reaches in the base's dtype, TFLOP/s; None takes the H100 SXM's, times the share of it
            that training reaches.
        float32_tflops: that it reaches in float32, which a rescale computes in whatever the base is; None likewise, or
            `tflops` for a float32 base.
        interval: between rescales; every step, the default, and ten, rarely enough that a rescale is next to free.

    Raises:
        ValueError: a value is out of range.
    """

    config: Path
    r: int = DEFAULT_RANK
    target_modules: str = DEFAULT_TARGET_MODULES
    dtype: str = "bfloat16"
    quantization: Quantization = "none"
    merge: Merge = ScaLoraConfig.merge
    remainder_rank: int = ScaLoraConfig.remainder_rank
    tokens: int = 4096
    bandwidth: float = _H100_BANDWIDTH
    tflops: float | None = None
    float32_tflops: float | None = None
    interval: tuple[int, ...] = (1, 10)

    def __post_init__(self) -> None:
        for name in ("r", "tokens"):
            if (value := getattr(self, name)) < 1:
                raise InputError(f"--{name} must be at least 1, got {value}")
        for name in ("bandwidth", "tflops", "float32_tflops"):
            if (rate := getattr(self, name)) is not None and not 0 < rate < math.inf:
                raise InputError(f"--{name.replace('_', '-')} must be a positive finite number, got {rate}")
        if wrong := [interval for interval in self.interval if interval < 1]:
            raise InputError(f"--interval must be at least 1, got {wrong[0]}")
        if self.dtype not in _H100_TFLOPS:
            raise InputError(f"--dtype {self.dtype!r}: the dtypes are {', '.join(_H100_TFLOPS)}")
        if self.quantization not in (known := get_args(Quantization)):
            raise InputError(f"--quantization {self.quantization!r}: the kinds are {', '.join(known)}")
        ScaLoraConfig(merge=self.merge, remainder_rank=self.remainder_rank)

    @property
    def rate(self) -> float:
        """Floating-point operations per second that the machine reaches."""
        return _operations_per_second(self.tflops, self.dtype)

    @property
    def rescale_rate(self) -> float:
        """The same in float32."""
        if self.dtype == "float32" and self.float32_tflops is None:
            return self.rate
        return _operations_per_second(self.float32_tflops, "float32")


def _operations_per_second(tflops: float | None, dtype: str) -> float:
    return 1e12 * (_H100_TFLOPS[dtype] * _ACHIEVED if tflops is None else tflops)


@dataclass(frozen=True)
class Memory:
    """Bytes, by part; LoRA needs the first four.

    Attributes:
        base: the frozen weights.
        adapter: A and B, float32.
        gradients: of these.
        optimizer: Adam's two moments of these.
        remainder: what ScaLoRA keeps beside the weights; at its largest.
        scratch: of a rescale, for the largest stack of layers of one shape; free again after it.
    """

    base: int
    adapter: int
    gradients: int
    optimizer: int
    remainder: int
    scratch: int

    @property
    def lora(self) -> int:
        """LoRA's, in all."""
        return self.base + self.adapter + self.gradients + self.optimizer

    @property
    def scalora(self) -> int:
        """ScaLoRA's, in all."""
        return self.lora + self.remainder + self.scratch


@dataclass(frozen=True)
class Seconds:
    """Expected time.

    Attributes:
        lora: of a step of LoRA.
        columns: that a factored remainder adds to each step's forward and backward pass.
        rescale: of one rescale at the least, by part.
    """

    lora: float
    columns: float
    rescale: dict[str, float]

    def step(self, interval: int) -> float:
        """Of a step of ScaLoRA that rescales at every interval-th one, in the mean."""
        return self.lora + self.columns + sum(self.rescale.values()) / interval

    def overhead(self, interval: int) -> float:
        """Of ScaLoRA, as a share of LoRA's step."""
        return self.step(interval) / self.lora - 1


@dataclass(frozen=True)
class Estimate:
    """What training would take.

    Attributes:
        model: its class.
        parameters: of the base model, tied ones once.
        trainable: of the adapter.
        share: of the trainable ones among all, the adapter's included, as PEFT counts it.
        layers: that are adapted.
        uncounted: parameters of more than one dimension in other layers than linear ones and embeddings (experts,
            convolutions), whose arithmetic is not in the step's.
        merge: where the remainder goes.
        memory: by part.
        seconds: of a step and a rescale.
    """

    model: str
    parameters: int
    trainable: int
    share: float
    layers: int
    uncounted: int
    merge: Merge
    memory: Memory
    seconds: Seconds


def estimate(settings: EstimateSettings) -> Estimate:
    """Build the model without memory, on torch's meta device, adapt it as training would, and count.

    Raises:
        InputError: there is no config, it is not one of a model, or no layer has the name of a target.
        UnsupportedLayerError: a target is a layer that ScaLoRA can't treat.
    """
    with torch.device("meta"), warnings.catch_warnings():
        # What the libraries have to say is about training a model that no one trains here.
        warnings.simplefilter("ignore")
        base = _model(_config(settings.config), settings)
        quantised = _quantised(base, settings)
        bytes_of_base = _bytes_of_base(base, quantised, settings)
        matrices, uncounted = _matrices(base)
        adapted = get_peft_model(base, LoraConfig(r=settings.r, target_modules=_targets(base, settings)))
        trainable, total = adapted.get_nb_trainable_parameters()
        pairs = [replace(pair, quantised=pair.layer.get_base_layer() in quantised) for pair in find_lora_pairs(adapted)]
    if settings.merge == "dense" and any(pair.quantised for pair in pairs):
        raise InputError(f"--merge dense: can't merge into {settings.quantization} weights; use factored or auto")
    merge = resolve_merge(pairs, settings.merge, settings.remainder_rank)
    adapter = _SINGLE * trainable
    return Estimate(
        model=type(base).__name__,
        parameters=total - trainable,
        trainable=trainable,
        share=trainable / total,
        layers=len(pairs),
        uncounted=uncounted,
        merge=merge,
        memory=Memory(
            base=bytes_of_base,
            adapter=adapter,
            gradients=adapter,
            optimizer=_MOMENTS * adapter,
            remainder=sum(_bytes_of_remainder(pair, merge, settings) for pair in pairs),
            scratch=max(map(_bytes_of_scratch, by_shape(pairs))),
        ),
        seconds=_seconds(pairs, matrices, bytes_of_base, merge, settings),
    )


def _config(path: Path) -> PreTrainedConfig:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"model config {str(file)!r} does not exist: give a config.json or the folder that holds it")
    try:
        config = AutoConfig.from_pretrained(str(file), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # whatever a wrong value runs into
        raise InputError(f"{str(file)!r} can't be read as a model's config: {error}") from None
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(
            f"{str(file)!r} is of weights that are quantised already: give the config of the model that they were made "
            "from, and --quantization"
        )
    return config


def _model(config: PreTrainedConfig, settings: EstimateSettings) -> PreTrainedModel:
    dtype = getattr(torch, settings.dtype)
    # The class that its weights were saved from, if it says so: a BERT config could be a decoder's as well.
    named = (getattr(transformers, name, None) for name in config.architectures or ())
    saved_as: type[PreTrainedModel] | None = next(
        (kind for kind in named if isinstance(kind, type) and issubclass(kind, PreTrainedModel)), None
    )
    auto = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModel
    try:
        return saved_as._from_config(config, dtype=dtype) if saved_as else auto.from_config(config, dtype=dtype)
    except Exception as error:  # whatever a wrong value runs into
        raise InputError(
            f"no model can be built from config {str(settings.config)!r}: {type(error).__name__}: {error}"
        ) from None


def _quantised(base: PreTrainedModel, settings: EstimateSettings) -> set[nn.Module]:
    """The layers that bitsandbytes replaces: all linear ones but the head."""
    if settings.quantization == "none":
        return set()
    return {layer for layer in base.modules() if isinstance(layer, LINEAR)} - {base.get_output_embeddings()}


def _bytes_of_base(base: nn.Module, quantised: set[nn.Module], settings: EstimateSettings) -> int:
    weights = [layer.get_parameter("weight") for layer in quantised]
    packed = [weight.numel() for weight in weights]
    whole = sum(p.nbytes for p in base.parameters()) - sum(weight.nbytes for weight in weights)
    if settings.quantization == "nf4":
        return whole + sum(math.ceil(entries / 2) + _SINGLE * math.ceil(entries / _NF4_BLOCK) for entries in packed)
    # Each row of an int8 weight has a scale as well, too little to count.
    return whole + sum(packed)


def _matrices(base: nn.Module) -> tuple[int, int]:
    """Entries of the linear layers' weights, the head's too if it is tied; and those of `Estimate.uncounted`."""
    linear, known = 0, set()
    for layer in base.modules():
        if isinstance(layer, ADAPTABLE):
            known.add(layer.weight)
            linear += 0 if isinstance(layer, nn.Embedding) else layer.weight.numel()
    return linear, sum(p.numel() for p in base.parameters() if p.ndim > 1 and p not in known)


def _targets(base: nn.Module, settings: EstimateSettings) -> str | list[str]:
    if settings.target_modules == DEFAULT_TARGET_MODULES:
        return DEFAULT_TARGET_MODULES
    targets = [name.strip() for name in settings.target_modules.split(",")]
    layers = [name for name, layer in base.named_modules() if isinstance(layer, ADAPTABLE)]
    for target in targets:
        # PEFT passes over a name that it does not find, if it finds another.
        if not any(f".{name}".endswith(f".{target}") for name in layers):
            kinds = dict.fromkeys(name.rpartition(".")[2] for name in layers)
            raise InputError(f"--target-modules {target!r}: no layer has that name; there are {', '.join(kinds)}")
    return targets


def _bytes_of_remainder(pair: LoraPair, merge: Merge, settings: EstimateSettings) -> int:
    m, n, r = pair.m, pair.n, pair.r
    if merge == "factored":
        # Before a compression, which comes when there are more columns than twice the rank.
        return _SINGLE * (m + n) * (2 * settings.remainder_rank + r)
    return 2 * m * n if pair.weight.dtype in HALF else 0


def _bytes_of_scratch(stack: list[LoraPair]) -> int:
    """A, G·B, B and GᵀA of layers of one shape, stacked in float32; in float64 too the first two, then the others."""
    m, n, r = stack[0].m, stack[0].n, stack[0].r
    return len(stack) * 2 * r * ((m + n) * _SINGLE + max(m, n) * _DOUBLE)


def _seconds(
    pairs: list[LoraPair], matrices: int, bytes_of_base: int, merge: Merge, settings: EstimateSettings
) -> Seconds:
    """Expected times; `matrices` is the number of entries of all linear layers."""
    factored = merge == "factored"
    width = sum(pair.m + pair.n for pair in pairs)
    # 2 for each entry forward and 2 for the gradient with respect to the inputs; the frozen weights have none, the
    # adapter's have 2 more.
    lora = (4 * matrices + 6 * width * settings.r) * settings.tokens
    columns = 4 * width * _MEAN_COLUMNS * settings.remainder_rank * settings.tokens if factored else 0
    rescale = rescale_work_of(pairs, settings.remainder_rank if factored else None)._asdict()
    bandwidth = 1e9 * settings.bandwidth
    machine = bandwidth, settings.rescale_rate
    return Seconds(
        # With few tokens a step waits for the weights, which pass once forward and once backward.
        lora=max(lora / settings.rate, 2 * bytes_of_base / bandwidth),
        columns=columns / settings.rate,
        rescale={part: work.seconds(*machine) for part, work in rescale.items()},
    )


def as_json(settings: EstimateSettings, found: Estimate) -> dict[str, Any]:
    """The same as `markdown`, for programs: bytes and seconds, the settings, and the overhead by interval."""
    machine = {
        "config": str(settings.config),
        "tflops": settings.rate / 1e12,
        "float32_tflops": settings.rescale_rate / 1e12,
    }
    overhead = {str(interval): found.seconds.overhead(interval) for interval in settings.interval}
    return {"settings": asdict(settings) | machine, **asdict(found), "overhead": overhead}


def markdown(settings: EstimateSettings, found: Estimate) -> str:
    """What was found, in words and two tables."""
    kept = f"factored ({settings.remainder_rank} columns)" if found.merge == "factored" else "dense"
    packed = "" if settings.quantization == "none" else f", linear layers {settings.quantization}"
    sections = [
        f"{found.model}, {found.parameters:,} parameters, {settings.dtype}{packed}. Adapter: r = {settings.r} on "
        f"{found.layers} layers, {found.trainable:,} trainable parameters ({found.share:.3%} of all). Remainder: "
        f"{kept}.",
        grid(["memory, GiB", "LoRA", "ScaLoRA"], _memory_rows(found.memory)),
        "Without activations, which are the same for both, and grow with the batch. Optimizer: Adam. The scratch is "
        "taken at the optimizer's step, when the activations are gone.",
        grid(["time", "ms per step", "over LoRA"], _time_rows(found.seconds, settings.interval)),
        f"{settings.tokens:,} tokens per step, {settings.bandwidth:g} GB/s, {settings.rate / 1e12:g} TFLOP/s reached, "
        f"{settings.rescale_rate / 1e12:g} by a rescale, in float32. "
        "A step: the matrix products of the linear layers, without attention's own and without recomputation, or the "
        "weights read twice if that takes longer. A "
        f"rescale: its floor, {1000 * sum(found.seconds.rescale.values()):.3g} ms; a real one takes longer.",
    ]
    if found.uncounted:
        sections.append(
            f"Not in the step: {found.uncounted:,} parameters of other layers than linear ones and embeddings, so that "
            "it takes longer, and ScaLoRA adds a smaller share, than is said here."
        )
    return "\n\n".join(sections)


def _memory_rows(memory: Memory) -> list[list[str]]:
    only_scalora = {"remainder": memory.remainder, "scratch of a rescale": memory.scratch}
    both = {
        "base weights": memory.base,
        "adapter": memory.adapter,
        "gradients": memory.gradients,
        "optimizer state": memory.optimizer,
    }
    return [
        *([name, _gib(count), _gib(count)] for name, count in both.items()),
        *([name, _gib(0), _gib(count)] for name, count in only_scalora.items()),
        ["in all", _gib(memory.lora), _gib(memory.scalora)],
    ]


def _gib(count: int) -> str:
    return f"{count / 2**30:.3f}"


def _time_rows(seconds: Seconds, intervals: tuple[int, ...]) -> list[list[str]]:
    rows = [
        [f"ScaLoRA, I = {interval}", f"{1000 * seconds.step(interval):.4g}", f"+{seconds.overhead(interval):.2%}"]
        for interval in intervals
    ]
    return [["LoRA", f"{1000 * seconds.lora:.4g}", ""], *rows]
