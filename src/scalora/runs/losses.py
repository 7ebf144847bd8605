"""Trainers whose losses and gradients don't depend on how a batch is cut.

A step's loss is the mean over all that is in the step, and an evaluation's the mean over all that is evaluated: over
examples for classification and regression, over predicted tokens for language models. Neither is a mean of the means of
batches, so that accumulation, an incomplete last group or batch, texts of different lengths, the size of an
evaluation's batches and the number of processes change nothing.

Checked with transformers 5.23 and TRL 1.16. Transformers divides a loss by the number of accumulated batches only if
the model's ``forward`` takes no keywords, on the assumption that any other divides by ``num_items_in_batch``. Most
classifiers take keywords and ignore that one, so that their gradients grow with the accumulation. TRL's loss is right
where Transformers counts the tokens, which it does not for every model.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from scalora.runs.head_rate import RatedHead

_IGNORED = -100  # label of a token that is not predicted


class SequenceTrainer(RatedHead):
    """A trainer for classification and regression, whose losses are means over examples.

    Args:
        *args: as for `transformers.Trainer`.
        **kwargs: as for `RatedHead`, without ``compute_loss_func``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, compute_loss_func=self._loss, **kwargs)
        self._evaluates = False

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """As Transformers does, with the loss of this process's examples alone.

        Args:
            *args: arguments of `transformers.Trainer.prediction_step`.
            **kwargs: the same by name.
        """
        self._evaluates = True
        try:
            return super().prediction_step(*args, **kwargs)
        finally:
            self._evaluates = False

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Count examples, of all processes. Transformers would not count a regression's target of -100."""
        if self._evaluates:
            return None
        counted = [{"labels": torch.zeros(len(batch["labels"]), dtype=torch.long)} for batch in batch_samples]
        return super()._get_num_items_in_batch(counted, device)

    def _loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        logits = (outputs["logits"] if isinstance(outputs, dict) else outputs[0]).float()
        labels = labels.to(logits.device)
        if self._evaluates:
            own = max(1, own_rows(self.accelerator, len(labels)))  # one, which does not count, where there are none
            logits, labels = logits[:own], labels[:own]
        if logits.shape[-1] == 1:
            total = functional.mse_loss(logits.squeeze(-1), labels.float(), reduction="sum")
        else:
            smoothing = self.args.label_smoothing_factor
            total = functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
        mean: Tensor = total / (len(labels) if num_items_in_batch is None else num_items_in_batch)
        # Of several GPUs in one process the logits are together here, but Transformers multiplies as if they were not.
        return mean if num_items_in_batch is None else mean / max(self.args.n_gpu, 1)


class CausalTrainer(SFTTrainer):  # type: ignore[misc]
    """TRL's trainer for language models, whose losses and token scores are means over predicted tokens.

    Args:
        *args: as for `trl.SFTTrainer`.
        **kwargs: as for `trl.SFTTrainer`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # For models that these two are not derived right for: TRL takes the loss from the tokens' likelihoods, whatever
        # the model's own forward takes, and no causal model predicts its first token.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True
        self._tokens: dict[str, list[float]] = {"train": [], "eval": []}  # of the batches since the last log
        self._losses: list[Tensor] = []
        self._counts: list[Tensor] = []

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As TRL does; remembers how many tokens the batch has, for the means in `log`.

        Args:
            model: the model.
            inputs: a batch.
            *args: further arguments of `trl.SFTTrainer.compute_loss`.
            **kwargs: the same by name.
        """
        mode = "train" if self.model.training else "eval"
        count = predicted_tokens(inputs["labels"]).sum()
        self._tokens[mode].append(float(self.accelerator.gather_for_metrics(count).sum()))
        return super().compute_loss(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As TRL does, but with means over tokens of what it averages over batches.

        Args:
            logs: the values to log.
            *args: further arguments of `trl.SFTTrainer.log`.
            **kwargs: the same by name.
        """
        mode = "train" if self.model.training else "eval"
        counts, self._tokens[mode] = self._tokens[mode], []
        for name in ("entropy", "mean_token_accuracy"):
            values = self._metrics[mode].get(name, [])
            if values and len(values) == len(counts) and sum(counts) > 0:
                mean = sum(value * count for value, count in zip(values, counts, strict=True)) / sum(counts)
                self._metrics[mode][name] = [mean]
        super().log(logs, *args, **kwargs)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As TRL does; remembers the loss and the number of predicted tokens of each row.

        Args:
            model: the model.
            inputs: a batch.
            *args: further arguments of `trl.SFTTrainer.prediction_step`.
            **kwargs: the same by name.
        """
        labels = inputs["labels"].clone()
        labels[own_rows(self.accelerator, len(labels)) :] = _IGNORED
        inputs = {**inputs, "labels": labels}
        counts = predicted_tokens(labels).to(self.args.device)
        loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        self._losses.append(self.accelerator.gather_for_metrics(loss.float().expand(len(counts)).contiguous()))
        self._counts.append(self.accelerator.gather_for_metrics(counts))
        return loss, logits, labels

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As Transformers does, but with a loss that is the mean over all tokens.

        Args:
            *args: arguments of `transformers.Trainer.evaluation_loop`.
            **kwargs: the same by name.
        """
        self._losses.clear()
        self._counts.clear()
        output = super().evaluation_loop(*args, **kwargs)
        names = [name for name in output.metrics if name.endswith("_loss")]
        if self._counts and names:
            losses, counts = torch.cat(self._losses).double().cpu(), torch.cat(self._counts).double().cpu()
            scored = counts > 0  # the loss of a batch without predicted tokens is not a number, or means nothing
            output.metrics[names[0]] = float((losses * counts)[scored].sum() / counts.sum())
        return output


def predicted_tokens(labels: Tensor) -> Tensor:
    """The number of tokens that a causal language model predicts in each row of a batch.

    Args:
        labels: the labels of a batch, (rows, tokens).
    """
    counts: Tensor = (labels[:, 1:] != _IGNORED).sum(dim=1)
    return counts


def own_rows(accelerator: Accelerator, rows: int) -> int:
    """How many rows of a batch that is being evaluated count, which come first in it.

    All but in the last batch of several processes, which Accelerate fills up with examples that others have had.

    Args:
        accelerator: the trainer's accelerator.
        rows: rows of this process's batch.
    """
    state = accelerator.gradient_state
    if accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return rows
    own: int = state.remainder - accelerator.process_index * rows
    return min(max(own, 0), rows)
