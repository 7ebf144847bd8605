"""``scalora inspect``: the update of each layer's weight in a run, and the residual that its next step would leave."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from scalora.config import ScaLoraConfig
from scalora.maths.lowrank import factors_of_product
from scalora.maths.residuals import step_residuals
from scalora.maths.spectrum import update_figures
from scalora.model.adapters import LoraPair, UnsupportedLayerError, find_lora_pairs
from scalora.model.layers import LINEAR, pattern_key
from scalora.model.remainder_layer import REMAINDER
from scalora.model.target_norms import target_norms
from scalora.model.update import dense_update, factored_update
from scalora.rescale.remainder import DenseRemainder, FactoredRemainder
from scalora.rivals.method import Method
from scalora.rivals.scalora import ScaLoraMethod
from scalora.runs.data import Examples
from scalora.runs.errors import InputError
from scalora.runs.finished_run import FinishedRun
from scalora.runs.model_limits import text_limit
from scalora.runs.models import Source
from scalora.runs.prepare import method_of, trainer_maker, training_arguments, with_rate
from scalora.runs.run_folder import json_lines
from scalora.runs.tasks import LABELLED
from scalora.runs.track import track
from scalora.runs.train import GRADIENT_BATCHES
from scalora.runs.training_defaults import NOT_TRAINING
from scalora.runs.update_spectra import SINGULAR_VALUES
from scalora.saving.export import load_model

_FACTORS = [f"{factor}_p{quantile}" for factor in ("alpha", "beta") for quantile in (10, 50, 90)]
_LOGGED = ["column_share", "scalar_share", "matrix_share", "left_alone_share", *_FACTORS]

_LISTED = 3  # layers that an error message names


class _Layer(NamedTuple):
    """An adapted layer: its name in the base model, its module, and its factors if the method trains nothing else.

    The experts of a layer that is a stack of them are layers of their own, with their number.
    """

    name: str
    module: Any
    pair: LoraPair | None
    expert: int | None = None

    def part_of(self, weight: Tensor) -> Tensor:
        """The layer's part of a base weight, as a matrix in storage order."""
        return weight if self.pair is None else self.pair.matrices_of_weight(weight)[self.expert or 0]


class _Trained(NamedTuple):
    """A trained model, its adapted layers, and the base model if the layers' base weights have been changed."""

    model: nn.Module
    layers: list[_Layer]
    base: PreTrainedModel | None


def inspect_run(
    path: str | Path, *, layers: str | None = None, batches: int = GRADIENT_BATCHES, rank: int | None = None
) -> dict[str, Any]:
    """Analyse the adapted layers of a run.

    The total update of a layer is computed from the exact state or the adapter if the run has one, otherwise as the
    difference between the weights of the trained model and of the base. Residuals
    (`scalora.maths.residuals.step_residuals`, at the trained weight) are defined for methods that train A and B alone:
    ScaLoRA and its controls, LoRA and its optimizers, but not block signs, whose factors are others. Needs memory for
    two models, and for the residuals also for the layers' gradients in float32.

    Args:
        path: a run folder, or a checkpoint in one.
        layers: regular expression that must match somewhere in a layer's name. None: all layers.
        batches: number of batches of training data, without dropout, whose gradients are summed for the residuals. 0:
            no residuals.
        rank: rank of the oracle. None: that of the adapter.

    Returns:
        Plain data: ``"step"``, the number of steps taken; ``"layers"``, a list; and ``"factors"``, the shares and
        quantiles logged at the ``"first"``, ``"middle"`` and ``"last"`` rescale, empty if none were logged. Each layer
        has ``name``, ``shape`` (out, in), ``numerical_rank``, ``effective_rank``, Frobenius ``norm``, ``relative_norm``
        (relative to the base weight's), ``adapter_rank``, the largest 64 ``singular_values``, and ``residual``, with
        the entries ``none``, ``scalar``, ``column``, ``polar``, ``matrix``, ``chosen`` and ``oracle``; None without A
        and B or a gradient.

    Raises:
        InputError: the path is not that of a run, the run is unfinished or saved no model, no layer matches, or a
            gradient is not finite.
        StateError: the run's state is damaged, or belongs to another base.
    """
    matches = _pattern(layers)
    run = FinishedRun(Path(path))
    step = run.step
    _require_something(run)
    factors = _logged_factors(run, step)
    # The gradients of GRPO's loss would take new answers, and the user's code that rewards them.
    factors_step = run.settings.task != "grpo" and run.method.trains_its_adapter
    judges = batches > 0 and factors_step and bool(run.state or run.adapter)
    examples = run.examples() if judges else None
    trained = _trained(run)
    wanted = [layer for layer in trained.layers if matches(layer.name)]
    if not wanted:
        names = ", ".join(layer.name for layer in trained.layers[:_LISTED])
        raise InputError(f"--layers {layers!r} matches none of the {len(trained.layers)} layers ({names}, …)")
    judged = examples if wanted[0].pair is not None else None
    if rank is not None and judged is None:
        raise InputError(
            f"--rank {rank} is the rank of the oracle for the next step, which can't be computed: the run has no A and "
            "B or does not train them, its task is grpo, or --batches is 0"
        )
    # Before the gradients: bitsandbytes changes the layout of 4-bit weights when a CPU computes with them.
    rows = [_described(layer, trained.base) for layer in track(wanted, "spectra")]
    if judged is not None:
        backward = partial(_backward, run, trained.model, judged, batches)
        for row, residual in zip(rows, _residuals(run, trained.model, wanted, backward, rank), strict=True):
            row["residual"] = residual
    return {"step": step, "layers": rows, "factors": factors}


