"""What runs need, estimated before anything is downloaded: memory of a GPU, disk, hours, a token, packages.

Estimates are made of the model's config alone: of its folder, of the hub, or, where that can't be reached, of the
section ``needs`` of the run's config.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    TrainingArguments,
)

from scalora.bench.floor import rescale_work_of
from scalora.bench.hub import Hub, ask
from scalora.bench.settings import ACHIEVED, H100_BANDWIDTH, H100_TFLOPS
from scalora.model.adapters import LoraPair
from scalora.model.layers import ADAPTABLE
from scalora.model.memory import bytes_of_base, pairs_over_quantised, quantisable_layers, training_memory
from scalora.model.placement import resolve_merge
from scalora.rivals.scalora import ScaLoraMethod
from scalora.runs.dry_run import adapted_without_weights
from scalora.runs.errors import InputError
from scalora.runs.optimizer_checks import stepped_in_pairs
from scalora.runs.prepare import method_of, peft_config_of, training_arguments
from scalora.runs.settings import Settings, checked_settings
from scalora.runs.sharding import splits_weights
from scalora.runs.tasks import LABELLED, WITH_HEAD
from scalora.studies.cells import read_cells
from scalora.studies.reproduction import Reproduction

# Numbers per token that a transformer's layer keeps for the backward pass: about so many vectors of the hidden size
# (inputs of the norms, queries, keys, values, what attention gives) and of the feed-forward part's size.
_KEPT_HIDDEN, _KEPT_FEED_FORWARD = 9, 4

# Attention without a fused kernel keeps about so many scores per head and pair of tokens.
_KEPT_SCORES = 4

# Bytes of a logit, kept in half precision, as a logarithm in float32, and as a gradient.
_BYTES_OF_LOGIT = 10

# Seconds that a layer's forward and backward pass with an adapter take at least on a GPU, whatever the size: about 200
# kernels, at some 15 microseconds each to start them from Python. A guess to the order of magnitude.
_SECONDS_OF_LAYER = 3e-3

_HALF, _SINGLE = 2, 4


class Job(NamedTuple):
    """Runs of one form.

    Attributes:
        name: what the runs are called.
        settings: the settings of one of them.
        runs: how many there are.
        tests: what each trained model is scored on, besides `settings`; the number of scored models is `tested`.
        tested: how many of the runs are scored.
    """

    name: str
    settings: Settings
    runs: int = 1
    tests: Sequence[Settings] = ()
    tested: int = 0


@dataclass
class Needs:
    """What some jobs need.

    Attributes:
        models: what is known of each model, by name, in words.
        runs: number of runs.
        gpu: bytes of the hungriest run on a GPU; 0 if none uses a GPU, or all split their weights.
        hungriest: its name.
        downloads: bytes of models and data.
        kept: bytes of results that stay.
        passing: bytes of a run's results that are deleted when it has been scored; each GPU has one such run.
        hours: of one GPU; None if the number of steps is not known.
        gated: models that need a token.
        packages: packages that are imported besides scalora's own.
        unknown: models of which nothing is known beforehand.
    """

    models: dict[str, str] = field(default_factory=dict)
    runs: int = 0
    gpu: int = 0
    hungriest: str = ""
    downloads: int = 0
    kept: int = 0
    passing: int = 0
    hours: float | None = 0.0
    gated: list[str] = field(default_factory=list)
    packages: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


class _Model(NamedTuple):
    """What a run's model needs, found without weights."""

    parameters: int
    saved: int  # bytes of the merged model
    state: int  # bytes of the exact state beside it, or of the adapter
    moments: int  # bytes of the optimizer's state in a checkpoint
    static: int  # bytes of weights, gradients, optimizer and remainder
    operations: float  # per token of a step, forward and backward
    again: float  # per token, for recomputing the forward pass
    layers: int
    hidden: int
    feed_forward: int
    heads: int
    vocabulary: int
    fused: bool
    rescale: float  # seconds per step


