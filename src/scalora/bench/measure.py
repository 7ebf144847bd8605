"""The measurements: steps in turn, peak memory in a process of its own, a rescale by its parts, the machine."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from math import lcm
from statistics import median
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from scalora.bench.case import Case, Contender, interval_of, now
from scalora.engine import PARTS
from scalora.runs.peak_memory import peak_memory_bytes

# More than any cache: the largest of server processors hold a few hundred MB.
_STREAM_BYTES = 1 << 29
_GEMM_SIZE = 2048
_REPEATS = 7

# They allocate what the later ones use again.
_FIRST_STEPS = 2

# A rescale at every step passes through two compressions of a factored remainder in so many.
_MEMORY_STEPS = 20


class Machine(NamedTuple):
    """What the floor is computed with.

    Attributes:
        bandwidth: bytes per second that an in-place operation reads and writes, of a tensor larger than the caches.
        rate: floating-point operations per second of a float32 matrix product.
    """

    bandwidth: float
    rate: float


def measure_machine(device: str) -> Machine:
    """The best of a few repeats: what the machine can do, not what else it is doing."""
    stream = torch.zeros(_STREAM_BYTES // 4, device=device)
    square = torch.randn(_GEMM_SIZE, _GEMM_SIZE, device=device)
    product = torch.empty_like(square)
    streaming = min(_timed(lambda: stream.add_(1), device) for _ in range(_REPEATS))
    multiplying = min(_timed(lambda: torch.mm(square, square, out=product), device) for _ in range(_REPEATS))
    return Machine(2 * _STREAM_BYTES / streaming, 2 * _GEMM_SIZE**3 / multiplying)


def _timed(work: Any, device: str) -> float:
    start = now(device)
    work()
    return now(device) - start


def interleaved_steps(contenders: list[Contender], rounds: int) -> Iterator[dict[str, list[float]]]:
    """Time the contenders' steps in turn; yields the seconds of each of their steps, for each round.

    A round is as many steps as make whole intervals of all of them, so that the same place in another round rescales or
    does not alike, and every rescale counts with the steps that it is for. The contenders take turns at each step, and
    who is first moves on: what else the machine does disturbs them alike.
    """
    steps = lcm(*(interval_of(contender.name) for contender in contenders))
    for contender in contenders:
        for _ in range(_FIRST_STEPS):
            contender.step()
    for _ in range(rounds):
        seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
        for step in range(steps):
            first = step % len(contenders)
            for contender in contenders[first:] + contenders[:first]:
                seconds[contender.name].append(contender.step())
        yield seconds


def peak_memory(name: str, case: Case, threads: int) -> int:
    """Bytes at the peak of a run of 20 steps, in a process of its own.

    What torch has taken on a CUDA device, else what the whole process has, the interpreter and its libraries included.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_memory, (name, case, threads))


def _peak_memory(name: str, case: Case, threads: int) -> int:
    torch.set_num_threads(threads)
    contender = Contender(name, case.base(), case)
    for _ in range(max(_MEMORY_STEPS, interval_of(name))):
        contender.step()
    return peak_memory_bytes(cuda=torch.device(case.device).type == "cuda")


def rescale_parts(contender: Contender, repeats: int = _REPEATS) -> dict[str, float]:
    """Seconds of a rescale by its parts, as the profiler sees them: the median of some. On CUDA those of the kernels.

    Args:
        contender: ScaLoRA with an interval of 1.
        repeats: rescales to look at.
    """
    contender.step()
    contender.backward()
    on_cuda = next(contender.model.parameters()).is_cuda
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    found: dict[str, list[float]] = {part: [] for part in PARTS}
    for _ in range(repeats):
        with profile(activities=activities) as profiler:
            contender.optimizer.step()
        for event in profiler.key_averages():
            if event.key in found:
                found[event.key].append((event.device_time_total if on_cuda else event.cpu_time_total) / 1e6)
    return {part: median(seconds) for part, seconds in found.items()}
