"""``scalora export``: writes an ordinary adapter, a merged model or the exact state of a run, and verifies it."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from scalora.maths.lowrank import DEFAULT_RTOL
from scalora.runs.base_names import named_base
from scalora.runs.data import Examples, examples_of, first_examples
from scalora.runs.errors import InputError
from scalora.runs.evaluate import loss_score, sequence_scores
from scalora.runs.finished_run import FinishedRun
from scalora.runs.resume import has_changed
from scalora.runs.run_folder import write_json
from scalora.runs.saved_folder import SavedFolder, opened
from scalora.runs.special_tokens import adopt_special_tokens, save_text_settings
from scalora.runs.tasks import LABELLED
from scalora.runs.unfinished import how_to_go_on, is_unfinished
from scalora.saving.base_name import write_base_name
from scalora.saving.export import export_adapter, export_merged, load_model
from scalora.saving.files import atomic_folder
from scalora.saving.ordinary_adapter import AdapterReport
from scalora.saving.readme import write_readme
from scalora.saving.state_file import STATE_FILE, check_state, read_state, write_state
from scalora.saving.verify import ExportError

Result = FinishedRun | SavedFolder

# Shape of the random token ids on which exported models are compared: enough to distinguish models, and cheap for a
# large model.
_PROBE = (4, 32)

# Number of examples on which the evaluation losses are compared, unless the config sets a limit.
_EXAMPLES = 64


def export(
    path: Path,
    to: str,
    output: Path | None,
    *,
    rtol: float | None = None,
    max_rank: int | None = None,
    per_layer: bool = False,
    dtype: str = "float32",
    base: str | None = None,
    base_dtype: str | None = None,
    quantization: str | None = None,
    name: str | None = None,
    with_loss: bool = True,
) -> tuple[Path, dict[str, Any]]:
    """Export the result of training with ScaLoRA, load it from disk, and verify that it agrees with the live model.

    Args:
        path: a run folder, a Trainer's output folder, a checkpoint in either, or a folder that ``save_pretrained`` has
            written.
        to: ``"adapter"`` for an ordinary PEFT adapter, ``"merged"`` for the whole model, ``"delta"`` for the exact
            state.
        output: folder to write, which must not exist. None: ``export-TO`` in the run's or the Trainer's folder.
        rtol: for adapters, the fraction of each layer's update, in the Frobenius norm, that may be left out. None:
            `scalora.maths.lowrank.DEFAULT_RTOL`.
        max_rank: for adapters, the maximum rank. None: no limit.
        per_layer: for adapters, whether every layer has its own rank.
        dtype: name of the dtype of the exported tensors.
        base: where to load the base from. None: where training loaded it.
        base_dtype: the dtype in which to load the base, for a folder that does not say it. None: that of training.
        quantization: how to quantise the base, for a folder that does not say it. None: as in training.
        name: for adapters, what to name as the base. None: where the base was loaded from.
        with_loss: whether to compare the evaluation loss with the run's.

    Returns:
        The folder written, and a report of what was compared and how closely it agrees, for adapters with their ranks.

    Raises:
        InputError: the folder, its base, an option or the output can't be used.
        StateError: the state is damaged, or belongs to another base.
        ExportError: the exported files do not agree with the live model. They have been removed.
    """
    if to != "adapter" and (rtol is not None or max_rank is not None or per_layer or name is not None):
        raise InputError(f"--rtol, --max-rank, --per-layer and --base-name are for --to adapter, not for --to {to}")
    if rtol is not None and not 0 < rtol < 1:
        raise InputError(f"--rtol {rtol}: must be between 0 and 1")
    if max_rank is not None and max_rank < 1:
        raise InputError(f"--max-rank {max_rank}: must be at least 1")
    run = opened(path, base=base, dtype=base_dtype, quantization=quantization)
    if isinstance(run, FinishedRun) and not run.is_checkpoint and is_unfinished(run.folder):
        raise InputError(f"run {str(path)!r} can't be exported: {how_to_go_on(run.folder)}")
    if isinstance(run, FinishedRun) and run.settings.method != "scalora":
        there = [f"its adapter {str(run.adapter)!r} is an ordinary one"] if run.adapter else []
        there += [f"its merged model is {str(run.model)!r}"] if run.model else []
        raise InputError(
            f"run {str(path)!r} used the method {run.settings.method!r}, so there is nothing to export: "
            f"{', '.join(there) or 'it has saved no model'}"
        )
    state = run.state or path / "delta"
    check_state(state)
    target = output or run.folder / f"export-{to}"
    if target.exists() or target.is_symlink():
        raise InputError(f"output {str(target)!r} exists: choose another with --output, or remove it first")
    report: dict[str, Any] = {"run": str(path), "state": str(state), "to": to, "dtype": dtype}
    with atomic_folder(target) as folder:
        if to == "delta":
            live = load_model(_base(run), state)  # raises an error if the state does not fit the base
            if (state / STATE_FILE).is_file():
                shutil.copyfile(state / STATE_FILE, folder / STATE_FILE)
            else:
                write_state(folder / STATE_FILE, read_state(state))  # of shards
            write_readme(folder, read_state(state))
            _write_text_settings(run, live.get_base_model(), folder)
        else:
            options = {"rtol": rtol or DEFAULT_RTOL, "max_rank": max_rank, "per_layer": per_layer}
            examples = _examples(run) if with_loss else None  # before the base, which takes longer
            exporter = _Exporter(run, state, folder, getattr(torch, dtype), examples)
            report |= exporter.adapter(name, options) if to == "adapter" else exporter.merged()
            write_json(folder / "export.json", report)
    return target, report


def _base(run: Result) -> PreTrainedModel:
    """The base of a run, with the special tokens that the run has given it."""
    base = run.load()
    if run.tokenizer is not None:
        adopt_special_tokens(base, run.tokenizer)
    return base


def _write_text_settings(run: Result, model: PreTrainedModel, folder: Path) -> None:
    """Write the tokenizer and the generation config, and check that they read as they were."""
    if run.tokenizer is None:
        return
    save_text_settings(model, run.tokenizer, folder)
    written = AutoTokenizer.from_pretrained(folder, trust_remote_code=run.settings.trust_remote_code)
    for key in ("chat_template", "eos_token", "pad_token", "bos_token"):
        if getattr(written, key) != getattr(run.tokenizer, key):
            raise ExportError(f"the tokenizer's {key} reads as {getattr(written, key)!r} from the exported files")


class _Exporter:
    """Writes one export into a folder, loads it again and compares it with the live model."""

    def __init__(self, run: Result, state: Path, folder: Path, dtype: torch.dtype, examples: Examples | None) -> None:
        self._run, self._state, self._folder, self._dtype = run, state, folder, dtype
        self._examples = examples
        self._base = _base(run)
        vocabulary = self._base.config.get_text_config().vocab_size
        self._probe = torch.randint(0, vocabulary, _PROBE, generator=torch.Generator().manual_seed(0))
        quantised = getattr(self._base, "hf_quantizer", None) is not None
        # bitsandbytes rounds the activations of 8-bit layers, and computes 4-bit ones in bfloat16 on a CPU. There it
        # also rounds their scales at the first use, for good: not before the base has been checked.
        self._precision: torch.dtype = torch.bfloat16 if quantised else self._base.dtype
        self._before = None if quantised else _logits(self._base, self._probe)
        self._live: Tensor | None = None
        self._loss: float | None = None

    def adapter(self, name: str | None, options: dict[str, Any]) -> dict[str, Any]:
        """Write an adapter; returns the report."""
        named, note = named_base(self._run.source, name)
        options |= {"name": named and named.name, "dtype": self._dtype}
        with warnings.catch_warnings():
            if note is not None:  # it says the same, and more
                warnings.filterwarnings("ignore", message="the adapter names no base")
            model, made = export_adapter(self._base, self._state, self._folder, **options)
        if named is not None:
            write_base_name(self._folder, named, note)
        _write_text_settings(self._run, model.get_base_model(), self._folder)
        self._look(model)
        del model, self._base
        reloaded = PeftModel.from_pretrained(self._run.load(), self._folder)
        # Each layer has been checked against its update; later layers amplify what the rank leaves out of earlier ones.
        allowed = 10 * torch.finfo(self._dtype).eps + 100 * made.error
        base = PeftConfig.from_pretrained(self._folder).base_model_name_or_path
        return _adapter_report(made) | {"base": base, "note": note} | self._checked(reloaded, allowed, 0)

    def merged(self) -> dict[str, Any]:
        """Write a merged model; returns the report."""
        losses: dict[str, float] = {}
        export_merged(
            self._base,
            self._state,
            self._folder,
            dtype=self._dtype,
            with_model=self._look,
            with_losses=losses.update,
        )
        del self._base
        reloaded = self._run.load_merged(self._folder, self._dtype)
        _write_text_settings(self._run, reloaded, self._folder)
        rounding = 8 * torch.finfo(self._dtype).eps if any(losses.values()) else 0
        layers = {name: {"rounding": loss} for name, loss in losses.items()}
        return {"layers": layers} | self._checked(reloaded, 10 * torch.finfo(self._dtype).eps, rounding)

    def _look(self, model: PeftModel) -> None:
        # TRL converts trainable parameters on a quantised base to bfloat16, even if it only evaluates.
        model.requires_grad_(False)
        if self._before is None:
            with model.disable_adapter():
                self._before = _logits(model, self._probe)
        self._live, self._loss = _logits(model, self._probe), self._loss_of(model)

    def _checked(self, model: Any, allowed: float, rounding: float) -> dict[str, Any]:
        """Compare a model loaded from disk with the live one.

        The relative error of the change that training made must be at most `allowed`, apart from the rounding errors of
        the base's dtype, and the relative error of the logits that `rounding` every weight explains.

        Raises:
            ExportError: the error is larger, or the logits are not finite.
        """
        assert self._live is not None
        assert self._before is not None
        logits = _logits(model, self._probe)
        if not logits.isfinite().all():
            raise ExportError("the exported model's logits have NaN or infinite entries")
        norm, change = self._live.norm().item(), (self._live - self._before).norm().item()
        difference = (logits - self._live).norm().item()
        rounding = max(rounding, 8 * torch.finfo(self._precision).eps) * norm
        tolerance = allowed * max(change, norm * 1e-3) + rounding
        if change > tolerance and torch.equal(logits, self._before):
            raise ExportError("the exported model equals the base model: it does not contain the update")
        if not difference <= tolerance:
            raise ExportError(
                f"the logits of the exported model differ from those of the run by {difference:.3g}, more than the "
                f"tolerance of {tolerance:.3g} (training changed them by {change:.3g})"
            )
        report = {"logits_changed_by_training": change, "logits_difference": difference, "logits_tolerance": tolerance}
        if self._loss is not None:
            report |= {"eval_loss_run": self._loss, "eval_loss_export": self._loss_of(model)}
        return report

    def _loss_of(self, model: Any) -> float | None:
        """Evaluation loss on the examples; None without examples."""
        run = self._run
        if self._examples is None or run.tokenizer is None:
            return None
        if run.settings.task == "sft":
            return loss_score(model, run.tokenizer, *self._examples, run.settings)["loss"]
        return sequence_scores(model, run.tokenizer, *self._examples, run.settings, run.labels)["loss"]


def _examples(run: Result) -> Examples | None:
    """The first examples of ``data.eval``; None without evaluation data, or a loss of one model."""
    if (name := run.settings.data.eval) is None or run.tokenizer is None:
        return None
    if run.settings.task not in ("sft", *LABELLED):
        return None  # it is computed from a reference, or from answers that are drawn at random
    try:
        examples = examples_of(run.settings.data, name, "test")
    except InputError as error:
        raise InputError(f"{error}; --skip-loss exports without comparing the loss") from None
    if isinstance(run, FinishedRun) and has_changed(run.folder, "eval", examples.rows):
        warnings.warn(
            f"the export's loss is not compared with the run's: data.eval, {name!r}, has changed since", stacklevel=2
        )
        return None
    return first_examples(examples, run.settings.evaluate.limit or _EXAMPLES)


@torch.no_grad()
def _logits(model: Any, probe: Tensor) -> Tensor:
    model.eval()  # for good: nothing is trained here, and some kernels of GPTQModel refuse to be switched back
    logits: Tensor = model(
        input_ids=probe.to(model.device), attention_mask=torch.ones_like(probe, device=model.device)
    ).logits
    return logits.float().cpu()


def _adapter_report(report: AdapterReport) -> dict[str, Any]:
    layers = {
        name: {"rank": rank, "needed": report.needed[name], "error": report.errors[name]}
        for name, rank in report.ranks.items()
    }
    serving = {"serving_rank": report.serving_rank, "not_for_vllm": list(report.vllm)}
    return {"error": report.error, "layers": layers} | serving
