"""What a run costs and what it does to the weights: seconds of each step, peak memory, the rank of the update."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from scalora.model.layers import LINEAR
from scalora.maths.spectrum import effective_rank_of_values, rank_of_values
from scalora.runs.peak_memory import peak_memory_bytes

# Enough to see first, middle and last layers; each costs an SVD whenever it is looked at.
_LAYERS = 4

SINGULAR_VALUES = 64  # kept of each spectrum: the rank that a factored remainder keeps by default


class StepClock(TrainerCallback):  # type: ignore[misc]
    """Times the optimizer steps, and nothing between them: evaluation, saving and measuring don't count.

    On a CUDA device by events in its own stream: nothing waits for it until the times are read.
    """

    def __init__(self) -> None:
        self._seconds: list[float] = []
        self._unread: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._start: float | torch.cuda.Event = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start, with the batch at hand."""
        self._start = _mark()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop, after the optimizer's step."""
        stop = _mark()
        if isinstance(stop, float) and isinstance(self._start, float):
            self._seconds.append(stop - self._start)
        elif isinstance(stop, torch.cuda.Event) and isinstance(self._start, torch.cuda.Event):
            self._unread.append((self._start, stop))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Put the training time so far into every log."""
        if logs is not None:
            logs["seconds"] = self.total

    @property
    def total(self) -> float:
        """Seconds of all steps."""
        return sum(self._read())

    @property
    def per_step(self) -> float | None:
        """The median: the first steps are slower, and other work on the machine disturbs some. None without a step."""
        seconds = self._read()
        return statistics.median(seconds) if seconds else None

    def _read(self) -> list[float]:
        for start, stop in self._unread:
            stop.synchronize()
            self._seconds.append(start.elapsed_time(stop) / 1000)
        self._unread.clear()
        return self._seconds


class UpdateSpectra(TrainerCallback):  # type: ignore[misc]
    """Appends the spectrum of the total update of a few layers to ``updates.jsonl``, evenly over the run.

    A layer's weight is what it does to the unit vectors, so it is read alike whatever method changes it. With a half
    precision base the update drowns in the rounding of that.

    Args:
        model: before the method has changed anything.
        config: of the adapter, which says what layers are adapted; None for all linear ones.
        times: how often over the run.
    """

    def __init__(self, model: nn.Module, config: PeftConfig | None, times: int) -> None:
        self._times = times
        self._before = {name: _weight(layer).clone() for name, layer in _sample(_adapted(model, config))}
        self._path: Path | None = None

    def write_to(self, folder: Path) -> None:
        """Choose the run folder, once there is one."""
        self._path = folder / "updates.jsonl"

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Measure, if it is time; always at the last step."""
        every = max(1, state.max_steps // self._times)
        if self._path is None or (state.global_step % every and state.global_step != state.max_steps):
            return
        layers = {name: layer for name, layer in model.named_modules() if not name.endswith("base_layer")}
        with self._path.open("a", encoding="utf-8") as file:
            for name, before in self._before.items():
                (layer,) = (layer for path, layer in layers.items() if path == name or path.endswith("." + name))
                values = torch.linalg.svdvals((_weight(layer) - before).double())
                line = {
                    "step": state.global_step,
                    "layer": name,
                    "numerical_rank": rank_of_values(values),
                    "effective_rank": effective_rank_of_values(values),
                    "norm": values.norm().item(),
                    "singular_values": values[:SINGULAR_VALUES].tolist(),
                }
                file.write(json.dumps(line) + "\n")


def costs(model: nn.Module, clock: StepClock) -> dict[str, Any]:
    """``seconds_per_step`` (median), ``peak_memory_bytes`` and ``trainable_parameters`` of a finished run.

    The memory is what torch took on a CUDA device, else the peak of the whole process.
    """
    return {
        "seconds_per_step": clock.per_step,
        "peak_memory_bytes": peak_memory_bytes(cuda=torch.cuda.is_available()),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def _mark() -> float | torch.cuda.Event:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


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


def _sample(layers: list[tuple[str, nn.Module]]) -> Iterable[tuple[str, nn.Module]]:
    count = min(_LAYERS, len(layers))
    return [layers[round(i * (len(layers) - 1) / max(1, count - 1))] for i in range(count)]


@torch.no_grad()
def _weight(layer: nn.Module) -> Tensor:
    """(in, out): the layer's output for each unit vector, without its bias."""
    base: Any = getattr(layer, "base_layer", layer)
    features = base.in_features if isinstance(base, nn.Linear) else base.nx
    parameter = next(layer.parameters())
    dtype = parameter.dtype if parameter.is_floating_point() else torch.float32
    training = layer.training
    layer.eval()
    unit = torch.eye(features, dtype=dtype, device=parameter.device)
    weight: Tensor = layer(unit) - layer(unit.new_zeros(1, features))
    layer.train(training)
    return weight.float()
