"""``scalora estimate``: memory and time of training a model, from its config alone, without reading any weights."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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
from scalora.bench.settings import EstimateSettings
from scalora.bench.several_gpus import (
    GpuMemory,
    Traffic,
    bytes_of_units,
    memory_of_one,
    rescale_collectives,
    traffic,
    work_of_one,
)
from scalora.block_signs import ordinary_entries
from scalora.config import DEFAULT_TARGET_MODULES, MERGES_INTO_THE_BASE, Merge
from scalora.model.adapters import LoraPair
from scalora.model.layers import ADAPTABLE
from scalora.model.memory import (
    Memory,
    bytes_of_base,
    bytes_of_second_moments,
    pairs_over_quantised,
    quantisable_layers,
    training_memory,
)
from scalora.model.placement import check_places, resolve_merge
from scalora.runs.errors import InputError
from scalora.studies.grid import grid

# Bytes per entry of an adapter, which is float32 whatever the dtype of the base.
_SINGLE = 4

# Mean number of columns of a factored remainder, as a multiple of `remainder_rank`: between two compressions they grow
# from `remainder_rank` to twice that.
_MEAN_COLUMNS = 1.5

_NAMES = {"adamw": "AdamW", "pair_adamw": "PairAdamW"}


@dataclass(frozen=True)
class Seconds:
    """Estimated times in seconds.

    Attributes:
        lora: duration of a step of LoRA.
        columns: time that a factored remainder adds to the forward and backward pass of each step.
        rescale: lower bound on the duration of one rescale, by part; on several GPUs ``"traffic"`` is one.
    """

    lora: float
    columns: float
    rescale: dict[str, float]

    def step(self, interval: int) -> float:
        """Mean duration of a step of ScaLoRA.

        Args:
            interval: steps between rescales.
        """
        return self.lora + self.columns + sum(self.rescale.values()) / interval

    def overhead(self, interval: int) -> float:
        """Time that ScaLoRA adds to a step, as a fraction of LoRA's step.

        Args:
            interval: steps between rescales.
        """
        return self.step(interval) / self.lora - 1


@dataclass(frozen=True)
class Estimate:
    """Estimated cost of training a model.

    Attributes:
        model: name of the model's class.
        parameters: number of parameters of the base model; tied parameters count once.
        trainable: number of parameters of the adapter.
        share: trainable parameters as a fraction of all, the adapter's included, as PEFT counts them.
        layers: number of adapted layers.
        uncounted: number of parameters whose arithmetic is not counted: those with more than one dimension in layers
            that are neither linear layers, nor embeddings, nor experts, such as convolutions and routers.
        experts: bytes of adapted experts that are one parameter. PEFT adds the update to a copy of theirs in each pass.
        merge: where the remainder goes, any but ``"auto"``.
        signed_adapter: bytes of the ordinary adapter of LoRA with block signs, in float32.
        memory: memory by part; with several GPUs, that of each.
        seconds: times of a step and a rescale.
        traffic: what each of several GPUs receives; None for a single one.
    """

    model: str
    parameters: int
    trainable: int
    share: float
    layers: int
    uncounted: int
    experts: int
    merge: Merge
    signed_adapter: int
    memory: Memory
    seconds: Seconds
    traffic: Traffic | None = None


def estimate(settings: EstimateSettings) -> Estimate:
    """Estimate the cost of training with LoRA and ScaLoRA.

    Builds the model on torch's meta device, which takes no memory, and adapts it as training would.

    Args:
        settings: the model, the adapter and the machine.

    Raises:
        InputError: there is no config, no model can be built from it, or no layer has the name of a target.
        UnsupportedLayerError: a target is a layer that ScaLoRA can't adapt.
    """
    with torch.device("meta"), warnings.catch_warnings():
        # The libraries warn about training, and nothing is trained here.
        warnings.simplefilter("ignore")
        base = _model(_config(settings.config), settings)
        quantised = set() if settings.quantization == "none" else quantisable_layers(base)
        base_bytes = bytes_of_base(base, quantised, settings.quantization)
        chosen = getattr(base.config.get_text_config(), "num_experts_per_tok", None)
        matrices, uncounted = _matrices(base, chosen)
        units = bytes_of_units(base)
        adapted = get_peft_model(base, LoraConfig(r=settings.r, **_targets(base, settings)))
        trainable, total = adapted.get_nb_trainable_parameters()
        pairs = pairs_over_quantised(adapted, quantised)
    if settings.merge in MERGES_INTO_THE_BASE and any(pair.quantised for pair in pairs):
        raise InputError(
            f"--merge {settings.merge}: can't merge into {settings.quantization} weights; use auto or factored"
        )
    check_places(pairs, settings.merge, settings.remainder_rank)
    merge = resolve_merge(pairs, settings.merge, settings.remainder_rank)
    adapter = _SINGLE * trainable
    in_pairs = pairs if settings.optimizer == "pair_adamw" else []
    memory = training_memory(base_bytes, adapter, adapter, pairs, merge, settings.remainder_rank, in_pairs=in_pairs)
    sent = None
    if settings.gpus > 1:
        collectives = rescale_collectives(pairs, merge, settings.parallel, settings.gpus)
        memory = memory_of_one(
            memory,
            units,
            collectives,
            merge,
            settings.parallel,
            settings.gpus,
            undivided=sum(map(bytes_of_second_moments, in_pairs)),
        )
        sent = traffic(pairs, merge, settings.parallel, settings.gpus, base=base_bytes, adapter=adapter)
    return Estimate(
        model=type(base).__name__,
        parameters=total - trainable,
        trainable=trainable,
        share=trainable / total,
        layers=len(pairs),
        uncounted=uncounted,
        experts=sum(pair.weight.nbytes for pair in pairs if pair.experts > 1),
        merge=merge,
        signed_adapter=_SINGLE * sum(map(ordinary_entries, pairs)),
        memory=memory,
        seconds=_seconds(pairs, matrices, chosen, base_bytes, merge, settings, sent),
        traffic=sent,
    )


def _config(path: Path) -> PreTrainedConfig:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"model config {str(file)!r} does not exist: give a config.json or the folder that holds it")
    try:
        config = AutoConfig.from_pretrained(str(file), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # whatever an invalid value leads to
        raise InputError(f"{str(file)!r} can't be read as a model's config: {error}") from None
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(
            f"{str(file)!r} is the config of a model that is quantised already: give that of the original model, and "
            "--quantization"
        )
    return config


def _model(config: PreTrainedConfig, settings: EstimateSettings) -> PreTrainedModel:
    dtype = getattr(torch, settings.dtype)
    # The class that the weights were saved from, if the config names it: a BERT config may also be that of a decoder.
    named = (getattr(transformers, name, None) for name in config.architectures or ())
    saved_as: type[PreTrainedModel] | None = next(
        (kind for kind in named if isinstance(kind, type) and issubclass(kind, PreTrainedModel)), None
    )
    auto = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModel
    try:
        return saved_as._from_config(config, dtype=dtype) if saved_as else auto.from_config(config, dtype=dtype)
    except Exception as error:  # whatever an invalid value leads to
        raise InputError(
            f"no model can be built from config {str(settings.config)!r}: {type(error).__name__}: {error}"
        ) from None


def _matrices(base: nn.Module, chosen: int | None) -> tuple[float, int]:
    """Number of weights that a token is multiplied by, including the head's even if it is tied, and the uncounted."""
    multiplied, known = 0.0, set()
    for layer in base.modules():
        if isinstance(layer, ADAPTABLE):
            known.add(layer.weight)
            multiplied += 0 if isinstance(layer, nn.Embedding) else layer.weight.numel()
        for weights in layer.parameters(recurse=False) if chosen else ():
            if weights.ndim == 3 and len(weights) == getattr(layer, "num_experts", None):
                known.add(weights)
                multiplied += weights[0].numel() * chosen  # type: ignore[operator]
    return multiplied, sum(p.numel() for p in base.parameters() if p.ndim > 1 and p not in known)


