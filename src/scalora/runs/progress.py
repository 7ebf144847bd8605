"""What training shows while it runs: one progress bar on a terminal, and a line for each log entry."""

from __future__ import annotations

import time
from datetime import timedelta
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from scalora.parallel.job import is_first

# What people watch, with its label and format. Everything that is logged is in metrics.jsonl.
_WATCHED = {
    "loss": ("loss", ".4f"),
    "eval_loss": ("eval loss", ".4f"),
    "eval_accuracy": ("accuracy", ".4f"),
    "eval_f1": ("F1", ".4f"),
    "eval_matthews": ("Matthews", ".4f"),
    "eval_pearson": ("Pearson", ".4f"),
    "eval_spearman": ("Spearman", ".4f"),
    "eval_mse": ("MSE", ".4g"),
    "reward": ("reward", ".4g"),
    "eval_reward": ("eval reward", ".4g"),
    "rewards/margins": ("margin", ".4g"),
    "eval_rewards/margins": ("eval margin", ".4g"),
    "eval_rewards/accuracies": ("eval accuracy", ".4f"),
    "eval_margin": ("eval margin", ".4g"),
    "learning_rate": ("lr", ".3g"),
    "scalora/column_share": ("scaled by column", ".0%"),
    "scalora/matrix_share": ("scaled by matrix", ".0%"),
}


class TrainingProgress(TrainerCallback):  # type: ignore[misc]
    """Shows the progress of training and of the evaluations in it, with the time left, on standard error.

    A context manager: the bar is gone when it ends, whatever ends it. In a job of several processes the first shows it.
    """

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self._console,
            transient=True,
            speed_estimate_period=600,  # steps may take minutes
            refresh_per_second=2,
            disable=not self._console.is_terminal or not is_first(),
        )
        self._training: TaskID | None = None
        self._evaluation: TaskID | None = None
        self._start = (0.0, 0)

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the bar; of a resumed run from where it continues."""
        self._start = time.perf_counter(), state.global_step
        self._training = self._bar.add_task("training", total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar on."""
        assert self._training is not None
        self._bar.update(self._training, completed=state.global_step)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the evaluation's progress in place of the training's."""
        if self._evaluation is None:
            self._show_training(False)
            self._evaluation = self._bar.add_task("evaluating", total=len(kwargs["eval_dataloader"]))
        self._bar.advance(self._evaluation)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Go back to the training's progress."""
        if self._evaluation is not None:
            self._bar.remove_task(self._evaluation)
            self._evaluation = None
            self._show_training(True)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Print the watched numbers of a log entry, if it has any."""
        if not state.is_world_process_zero:
            return
        figures = [
            f"{label} {logs[key]:{form}}" for key, (label, form) in _WATCHED.items() if logs.get(key) is not None
        ]
        if figures:
            width = len(str(state.max_steps))
            words = [f"step {state.global_step:>{width}}/{state.max_steps}", *figures, *self._time_left(state)]
            self._bar.refresh()  # printing shows the bar again as it was drawn last
            self._console.print("  ".join(words), markup=False, soft_wrap=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the bar away; an evaluation may follow."""
        assert self._training is not None
        self._bar.remove_task(self._training)
        self._training = None

    def _show_training(self, visible: bool) -> None:
        if self._training is not None:
            self._bar.update(self._training, visible=visible)

    def _time_left(self, state: TrainerState) -> list[str]:
        """Where there is no bar to say it."""
        begin, first = self._start
        done, left = state.global_step - first, state.max_steps - state.global_step
        if self._console.is_terminal or done <= 0 or left <= 0:
            return []
        return [f"{timedelta(seconds=round((time.perf_counter() - begin) / done * left))} left"]
