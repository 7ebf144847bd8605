"""What ``scalora bench`` measures, as data: the steps of a method and the parts of a rescale, with their tables."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from scalora.rescaling import PARTS
from scalora.studies.grid import grid

BASELINE = "lora"


class Steps(NamedTuple):
    """The steps of one method in one case, with those of LoRA measured in turn with them.

    Attributes:
        case: the case, by what distinguishes it from the base case.
        method: the method, ``scalora:10`` for an interval of 10.
        seconds: duration of every step, (rounds, steps per round).
        baseline_seconds: duration of LoRA's step at the same place, (rounds, steps per round).
        peak_memory: the method's peak memory in bytes; None if not measured.
        baseline_peak_memory: LoRA's peak memory in bytes; None if not measured.
    """

    case: str
    method: str
    seconds: list[list[float]]
    baseline_seconds: list[list[float]]
    peak_memory: int | None
    baseline_peak_memory: int | None

    @property
    def per_step(self) -> float:
        """Seconds per step: the median over rounds at each place of a round, averaged over the places.

        The mean over places counts a rescale, which only some places have; the median over rounds ignores disturbances
        by other work on the machine.
        """
        return float(np.median(self.seconds, axis=0).mean())

    @property
    def ratios(self) -> NDArray[np.float64]:
        """Duration of every step relative to LoRA's step at the same place, (rounds, steps per round)."""
        ratios: NDArray[np.float64] = np.divide(self.seconds, self.baseline_seconds)
        return ratios

    @property
    def ratio(self) -> float:
        """Duration relative to LoRA's: the median of `ratios` at each place of a round, averaged over the places."""
        return float(np.median(self.ratios, axis=0).mean())

    @property
    def middle_half(self) -> tuple[float, float]:
        """First and third quartile of all `ratios`."""
        low, high = np.quantile(self.ratios, (0.25, 0.75))
        return float(low), float(high)


class Rescale(NamedTuple):
    """A rescale in one case.

    Attributes:
        case: the case, by what distinguishes it from the base case.
        merge: where the remainder went, any but ``"auto"``.
        parts: seconds of each part in `scalora.rescaling.PARTS`.
        floor: lower bound on the seconds of each part.
    """

    case: str
    merge: str
    parts: dict[str, float]
    floor: dict[str, float]


def steps_table(steps: list[Steps]) -> str:
    """A Markdown table with one row per case and method.

    Args:
        steps: the measured steps.
    """
    columns = ["case", "method", "seconds per step", f"over {BASELINE}", "middle half", "peak memory, MiB", "over"]
    return grid(columns, map(_steps_row, steps))


def _steps_row(row: Steps) -> list[str]:
    if row.peak_memory is None or row.baseline_peak_memory is None:
        memory = ["—", "—"]
    else:
        memory = [f"{row.peak_memory / 2**20:.0f}", f"{row.peak_memory / row.baseline_peak_memory:.3f}"]
    low, high = row.middle_half
    return [row.case, row.method, f"{row.per_step:.4g}", f"{row.ratio:.3f}", f"{low:.3f} … {high:.3f}", *memory]


def rescales_table(rescales: list[Rescale]) -> str:
    """A Markdown table with one row per case.

    Args:
        rescales: the measured rescales.
    """
    parts = [f"{part.removeprefix('scalora::')}, ms" for part in PARTS]
    return grid(["case", "merge", *parts, "rescale, ms", "floor, ms", "over floor"], map(_rescale_row, rescales))


def _rescale_row(row: Rescale) -> list[str]:
    total, floor = sum(row.parts.values()), sum(row.floor.values())
    parts = (f"{1000 * seconds:.3g}" for seconds in row.parts.values())
    return [row.case, row.merge, *parts, f"{1000 * total:.3g}", f"{1000 * floor:.3g}", f"{total / floor:.1f}"]
