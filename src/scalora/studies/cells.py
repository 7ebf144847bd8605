"""Reads the run folders of a study into three data frames: cells, logged values, and spectra of weight updates."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd  # type: ignore[import-untyped]

from scalora.runs.run_folder import DIVERGED_FILE, SUMMARY_FILE, json_lines
from scalora.studies.cell_tests import missing_tests, test_scores
from scalora.studies.study import Cell, Study

Status = Literal["finished", "failed", "missing"]

DIVERGED = "diverged"
"""Key of the summary of a run that diverged."""

_CELL = ["method", "learning_rate", "seed", "share"]
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
    """The results of a study's cells so far.

    Attributes:
        cells: one row per cell that the study needs, finished or not. ``method``, ``learning_rate``, ``seed`` and
            ``share`` identify it; ``share`` is 1 for all but the cells of the study's `step_shares`. ``tuning`` and
            ``reported`` are booleans, whether it is used for choosing a learning rate and in the tables of full runs,
            both false for the cells of a share; ``status`` is ``"finished"``, ``"failed"`` or ``"missing"``, and
            ``error`` is the error in a failed cell's log. The results follow, NaN where there is none: all final
            ``eval_…`` scores (a loss that diverged is inf), ``train_loss`` (mean over the last quarter of the logged
            losses), ``best_metric`` (best of the run's evaluations), costs, and ``numerical_rank`` and
            ``effective_rank`` of the final weight update (mean over the tracked layers).
        curves: one row per value that a finished cell logged: the four that identify the cell, ``step``, ``seconds``
            (training time up to that step), ``name``, ``value``.
        updates: one row per spectrum that a finished cell tracked, as in ``updates.jsonl``: the four that identify the
            cell, ``step``, ``layer``, ranks, Frobenius ``norm``, ``singular_values``.
        best: best learning rate by method; a method is absent until all tuning seeds of one of its rates are finished.
    """

    cells: pd.DataFrame
    curves: pd.DataFrame
    updates: pd.DataFrame
    best: dict[str, float]


def read_cells(study: Study) -> StudyCells:
    """Read the results of a study without running anything.

    Args:
        study: the study, whose `folder` is read.
    """
    tuning = {cell.folder: cell for cell in study.tuning_cells()}
    rows = {folder: _row(cell, study) for folder, cell in tuning.items()}
    best = _best_learning_rates(study, _frame(list(rows.values()), study))
    reported = {cell.folder: cell for cell in study.reported_cells(best)}
    cells = tuning | reported | {cell.folder: cell for cell in study.share_cells(best)}
    rows |= {folder: _row(cell, study) for folder, cell in cells.items() if folder not in rows}
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
    """The summary of a finished cell; None if the cell is not finished.

    Training writes the summary last and atomically, so a cell is finished if and only if the file exists, and all of
    its tests are done, whose scores are added. One that diverged is finished too, because it would diverge again: its
    summary has the key ``"diverged"`` and no scores.

    Args:
        cell: a cell of a study.
    """
    for path, more in ((cell.folder / SUMMARY_FILE, {}), (cell.folder / DIVERGED_FILE, {DIVERGED: True})):
        if path.is_file():
            summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if more:
                return summary | more
            return None if missing_tests(cell) else summary | test_scores(cell)
    return None


def last_words(cell: Cell) -> str:
    """The error line in the log of a failed cell, or the last line of the log if there is none.

    Args:
        cell: a cell whose folder holds a ``log.txt``.
    """
    text = (cell.folder / "log.txt").read_text(encoding="utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["its log is empty"])[-1]


def _best_learning_rates(study: Study, cells: pd.DataFrame) -> dict[str, float]:
    """The rate with the best mean final score, by the study's `chosen_by`, among those whose cells are all finished.

    Of two rates with equal scores it is the lower one.
    """
    by_metric = study.chosen_by == "metric"
    column = study.metric if by_metric else "eval_loss"
    larger = by_metric and study.larger_is_better()
    best = {}
    for method in study.methods:
        tried = cells[cells["method"] == method].groupby("learning_rate").filter(_all_finished)
        if len(tried):
            means = tried.groupby("learning_rate")[column].mean()
            best[method] = float(means.idxmax() if larger else means.idxmin())
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
    row |= _final_scores(summary, study)
    row |= _scores_over_training(json_lines(cell.folder / "metrics.jsonl"), study)
    return row | _final_ranks(json_lines(cell.folder / "updates.jsonl"))


def _final_scores(summary: dict[str, Any], study: Study) -> dict[str, float]:
    """Every ``eval_…`` number; a loss or metric that is not finite becomes the worst possible value.

    A run that diverged is then worse than any that did not, whether it has no scores, or JSON holds null, NaN or
    Infinity.
    """
    summary = {name: math.nan if value is None else value for name, value in summary.items()}
    if DIVERGED in summary:
        summary |= {"eval_loss": math.nan, study.metric: math.nan}
    scores = {name: value for name, value in summary.items() if name.startswith("eval_") and _is_number(value)}
    loss = scores.get("eval_loss", math.nan)
    scores["eval_loss"] = loss if math.isfinite(loss) else math.inf
    if study.metric in scores and not math.isfinite(scores[study.metric]):
        scores[study.metric] = -math.inf if study.larger_is_better() else math.inf
    return scores


def _scores_over_training(logs: list[dict[str, Any]], study: Study) -> dict[str, float]:
    found = {}
    losses = [math.nan if log["loss"] is None else log["loss"] for log in logs if "loss" in log]
    if losses:
        last = losses[-max(1, len(losses) // 4) :]
        found["train_loss"] = sum(last) / len(last)
    scores = [
        log[study.metric] for log in logs if _is_number(log.get(study.metric)) and math.isfinite(log[study.metric])
    ]
    if scores:
        found["best_metric"] = max(scores) if study.larger_is_better() else min(scores)
    return found


def _final_ranks(updates: list[dict[str, Any]]) -> dict[str, float]:
    last_step = [line for line in updates if line["step"] == updates[-1]["step"]]
    return {name: sum(line[name] for line in last_step) / len(last_step) for name in _RANKS} if last_step else {}


def _curve(cell: Cell) -> list[dict[str, Any]]:
    """Every logged number. Training ends with an extra evaluation: of two values at one step, the later one counts."""
    points = {}
    for log in json_lines(cell.folder / "metrics.jsonl"):
        at = {"step": log["step"], "seconds": log.get("seconds", math.nan)}
        for name in log.keys() - at.keys():
            if _is_number(log[name]):
                points[log["step"], name] = {**at, "name": name, "value": float(log[name])}
    return list(points.values())


def _names(cell: Cell) -> dict[str, Any]:
    return {"method": cell.method, "learning_rate": cell.learning_rate, "seed": cell.seed, "share": cell.share}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
