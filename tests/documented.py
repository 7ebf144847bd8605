"""Code blocks of the docs: found in the Markdown, and the commands in them checked by the command's own parser."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

import typer
from markdown_it import MarkdownIt

from scalora.cli import app
from scalora.runs.harness_settings import harness_settings
from scalora.runs.settings import load_settings
from scalora.studies.study import load_study_file

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

# Before a block that no test can run, and before one that is a file of another program.
_MARK = re.compile(r"<!-- (not run|block): (.+?) -->\s*")

# Programs that are tried with what scalora exports, each in an environment of its own (benchmarks/serving).
OTHER_PROGRAMS = {"lm_eval", "mergekit-yaml", "mergekit-extract-lora", "convert_hf_to_gguf.py", "vllm"}
OTHER_PROGRAMS |= {"convert_lora_to_gguf.py"}


class Block(NamedTuple):
    """A code block, and the mark before it, such as ("not run", "needs a GPU")."""

    page: str
    line: int
    language: str
    text: str
    mark: tuple[str, str] | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(text, page):
    """The blocks of a page."""
    mark, found = None, []
    for token in MarkdownIt("gfm-like", {"linkify": False}).parse(text):
        if token.type == "html_block" and (match := _MARK.fullmatch(token.content)):
            mark = (match[1], match[2])
        elif token.type in ("fence", "code_block"):
            found.append(Block(page, token.map[0] + 1, token.info.strip() or "bash", token.content, mark))
            mark = None
        elif token.level == 0:
            mark = None
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page.read_text(encoding="utf-8"), page.name)]


def commands(text):
    """The commands of a shell block, as lists of words, without variables before them and redirections after them."""
    lines = re.sub(r"\\\n", " ", text).splitlines()
    for line in lines:
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
        lexer.whitespace_split = True
        command, skip = [], False
        for word in [*lexer, "&&"]:
            if set(word) <= set("&|;"):
                if command:
                    yield command
                command = []
            elif skip or set(word) <= set("<>"):
                skip = not skip
            elif command or not re.match(r"\w+=", word):
                command.append(word)


def check_command(words, folder):
    """Check a command of the docs by whatever parses it, in a folder to write files to."""
    program, *rest = words
    while program in ("torchrun", "accelerate"):  # what they start is named with -m
        module = rest.index("-m")
        program, rest = "python", rest[module:]
    if program == "python" and rest[:1] == ["-m"]:
        program, rest = ("scalora" if rest[1] == "scalora" else rest[1]), rest[2:]
    if program == "scalora":
        check_scalora(rest, folder)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(rest) <= set(targets), f"no target {rest}"
    elif program == "pip":
        assert rest[0] == "install"
        for extra in re.findall(r"\[(\w+)\]", " ".join(rest)):
            assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE), extra
    elif program == "python":
        _check_options(ROOT / rest[0], rest[1:])
    elif program.startswith(("scalora.", "gpu.")):
        above = ROOT / ("src" if program.startswith("scalora.") else "benchmarks")
        _check_options(above / f"{program.replace('.', '/')}.py", rest)
    elif not (ROOT / program).is_file():
        raise AssertionError(f"{program}: nothing here checks this program; mark the block as not run, with the reason")


def check_scalora(words, folder):
    """Parse the words after `scalora` as the command does, keys of a config included."""
    root = typer.main.get_command(app)
    name, *rest = words
    assert name in root.commands, f"scalora has no command {name!r}"
    context = root.commands[name].make_context(name, rest)
    options = [one for parameter in root.commands[name].params for one in parameter.opts if one.startswith("--")]
    if harness := context.params.get("harness"):
        assert not context.args
        harness_settings(harness)
    elif name in ("train", "evaluate"):
        load_settings(_config(context.params["config"], folder), context.args, options)
    elif name == "compare":
        load_study_file(_config(context.params["study"], folder, study=True), context.args, options)
    else:
        assert not context.args


def _config(named, folder, *, study=False):
    """A config file that a command of the docs names: that of the repository, or a short one in the place of others."""
    if (ROOT / named).is_file() and not study:
        return ROOT / named
    data = "{train: train.jsonl, eval: eval.jsonl}"
    text = f"model: MODEL\ndata: {data}\n"
    if study:
        text = f"output_dir: study\nseeds: [0]\nlearning_rates: [1e-3]\nrun: {{model: MODEL, data: {data}}}\n"
        text += "methods: {lora: {}}\n"
    path = folder / "of-the-docs.yaml"
    path.write_text(text)
    return path


def _check_options(script, words):
    """Check that a script exists and names every option."""
    assert script.is_file(), f"there is no {script}"
    text = script.read_text(encoding="utf-8")
    if script.parent.name == "paper":
        text += (script.parent / "synthetic.py").read_text()
    for word in words:
        if word.startswith("--"):
            assert f'"{word.partition("=")[0]}"' in text, f"{script.name} has no option {word}"
