"""``scalora export``: an ordinary adapter, a merged model or the exact state of a run, read again and checked."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from scalora.cli.data import label_names, load_examples
from scalora.cli.errors import InputError
from scalora.cli.evaluate import class_names, loss_score, sequence_scores
from scalora.cli.models import (
    Source,
    load_base,
    load_tokenizer,
    resolve_source,
    save_tokenizer,
)
from scalora.cli.run_folder import write_json
from scalora.cli.settings import run_settings
from scalora.export import ExportError, export_adapter, export_merged, load_model
from scalora.ordinary_adapter import DEFAULT_RTOL, AdapterReport
from scalora.state import STATE_FILE, check_state
from scalora.writing import whole_folder

# Token ids that every exported model is compared on: enough to tell models apart, little enough for a large one.
_PROBE = (4, 32)

# Examples that the change in evaluation loss is measured on when the config sets no limit of its own.
_EXAMPLES = 64


class _Run:
    """A run folder, or a checkpoint in it, and how to load what belongs to it."""

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise InputError(f"run {str(path)!r} does not exist")
        # A checkpoint is in RUN/trainer; nothing that is further up, or beside a state that is gone, is the run's.
        own = (path / STATE_FILE).exists()
        folder = next((f for f in (path, *path.resolve().parents[: 2 * own]) if (f / "config.yaml").is_file()), path)
        self.settings = run_settings(folder)
        if self.settings.method != "scalora":
            raise InputError(f"run {str(path)!r} is of method {self.settings.method!r}: its result is ordinary already")
        self.path, self.folder = path, folder
        self.state = path if own else path / "delta"
        check_state(self.state)
        self.source: Source = resolve_source(self.settings.model)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(self.source, self.settings)
        self.labels = self._labels()

    def _labels(self) -> list[str] | None:
        if self.settings.task != "classification":
            return None
        if (self.folder / "model" / "config.json").is_file():
            return class_names(Source(str(self.folder / "model"), None), self.settings)
        name = str(self.settings.data.train)
        return label_names(load_examples(name, "train"), name, self.settings.data)

    def base(self) -> PreTrainedModel:
        """The base model, loaded anew."""
        return load_base(self.source, self.settings, self.tokenizer, self.labels)

    def loss(self, model: Any) -> float | None:
        """Evaluation loss on the first examples of ``data.eval``; None if there is none."""
        if (name := self.settings.data.eval) is None:
            return None
        examples = load_examples(name, "test")
        examples = examples.select(range(min(self.settings.evaluate.limit or _EXAMPLES, len(examples))))
        if self.settings.task == "sft":
            return loss_score(model, self.tokenizer, examples, name, self.settings)["loss"]
        return sequence_scores(model, self.tokenizer, examples, name, self.settings, self.labels)["loss"]


def export(
    path: Path,
    to: str,
    output: Path | None,
    *,
    rtol: float | None,
    max_rank: int | None,
    per_layer: bool,
    dtype: str,
) -> None:
    """Write one form of a run's result, load it again from disk, check it and print the report.

    Raises:
        InputError: the run, its base or the output can't be used.
        StateError: the state is damaged or belongs to another base.
        ExportError: what was written does not agree with the run. It is removed.
    """
    if to != "adapter" and (rtol is not None or max_rank is not None or per_layer):
        raise InputError(f"--rtol, --max-rank and --per-layer are for --to adapter, not for --to {to}")
    if rtol is not None and not 0 < rtol < 1:
        raise InputError(f"--rtol {rtol}: must be between 0 and 1")
    if max_rank is not None and max_rank < 1:
        raise InputError(f"--max-rank {max_rank}: must be at least 1")
    run = _Run(path)
    target = output or run.folder / f"export-{to}"
    if target.exists() or target.is_symlink():
        raise InputError(f"output {str(target)!r} exists: choose another with --output, or remove it first")
    report: dict[str, Any] = {"run": str(path), "to": to, "dtype": dtype}
    with whole_folder(target) as folder:
        if to == "delta":
            _make_delta(run, folder)
        else:
            options = {"rtol": rtol or DEFAULT_RTOL, "max_rank": max_rank, "per_layer": per_layer}
            report |= _make_checked(run, to, folder, getattr(torch, dtype), options if to == "adapter" else {})
            write_json(folder / "export.json", report)
    if to == "delta":
        print(f"delta written to {target}; scalora.load_model(base, {str(target)!r}) continues from it")
    else:
        _show(report, target)


def _make_delta(run: _Run, folder: Path) -> None:
    """Copy the state, once it is known to load on its base."""
    load_model(run.base(), run.state)
    shutil.copyfile(run.state / STATE_FILE, folder / STATE_FILE)


def _make_checked(run: _Run, to: str, folder: Path, dtype: torch.dtype, options: dict[str, Any]) -> dict[str, Any]:
    """Write an adapter or a merged model, load it again and compare; returns the report."""
    base = run.base()
    probe = torch.randint(0, base.config.vocab_size, _PROBE, generator=torch.Generator().manual_seed(0))
    before = _logits(base, probe)
    live: dict[str, Any] = {}
    report: dict[str, Any] = {}

    def look(model: PeftModel) -> None:
        # TRL makes what is trained on a quantised base bfloat16, when it only evaluates too.
        model.requires_grad_(False)
        live["logits"], live["loss"] = _logits(model, probe), run.loss(model)

    allowed = 10 * torch.finfo(dtype).eps
    if to == "adapter":
        model, made = export_adapter(base, run.state, folder, dtype=dtype, **options)
        look(model)
        report |= _adapter_report(made)
        allowed += 10 * made.error
        reload: Callable[[], Any] = lambda: PeftModel.from_pretrained(run.base(), folder)  # noqa: E731
        del model
    else:
        export_merged(base, run.state, folder, dtype=dtype, with_model=look)
        save_tokenizer(run.tokenizer, folder)
        reload = lambda: _reloaded(folder, dtype, run)  # noqa: E731
    del base
    return report | _checked(reload(), run, probe, before, live, allowed)


def _reloaded(folder: Path, dtype: torch.dtype, run: _Run) -> PreTrainedModel:
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
    model: Any, run: _Run, probe: Tensor, before: Tensor, live: dict[str, Any], allowed: float
) -> dict[str, Any]:
    """Compare a model that was loaded from disk with the live one.

    The change that training made must be there to within `allowed`, beside the rounding of the base's own dtype.

    Raises:
        ExportError: it is not, or the logits are not finite.
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
        raise ExportError("the exported model is the base model: the update is not in it")
    if not difference <= tolerance:
        raise ExportError(
            f"the exported model's logits differ from the run's by {difference:.3g}, which is more than the tolerance "
            f"{tolerance:.3g} (training changed them by {change:.3g})"
        )
    report = {"logits_changed_by_training": change, "logits_difference": difference, "logits_tolerance": tolerance}
    if live["loss"] is not None:
        report |= {"eval_loss_run": live["loss"], "eval_loss_export": run.loss(model)}
    return report