def _require_something(run: FinishedRun) -> None:
    """Raise `InputError` if a run contains nothing that its update could be computed from."""
    if run.state or run.adapter or run.model:
        return
    if run.is_checkpoint:
        reason = f"is a checkpoint of {run.settings.method!r} without the total update: inspect the finished run"
    elif not run.settings.save_model:
        reason = "saved no model (save_model: false), so that there is nothing to inspect"
    else:
        reason = "holds no folder 'model', 'adapter' or 'delta', so that there is nothing to inspect"
    raise InputError(f"run {str(run.path)!r} {reason}")


def _trained(run: FinishedRun) -> _Trained:
    """The base with the exact state or the adapter, if A and B are all that is trained; else the trained model."""
    if run.state is not None:
        return _adapted(run, load_model(run.load(), run.state))
    if run.adapter is not None:
        try:
            model = PeftModel.from_pretrained(run.load(), run.adapter, is_trainable=True)
        except Exception as error:  # whatever PEFT, safetensors or torch raise
            raise InputError(f"adapter {str(run.adapter)!r} can't be loaded: {type(error).__name__}: {error}") from None
        try:
            return _adapted(run, model)
        except UnsupportedLayerError as error:  # DoRA, HiRA: the update is not A·Bᵀ
            if run.model is None:
                raise InputError(
                    f"adapter {str(run.adapter)!r} can't be inspected, and there is no merged model beside it: {error}"
                ) from None
    base, model = run.load(), run.load(Source(str(run.model), None))
    layers = [
        _Layer(name, module, None)
        for name, module in model.base_model.named_modules(prefix=model.base_model_prefix)
        if isinstance(module, LINEAR) and not torch.equal(module.weight, base.get_submodule(name).weight)
    ]
    if not layers:
        raise InputError(f"model {str(run.model)!r} equals the base model: training has changed no linear layer")
    return _Trained(model, layers, base)


def _adapted(run: FinishedRun, model: PeftModel) -> _Trained:
    pairs = find_lora_pairs(model, all_shapes=True)
    layers = []
    for pair in pairs:
        name = pattern_key(pair.name.removeprefix("base_model.model."), pair.layer)
        if pair.experts == 1:
            layers.append(_Layer(name, pair.layer, pair))
        layers += [_Layer(f"{name}.{e}", pair.layer, pair, e) for e in range(pair.experts) if pair.experts > 1]
    merged = isinstance(getattr(pairs[0].layer, REMAINDER, None), DenseRemainder)
    return _Trained(model, layers, run.load() if merged else None)


