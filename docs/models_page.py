"""Writes docs/models.md, the page of architectures, from trials of tiny models: ``python docs/models_page.py``.

It takes a quarter of an hour, most of it for architectures that turn out to be too large.
"""

from __future__ import annotations

import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import transformers

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from architecture_trials import PlainPeftFailsError, trained_and_shipped, tried_by_peft  # noqa: E402
from architectures import HEADS  # noqa: E402

PAGE = Path(__file__).with_name("models.md")
HEADER = "| architecture | head | adapted | dense | factored |"

_INTRODUCTION = """\
# Models

ScaLoRA takes what PEFT's LoRA takes. Every line below is a tiny model of an architecture in Transformers
{transformers}, made from its configuration class by shrinking its sizes, which PEFT {peft} adapts and trains. "Yes"
means that with ScaLoRA, and a dense or a factored remainder,

- after five steps with AdamW and a rescale before each, the loss is lower;
- one more rescale leaves the logits as they are, to 1e-5;
- the saved run, loaded into a fresh base, has the same logits, to 1e-6;
- the whole update has a higher rank than the adapter, and exported as an ordinary adapter and loaded by plain PEFT it
  has the same logits, to 1e-4.

A refusal names the module and comes before training. Architectures that are not here could not be made tiny by rules
that know nothing of them, or PEFT itself does not train them or does not load what it has saved of them.

This page is written by `python docs/models_page.py`, and every line of it is a test (`tests/test_architectures.py`).

"""


def table() -> list[str]:
    """The lines of the table."""
    lines, done = [HEADER, "| --- | --- | --- | --- | --- |"], set()
    for head, (_, kinds) in HEADS.items():
        for kind in sorted(set(kinds) - done):
            try:
                base, batch, targets = tried_by_peft(kind, head)
            except PlainPeftFailsError as error:
                print(f"left out: {kind}, {head}: {str(error)[:100]!r}", file=sys.stderr)
                continue
            done.add(kind)
            found = [_cell(trained_and_shipped(base, batch, targets, merge)) for merge in ("dense", "factored")]
            adapted = targets if isinstance(targets, str) else "by name"
            lines.append(f"| {' | '.join([kind, head, adapted, *found])} |")
    return lines


def _cell(refusal: str | None) -> str:
    """The reason of a refusal, which is between the module's name and what to do instead."""
    return "yes" if refusal is None else refusal.split(" is not supported: ")[-1].split("; ")[0].split(" (")[0]


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    versions = {name: version(name) for name in ("transformers", "peft")}
    PAGE.write_text(_INTRODUCTION.format(**versions) + "\n".join(table()) + "\n", encoding="utf-8")
