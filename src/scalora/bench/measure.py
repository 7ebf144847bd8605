"""The measurements of ``scalora bench``: the machine, interleaved steps, peak memory, the parts of a rescale."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from math import lcm
from statistics import median
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from scalora.bench.case import Case, Contender, now
from scalora.bench.settings import interval_of
from scalora.rescale.replay import launched_one_by_one
from scalora.rescaling import PARTS
from scalora.runs.messages import only_relevant_messages_from_now_on
from scalora.runs.peak_memory import peak_memory_bytes

# More than any cache: the largest of server processors hold a few hundred MB.
_STREAM_BYTES = 1 << 29
_GEMM_SIZE = 2048
_REPEATS = 7

# Not timed: the first steps allocate memory that later ones reuse.
_FIRST_STEPS = 2

# With a rescale at every step, these contain two compressions of a factored remainder.
_MEMORY_STEPS = 20


class Machine(NamedTuple):
    """The rates of a machine, from which the floor of a rescale is computed.

    Attributes:
        bandwidth: bytes per second that an in-place operation on a tensor larger than all caches reads and writes.
        rate: floating-point operations per second of a float32 matrix product.
    """

    bandwidth: float
    rate: float


def measure_machine(device: str) -> Machine:
    """Measure bandwidth and arithmetic rate: the best of a few repeats, to exclude disturbances by other work.

    Args:
        device: name of the torch device.
    """
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
    """Time steps that the contenders take in turn.

    A round is the least common multiple of all intervals. The same places of every round therefore rescale, and every
    rescale is counted together with the steps that it serves. The contender that goes first changes with every step, so
    that other work on the machine disturbs all alike.

    Args:
        contenders: the models to train.
        rounds: number of rounds.

    Yields:
        For each round, the seconds of every step by the contender's name.
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
    """Peak memory of a method over 20 steps (more for longer intervals), measured in a process of its own.

    Args:
        name: a key of `scalora.rivals.METHODS`; ``scalora:10`` is ScaLoRA with an interval of 10.
        case: the setting.
        threads: CPU threads that torch uses.

    Returns:
        Bytes allocated by torch on a CUDA device; otherwise bytes resident in the whole process, including the
        interpreter and its libraries.
    """
    with multiprocessing.get_context("spawn").Pool(1, only_relevant_messages_from_now_on) as pool:
        return pool.apply(_peak_memory, (name, case, threads))


def _peak_memory(name: str, case: Case, threads: int) -> int:
    torch.set_num_threads(threads)
    contender = Contender(name, case.base(), case)
    for _ in range(max(_MEMORY_STEPS, interval_of(name))):
        contender.step()
    return peak_memory_bytes(cuda=torch.device(case.device).type == "cuda")


def rescale_parts(contender: Contender, repeats: int = _REPEATS) -> dict[str, float]:
    """Seconds of each part of a rescale, from torch's profiler: the median over some rescales.

    Args:
        contender: ScaLoRA with an interval of 1.
        repeats: number of rescales to measure.

    Returns:
        Seconds by part, for the parts in `scalora.rescaling.PARTS`: of CPU time, or of the kernels on a CUDA device.
    """
    contender.step()
    contender.backward()
    on_cuda = next(contender.model.parameters()).is_cuda
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    found: dict[str, list[float]] = {part: [] for part in PARTS}
    for _ in range(repeats):
        with launched_one_by_one(), profile(activities=activities) as profiler:
            contender.optimizer.step()
        for event in profiler.key_averages():
            if event.key in found:
                found[event.key].append((event.device_time_total if on_cuda else event.cpu_time_total) / 1e6)
    return {part: median(seconds) for part, seconds in found.items()}
