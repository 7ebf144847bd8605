"""Prints what a training run would do, and what it has done."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.filesize import decimal
from rich.text import Text

if TYPE_CHECKING:
    from scalora.model.memory import Memory
    from scalora.runs.dry_run import Lengths, Plan, Steps
    from scalora.runs.settings import Settings
    from scalora.runs.shown_example import ShownExample

_FILES = {"model": "model", "adapter": "adapter", "delta": "exact state", "metrics.jsonl": "metrics"}

# Figures of an evaluation that are not scores of the model, or have a line of their own.
_NOT_SCORES = {"loss", "runtime", "samples_per_second", "steps_per_second", "num_tokens", "entropy"}

# How the names of TRL's figures begin that say how an evaluation went, not how good the model is.
_DETAILS = (
    "clip_ratio/", "completions/", "entropy", "frac_", "logits/", "log_odds", "logps/", "nll",
    "sampling/", "step_time",
)  # fmt: skip

_ENDS = 300  # characters shown of each end of a long part of an example


def show_summary(folder: Path, settings: Settings) -> None:
    """Print what a finished run achieved, where its results are, and which commands apply to it.

    Args:
        folder: the run folder.
        settings: the run's settings.
    """
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    present = {path.name for path in folder.iterdir()}
    print()
    print_rows([*_results(summary), *_costs(summary)])
    print()
    print_rows([(label, str(folder / name)) for name, label in _FILES.items() if name in present])
    print("\nnext:")
    for command in _next_commands(folder, settings, present):
        print(f"  {shlex.join(command)}")


def _results(summary: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if "first_loss" in summary:
        yield "training loss", _change(summary["first_loss"], summary["last_loss"], "first and last logged")
    scores = {key.removeprefix("eval_"): value for key, value in summary.items() if key.startswith("eval_")}
    if "loss" in scores:
        yield "evaluation loss", _change(summary["first_eval_loss"], scores["loss"], "first and last evaluation")
    for name, value in scores.items():
        if name not in _NOT_SCORES and not name.startswith(_DETAILS):
            yield name.replace("_", " "), _figure(value)
    if "update_rank" in summary:
        adapter = f", with adapters of rank {summary['adapter_rank']}" if "adapter_rank" in summary else ""
        yield "rank of the update", f"{summary['update_rank']:g}{adapter}"


def _change(first: float | None, last: float | None, what: str) -> str:
    before, after = _figure(first), _figure(last)
    return after if before == after else f"{before} → {after} ({what})"


def _figure(value: float | None) -> str:
    """A score; JSON has none that is not finite."""
    return "not finite" if value is None else f"{value:.4f}"


def _costs(summary: dict[str, Any]) -> Iterator[tuple[str, str]]:
    time = f"{_duration(summary['training_seconds'])} for {summary['steps']:,} steps"
    if each := summary["seconds_per_step"]:
        time += f", {each:.2g} s each"
    yield "time", time
    yield "peak memory", decimal(summary["peak_memory_bytes"])
    yield "trained", f"{summary['trainable_parameters']:,} parameters"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, hours = whole // 60, whole // 3600
    return f"{minutes} min {whole % 60} s" if minutes < 60 else f"{hours} h {minutes % 60} min"


def _next_commands(folder: Path, settings: Settings, present: set[str]) -> Iterator[list[str]]:
    run = str(folder)
    if settings.data.eval is not None and "model" in present:
        yield ["scalora", "evaluate", run, str(folder / "config.yaml")]
    if "delta" in present and "adapter" not in present:
        yield ["scalora", "export", run, "--to", "adapter"]
    yield ["scalora", "report", run]
    if present & {"model", "adapter", "delta"}:
        yield ["scalora", "inspect", run]


def _percent(share: float) -> str:
    return f"{100 * share:.2g}%" if share < 0.995 else f"{100 * share:.0f}%"


def show_plan(plan: Plan) -> None:
    """Print what a run would do, with examples of what it would train on.

    Args:
        plan: what `scalora.runs.dry_run.dry_run` found.
    """
    settings = plan.run.settings
    method = f"{settings.method}; trains {plan.trained:,} parameters ({_percent(plan.trained / plan.parameters)})"
    if plan.layers:
        method += f", rescales {plan.layers} layers ({plan.mode}) with a {plan.merge} remainder"
    examples = ", ".join(
        f"{'a stream' if plan.run.stream and split == 'train' else format(plan.run.count(split), ',')} for {split}"
        for split in plan.run.examples
    )
    quantised = f", {settings.quantization}" if settings.quantization else ""
    print("dry run: nothing is trained or written\n")
    print_rows(
        [
            ("model", f"{plan.model}, {plan.parameters:,} parameters, {settings.dtype}{quantised}"),
            ("method", method),
            ("optimizer", f"{plan.optimizer}, learning rate {plan.run.arguments.learning_rate:.3g}"),
            ("examples", examples),
            ("tokens", _lengths(plan.lengths)),
            ("steps", _steps(plan.steps)),
            ("memory", _memory(plan.memory, "optimizer" if plan.pair_adamw else "optimizer (as Adam)")),
            ("run folder", _writes(plan)),
        ]
    )
    number = 0
    for example in plan.shown:
        number += example.kind != "rejected"  # the second text of the same example
        _print_example(example, number)


def _lengths(lengths: Lengths) -> str:
    words = f"{lengths.shortest:,} to {lengths.longest:,} per example, median {lengths.median:g}"
    if lengths.limit is not None:
        words += f"; {lengths.cut:,} of {lengths.examples:,} examples are cut off at {lengths.limit:,}"
    if lengths.left_out:
        words += f", {lengths.left_out:,} left out because nothing before that is trained on"
    return words


def _steps(steps: Steps) -> str:
    about = "about " if steps.estimated else ""
    if steps.per_epoch is None:
        return f"{steps.total:,} of {steps.batch:,} examples"
    return f"{about}{steps.total:,} of {steps.batch:,} examples; an epoch takes {about}{steps.per_epoch:,}"


def _memory(memory: Memory, optimizer: str) -> str:
    parts = {
        "weights": memory.base,
        "adapter": memory.adapter,
        "gradients": memory.gradients,
        optimizer: memory.optimizer,
        "remainder": memory.remainder,
        "rescale": memory.scratch,
    }
    words = ", ".join(f"{name} {decimal(size)}" for name, size in parts.items() if size)
    return f"{decimal(memory.scalora)} without activations: {words}"


def _writes(plan: Plan) -> str:
    run = plan.run
    if run.finished:
        return f"{run.settings.output_dir}: the run is finished, nothing would be trained or written"
    names = [*plan.results, "config.yaml", "metrics.jsonl", "summary.json"]
    words = f"{run.settings.output_dir}: {', '.join(names)}"
    if run.checkpoint is not None:
        words += f"; resumes from {run.checkpoint}"
    if run.arguments.save_strategy != "no":
        words += f"; checkpoints in {run.arguments.output_dir}"
    return words


def print_rows(rows: list[tuple[str, str]]) -> None:
    """Print labels and values, the values in a column.

    Args:
        rows: the labels and values.
    """
    width = max(len(label) for label, _ in rows) + 2
    for label, value in rows:
        print(f"{label:<{width}}{value}")


def _print_example(example: ShownExample, number: int) -> None:
    """The text, with what is trained on in green on a terminal, in double brackets elsewhere."""
    console = Console(highlight=False)
    goal = example.goal
    if goal is None:
        goal = f"{example.trained} of them trained on ({'in green' if console.is_terminal else '[[…]]'})"
    text = Text()
    for part, trained in example.parts:
        shown = part if len(part) <= 2 * _ENDS else f"{part[:_ENDS]} […] {part[-_ENDS:]}"
        if trained and console.is_terminal:
            text.append(shown, "bold green")
        else:
            text.append(f"[[{shown}]]" if trained else shown)
    kind = "" if example.kind is None else f" ({example.kind})"
    print(f"\nexample {number}{kind}: {example.tokens:,} tokens, {goal}")
    console.print(text, soft_wrap=True)
