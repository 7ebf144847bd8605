"""Models that are in memory together and take blocks of steps in turn."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from gpu.contenders import Contender, Size, Spec

# A block is as long as an interval, and at least so long that the host runs ahead of the device, as in training.
_SHORTEST_BLOCK = 8
_FIRST_STEPS = 2

# DoRA's activations take a quarter more than LoRA's, and some memory is lost between tensors.
_MARGIN = 1.4


class Clock:
    """The time that is left.

    Args:
        minutes: how long everything may take.
    """

    def __init__(self, minutes: float) -> None:
        self._start, self._seconds = time.monotonic(), 60 * minutes

    def spent(self) -> float:
        """Share of the time that is over."""
        return (time.monotonic() - self._start) / self._seconds


class Block(NamedTuple):
    """Steps of one contender, one after the other.

    Attributes:
        seconds: seconds per step.
        peak: peak of the contender's memory in bytes, without that of the others, and with what its graphs keep for
            their temporary tensors; 0 without a GPU.
    """

    seconds: float
    peak: int


class Resident:
    """A contender in memory.

    Args:
        spec: the method.
        size: model and batch.

    Attributes:
        contender: the model and its optimizer.
        failures: what could not be measured, and why.

    Raises:
        torch.OutOfMemoryError: it does not fit together with the activations of a step that computes them again.
    """

    def __init__(self, spec: Spec, size: Size) -> None:
        self._on_cuda = size.device.startswith("cuda")
        self.failures: dict[str, str] = {}
        before = self._allocated()
        self.contender = Contender(spec, size)
        self.contender.checkpoint_activations(True)
        for _ in range(_FIRST_STEPS):
            self.contender.step()
        self._own = self._allocated() - before
        self._of_graphs = 0

    def activations(self) -> float:
        """Bytes to keep free for a step of any contender: what this one's takes, and a margin for those that take more.

        Without gradient checkpointing if that fits, else with it.
        """
        for checkpointing in (False, True):
            if (block := self.block(checkpointing)) is not None:
                free()
                return _MARGIN * (block.peak - self._own)
        return 0.0

    @property
    def block_length(self) -> int:
        """Steps of a block."""
        return max(_SHORTEST_BLOCK, self.contender.spec.interval)

    def block(self, checkpointing: bool) -> Block | None:
        """Take the steps of a block.

        Args:
            checkpointing: whether activations are computed again in the backward pass.

        Returns:
            The block; None if it can't be taken, for which there is a reason in `failures` then.
        """
        what = "steps with checkpointing" if checkpointing else "steps without checkpointing"
        if what in self.failures:
            return None
        self.contender.checkpoint_activations(checkpointing)
        try:
            return self._block()
        except torch.OutOfMemoryError:
            self.failures[what] = "out of memory"
        except Exception as error:  # the other contenders go on
            self.failures[what] = first_line(error)
        self.contender.optimizer.zero_grad()
        free()
        return None

    def _block(self) -> Block:
        if not self._on_cuda:
            start = time.perf_counter()
            self._steps()
            return Block((time.perf_counter() - start) / self.block_length, 0)
        before = self._allocated()
        others, graphs_of_others = before - self._own, _kept_by_graphs() - self._of_graphs
        torch.cuda.reset_peak_memory_stats()
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        first.record()
        self._steps()
        last.record()
        torch.cuda.synchronize()
        self._own += self._allocated() - before  # as when a rescale is recorded
        self._of_graphs = _kept_by_graphs() - graphs_of_others
        peak = torch.cuda.max_memory_allocated() - others + self._of_graphs
        return Block(first.elapsed_time(last) / 1e3 / self.block_length, peak)

    def _steps(self) -> None:
        for _ in range(self.block_length):
            self.contender.step()

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated() if self._on_cuda else 0


def _kept_by_graphs() -> int:
    """Bytes that are reserved for the temporary tensors of graphs, and count as allocated only during captures."""
    pools = [segment for segment in torch.cuda.memory_snapshot() if tuple(segment["segment_pool_id"]) != (0, 0)]
    return sum(segment["total_size"] - segment["allocated_size"] for segment in pools)


def rounds(
    group: list[Resident], checkpointing: bool, until: float, clock: Clock, most_rounds: int
) -> Iterator[dict[str, Any]]:
    """Take rounds of one block of each contender while there is time.

    Args:
        group: the contenders, the baseline first.
        checkpointing: whether activations are computed again in the backward pass.
        until: share of the time at which no round may begin that would not end before.
        clock: the time.
        most_rounds: rounds after which to stop in any case.

    Yields:
        For each contender that could be measured, what was, with the baseline's of the same rounds.
    """
    taken: list[dict[str, Block]] = []
    longest = 0.0
    # To go through the objects of all these models takes Python's garbage collection as long as some steps.
    gc.collect()
    gc.freeze()
    for resident in group:  # not counted: compiles, sets up libraries and allocates memory that later steps use again
        if clock.spent() < until:
            resident.block(checkpointing)
    while clock.spent() + longest < until and len(taken) < most_rounds:
        start, found = clock.spent(), {}
        for resident in group:
            if clock.spent() < 1 and (block := resident.block(checkpointing)) is not None:
                found[resident.contender.spec.name] = block
        taken.append(found)
        longest = max(longest, clock.spent() - start)
    gc.unfreeze()
    print(f"{clock.spent():.0%}: {len(taken)} rounds, checkpointing {'on' if checkpointing else 'off'}", flush=True)
    baseline = group[0].contender.spec.name
    for resident in group:
        name = resident.contender.spec.name
        both = [(found[name], found[baseline]) for found in taken if name in found and baseline in found]
        if both:
            yield {
                "method": name,
                "checkpointing": checkpointing,
                "block": resident.block_length,
                "seconds": [own.seconds for own, _ in both],
                "baseline_seconds": [other.seconds for _, other in both],
                "peak": max(own.peak for own, _ in both),
                "baseline_peak": max(other.peak for _, other in both),
            }


def room(device: str) -> float:
    """Bytes that could still be allocated; without a GPU, any number.

    Args:
        device: name of a torch device.
    """
    if not device.startswith("cuda"):
        return math.inf
    return torch.cuda.get_device_properties(device).total_memory - torch.cuda.memory_allocated()


def free() -> None:
    """Give memory that nothing uses back to the device."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def first_line(error: Exception) -> str:
    """An error in one line.

    Args:
        error: the error.
    """
    return f"{type(error).__name__}: {error}".splitlines()[0]