def _targets(base: nn.Module, settings: EstimateSettings) -> dict[str, Any]:
    """PEFT's settings of what is adapted: layers, and parameters such as experts."""
    if settings.target_modules == DEFAULT_TARGET_MODULES:
        return {"target_modules": DEFAULT_TARGET_MODULES}
    layers = [name for name, layer in base.named_modules() if isinstance(layer, ADAPTABLE)]
    parameters = [name for name, parameter in base.named_parameters() if parameter.ndim == 3]
    found: dict[str, list[str]] = {"target_modules": [], "target_parameters": []}
    for target in map(str.strip, settings.target_modules.split(",")):
        of_layer, of_parameter = (
            any(f".{name}".endswith(f".{target}") for name in names) for names in (layers, parameters)
        )
        # PEFT ignores a name that matches no layer, as long as another one does.
        if not of_layer and not of_parameter:
            kinds = dict.fromkeys(name.rpartition(".")[2] for name in layers + parameters)
            raise InputError(f"--target-modules {target!r}: no layer has that name; the names are {', '.join(kinds)}")
        found["target_modules" if of_layer else "target_parameters"].append(target)
    return found


def _seconds(
    pairs: list[LoraPair],
    matrices: float,
    chosen: int | None,
    base_bytes: int,
    merge: Merge,
    settings: EstimateSettings,
    sent: Traffic | None,
) -> Seconds:
    """Estimated times; a token is multiplied by so many weights of `matrices`, and goes through `chosen` experts."""
    factored = merge == "factored"
    stacks = [pair for pair in pairs if pair.experts > 1]
    width = sum(pair.m + pair.n for pair in pairs if pair.experts == 1)
    # Operations per weight and token: 2 forward and 2 for the gradient with respect to the input. The adapter's weights
    # take 2 more for their own gradient; frozen weights have none.
    lora = (4 * matrices + 6 * width * settings.r) * settings.tokens
    # The update of experts is added to all their weights, whatever the number of tokens, and has the gradients of all
    # its factors' entries, for which those weights have gradients as if they were trained.
    lora += sum(6 * pair.weight.numel() * pair.r for pair in stacks)
    lora += sum(2 * pair.m * pair.n * (chosen or pair.experts) for pair in stacks) * settings.tokens
    kept = _MEAN_COLUMNS * settings.remainder_rank if factored else 0
    columns = 4 * width * kept * settings.tokens + sum(6 * pair.weight.numel() * kept for pair in stacks)
    rescale = rescale_work_of(pairs, merge, settings.remainder_rank)._asdict()
    if sent is not None:
        rescale = work_of_one(rescale, merge, settings.parallel, settings.gpus)
    bandwidth, link = 1e9 * settings.bandwidth, 1e9 * settings.link
    machine = bandwidth, settings.rescale_rate
    arriving = {} if sent is None else {"traffic": sent.rescale / link}
    return Seconds(
        # With few tokens a step is limited by reading the weights, once in the forward and once in the backward pass,
        # or by receiving them.
        lora=max(lora / settings.rate, 2 * base_bytes / bandwidth, 0 if sent is None else sent.step / link),
        columns=columns / settings.rate,
        rescale={part: work.seconds(*machine) for part, work in rescale.items()} | arriving,
    )


