"""Says what runs need before anything is downloaded, and stops where it is not there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from scalora.bench.machine import machine, missing, shown
from scalora.bench.needs import Job, needs_of
from scalora.cli.run_output import print_rows
from scalora.runs.errors import InputError


def require_needs(jobs: Sequence[Job], output: Path, *, show: bool, title: str | None = None) -> None:
    """Stop if the machine lacks what runs need.

    Args:
        jobs: the runs.
        output: folder of their results.
        show: whether to print what they need.
        title: what they are for, printed with it.

    Raises:
        InputError: something is missing; one line with all that is.
    """
    needs, there = needs_of(jobs), machine(output)
    if show:
        print_rows(shown(needs, there, [("table", title)] if title else []))
        print(flush=True)
    if lacks := missing(needs, there):
        raise InputError(f"missing: {'; '.join(lacks)}")
