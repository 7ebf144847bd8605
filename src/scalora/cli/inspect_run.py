"""``scalora inspect``: what a run has done to each layer's weight, and what its next step would leave uncaptured."""

from __future__ import annotations

import json
import re
import statistics
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
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from scalora.adapters import REMAINDER, LoraPair, UnsupportedLayerError, find_lora_pairs
from scalora.cli.data import label_names, load_examples
from scalora.cli.errors import InputError
from scalora.cli.evaluate import class_names
from scalora.cli.measure import SINGULAR_VALUES
from scalora.cli.models import Source, load_base, load_tokenizer, resolve_source
from scalora.cli.settings import method_class, run_settings
from scalora.cli.train import GRADIENT_BATCHES, trainer_maker, training_arguments
from scalora.config import ScaLoraConfig
from scalora.diagnostics import StepResiduals, step_residuals, update_figures
from scalora.export import load_model
from scalora.lowrank import factors_of_product
from scalora.ordinary_adapter import update_factors
from scalora.remainder import DenseRemainder, FactoredRemainder
from scalora.rivals.method import Method
from scalora.rivals.scalora import ScaLoraMethod
from scalora.state import STATE_FILE

_FACTORS = [f"{factor}_p{quantile}" for factor in ("alpha", "beta") for quantile in (10, 50, 90)]
_LOGGED = ["column_share", "scalar_share", "left_alone_share", *_FACTORS]

# Heading, and which figure is shown in what format.
_UPDATE_COLUMNS = {
    "shape": ("shape", ""),
    "rank": ("numerical_rank", "g"),
    "effective": ("effective_rank", ".1f"),
    "norm": ("norm", ".2g"),
    "relative": ("relative_norm", ".2g"),
    "adapter": ("adapter_rank", "g"),
}
_CAPTION = (
    "rank: singular values above a thousandth of the largest. relative: norm to the base weight's. adapter: columns "
    "that an ordinary adapter needs to leave out at most a thousandth. Of each kind: median, least–most."
)

_LOOK: dict[str, Any] = {"box": SIMPLE_HEAD, "pad_edge": False}

_NAMED = 3  # layers that an error names

_PROGRESS_OF_CHECKPOINT = "trainer_state.json"

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
    trained model's weights to the base's. The residuals (`scalora.diagnostics.step_residuals`, at the trained weight)
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
    run = _Run(Path(path))
    factors = run.factors()
    examples = run.examples() if batches and (run.state or run.adapter) else None
    trained = run.trained()
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
    return {"step": run.step, "layers": rows, "factors": factors}


def show(inspected: dict[str, Any], title: str) -> None:
    """Print a line for each layer, a summary of each kind of layer, and the factors over time."""
    rows = inspected["layers"]
    console = Console()
    update = Table(title=f"Updates of {title}, step {inspected['step']}", caption=_CAPTION, **_LOOK)
    _fill(update, rows, _UPDATE_COLUMNS)
    console.print(update)
    if judged := [row["residual"] | {"name": row["name"]} for row in rows if row["residual"]]:
        step = Table(title="Share of the gradient that the next step leaves, by how A and B are scaled", **_LOOK)
        _fill(step, judged, {kind: (kind, ".2f") for kind in StepResiduals._fields})
        console.print(step)
    if factors := inspected["factors"]:
        times = [f"{when}: step {logged['step']}" for when, logged in factors.items()]
        over_time = Table("rescale", *times, **_LOOK)
        for name in _LOGGED:
            over_time.add_row(name, *(f"{logged[name]:.3g}" for logged in factors.values()))
        console.print(over_time)


