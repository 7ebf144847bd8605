"""The numbers behind each figure of a report: means and standard errors over seeds, spreads over layers.

Everything is a pandas DataFrame, so that a notebook can make the same figures from its own data. A summary without data
raises `NoData`, whose message says why and which command adds the data.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd  # type: ignore[import-untyped]

Rank = Literal["numerical_rank", "effective_rank"]
LayerValue = Literal["numerical_rank", "effective_rank", "norm"]

RESIDUALS = ("none", "scalar", "column", "polar", "matrix", "chosen", "oracle")
"""The residuals of `scalora inspect`: without scaling, with each kind of scaling, with the chosen one, and the optimum
(oracle)."""

FACTORS = ("alpha", "beta")
QUANTILES = ("p10", "p50", "p90")

# A running mean over a tenth of the logged losses: long enough to tell curves apart, short enough to keep a bend.
_SMOOTHING = 10


class NoData(ValueError):
    """There is nothing to draw; the message is a sentence that says why and which command adds the data."""


@dataclass(frozen=True)
class StudyData:
    """The data behind a study's figures.

    Attributes:
        cells: one row per run: method, learning_rate, seed, and the run's summary (eval_loss, seconds_per_step,
            peak_memory_bytes, …).
        curves: one row per logged value: method, learning_rate, seed, step, seconds (of training), name, value.
        updates: one row per measured layer and step: method, learning_rate, seed, step, layer, and numerical_rank,
            effective_rank and norm (Frobenius) of its total update; empty if none was measured.
        best: the reported learning rate of each method, in the order of the legends.
        seeds: the reported seeds.
        metric: name of the final metric, a column of `cells`.
        greater_is_better: whether larger values of the metric are better.
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
    """The data behind a run's figures.

    Attributes:
        metrics: one row per line of ``metrics.jsonl``: step, and the values logged on that line.
        updates: one row per measured layer and step: step, layer, and of its total update numerical_rank,
            effective_rank, norm (Frobenius) and singular_values (a list of the largest, descending).
        layers: one row per layer of ``inspect.json``: name, numerical_rank, effective_rank, norm, residual (a dict of
            `RESIDUALS`, or None); empty if there is no such file.
        adapter_rank: rank r of the adapter; None for methods without one.
    """

    metrics: pd.DataFrame
    updates: pd.DataFrame
    layers: pd.DataFrame
    adapter_rank: int | None = None


def mean_curve(study: StudyData, name: str, *, smooth: bool = False) -> pd.DataFrame:
    """A logged value over a run, for each method at its best learning rate, as a mean over the reported seeds.

    Args:
        study: the study's data.
        name: name of the value in the logs, such as ``"eval_loss"``.
        smooth: whether to replace each run's values by their running mean over a tenth of the run.

    Returns:
        One row per method and step: method, step, seconds (mean), mean, standard_error (NaN with one seed), seeds.

    Raises:
        NoData: no run logged it.
    """
    rows = _reported(study, study.curves)
    rows = rows[(rows["name"] == name) & rows["value"].notna()] if len(rows) else rows
    if rows.empty:
        raise NoData(_NOT_LOGGED.get(name, f"no run has logged {name!r}."))
    if smooth:
        rows = rows.sort_values("step")
        rows = rows.assign(value=rows.groupby(["method", "seed"])["value"].transform(_running_mean))
    means = rows.groupby(["method", "step"]).agg(
        seconds=("seconds", "mean"), mean=("value", "mean"), standard_error=("value", "sem"), seeds=("seed", "nunique")
    )
    return _in_order(study, means.reset_index())


