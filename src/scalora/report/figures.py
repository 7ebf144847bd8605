"""The figures of a report, each a function from a study's or a run's data to a matplotlib figure.

They use no state of pyplot, so a notebook shows what they return and a server can draw them in any thread. Every colour
has a counterpart for dark pages in `DARK`. Methods also differ by marker and dashes, so that no figure needs colour to
be read. The figures of a page are drawn at the width of a phone, where their text is still legible.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from scalora.maths.lowrank import DEFAULT_RTOL
from scalora.report.summaries import (
    FACTORS,
    RESIDUALS,
    LayerValue,
    RunData,
    StudyData,
    factor_quantiles,
    final_metrics,
    final_spectra,
    layer_map,
    layer_residuals,
    layer_shares,
    loss_by_rate,
    losses,
    mean_costs,
    mean_curve,
    mean_ranks,
    rank_spread,
    short_names,
)

INK, GRID = "#1f2329", "#d8dce1"

# Contrast of at least 3:1 against a white page, and of the counterpart against `PAGE_DARK`. Neighbours differ in
# lightness as well as hue.
SERIES = {
    "#0068a8": "#5cb3f2",
    "#c44e00": "#ff9155",
    "#00795a": "#3ecf9f",
    "#a3226f": "#f08cc0",
    "#8a6400": "#e6bd45",
    "#2b8fbf": "#9fdcf5",
    "#5b3fb5": "#b6a1ff",
    "#5a6068": "#b9c0c8",
}
PAGE_DARK = "#15181c"
DARK = {INK: "#e8eaed", GRID: "#3b424a", **SERIES}

# 8, 9 and 4 of them: no two of the first 72 methods have the same colour and marker.
_COLOURS = tuple(SERIES)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "*")
_DASHES: tuple[Any, ...] = ("solid", (0, (5, 1.5)), (0, (1.5, 1.5)), (0, (6, 1.5, 1.5, 1.5)))

# Inches. A page on a phone shows a figure 360 pixels wide: 1.09 pixels per point of text.
_WIDTH = 4.6
_WIDE = 6.4  # of figures for documents, whose rows have long names

_CHARACTERS = 12.5  # per inch of a legend's line

_REFERENCE: dict[str, Any] = {"color": INK, "linestyle": (0, (4, 3)), "linewidth": 1}  # lines to compare with

_SMALLEST = 1e-5  # of the singular values in a figure: a hundredth of the smallest that counts for a rank

_STYLE = rc_context(
    {
        "font.family": ["DejaVu Sans"],
        "font.size": 9.5,
        "axes.titlesize": 9.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "axes.titlecolor": INK,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "lines.linewidth": 1.4,
        "lines.markersize": 4,
        "figure.facecolor": "white",
        "axes.facecolor": "none",
    }
)


@_STYLE
def loss_by_steps(study: StudyData, name: Literal["eval_loss", "loss"] = "eval_loss") -> Figure:
    """Evaluation or training loss against steps; the band is one standard error over seeds.

    Training losses are running means over a tenth of the run.

    Args:
        study: the study's data.
        name: ``"eval_loss"`` or ``"loss"``, the training loss.

    Raises:
        NoData: no run logged that loss.
    """
    return _loss(study, name, "step", "optimizer steps")


@_STYLE
def loss_by_seconds(study: StudyData, name: Literal["eval_loss", "loss"] = "eval_loss") -> Figure:
    """Evaluation or training loss against seconds of training (without evaluations, mean over seeds).

    The band is one standard error over seeds. Training losses are running means over a tenth of the run.

    Args:
        study: the study's data.
        name: ``"eval_loss"`` or ``"loss"``, the training loss.

    Raises:
        NoData: no run logged that loss.
    """
    return _loss(study, name, "seconds", "seconds of training")


@_STYLE
def learning_rate_sensitivity(study: StudyData) -> Figure:
    """Final evaluation loss against the learning rate, a line per method; a ring marks the reported rate.

    Args:
        study: the study's data.

    Raises:
        NoData: no evaluation loss, or one learning rate only.
    """
    means = loss_by_rate(study)
    figure, (axes,) = _figure(2.9)
    for method, rows in means.groupby("method", sort=False):
        axes.errorbar(
            rows["learning_rate"],
            rows["mean"],
            yerr=rows["standard_error"].fillna(0),
            label=method,
            elinewidth=1,
            **_look(study, method),
        )
    best = means[means["best"]]
    axes.plot(
        best["learning_rate"],
        best["mean"],
        linestyle="none",
        marker="o",
        markersize=11,
        markerfacecolor="none",
        markeredgecolor=INK,
        label="reported",
    )
    axes.set_xscale("log")
    _plain_ticks(axes, _far_apart(means["learning_rate"]))
    axes.set(xlabel="learning rate", ylabel="final evaluation loss")
    _keep_readable(axes, means["mean"])
    _legend(figure, axes)
    return figure


@_STYLE
def rank_by_steps(study: StudyData) -> Figure:
    """Numerical and effective rank of the total update against steps (the paper's Figure 2(b)); band: standard error.

    Args:
        study: the study's data.

    Raises:
        NoData: no run measured its updates.
    """
    means = mean_ranks(study)
    figure, panels = _figure(4.4, rows=2, sharex=True)
    for axes, rank in zip(panels, ("numerical_rank", "effective_rank"), strict=True):
        for method, rows in means.groupby("method", sort=False):
            _line(axes, rows["step"], rows[rank], rows[f"{rank}_error"], method, _look(study, method))
        axes.set(ylabel=rank.replace("_", " "), ylim=(0, None))
    panels[-1].set_xlabel("optimizer steps")
    _legend(figure, panels[0])
    return figure


@_STYLE
def column_share_by_steps(study: StudyData) -> Figure:
    """Share of layers that took the column solution against steps (the paper's Figure 2(d)); band: standard error.

    Args:
        study: the study's data.

    Raises:
        NoData: no method rescales.
    """
    means = mean_curve(study, "scalora/column_share")
    figure, (axes,) = _figure(2.7)
    for method, rows in means.groupby("method", sort=False):
        _line(axes, rows["step"], rows["mean"], rows["standard_error"], method, _look(study, method))
    axes.set(xlabel="optimizer steps", ylabel="share of layers", ylim=(0, 1.02))
    _legend(figure, axes)
    return figure


@_STYLE
def memory_and_speed(study: StudyData) -> Figure:
    """Peak memory and time per step, a bar per method; whiskers are one standard error over seeds.

    Args:
        study: the study's data.

    Raises:
        NoData: the runs have neither.
    """
    means = mean_costs(study)
    figure, panels = _figure(0.8 + 0.26 * len(means), columns=2, sharey=True)
    colours = [_look(study, method)["color"] for method in means["method"]]
    for axes, (name, label) in zip(
        panels,
        (("peak_memory_mib", "peak memory (MiB)"), ("milliseconds_per_step", "time per step (ms)")),
        strict=True,
    ):
        bars = axes.barh(
            means["method"],
            means[name],
            xerr=means[f"{name}_error"].fillna(0),
            color=colours,
            height=0.7,
            error_kw={"ecolor": INK, "elinewidth": 1},
        )
        axes.bar_label(
            bars, labels=[f"{value:.3g}" if value < 100 else f"{value:.0f}" for value in means[name]], padding=4
        )
        axes.set(xlabel=label, xlim=(0, 1.45 * means[name].max()))
        axes.xaxis.set_major_locator(MaxNLocator(3))
        axes.grid(visible=False, axis="y")
    panels[0].invert_yaxis()
    return figure


@_STYLE
def final_metric(study: StudyData) -> Figure:
    """The final metric of each method, the best on top: mean with one standard error, and each seed.

    Args:
        study: the study's data.

    Raises:
        NoData: no run has the metric.
    """
    means = final_metrics(study)
    figure, (axes,) = _figure(0.9 + 0.32 * len(means))
    for place, row in enumerate(means.itertuples()):
        look = _look(study, row.method)
        axes.plot(
            row.values, [place] * len(row.values), linestyle="none", marker="|", markersize=9, color=look["color"]
        )
        axes.errorbar(
            [row.mean],
            [place],
            xerr=[np.nan_to_num(row.standard_error)],
            **look | {"linestyle": "none", "markersize": 7},
            elinewidth=2,
            capsize=4,
        )
    axes.set_yticks(range(len(means)), means["method"])
    if study.baseline in set(means["method"]):
        axes.axvline(means.set_index("method")["mean"][study.baseline], **_REFERENCE)
    axes.set(xlabel=study.metric.replace("_", " "), ylim=(len(means) - 0.5, -0.5))
    _keep_readable(axes, means["values"].explode().astype(float), along="x", low=study.greater_is_better)
    return figure


@_STYLE
def run_loss(run: RunData) -> Figure:
    """Training loss, as logged and as a running mean, and evaluation loss of one run against steps.

    Args:
        run: the run's data.

    Raises:
        NoData: the run logged no loss.
    """
    rows = losses(run)
    figure, (axes,) = _figure(2.7)
    training, evaluation = rows.dropna(subset="loss"), rows.dropna(subset="eval_loss")
    if len(training):
        axes.plot(training["step"], training["loss"], color=_COLOURS[0], alpha=0.55, linewidth=0.8, label="training")
        axes.plot(training["step"], training["smoothed"], color=_COLOURS[0], label="training, running mean")
    if len(evaluation):
        axes.plot(evaluation["step"], evaluation["eval_loss"], color=_COLOURS[1], marker="s", label="evaluation")
    axes.set(xlabel="optimizer steps", ylabel="loss")
    _keep_readable(axes, pd.concat([training["loss"], evaluation["eval_loss"]]), kept=training["loss"].head(1))
    _legend(figure, axes)
    return figure


@_STYLE
def run_rank(run: RunData) -> Figure:
    """Rank of one run's total update against steps: mean of the measured layers, and the band from least to greatest.

    Args:
        run: the run's data.

    Raises:
        NoData: the run has measured its update once or never.
    """
    spread = rank_spread(run)
    figure, (axes,) = _figure(2.7)
    for index, rank in enumerate(("numerical_rank", "effective_rank")):
        look = {"color": _COLOURS[index], "marker": _MARKERS[index], "linestyle": _DASHES[index]}
        axes.plot(spread["step"], spread[f"{rank}_mean"], label=f"{rank.replace('_', ' ')}", **look)
        axes.fill_between(
            spread["step"], spread[f"{rank}_min"], spread[f"{rank}_max"], color=_COLOURS[index], alpha=0.15, linewidth=0
        )
    if run.adapter_rank is not None:
        axes.axhline(run.adapter_rank, label="rank of the adapter", **_REFERENCE)
    axes.set(xlabel="optimizer steps", ylabel="rank of the update", ylim=(0, None))
    _legend(figure, axes)
    return figure


@_STYLE
def run_spectrum(run: RunData) -> Figure:
    """The largest singular values of one run's total update at the end, over the largest one, a line per layer.

    Args:
        run: the run's data.

    Raises:
        NoData: the run has not measured its update.
    """
    spectra = final_spectra(run)
    figure, (axes,) = _figure(2.9)
    for place, layer in enumerate(spectra.columns.drop("index")):
        look = {"color": _COLOURS[place], "marker": _MARKERS[place], "linestyle": _DASHES[place]}
        seen = spectra[spectra[layer] >= _SMALLEST]
        axes.plot(seen["index"], seen[layer], label=layer, markevery=max(1, len(seen) // 8), **look)
    axes.axhline(DEFAULT_RTOL, label="a thousandth", **_REFERENCE)
    if run.adapter_rank is not None:
        axes.axvline(run.adapter_rank, label="rank of the adapter", **_REFERENCE | {"linestyle": _DASHES[2]})
    axes.set_yscale("log")
    _plain_ticks(axes, [10.0**power for power in range(-4, 1)], along="y")
    axes.set(xlabel="singular value", ylabel="over the largest", ylim=(_SMALLEST, 1.5), xlim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure, axes)
    return figure


# Colour and hatch of each way to scale a layer.
_KINDS = {
    "matrix": (_COLOURS[0], ""),
    "column": (_COLOURS[0], ""),
    "scalar": (_COLOURS[4], "///"),
    "left_alone": (_COLOURS[7], "..."),
}


@_STYLE
def scaling_shares(run: RunData) -> Figure:
    """Shares of the layers by how they were scaled, stacked, against steps.

    Args:
        run: the run's data.

    Raises:
        NoData: the run's method is not ScaLoRA.
    """
    shares = layer_shares(run)
    kinds = [kind for kind in _KINDS if kind in shares]
    figure, (axes,) = _figure(2.7)
    axes.stackplot(
        shares["step"],
        *(shares[kind] for kind in kinds),
        labels=[kind.replace("_", " ") for kind in kinds],
        colors=[_KINDS[kind][0] for kind in kinds],
        hatch=[_KINDS[kind][1] for kind in kinds],
        edgecolor="white",
        linewidth=0.6,
    )
    axes.set(xlabel="optimizer steps", ylabel="share of layers", ylim=(0, 1), xlim=_span(shares["step"]))
    _legend(figure, axes)
    return figure


@_STYLE
def factors(run: RunData) -> Figure:
    """Distribution of the factors α and β against steps: median, and the band from 10 to 90 %, on a log scale.

    Args:
        run: the run's data.

    Raises:
        NoData: the run's method is not ScaLoRA, or it has rescaled nothing.
    """
    quantiles = factor_quantiles(run)
    figure, panels = _figure(4.2, rows=2, sharex=True)
    for index, (axes, factor) in enumerate(zip(panels, FACTORS, strict=True)):
        low, middle, high = (quantiles[f"{factor}_{quantile}"] for quantile in ("p10", "p50", "p90"))
        axes.fill_between(
            quantiles["step"], low, high, color=_COLOURS[index], alpha=0.25, linewidth=0, label="10 to 90 %"
        )
        axes.plot(quantiles["step"], middle, color=_COLOURS[index], label="median")
        axes.axhline(1, **_REFERENCE)
        axes.set_yscale("log")
        _plain_ticks(axes, _log_ticks(low, high), along="y")
        axes.set_ylabel(f"{'αβ'[index]} (of {'AB'[index]}'s columns)")
    panels[-1].set_xlabel("optimizer steps")
    _legend(figure, panels[0])
    return figure


@_STYLE
def layer_heat_map(run: RunData, value: LayerValue = "effective_rank") -> Figure:
    """One number of every inspected layer: blocks from left to right, kinds of module from top to bottom.

    Args:
        run: the run's data.
        value: which number: ``"numerical_rank"``, ``"effective_rank"`` or ``"norm"`` of the layer's update.

    Raises:
        NoData: the run has not been inspected.
    """
    layers = layer_map(run)
    grid = layers.pivot_table(index="kind", columns="index", values=value, sort=False).sort_index(axis="columns")
    figure, (axes,) = _figure(1.5 + 0.3 * len(grid))
    cells = axes.pcolormesh(np.ma.masked_invalid(grid.to_numpy(float)), cmap="cividis")
    axes.set_xticks(np.arange(grid.shape[1]) + 0.5, ["none" if index < 0 else str(index) for index in grid.columns])
    axes.set_yticks(np.arange(len(grid)) + 0.5, grid.index)
    if grid.shape[1] > 12:
        axes.xaxis.set_major_locator(FixedLocator([i + 0.5 for i in range(0, grid.shape[1], 4)]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda place, _: str(grid.columns[int(place)])))
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.set_xlabel("block")
    label = f"{value.replace('_', ' ')} of the update"
    figure.colorbar(cells, ax=axes, label=label, location="bottom", aspect=30, ticks=MaxNLocator(5))
    if grid.shape[1] <= 6:
        for (row, column), number in np.ndenumerate(grid.to_numpy(float)):
            if np.isfinite(number):
                bright = sum(cells.cmap(cells.norm(number))[:3]) > 1.5
                axes.text(
                    column + 0.5,
                    row + 0.5,
                    f"{number:.3g}",
                    ha="center",
                    va="center",
                    fontsize=9,
                    color="#000001" if bright else "#fffffe",  # not the ink, which a dark page inverts
                )
    return figure


@_STYLE
def oracle_distance(run: RunData) -> Figure:
    """Share of each layer's gradient that a step leaves uncaptured, by kind of scaling, and the optimum (oracle).

    The scale is linear up to 1 and logarithmic beyond: without scaling, a step can be far too long.

    Args:
        run: the run's data.

    Raises:
        NoData: the run has not been inspected, or without gradients.
    """
    residuals = layer_residuals(run)
    figure, (axes,) = _figure(min(9.0, 1.3 + 0.24 * len(residuals)))
    places = np.arange(len(residuals))
    axes.hlines(places, residuals["oracle"], residuals["chosen"], color=GRID, linewidth=3)
    looks = {
        "none": ("X", 7),
        "scalar": ("^", 6),
        "column": ("s", 4.5),
        "polar": ("v", 6),
        "matrix": ("P", 6),
        "chosen": ("o", 10),
        "oracle": ("D", 5),
    }
    for index, kind in enumerate(RESIDUALS):
        marker, size = looks[kind]
        axes.plot(
            residuals[kind],
            places,
            linestyle="none",
            marker=marker,
            markersize=size,
            color=_COLOURS[index],
            markerfacecolor="none" if kind == "chosen" else _COLOURS[index],
            label={"none": "no scaling", "oracle": "oracle (SVD)"}.get(kind, kind),
        )
    axes.set_xscale("symlog", linthresh=1)
    top = float(np.nanmax(residuals[list(RESIDUALS)].to_numpy()))
    beyond = [10.0**power for power in range(1, 1 + int(np.log10(max(top, 1))))]
    _plain_ticks(axes, [0, 0.5, 1, *beyond] if beyond else [0, 0.25, 0.5, 0.75, 1, 2, 5])
    axes.set(xlabel="share of the gradient left uncaptured", xlim=(-0.02, 1.05 * max(top, 1)))
    if len(residuals) <= 32:
        axes.set_yticks(places, short_names(residuals["name"]))
    else:
        axes.set_ylabel("layer, in the model's order")
    axes.set_ylim(len(residuals) - 0.5, -0.5)
    _legend(figure, axes)
    return figure


def _loss(study: StudyData, name: str, by: Literal["step", "seconds"], label: str) -> Figure:
    means = mean_curve(study, name, smooth=name == "loss")
    figure, (axes,) = _figure(2.9)
    for method, rows in means.groupby("method", sort=False):
        _line(axes, rows[by], rows["mean"], rows["standard_error"], method, _look(study, method))
    axes.set(xlabel=label, ylabel="evaluation loss" if name == "eval_loss" else "training loss, running mean")
    _keep_readable(axes, means["mean"], kept=means.groupby("method")["mean"].first())
    _legend(figure, axes)
    return figure


@_STYLE
def step_ratios(rows: Iterable[tuple[str, float, tuple[float, float]]]) -> Figure:
    """Seconds of a step over LoRA's, a line a method, with the middle half of the single steps.

    Args:
        rows: what each is, its ratio, and where the middle half begins and ends.
    """
    rows = list(rows)
    figure, (axes,) = _figure(0.9 + 0.3 * len(rows), width=_WIDE)
    names = [name for name, _, _ in rows]
    for name, _, ends in rows:
        axes.plot(ends, [name, name], color=_COLOURS[0], linewidth=2.5, alpha=0.45, solid_capstyle="butt")
    axes.plot([ratio for _, ratio, _ in rows], names, linestyle="none", marker="o", color=_COLOURS[0])
    axes.axvline(1, color=INK, linewidth=1)
    axes.set(xlabel="time of a step, over LoRA's")
    axes.margins(y=0.5 / max(1, len(rows)))
    axes.invert_yaxis()
    return figure


@_STYLE
def rescale_parts(rows: Iterable[tuple[str, dict[str, float], float]]) -> Figure:
    """A rescale by its parts, a bar a case, with a stroke at its floor.

    Args:
        rows: the case, the seconds of the parts, the seconds of the floor.
    """
    rows = list(rows)
    figure, (axes,) = _figure(1.1 + 0.34 * len(rows), width=_WIDE)
    names = [name for name, _, _ in rows]
    left = np.zeros(len(rows))
    for part, colour in zip(rows[0][1], _COLOURS, strict=False):
        seconds = np.array([1000 * parts[part] for _, parts, _ in rows])
        axes.barh(names, seconds, left=left, height=0.6, color=colour, label=part.removeprefix("scalora::"))
        left += seconds
    floors = [1000 * floor for _, _, floor in rows]
    axes.plot(floors, names, linestyle="none", marker="|", markersize=16, markeredgewidth=2, color=INK, label="floor")
    axes.set(xlabel="a rescale (ms)")
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4)
    return figure


def _figure(
    height: float,
    rows: int = 1,
    columns: int = 1,
    *,
    width: float = _WIDTH,
    sharex: bool = False,
    sharey: bool = False,
) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, sharex=sharex, sharey=sharey, squeeze=False).flat)


def _look(study: StudyData, method: str) -> dict[str, Any]:
    """A method's colour, marker and dashes: the same in every figure of a study."""
    place = list(study.best).index(method)
    return {
        "color": _COLOURS[place % len(_COLOURS)],
        "marker": _MARKERS[place % len(_MARKERS)],
        "linestyle": _DASHES[(place + place // len(_COLOURS)) % len(_DASHES)],
    }


def _line(axes: Axes, x: pd.Series, mean: pd.Series, error: pd.Series, label: str, look: dict[str, Any]) -> None:
    """A line with its band of one standard error, and about eight markers however many points it has."""
    axes.plot(x, mean, label=label, markevery=max(1, len(x) // 8), **look)
    if error.notna().any():
        axes.fill_between(x, mean - error, mean + error, color=look["color"], alpha=0.15, linewidth=0)


def _keep_readable(
    axes: Axes,
    values: Iterable[float],
    *,
    along: Literal["x", "y"] = "y",
    low: bool = False,
    kept: Iterable[float] = (),
) -> None:
    """Let outliers (diverged runs) leave the frame, where they would squeeze everything else into a line.

    Args:
        axes: the axes whose limits are set.
        values: all values drawn.
        along: the axis that the values are on.
        low: whether it is the small values that are bad.
        kept: values that stay in the frame: where curves begin.
    """
    finite = np.array([value for value in values if np.isfinite(value)])
    if not finite.size:
        return
    sign = -1 if low else 1
    near, middle = np.quantile(sign * finite, [0, 0.5])
    limit = max([near + 8 * (middle - near), *(value for value in kept if np.isfinite(value))])
    if middle > near and (sign * finite).max() > limit:
        margin = 0.05 * (limit - near)
        ends = sorted((sign * (near - margin), sign * limit))
        axes.set_xlim(*ends) if along == "x" else axes.set_ylim(*ends)


def _legend(figure: Figure, axes: Axes) -> None:
    """Below the axes, in as many columns as its longest name leaves room for; the figure grows by its height."""
    handles, labels = axes.get_legend_handles_labels()
    longest = max(len(label) for label in labels) + 6
    columns = max(1, min(len(labels), int(_CHARACTERS * figure.get_figwidth()) // longest))
    figure.set_figheight(figure.get_figheight() + 0.2 * -(-len(labels) // columns))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=3)


def _plain_ticks(axes: Axes, values: Iterable[float], along: Literal["x", "y"] = "x") -> None:
    """Set ticks at these values, written without powers: those are mathematical text, which browsers render badly."""
    axis = axes.xaxis if along == "x" else axes.yaxis
    axis.set_major_locator(FixedLocator(list(values)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _far_apart(rates: pd.Series) -> list[float]:
    """The rates whose ticks don't touch on a logarithmic axis: at least a sixth of it apart."""
    kept: list[float] = []
    for rate in sorted(set(rates)):
        if not kept or np.log(rate / kept[-1]) > np.log(rates.max() / rates.min()) / 6:
            kept.append(float(rate))
    return kept


def _log_ticks(low: pd.Series, high: pd.Series) -> list[float]:
    """Ticks for a logarithmic axis: powers of ten, 1-2-5 steps where those are few, even ones where it is short."""
    if high.max() < 5 * low.min():
        return [float(tick) for tick in MaxNLocator(4).tick_values(low.min(), high.max()) if tick > 0]
    first, last = np.floor(np.log10(low.min())), np.ceil(np.log10(high.max()))
    powers = [10.0**power for power in np.arange(first, last + 1)]
    return powers if len(powers) > 3 else [power * step for power in powers for step in (1, 2, 5)]


def _span(steps: pd.Series) -> tuple[float, float]:
    """Limits of an axis of steps, which must differ even if there is only one step."""
    first, last = float(steps.min()), float(steps.max())
    return first, max(last, first + 1)
