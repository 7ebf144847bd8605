"""One HTML page with every figure of a study or a run: complete in itself, for dark and light, for print and phones.

The figures are inline SVG whose colours are the page's, so that one drawing serves both colour schemes. Each has a text
alternative and a table of its numbers. There is no script.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from typing import Any, Generic, TypeVar
from xml.etree import ElementTree

import pandas as pd  # type: ignore[import-untyped]
from jinja2 import Environment
from markdown_it import MarkdownIt
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure

from scalora.report import figures, summaries
from scalora.report.figures import DARK, GRID, INK, PAGE_DARK, SERIES
from scalora.report.summaries import LayerValue, NoData, RunData, StudyData

Data = TypeVar("Data", StudyData, RunData)

# Of a figure's numbers, so many steps of each method are in its table: enough to read a curve off.
_STEPS_IN_TABLE = 12

_COLOURS = {INK: "currentColor", GRID: "var(--grid)"} | {
    colour: f"var(--series-{place})" for place, colour in enumerate(SERIES)
}


@dataclass(frozen=True)
class Page:
    """A report.

    Attributes:
        html: the page.
        files: its figures to be written beside it, by name: a PNG and an SVG of each.
        missing: the sentences on what has no data.
    """

    html: str
    files: dict[str, bytes]
    missing: list[str]


@dataclass(frozen=True)
class _Chart(Generic[Data]):
    """A figure of the page, and what is said about it. `table` and `draw` raise `NoData` alike."""

    name: str
    title: str
    caption: str
    table: Callable[[Data], pd.DataFrame]
    draw: Callable[[Data], Figure]
    says: Callable[[pd.DataFrame], str]


def study_page(study: StudyData, *, title: str, results: str, settings: str) -> Page:
    """The report of a study.

    Args:
        study: its numbers.
        title: of the page.
        results: its tables, in Markdown; a heading of the first level is left out.
        settings: the study file.
    """
    return _page(study, _STUDY_CHARTS, title, _from_markdown(results), settings, "study")


def run_page(run: RunData, *, title: str, summary: Mapping[str, Any], settings: str) -> Page:
    """The report of one run.

    Args:
        run: its numbers.
        title: of the page.
        summary: what the run ended with, as a table.
        settings: the run's config.
    """
    rows = pd.DataFrame({"name": list(summary), "value": [_cell(value) for value in summary.values()]})
    return _page(run, _RUN_CHARTS, title, _table(rows, "What the run ended with"), settings, "run")


def _page(data: Data, charts: tuple[_Chart[Data], ...], title: str, results: Markup, settings: str, kind: str) -> Page:
    shown: list[dict[str, Any]] = []
    beside: dict[str, bytes] = {}
    missing = []
    for chart in charts:
        try:
            table, figure = chart.table(data), chart.draw(data)
        except NoData as reason:
            shown.append({"name": chart.name, "title": chart.title, "missing": _from_markdown(str(reason))})
            missing.append(f"{chart.title}: {reason}")
            continue
        # Laid out once, not for each file anew.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        alternative = f"{chart.title}. {chart.says(table)} The numbers are in the table below the figure."
        thinned = _thinned(table)
        shown.append(
            {
                "name": chart.name,
                "title": chart.title,
                "caption": chart.caption,
                "svg": _inline(figure, chart.name, alternative),
                "table": _table(thinned, f"Numbers of the figure “{chart.title}”"),
                "thinned": len(thinned) < len(table),
            }
        )
        beside |= _standalone(figure, chart.name)
    template = files("scalora.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    html = (
        Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .from_string(template)
        .render(
            title=title,
            kind=kind,
            results=results,
            charts=shown,
            settings=settings,
            light=dict(enumerate(SERIES)),
            dark=dict(enumerate(SERIES.values())),
            ink=(INK, DARK[INK]),
            grid=(GRID, DARK[GRID]),
            page_dark=PAGE_DARK,
        )
    )
    return Page(html, beside, missing)


def _standalone(figure: Figure, name: str) -> dict[str, bytes]:
    """PNG and SVG for papers and slides: on white, and with text as paths, since no page brings the font."""
    written = {}
    for suffix in ("png", "svg"):
        buffer = io.BytesIO()
        # No date and no random ids: the same data gives the same bytes.
        with rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
            figure.savefig(buffer, format=suffix, dpi=160, metadata={"Date": None} if suffix == "svg" else None)
        written[f"{name}.{suffix}"] = buffer.getvalue()
    return written


def _inline(figure: Figure, name: str, alternative: str) -> Markup:
    """The figure as an SVG element: text as text, the page's colours and font, ids that no other figure has."""
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            # Who made it, and a style that in HTML would be one for the whole page.
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {
            key.rpartition("}")[2]: _own_id(key, _themed(value), name) for key, value in element.attrib.items()
        }
    for size in ("width", "height"):
        del root.attrib[size]
    root.attrib |= {"role": "img", "aria-label": alternative}
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _themed(value: str) -> str:
    return re.sub(r"#[0-9a-f]{6}\b", lambda colour: _COLOURS.get(colour[0], colour[0]), value)


