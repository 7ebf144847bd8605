"""A rescale by its parts, beside the least time that its bytes take, and the kernels that it launches."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from gpu.contenders import Contender, Size
from scalora.bench.floor import seconds_of_parts
from scalora.bench.measure import Machine, rescale_parts
from scalora.model.adapters import find_lora_pairs
from scalora.rescale.remainder import FactoredRemainder
from scalora.rescale.replay import launched_one_by_one
from scalora.rescaling import PARTS

_REPEATS = 5

# Rescales alike after which one is replayed, and cycles (some 50 ms) that the device is kept busy before it, so that
# what the host takes to launch it is not measured.
_UNTIL_REPLAYED, _CYCLES_AHEAD = 4, 100_000_000

# Steps until every layer has an optimum: lora_B starts at zero.
_FIRST_STEPS = 2


def rescale(contender: Contender, machine: Machine) -> dict[str, Any]:
    """Seconds of each part of a rescale, and their lower bounds.

    Args:
        contender: ScaLoRA with an interval of 1.
        machine: the rates of the device.
    """
    contender.checkpoint_activations(True)  # they are of no interest here
    for _ in range(_FIRST_STEPS):
        contender.step()
    pairs = find_lora_pairs(contender.model)
    moments = 1 if contender.spec.pair_adamw else 2
    floor = seconds_of_parts(pairs, *machine, moments=moments)
    return {"parts": rescale_parts(contender, _REPEATS), "whole": _whole(contender), "floor": floor}


def _whole(contender: Contender) -> float:
    """Seconds of a rescale as training does it: in one graph where it is replayed, and with the host ahead."""
    on_cuda = next(contender.model.parameters()).is_cuda
    until_replayed = _UNTIL_REPLAYED * _places(contender)
    seconds: list[float] = []

    def begin(*_: Any) -> None:
        if on_cuda:
            torch.cuda._sleep(_CYCLES_AHEAD)
        marks.append(_mark(on_cuda))

    def end(*_: Any) -> None:
        marks.append(_mark(on_cuda))

    hooks = contender.optimizer._optimizer_step_pre_hooks
    around = [contender.optimizer.register_step_pre_hook(hook) for hook in (begin, end)]
    hooks.move_to_end(around[0].id, last=False)  # before ScaLoRA's
    for _ in range(until_replayed + _REPEATS):
        marks: list[Any] = []
        contender.step()
        first, last = marks
        if on_cuda:
            torch.cuda.synchronize()
        seconds.append(first.elapsed_time(last) / 1e3 if on_cuda else last - first)
    for handle in around:
        handle.remove()
    return median(seconds[until_replayed:])


def _places(contender: Contender) -> int:
    """How many places a factored remainder fills before they come round again, in a compression's wake; else 1."""
    pair = find_lora_pairs(contender.model)[0]
    if not isinstance(pair.remainder, FactoredRemainder):
        return 1
    return -(-(pair.remainder.max_rank + 1) // pair.r)


def _mark(on_cuda: bool) -> Any:
    if not on_cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def launches(contender: Contender, size: Size) -> dict[str, Any]:
    """Kernels that an optimizer step launches, in all and in each part of a rescale.

    Without a GPU, operations that call no others are counted in their place.

    Args:
        contender: the method.
        size: its model, for the number of layers.
    """
    for _ in range(_FIRST_STEPS):
        contender.step()
    contender.backward()
    on_cuda = size.device.startswith("cuda")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with launched_one_by_one(), profile(activities=activities) as profiler:
        contender.optimizer.step()
        if on_cuda:
            torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type == DeviceType.CPU]
    counted = [event for event in events if (_launches(event.name) if on_cuda else _is_leaf(event))]
    parts = {part: [event.time_range for event in events if event.name == part] for part in PARTS}
    return {
        "layers": size.layers,
        "in_step": len(counted),
        "in_parts": {
            part: sum(any(r.start <= event.time_range.start < r.end for r in ranges) for event in counted)
            for part, ranges in parts.items()
        },
    }


def _launches(name: str) -> bool:
    return "LaunchKernel" in name or name.startswith(("cudaMemcpy", "cudaMemset", "cudaGraphLaunch"))


def _is_leaf(event: Any) -> bool:
    return event.name.startswith("aten::") and not event.cpu_children
