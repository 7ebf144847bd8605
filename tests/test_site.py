"""The docs site: it builds without warnings, shows what the pages say, and is looked at in a browser on a phone.

Needs what `make` installs for it (the dependency group docs); the browser is that of test_report_in_browser.py.
"""

import functools
import http.server
import importlib
import inspect
import os
import re
import runpy
import shutil
import subprocess
import sys
import threading
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from markdown_it import MarkdownIt

import scalora

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
API = sorted(DOCS.glob("api-*.md"))
DOCUMENTED = [name for page in API for name in re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE)]
FRAMEWORKS = {
    "scalora.integrations.axolotl": "axolotl",
    "scalora.integrations.lightning": "lightning",
    "scalora.integrations.llamafactory": "llamafactory",
    "scalora.integrations.llamafactory_v1": "llamafactory",
    "scalora.integrations.swift": "swift",
}
LACKS = next((f"no {name}" for name in ("mkdocs", "math_core") if importlib.util.find_spec(name) is None), None)
needs_mkdocs = pytest.mark.skipif(LACKS is not None, reason=f"{LACKS}: pip install --group docs")
CHROMIUM = os.environ.get("CHROME_PATH") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


def build(config, site, *options):
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "-f", config, "-d", site, *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    built = build(ROOT / "mkdocs.yml", folder, "--strict")
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    return folder


def html_of(site, page):
    return (site / page.removesuffix(".md").removesuffix("index") / "index.html").read_text(encoding="utf-8")


class _Counts(HTMLParser):
    """How many of the elements that Markdown makes there are in an article, or in a text without one."""

    def __init__(self, text, *, article=True):
        super().__init__()
        self.counts, self._inside = Counter(), not article
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self._inside |= tag == "article"
        if self._inside and tag in ("table", "li", "pre", "h2", "h3", "blockquote", "ul", "ol", "tr"):
            self.counts[tag] += 1

    def handle_endtag(self, tag):
        self._inside &= tag != "article"


# The API pages say almost nothing in themselves.
SAME = sorted(page.name for page in DOCS.glob("*.md") if page not in API)


@needs_mkdocs
@pytest.mark.slow
def test_the_site_has_the_lists_tables_and_code_that_a_view_of_the_repository_has(site):
    # MkDocs' Markdown wants four spaces before what belongs to a list item, others two.
    for page in SAME:
        elsewhere = MarkdownIt("gfm-like", {"linkify": False}).render((DOCS / page).read_text(encoding="utf-8"))
        elsewhere = re.sub(r'<pre><code class="language-math">.*?</pre>', "", elsewhere, flags=re.DOTALL)
        assert _Counts(html_of(site, page)).counts == _Counts(elsewhere, article=False).counts, page


@needs_mkdocs
@pytest.mark.slow
def test_every_public_name_is_on_an_api_page(site):
    pages = "".join(html_of(site, page.name) for page in API)
    missing = [name for name in scalora.__all__ if f'id="scalora.{name}"' not in pages]
    assert missing == ["__version__"]


@needs_mkdocs
@pytest.mark.slow
def test_links_to_files_outside_the_docs_lead_to_pages_that_show_them(site):
    shown = (site / "source/recipes/launch/fsdp2.yaml/index.html").read_text(encoding="utf-8")
    assert "fsdp_version" in shown
    assert 'href="../source/recipes/launch/"' in html_of(site, "distributed.md")
    assert 'href="../contributing/#where-a-change-goes"' in html_of(site, "code-map.md")


@needs_mkdocs
@pytest.mark.slow
def test_what_is_broken_is_an_error_of_the_build(tmp_path):
    copied = shutil.copytree(DOCS, tmp_path / "docs", ignore=shutil.ignore_patterns("figures"))
    for name in ("src", "recipes", "CONTRIBUTING.md", "CHANGELOG.md", "mkdocs.yml"):
        (tmp_path / name).symlink_to(ROOT / name) if name != "mkdocs.yml" else shutil.copy(ROOT / name, tmp_path)
    (copied / "unused.md").write_text("# Unused\n\n[gone](gone.md), [nowhere](index.md#nowhere), [gone](../gone.py)\n")
    built = build(tmp_path / "mkdocs.yml", tmp_path / "site", "--strict")
    assert built.returncode == 1
    for problem in ("unused.md", "gone.md", "#nowhere", "gone.py"):
        assert problem in built.stderr, problem


