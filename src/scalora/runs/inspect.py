"""``scalora inspect``: what a run has done to each layer's weight, and what its next step would leave uncaptured."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from peft import PeftModel
from peft.utils.integrations import dequantize_module_weight
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from scalora.config import ScaLoraConfig
from scalora.maths.lowrank import factors_of_product
from scalora.maths.residuals import step_residuals
from scalora.maths.spectrum import update_figures
from scalora.model.adapters import LoraPair, UnsupportedLayerError, find_lora_pairs
from scalora.model.factored_layer import REMAINDER
from scalora.model.layers import LINEAR
from scalora.model.update import dense_update, factored_update
from scalora.rescale.remainder import DenseRemainder, FactoredRemainder
from scalora.rivals.method import Method
from scalora.rivals.scalora import ScaLoraMethod
from scalora.runs.errors import InputError
from scalora.runs.finished_run import FinishedRun
from scalora.runs.measure import SINGULAR_VALUES
from scalora.runs.models import Source
from scalora.runs.run_folder import json_lines
from scalora.runs.train import GRADIENT_BATCHES, trainer_maker, training_arguments
from scalora.saving.export import load_model

_FACTORS = [f"{factor}_p{quantile}" for factor in ("alpha", "beta") for quantile in (10, 50, 90)]
_LOGGED = ["column_share", "scalar_share", "left_alone_share", *_FACTORS]

_NAMED = 3  # layers that an error names

_PROGRESS = Console(stderr=True)  # so that the tables alone go to standard output

_NOT_TRAINING = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "report_to": "none"}


class _Layer(NamedTuple):
    """An adapted layer: its name in the base model, and its factors where they are what the method trains."""

    name: str
    module: Any
    pair: LoraPair | None


class _Trained(NamedTuple):
    """A trained model, its adapted layers, and the base model where the layers' own weights are no longer its."""

    model: nn.Module
    layers: list[_Layer]
    base: PreTrainedModel | None


def inspect_run(
    path: str | Path, *, layers: str | None = None, batches: int = GRADIENT_BATCHES, rank: int | None = None
) -> dict[str, Any]:
    """Look at every adapted layer of a run.

    The total update is that of the exact state or of the adapter where the run has one, else the difference of the
    trained model's weights to the base's. The residuals (`scalora.maths.residuals.step_residuals`, at the trained weight)
    are of runs that train A and B alone: ScaLoRA and its controls, LoRA and its optimizers. Needs memory for two
    models, and for the residuals that of the layers' gradients in float32.

    Args:
        path: of a run folder, or of a checkpoint in one.
        layers: regular expression that a layer's name must contain; all layers when None.
        batches: of training data, without dropout, whose gradients are summed for the residuals; none of them at 0.
        rank: of the oracle; the adapter's own when None.

    Returns:
        ``{"step", "layers", "factors"}``, plain data. Each layer has name, shape (out, in), numerical_rank,
        effective_rank, norm, relative_norm (to the base weight's), adapter_rank, singular_values (the largest 64) and
        residual (none, scalar, column, chosen, oracle; None where there are no A and B, or no gradient). The factors
        are what was logged of the first, middle and last rescale; empty where nothing was.

    Raises:
        InputError: the run is none, unfinished, or saved no model; no layer matches; a gradient is not finite.
        StateError: its state is damaged, or belongs to another base.
    """
    matches = _pattern(layers)
    run = FinishedRun(Path(path))
    step = run.step
    _require_something(run)
    factors = _logged_factors(run, step)
    examples = run.examples() if batches and (run.state or run.adapter) else None
    trained = _trained(run)
    wanted = [layer for layer in trained.layers if matches(layer.name)]
    if not wanted:
        names = ", ".join(layer.name for layer in trained.layers[:_NAMED])
        raise InputError(f"--layers {layers!r} matches none of the {len(trained.layers)} layers ({names}, …)")
    steps = examples is not None and wanted[0].pair is not None
    if rank is not None and not steps:
        raise InputError(
            f"--rank {rank} is of the best next step, and none is looked at: there are no A and B, or no batches"
        )
    # Before the gradients: bitsandbytes changes the layout of 4-bit weights that a CPU computes with.
    rows = [_described(layer, trained.base) for layer in track(wanted, "spectra", console=_PROGRESS)]
    if steps:
        backward = partial(_backward, run, trained.model, examples, batches)
        for row, residual in zip(rows, _residuals(run, trained.model, wanted, backward, rank), strict=True):
            row["residual"] = residual
    return {"step": step, "layers": rows, "factors": factors}


