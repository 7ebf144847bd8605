"""One HTML page with every figure of a study or a run: self-contained, for dark and light, for print and phones.

The figures are inline SVG whose colours are the page's, so that one drawing serves both colour schemes. Each has a text
alternative and a table of its numbers. There is no script, and nothing scrolls but the page itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import pandas as pd  # type: ignore[import-untyped]
from jinja2 import Environment
from markupsafe import Markup

from scalora.report.charts import RUN_CHARTS, STUDY_CHARTS, Chart, Data
from scalora.report.facts import Fact
from scalora.report.figures import DARK, GRID, INK, PAGE_DARK, SERIES
from scalora.report.summaries import NoData, RunData, StudyData
from scalora.report.svg import inline, standalone
from scalora.report.tables import cell_text, html_from_markdown, table_of

# The table below a figure has about so many steps of each method: enough to read a curve off.
_STEPS_IN_TABLE = 12


@dataclass(frozen=True)
class Page:
    """A report.

    Attributes:
        html: the page.
        files: the files to write beside it, by name: a PNG and an SVG of each figure.
        missing: one sentence for each reason why figures are left out, with their titles and the command that adds
            them.
    """

    html: str
    files: dict[str, bytes]
    missing: list[str]


@dataclass(frozen=True)
class Opening:
    """What a page begins with.

    Attributes:
        title: the page's heading.
        subtitle: the line below it.
        verdict: the result in a sentence; may be empty.
        facts: what someone wants to know first.
    """

    title: str
    subtitle: str
    verdict: str
    facts: Sequence[Fact]


def study_page(study: StudyData, opening: Opening, *, tables: str, settings: str) -> Page:
    """The report of a study.

    Args:
        study: the numbers of its figures.
        opening: what the page begins with.
        tables: the study's tables, in Markdown.
        settings: the study file.
    """
    return _page(study, STUDY_CHARTS, opening, kind="study", tables=html_from_markdown(tables), settings=settings)


def run_page(run: RunData, opening: Opening, *, summary: Mapping[str, Any], settings: str) -> Page:
    """The report of one run.

    Args:
        run: the numbers of its figures.
        opening: what the page begins with.
        summary: everything that the run recorded at its end, shown as a table; may be empty.
        settings: the run's config.
    """
    rows = pd.DataFrame({"name": list(summary), "value": [cell_text(value) for value in summary.values()]})
    tables = table_of(rows, "The run's summary") if summary else Markup("")
    return _page(run, RUN_CHARTS, opening, kind="run", tables=tables, settings=settings)


def table_page(opening: Opening, *, tables: str, settings: str) -> Page:
    """The report of a recipe's table.

    Args:
        opening: what the page begins with.
        tables: the tables, in Markdown.
        settings: the recipe.
    """
    return _rendered(opening, [], {}, {}, kind="table", tables=html_from_markdown(tables), settings=settings)


def _page(
    data: Data, charts: tuple[Chart[Data], ...], opening: Opening, *, kind: str, tables: Markup, settings: str
) -> Page:
    shown: list[dict[str, Any]] = []
    beside: dict[str, bytes] = {}
    reasons: dict[str, list[str]] = {}
    for chart in charts:
        try:
            content, written = _drawn(chart, data)
        except NoData as reason:
            reasons.setdefault(str(reason), []).append(chart.title)
        else:
            shown.append(content)
            beside |= written
    return _rendered(opening, shown, beside, reasons, kind=kind, tables=tables, settings=settings)


def _rendered(
    opening: Opening,
    charts: list[dict[str, Any]],
    beside: dict[str, bytes],
    reasons: Mapping[str, list[str]],
    *,
    kind: str,
    tables: Markup,
    settings: str,
) -> Page:
    missing = [f"{', '.join(titles)}: {reason}" for reason, titles in reasons.items()]
    template = files("scalora.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    html = (
        Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .from_string(template)
        .render(
            kind=kind,
            opening=opening,
            charts=charts,
            tables=tables,
            settings=settings,
            missing=[html_from_markdown(sentence) for sentence in missing],
            light=dict(enumerate(SERIES)),
            dark=dict(enumerate(SERIES.values())),
            ink=(INK, DARK[INK]),
            grid=(GRID, DARK[GRID]),
            page_dark=PAGE_DARK,
        )
    )
    return Page(html, beside, missing)


def _drawn(chart: Chart[Data], data: Data) -> tuple[dict[str, Any], dict[str, bytes]]:
    """A figure as the template shows it, and as files beside the page."""
    table, figure = chart.table(data), chart.draw(data)
    # Laid out once, not again for each file.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    alternative = f"{chart.title}. {chart.says(table)} The numbers are in the table below the figure."
    thinned = _thinned(table)
    content = {
        "name": chart.name,
        "title": chart.title,
        "caption": chart.caption,
        "svg": inline(figure, chart.name, alternative),
        "table": table_of(thinned, f"Numbers of the figure “{chart.title}”"),
        "thinned": len(thinned) < len(table),
    }
    return content, standalone(figure, chart.name)


def _thinned(table: pd.DataFrame) -> pd.DataFrame:
    """At most about `_STEPS_IN_TABLE` rows of each method's curve, evenly spaced, with the last."""
    if "step" not in table:
        return table
    groups = table.groupby("method", sort=False) if "method" in table else [("", table)]
    kept = []
    for _, rows in groups:
        every = max(1, math.ceil(len(rows) / _STEPS_IN_TABLE))
        kept.append(rows.iloc[(len(rows) - 1) % every :: every])
    return pd.concat(kept)
