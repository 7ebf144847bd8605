"""Reads the run folders of a study into three frames: one row a cell, one row a logged number, one row a spectrum."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd  # type: ignore[import-untyped]

from scalora.runs.run_folder import json_lines
from scalora.studies.study import Cell, Study

Status = Literal["finished", "failed", "missing"]

_CELL = ["method", "learning_rate", "seed"]
_COSTS = ["steps", "training_seconds", "seconds_per_step", "peak_memory_bytes", "trainable_parameters"]
_RANKS = ["numerical_rank", "effective_rank"]
CELL_COLUMNS = [
    *_CELL,
    "tuning",
    "reported",
    "status",
    "error",
    "folder",
    *_COSTS,
    "train_loss",
    "best_metric",
    *_RANKS,
]
CURVE_COLUMNS = [*_CELL, "step", "seconds", "name", "value"]
UPDATE_COLUMNS = [*_CELL, "step", "layer", *_RANKS, "norm", "singular_values"]


@dataclass(frozen=True)
class StudyCells:
    """What the cells of a study hold so far.

    Attributes:
        cells: a row for each cell that the study asks for. ``method``, ``learning_rate``, ``seed``; ``tuning`` and
            ``reported`` say what it is for; ``status`` is finished, failed or missing, ``error`` the last line of a
            failed one's log; then the figures: every ``eval_…`` of the end (a diverged loss is inf), ``train_loss``
            (mean of the last quarter of the logged ones), ``best_metric`` (of its evaluations), costs, and the update's
            ``numerical_rank`` and ``effective_rank`` at the end, mean over layers. NaN where there is no figure.
        curves: of finished cells, a row for each logged number, long: ``step``, ``seconds``, ``name``, ``value``.
        updates: of finished cells, a row for each spectrum of a layer's total update: the lines of ``updates.jsonl``.
        best: the learning rate chosen for each method; a method is absent while none of its rates is tried out.
    """

    cells: pd.DataFrame
    curves: pd.DataFrame
    updates: pd.DataFrame
    best: dict[str, float]


def read_cells(study: Study) -> StudyCells:
    """Read what is there; nothing is run."""
    tuning = {cell.folder: cell for cell in study.tuning_cells()}
    rows = {folder: _row(cell, study) for folder, cell in tuning.items()}
    best = _best_learning_rates(study, _frame(list(rows.values()), study))
    reported = {cell.folder: cell for cell in study.reported_cells(best)}
    cells = tuning | reported
    rows |= {folder: _row(cell, study) for folder, cell in reported.items() if folder not in rows}
    frame = _frame([rows[f] | {"tuning": f in tuning, "reported": f in reported} for f in cells], study)
    finished = [cell for folder, cell in cells.items() if rows[folder]["status"] == "finished"]
    curves = [{**_names(cell), **point} for cell in finished for point in _curve(cell)]
    updates = [{**_names(cell), **line} for cell in finished for line in json_lines(cell.folder / "updates.jsonl")]
    return StudyCells(
        cells=frame,
        curves=pd.DataFrame(curves, columns=CURVE_COLUMNS),
        updates=pd.DataFrame(updates, columns=UPDATE_COLUMNS),
        best=best,
    )


def summary_of(cell: Cell) -> dict[str, Any] | None:
    """What a finished cell ended with; None of one that is not finished. Training writes it last, whole."""
    path = cell.folder / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def last_words(cell: Cell) -> str:
    """The error in a failed cell's log, or else its last line."""
    text = (cell.folder / "log.txt").read_text(encoding="utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["its log is empty"])[-1]


def _best_learning_rates(study: Study, cells: pd.DataFrame) -> dict[str, float]:
    """By mean evaluation loss at the end, of the rates of which every cell is finished; the lower of two equal ones."""
    best = {}
    for method in study.methods:
        tried = cells[cells["method"] == method].groupby("learning_rate").filter(_all_finished)
        if len(tried):
            best[method] = float(tried.groupby("learning_rate")["eval_loss"].mean().idxmin())
    return best


def _all_finished(cells: pd.DataFrame) -> bool:
    return bool((cells["status"] == "finished").all())


def _frame(rows: list[dict[str, Any]], study: Study) -> pd.DataFrame:
    frame = pd.DataFrame(rows)
    scores = sorted({name for name in frame if str(name).startswith("eval_")} | {"eval_loss", study.metric})
    frame = frame.reindex(columns=[*CELL_COLUMNS, *scores])
    figures = [*_COSTS, "train_loss", "best_metric", *_RANKS, *scores]
    return frame.astype(dict.fromkeys(figures, "float64"))


def _row(cell: Cell, study: Study) -> dict[str, Any]:
    row: dict[str, Any] = {**_names(cell), "folder": str(cell.folder.relative_to(study.folder))}
    summary = summary_of(cell)
    if summary is None:
        failed = (cell.folder / "log.txt").is_file()
        return row | {"status": "failed" if failed else "missing", "error": last_words(cell) if failed else None}
    row |= {"status": "finished", "error": None}
    row |= {name: summary[name] for name in _COSTS if name in summary}
    row |= {name: value for name, value in summary.items() if name.startswith("eval_") and _is_number(value)}
    # JSON's NaN and Infinity alike: a run that has diverged is worse than any that has not.
    loss = row.get("eval_loss", math.nan)
    row["eval_loss"] = loss if math.isfinite(loss) else math.inf
    if study.metric in row and not math.isfinite(row[study.metric]):
        row[study.metric] = -math.inf if study.larger_is_better() else math.inf
    logs = json_lines(cell.folder / "metrics.jsonl")
    losses = [log["loss"] for log in logs if "loss" in log]
    if losses:
        last = losses[-max(1, len(losses) // 4) :]
        row["train_loss"] = sum(last) / len(last)
    scores = [log[study.metric] for log in logs if math.isfinite(log.get(study.metric, math.nan))]
    if scores:
        row["best_metric"] = max(scores) if study.larger_is_better() else min(scores)
    updates = json_lines(cell.folder / "updates.jsonl")
    last_step = [line for line in updates if line["step"] == updates[-1]["step"]]
    if last_step:
        row |= {name: sum(line[name] for line in last_step) / len(last_step) for name in _RANKS}
    return row


def _curve(cell: Cell) -> list[dict[str, Any]]:
    """Each number that was logged; of two at one step the later (training ends with an evaluation of its own)."""
    points = {}
    for log in json_lines(cell.folder / "metrics.jsonl"):
        at = {"step": log["step"], "seconds": log.get("seconds", math.nan)}
        for name in log.keys() - at.keys():
            if _is_number(log[name]):
                points[log["step"], name] = {**at, "name": name, "value": float(log[name])}
    return list(points.values())


def _names(cell: Cell) -> dict[str, Any]:
    return {"method": cell.method, "learning_rate": cell.learning_rate, "seed": cell.seed}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