def _require_something(run: FinishedRun) -> None:
    """Raise `InputError` if a run has left nothing that its update could be read from."""
    if run.state or run.adapter or run.model:
        return
    if run.is_checkpoint:
        reason = f"is a checkpoint of {run.settings.method!r} without the whole update: inspect the finished run"
    elif not run.settings.save_model:
        reason = "saved no model (save_model: false), so there is nothing to inspect"
    else:
        reason = "holds no folder 'model', 'adapter' or 'delta', so there is nothing to inspect"
    raise InputError(f"run {str(run.path)!r} {reason}")


def _trained(run: FinishedRun) -> _Trained:
    """The exact state or the adapter on the base, if A and B are all that is trained, else the trained model."""
    if run.state is not None:
        return _adapted(run, load_model(run.load(), run.state))
    if run.adapter is not None:
        try:
            model = PeftModel.from_pretrained(run.load(), run.adapter, is_trainable=True)
        except Exception as error:  # whatever PEFT, safetensors or torch raise
            raise InputError(f"adapter {str(run.adapter)!r} can't be loaded: {type(error).__name__}: {error}") from None
        try:
            return _adapted(run, model)
        except UnsupportedLayerError as error:  # DoRA, HiRA: not an update A·Bᵀ
            if run.model is None:
                raise InputError(
                    f"no merged model beside {str(run.adapter)!r}, which can't be read alone: {error}"
                ) from None
    base, model = run.load(), run.load(Source(str(run.model), None))
    layers = [
        _Layer(name, module, None)
        for name, module in model.base_model.named_modules(prefix=model.base_model_prefix)
        if isinstance(module, LINEAR) and not torch.equal(module.weight, base.get_submodule(name).weight)
    ]
    if not layers:
        raise InputError(f"model {str(run.model)!r} is the base model: training has changed no linear layer")
    return _Trained(model, layers, base)


def _adapted(run: FinishedRun, model: PeftModel) -> _Trained:
    pairs = find_lora_pairs(model)
    layers = [_Layer(pair.name.removeprefix("base_model.model."), pair.layer, pair) for pair in pairs]
    merged = isinstance(getattr(pairs[0].layer, REMAINDER, None), DenseRemainder)
    return _Trained(model, layers, run.load() if merged else None)


def _scaling_config(run: FinishedRun) -> ScaLoraConfig:
    """How the run scaled its adapters; the defaults for a method that did not."""
    scales = issubclass(run.method, ScaLoraMethod)
    return ScaLoraConfig.from_dict(run.settings.scalora) if scales else ScaLoraConfig()