def _logged_factors(run: FinishedRun, step: int) -> dict[str, dict[str, float]]:
    """What was logged at the first, middle and last rescale up to a step; empty if nothing was."""
    path = run.folder / "metrics.jsonl"
    if not path.is_file():
        raise InputError(f"{str(path)!r} does not exist: the run folder is incomplete")
    needed = {"step", *(f"scalora/{name}" for name in _FACTORS)}
    rescales = [
        line for line in json_lines(path) if isinstance(line, dict) and needed <= line.keys() and line["step"] <= step
    ]
    logged = [
        {"step": line["step"]} | {name: line[key] for name in _LOGGED if (key := f"scalora/{name}") in line}
        for line in rescales
    ]
    return {"first": logged[0], "middle": logged[len(logged) // 2], "last": logged[-1]} if logged else {}


def _pattern(layers: str | None) -> Callable[[str], object]:
    try:
        return re.compile(layers or "").search
    except re.error as error:
        raise InputError(f"--layers {layers!r} is not a regular expression: {error}") from None


@torch.no_grad()
def _described(layer: _Layer, base: PreTrainedModel | None) -> dict[str, Any]:
    """The entries of one layer in the result, without its residual."""
    whole = _base_weight(layer, base)
    weight = layer.part_of(whole)
    transposed = isinstance(layer.module, Conv1D) if layer.pair is None else layer.pair.transposed
    rows, columns = (weight.mT if transposed else weight).shape
    try:
        values = _singular_values(layer, whole)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        raise InputError(
            f"layer {layer.name!r}: the update has NaN or infinite entries; the run has diverged"
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


def _base_weight(layer: _Layer, base: PreTrainedModel | None) -> Tensor:
    """The base weight that a layer was trained on, of all experts of a stack."""
    if layer.pair is None or not isinstance(layer.module, ParamWrapper):
        own = base.get_submodule(layer.name) if base is not None else layer.module.get_base_layer()
        weight: Tensor = dequantize_module_weight(own)
        return weight
    if base is None:
        return layer.pair.weight.detach()
    parameter: Tensor = base.get_parameter(layer.name if layer.expert is None else layer.name.rpartition(".")[0])
    return parameter.detach()


def _singular_values(layer: _Layer, base_weight: Tensor) -> Tensor:
    """Singular values of the total update, from its factors if it has any."""
    pair = layer.pair
    if pair is None:
        update: Tensor = layer.module.weight.double() - base_weight.double()
    else:
        A, B = _factors(layer)
        remainder = getattr(pair.layer, REMAINDER, None)
        if remainder is None:
            return factors_of_product(pair.scaling * A, B).values
        expert = layer.expert or 0
        if isinstance(remainder, FactoredRemainder):
            return factored_update(pair, expert).values
        factors = pair.lora_A.detach(), pair.lora_B.detach()
        update = dense_update(pair, remainder, pair.weight, base_weight, *factors, expert)
    values: Tensor = torch.linalg.svdvals(update)
    return values


def _factors(layer: _Layer) -> tuple[Tensor, Tensor]:
    """The paper's A (m, r) and B (n, r) of a layer that has them."""
    pair, expert = layer.pair, layer.expert or 0
    assert pair is not None
    return pair.matrices_of_B(pair.lora_B.detach())[expert], pair.matrices_of_A(pair.lora_A.detach())[expert].mT


def _scaling(run: FinishedRun, pairs: list[LoraPair]) -> tuple[ScaLoraConfig, dict[str, float]]:
    """The run's settings of ScaLoRA, and the layers' target norms by name; the defaults if it does not rescale."""
    method = method_of(run.settings)
    config = method.config if isinstance(method, ScaLoraMethod) else ScaLoraConfig()
    settings = with_rate(run.settings, method)
    settings = settings.model_copy(update={"training": settings.training | NOT_TRAINING})
    rate = training_arguments(settings, method, evaluates=False).learning_rate
    norms = target_norms(pairs, {pair.name: (rate, rate) for pair in pairs}, config)
    return config, {name: of_A for name, (of_A, _) in norms.items()}


def _residuals(
    run: FinishedRun, model: nn.Module, layers: list[_Layer], backward: Callable[[], None], rank: int | None
) -> list[dict[str, float] | None]:
    """The residuals of each layer; None for a layer without a gradient. All layers have factors."""
    # Freeze before a trainer is created: TRL converts trainable parameters on a quantised base to bfloat16.
    model.requires_grad_(False).eval()
    gradients = _gradients(layers, backward)
    config, norms = _scaling(run, [layer.pair for layer in layers if layer.pair is not None])
    residuals: list[dict[str, float] | None] = []
    for layer in track(layers, "residuals"):
        assert layer.pair is not None
        A, B = _factors(layer)
        G = gradients.pop(layer.name, None)
        if G is None or not G.any():
            residuals.append(None)
            continue
        try:
            residual = step_residuals(
                G,
                A,
                B,
                target_norm=norms[layer.pair.name],
                mode=config.mode,
                optimum=config.optimum,
                oracle_rank=rank,
            )
        except ValueError as error:
            raise InputError(f"layer {layer.name!r}: {error}; has the run diverged?") from None
        residuals.append(residual._asdict())
    return residuals


def _gradients(layers: list[_Layer], backward: Callable[[], None]) -> dict[str, Tensor]:
    """The gradient (m, n) with respect to each layer's weight, from the layer's inputs and output gradients.

    This works for quantised weights, too, and with the model frozen no other gradients take up memory. Convolutions and
    parameters that are adapted themselves, as experts are, have gradients of their own.
    """
    gradients: dict[str, Tensor] = {}

    def watch(name: str, module: Any, args: tuple[Tensor, ...], output: Any) -> None:
        if not output.requires_grad:  # no earlier layer is watched
            output.requires_grad_(True)
        output.register_hook(partial(add, name, module, args[0].detach()))

    def add(name: str, module: Any, x: Tensor, upstream: Tensor) -> None:
        upstream = upstream.flatten(0, -2).float()
        if x.is_floating_point():
            G = upstream.mT @ x.flatten(0, -2).float()
        else:  # an embedding, whose inputs are indices of unit vectors
            G = upstream.new_zeros(upstream.shape[1], module.get_base_layer().num_embeddings)
            G.index_add_(1, x.flatten(), upstream.mT)
        gradients[name] = G + gradients.get(name, 0)

    handles = []
    for layer in layers:
        if layer.pair is None or (layer.pair.is_matrix and not isinstance(layer.module, ParamWrapper)):
            handles.append(layer.module.register_forward_hook(partial(watch, layer.name)))
        else:  # its inputs and outputs are not those of one matrix
            layer.pair.weight.requires_grad_(True)
    try:
        backward()
    finally:
        for handle in handles:
            handle.remove()
    for layer in layers:
        if layer.name not in gradients and layer.pair is not None and layer.pair.weight.grad is not None:
            gradients[layer.name] = layer.pair.oriented(layer.part_of(layer.pair.weight.grad)).float()
    return gradients


def _backward(run: FinishedRun, model: nn.Module, examples: Examples, batches: int) -> None:
    """Forward and backward passes over batches of training data, created as in the run."""
    settings = run.settings
    with tempfile.TemporaryDirectory() as scratch:
        arguments = training_arguments(
            settings.model_copy(update={"output_dir": scratch, "training": settings.training | NOT_TRAINING}),
            Method(),
            evaluates=False,
        )
        limit = None if settings.task not in LABELLED else text_limit(settings.data.max_tokens, run.tokenizer, model)
        trainer = trainer_maker(settings, run.tokenizer, {"train": examples}, arguments, run.labels, limit)(model)
        loader = trainer.get_train_dataloader()
        count = min(batches, len(loader))
        for batch in track(islice(loader, count), "gradients", total=count):
            trainer.compute_loss(model, trainer._prepare_inputs(batch)).backward()
