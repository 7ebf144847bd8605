"""Prints the results of commands as tables."""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from scalora.studies.compare import Comparison
    from scalora.studies.reproduce import Reproduced

# Columns by heading, each with its entry in a layer's data and its format.
_UPDATE_COLUMNS = {
    "shape": ("shape", ""),
    "rank": ("numerical_rank", "g"),
    "effective": ("effective_rank", ".1f"),
    "norm": ("norm", ".2g"),
    "relative": ("relative_norm", ".2g"),
    "adapter": ("adapter_rank", "g"),
}
_CAPTION = (
    "rank: number of singular values above a thousandth of the largest. relative: norm divided by that of the base "
    "weight. adapter: rank of an ordinary adapter that leaves out at most a thousandth of the norm. Bottom: median and "
    "range for each kind of layer."
)

_LOOK: dict[str, Any] = {"box": SIMPLE_HEAD, "pad_edge": False, "padding": (0, 1, 0, 0)}


def show_scores(scores: dict[str, Any]) -> None:
    """Print the scores of a model.

    Args:
        scores: values by name.
    """
    table = Table("score", "value")
    for key, value in scores.items():
        table.add_row(key, f"{value:.4f}" if isinstance(value, float) else str(value))
    Console().print(table)


def show_harness_scores(found: dict[str, Any]) -> None:
    """Print the scores of lm-evaluation-harness, as it prints them itself, and which weights they are of.

    Args:
        found: the result of `scalora.runs.harness.harness_scores`.
    """
    from lm_eval.utils import make_table

    print(f"weights: {found['weights']}")
    print(make_table(found))
    if found.get("groups"):
        print(make_table(found, "groups"))


def show_export(report: dict[str, Any], target: Path) -> None:
    """Print how closely an export agrees with its run, and where it is.

    Args:
        report: the report of `scalora.runs.export.export`.
        target: folder of the export.
    """
    if report["to"] == "delta":
        print(f"delta written to {target}; load it with scalora.load_model(base, {str(target)!r})")
        return
    table = Table("", "", title=f"{report['to']} of {report['run']}", show_header=False)
    layers = report["layers"]
    if report["to"] == "merged":
        worst = max(layers, key=lambda name: layers[name]["rounding"])
        if layers[worst]["rounding"]:
            table.add_row(
                f"rounding to {report['dtype']}", f"at most {layers[worst]['rounding']:.2e} of the update, in {worst}"
            )
    else:
        ranks, needed = ([layer[key] for layer in layers.values()] for key in ("rank", "needed"))
        worst = max(layers, key=lambda name: layers[name]["error"])
        table.add_row("rank", str(ranks[0]) if len(set(ranks)) == 1 else f"{min(ranks)} to {max(ranks)}")
        table.add_row("rank needed by the layers", f"{min(needed)} to {max(needed)}")
        table.add_row(
            "error of the update", f"{report['error']:.2e} (at most {layers[worst]['error']:.2e}, in {worst})"
        )
        table.add_row("rank that a server must allow", f"{report['serving_rank']} (vLLM: --max-lora-rank)")
        if report["not_for_vllm"]:
            table.add_row("vLLM does not take it", f"{'; '.join(report['not_for_vllm'])}: serve a merged model")
    table.add_row("change of the logits by training", f"{report['logits_changed_by_training']:.4g}")
    table.add_row(
        "difference between export and run",
        f"{report['logits_difference']:.4g} (tolerance {report['logits_tolerance']:.4g})",
    )
    if "eval_loss_run" in report:
        table.add_row(
            "evaluation loss", f"{report['eval_loss_run']:.5f} (run), {report['eval_loss_export']:.5f} (export)"
        )
    if report["to"] == "adapter":
        table.add_row("base that the adapter names", report["base"] or "none")
    size = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    table.add_row("size", f"{size / 1e6:.1f} MB")
    Console().print(table)
    print(f"{report['to']} written to {target}; details are in export.json")
    if report.get("note"):
        print(report["note"])


@contextmanager
def progress_line() -> Iterator[Callable[[str], None]]:
    """Show the current activity and the time elapsed on standard error; yields a function that changes the text."""
    columns = TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=None)
        yield lambda text: progress.update(task, description=text)


