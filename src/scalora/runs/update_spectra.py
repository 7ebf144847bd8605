"""The spectra of a few layers' total weight updates, measured while a run trains."""

from __future__ import annotations

import copy
import json
import logging
import math
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.pytorch_utils import Conv1D

from scalora.maths.lowrank import factors_of_product
from scalora.maths.spectrum import effective_rank_of_values, rank_of_values, singular_values
from scalora.model.adapters import LoraPair, UnsupportedLayerError, find_lora_pairs
from scalora.model.layers import LINEAR
from scalora.model.remainder_layer import REMAINDER
from scalora.model.update import dense_update, factored_update
from scalora.rescale.remainder import HALF, DenseRemainder, FactoredRemainder
from scalora.runs.run_folder import drop_later_lines, json_lines

UPDATES_FILE = "updates.jsonl"

SINGULAR_VALUES = 64  # kept of each spectrum: the rank that a factored remainder keeps by default

_LAYERS = 4  # enough to see first, middle and last layers

# What "auto" means: at most so many measurements, enough to draw a curve, within this share of the training time.
_TIMES = 20
_SHARE = 0.01

_ROWS = 1024  # unit vectors fed to a layer at a time, which bounds the memory for wide layers

_log = logging.getLogger(__name__)


class _Tracked(NamedTuple):
    """A sampled layer.

    Attributes:
        name: name in the base model.
        layer: the layer, adapted or not.
        before: the weight before the method changed anything, (out, in), on the CPU; None if it is not needed.
        pair: the layer's LoRA factors; None if it has none.
    """

    name: str
    layer: nn.Module
    before: Tensor | None
    pair: LoraPair | None


