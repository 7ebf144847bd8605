"""``scalora train``: from a config to a run folder, through TRL's and Transformers' trainers."""

from __future__ import annotations

import statistics
import sys
import time
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from peft import prepare_model_for_kbit_training
from torch import nn
from transformers import PreTrainedModel, Trainer, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from scalora.rescale import native
from scalora.rivals.scalora import ScaLoraMethod
from scalora.runs.lengths import warn_about_lengths
from scalora.runs.measure import StepClock, costs
from scalora.runs.messages import without_message
from scalora.runs.models import load_base
from scalora.runs.prepare import MakeTrainer, PreparedRun, prepare
from scalora.runs.progress import TrainingProgress
from scalora.runs.results import write_results
from scalora.runs.run_folder import MetricsFile, create_run_folder, json_lines, write_json
from scalora.runs.settings import Settings
from scalora.runs.update_spectra import UPDATES_FILE, UpdateSpectra
from scalora.saving.attach import attach

# Training batches for the gradients of a start that needs them. LoRA-GA's paper samples about as many: fewer show a
# batch's noise, more take as long as training steps.
GRADIENT_BATCHES = 8


def train(settings: Settings, *, overwrite: bool = False, resume: bool = False) -> Path:
    """Train and write the run folder.

    Args:
        settings: the run's settings.
        overwrite: whether to replace an earlier run's folder.
        resume: whether to resume the run in the folder from its last whole checkpoint.

    Returns:
        The run folder.

    Raises:
        InputError: something in the config, the data or the model can't be used. Raised before training, and before an
            earlier run's folder is replaced.
    """
    run = prepare(settings, overwrite=overwrite, resume=resume)
    model = _load(run)
    spectra = UpdateSpectra(model, run.peft_config, settings.track_updates) if settings.track_updates else None
    trainer = _adapt(run, model)
    folder = Path(settings.output_dir) if resume else create_run_folder(settings)
    summary = _run(run, trainer, spectra, folder)
    write_results(run, trainer.model, folder)
    write_json(folder / "summary.json", summary)  # last: a run that has it is finished
    return folder


def _load(run: PreparedRun) -> PreTrainedModel:
    """The base model, with a new head where the task needs one."""
    if isinstance(run.method, ScaLoraMethod) and run.method.config.native and run.arguments.device.type == "cpu":
        native.build()  # before the model is loaded, because it may fail
    _say(f"loading {run.settings.model}")
    # The Trainer seeds itself only once it has the model, whose new head and adapter are random too.
    set_seed(run.arguments.seed)
    model = load_base(run.source, run.settings, run.tokenizer, run.labels)
    if run.settings.task != "sft" and run.settings.quantization is not None:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return model


def _adapt(run: PreparedRun, base: nn.Module) -> Trainer:
    """A trainer of the base as the method adapts it, which raises whatever attaching ScaLoRA would."""
    _say(f"preparing {', '.join(f'{len(rows):,} {split} examples' for split, rows in run.examples.items())}")
    # It would say that an example is too long before TRL cuts it off; `warn_about_lengths` says what is true then.
    with without_message("transformers.tokenization_utils_base", "Token indices sequence length is longer"):
        model = run.method.adapt(base, run.peft_config, partial(_backward, run.make_trainer))
        trainer = run.make_trainer(
            model, callbacks=run.method.callbacks(), optimizers=(run.method.optimizer(model, run.arguments), None)
        )
    warn_about_lengths(run, trainer)
    if isinstance(run.method, ScaLoraMethod):
        attach(trainer.model, run.method.config.merge, run.method.config.remainder_rank)
    return trainer


def _backward(make_trainer: MakeTrainer, model: nn.Module) -> None:
    """A few training batches forward and backward, as training itself would see them."""
    trainer = make_trainer(model)
    for batch in islice(trainer.get_train_dataloader(), GRADIENT_BATCHES):
        trainer.compute_loss(model, trainer._prepare_inputs(batch)).backward()


def _run(run: PreparedRun, trainer: Trainer, spectra: UpdateSpectra | None, folder: Path) -> dict[str, Any]:
    """Train, evaluate at the end, and return the summary."""
    clock = StepClock()
    trainer.add_callback(clock)
    trainer.add_callback(MetricsFile(folder))
    if spectra is not None:
        spectra.write_to(folder)
        trainer.add_callback(spectra)
    for library_display in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(library_display)
    start = time.perf_counter()
    with TrainingProgress() as progress:
        trainer.add_callback(progress)
        output = trainer.train(resume_from_checkpoint=run.checkpoint and str(run.checkpoint))
        seconds = time.perf_counter() - start
        scores = _final_scores(trainer) if "eval" in run.examples else {}
    return {
        "steps": output.global_step,
        "training_seconds": seconds,
        **output.metrics,
        **costs(trainer.model, clock),
        "measuring_seconds": 0.0 if spectra is None else spectra.seconds,
        **_losses(trainer.state.log_history),
        **_ranks(folder, run),
        **scores,
    }


def _final_scores(trainer: Trainer) -> dict[str, float]:
    """Scores of the model as it is now: those of the last step if the Trainer has just computed them."""
    last: dict[str, Any] = next((log for log in reversed(trainer.state.log_history) if "eval_loss" in log), {})
    if last.get("step") == trainer.state.global_step and not trainer.args.load_best_model_at_end:
        return {key: value for key, value in last.items() if key.startswith("eval_")}
    scores: dict[str, float] = trainer.evaluate()
    return scores


def _losses(history: list[dict[str, Any]]) -> dict[str, float]:
    """The first and last logged training loss, and the first evaluation's loss."""
    training = [log["loss"] for log in history if "loss" in log]
    evaluation = [log["eval_loss"] for log in history if "eval_loss" in log]
    found = {"first_loss": training[0], "last_loss": training[-1]} if training else {}
    return found | ({"first_eval_loss": evaluation[0]} if evaluation else {})


def _ranks(folder: Path, run: PreparedRun) -> dict[str, float]:
    """The median rank of the measured layers' updates at the last measurement, and the adapter's rank."""
    updates = json_lines(folder / UPDATES_FILE)
    last = [line["numerical_rank"] for line in updates if line["step"] == updates[-1]["step"]]
    if not last:
        return {}
    adapter = {} if run.peft_config is None else {"adapter_rank": run.peft_config.r}
    return {"update_rank": statistics.median_low(last), **adapter}


def _say(what: str) -> None:
    print(f"{what} …", file=sys.stderr, flush=True)
