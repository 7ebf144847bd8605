"""``scalora export``: writes an ordinary adapter, a merged model or the exact state of a run, and verifies it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from scalora.maths.lowrank import DEFAULT_RTOL
from scalora.runs.data import load_examples
from scalora.runs.errors import InputError
from scalora.runs.evaluate import loss_score, sequence_scores
from scalora.runs.finished_run import FinishedRun
from scalora.runs.models import Source, load_base, save_tokenizer
from scalora.runs.run_folder import write_json
from scalora.saving.export import ExportError, export_adapter, export_merged, load_model
from scalora.saving.files import atomic_folder
from scalora.saving.ordinary_adapter import AdapterReport
from scalora.saving.state_file import STATE_FILE, check_state

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
    rtol: float | None,
    max_rank: int | None,
    per_layer: bool,
    dtype: str,
) -> tuple[Path, dict[str, Any]]:
    """Export the result of a ScaLoRA run, load it from disk, and verify that it agrees with the run.

    Args:
        path: a run folder, or a checkpoint in one.
        to: ``"adapter"`` for an ordinary PEFT adapter, ``"merged"`` for the whole model, ``"delta"`` for the exact
            state.
        output: folder to write, which must not exist. None: ``export-TO`` in the run folder.
        rtol: for adapters, the fraction of each layer's update, in the Frobenius norm, that may be left out. None:
            `scalora.maths.lowrank.DEFAULT_RTOL`.
        max_rank: for adapters, the maximum rank. None: no limit.
        per_layer: for adapters, whether every layer has its own rank.
        dtype: name of the dtype of the exported tensors.

    Returns:
        The folder written, and a report of what was compared and how closely it agrees, for adapters with their ranks.

    Raises:
        InputError: the run, its base, an option or the output can't be used.
        StateError: the run's state is damaged, or belongs to another base.
        ExportError: the exported files do not agree with the run. They have been removed.
    """
    if to != "adapter" and (rtol is not None or max_rank is not None or per_layer):
        raise InputError(f"--rtol, --max-rank and --per-layer are for --to adapter, not for --to {to}")
    if rtol is not None and not 0 < rtol < 1:
        raise InputError(f"--rtol {rtol}: must be between 0 and 1")
    if max_rank is not None and max_rank < 1:
        raise InputError(f"--max-rank {max_rank}: must be at least 1")
    run = FinishedRun(path)
    if run.settings.method != "scalora":
        raise InputError(
            f"run {str(path)!r} used the method {run.settings.method!r}: there is nothing to export, since its adapter "
            "or model is an ordinary one"
        )
    state = run.state or path / "delta"
    check_state(state)
    target = output or run.folder / f"export-{to}"
    if target.exists() or target.is_symlink():
        raise InputError(f"output {str(target)!r} exists: choose another with --output, or remove it first")
    report: dict[str, Any] = {"run": str(path), "to": to, "dtype": dtype}
    with atomic_folder(target) as folder:
        if to == "delta":
            load_model(run.load(), state)  # raises an error if the state does not fit the base
            shutil.copyfile(state / STATE_FILE, folder / STATE_FILE)
        else:
            options = {"rtol": rtol or DEFAULT_RTOL, "max_rank": max_rank, "per_layer": per_layer}
            report |= _make_checked(run, state, to, folder, getattr(torch, dtype), options if to == "adapter" else {})
            write_json(folder / "export.json", report)
    return target, report


def _make_checked(
    run: FinishedRun, state: Path, to: str, folder: Path, dtype: torch.dtype, options: dict[str, Any]
) -> dict[str, Any]:
    """Write an adapter or a merged model, load it and compare it with the run; returns the report."""
    base = run.load()
    probe = torch.randint(0, base.config.vocab_size, _PROBE, generator=torch.Generator().manual_seed(0))
    before = _logits(base, probe)
    live: dict[str, Any] = {}
    report: dict[str, Any] = {}

    def look(model: PeftModel) -> None:
        # TRL converts trainable parameters on a quantised base to bfloat16, even if it only evaluates.
        model.requires_grad_(False)
        live["logits"], live["loss"] = _logits(model, probe), _loss(run, model)

    allowed = 10 * torch.finfo(dtype).eps
    if to == "adapter":
        model, made = export_adapter(base, state, folder, dtype=dtype, **options)
        look(model)
        report |= _adapter_report(made)
        allowed += 10 * made.error
        reload: Callable[[], Any] = lambda: PeftModel.from_pretrained(run.load(), folder)  # noqa: E731
        del model
    else:
        export_merged(base, state, folder, dtype=dtype, with_model=look)
        save_tokenizer(run.tokenizer, folder)
        reload = lambda: _reloaded(folder, dtype, run)  # noqa: E731
    del base
    return report | _checked(reload(), run, probe, before, live, allowed)


def _loss(run: FinishedRun, model: Any) -> float | None:
    """Evaluation loss on the first examples of ``data.eval``; None without evaluation data."""
    if (name := run.settings.data.eval) is None:
        return None
    examples = load_examples(name, "test")
    examples = examples.select(range(min(run.settings.evaluate.limit or _EXAMPLES, len(examples))))
    if run.settings.task == "sft":
        return loss_score(model, run.tokenizer, examples, name, run.settings)["loss"]
    return sequence_scores(model, run.tokenizer, examples, name, run.settings, run.labels)["loss"]


def _reloaded(folder: Path, dtype: torch.dtype, run: FinishedRun) -> PreTrainedModel:
    source = Source(str(folder), None)
    settings = run.settings.model_copy(update={"quantization": None, "dtype": str(dtype).removeprefix("torch.")})
    return load_base(source, settings, run.tokenizer, run.labels, new_head=False)


@torch.no_grad()
def _logits(model: Any, probe: Tensor) -> Tensor:
    training = model.training
    model.eval()
    logits: Tensor = model(
        input_ids=probe.to(model.device), attention_mask=torch.ones_like(probe, device=model.device)
    ).logits
    model.train(training)
    return logits.float().cpu()


def _checked(
    model: Any, run: FinishedRun, probe: Tensor, before: Tensor, live: dict[str, Any], allowed: float
) -> dict[str, Any]:
    """Compare a model loaded from disk with the live one.

    The relative error of the change that training made must be at most `allowed`, apart from the rounding errors of the
    base's dtype.

    Raises:
        ExportError: the error is larger, or the logits are not finite.
    """
    logits = _logits(model, probe)
    if not logits.isfinite().all():
        raise ExportError("the exported model's logits have NaN or infinite entries")
    change = (live["logits"] - before).norm().item()
    difference = (logits - live["logits"]).norm().item()
    # bitsandbytes rounds the activations of 8-bit layers, and computes 4-bit ones in bfloat16 on a CPU.
    precision = torch.bfloat16 if run.settings.quantization else getattr(torch, run.settings.dtype)
    rounding = 8 * torch.finfo(precision).eps * live["logits"].norm().item()
    tolerance = allowed * max(change, live["logits"].norm().item() * 1e-3) + rounding
    if change > tolerance and torch.equal(logits, before):
        raise ExportError("the exported model equals the base model: it does not contain the update")
    if not difference <= tolerance:
        raise ExportError(
            f"the logits of the exported model differ from those of the run by {difference:.3g}, more than the "
            f"tolerance of {tolerance:.3g} (training changed them by {change:.3g})"
        )
    report = {"logits_changed_by_training": change, "logits_difference": difference, "logits_tolerance": tolerance}
    if live["loss"] is not None:
        report |= {"eval_loss_run": live["loss"], "eval_loss_export": _loss(run, model)}
    return report


def _adapter_report(report: AdapterReport) -> dict[str, Any]:
    layers = {
        name: {"rank": rank, "needed": report.needed[name], "error": report.errors[name]}
        for name, rank in report.ranks.items()
    }
    return {"error": report.error, "serving_rank": report.serving_rank, "layers": layers}