def _own_id(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    return re.sub(r"^#|url\(#", lambda reference: f"{reference[0]}{name}-", value) if "#" in value else value


def _thinned(table: pd.DataFrame) -> pd.DataFrame:
    """At most about `_STEPS_IN_TABLE` steps of each method, evenly spread, with the last."""
    if "step" not in table:
        return table
    groups = table.groupby("method", sort=False) if "method" in table else [("", table)]
    kept = []
    for _, rows in groups:
        every = max(1, math.ceil(len(rows) / _STEPS_IN_TABLE))
        kept.append(rows.iloc[(len(rows) - 1) % every :: every])
    return pd.concat(kept)


def _table(frame: pd.DataFrame, caption: str) -> Markup:
    """A real table in a region that can be scrolled with the keyboard."""
    columns = [str(column).replace("_", " ") for column in frame.columns]
    head = Markup("").join(Markup('<th scope="col">{}</th>').format(column) for column in columns)
    body = Markup("").join(
        Markup('<tr><th scope="row">{}</th>{}</tr>').format(
            _cell(first), Markup("").join(Markup("<td>{}</td>").format(_cell(value)) for value in rest)
        )
        for first, *rest in frame.itertuples(index=False)
    )
    return Markup("{}<thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>").format(_opening(caption), head, body)


def _opening(caption: str, *, seen: bool = True) -> Markup:
    """Of a region and its table; a caption that only repeats the heading above need not be seen."""
    look = Markup("") if seen else Markup(' class="said"')
    return Markup(
        '<div class="scroll" role="region" tabindex="0" aria-label="{0}"><table><caption{1}>{0}</caption>'
    ).format(caption, look)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(_cell(one) for one in value)
    if isinstance(value, float):
        return "—" if math.isnan(value) else f"{value:.0f}" if 1e4 <= abs(value) < math.inf else f"{value:.4g}"
    return "—" if value is None else str(value)


def _from_markdown(text: str) -> Markup:
    """Headings, paragraphs, lists and tables; each table gets a caption (the heading above it) and row headings."""
    reader = MarkdownIt("js-default").disable(["link", "image", "autolink"])
    tokens = reader.parse(re.sub(r"\A# .*\n", "", text))
    parts: list[str] = []
    heading = ""
    for place, token in enumerate(tokens):
        if token.type == "heading_open":
            heading = tokens[place + 1].content
        if token.type == "th_open":
            token.attrSet("scope", "col")
        if token.type == "td_open" and tokens[place - 1].type == "tr_open":
            closing = next(later for later in tokens[place:] if later.type == "td_close")
            token.tag = closing.tag = "th"
            token.attrSet("scope", "row")
        if token.type == "table_open":
            parts.append(_opening(heading, seen=False))
        elif token.type == "table_close":
            parts.append("</table></div>")
        else:
            parts.append(reader.renderer.render([token], reader.options, {}))
    return Markup("".join(parts))


def _at_the_end(value: str, what: str) -> Callable[[pd.DataFrame], str]:
    """A sentence on the last point of each method's curve."""

    def says(table: pd.DataFrame) -> str:
        last = table.groupby("method", sort=False).last()[value]
        return f"{what} at the end: " + "; ".join(f"{method} {number:.4g}" for method, number in last.items()) + "."

    return says


def _by_method(value: str, what: str) -> Callable[[pd.DataFrame], str]:
    def says(table: pd.DataFrame) -> str:
        pairs = zip(table["method"], table[value], strict=True)
        return f"{what}: " + "; ".join(f"{method} {number:.4g}" for method, number in pairs) + "."

    return says


def _at_the_best_rate(table: pd.DataFrame) -> str:
    best = table[table["best"]]
    pairs = zip(best["method"], best["learning_rate"], best["mean"], strict=True)
    return "At the learning rate reported: " + "; ".join(f"{m} {loss:.4g} at {rate:g}" for m, rate, loss in pairs) + "."


def _ends(*columns: str) -> Callable[[pd.DataFrame], str]:
    """A sentence on a run's first and last numbers."""

    def says(table: pd.DataFrame) -> str:
        ends = []
        for column in columns:
            known = table[column].dropna()
            if len(known):
                ends.append(f"{column.replace('_', ' ')} from {known.iloc[0]:.4g} to {known.iloc[-1]:.4g}")
        return "Over the run " + ", ".join(ends) + "."

    return says


def _range(value: str) -> Callable[[pd.DataFrame], str]:
    def says(table: pd.DataFrame) -> str:
        least, greatest = table.loc[table[value].idxmin()], table.loc[table[value].idxmax()]
        return f"From {least[value]:.4g} ({least['name']}) to {greatest[value]:.4g} ({greatest['name']})."

    return says


def _mean_residuals(table: pd.DataFrame) -> str:
    means = ", ".join(f"{kind} {table[kind].mean():.3g}" for kind in summaries.RESIDUALS)
    return f"Share of the gradient left uncaptured, mean over {len(table)} layers: {means}."


_BAND = "Mean over seeds at each method's best learning rate; the band is one standard error."

_STUDY_CHARTS: tuple[_Chart[StudyData], ...] = (
    _Chart(
        "final-metric",
        "Final metric of each method",
        "Mean over seeds with one standard error, best method on top; each stroke is one seed. The dashed line is the "
        "baseline.",
        summaries.final_metrics,
        figures.final_metric,
        _by_method("mean", "Mean over seeds, best first"),
    ),
    _Chart(
        "learning-rate-sensitivity",
        "Sensitivity to the learning rate",
        "Final evaluation loss over the learning rate, mean over the seeds that all rates were tried on; a ring marks "
        "the rate that the other figures are at. What is far off, a diverged run for one, is outside the frame and in "
        "the table.",
        summaries.loss_by_rate,
        figures.learning_rate_sensitivity,
        _at_the_best_rate,
    ),
    _Chart(
        "evaluation-loss-by-steps",
        "Evaluation loss against steps",
        _BAND,
        partial(summaries.mean_curve, name="eval_loss"),
        figures.loss_by_steps,
        _at_the_end("mean", "Evaluation loss"),
    ),
    _Chart(
        "evaluation-loss-by-seconds",
        "Evaluation loss against time",
        f"{_BAND} Time of training alone, without evaluations.",
        partial(summaries.mean_curve, name="eval_loss"),
        figures.loss_by_seconds,
        _at_the_end("seconds", "Seconds of training"),
    ),
    _Chart(
        "training-loss-by-steps",
        "Training loss against steps",
        f"Running mean over a tenth of the run. {_BAND}",
        partial(summaries.mean_curve, name="loss", smooth=True),
        partial(figures.loss_by_steps, name="loss"),
        _at_the_end("mean", "Training loss"),
    ),
    _Chart(
        "training-loss-by-seconds",
        "Training loss against time",
        f"Running mean over a tenth of the run. {_BAND}",
        partial(summaries.mean_curve, name="loss", smooth=True),
        partial(figures.loss_by_seconds, name="loss"),
        _at_the_end("seconds", "Seconds of training"),
    ),
    _Chart(
        "rank-of-the-update",
        "Rank of the total update",
        "Of the change of the weights since before training, mean over the tracked layers (Figure 2(b) of the ScaLoRA "
        "paper); the band is one standard error over seeds.",
        summaries.mean_ranks,
        figures.rank_by_steps,
        _at_the_end("numerical_rank", "Numerical rank"),
    ),
    _Chart(
        "share-on-column-scaling",
        "Share of layers on column scaling",
        f"The others take the scalar solution or are left alone (Figure 2(d) of the ScaLoRA paper). {_BAND}",
        partial(summaries.mean_curve, name="scalora/column_share"),
        figures.column_share_by_steps,
        _at_the_end("mean", "Share"),
    ),
    _Chart(
        "memory-and-speed",
        "Memory and time a step",
        "Mean over seeds with one standard error; the time is the median step's.",
        summaries.mean_costs,
        figures.memory_and_speed,
        _by_method("peak_memory_mib", "Peak memory in MiB"),
    ),
)

_HEAT_MAPS: tuple[tuple[LayerValue, str], ...] = (
    ("numerical_rank", "How many of the update's singular values exceed a thousandth of the largest."),
    (
        "effective_rank",
        "The exponential of the entropy of the update's singular values: a rank without a threshold.",
    ),
    ("norm", "Frobenius norm of the update."),
)

_RUN_CHARTS: tuple[_Chart[RunData], ...] = (
    _Chart(
        "loss",
        "Loss",
        "Training loss as logged and as a running mean over a tenth of the run, and evaluation loss.",
        summaries.losses,
        figures.run_loss,
        _ends("loss", "eval_loss"),
    ),
    _Chart(
        "rank-of-the-update",
        "Rank of the total update",
        "Of the change of the weights since before training: mean of the tracked layers, and the band from the least "
        "to the greatest.",
        summaries.rank_spread,
        figures.run_rank,
        _ends("numerical_rank_mean", "effective_rank_mean"),
    ),
    _Chart(
        "how-layers-were-scaled",
        "How layers were scaled",
        "Share of the layers that took the column solution, the scalar one, or were left as they were.",
        summaries.layer_shares,
        figures.scaling_shares,
        _ends("column", "scalar", "left_alone"),
    ),
    _Chart(
        "scaling-factors",
        "Scaling factors",
        "Median of all columns' factors, and the band from the 10th to the 90th percentile. At 1 (dashed) a column "
        "stays as it is.",
        summaries.factor_quantiles,
        figures.factors,
        _ends("alpha_p50", "beta_p50"),
    ),
    *(
        _Chart[RunData](
            f"layers-{value.replace('_', '-')}",
            f"{value.replace('_', ' ').capitalize()} of each layer's update",
            caption,
            summaries.layer_map,
            partial(figures.layer_heat_map, value=value),
            _range(value),
        )
        for value, caption in _HEAT_MAPS
    ),
    _Chart(
        "distance-to-the-oracle",
        "Distance to the oracle",
        "Share of the gradient's energy that one step leaves uncaptured: with the adapter as it is, with each scaling, "
        "with the one chosen, and with the best adapter of this rank there can be (from the gradient's SVD).",
        summaries.layer_residuals,
        figures.oracle_distance,
        _mean_residuals,
    ),
)

FILE_NAMES = frozenset(
    f"{chart.name}.{suffix}" for charts in (_STUDY_CHARTS, _RUN_CHARTS) for chart in charts for suffix in ("png", "svg")
)
"""Every file that a report may put beside its page."""