def loss_by_rate(study: StudyData) -> pd.DataFrame:
    """The final evaluation loss of each method at each learning rate, over the seeds that all of its rates were run on.

    Args:
        study: the study's data.

    Returns:
        One row per method and rate: method, learning_rate, mean, standard_error, seeds, best (whether results are
        reported at this rate).

    Raises:
        NoData: no run has an evaluation loss, or no method was run at more than one rate.
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
            "no method has finished at more than one learning rate. List several `learning_rates` in the study file "
            "and run `scalora compare`."
        )
    means["best"] = means["learning_rate"] == means["method"].map(study.best)
    return _in_order(study, means)


def mean_ranks(study: StudyData) -> pd.DataFrame:
    """The rank of the total update over a run, averaged over the measured layers and then over seeds.

    The paper's Figure 2(b). Only steps that all of a method's seeds were measured at count: runs that choose when to
    measure (``track_updates: auto``) have some steps of their own.

    Args:
        study: the study's data.

    Returns:
        One row per method and step: method, step, mean numerical_rank and effective_rank, and their standard errors
        over seeds, numerical_rank_error and effective_rank_error.

    Raises:
        NoData: no run measured its updates.
    """
    rows = _reported(study, study.updates)
    if rows.empty:
        raise NoData(
            "no run has measured its update. Remove `track_updates: 0` from the study's `run` section and run "
            "`scalora compare` again."
        )
    seeds = rows.groupby(["method", "step"])["seed"].transform("nunique")
    rows = rows[seeds == rows.groupby("method")["seed"].transform("nunique")]
    by_seed = rows.groupby(["method", "step", "seed"])[["numerical_rank", "effective_rank"]].mean().reset_index()
    means = by_seed.groupby(["method", "step"]).agg(
        numerical_rank=("numerical_rank", "mean"),
        numerical_rank_error=("numerical_rank", "sem"),
        effective_rank=("effective_rank", "mean"),
        effective_rank_error=("effective_rank", "sem"),
    )
    return _in_order(study, means.reset_index())


def mean_costs(study: StudyData) -> pd.DataFrame:
    """What each method costs at its best learning rate, as means over the reported seeds.

    Args:
        study: the study's data.

    Returns:
        One row per method: method, peak_memory_mib, milliseconds_per_step, and their standard errors over seeds,
        peak_memory_mib_error and milliseconds_per_step_error.

    Raises:
        NoData: the runs have neither number.
    """
    rows = _reported(study, study.cells)
    if rows.empty or not {"peak_memory_bytes", "seconds_per_step"} <= set(rows.dropna(axis="columns", how="all")):
        raise NoData("no finished run has recorded its memory and time. `scalora compare` finishes the runs.")
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
    """The study's final metric for each method at its best learning rate, the best method first.

    Args:
        study: the study's data.

    Returns:
        One row per method: method, mean, standard_error (NaN with one seed), seeds, values (a list, one per seed).

    Raises:
        NoData: no run has the metric.
    """
    cells = _reported(study, study.cells)
    if study.metric not in cells or not cells[study.metric].notna().any():
        raise NoData(
            f"no run has logged {study.metric!r}, the study's metric. Correct `metric` in the study file, or add "
            "evaluation data, and run `scalora compare` again."
        )
    means = cells[cells[study.metric].notna()].groupby("method")[study.metric].agg(["mean", "sem", "count", list])
    means = means.rename(columns={"sem": "standard_error", "count": "seeds", "list": "values"})
    return means.sort_values("mean", ascending=not study.greater_is_better, kind="stable").reset_index()


def losses(run: RunData) -> pd.DataFrame:
    """The losses that a run logged.

    Args:
        run: the run's data.

    Returns:
        One row per step: step, loss (training), smoothed (its running mean over a tenth of the run), eval_loss; NaN
        where a step has none.

    Raises:
        NoData: it logged no loss.
    """
    named = [name for name in ("loss", "eval_loss") if name in run.metrics]
    if not named:
        raise NoData(
            "the run has logged no loss. Set a smaller `training.logging_steps` and run `scalora train` again."
        )
    by_step = run.metrics.groupby("step")[named].first().dropna(how="all").reindex(columns=["loss", "eval_loss"])
    by_step.insert(1, "smoothed", _running_mean(by_step["loss"].dropna()))
    return by_step.reset_index()


def rank_spread(run: RunData) -> pd.DataFrame:
    """The rank of the total update over a run: mean, least and greatest of the measured layers.

    Args:
        run: the run's data.

    Returns:
        One row per step: step, and for numerical_rank and effective_rank the columns ``…_mean``, ``…_min``, ``…_max``.

    Raises:
        NoData: the run has measured its update once or never.
    """
    if run.updates.empty:
        raise NoData(_NOT_MEASURED)
    if run.updates["step"].nunique() < 2:
        raise NoData(
            "the run was measured only at its end. Set `track_updates: 20` and run `scalora train` again to measure it "
            "20 times, even where that takes more than 1 % of the time."
        )
    spread = run.updates.groupby("step")[["numerical_rank", "effective_rank"]].agg(["mean", "min", "max"])
    spread.columns = ["_".join(column) for column in spread.columns]
    return spread.reset_index()


def final_spectra(run: RunData) -> pd.DataFrame:
    """The singular values of the total update at the last measurement, over the largest one of each layer.

    Args:
        run: the run's data.

    Returns:
        One row per index: index (from 1), and a column for each measured layer; NaN where a layer has fewer values.

    Raises:
        NoData: the run has not measured its update.
    """
    if run.updates.empty:
        raise NoData(_NOT_MEASURED)
    last = run.updates[run.updates["step"] == run.updates["step"].max()]
    spectra = {
        name: pd.Series(values, dtype=float) / values[0]
        for name, values in zip(short_names(last["layer"]), last["singular_values"], strict=True)
        if isinstance(values, list) and values and values[0] > 0
    }
    if not spectra:
        raise NoData("the update of all measured layers is zero.")
    frame = pd.DataFrame(spectra)
    frame.insert(0, "index", range(1, len(frame) + 1))
    return frame


def layer_shares(run: RunData) -> pd.DataFrame:
    """The shares of the layers by how they were scaled, at each logged step.

    Args:
        run: the run's data.

    Returns:
        One row per step: step, then column and scalar, or matrix with matrix scaling, and left_alone; the shares add up
        to 1.

    Raises:
        NoData: the run's method is not ScaLoRA.
    """
    by_matrix = "scalora/matrix_share" in run.metrics.columns
    kinds = ("matrix", "left_alone") if by_matrix else ("column", "scalar", "left_alone")
    shares = _logged(run, {f"scalora/{kind}_share": kind for kind in kinds})
    return shares.reset_index()


def factor_quantiles(run: RunData) -> pd.DataFrame:
    """Quantiles of the scaling factors, or of the singular values of the matrices, at each logged step.

    Args:
        run: the run's data.

    Returns:
        One row per step: step, and for alpha and beta the columns ``…_p10``, ``…_p50``, ``…_p90``.

    Raises:
        NoData: the run's method is not ScaLoRA, or it has rescaled nothing.
    """
    names = [f"{factor}_{quantile}" for factor in FACTORS for quantile in QUANTILES]
    return _logged(run, {f"scalora/{name}": name for name in names}).reset_index()


def layer_map(run: RunData) -> pd.DataFrame:
    """The ranks and the norm of every inspected layer's update, with the layer's place in the model.

    Args:
        run: the run's data.

    Returns:
        One row per layer: name, numerical_rank, effective_rank, norm, index (of its block; -1 outside of the blocks),
        kind (its name within the block).

    Raises:
        NoData: the run has not been inspected.
    """
    if run.layers.empty:
        raise NoData(_NOT_INSPECTED)
    places = [_place(name) for name in run.layers["name"]]
    ranks = run.layers[["name", "numerical_rank", "effective_rank", "norm"]]
    return ranks.assign(index=[index for index, _ in places], kind=[kind for _, kind in places])


def layer_residuals(run: RunData) -> pd.DataFrame:
    """The share of each layer's gradient energy that a step with each kind of scaling leaves uncaptured.

    Args:
        run: the run's data.

    Returns:
        One row per layer: name and the columns `RESIDUALS`.

    Raises:
        NoData: the run has not been inspected, or without gradients.
    """
    if run.layers.empty:
        raise NoData(_NOT_INSPECTED)
    known = run.layers[
        [isinstance(residual, dict) for residual in run.layers.get("residual", [None] * len(run.layers))]
    ]
    if known.empty:
        raise NoData(
            "inspect.json holds no residuals. `scalora inspect RUN` with `--batches` above 0 adds them, for methods "
            "that train A and B."
        )
    rows = [{"name": name} | residual for name, residual in zip(known["name"], known["residual"], strict=True)]
    return pd.DataFrame(rows, columns=["name", *RESIDUALS]).astype(dict.fromkeys(RESIDUALS, float))


_NOT_LOGGED = {
    "eval_loss": "no run has logged an evaluation loss. Set `data.eval` and `training.eval_strategy` in the study's "
    "`run` section and run `scalora compare` again.",
    "loss": "no run has logged a training loss. Set `training.logging_steps` in the study's `run` section and run "
    "`scalora compare` again.",
    "scalora/column_share": "no finished run has rescaled columns, as `method: scalora` does with `scalora.mode: "
    "auto`.",
}

_NOT_MEASURED = (
    "the run has not measured its update. Remove `track_updates: 0` from its config and run `scalora train` again."
)

_NOT_INSPECTED = "the run has not been inspected as it is now. `scalora inspect RUN` adds them."


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
        raise NoData("the run has logged no scaling factors. Only `method: scalora` has them, once it rescales.")
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
