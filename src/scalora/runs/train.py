"""``scalora train``: from a config to a run folder, through TRL's and Transformers' trainers."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel, prepare_model_for_kbit_training
from torch import nn
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from scalora.engine import ScaLora
from scalora.integrations.transformers import ScaLoraCallback, train_no_further
from scalora.model.layers import whole_shape
from scalora.parallel.job import is_first, wait_for_all
from scalora.rescale import native
from scalora.rivals.scalora import ScaLoraMethod
from scalora.runs.claim import Claim, claimed
from scalora.runs.divergence import DivergenceWatch
from scalora.runs.errors import DivergedError
from scalora.runs.lengths import require_readable, warn_about_lengths
from scalora.runs.lora_checks import check_adapted, check_names
from scalora.runs.measure import StepClock
from scalora.runs.messages import without_message
from scalora.runs.models import load_base
from scalora.runs.optimizer_checks import own_optimizer
from scalora.runs.prepare import PreparedRun, prepare
from scalora.runs.progress import TrainingProgress
from scalora.runs.results import write_adapter_of_shards, write_results, write_results_of_shards
from scalora.runs.resume import is_longer, resumed_environment, set_results_aside, warn_about_the_schedule
from scalora.runs.run_folder import (
    DIVERGED_FILE,
    STOPPED_FILE,
    SUMMARY_FILE,
    MetricsFile,
    json_lines,
    write_json,
)
from scalora.runs.settings import Settings
from scalora.runs.sharding import check_processes, measures_updates, models_are_loaded_whole, splits_weights
from scalora.runs.special_tokens import require_vocabulary
from scalora.runs.stopping import stops_noted
from scalora.runs.tasks import WITH_HEAD
from scalora.runs.trl_trainers import forget_copy
from scalora.runs.update_spectra import UPDATES_FILE, UpdateSpectra
from scalora.runs.whole_run import WholeRun
from scalora.saving.attach import attach
from scalora.saving.checkpoints import set_broken_checkpoints_aside

# Training batches for the gradients of a start that needs them. LoRA-GA's paper samples about as many: fewer show a
# batch's noise, more take as long as training steps.
GRADIENT_BATCHES = 8


def train(settings: Settings, *, overwrite: bool = False, resume: bool = False) -> Path:
    """Train and write the run folder.

    In a job of several processes, as torchrun starts them, all train, and the first alone writes.

    Args:
        settings: the run's settings.
        overwrite: whether to move an earlier run's folder aside.
        resume: whether to resume the run in the folder from its last whole checkpoint. A finished run is left as it is.

    Returns:
        The run folder.

    Raises:
        InputError: something in the config, the data or the model can't be used. Raised before training, and before an
            earlier run's folder is moved aside.
        DivergedError: a loss, gradient or weight is NaN or infinite. No result is written then.
        TerminatedError: the process was asked to end while it trained.
    """
    folder = Path(settings.output_dir)
    with _claim(settings, overwrite=overwrite, resume=resume) as claim:
        run = prepare(settings, overwrite=overwrite, resume=resume)
        check_processes(run.arguments)
        if run.finished:
            _say_line(f"the run in {str(folder)!r} is finished: nothing is trained or written; more steps would go on")
            return folder
        model = _load(run)
        measures = measures_updates(settings, run.arguments)
        spectra = UpdateSpectra(model, run.peft_config, settings.track_updates) if measures else None
        trainer = _adapt(run, model)
        wait_for_all()  # until all have found that they can train
        if claim is not None and not resume:
            claim.begin(run.settings, run.environment)
        resumption = _Resumption(run, claim)
        trainer.add_callback(resumption)
        try:
            with stops_noted(folder, lambda: resumption.last_step):
                summary = _run(run, trainer, spectra, folder)
        except DivergedError as error:
            if claim is not None:
                write_json(folder / DIVERGED_FILE, {"step": error.step, "error": str(error)})
            raise
        except BaseException:
            if claim is not None and not resume and not trainer.state.global_step:
                claim.undo()
            raise
        if (engine := _engine_of_shards(trainer)) is not None:
            with models_are_loaded_whole(run.arguments):
                write_results_of_shards(run, trainer.model, engine, folder, partial(_base, run))
        elif splits_weights(run.arguments):
            with models_are_loaded_whole(run.arguments):
                write_adapter_of_shards(run, trainer.model, folder, partial(_base, run))
        elif is_first():
            write_results(run, trainer.model, folder)
        if is_first():
            write_json(folder / SUMMARY_FILE, summary)
        wait_for_all()  # none ends while the first still writes, which would end the job
    return folder


@contextmanager
def _claim(settings: Settings, *, overwrite: bool, resume: bool) -> Iterator[Claim | None]:
    """The run folder, for the first process; the others wait for it when they join the job."""
    if not is_first():
        yield None
        return
    with claimed(settings, overwrite=overwrite, resume=resume) as claim:
        yield claim


class _Resumption(TrainerCallback):  # type: ignore[misc]
    """Writes what a resumed run changes in its folder, as soon as its checkpoint has been loaded.

    Args:
        run: the run.
        claim: the run folder; None for a process that writes nothing.

    Attributes:
        last_step: the number of the last step that this process has taken; 0 if it has taken none.
    """

    def __init__(self, run: PreparedRun, claim: Claim | None) -> None:
        self.last_step = 0
        self._run = run
        self._claim = claim

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Have a run that resumes at its last step take no more, and record the resumption."""
        train_no_further(state, control)
        # The Trainer would log and save as often as the run that it resumes.
        state.compute_steps(args, state.max_steps)
        if self._run.checkpoint is None or self._claim is None:
            return
        folder, changes = self._claim.folder, self._run.changes
        if is_longer(changes):
            warn_about_the_schedule(args, state.global_step)
        set_results_aside(folder)
        set_broken_checkpoints_aside(Path(args.output_dir))
        environment = resumed_environment(folder, self._run.environment, state.global_step, changes)
        self._claim.go_on(self._run.settings, environment)
        (folder / STOPPED_FILE).unlink(missing_ok=True)  # the environment has it now

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note the step."""
        self.last_step = state.global_step


def _load(run: PreparedRun) -> PreTrainedModel:
    """The base model, with a new head where the task needs one."""
    if isinstance(run.method, ScaLoraMethod) and run.method.config.native and run.arguments.device.type == "cpu":
        native.build()  # before the model is loaded, because it may fail
    _say(f"loading {run.settings.model}")
    return _base(run)


def _base(run: PreparedRun) -> PreTrainedModel:
    # The Trainer seeds itself only once it has the model, whose new head and adapter are random too.
    set_seed(run.arguments.seed)
    model = load_base(run.source, run.settings, run.tokenizer, run.labels)
    if run.settings.task in WITH_HEAD and run.settings.quantization is not None:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return model


def _adapt(run: PreparedRun, base: nn.Module) -> Trainer:
    """A trainer of the base as the method adapts it, which raises whatever attaching ScaLoRA would."""
    _say(f"preparing {', '.join(_counted(run))}")
    # It would say that an example is too long before TRL cuts it off; `warn_about_lengths` says what is true then.
    check_names(run, base)
    rows = whole_shape(base.get_input_embeddings().weight)[0]  # type: ignore[operator]
    with without_message("transformers.tokenization_utils_base", "Token indices sequence length is longer"):
        model = run.method.adapt(
            base, run.peft_config, partial(_backward, run.make_trainer), run.arguments.learning_rate
        )
        check_adapted(run, model)
        trainer = run.make_trainer(model, callbacks=run.method.callbacks())
        # Not given to the constructor, which refuses one with FSDP.
        trainer.optimizer = own_optimizer(run.settings, run.method, model, run.arguments)
    for split, (_, name) in run.examples.items():
        require_readable(getattr(trainer, f"{split}_dataset"), name, run.tokenizer, trainer)
    warn_about_lengths(run, trainer)
    if isinstance(run.method, ScaLoraMethod):
        require_vocabulary(trainer.model, rows, run.settings.training.get("chat_template_path"))
    # Remainders are made of shards, which the weights become when training begins.
    if isinstance(run.method, ScaLoraMethod) and not splits_weights(run.arguments):
        attach(trainer.model, run.method.config.merge, run.method.config.remainder_rank)
    return trainer


def _counted(run: PreparedRun) -> Iterator[str]:
    for split, (rows, _) in run.examples.items():
        yield (
            "a stream of examples" if run.stream is not None and split == "train" else f"{len(rows):,} {split} examples"
        )


def _engine_of_shards(trainer: Trainer) -> ScaLora | None:
    """What has trained a model of which each process has shards; None if the model is whole."""
    engines = (c.engine for c in trainer.callback_handler.callbacks if isinstance(c, ScaLoraCallback))
    return next((engine for engine in engines if engine is not None and engine.is_sharded), None)


def _backward(make_trainer: Callable[..., Trainer], model: nn.Module) -> None:
    """A few training batches forward and backward, as training itself would see them."""
    trainer = make_trainer(model)
    loader = iter(trainer.get_train_dataloader())
    batches, items = trainer.get_batch_samples(loader, GRADIENT_BATCHES, trainer.args.device)
    for batch in batches:
        trainer.compute_loss(model, trainer._prepare_inputs(batch), num_items_in_batch=items).backward()
    forget_copy(model)  # made of an adapter that has not got its start yet


def _run(run: PreparedRun, trainer: Trainer, spectra: UpdateSpectra | None, folder: Path) -> dict[str, Any]:
    """Train, evaluate at the end, and return the summary."""
    clock, watch = StepClock(), DivergenceWatch(trainer)
    whole = WholeRun(clock, watch, spectra, cuda=run.arguments.device.type == "cuda")
    trainer.add_callback(whole)
    trainer.add_callback(clock)
    trainer.add_callback(MetricsFile(folder))
    if spectra is not None:
        spectra.write_to(folder)
        trainer.add_callback(spectra)
    for library_display in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(library_display)
    with TrainingProgress() as progress:
        trainer.add_callback(progress)
        trainer.add_callback(watch)
        output = trainer.train(resume_from_checkpoint=run.checkpoint and str(run.checkpoint))
        watch.check_result()
        # DeepSpeed's shards say their whole size in an attribute of their own.
        trained = sum(getattr(p, "ds_numel", p.numel()) for p in trainer.model.parameters() if p.requires_grad)
        costs = whole.summary(output.metrics, trained)
        scores = _final_scores(trainer) if "eval" in run.examples else {}
    return costs | _losses(trainer.state.log_history) | _ranks(folder, trainer.model) | scores


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


def _ranks(folder: Path, model: nn.Module) -> dict[str, float]:
    """The median rank of the measured layers' updates at the last measurement, and the adapter's rank."""
    updates = json_lines(folder / UPDATES_FILE)
    last = [line["numerical_rank"] for line in updates if line["step"] == updates[-1]["step"]]
    if not last:
        return {}
    adapter = {"adapter_rank": model.active_peft_config.r} if isinstance(model, PeftModel) else {}
    return {"update_rank": statistics.median_low(last), **adapter}


def _say(what: str) -> None:
    _say_line(f"{what} …")


def _say_line(line: str) -> None:
    if is_first():
        print(line, file=sys.stderr, flush=True)
