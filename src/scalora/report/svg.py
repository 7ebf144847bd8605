"""A matplotlib figure as files beside the page, and as an SVG element in it that takes the page's colours and font."""

from __future__ import annotations

import io
import re
from xml.etree import ElementTree

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure

from scalora.report.figures import GRID, INK, SERIES

_COLOURS = {INK: "currentColor", GRID: "var(--grid)"} | {
    colour: f"var(--series-{place})" for place, colour in enumerate(SERIES)
}

_DPI = 220  # 1012 pixels across for a figure of a page


def standalone(figure: Figure, name: str) -> dict[str, bytes]:
    """PNG and SVG for papers and slides: on white, and with text as paths, because no page brings the font.

    Args:
        figure: already laid out.
        name: file name without suffix.

    Returns:
        The files' contents by name.
    """
    written = {}
    for suffix in ("png", "svg"):
        buffer = io.BytesIO()
        # No date and no random ids: the same data gives the same bytes.
        with rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
            figure.savefig(buffer, format=suffix, dpi=_DPI, metadata={"Date": None} if suffix == "svg" else None)
        written[f"{name}.{suffix}"] = buffer.getvalue()
    return written


def inline(figure: Figure, name: str, alternative: str) -> Markup:
    """The figure as an SVG element: text as text, the page's colours and font, and ids that no other figure has.

    Args:
        figure: already laid out.
        name: of the figure, unique in the page.
        alternative: text in place of the figure for those who can't see it.
    """
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            # The program's name, and a style that would apply to the whole page in HTML.
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
