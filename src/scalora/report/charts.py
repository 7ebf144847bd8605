"""The figures of a page: what each is called, what is said about it, and where its numbers come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import pandas as pd  # type: ignore[import-untyped]
from matplotlib.figure import Figure

from scalora.maths.lowrank import DEFAULT_RTOL
from scalora.report import figures, summaries
from scalora.report.summaries import LayerValue, RunData, StudyData

Data = TypeVar("Data", StudyData, RunData)


@dataclass(frozen=True)
class Chart(Generic[Data]):
    """A figure of a page.

    Attributes:
        name: name of its files, and prefix of its ids.
        title: its heading.
        caption: what it shows, in a sentence or two.
        table: makes its numbers, or raises `NoData`.
        draw: makes the figure, or raises `NoData`.
        says: the most important numbers in a sentence, for the figure's text alternative.
    """

    name: str
    title: str
    caption: str
    table: Callable[[Data], pd.DataFrame]
    draw: Callable[[Data], Figure]
    says: Callable[[pd.DataFrame], str]


def _at_the_end(value: str, what: str) -> Callable[[pd.DataFrame], str]:
    """Makes a sentence about the last point of each method's curve."""

    def says(table: pd.DataFrame) -> str:
        last = table.groupby("method", sort=False).last()[value]
        return f"{what} at the end: " + "; ".join(f"{method} {number:.4g}" for method, number in last.items()) + "."

    return says


def _by_method(value: str, what: str) -> Callable[[pd.DataFrame], str]:
    """Makes a sentence about the value of each method."""

    def says(table: pd.DataFrame) -> str:
        pairs = zip(table["method"], table[value], strict=True)
        return f"{what}: " + "; ".join(f"{method} {number:.4g}" for method, number in pairs) + "."

    return says


def _at_the_best_rate(table: pd.DataFrame) -> str:
    best = table[table["best"]]
    pairs = zip(best["method"], best["learning_rate"], best["mean"], strict=True)
    return "At the reported learning rate: " + "; ".join(f"{m} {loss:.4g} at {rate:g}" for m, rate, loss in pairs) + "."


def _ends(*columns: str) -> Callable[[pd.DataFrame], str]:
    """Makes a sentence about a run's first and last numbers."""

    def says(table: pd.DataFrame) -> str:
        ends = []
        for column in (column for column in columns if column in table):
            known = table[column].dropna()
            if len(known):
                ends.append(f"{column.replace('_', ' ')} from {known.iloc[0]:.4g} to {known.iloc[-1]:.4g}")
        return "Over the run " + ", ".join(ends) + "."

    return says


def _range(value: str) -> Callable[[pd.DataFrame], str]:
    """Makes a sentence about the layers with the least and the greatest value."""

    def says(table: pd.DataFrame) -> str:
        least, greatest = table.loc[table[value].idxmin()], table.loc[table[value].idxmax()]
        return f"From {least[value]:.4g} ({least['name']}) to {greatest[value]:.4g} ({greatest['name']})."

    return says


def _final_ranks(table: pd.DataFrame) -> str:
    counts = {layer: int((table[layer] > DEFAULT_RTOL).sum()) for layer in table.columns.drop("index")}
    return (
        f"Of the {len(table)} largest singular values, these many exceed a thousandth of the largest: "
        + "; ".join(f"{layer} {count}" for layer, count in counts.items())
        + "."
    )


def _rounded_spectra(run: RunData) -> pd.DataFrame:
    """The spectra to two digits, which is more than can be read off the figure, and short enough for a phone."""
    spectra = summaries.final_spectra(run)
    layers = spectra.columns.drop("index")
    return spectra.assign(**{name: spectra[name].map(lambda value: float(f"{value:.2g}")) for name in layers})


def _layer_values(value: LayerValue) -> Callable[[RunData], pd.DataFrame]:
    """Makes a table of one number of every inspected layer."""
    return lambda run: summaries.layer_map(run)[["name", value]]


def _mean_residuals(table: pd.DataFrame) -> str:
    means = ", ".join(f"{kind} {table[kind].mean():.3g}" for kind in summaries.RESIDUALS)
    return f"Share of the gradient left uncaptured, mean over {len(table)} layers: {means}."


_BAND = "Mean over seeds at each method's best learning rate; the band is one standard error."

