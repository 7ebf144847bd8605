"""Prints what commands found, as tables."""

from __future__ import annotations

import re
import statistics
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

# Heading, and which figure is shown in what format.
_UPDATE_COLUMNS = {
    "shape": ("shape", ""),
    "rank": ("numerical_rank", "g"),
    "effective": ("effective_rank", ".1f"),
    "norm": ("norm", ".2g"),
    "relative": ("relative_norm", ".2g"),
    "adapter": ("adapter_rank", "g"),
}
_CAPTION = (
    "rank: singular values above a thousandth of the largest. relative: norm to the base weight's. adapter: columns "
    "that an ordinary adapter needs to leave out at most a thousandth. Of each kind: median, least–most."
)

_LOOK: dict[str, Any] = {"box": SIMPLE_HEAD, "pad_edge": False}


def show_scores(scores: dict[str, Any]) -> None:
    """Print the scores as a table."""
    table = Table("score", "value")
    for key, value in scores.items():
        table.add_row(key, f"{value:.4f}" if isinstance(value, float) else str(value))
    Console().print(table)


def show_export(report: dict[str, Any], target: Path) -> None:
    """Print what an export was compared with, and where it is."""
    if report["to"] == "delta":
        print(f"delta written to {target}; scalora.load_model(base, {str(target)!r}) continues from it")
        return
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


def show_inspected(inspected: dict[str, Any], title: str) -> None:
    """Print a line for each layer, a summary of each kind of layer, and the factors over time."""
    rows = inspected["layers"]
    console = Console()
    update = Table(title=f"Updates of {title}, step {inspected['step']}", caption=_CAPTION, **_LOOK)
    _fill(update, rows, _UPDATE_COLUMNS)
    console.print(update)
    if judged := [row["residual"] | {"name": row["name"]} for row in rows if row["residual"]]:
        step = Table(title="Share of the gradient that the next step leaves, by how A and B are scaled", **_LOOK)
        _fill(step, judged, {kind: (kind, ".2f") for kind in judged[0] if kind != "name"})
        console.print(step)
    if factors := inspected["factors"]:
        times = [f"{when}: step {logged['step']}" for when, logged in factors.items()]
        over_time = Table("rescale", *times, **_LOOK)
        for name in (name for name in factors["first"] if name != "step"):
            over_time.add_row(name, *(f"{logged[name]:.3g}" for logged in factors.values()))
        console.print(over_time)


def _fill(table: Table, rows: list[dict[str, Any]], columns: dict[str, tuple[str, str]]) -> None:
    """A line for each layer, then one for each kind of layer, which is what follows the last number in their names."""
    for column in ("layer", *columns):
        table.add_column(column, overflow="fold")
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        short = re.sub(r"^\D*(?=\d+\.)", "", row["name"])
        table.add_row(short, *(_figure(row[key], form) for key, form in columns.values()))
        kinds.setdefault(re.split(r"\.\d+\.", row["name"])[-1], []).append(row)
    table.add_section()
    for kind, members in {**kinds, "all": rows}.items():
        spreads = (_spread([row[key] for row in members], form) for key, form in columns.values())
        table.add_row(f"{kind} ({len(members)})", *spreads, style="bold")


def _spread(values: list[Any], form: str) -> str:
    """Median, least and most; of shapes nothing."""
    if isinstance(values[0], list):
        return ""
    low, middle, high = (_figure(value, form) for value in (min(values), statistics.median(values), max(values)))
    return middle if low == high else f"{middle}\n{low}–{high}"


def _figure(value: Any, form: str) -> str:
    return "×".join(map(str, value)) if isinstance(value, list) else f"{value:{form}}"
