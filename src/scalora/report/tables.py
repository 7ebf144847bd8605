"""HTML tables of a report: from data frames and from Markdown, with captions, row headers, and a layout for phones.

No table scrolls inside the page. Tables with many columns have a class: where they have no room, the page's style
stacks their rows and puts each column's heading, which every cell repeats in ``data-label``, before the value. Some
browsers don't take stacked rows for a table, so all parts have ARIA roles.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from html import escape
from typing import Any

import pandas as pd  # type: ignore[import-untyped]
from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup

# Classes of tables by their least number of columns. The page's style has the width that each needs.
_CLASSES = ((6, "wide"), (5, "middle"))

# Columns of a frame that make one column of the page: endings, a heading for what they say, and a format for its cells.
_MERGED: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("_mean", "_min", "_max"), "{}: mean (range)", "{0} ({1} to {2})"),
    (("_p50", "_p10", "_p90"), "{}: median (10–90 %)", "{0} ({1} to {2})"),
    (("", "_error"), "{} ± standard error", ""),
)


def table_of(frame: pd.DataFrame, caption: str) -> Markup:
    """A data frame as a table whose first column heads its rows.

    Args:
        frame: columns of numbers, texts or lists. A value and its error, a mean and its range, a median and its
            quantiles share a column of the table.
        caption: of the table.
    """
    frame = _merged(frame)
    columns = [str(column).replace("_", " ") for column in frame.columns]
    head = Markup("").join(
        Markup('<th scope="col" role="columnheader">{}</th>').format(_breakable(escape(column))) for column in columns
    )
    body = Markup("").join(
        Markup('<tr role="row"><th scope="row" role="rowheader">{}</th>{}</tr>').format(
            cell_text(first),
            Markup("").join(
                Markup('<td role="cell" data-label="{}">{}</td>').format(column, cell_text(value))
                for column, value in zip(columns[1:], rest, strict=True)
            ),
        )
        for first, *rest in frame.itertuples(index=False)
    )
    return Markup(
        '{}<thead role="rowgroup"><tr role="row">{}</tr></thead><tbody role="rowgroup">{}</tbody></table></div>'
    ).format(_opening(caption, len(columns)), head, body)


def cell_text(value: Any) -> str:
    """A value as a cell of a table shows it, numbers with four significant digits.

    Args:
        value: a number, a text, a truth value, None, or a list of these.
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(cell_text(one) for one in value)
    if isinstance(value, float):
        return "—" if math.isnan(value) else f"{value:.0f}" if 1e4 <= abs(value) < math.inf else f"{value:.4g}"
    return "—" if value is None else str(value)


def with_error(value: float, error: float, sign: str = "") -> str:
    """A value with its error, both to the place of the error's second digit; with four digits where there is no error.

    Args:
        value: the value.
        error: its standard error; NaN if unknown.
        sign: ``"+"`` to write the sign of a positive value too.
    """
    if not 0 < error < math.inf:
        return f"{value:{sign}.4g}"
    places = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:{sign}.{places}f} ± {error:.{places}f}"


def html_from_markdown(text: str) -> Markup:
    """Headings, paragraphs, lists and tables in Markdown as HTML.

    A heading of the first level is left out, and those of the second become third, below the headings of the page. The
    caption of a table is the heading above it. Links and images stay text.

    Args:
        text: in Markdown.
    """
    reader = MarkdownIt("js-default").disable(["link", "image", "autolink"])
    tokens = reader.parse(re.sub(r"\A# .*\n", "", text))
    parts: list[str] = []
    heading, labels, column = "", [], 0
    for place, token in enumerate(tokens):
        if token.tag == "h2":
            token.tag = "h3"
        if token.type == "heading_open":
            heading = tokens[place + 1].content
        elif token.type == "table_open":
            labels = _labels(tokens[place:])
        elif token.type == "tr_open":
            column = 0
        elif token.type == "td_open":
            _mark_cell(tokens[place:], labels, column)
            column += 1
        if role := _ROLES.get(token.type):
            token.attrSet("role", role)
        if token.type == "th_open":
            token.attrSet("scope", "col")
        if token.type == "table_open":
            parts.append(_opening(heading, len(labels)))
        elif token.type == "table_close":
            parts.append("</table></div>")
        else:
            rendered = reader.renderer.render([token], reader.options, {})
            parts.append(_breakable(rendered) if tokens[place - 1].type == "th_open" else rendered)
    return Markup("".join(parts))


_ROLES = {"thead_open": "rowgroup", "tbody_open": "rowgroup", "tr_open": "row", "th_open": "columnheader"}


def _mark_cell(tokens: Sequence[Token], labels: list[str], column: int) -> None:
    """Make the first cell of a row its header, and give the others the heading of their column."""
    opening = tokens[0]
    if column:
        opening.attrSet("role", "cell")
        opening.attrSet("data-label", labels[column])
        return
    closing = next(later for later in tokens if later.type == "td_close")
    opening.tag = closing.tag = "th"
    opening.attrSet("scope", "row")
    opening.attrSet("role", "rowheader")


def _labels(tokens: Sequence[Token]) -> list[str]:
    """The headings of a table's columns."""
    end = next(place for place, token in enumerate(tokens) if token.type == "thead_close")
    return [tokens[place + 1].content for place in range(end) if tokens[place].type == "th_open"]


def _opening(caption: str, columns: int) -> str:
    """The beginning of a table. Its caption repeats the heading above it, and is for screen readers only."""
    width = next((f" {name}" for least, name in _CLASSES if columns >= least), "")
    return Markup(f'<div class="fit{width}"><table role="table"><caption class="said">{escape(caption)}</caption>')


def _breakable(html: str) -> Markup:
    """Text that a browser may break after the dots and underscores of a name."""
    return Markup(re.sub(r"([._])(?=\w)", r"\1<wbr>", html))


def _merged(frame: pd.DataFrame) -> pd.DataFrame:
    """The columns as the table shows them, those that belong together merged into one."""
    frame = frame.rename(columns={"standard_error": "mean_error"}) if "mean" in frame else frame
    families: dict[str, tuple[str, str, list[str]]] = {}
    for column in frame.columns:
        for endings, heading, form in _MERGED:
            name = column.removesuffix(endings[0])
            family = [f"{name}{ending}" for ending in endings]
            if family[0] == column and set(family) <= set(frame.columns):
                families |= dict.fromkeys(family, (heading.format(name), form, family))
    shown: dict[str, list[str]] = {}
    for column in frame.columns:
        heading, form, family = families.get(column, (column, "{0}", [column]))
        if heading not in shown:
            rows = zip(*(frame[member] for member in family), strict=True)
            shown[heading] = [_together(form, values) for values in rows]
    return pd.DataFrame(shown)


def _together(form: str, values: tuple[Any, ...]) -> str:
    """Some values in one cell by a format; a value with its error by none."""
    return form.format(*map(cell_text, values)) if form else with_error(*values)
