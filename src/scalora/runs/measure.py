"""Times the steps of a run."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class StepClock(TrainerCallback):  # type: ignore[misc]
    """Times the optimizer steps, without evaluation, saving and measuring between them.

    On a CUDA device, events in its stream mark the times, so that training never waits for the clock.

    Attributes:
        earlier: seconds of the steps that a resumed run has taken before, which count in the total.
    """

    def __init__(self) -> None:
        self.earlier = 0.0
        self._seconds: list[float] = []
        self._unread: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._start: float | torch.cuda.Event = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start, with the batch already loaded."""
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
        """Add the training time so far to every log entry, as ``seconds``."""
        if logs is not None:
            logs["seconds"] = self.total

    @property
    def total(self) -> float:
        """Total seconds of all steps."""
        return self.earlier + sum(self._read())

    @property
    def per_step(self) -> float | None:
        """Median seconds of a step, which slow first steps and other load hardly affect; None before the first step."""
        seconds = self._read()
        return statistics.median(seconds) if seconds else None

    def _read(self) -> list[float]:
        for start, stop in self._unread:
            stop.synchronize()
            self._seconds.append(start.elapsed_time(stop) / 1000)
        self._unread.clear()
        return self._seconds


def _mark() -> float | torch.cuda.Event:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event
