"""The numbers behind each figure of a report: means and standard errors over seeds, spreads over layers.

Everything is a pandas DataFrame, so that a notebook can make the same figures from data of its own. A summary that has
no data to be made of raises `NoData`, whose message says why and which command would give it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd  # type: ignore[import-untyped]

Rank = Literal["numerical_rank", "effective_rank"]
LayerValue = Literal["numerical_rank", "effective_rank", "norm"]

RESIDUALS = ("none", "scalar", "column", "chosen", "oracle")
"""What `scalora inspect` measures: the adapter as it is, each scaling, the one chosen, and the best there can be."""

FACTORS = ("alpha", "beta")
QUANTILES = ("p10", "p50", "p90")

# A running mean over a tenth of the logged losses: long enough to tell curves apart, short enough to keep a bend.
_SMOOTHING = 10


class NoData(ValueError):
    """There is nothing to draw; the message is a sentence that says why, and what would change it."""


@dataclass(frozen=True)
class StudyData:
    """A study as its figures read it.

    Attributes:
        cells: one row a run: method, learning_rate, seed, and the run's summary (eval_loss, seconds_per_step,
            peak_memory_bytes, …).
        curves: one row a logged number: method, learning_rate, seed, step, seconds, name, value.
        updates: one row a layer and time: method, learning_rate, seed, step, layer, numerical_rank, effective_rank,
            norm, of the total update; empty where none was tracked.
        best: the learning rate of each method that its results are reported at, in the order of the legends.
        seeds: those that results are reported on.
        metric: the final metric's name, a column of `cells`.
        greater_is_better: whether a larger metric is better.
        baseline: the method that others are compared with, or None.
    """

    cells: pd.DataFrame
    curves: pd.DataFrame
    updates: pd.DataFrame
    best: dict[str, float]
    seeds: list[int]
    metric: str
    greater_is_better: bool
    baseline: str | None = None


@dataclass(frozen=True)
class RunData:
    """One run as its figures read it.

    Attributes:
        metrics: one row a line of ``metrics.jsonl``: step, and whatever that line logged.
        updates: one row a layer and time, as in `StudyData` without method, learning rate and seed.
        layers: one row a layer of ``inspect.json``: name, numerical_rank, effective_rank, norm, residual (a dict of
            `RESIDUALS`, or None).
    """

    metrics: pd.DataFrame
    updates: pd.DataFrame
    layers: pd.DataFrame


def mean_curve(study: StudyData, name: str, *, smooth: bool = False) -> pd.DataFrame:
    """A logged number over a run, for each method at its best learning rate, over the seeds that are reported.

    Returns:
        One row a method and step: method, step, seconds (mean), mean, standard_error (NaN with one seed), seeds.

    Raises:
        NoData: no run logged it.
    """
    rows = _reported(study, study.curves)
    rows = rows[(rows["name"] == name) & rows["value"].notna()] if len(rows) else rows
    if rows.empty:
        raise NoData(_NOT_LOGGED.get(name, f"No run logged {name!r}."))
    if smooth:
        rows = rows.sort_values("step")
        rows = rows.assign(value=rows.groupby(["method", "seed"])["value"].transform(_running_mean))
    means = rows.groupby(["method", "step"]).agg(
        seconds=("seconds", "mean"), mean=("value", "mean"), standard_error=("value", "sem"), seeds=("seed", "nunique")
    )
    return _in_order(study, means.reset_index())


def loss_by_rate(study: StudyData) -> pd.DataFrame:
    """The final evaluation loss of each method at each learning rate, over the seeds that all of its rates were run on.

    Returns:
        One row a method and rate: method, learning_rate, mean, standard_error, seeds, best (the rate reported at).

    Raises:
        NoData: no cell has an evaluation loss, or no method was tried at more than one rate.
    """
    cells = study.cells
    if "eval_loss" not in cells or not cells["eval_loss"].notna().any():
        raise NoData(_NOT_LOGGED["eval_loss"])
    cells = cells[cells["eval_loss"].notna() & cells["method"].isin(list(study.best))]
    # The best rate may have been run on more seeds than the others, and the seeds alone would then make a difference.
    rates = cells.groupby("method")["learning_rate"].transform("nunique")
    cells = cells[cells.groupby(["method", "seed"])["learning_rate"].transform("nunique") == rates]
    means = cells.groupby(["method", "learning_rate"]).agg(
        mean=("eval_loss", "mean"), standard_error=("eval_loss", "sem"), seeds=("seed", "nunique")
    )
    means = means.reset_index()
    if not (means["method"].value_counts() > 1).any():
        raise NoData(
            "No method has finished at more than one learning rate: give several `learning_rates` in the study file, "
            "and let `scalora compare` finish."
        )
    means["best"] = means["learning_rate"] == means["method"].map(study.best)
    return _in_order(study, means)


def mean_ranks(study: StudyData) -> pd.DataFrame:
    """The rank of the total update over a run, averaged over the tracked layers and then over seeds.

    The paper's Figure 2(b).

    Returns:
        One row a method and step: method, step, and of numerical_rank and effective_rank the mean under that name and
        its standard error over seeds under ``…_error``.

    Raises:
        NoData: no run tracked its updates.
    """
    if study.updates.empty:
        raise NoData(
            "No run tracked the rank of its update: set `track_updates: 20` in the study's `run` section and run "
            "`scalora compare` again."
        )
    rows = _reported(study, study.updates)
    by_seed = rows.groupby(["method", "step", "seed"])[["numerical_rank", "effective_rank"]].mean().reset_index()
    means = by_seed.groupby(["method", "step"]).agg(
        numerical_rank=("numerical_rank", "mean"),
        numerical_rank_error=("numerical_rank", "sem"),
        effective_rank=("effective_rank", "mean"),
        effective_rank_error=("effective_rank", "sem"),
    )
    return _in_order(study, means.reset_index())


def mean_costs(study: StudyData) -> pd.DataFrame:
    """What each method costs at its best learning rate.

    Returns:
        One row a method: method, peak_memory_mib, peak_memory_mib_error, milliseconds_per_step,
        milliseconds_per_step_error (standard errors over seeds).

    Raises:
        NoData: the cells have neither number.
    """
    rows = _reported(study, study.cells)
    if rows.empty or not {"peak_memory_bytes", "seconds_per_step"} <= set(rows.dropna(axis="columns", how="all")):
        raise NoData("No finished run says what memory and time it took: run `scalora compare` to the end.")
    rows = rows.assign(
        peak_memory_mib=lambda cells: cells["peak_memory_bytes"] / 2**20,
        milliseconds_per_step=lambda cells: 1000 * cells["seconds_per_step"],
    )
    means = rows.groupby("method").agg(
        peak_memory_mib=("peak_memory_mib", "mean"),
        peak_memory_mib_error=("peak_memory_mib", "sem"),
        milliseconds_per_step=("milliseconds_per_step", "mean"),
        milliseconds_per_step_error=("milliseconds_per_step", "sem"),
    )
    return _in_order(study, means.reset_index())


def final_metrics(study: StudyData) -> pd.DataFrame:
    """The study's final metric of each method at its best learning rate, the best method first.

    Returns:
        One row a method: method, mean, standard_error (NaN with one seed), seeds, values (the list over seeds).

    Raises:
        NoData: no cell has the metric.
    """
    cells = _reported(study, study.cells)
    if study.metric not in cells or not cells[study.metric].notna().any():
        raise NoData(
            f"No run logged {study.metric!r}, the study's metric: correct `metric` in the study file, or give the runs "
            "evaluation data that it can be measured on, and run `scalora compare` again."
        )
    means = cells[cells[study.metric].notna()].groupby("method")[study.metric].agg(["mean", "sem", "count", list])
    means = means.rename(columns={"sem": "standard_error", "count": "seeds", "list": "values"})
    return means.sort_values("mean", ascending=not study.greater_is_better, kind="stable").reset_index()


def losses(run: RunData) -> pd.DataFrame:
    """The losses that a run logged.

    Returns:
        One row a step: step, loss (training), smoothed (its running mean), eval_loss; NaN where a step has none.

    Raises:
        NoData: it logged no loss.
    """
    named = [name for name in ("loss", "eval_loss") if name in run.metrics]
    if not named:
        raise NoData("The run logged no loss: set `training.logging_steps` and run `scalora train` again.")
    by_step = run.metrics.groupby("step")[named].first().dropna(how="all").reindex(columns=["loss", "eval_loss"])
    by_step.insert(1, "smoothed", _running_mean(by_step["loss"].dropna()))
    return by_step.reset_index()


def rank_spread(run: RunData) -> pd.DataFrame:
    """The rank of the total update over a run: mean, least and greatest of the tracked layers.

    Returns:
        One row a step: step, and for numerical_rank and effective_rank the columns ``…_mean``, ``…_min``, ``…_max``.

    Raises:
        NoData: the run did not track it.
    """
    if run.updates.empty:
        raise NoData(
            "The run did not track the rank of its update: set `track_updates: 20` and run `scalora train` again."
        )
    spread = run.updates.groupby("step")[["numerical_rank", "effective_rank"]].agg(["mean", "min", "max"])
    spread.columns = ["_".join(column) for column in spread.columns]
    return spread.reset_index()


def layer_shares(run: RunData) -> pd.DataFrame:
    """What share of the layers was scaled how, at each logged step: step, column, scalar, left_alone; they add up to 1.

    Raises:
        NoData: the run is of another method than ScaLoRA.
    """
    shares = _logged(run, {f"scalora/{kind}_share": kind for kind in ("column", "scalar", "left_alone")})
    return shares.reset_index()


def factor_quantiles(run: RunData) -> pd.DataFrame:
    """Quantiles of the scaling factors at each logged step: step, and ``alpha_p10`` … ``beta_p90``.

    Raises:
        NoData: the run is of another method than ScaLoRA, or rescaled nothing.
    """
    names = [f"{factor}_{quantile}" for factor in FACTORS for quantile in QUANTILES]
    return _logged(run, {f"scalora/{name}": name for name in names}).reset_index()


def layer_map(run: RunData) -> pd.DataFrame:
    """Every inspected layer with its place: name, index (of its block; -1 outside of any), kind, ranks and norm.

    Raises:
        NoData: the run has not been inspected.
    """
    if run.layers.empty:
        raise NoData("The run folder holds no inspect.json: `scalora inspect RUN` makes it.")
    places = [_place(name) for name in run.layers["name"]]
    ranks = run.layers[["name", "numerical_rank", "effective_rank", "norm"]]
    return ranks.assign(index=[index for index, _ in places], kind=[kind for _, kind in places])


def layer_residuals(run: RunData) -> pd.DataFrame:
    """What share of each layer's gradient each scaling leaves uncaptured: name and the columns `RESIDUALS`.

    Raises:
        NoData: the run has not been inspected, or without gradients.
    """
    if run.layers.empty:
        raise NoData("The run folder holds no inspect.json: `scalora inspect RUN` makes it.")
    known = run.layers[
        [isinstance(residual, dict) for residual in run.layers.get("residual", [None] * len(run.layers))]
    ]
    if known.empty:
        raise NoData(
            "inspect.json holds no residuals: only runs that train A and B have them, and with `--batches` above 0. "
            "`scalora inspect RUN` makes it again."
        )
    rows = [{"name": name} | residual for name, residual in zip(known["name"], known["residual"], strict=True)]
    return pd.DataFrame(rows, columns=["name", *RESIDUALS]).astype(dict.fromkeys(RESIDUALS, float))


_NOT_LOGGED = {
    "eval_loss": "No run logged an evaluation loss: give the study's `run` section `data.eval` and "
    "`training.eval_strategy`, and run `scalora compare` again.",
    "loss": "No run logged a training loss: set `training.logging_steps` in the study's `run` section and run "
    "`scalora compare` again.",
    "scalora/column_share": "No finished run rescaled columns: that needs `scalora` among the study's `methods`, and "
    "`scalora compare` to finish.",
}


def _reported(study: StudyData, rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of each method's best learning rate and of the seeds that are reported."""
    if rows.empty:
        return rows
    return rows[(rows["learning_rate"] == rows["method"].map(study.best)) & rows["seed"].isin(study.seeds)]