def _fill(table: Table, rows: list[dict[str, Any]], columns: dict[str, tuple[str, str]]) -> None:
    """A line for each layer, then one for each kind of layer, which is what follows the last number in their names."""
    for column in ("layer", *columns):
        table.add_column(column, overflow="fold")
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        short = re.sub(r"^\D*(?=\d+\.)", "", row["name"])
        table.add_row(short, *(_figure(row[key], form) for key, form in columns.values()))
        kinds.setdefault(re.split(r"\.\d+\.", row["name"])[-1], []).append(row)
    table.add_section()
    for kind, members in {**kinds, "all": rows}.items():
        spreads = (_spread([row[key] for row in members], form) for key, form in columns.values())
        table.add_row(f"{kind} ({len(members)})", *spreads, style="bold")


def _spread(values: list[Any], form: str) -> str:
    """Median, least and most; of shapes nothing."""
    if isinstance(values[0], list):
        return ""
    low, middle, high = (_figure(value, form) for value in (min(values), statistics.median(values), max(values)))
    return middle if low == high else f"{middle}\n{low}–{high}"


def _figure(value: Any, form: str) -> str:
    return "×".join(map(str, value)) if isinstance(value, list) else f"{value:{form}}"


class _Run:
    """A finished run, or a checkpoint of one, and where what it has learned is."""

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise InputError(f"run {str(path)!r} does not exist")
        checkpoint = not (path / "config.yaml").is_file() and (path / _PROGRESS_OF_CHECKPOINT).is_file()
        folder = path.resolve().parent.parent if checkpoint else path
        self.settings = run_settings(folder)
        self.method = method_class(self.settings)
        self.step = _step(path, checkpoint)
        self._metrics = folder / "metrics.jsonl"

        state, adapter, model = (path if checkpoint else path / name for name in ("delta", "adapter", "model"))
        self.state = state if (state / STATE_FILE).is_file() else None
        # Of other methods a checkpoint's adapter is not the whole update.
        self.adapter = adapter if self.method.ordinary_adapter and (adapter / "adapter_config.json").is_file() else None
        self.model = model if (model / "config.json").is_file() else None
        if not (self.state or self.adapter or self.model):
            if checkpoint:
                why = f"is a checkpoint of {self.settings.method!r} without the whole update: inspect the finished run"
            elif not self.settings.save_model:
                why = "saved no model (save_model: false), so there is nothing to inspect"
            else:
                why = "holds no folder 'model', 'adapter' or 'delta', so there is nothing to inspect"
            raise InputError(f"run {str(path)!r} {why}")
        self._source = resolve_source(self.settings.model)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(self._source, self.settings)
        self.labels: list[str] | None = None
        if self.settings.task == "classification":
            saved = self.model and class_names(Source(str(self.model), None), self.settings)
            self.labels = saved or label_names(self.examples(), str(self.settings.data.train), self.settings.data)

    def examples(self) -> Dataset:
        """What it was trained on."""
        return load_examples(str(self.settings.data.train), "train")

    def trained(self) -> _Trained:
        """The exact state or the adapter on the base, if A and B are all that is trained, else the trained model."""
        if self.state is not None:
            return self._adapted(load_model(self._load(self._source), self.state))
        if self.adapter is not None:
            try:
                model = PeftModel.from_pretrained(self._load(self._source), self.adapter, is_trainable=True)
            except Exception as error:  # whatever PEFT, safetensors or torch raise
                raise InputError(
                    f"adapter {str(self.adapter)!r} can't be loaded: {type(error).__name__}: {error}"
                ) from None
            try:
                return self._adapted(model)
            except UnsupportedLayerError as error:  # DoRA, HiRA: not an update A·Bᵀ
                if self.model is None:
                    raise InputError(
                        f"no merged model beside {str(self.adapter)!r}, which can't be read alone: {error}"
                    ) from None
        base, model = self._load(self._source), self._load(Source(str(self.model), None))
        layers = [
            _Layer(name, module, None)
            for name, module in model.base_model.named_modules(prefix=model.base_model_prefix)
            if isinstance(module, (nn.Linear, Conv1D))
            and not torch.equal(module.weight, base.get_submodule(name).weight)
        ]
        if not layers:
            raise InputError(f"model {str(self.model)!r} is the base model: training has changed no linear layer")
        return _Trained(model, layers, base)

    def _adapted(self, model: PeftModel) -> _Trained:
        pairs = find_lora_pairs(model)
        layers = [_Layer(pair.name.removeprefix("base_model.model."), pair.layer, pair) for pair in pairs]
        merged = isinstance(getattr(pairs[0].layer, REMAINDER, None), DenseRemainder)
        return _Trained(model, layers, self._load(self._source) if merged else None)

    def _load(self, source: Source) -> PreTrainedModel:
        return load_base(source, self.settings, self.tokenizer, self.labels)

    def target_norm(self, pair: LoraPair) -> float:
        """``1/(s·√(Lη))`` of the run; the default for a method without it."""
        rate: Any = self.settings.training.get("learning_rate", self.method.learning_rate)
        return self.scaling_config().column_norm(pair.scaling, rate)

    def scaling_config(self) -> ScaLoraConfig:
        """How the run scaled its adapters; the defaults for a method that did not."""
        scales = issubclass(self.method, ScaLoraMethod)
        return ScaLoraConfig.from_dict(self.settings.scalora) if scales else ScaLoraConfig()

    def factors(self) -> dict[str, dict[str, float]]:
        """What was logged at the first, middle and last rescale up to this step."""
        try:
            lines = self._metrics.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{str(self._metrics)!r} can't be read: {error}") from None
        logged = [factors for line in lines if (factors := _factors_logged(line)) and factors["step"] <= self.step]
        if not logged:
            return {}
        return {"first": logged[0], "middle": logged[len(logged) // 2], "last": logged[-1]}


def _factors_logged(line: str) -> dict[str, float] | None:
    """In a line of metrics; None where there are none, or where it was cut off when the run was killed."""
    try:
        logs = json.loads(line)
        return {"step": logs["step"]} | {name: logs[f"scalora/{name}"] for name in _LOGGED}
    except (ValueError, KeyError, TypeError):
        return None


def _step(path: Path, checkpoint: bool) -> int:
    """The steps taken, from what is written last."""
    name, key = (_PROGRESS_OF_CHECKPOINT, "global_step") if checkpoint else ("summary.json", "steps")
    try:
        return int(json.loads((path / name).read_text(encoding="utf-8"))[key])
    except FileNotFoundError:
        raise InputError(
            f"run {str(path)!r} is not finished: go on with it (`scalora train CONFIG --resume`), or inspect one of "
            f"the checkpoints in {str(path / 'trainer')!r}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{str(path / name)!r} can't be read: {error}") from None


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
    stored_transposed = layer.pair.transposed if layer.pair is not None else isinstance(own, Conv1D)
    try:
        values = _singular_values(layer, weight)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        raise InputError(
            f"layer {layer.name!r}: the update has NaN or infinite entries: the run has diverged"
        ) from None
    figures = update_figures(values)
    return {
        "name": layer.name,
        "shape": list(weight.mT.shape if stored_transposed else weight.shape),
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
            return update_factors(pair).values
        update = remainder.exact(pair.weight).double() - base_weight.double()
        update = (update.mT if pair.transposed else update) + pair.scaling * A.double() @ B.double().mT
    values: Tensor = torch.linalg.svdvals(update)
    return values


def _factors(pair: LoraPair) -> tuple[Tensor, Tensor]:
    """The paper's A (m, r) and B (n, r)."""
    return pair.lora_B.detach(), pair.lora_A.detach().mT


def _residuals(
    run: _Run, model: nn.Module, layers: list[_Layer], backward: Callable[[], None], rank: int | None
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
                target_norm=run.target_norm(layer.pair),
                mode=run.scaling_config().mode,
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


def _backward(run: _Run, model: nn.Module, examples: Dataset, batches: int) -> None:
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
