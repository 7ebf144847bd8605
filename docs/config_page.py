"""Writes docs/config.md, the page of all keys of a config, from the declarations: ``python docs/config_page.py``."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from scalora.rivals import METHODS
from scalora.runs.config_keys import config_sections
from scalora.runs.config_template import config_template, section_template

PAGE = Path(__file__).with_name("config.md")

LIBRARIES = ("transformers", "trl", "peft")

_INTRODUCTION = """\
# Config files

`scalora train run.yaml` reads a YAML file. A key on the command line takes precedence over the file, and the file over
the default. An unknown key stops the run, and the error names the nearest known one.

- `scalora config > run.yaml` writes the file below, which is complete once `model` and `data.train` are set.
- `scalora config --task classification` (or `regression`) writes it for those tasks, whose `training` section has the
  fields of `transformers.TrainingArguments`; `--task dpo` (`kto`, `orpo`, `reward`, `grpo`) for those of TRL's other
  trainers, with the fields of TRL's class and a learning rate of their own. GRPO needs `reward` too.
- `scalora config --method NAME` adds the options of another method, and has its learning rate.
- `scalora config --all` adds the keys of `lora` and `training` that are left out here.
- `scalora train --help` lists the keys too.

Values are checked before anything is done. Numbers are read as YAML 1.2 and Python read them: `1e-3`, `1_000` and
`0x1F` are numbers, `017` is refused. `yes`, `no`, `on`, `off`, dates and times are texts; `true` and `false` are the
truth values. A key or section that is there twice is an error. A single text stands for a list of one where only a list
is possible. In paths, `~` and `$NAME` stand for what they stand for in a shell. On the command line a value needs
quotes only if it begins with a bracket or brace, or is a text that looks like a number.

The libraries' keys and defaults are those of {versions}.
This page is written by `python docs/config_page.py`.
"""

_OPTIONS = """\
## Options of the methods

Other methods have no options.
"""


def page() -> str:
    """The text of the page."""
    versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    blocks = [_INTRODUCTION.format(versions=versions), f"```yaml\n{config_template()}```\n", _OPTIONS]
    methods_with: dict[str, list[str]] = {}
    for method in METHODS:
        (options,) = (section for section in config_sections(method=method) if section.name == "method_options")
        if options.keys:
            methods_with.setdefault(section_template(options._replace(help="")), []).append(method)
    for text, methods in methods_with.items():
        blocks += [f"### {', '.join(methods)}\n", f"```yaml\n{text}```\n"]
    return "\n".join(blocks)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