def _in_order(study: StudyData, rows: pd.DataFrame) -> pd.DataFrame:
    """Methods in the study's order, everything else as it was."""
    order = {method: place for place, method in enumerate(study.best)}
    return rows.sort_values("method", key=lambda methods: methods.map(order), kind="stable").reset_index(drop=True)


def _running_mean(values: pd.Series) -> pd.Series:
    return values.rolling(max(1, len(values) // _SMOOTHING), min_periods=1, center=True).mean()


def _logged(run: RunData, names: dict[str, str]) -> pd.DataFrame:
    """Columns of the metrics under new names, by step, where a step has them."""
    if not set(names) <= set(run.metrics.columns):
        raise NoData("The run logged no scaling factors: only `method: scalora` of `scalora train` has them.")
    return run.metrics.groupby("step")[list(names)].first().dropna().rename(columns=names)


def _place(name: str) -> tuple[int, str]:
    """A layer's block and what it is in it: ``model.layers.3.mlp.up_proj`` is block 3's ``mlp.up_proj``."""
    found = re.search(r"(?:^|\.)(\d+)\.(.+)$", name)
    return (int(found[1]), found[2]) if found else (-1, name)


def short_names(names: Any) -> list[str]:
    """Dotted names without the parts that all of them begin with."""
    parts = [str(name).split(".") for name in names]
    shared = 0
    while all(len(part) > shared + 1 for part in parts) and len({part[shared] for part in parts}) == 1:
        shared += 1
    return [".".join(part[shared:]) for part in parts]
