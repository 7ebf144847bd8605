"""TRL's GRPO trainer, resumed where it was: checked with TRL 1.16, which generates and shuffles anew."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer
from trl.trainer.utils import RepeatSampler


class ResumableGrpo(GRPOTrainer):  # type: ignore[misc]
    """A GRPO trainer whose resumed run is the run that it resumes.

    Its prompts come in the order of the epoch that it resumes in, and answers that more than one step is taken on
    (``steps_per_generation``, ``num_iterations``) are part of the checkpoint.

    Args:
        *args: as for `trl.GRPOTrainer`.
        **kwargs: as for `trl.GRPOTrainer`.
    """

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler[int]:
        of_trl = super()._get_train_sampler(*args, **kwargs)
        names = ("data_source", "mini_repeat_count", "batch_size", "repeat_count", "shuffle", "seed")
        return _EpochSampler(**{name: getattr(of_trl, name) for name in names})

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self._step % self._steps_on_answers:
            folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            torch.save({"step": self._step, "answers": self._buffered_inputs}, self._answers_in(folder))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = self._answers_in(Path(checkpoint))
        if path.is_file():
            saved = torch.load(path, map_location=self.accelerator.device, weights_only=True)
            self._step, self._buffered_inputs = saved["step"], saved["answers"]
        elif self.state.global_step * self.args.gradient_accumulation_steps % self._steps_on_answers:
            warnings.warn(
                f"the checkpoint {checkpoint!r} lacks the answers that its next step would be taken on: others are "
                "generated, so that the run is not the one that would not have been interrupted",
                stacklevel=2,
            )

    @property
    def _steps_on_answers(self) -> int:
        """How many batches are made of the answers of one generation."""
        return int(self.args.steps_per_generation * self.num_iterations)

    def _answers_in(self, checkpoint: Path) -> Path:
        return checkpoint / f"answers_{self.accelerator.process_index}.pt"


class _EpochSampler(RepeatSampler):  # type: ignore[misc]
    """TRL's sampler, whose order in an epoch does not depend on whether the epochs before were sampled here."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._drawn = 0  # epochs whose order has been drawn

    def set_epoch(self, epoch: int) -> None:
        """Draw the orders of the epochs before, as if they had been sampled.

        Args:
            epoch: number of the epoch, from 0.
        """
        while self.shuffle and self._drawn < epoch:
            torch.randperm(self.num_samples, generator=self.generator)
            self._drawn += 1

    def __iter__(self) -> Iterator[int]:
        self._drawn += 1
        return super().__iter__()  # type: ignore[no-any-return]