def as_json(settings: EstimateSettings, found: Estimate) -> dict[str, Any]:
    """The estimate and its settings as plain data, for JSON.

    Args:
        settings: what was estimated.
        found: the estimate.

    Returns:
        The fields of `Estimate`, in bytes and seconds; ``"settings"``, with the rates used in place of None; and
        ``"overhead"``, the time added to LoRA's step as a fraction of it, by interval.
    """
    machine = {
        "config": str(settings.config),
        "tflops": settings.rate / 1e12,
        "float32_tflops": settings.rescale_rate / 1e12,
    }
    overhead = {str(interval): found.seconds.overhead(interval) for interval in settings.interval}
    return {"settings": asdict(settings) | machine, **asdict(found), "overhead": overhead}


def markdown(settings: EstimateSettings, found: Estimate) -> str:
    """The estimate in Markdown: a summary, a table of memory and a table of times.

    Args:
        settings: what was estimated.
        found: the estimate.
    """
    kept = f"factored ({settings.remainder_rank} columns)" if found.merge == "factored" else found.merge
    packed = "" if settings.quantization == "none" else f", linear layers {settings.quantization}"
    sections = [
        f"{found.model}, {found.parameters:,} parameters, {settings.dtype}{packed}. Adapter: r = {settings.r} on "
        f"{found.layers} layers, {found.trainable:,} trainable parameters ({found.share:.3%} of all). Remainder: "
        f"{kept}.",
        *_traffic(settings, found.traffic),
        grid(
            ["memory, GiB" if found.traffic is None else "GiB per GPU", "LoRA", "ScaLoRA"], _memory_rows(found.memory)
        ),
        "Without activations, which are the same for both and grow with the batch. Optimizer: "
        f"{_NAMES[settings.optimizer]}. The scratch memory is in use during the optimizer's step, when the activations "
        "have been freed; where rescales are replayed (dense on one GPU) it stays reserved.",
        grid(["time", "ms per step", "over LoRA"], _time_rows(found.seconds, settings.interval)),
        f"{settings.tokens:,} tokens per step, {settings.bandwidth:g} GB/s, {settings.rate / 1e12:g} TFLOP/s reached, "
        f"{settings.rescale_rate / 1e12:g} by a rescale (float32). "
        "Step: the matrix products of the linear layers, without attention's own products and without recomputation, "
        "or reading the weights twice if that takes longer. "
        f"Rescale: a lower bound, {1000 * sum(found.seconds.rescale.values()):.3g} ms; a real one takes longer."
        f"{_passes(found)}",
        f"Block signs take LoRA's memory. Their adapter takes {_gib(found.signed_adapter)} GiB on the disk in float32, "
        f"LoRA's {_gib(_SINGLE * found.trainable)}.",
    ]
    if found.experts:
        unpacked = "" if settings.quantization == "none" else " They are not quantised, because only linear layers are."
        sections.append(
            "PEFT adds the update of experts that are one parameter to a copy of their weights in each pass, which "
            f"takes {_gib(found.experts)} GiB more without gradient checkpointing.{unpacked}"
        )
    if found.uncounted:
        sections.append(
            f"Not in the step: {found.uncounted:,} parameters of layers that are neither linear nor embeddings. A real "
            "step takes longer than estimated here, and ScaLoRA adds a smaller fraction to it."
        )
    return "\n\n".join(sections)