def _adapter_report(report: AdapterReport) -> dict[str, Any]:
    layers = {
        name: {"rank": rank, "needed": report.needed[name], "error": report.errors[name]}
        for name, rank in report.ranks.items()
    }
    return {"error": report.error, "serving_rank": report.serving_rank, "layers": layers}


def _show(report: dict[str, Any], target: Path) -> None:
    table = Table("", "", title=f"{report['to']} of {report['run']}", show_header=False)
    if layers := report.get("layers"):
        ranks, needed = ([layer[key] for layer in layers.values()] for key in ("rank", "needed"))
        worst = max(layers, key=lambda name: layers[name]["error"])
        table.add_row("rank", str(ranks[0]) if len(set(ranks)) == 1 else f"{min(ranks)} to {max(ranks)}")
        table.add_row("rank that each layer needs", f"{min(needed)} to {max(needed)}")
        table.add_row(
            "left out of the update", f"{report['error']:.2e} (most in {worst}: {layers[worst]['error']:.2e})"
        )
        table.add_row("serving engines must allow", f"rank {report['serving_rank']} (vLLM: --max-lora-rank)")
    table.add_row("training changed the logits by", f"{report['logits_changed_by_training']:.4g}")
    table.add_row(
        "the export differs by", f"{report['logits_difference']:.4g} (tolerance {report['logits_tolerance']:.4g})"
    )
    if "eval_loss_run" in report:
        table.add_row("evaluation loss", f"{report['eval_loss_run']:.5f} → {report['eval_loss_export']:.5f}")
    size = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    table.add_row("size", f"{size / 1e6:.1f} MB")
    Console().print(table)
    print(f"{report['to']} written to {target}; each layer is in export.json")
