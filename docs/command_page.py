"""Writes docs/command.md, the page of the commands and their options: ``python docs/command_page.py``."""

from __future__ import annotations

import re
from pathlib import Path

import typer
from typer.cli import get_docs_for_click

from scalora.cli import app

PAGE = Path(__file__).with_name("command.md")

_INTRODUCTION = """\
# Commands

What `scalora` can do, and every option. Keys of a config can follow `train`, `evaluate` and `compare` as options, too
([config files](config.md)). This page is written by `python docs/command_page.py`.
"""


def page() -> str:
    """The text of the page."""
    command = typer.main.get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="scalora")
    _, *sections = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    sections = [re.sub(r"^```console\n\$ ", "```text\n", section, flags=re.MULTILINE) for section in sections]
    without_help = (section.replace("* `--help`: Show this message and exit.\n", "") for section in sections)
    return "\n".join([_INTRODUCTION, *(section.strip() + "\n" for section in without_help)])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