def _passes(found: Estimate) -> str:
    """What the estimate of a step lacks if the remainder is factored."""
    if found.merge != "factored":
        return ""
    return (
        " So do the passes of a factored remainder, whose narrow products do not reach that rate: measured on an H200 "
        "at a width of 2048, they were a third of a step."
    )


def _traffic(settings: EstimateSettings, sent: Traffic | None) -> list[str]:
    """What one of several GPUs receives, in words."""
    if sent is None:
        return []
    shares = ", ".join(f"{sent.share(interval):.2%} with I = {interval}" for interval in settings.interval)
    return [
        f"{settings.gpus} GPUs, {settings.parallel}: each receives {sent.step / 1e6:,.1f} MB in a step, and "
        f"{sent.rescale / 1e6:,.1f} MB for a rescale: {shares}. At {settings.link:g} GB/s they take "
        f"{sent.step / 1e6 / settings.link:.3g} ms and {sent.rescale / 1e6 / settings.link:.3g} ms. A step takes at "
        "least as long as what it receives."
    ]


def _memory_rows(memory: Memory) -> list[list[str]]:
    only_scalora = {"remainder": memory.remainder, "scratch memory of a rescale": memory.scratch}
    both = {
        "base weights": memory.base,
        "adapter": memory.adapter,
        "gradients": memory.gradients,
        "optimizer state": memory.optimizer,
    }
    if isinstance(memory, GpuMemory):
        both["whole layers to compute with"] = memory.layers
        only_scalora["gathered by a rescale"] = memory.gathered
    return [
        *([name, _gib(count), _gib(count)] for name, count in both.items()),
        *([name, _gib(0), _gib(count)] for name, count in only_scalora.items()),
        ["total", _gib(memory.lora), _gib(memory.scalora)],
    ]


def _gib(count: int) -> str:
    return f"{count / 2**30:.3f}"


def _time_rows(seconds: Seconds, intervals: tuple[int, ...]) -> list[list[str]]:
    rows = [
        [f"ScaLoRA, I = {interval}", f"{1000 * seconds.step(interval):.4g}", f"+{seconds.overhead(interval):.2%}"]
        for interval in intervals
    ]
    return [["LoRA", f"{1000 * seconds.lora:.4g}", ""], *rows]
