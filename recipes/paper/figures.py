"""Figures of the experiments, one file each, drawn without matplotlib's global state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from bench import Run
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

if TYPE_CHECKING:
    from synthetic import Outcome

# Keep text as text, and make files reproducible.
rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "scalora", "font.size": 8})

_RISK = "risk relative to the start's"


def _save(figure: Figure, file: Path) -> None:
    figure.savefig(file, metadata={"Date": None})


def _panels(count: int, rows: int = 1) -> tuple[Figure, list[list[Axes]]]:
    figure = Figure(figsize=(2.6 * count + 0.4, 2.3 * rows + 0.2), layout="constrained")
    return figure, figure.subplots(rows, count, squeeze=False, sharey="row").tolist()


def _plain_ticks(axes: Axes) -> None:
    """Label only the powers of ten on logarithmic axes; there is no room for more."""
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())


def _optimizers(outcomes: Sequence[Outcome]) -> list[str]:
    return list(dict.fromkeys(outcome.optimizer for outcome in outcomes))


def curves(file: Path, outcomes: Sequence[Outcome], floor: float | None = None) -> None:
    """Plot risk and effective rank of the update against steps.

    Args:
        file: SVG file to write.
        outcomes: rows of the experiment's table.
        floor: risk of the best update of rank 4, drawn as a dotted line; None draws no line.
    """
    names = _optimizers(outcomes)
    figure, axes = _panels(len(names), 2)
    for column, name in enumerate(names):
        top, bottom = axes[0][column], axes[1][column]
        top.set(title=name, yscale="log")
        bottom.set(xlabel="step")
        if floor is not None:
            top.axhline(floor, color="grey", linestyle=":", label="best of rank 4")
        for outcome in outcomes:
            if outcome.optimizer != name:
                continue
            runs = outcome.lasting() or outcome.runs
            risks = [mean(at) for at in zip(*(run.risks for run in runs), strict=True)]
            ranks = [mean(at) for at in zip(*(run.effective_ranks for run in runs), strict=True)]
            top.plot(runs[0].steps, risks, label=outcome.variant.label)
            bottom.plot(runs[0].rank_steps, ranks, label=outcome.variant.label)
    axes[0][0].set(ylabel=_RISK)
    axes[0][0].set_ylim(top=1.5)
    axes[1][0].set(ylabel="effective rank of the update")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=5, fontsize=6)
    _save(figure, file)


def lines(file: Path, outcomes: Sequence[Outcome], label: str) -> None:
    """Plot final risk against each variant's `x`, one line per method.

    Args:
        file: SVG file to write.
        outcomes: rows of the experiment's table.
        label: label of the x axis.
    """
    names = _optimizers(outcomes)
    figure, axes = _panels(len(names))
    for ax, name in zip(axes[0], names, strict=True):
        ax.set(title=name, xscale="log", yscale="log", xlabel=label)
        of_name = [outcome for outcome in outcomes if outcome.optimizer == name]
        for method in dict.fromkeys(outcome.variant.setting.method for outcome in of_name):
            chosen = [outcome for outcome in of_name if outcome.variant.setting.method == method]
            risks, errors = zip(*(outcome.risk() for outcome in chosen), strict=True)
            xs = [outcome.variant.x for outcome in chosen]
            ax.errorbar(xs, risks, errors, marker="o", markersize=3, label=method)
            ax.set_xticks(xs, [f"{x:g}" for x in xs])
        _plain_ticks(ax)
    axes[0][0].set(ylabel=_RISK)
    axes[0][-1].legend(fontsize=6)
    _save(figure, file)


def bars(file: Path, outcomes: Sequence[Outcome]) -> None:
    """Plot the final risk of each variant as a point with its standard error.

    Args:
        file: SVG file to write.
        outcomes: rows of the experiment's table.
    """
    names = _optimizers(outcomes)
    figure, axes = _panels(len(names))
    for ax, name in zip(axes[0], names, strict=True):
        chosen = [outcome for outcome in outcomes if outcome.optimizer == name]
        risks, errors = zip(*(outcome.risk() for outcome in chosen), strict=True)
        ax.errorbar(risks, range(len(chosen)), xerr=errors, fmt="o", markersize=3)
        ax.set(title=name, xscale="log", xlabel=_RISK, yticks=range(len(chosen)))
        ax.set_yticklabels([outcome.variant.label for outcome in chosen])
        _plain_ticks(ax)
    axes[0][0].invert_yaxis()
    _save(figure, file)


def norms(file: Path, risks: Mapping[tuple[str, str, float], tuple[float, float]], log: Sequence[Run]) -> None:
    """Plot final risk against target norm at the best rate; below it, ScaLoRA's risk for every rate and norm.

    Args:
        file: SVG file to write.
        risks: mean and standard error of the final risk by (optimizer, method, target norm).
        log: all runs of the experiment.
    """
    names = list(dict.fromkeys(optimizer for optimizer, _, _ in risks))
    figure = Figure(figsize=(2.6 * len(names) + 0.6, 4.8), layout="constrained")
    axes = figure.subplots(2, len(names), squeeze=False)
    for column, name in enumerate(names):
        ax = axes[0][column]
        ax.set(title=name, xscale="log", yscale="log", xlabel="target norm", ylim=(0.02, 1.2))
        for method in dict.fromkeys(method for _, method, _ in risks):
            points = [(norm, *risk) for (o, m, norm), risk in risks.items() if (o, m) == (name, method)]
            xs, ys, errors = zip(*points, strict=True)
            ax.errorbar(xs, ys, errors, marker="o", markersize=3, label=method)
        _plain_ticks(ax)
        runs = [run for run in log if run.setting.optimizer == name and run.setting.method == "ScaLoRA"]
        rates = sorted({run.rate for run in runs})
        values = sorted({run.setting.target_norm for run in runs})
        grid = [
            [
                mean(at)
                if (at := [r.risks[-1] for r in runs if (r.rate, r.setting.target_norm) == (rate, norm)])
                else math.nan
                for rate in rates
            ]
            for norm in values
        ]
        finite = [[risk if risk <= 1 else math.nan for risk in row] for row in grid]
        ax = axes[1][column]
        image = ax.pcolormesh(rates, values, finite, cmap="viridis_r", norm="log", vmin=0.02, vmax=1, shading="nearest")
        ax.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="target norm")
        _plain_ticks(ax)
    axes[0][0].set(ylabel=_RISK)
    axes[0][0].legend(fontsize=6)
    figure.colorbar(image, ax=list(axes[1]), label="ScaLoRA's risk")
    _save(figure, file)