class UpdateSpectra(TrainerCallback):  # type: ignore[misc]
    """Appends the spectrum of the total update of up to four linear layers to ``updates.jsonl``.

    The total update is the difference between the layer's effective weight now and its weight before the method changed
    anything, whatever the method. For LoRA layers it is ``W_T − W_0 + s·A·Bᵀ``, or ``s·A·Bᵀ`` alone if the base weight
    has not changed. For other adapters it is read off the layer's outputs for unit vectors. All of it is in float32 or
    better, also over a half-precision base; only outputs of quantised layers are rounded. Singular values come from a
    Gram matrix in float64, whose accuracy `scalora.maths.spectrum.singular_values` states.

    The last step is always measured. With ``"auto"``, earlier measurements are made at up to 20 evenly spaced steps, as
    long as all of them and the last one, if that is no slower than the slowest so far, take less than 1 % of the
    training time so far. A run shorter than a hundred measurements takes only the last one, which then costs more.

    Needs memory for copies of the sampled layers' weights on the CPU and, while measuring, for a few float64 matrices
    of a layer's size on its device. If a GPU has no room for those, measuring stops with a warning and training goes
    on. A layer whose update is not finite is left out.

    Args:
        model: the base model, before the method has changed anything.
        config: the adapter's config, which says which layers are adapted; None for all linear layers.
        times: number of evenly spaced measurements over the run, or ``"auto"``.

    Attributes:
        seconds: total time spent on measuring so far.
    """

    def __init__(self, model: nn.Module, config: PeftConfig | None, times: int | Literal["auto"]) -> None:
        self.seconds = 0.0
        self._times = times
        self._before = {name: _weight_copy(layer) for name, layer in _sample(_adapted(model, config))}
        self._path: Path | None = None
        self._tracked: list[_Tracked] = []
        self._measured_step: int | None = None
        self._start = 0.0
        self._cost: float | None = None  # seconds of the slowest measurement; estimated before the first

    def write_to(self, folder: Path) -> None:
        """Start writing to a run folder.

        Args:
            folder: the run folder, which exists.
        """
        self._path = folder / UPDATES_FILE

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Find the sampled layers in the adapted model; drop measurements of steps that a resumed run takes again."""
        if self._path is None or not state.is_world_process_zero:
            return
        drop_later_lines(self._path, state.global_step)
        self._measured_step = max((line["step"] for line in json_lines(self._path)), default=None)
        pairs = {id(pair.layer): pair for pair in _pairs(model)}
        layers = {name: layer for name, layer in model.named_modules() if not name.endswith("base_layer")}
        for name, before in self._before.items():
            (layer,) = (layer for path, layer in layers.items() if path == name or path.endswith("." + name))
            pair = pairs.get(id(layer))
            if before is None and pair is None:
                before = _effective_weight(getattr(layer, "base_layer", layer)).cpu()
            self._tracked.append(_Tracked(name, layer, before, pair))
        start = _now()
        for tracked in self._tracked[:1]:
            # Loads the device's linear algebra library, which would distort the first measurement's time.
            singular_values(torch.eye(2, device=next(tracked.layer.parameters()).device))
        self._start = _now()
        self.seconds += self._start - start

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure if it is time, and always at the last step."""
        if self._tracked and (state.global_step == state.max_steps or self._is_due(state)):
            self._measure(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the last step of a run that stopped early."""
        if self._tracked and state.global_step != self._measured_step:
            self._measure(state.global_step)

    def _is_due(self, state: TrainerState) -> bool:
        if self._times == "auto":
            due = state.global_step % math.ceil(state.max_steps / _TIMES) == 0
            return due and self._is_affordable()
        return bool(state.global_step % max(1, state.max_steps // self._times) == 0)

    def _is_affordable(self) -> bool:
        """Whether the training time so far pays for all measurements made, one now and the last."""
        if self._cost is None:
            start = _now()
            self._lines(0, self._tracked[:1])
            self._cost = len(self._tracked) * self._spend(start)
        training = time.perf_counter() - self._start - self.seconds
        return self.seconds + 2 * self._cost <= _SHARE * training

    def _measure(self, step: int) -> None:
        assert self._path is not None
        start = _now()
        lines = self._lines(step, self._tracked)
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        self._measured_step = step
        self._cost = max(self._cost or 0.0, self._spend(start))

    def _lines(self, step: int, tracked: list[_Tracked]) -> list[dict[str, Any]]:
        """The lines of some layers; none, now and later, if the device has no memory for them."""
        threads = torch.get_num_threads()
        # Eigensolvers gain little from more, and take many times as long where other processes use the cores too.
        torch.set_num_threads(1)
        try:
            return [line for layer in tracked if (line := _line(step, layer)) is not None]
        except torch.OutOfMemoryError:
            _log.warning("no memory to measure the rank of the update: it is not measured from step %d on", step)
            self._tracked = []
            return []
        finally:
            torch.set_num_threads(threads)

    def _spend(self, start: float) -> float:
        """Account for the time since `start`, and return it."""
        seconds = _now() - start
        self.seconds += seconds
        return seconds


def _now() -> float:
    """The time when the device has done all that was asked of it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _adapted(model: nn.Module, config: PeftConfig | None) -> list[tuple[str, nn.Module]]:
    """The linear layers that the method works on, except heads, which are trained as they are."""
    targets = getattr(config, "target_modules", None)
    chosen = config if targets and targets != "all-linear" else None
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return [
        (name, module)
        for name, module in getattr(model, "base_model", model).named_modules(
            prefix=getattr(model, "base_model_prefix", "")
        )
        if isinstance(module, LINEAR)
        and module is not head
        and (chosen is None or check_target_module_exists(chosen, name))
    ]


def _sample(layers: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    count = min(_LAYERS, len(layers))
    return [layers[round(i * (len(layers) - 1) / max(1, count - 1))] for i in range(count)]


def _pairs(model: nn.Module) -> list[LoraPair]:
    """The model's LoRA pairs; none if its adapters are of another kind or their device has no float64."""
    try:
        pairs = find_lora_pairs(model, all_shapes=True)
    except UnsupportedLayerError:
        return []
    return [pair for pair in pairs if pair.lora_A.device.type != "mps"]


def _line(step: int, tracked: _Tracked) -> dict[str, Any] | None:
    """A line of the file; None if the update is not finite, as after training has diverged."""
    try:
        values = _spectrum(tracked)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return None
    if not values.isfinite().all():
        return None
    return {
        "step": step,
        "layer": tracked.name,
        "numerical_rank": rank_of_values(values),
        "effective_rank": effective_rank_of_values(values),
        "norm": values.norm().item(),
        "singular_values": values[:SINGULAR_VALUES].tolist(),
    }


@torch.no_grad()
def _spectrum(tracked: _Tracked) -> Tensor:
    """The singular values of the layer's total update, computed in the cheapest way that is exact for the layer."""
    _, layer, before, pair = tracked
    remainder = None if pair is None else getattr(pair.layer, REMAINDER, None)
    if pair is not None and not isinstance(remainder, DenseRemainder) and _keeps_base(pair, before):
        factored = isinstance(remainder, FactoredRemainder)
        factors = factored_update(pair) if factored else factors_of_product(pair.scaling * pair.lora_B, pair.lora_A.mT)
        return nn.functional.pad(factors.values, (0, min(pair.m, pair.n) - len(factors.values)))
    assert before is not None
    if pair is None or isinstance(remainder, FactoredRemainder):
        after = _effective_weight(layer)
        return singular_values(after - before.to(after.device))
    merged = remainder or DenseRemainder(pair.weight, transposed=pair.transposed)
    stored = pair.oriented(before.to(pair.weight.device))
    return singular_values(dense_update(pair, merged, pair.weight, stored, pair.lora_A, pair.lora_B))


def _keeps_base(pair: LoraPair, before: Tensor | None) -> bool:
    """Whether the base weight is what it was, so that the factors are the whole update; some starts change it."""
    return before is None or torch.equal(pair.oriented(pair.weight), before.to(pair.weight.device))


def _weight_copy(layer: nn.Module) -> Tensor | None:
    """A copy of the layer's weight, (out, in), on the CPU; None if it is quantised, because nothing merges into it."""
    return _oriented_weight(layer).to("cpu", copy=True) if _is_plain(layer) else None


def _oriented_weight(layer: Any) -> Tensor:
    """(out, in): the weight of a plain layer."""
    weight: Tensor = layer.weight.detach()
    return weight.mT if isinstance(layer, Conv1D) else weight


@torch.no_grad()
def _effective_weight(layer: nn.Module) -> Tensor:
    """(out, in): a plain layer's weight; of others, their outputs for the unit vectors, without the bias."""
    if _is_plain(layer):
        return _oriented_weight(layer).float()
    base: Any = getattr(layer, "base_layer", layer)
    features = base.in_features if isinstance(base, nn.Linear) else base.nx
    parameter = next(base.parameters())
    if parameter.dtype in HALF:
        layer = copy.deepcopy(layer).float()  # the update would drown in the rounding of half-precision outputs
        parameter = next(layer.parameters())
    dtype = parameter.dtype if parameter.is_floating_point() else torch.float32
    training = layer.training
    layer.eval()
    offset = layer(torch.zeros(1, features, dtype=dtype, device=parameter.device))
    rows = [
        layer(nn.functional.one_hot(indices, features).to(dtype)) - offset
        for indices in torch.split(torch.arange(features, device=parameter.device), _ROWS)
    ]
    layer.train(training)
    return torch.cat(rows).mT.float()


def _is_plain(layer: nn.Module) -> bool:
    """Whether the layer is a linear layer that holds an unquantised weight, without an adapter."""
    # Some of PEFT's layers are linear layers by their class, with the base's weight for theirs.
    adapted = isinstance(layer, BaseTunerLayer) or not isinstance(layer, LINEAR)
    return not adapted and type(layer.weight) is nn.Parameter and layer.weight.is_floating_point()
