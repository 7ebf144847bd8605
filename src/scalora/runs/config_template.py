"""The keys of a config as a commented YAML file, and as a list for ``--help``."""

from __future__ import annotations

import textwrap

from scalora.runs.config_keys import COMMON_KEYS, Key, Section, config_sections, our_defaults, value_text, yaml_text
from scalora.runs.tasks import Task

_WIDTH = 80

_HEADER = """\
# A config for `scalora train`: the keys with their defaults. Set model and
# data.train (and reward for grpo); any other line can be changed or deleted.
#
# Keys on the command line take precedence over the file:
#   scalora train run.yaml --model MODEL --data.train FILE --lora.r 16
# A key without a section is one of the top level, or else one of training.
#
# A line that starts with # and no space is a key that is not set.
"""


def config_template(task: Task = "sft", method: str | None = None, *, everything: bool = False) -> str:
    """A YAML config with comments, which is complete once ``model`` and ``data.train`` are set.

    Args:
        task: task of the run.
        method: method of the run, whose class is imported; None is ScaLoRA and imports nothing.
        everything: whether to list all keys of the sections ``lora`` and ``training``, not just the common ones.

    Raises:
        InputError: the method is unknown, or a package that it needs is not installed.
    """
    top, *sections = config_sections(task, method, libraries="all" if everything else "common")
    entries = [_entry(key, "", is_set=True) for key in top.keys]
    return "\n".join([_HEADER, *entries, *(section_template(section, everything=everything) for section in sections)])


def section_template(section: Section, *, everything: bool = True) -> str:
    """A section of a YAML config with comments.

    Args:
        section: the section, which is not the top level.
        everything: whether it has all of its keys.
    """
    common = COMMON_KEYS.get(section.name)
    more = "" if everything or common is None else " `scalora config --all` lists its other keys."
    entries = [_entry(key, "  ", is_set=key.fixed and (common is None or key.name in common)) for key in section.keys]
    content = "\n" + "\n".join(entries) if entries else " {}\n"
    return f"{_comment(section.help + more, '')}{section.name}:{content}"


def key_list() -> str:
    """The keys of a config by section, with type, default and meaning, for the help text of a command."""
    lines = ["Keys of the config, for the file or the command line:"]
    for section in config_sections():
        if section.name:
            lines += ["", *_wrapped(f"{section.name}: {section.help}", "  ")]
        if section.name in COMMON_KEYS:
            ours = ", ".join(f"{key}={value_text(value)}" for key, value in our_defaults(section.name).items())
            lines += _wrapped(f"Defaults: {ours}; see `scalora config --all`.", "      ")
        for key in section.keys:
            name = f"{section.name}.{key.name}" if section.name else key.name
            lines += _wrapped(f"{name}  [{key.type}; {key.default}]", "  ", hanging=4)
            lines += _wrapped(_plain(key.help), "      ")
    return "\n".join(lines) + "\n"


def _entry(key: Key, indent: str, *, is_set: bool) -> str:
    """The lines of a key in a template."""
    comments = _comment(_plain(key.help), indent) + _comment(f"[{key.type}; {key.default}]", indent)
    return f"{comments}{indent}{'' if is_set else '#'}{key.name}: {yaml_text(key.value)}\n"


def _plain(text: str) -> str:
    """Without the marks of argparse and of reStructuredText."""
    return text.replace("%%", "%").replace("``", "`")


def _comment(text: str, indent: str) -> str:
    return "".join(f"{line}\n" for line in _wrapped(text, f"{indent}# "))


def _wrapped(text: str, indent: str, hanging: int = 0) -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=indent,
        subsequent_indent=indent + " " * hanging,
        break_long_words=False,
        break_on_hyphens=False,
    )
