"""What MkDocs builds the site with besides the pages of docs/: equations, the tutorial, and files outside docs/.

Equations become MathML when the site is built. Browsers typeset it themselves, so that a page needs no script and no
network, and an equation that can't be read is an error of the build. They need a font for mathematics, which phones
don't have: a part of STIX Two Math goes with the site.
"""

from __future__ import annotations

import html
import os
import re
from importlib.metadata import files as files_of
from pathlib import Path
from posixpath import normpath, relpath

import math_core
from fontTools import subset
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parent.parent

# Pages that are no file of docs/.
_PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
    "docs/tutorial.ipynb": "tutorial.md",
}
_GENERATED = {page: source for source, page in _PAGES.items() if page != "index.md"}

# The package ziamath has the font in it.
(_FONT,) = (file.locate() for file in files_of("ziamath") or () if file.name == "STIXTwoMath-Regular.ttf")

# Latin, Greek, accents, punctuation, arrows, operators, brackets and braces that grow, double-struck letters; browsers
# take the italic letters, Latin and Greek, for variables.
_CHARACTERS = [
    *range(0x20, 0x100),
    *range(0x2C6, 0x2DD),
    *range(0x300, 0x333),
    *range(0x391, 0x3F6),
    *range(0x2010, 0x2060),
    *range(0x2100, 0x2150),
    *range(0x2190, 0x2300),
    *range(0x23B4, 0x23E1),
    *range(0x27E6, 0x27F0),
    *range(0x1D434, 0x1D468),
    *range(0x1D538, 0x1D56C),
    *range(0x1D6E2, 0x1D71C),
]

_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)")
_EQUATION = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".sh": "bash", ".toml": "toml", ".md": "markdown"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are no file of docs/, and those of the source files that pages link to.

    Args:
        files: The files of docs/.
        config: That of MkDocs.

    Returns:
        The same, with the pages added.
    """
    if (notebook := files.get_file_from_path("tutorial.ipynb")) is not None:
        files.remove(notebook)
    texts = {file.src_uri: file.content_string for file in files.documentation_pages()}
    for page, source in _GENERATED.items():
        if source.endswith(".ipynb"):
            texts[page], pictures = _notebook(ROOT / source)
            for name, picture in pictures.items():
                files.append(File.generated(config, name, content=picture))
        else:
            texts[page] = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=texts[page]))
    linked = {path for page, text in texts.items() for path in _outside(page, text)}
    for path in sorted({*linked, *(one for folder in linked for one in _files_below(folder))}):
        files.append(File.generated(config, _source_page(path), content=_source(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to files outside docs/ to their pages.

    Args:
        markdown: The page's text.
        page: The page.
        config: That of MkDocs.
        files: All files of the site.

    Returns:
        The text with other links.
    """
    name = page.file.src_uri
    if name.startswith("source/"):
        return markdown
    return _LINK.sub(lambda link: relpath(_target(name, link[1]), os.path.dirname(name) or "."), markdown)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make MathML of the equations.

    Args:
        content: The page's HTML.
        page: The page.
        config: That of MkDocs.
        files: All files of the site.

    Returns:
        The HTML with MathML.

    Raises:
        PluginError: An equation is no LaTeX.
    """
    converter = math_core.LatexToMathML(annotation=True, fancy_error=False)

    def mathml(found: re.Match[str]) -> str:
        equation, displayed = html.unescape(found[3]), found[2] == "["
        try:
            typeset = converter.convert_with_local_state(equation, displaystyle=displayed)
        except math_core.LatexError as error:
            raise PluginError(f"{page.file.src_uri}: can't read the equation {equation!r}: {error}") from None
        return f'<div class="equation">{typeset}</div>' if displayed else typeset

    return _EQUATION.sub(mathml, content)


def on_post_build(config: MkDocsConfig) -> None:
    """Write the font of the equations.

    Args:
        config: That of MkDocs.
    """
    options = subset.Options(flavor="woff", layout_features=["*"], drop_tables=["DSIG"])
    font = subset.load_font(str(_FONT), options)
    subsetter = subset.Subsetter(options)
    subsetter.populate(unicodes=_CHARACTERS)
    subsetter.subset(font)
    subset.save_font(font, os.path.join(config.site_dir, "assets", "equations.woff"), options)


def _notebook(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its pictures by name."""
    text, resources = MarkdownExporter().from_filename(str(path), {"output_files_dir": path.stem})
    return text, resources["outputs"]


def _in_repository(page: str, link: str) -> str:
    """The path, from the root of the repository, that a link of a page leads to."""
    folder = os.path.dirname(_GENERATED.get(page, f"docs/{page}"))
    return normpath(os.path.join(folder, link))


def _target(page: str, link: str) -> str:
    """The page, from the root of the site, that a link leads to."""
    path = _in_repository(page, link)
    if path in _PAGES:
        return _PAGES[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else _source_page(path)


def _outside(page: str, text: str) -> list[str]:
    """The files and folders outside docs/ that a page links to, and that exist: MkDocs warns of the others."""
    paths = [_in_repository(page, link[1]) for link in _LINK.finditer(text)]
    return [path for path in paths if path not in _PAGES and not path.startswith("docs/") and (ROOT / path).exists()]


def _files_below(folder: str) -> list[str]:
    """The files in a folder and the folders in it."""
    paths = (path for path in (ROOT / folder).rglob("*") if "__pycache__" not in path.parts)
    return [path.relative_to(ROOT).as_posix() for path in paths]


def _source_page(path: str) -> str:
    return f"source/{path}.md"


def _source(path: str) -> str:
    """A page that shows a file, or lists a folder."""
    head = f"---\nsearch: {{exclude: true}}\n---\n\n# {path}\n\n"
    if (ROOT / path).is_dir():
        here = os.path.dirname(_source_page(path))
        below = (one for one in sorted(_files_below(path)) if (ROOT / one).is_file())
        return head + "\n".join(f"- [{one}]({relpath(_source_page(one), here)})" for one in below)
    text = (ROOT / path).read_text(encoding="utf-8")
    return f"{head}````````{_LANGUAGES.get(Path(path).suffix, 'text')}\n{text}````````\n"