def _logged_factors(run: FinishedRun, step: int) -> dict[str, dict[str, float]]:
    """What was logged at the first, middle and last rescale up to a step; empty where nothing was."""
    path = run.folder / "metrics.jsonl"
    if not path.is_file():
        raise InputError(f"{str(path)!r} can't be read: there is no such file")
    keys = [f"scalora/{name}" for name in _LOGGED]
    logged = [
        {"step": line["step"]} | {name: line[key] for name, key in zip(_LOGGED, keys, strict=True)}
        for line in json_lines(path)
        if isinstance(line, dict) and {"step", *keys} <= line.keys() and line["step"] <= step
    ]
    return {"first": logged[0], "middle": logged[len(logged) // 2], "last": logged[-1]} if logged else {}


def _pattern(layers: str | None) -> Callable[[str], object]:
    try:
        return re.compile(layers or "").search
    except re.error as error:
        raise InputError(f"--layers {layers!r} is not a regular expression: {error}") from None


@torch.no_grad()
def _described(layer: _Layer, base: PreTrainedModel | None) -> dict[str, Any]:
    """Everything about a layer's update, and no residual yet."""
    own = base.get_submodule(layer.name) if base is not None else layer.module.get_base_layer()
    weight = dequantize_module_weight(own)
    if layer.pair is not None:
        rows, columns = layer.pair.oriented(weight).shape
    else:
        rows, columns = (weight.mT if isinstance(own, Conv1D) else weight).shape
    try:
        values = _singular_values(layer, weight)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        raise InputError(
            f"layer {layer.name!r}: the update has NaN or infinite entries: the run has diverged"
        ) from None
    figures = update_figures(values)
    return {
        "name": layer.name,
        "shape": [rows, columns],
        **figures._asdict(),
        "relative_norm": float(figures.norm / weight.double().norm()),
        "singular_values": values[:SINGULAR_VALUES].tolist(),
        "residual": None,
    }


def _singular_values(layer: _Layer, base_weight: Tensor) -> Tensor:
    """Of the total update, from its factors if it has them."""
    pair = layer.pair
    if pair is None:
        update: Tensor = layer.module.weight.double() - base_weight.double()
    else:
        A, B = _factors(pair)
        remainder = getattr(pair.layer, REMAINDER, None)
        if remainder is None:
            return factors_of_product(pair.scaling * A, B).values
        if isinstance(remainder, FactoredRemainder):
            return factored_update(pair).values
        update = dense_update(pair, remainder, pair.weight, base_weight, pair.lora_A.detach(), pair.lora_B.detach())
    values: Tensor = torch.linalg.svdvals(update)
    return values


def _factors(pair: LoraPair) -> tuple[Tensor, Tensor]:
    """The paper's A (m, r) and B (n, r)."""
    return pair.lora_B.detach(), pair.lora_A.detach().mT


def _target_norm(run: FinishedRun, pair: LoraPair) -> float:
    """``1/(s·√(Lη))`` of the run; the default for a method without it."""
    rate: Any = run.settings.training.get("learning_rate", run.method.learning_rate)
    return _scaling_config(run).column_norm(pair.scaling, rate)


def _residuals(
    run: FinishedRun, model: nn.Module, layers: list[_Layer], backward: Callable[[], None], rank: int | None
) -> list[dict[str, float] | None]:
    """Of each layer with factors; None where it got no gradient."""
    # Frozen before a trainer is made, which makes bfloat16 of what is trained on a quantised base.
    model.requires_grad_(False).eval()
    gradients = _gradients(layers, backward)
    residuals: list[dict[str, float] | None] = []
    for layer in track(layers, "residuals", console=_PROGRESS):
        assert layer.pair is not None
        A, B = _factors(layer.pair)
        G = gradients.pop(layer.name, None)
        if G is None or not G.any():
            residuals.append(None)
            continue
        try:
            residual = step_residuals(
                G,
                A,
                B,
                target_norm=_target_norm(run, layer.pair),
                mode=_scaling_config(run).mode,
                oracle_rank=rank,
            )
        except ValueError as error:
            raise InputError(f"layer {layer.name!r}: {error}: has the run diverged?") from None
        residuals.append(residual._asdict())
    return residuals


def _gradients(layers: list[_Layer], backward: Callable[[], None]) -> dict[str, Tensor]:
    """The gradient (m, n) of the whole weight of each layer, from what goes into it and what comes back.

    So a quantised base has one too, and of a frozen model nothing else keeps a gradient.
    """
    gradients: dict[str, Tensor] = {}

    def watch(name: str, module: Any, args: tuple[Tensor, ...], output: Any) -> None:
        if not output.requires_grad:  # nothing before it has asked for a gradient
            output.requires_grad_(True)
        output.register_hook(partial(add, name, module, args[0].detach()))

    def add(name: str, module: Any, x: Tensor, upstream: Tensor) -> None:
        upstream = upstream.flatten(0, -2).float()
        if x.is_floating_point():
            G = upstream.mT @ x.flatten(0, -2).float()
        else:  # an embedding, whose inputs stand for unit vectors
            G = upstream.new_zeros(upstream.shape[1], module.get_base_layer().num_embeddings)
            G.index_add_(1, x.flatten(), upstream.mT)
        gradients[name] = G + gradients.get(name, 0)

    handles = [layer.module.register_forward_hook(partial(watch, layer.name)) for layer in layers]
    try:
        backward()
    finally:
        for handle in handles:
            handle.remove()
    return gradients


def _backward(run: FinishedRun, model: nn.Module, examples: Dataset, batches: int) -> None:
    """Batches of the run's training data, made as its trainer made them, forward and backward."""
    settings = run.settings
    with tempfile.TemporaryDirectory() as scratch:
        arguments = training_arguments(
            settings.model_copy(update={"output_dir": scratch, "training": settings.training | _NOT_TRAINING}),
            Method(),
            evaluates=False,
        )
        trainer = trainer_maker(settings, run.tokenizer, {"train": examples}, arguments, run.labels)(model)
        loader = trainer.get_train_dataloader()
        count = min(batches, len(loader))
        for batch in track(islice(loader, count), "gradients", total=count, console=_PROGRESS):
            trainer.compute_loss(model, trainer._prepare_inputs(batch)).backward()