def needs_of(jobs: Sequence[Job]) -> Needs:
    """Estimate what runs need.

    Args:
        jobs: the runs.

    Raises:
        InputError: a config can't be used, or the shape that it states is none.
    """
    needs = Needs()
    seen: set[str] = set()
    data: dict[str, float] = {}
    for job in jobs:
        settings = job.settings
        needs.runs += job.runs
        local = Path(settings.model).expanduser().exists()
        hub = Hub() if local else ask(settings.model)
        config = _config(settings, hub)
        data[json.dumps(settings.data.model_dump(include={"train", "eval"}), sort_keys=True)] = settings.needs.data_gb
        needs.packages += [name for name in settings.needs.packages if name not in needs.packages]
        gated = not local and (settings.needs.gated if hub.gated is None else hub.gated)
        if config is None:
            needs.hours = None
            needs.gated += [settings.model] * (gated and settings.model not in needs.gated)
            needs.unknown += [settings.model] * (settings.model not in needs.unknown)
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the libraries warn about training, and nothing is trained here
            model = _model(_Key.of(settings, config))
            arguments = training_arguments(settings, method_of(settings), evaluates=settings.data.eval is not None)
        if settings.model not in seen and not local:
            seen.add(settings.model)
            size = _SINGLE if settings.task in WITH_HEAD else _HALF
            left = hub.left_to_load(settings.model, size * model.parameters)
            needs.downloads += left
            needs.gated += [settings.model] * (gated and left > 0)
        source = "its folder" if local else "the hub's config" if hub.config is not None else "the recipe's figures"
        needs.models[settings.model] = f"{model.parameters / 1e6:,.0f} million parameters (by {source})"
        # What each GPU has of weights that are split depends on how many there are: `scalora estimate --gpus` says it.
        if not settings.training.get("use_cpu") and not splits_weights(arguments):
            memory = model.static + _activations(model, settings, arguments)
            if memory > needs.gpu:
                needs.gpu, needs.hungriest = memory, job.name
        size = model.saved + model.state if settings.save_model else 0
        checkpoints = _checkpoints(settings, arguments) * (model.state + model.moments)
        if job.tests:
            needs.passing = max(needs.passing, size + checkpoints)
        else:
            needs.kept += job.runs * (size + checkpoints)
        seconds = _seconds(model, settings, arguments)
        tests = [_seconds_of_test(model, test) for test in job.tests]
        if seconds is None or needs.hours is None:
            needs.hours = None
        else:
            needs.hours += (job.runs * seconds + job.tested * sum(tests)) / 3600
    needs.downloads += round(2e9 * sum(data.values()))  # as downloaded, and as datasets writes it for reading
    return needs


def jobs_of(reproduction: Reproduction) -> list[Job]:
    """The runs of a recipe that are still to be done, those of each task and method together.

    Args:
        reproduction: the recipe.

    Raises:
        InputError: a run's config is invalid.
    """
    jobs = []
    for task, study in reproduction.studies.items():
        cells = read_cells(study).cells
        for method in study.methods:
            rate = study.rates(method)[0]
            chosen = {(rate, seed) for seed in study.tuning_seeds or study.seeds for rate in study.rates(method)}
            later = [seed for seed in study.seeds if study.tuning_seeds and seed not in study.tuning_seeds]
            done = int(((cells["method"] == method) & (cells["status"] == "finished")).sum())
            left = len(chosen) + len(later) - done
            if left > 0:
                cell = study.cell(method, rate, study.seeds[0])
                tests = [checked_settings(content) for content in cell.tests.values()]
                tested = min(left, len(study.seeds)) if study.tuning_seeds else left
                jobs.append(Job(f"{method} on {task}", cell.settings, left, tests, tested if tests else 0))
    return jobs


class _Key(NamedTuple):
    """What decides about a model without weights, as texts: several runs have the same."""

    config: str
    settings: str

    @classmethod
    def of(cls, settings: Settings, config: PreTrainedConfig) -> _Key:
        own = settings.model_dump(
            include={
                "model",
                "task",
                "method",
                "method_options",
                "optimizer",
                "dtype",
                "quantization",
                "lora",
                "scalora",
            }
        )
        own["training"] = {key: settings.training[key] for key in ("optim", "deepspeed") if key in settings.training}
        return cls(config.to_json_string(use_diff=False), json.dumps(own, sort_keys=True, default=str))


def _config(settings: Settings, hub: Hub) -> PreTrainedConfig | None:
    """The model's config; None if nothing is known of it."""
    path = Path(settings.model).expanduser()
    try:
        if path.exists():
            folder = path / "model" if (path / "model" / "config.json").is_file() else path
            return AutoConfig.from_pretrained(str(folder)) if (folder / "config.json").is_file() else None
        stated = hub.config or settings.needs.model
        return AutoConfig.for_model(**stated) if stated else None
    except Exception as error:  # whatever an invalid value leads to
        if hub.config is not None:
            return None  # of a kind that this version does not know; loading it will say more
        raise InputError(f"needs.model of {settings.model!r} is no model's config: {error}") from None