@needs_mkdocs
def test_an_equation_that_is_none_is_an_error_that_names_the_page():
    from mkdocs.exceptions import PluginError

    hooks = runpy.run_path(str(DOCS / "site_hooks.py"))
    page = SimpleNamespace(file=SimpleNamespace(src_uri="method.md"))
    shown = hooks["on_page_content"](r'<span class="arithmatex">\(a &lt; b\)</span>', page, None, None)
    assert "<math>" in shown
    assert "&lt;" in shown
    with pytest.raises(PluginError, match=r"method.md: can't read the equation .*nosuchcommand"):
        hooks["on_page_content"](r'<div class="arithmatex">\[\nosuchcommand\]</div>', page, None, None)


def documented():
    """The documented objects, and the public methods that the documented classes define, by name."""
    for path in DOCUMENTED:
        module, _, name = path.rpartition(".")
        if importlib.util.find_spec(FRAMEWORKS.get(module, "torch")) is None:
            continue
        found = getattr(importlib.import_module(module), name)
        yield path, found
        if inspect.isclass(found) and found.__module__.startswith("scalora") and "integrations" not in path:
            for method, value in vars(found).items():
                value = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
                if inspect.isfunction(value) and not method.startswith("_") and value.__module__ == found.__module__:
                    yield f"{path}.{method}", value


def docstring_problems(name, found):
    text = inspect.getdoc(found) or ""
    if not text:
        return [f"{name}: no docstring"]
    if inspect.isclass(found) and issubclass(found, BaseException):
        return []
    kind = "Attributes" if inspect.isclass(found) and issubclass(found, tuple) else "Args"
    signature = inspect.signature(found)
    parameters = [one for one in signature.parameters.values() if one.name not in ("self", "cls")]
    named = [one.name for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
    section = text.partition(f"{kind}:\n")[2]
    problems = [f"{name}: {one} is not under {kind}" for one in named if not re.search(rf"^ +{one}: ", section, re.M)]
    returned = signature.return_annotation
    if inspect.isfunction(found) and returned not in (inspect.Signature.empty, None, "None", "Iterator[None]"):
        problems += [] if "Returns:" in text or "Yields:" in text else [f"{name}: no Returns"]
    return problems


@pytest.mark.slow
def test_what_the_api_pages_show_has_docstrings_with_all_arguments_and_returns():
    found = list(documented())
    assert len(found) > 40
    assert [problem for name, one in found for problem in docstring_problems(name, one)] == []


def test_a_docstring_that_lacks_something_is_found():
    def no_returns(one, two) -> int:
        """Do.

        Args:
            one: the one.
        """

    assert docstring_problems("f", no_returns) == ["f: two is not under Args", "f: no Returns"]


@pytest.fixture
def address(site):
    """Where the site is served on this machine."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@needs_mkdocs
@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: install one or name it in CHROME_PATH")
def test_on_a_phone_no_page_scrolls_sideways_equations_are_typeset_and_nothing_is_fetched_from_elsewhere(site, address):
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    nav = yaml.safe_load(re.sub(r"!!python\S+", "", (ROOT / "mkdocs.yml").read_text()))["nav"]
    pages = re.findall(r"[\w-]+\.md", str(nav))
    equations = 0
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme="dark").new_page()
        # Each page would make an index of the whole site for its search.
        page.add_init_script("window.Worker = class extends EventTarget { postMessage() {} }")
        seen = []
        page.on("request", lambda request: seen.append(request.url) if not request.url.startswith(address) else None)
        page.on("console", lambda message: seen.append(message.text))
        page.on("pageerror", lambda error: seen.append(str(error)))
        for name in pages:
            page.goto(address + name.removesuffix(".md").removesuffix("index"))
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, name
            shown = page.evaluate(
                """() => [...document.querySelectorAll("math")].map(one => {
                  const box = one.getBoundingClientRect(); return [box.width, box.height]; })"""
            )
            assert all(width > 4 and height > 4 for width, height in shown), name
            text = page.evaluate(
                """() => { const article = document.querySelector("article").cloneNode(true);
                  article.querySelectorAll("code, pre, annotation").forEach(one => one.remove());
                  return article.textContent; }"""
            )
            assert not re.search(r"\\(frac|tilde|mathrm|top)|\$[^$ ]+\$|\\\[", text), name
            equations += len(shown)
        assert page.evaluate("document.fonts.load('16px Equations').then(found => found.length)") == 1
        browser.close()
    assert equations > 80
    assert seen == []
