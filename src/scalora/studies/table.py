"""The table of a study: each method at its best learning rate, what it reaches, how soon, at what cost, how surely."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
from numpy.typing import NDArray
from scipy.stats import ttest_rel

from scalora.studies.cells import read_cells
from scalora.studies.study import Study, study_of


@dataclass(frozen=True)
class StudyResult:
    """A study as far as its cells are finished.

    Attributes:
        folder: the study folder.
        study: its settings.
        cells: a row for each cell; see `scalora.studies.cells.StudyCells`.
        curves: a row for each logged number.
        updates: a row for each spectrum of a layer's total update.
        table: a row for each method; see `comparison_table`.
        sensitivity: a row for each method and learning rate: the mean ``eval_loss`` and ``metric`` over the seeds that
            choose the rate, ``best`` and how many of the ``seeds`` are ``finished``.
    """

    folder: Path
    study: Study
    cells: pd.DataFrame
    curves: pd.DataFrame
    updates: pd.DataFrame
    table: pd.DataFrame
    sensitivity: pd.DataFrame


def load_study(folder: Path) -> StudyResult:
    """Read a study folder, finished or not; nothing is run.

    Raises:
        InputError: it is not the folder of a study.
    """
    study = study_of(folder)
    read = read_cells(study)
    table = comparison_table(study, read.cells, read.curves, read.best)
    sensitivity = _sensitivity(study, read.cells, read.best)
    return StudyResult(folder, study, read.cells, read.curves, read.updates, table, sensitivity)


def comparison_table(study: Study, cells: pd.DataFrame, curves: pd.DataFrame, best: dict[str, float]) -> pd.DataFrame:
    """One row a method, at its best learning rate, over the finished cells of the seeds that are reported.

    Columns, all NaN where there is no figure (``_mean`` over seeds, ``_se`` its standard error, from two seeds on):

    - ``method``, ``learning_rate``, ``at_edge`` (of its grid), ``seeds`` (finished), ``unfinished`` (failed, missing).
    - ``metric_…``, ``best_metric_…`` (of a run's evaluations), ``eval_loss_…``, ``train_loss_…`` (the last quarter).
    - ``metric_difference`` from the baseline at the same seeds, ``metric_difference_se``, ``metric_p`` (paired t test,
      two-sided, no correction for the number of methods); the same for ``eval_loss``.
    - ``metric_gap_closed``, ``eval_loss_gap_closed``: (method − baseline) / (ceiling − baseline), where the ceiling is
      better than the baseline.
    - ``steps_to_baseline``, ``seconds_to_baseline``: to the smallest evaluation loss of the baseline's mean curve;
      ``…_share`` of what the baseline took. Between two evaluations the loss is taken to be linear.
    - ``seconds_per_step``, ``trainable_parameters``, ``numerical_rank``, ``effective_rank`` (means over seeds) and
      ``peak_memory_bytes`` (their maximum).
    """
    reported = cells[(cells["reported"] == True) & (cells["status"] == "finished")]  # noqa: E712 - a column
    final = {method: reported[reported["method"] == method].set_index("seed") for method in study.methods}
    losses = {method: _loss_curves(curves, method, best.get(method), list(final[method].index)) for method in final}
    return pd.DataFrame([_table_row(study, method, best.get(method), final, losses) for method in study.methods])


def _table_row(
    study: Study,
    method: str,
    learning_rate: float | None,
    final: dict[str, pd.DataFrame],
    losses: dict[str, pd.DataFrame],
) -> dict[str, Any]:
    runs, baseline = final[method], final[study.baseline]
    ceiling = final.get(study.ceiling) if study.ceiling is not None else None
    rates = study.rates(method)
    row: dict[str, Any] = {
        "method": method,
        "learning_rate": math.nan if learning_rate is None else learning_rate,
        "at_edge": learning_rate in (rates[0], rates[-1]),
        "seeds": len(runs),
        "unfinished": len(study.seeds) - len(runs),
    }
    scores = {
        "metric": study.metric,
        "best_metric": "best_metric",
        "eval_loss": "eval_loss",
        "train_loss": "train_loss",
    }
    for name, column in scores.items():
        row[f"{name}_mean"], row[f"{name}_se"] = mean_and_error(runs[column])
    for name, column in (("metric", study.metric), ("eval_loss", "eval_loss")):
        difference, error, p = (
            (math.nan,) * 3 if method == study.baseline else paired_difference(runs[column], baseline[column])
        )
        row |= {f"{name}_difference": difference, f"{name}_difference_se": error, f"{name}_p": p}
    for name, column in (("metric", study.metric), ("eval_loss", "eval_loss")):
        larger = study.larger_is_better() if name == "metric" else False
        row[f"{name}_gap_closed"] = (
            math.nan if ceiling is None else gap_closed(runs[column], baseline[column], ceiling[column], larger=larger)
        )
    row |= _to_baseline(losses[method], losses[study.baseline])
    for name in ("seconds_per_step", "trainable_parameters", "numerical_rank", "effective_rank"):
        row[name] = runs[name].mean()
    return row | {"peak_memory_bytes": runs["peak_memory_bytes"].max()}


def mean_and_error(values: Iterable[float]) -> tuple[float, float]:
    """Mean and its standard error; NaN for the error of a single value, or of any that is not finite."""
    array = np.asarray(list(values), dtype=float)
    if not len(array):
        return math.nan, math.nan
    certain = len(array) > 1 and bool(np.isfinite(array).all())
    return float(array.mean()), float(array.std(ddof=1) / math.sqrt(len(array))) if certain else math.nan


def paired_difference(values: pd.Series, baseline: pd.Series) -> tuple[float, float, float]:
    """Mean of the differences at the seeds that both have, its standard error, and p of the paired t test.

    Args:
        values: indexed by seed.
        baseline: the same of the baseline.

    Returns:
        No p (NaN) where all the differences are one and the same, as they may be of an accuracy on few examples: the
        test would take that for certainty.
    """
    both = pd.concat([values, baseline], axis=1, join="inner").to_numpy(dtype=float)
    differences = both[:, 0] - both[:, 1] if np.isfinite(both).all() else np.full(len(both), math.nan)
    mean, error = mean_and_error(differences)
    vary = len(both) > 1 and bool(np.ptp(differences) > 1e-12 * np.abs(both).max())
    return mean, error, float(ttest_rel(both[:, 0], both[:, 1]).pvalue) if vary else math.nan


def gap_closed(values: pd.Series, baseline: pd.Series, ceiling: pd.Series, *, larger: bool) -> float:
    """Share of the way from the baseline's mean to the ceiling's, over the seeds that all three have.

    NaN where the ceiling is no better than the baseline: there is no gap to close.
    """
    method, low, high = pd.concat([values, baseline, ceiling], axis=1, join="inner").mean().to_numpy()
    way, gap = (method - low, high - low) if larger else (low - method, low - high)
    return float(way / gap) if gap > 0 and math.isfinite(way) and math.isfinite(gap) else math.nan


def _loss_curves(curves: pd.DataFrame, method: str, learning_rate: float | None, seeds: list[int]) -> pd.DataFrame:
    """Evaluation losses and training seconds: index step, columns (value or seconds, seed)."""
    chosen = curves[
        (curves["method"] == method)
        & (curves["learning_rate"] == learning_rate)
        & curves["seed"].isin(seeds)
        & (curves["name"] == "eval_loss")
    ]
    return chosen.pivot(index="step", columns="seed", values=["value", "seconds"])


def _to_baseline(losses: pd.DataFrame, baseline: pd.DataFrame) -> dict[str, float]:
    names = ("steps_to_baseline", "seconds_to_baseline")
    row = {name + end: math.nan for name in names for end in ("", "_share")}
    if losses.empty or baseline.empty:
        return row
    seeds = losses["value"].columns.intersection(baseline["value"].columns)
    target, found = math.nan, {}
    for name, curve in (("baseline", baseline), ("method", losses)):
        steps = curve.index.to_numpy(dtype=float)
        mean = curve["value"][seeds].mean(axis=1, skipna=False).to_numpy(dtype=float)
        seconds = curve["seconds"][seeds].mean(axis=1, skipna=False).to_numpy(dtype=float)
        if name == "baseline":
            target = float(np.nanmin(np.append(mean, np.inf)))
        found[name] = time_to_reach(target, steps, seconds, mean)
    for name, own, of_baseline in zip(names, found["method"], found["baseline"], strict=True):
        row |= {name: own, f"{name}_share": own / of_baseline if of_baseline > 0 else math.nan}
    return row


def time_to_reach(
    target: float, steps: NDArray[np.float64], seconds: NDArray[np.float64], losses: NDArray[np.float64]
) -> tuple[float, float]:
    """Step and seconds at which a curve is first at or below a loss; NaN if it never is.

    Args:
        target: the loss.
        steps: (evaluations,) ascending.
        seconds: (evaluations,) of training up to each.
        losses: (evaluations,), taken to be linear between two; NaN and inf where there is none.

    Returns:
        Of a curve that is there at its first evaluation, that evaluation's.
    """
    reached = np.flatnonzero(losses <= target)
    if not math.isfinite(target) or not len(reached):
        return math.nan, math.nan
    now = int(reached[0])
    if now == 0 or not math.isfinite(losses[now - 1]):
        return float(steps[now]), float(seconds[now])
    share = (losses[now - 1] - target) / (losses[now - 1] - losses[now])
    position = now - 1 + share
    indices = np.arange(len(steps))
    return float(np.interp(position, indices, steps)), float(np.interp(position, indices, seconds))


def _sensitivity(study: Study, cells: pd.DataFrame, best: dict[str, float]) -> pd.DataFrame:
    rows = []
    tuning = cells[cells["tuning"] == True]  # noqa: E712 - a column
    for method in study.methods:
        for rate in study.rates(method):
            tried = tuning[(tuning["method"] == method) & (tuning["learning_rate"] == rate)]
            done = tried[tried["status"] == "finished"]
            rows.append(
                {
                    "method": method,
                    "learning_rate": rate,
                    "eval_loss": done["eval_loss"].mean(),
                    "metric": done[study.metric].mean(),
                    "finished": len(done),
                    "seeds": len(tried),
                    "best": best.get(method) == rate,
                }
            )
    return pd.DataFrame(rows)
