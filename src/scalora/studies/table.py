"""The table of a study: scores, significance, convergence speed and cost of each method at its best learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
from numpy.typing import NDArray

from scalora.studies.cells import read_cells
from scalora.studies.over_seeds import gap_closed, mean_and_error, paired_difference
from scalora.studies.shares import share_table
from scalora.studies.study import Study, study_of


@dataclass(frozen=True)
class StudyResult:
    """The results of a study, as far as its cells are finished.

    Attributes:
        folder: the study folder.
        study: the study's settings.
        cells: one row per cell, with the columns described in `scalora.studies.cells.StudyCells`.
        curves: one row per logged value, with the columns described there.
        updates: one row per tracked spectrum of a layer's weight update, as in ``updates.jsonl``.
        table: one row per method, with the columns described in `comparison_table`.
        shares: one row per method and share of the steps, with the columns described in
            `scalora.studies.shares.share_table`.
        sensitivity: one row per method and learning rate: mean final ``eval_loss`` and ``metric`` over the finished
            tuning seeds, the numbers of ``finished`` and of all tuning ``seeds``, and whether it is the ``best`` rate.
    """

    folder: Path
    study: Study
    cells: pd.DataFrame
    curves: pd.DataFrame
    updates: pd.DataFrame
    table: pd.DataFrame
    shares: pd.DataFrame
    sensitivity: pd.DataFrame


def load_study(folder: Path, study: Study | None = None) -> StudyResult:
    """Read the results in a study folder, finished or not, without running anything.

    Args:
        folder: the study folder.
        study: the settings of the study, which say what is compared how. None: those in the folder.

    Raises:
        InputError: the folder holds no valid study file.
    """
    study = study_of(folder) if study is None else study
    read = read_cells(study)
    table = comparison_table(study, read.cells, read.curves, read.best)
    return StudyResult(
        folder=folder,
        study=study,
        cells=read.cells,
        curves=read.curves,
        updates=read.updates,
        table=table,
        shares=share_table(study, read.cells),
        sensitivity=_sensitivity(study, read.cells, read.best),
    )


def comparison_table(study: Study, cells: pd.DataFrame, curves: pd.DataFrame, best: dict[str, float]) -> pd.DataFrame:
    """Compare the methods, each at its best learning rate, over the finished cells of the reported seeds.

    Args:
        study: the study's settings.
        cells: one row per cell, as in `scalora.studies.cells.StudyCells`.
        curves: one row per logged value, as in `scalora.studies.cells.StudyCells`.
        best: best learning rate by method.

    Returns:
        One row per method, with these columns. A column ``x_mean`` is a mean over seeds and ``x_se`` its standard
        error, defined for two or more seeds. Undefined values are NaN.

        - ``method``, ``learning_rate``; ``at_edge``: whether the rate is the smallest or largest of the method's grid;
          ``seeds``: number of finished seeds; ``unfinished``: number of failed or missing seeds.
        - ``metric_…``, ``eval_loss_…``: final scores; ``best_metric_…``: the best of each run's evaluations;
          ``train_loss_…``: mean over the last quarter of the logged losses.
        - ``metric_difference``, ``eval_loss_difference``: mean difference from the baseline at the same seeds, with
          standard error ``…_difference_se`` and p value ``…_p`` of the two-sided paired t test, not corrected for the
          number of methods.
        - ``metric_gap_closed``, ``eval_loss_gap_closed``: (method − baseline) / (ceiling − baseline), defined where the
          ceiling is better than the baseline.
        - ``steps_to_baseline``, ``seconds_to_baseline``: steps and training seconds until the mean evaluation loss
          reaches the minimum of the baseline's mean curve, interpolated linearly between evaluations; ``…_share``: the
          same divided by the baseline's own.
        - ``seconds_per_step``, ``trainable_parameters``, ``numerical_rank``, ``effective_rank``: means over seeds;
          ``peak_memory_bytes``: maximum over seeds.
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
    runs = final[method]
    rates = study.rates(method)
    row: dict[str, Any] = {
        "method": method,
        "learning_rate": math.nan if learning_rate is None else learning_rate,
        "at_edge": learning_rate in (rates[0], rates[-1]),
        "seeds": len(runs),
        "unfinished": len(study.seeds) - len(runs),
    }
    for name in ("metric", "best_metric", "eval_loss", "train_loss"):
        column = study.metric if name == "metric" else name
        row[f"{name}_mean"], row[f"{name}_se"] = mean_and_error(runs[column])
    row |= _against_baseline(study, method, final)
    row |= _to_baseline(losses[method], losses[study.baseline])
    for name in ("seconds_per_step", "trainable_parameters", "numerical_rank", "effective_rank"):
        row[name] = runs[name].mean()
    return row | {"peak_memory_bytes": runs["peak_memory_bytes"].max()}


def _against_baseline(study: Study, method: str, final: dict[str, pd.DataFrame]) -> dict[str, float]:
    """Differences from the baseline and shares of the gap closed, for the metric and for the evaluation loss."""
    runs, baseline = final[method], final[study.baseline]
    ceiling = final.get(study.ceiling) if study.ceiling is not None else None
    differences: dict[str, float] = {}
    shares: dict[str, float] = {}
    for name, column, larger in (
        ("metric", study.metric, study.larger_is_better()),
        ("eval_loss", "eval_loss", False),
    ):
        difference, error, p = (
            (math.nan,) * 3 if method == study.baseline else paired_difference(runs[column], baseline[column])
        )
        differences |= {f"{name}_difference": difference, f"{name}_difference_se": error, f"{name}_p": p}
        shares[f"{name}_gap_closed"] = (
            math.nan if ceiling is None else gap_closed(runs[column], baseline[column], ceiling[column], larger=larger)
        )
    return differences | shares


def _loss_curves(curves: pd.DataFrame, method: str, learning_rate: float | None, seeds: list[int]) -> pd.DataFrame:
    """Evaluation losses and training times, indexed by step, with columns (``value`` or ``seconds``, seed)."""
    chosen = curves[
        (curves["method"] == method)
        & (curves["learning_rate"] == learning_rate)
        & (curves["share"] == 1)
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
    """Step and training time at which a loss curve first reaches a target, interpolated between evaluations.

    Args:
        target: the loss to reach.
        steps: steps of the evaluations, (evaluations,), ascending.
        seconds: training seconds up to each evaluation, (evaluations,).
        losses: evaluation losses, (evaluations,); NaN or inf where there is none.

    Returns:
        Step and seconds; those of the first evaluation if the target is reached there already, and NaN if it is never
        reached.
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