@lru_cache(maxsize=64)
def _model(key: _Key) -> _Model:
    settings = Settings.model_validate(json.loads(key.settings))
    stated = json.loads(key.config)
    config = AutoConfig.for_model(stated.pop("model_type"), **stated)
    kind = AutoModelForSequenceClassification if settings.task in WITH_HEAD else AutoModelForCausalLM
    with torch.device("meta"):
        base = kind.from_config(config, dtype=getattr(torch, settings.dtype))
    quantised = quantisable_layers(base) if settings.quantization else set()
    weights = bytes_of_base(base, quantised, settings.quantization)
    parameters = sum(p.numel() for p in base.parameters())
    matrices = sum(m.weight.numel() for m in base.modules() if isinstance(m, ADAPTABLE) and not _is_embedding(m))
    method = method_of(settings)
    model = adapted_without_weights(method, base, peft_config_of(settings, method))
    trained = [p for p in model.parameters() if p.requires_grad]
    trained_bytes = sum(p.nbytes for p in trained)
    adapter = trained_bytes if isinstance(model, PeftModel) else 0
    pairs: list[LoraPair] = []
    in_pairs = stepped_in_pairs(settings, method, model)
    rescale, state = 0.0, trained_bytes
    if isinstance(method, ScaLoraMethod):
        pairs = pairs_over_quantised(model, quantised)
        merge = resolve_merge(pairs, method.config.merge, method.config.remainder_rank)
        rank = method.config.remainder_rank
        memory = training_memory(weights, adapter, trained_bytes, pairs, merge, rank, in_pairs=in_pairs)
        work = rescale_work_of(pairs, merge, rank)
        rescale = work.seconds(1e9 * H100_BANDWIDTH, 1e12 * ACHIEVED * H100_TFLOPS["float32"])
        rescale /= max(1, method.config.interval)
        state = adapter + memory.remainder
        if merge != "factored":
            state += sum(pair.weight.nbytes for pair in pairs)
    else:
        memory = training_memory(weights, adapter, trained_bytes, in_pairs=in_pairs)
    sizes: Any = config.get_text_config()
    rank_two = sum(p.numel() for p in trained if p.ndim == 2)
    own_gradient = 6 if adapter else 2  # an adapter's weights are met on top of the base's; those of the base are not
    return _Model(
        parameters=parameters,
        saved=parameters * getattr(torch, settings.dtype).itemsize,
        state=state,
        moments=memory.optimizer,
        static=memory.scalora,
        operations=4 * matrices + own_gradient * rank_two,
        again=2 * matrices,
        layers=sizes.num_hidden_layers,
        hidden=sizes.hidden_size,
        feed_forward=getattr(sizes, "intermediate_size", None) or 4 * sizes.hidden_size,
        heads=sizes.num_attention_heads,
        vocabulary=sizes.vocab_size,
        fused=bool(getattr(base, "_supports_sdpa", False)),
        rescale=rescale,
    )


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding)


def _longest(settings: Settings, arguments: TrainingArguments) -> int:
    if settings.task in LABELLED:
        return settings.data.max_tokens or 512
    return int(getattr(arguments, "max_length", None) or 1024)


def _recomputes(arguments: TrainingArguments) -> bool:
    return bool(getattr(arguments, "activation_checkpointing", False) or arguments.gradient_checkpointing)


def _activations(model: _Model, settings: Settings, arguments: TrainingArguments) -> int:
    """Bytes of what the backward pass of a batch of the longest examples needs, in half precision."""
    batch: int = arguments.per_device_train_batch_size
    length = _longest(settings, arguments)
    tokens = batch * length
    layer = _HALF * tokens * (_KEPT_HIDDEN * model.hidden + _KEPT_FEED_FORWARD * model.feed_forward)
    if not model.fused:
        layer += _HALF * _KEPT_SCORES * batch * model.heads * length**2
    logits = 0 if settings.task in WITH_HEAD else _BYTES_OF_LOGIT * tokens * model.vocabulary
    if _recomputes(arguments):
        return _SINGLE * tokens * model.hidden * model.layers + layer + logits
    # Without recomputation the half-precision copies of float32 weights stay as well.
    copies = _HALF * model.parameters if settings.dtype == "float32" else 0
    return layer * model.layers + logits + copies


def _steps(settings: Settings, arguments: TrainingArguments) -> float | None:
    """Optimizer steps of a run; None if the number of examples is not known."""
    if arguments.max_steps > 0:
        return float(arguments.max_steps)
    if settings.needs.examples is None:
        return None
    batch: int = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    epochs: float = arguments.num_train_epochs
    return epochs * math.ceil(settings.needs.examples / batch)


def _checkpoints(settings: Settings, arguments: TrainingArguments) -> int:
    """How many checkpoints there are at the end."""
    strategy = str(getattr(arguments.save_strategy, "value", arguments.save_strategy))
    if strategy == "no":
        return 0
    saves = float(arguments.num_train_epochs)
    if strategy == "steps":
        every = arguments.save_steps
        saves = (_steps(settings, arguments) or 0) / every if every >= 1 else 1 / every
    limit = arguments.save_total_limit
    return min(math.ceil(saves), limit or math.ceil(saves))


def _seconds(model: _Model, settings: Settings, arguments: TrainingArguments) -> float | None:
    """Seconds of training; None if the number of steps is not known."""
    steps = _steps(settings, arguments)
    if steps is None:
        return None
    batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    length = min(settings.needs.tokens or math.inf, _longest(settings, arguments))
    operations = model.operations + (model.again if _recomputes(arguments) else 0)
    computing = operations * length * batch / (1e12 * ACHIEVED * H100_TFLOPS["bfloat16"])
    starting = model.layers * _SECONDS_OF_LAYER * arguments.gradient_accumulation_steps
    return float(steps * (max(computing, starting) + model.rescale))


def _seconds_of_test(model: _Model, test: Settings) -> float:
    """Seconds of generating the answers of a test: each token of a batch reads the weights once."""
    batches = math.ceil((test.needs.examples or 1000) / test.evaluate.batch_size)
    reading = model.saved / (1e9 * H100_BANDWIDTH * ACHIEVED)
    starting = model.layers * _SECONDS_OF_LAYER / 3  # forward alone
    return batches * test.evaluate.max_new_tokens * max(reading, starting)