def show_comparison(comparison: Comparison) -> None:
    """Print the tables of a study on standard output, and which cells are not finished on standard error.

    Args:
        comparison: the outcome of `scalora.studies.compare.compare`.
    """
    from scalora.studies.table_markdown import markdown

    total = comparison.total
    if comparison.result is None:
        _print_error(
            f"stopped; what is finished is kept ({comparison.finished} of {total} runs), and the same command "
            "continues from there"
        )
        return
    print(markdown(comparison.result))
    for cell, error in comparison.failed:
        print(f"failed: {cell}: {error} ({cell.folder / 'log.txt'})", file=sys.stderr)
    if comparison.failed:
        _print_error(f"{len(comparison.failed)} of {total} runs failed; the same command tries them again")


def show_reproduced(reproduced: Reproduced) -> None:
    """Print the table of a recipe on standard output, and what is not finished on standard error.

    Args:
        reproduced: the outcome of `scalora.studies.reproduce.reproduce`.
    """
    from scalora.studies.reproduction_table import reproduction_markdown

    if reproduced.result is None:
        _print_error("stopped; what is finished is kept, and the same command continues from there")
        return
    print(reproduction_markdown(reproduced.result))
    for cell, error in reproduced.failed:
        print(f"failed: {cell}: {error} ({cell.folder / 'log.txt'})", file=sys.stderr)
    for task, error in reproduced.broken:
        print(f"left out: {task}: {error}", file=sys.stderr)
    if reproduced.failed or reproduced.broken:
        runs, tasks = len(reproduced.failed), len(reproduced.broken)
        what = " and ".join([f"{runs} runs"] * bool(runs) + [f"{tasks} tasks"] * bool(tasks))
        _print_error(f"{what} failed; the same command tries them again")


def _print_error(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)


def show_inspected(inspected: dict[str, Any], title: str) -> None:
    """Print the layers of a run, the quality of its next step, and its scaling factors over time.

    Args:
        inspected: the result of `scalora.runs.inspect.inspect_run`.
        title: name of the run.
    """
    rows = inspected["layers"]
    console = Console()
    update = Table(title=f"Updates of {title}, step {inspected['step']}", caption=_CAPTION, **_LOOK)
    _fill(update, rows, _UPDATE_COLUMNS)
    console.print(update)
    if judged := [row["residual"] | {"name": row["name"]} for row in rows if row["residual"]]:
        step = Table(title="Residual of the next step, relative to the gradient, by the scaling of A and B", **_LOOK)
        _fill(step, judged, {kind: (kind, ".2f") for kind in judged[0] if kind != "name"})
        console.print(step)
    if factors := inspected["factors"]:
        times = [f"{when}: step {logged['step']}" for when, logged in factors.items()]
        over_time = Table("rescale", *times, **_LOOK)
        for name in (name for name in factors["first"] if name != "step"):
            over_time.add_row(name, *(f"{logged[name]:.3g}" for logged in factors.values()))
        console.print(over_time)


def _fill(table: Table, rows: list[dict[str, Any]], columns: dict[str, tuple[str, str]]) -> None:
    """Add a row per layer, then one per kind of layer: the part of the name after the last number."""
    for column in ("layer", *columns):
        table.add_column(column, overflow="fold")
    kinds: dict[str, list[dict[str, Any]]] = {}
    for short, row in zip(short_names([row["name"] for row in rows]), rows, strict=True):
        table.add_row(short, *(_figure(row[key], form) for key, form in columns.values()))
        kinds.setdefault(re.sub(r"^(\d+\.)+", "", short), []).append(row)
    table.add_section()
    for kind, members in {**kinds, "all": rows}.items():
        spreads = (_spread([row[key] for row in members], form) for key, form in columns.values())
        table.add_row(f"{kind} ({len(members)})", *spreads, style="bold")


def short_names(names: list[str]) -> list[str]:
    """The number of a layer's block and what the layer is called in it; more of the name where others have the same.

    Args:
        names: the names of all layers that are shown.
    """
    from_number = [re.sub(r"^\D*(?=\d+\.)", "", name) for name in names]
    shortest = [re.sub(r"(?<=\d\.)\D*\.(?=[^.]+$)", "", name) for name in from_number]
    return shortest if len(set(shortest)) == len(names) else from_number


def _spread(values: list[Any], form: str) -> str:
    """Median and range of some values; empty for shapes."""
    if isinstance(values[0], list):
        return ""
    low, middle, high = (_figure(value, form) for value in (min(values), statistics.median(values), max(values)))
    return middle if low == high else f"{middle}\n{low}–{high}"


def _figure(value: Any, form: str) -> str:
    return "×".join(map(str, value)) if isinstance(value, list) else f"{value:{form}}"
