"""Adds up what a run takes over all the processes that it is resumed in: time, memory and loss."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from scalora.parallel.job import from_all
from scalora.parallel.processes import mean
from scalora.runs.divergence import DivergenceWatch
from scalora.runs.measure import StepClock
from scalora.runs.peak_memory import peak_memory_bytes
from scalora.runs.update_spectra import UpdateSpectra

# The key of the totals in a checkpoint's trainer_state.json, which the Trainer writes last, with what it does not know.
_KEY = "scalora.runs"


@dataclass(frozen=True)
class Totals:
    """What a run has taken up to a step.

    Attributes:
        steps: number of steps.
        seconds: training, evaluating and saving, as `scalora train` reports them.
        step_seconds: the steps alone.
        per_step: median of the steps' seconds; over several processes the mean of their medians, weighted by steps.
        measuring_seconds: measuring the update.
        loss: sum of the losses of the steps.
        peak_memory_bytes: the most memory of any process so far.
    """

    steps: int = 0
    seconds: float = 0.0
    step_seconds: float = 0.0
    per_step: float = 0.0
    measuring_seconds: float = 0.0
    loss: float = 0.0
    peak_memory_bytes: int = 0


class WholeRun(TrainerCallback):  # type: ignore[misc]
    """Keeps the totals of a run in its checkpoints, and goes on from those of the checkpoint that it resumes from.

    Must be added before what writes the logs, whose ``seconds`` are the totals too.

    Args:
        clock: the clock of the steps.
        watch: what sees the losses of the steps.
        spectra: what measures the update; None if nothing does.
        cuda: whether the run is on a CUDA device.
    """

    def __init__(self, clock: StepClock, watch: DivergenceWatch, spectra: UpdateSpectra | None, *, cuda: bool) -> None:
        self._clock = clock
        self._watch = watch
        self._spectra = spectra
        self._cuda = cuda
        self._start = time.perf_counter()
        self._earlier = self._whole = Totals()
        self._metrics: dict[str, float] = {}
        self._first_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take over the totals of the checkpoint that has been loaded."""
        self._first_step = state.global_step
        if not state.global_step:
            return
        saved = state.stateful_callbacks.get(_KEY)
        if saved is None:
            warnings.warn(
                f"the checkpoint of step {state.global_step} does not say what the run took up to there: times, memory "
                "and train_loss of this run are those of its later steps",
                stacklevel=2,
            )
            return
        known = {field.name for field in fields(Totals)}
        self._earlier = Totals(**{key: value for key, value in saved["attributes"].items() if key in known})
        self._clock.earlier = self._earlier.step_seconds

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note the totals for a checkpoint of this step."""
        if control.should_save:
            self._note(state)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the totals for a checkpoint after the epoch."""
        self._note(state)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note the totals for a checkpoint of the best model."""
        self._note(state)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Replace the Trainer's last log, which is of the steps since the checkpoint, by that of all steps."""
        if not logs or "train_runtime" not in logs:
            return
        here = state.global_step - self._first_step
        self._whole = self._totals(state, float(logs["train_loss"]) * here)
        if self._earlier.steps:
            rate = self._whole.steps / self._whole.seconds
            per_step = logs["train_samples_per_second"] / logs["train_steps_per_second"] if here else 0.0
            self._metrics = {
                "train_runtime": self._whole.seconds,
                "train_samples_per_second": rate * per_step,
                "train_steps_per_second": rate,
                "train_loss": self._whole.loss / self._whole.steps,
            }
            logs.update(self._metrics)

    def summary(self, metrics: Mapping[str, Any], trained_parameters: int) -> dict[str, Any]:
        """The costs of the run, for its summary, once it has been trained.

        Args:
            metrics: what the Trainer returned.
            trained_parameters: number of parameters that are trained.

        Returns:
            The metrics, of the whole run; ``steps``; ``training_seconds``; ``seconds_per_step`` (median);
            ``peak_memory_bytes`` (allocated by torch on a CUDA device, otherwise the peak of the whole process);
            ``trainable_parameters``; ``measuring_seconds``.
        """
        return {
            "steps": self._first_step + self._whole.steps - self._earlier.steps,
            "training_seconds": self._whole.seconds,
            **metrics,
            **self._metrics,
            "seconds_per_step": self._whole.per_step if self._whole.steps else None,
            "peak_memory_bytes": self._whole.peak_memory_bytes,
            "trainable_parameters": trained_parameters,
            "measuring_seconds": self._measuring_seconds(),  # the last measurement may come after the last log
        }

    def _note(self, state: TrainerState) -> None:
        totals = self._totals(state, float(mean(self._watch.loss_sum)))
        state.stateful_callbacks[_KEY] = {"args": {}, "attributes": asdict(totals)}

    def _totals(self, state: TrainerState, loss_here: float) -> Totals:
        earlier, here = self._earlier, state.global_step - self._first_step
        steps = earlier.steps + here
        median = self._clock.per_step
        medians = earlier.per_step * earlier.steps + (0.0 if median is None else median * here)
        return Totals(
            steps=steps,
            seconds=earlier.seconds + time.perf_counter() - self._start,
            step_seconds=self._clock.total,
            per_step=medians / steps if steps else 0.0,
            measuring_seconds=self._measuring_seconds(),
            loss=earlier.loss + loss_here,
            peak_memory_bytes=max(earlier.peak_memory_bytes, *from_all(peak_memory_bytes(cuda=self._cuda))),
        )

    def _measuring_seconds(self) -> float:
        return self._earlier.measuring_seconds + (0.0 if self._spectra is None else self._spectra.seconds)