STUDY_CHARTS: tuple[Chart[StudyData], ...] = (
    Chart(
        "final-metric",
        "Final metric of each method",
        "Mean over seeds with one standard error, best method first; each stroke is one seed. The dashed line is the "
        "baseline.",
        summaries.final_metrics,
        figures.final_metric,
        _by_method("mean", "Mean over seeds, best first"),
    ),
    Chart(
        "learning-rate-sensitivity",
        "Sensitivity to the learning rate",
        "Final evaluation loss, mean over the seeds that all rates were run on. A ring marks the rate that the other "
        "figures use. Outliers such as diverged runs are outside the frame, and in the table.",
        summaries.loss_by_rate,
        figures.learning_rate_sensitivity,
        _at_the_best_rate,
    ),
    Chart(
        "evaluation-loss-by-steps",
        "Evaluation loss against steps",
        _BAND,
        partial(summaries.mean_curve, name="eval_loss"),
        figures.loss_by_steps,
        _at_the_end("mean", "Evaluation loss"),
    ),
    Chart(
        "evaluation-loss-by-seconds",
        "Evaluation loss against time",
        f"{_BAND} Training time only, without evaluations.",
        partial(summaries.mean_curve, name="eval_loss"),
        figures.loss_by_seconds,
        _at_the_end("seconds", "Seconds of training"),
    ),
    Chart(
        "training-loss-by-steps",
        "Training loss against steps",
        f"Running mean over a tenth of the run. {_BAND}",
        partial(summaries.mean_curve, name="loss", smooth=True),
        partial(figures.loss_by_steps, name="loss"),
        _at_the_end("mean", "Training loss"),
    ),
    Chart(
        "training-loss-by-seconds",
        "Training loss against time",
        f"Running mean over a tenth of the run. {_BAND}",
        partial(summaries.mean_curve, name="loss", smooth=True),
        partial(figures.loss_by_seconds, name="loss"),
        _at_the_end("seconds", "Seconds of training"),
    ),
    Chart(
        "rank-of-the-update",
        "Rank of the total update",
        "Rank of the difference between the weights and those before training, mean over the measured layers (Figure "
        "2(b) of the ScaLoRA paper). The band is one standard error over seeds.",
        summaries.mean_ranks,
        figures.rank_by_steps,
        _at_the_end("numerical_rank", "Numerical rank"),
    ),
    Chart(
        "share-on-column-scaling",
        "Share of layers on column scaling",
        f"The others are scaled by one scalar or left alone (Figure 2(d) of the ScaLoRA paper). {_BAND}",
        partial(summaries.mean_curve, name="scalora/column_share"),
        figures.column_share_by_steps,
        _at_the_end("mean", "Share"),
    ),
    Chart(
        "memory-and-speed",
        "Memory and time per step",
        "Mean over seeds with one standard error. The time is that of a run's median step.",
        summaries.mean_costs,
        figures.memory_and_speed,
        _by_method("peak_memory_mib", "Peak memory in MiB"),
    ),
)

_HEAT_MAPS: tuple[tuple[LayerValue, str], ...] = (
    ("numerical_rank", "Number of singular values of the update above a thousandth of the largest."),
    ("effective_rank", "Exponential of the entropy of the update's singular values: a rank without a threshold."),
    ("norm", "Frobenius norm of the update."),
)

RUN_CHARTS: tuple[Chart[RunData], ...] = (
    Chart(
        "loss",
        "Loss",
        "Training loss as logged and as a running mean over a tenth of the run, and evaluation loss.",
        summaries.losses,
        figures.run_loss,
        _ends("loss", "eval_loss"),
    ),
    Chart(
        "rank-of-the-update",
        "Rank of the total update",
        "Rank of the difference between the weights and those before training: mean of the measured layers, and a band "
        "from the least to the greatest. Plain LoRA's rank is at most the adapter's.",
        summaries.rank_spread,
        figures.run_rank,
        _ends("numerical_rank_mean", "effective_rank_mean"),
    ),
    Chart(
        "spectrum-of-the-update",
        "Spectrum of the total update at the end",
        "The largest singular values of the difference between the weights and those before training, for each "
        "measured layer, on a log scale. The numerical rank counts those above the horizontal line.",
        _rounded_spectra,
        figures.run_spectrum,
        _final_ranks,
    ),
    Chart(
        "how-layers-were-scaled",
        "How layers were scaled",
        "Share of the layers that were scaled by column or by one scalar, or by matrices, or left alone.",
        summaries.layer_shares,
        figures.scaling_shares,
        _ends("matrix", "column", "scalar", "left_alone"),
    ),
    Chart(
        "scaling-factors",
        "Scaling factors",
        "Median over the columns of all layers, and a band from the 10th to the 90th percentile. A factor of 1 "
        "(dashed) leaves a column unchanged. With matrix scaling: the singular values of the matrices.",
        summaries.factor_quantiles,
        figures.factors,
        _ends("alpha_p50", "beta_p50"),
    ),
    *(
        Chart[RunData](
            f"layers-{value.replace('_', '-')}",
            f"{value.replace('_', ' ').capitalize()} of each layer's update",
            caption,
            _layer_values(value),
            partial(figures.layer_heat_map, value=value),
            _range(value),
        )
        for value, caption in _HEAT_MAPS
    ),
    Chart(
        "distance-to-the-oracle",
        "Distance to the oracle",
        "Share of the gradient's energy that one step leaves uncaptured: without scaling, with each kind of scaling, "
        "with the chosen one, and with the best possible adapter of this rank (oracle, from the gradient's SVD).",
        summaries.layer_residuals,
        figures.oracle_distance,
        _mean_residuals,
    ),
)

FILE_NAMES = frozenset(
    f"{chart.name}.{suffix}" for charts in (STUDY_CHARTS, RUN_CHARTS) for chart in charts for suffix in ("png", "svg")
)
"""All file names that a report may use beside its page."""
