"""Errors of commands: one line, and an exit status."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from scalora.parallel.job import let_the_first_speak, let_the_lost_be_named
from scalora.runs.errors import DivergedError
from scalora.runs.messages import only_relevant_messages

Debug = Annotated[
    bool, typer.Option("--debug", help="Show the full traceback of an error, and all messages of the libraries.")
]

# Click's own, of which newer versions of typer carry a copy.
_UsageError: Any = typer.BadParameter.__base__


@contextmanager
def _usage_in_one_line() -> Iterator[None]:
    """Print a wrong option as one line and exit with 2, as `in_one_line` does for a wrong value."""
    try:
        yield
    except _UsageError as error:
        typer.echo(f"error: {error.format_message()}", err=True)
        raise typer.Exit(2) from None


class OneLineErrors(TyperGroup):
    """The command with its subcommands, whose errors are one line."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command's own options."""
        if not args:
            return super().parse_args(ctx, args)  # raises the help text
        # A shell leaves ~ alone after an equals sign.
        args = [re.sub(r"^(--[\w.-]+=)?~(?=/|$)", lambda m: (m[1] or "") + str(Path.home()), word) for word in args]
        with _usage_in_one_line():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the subcommand that was named."""
        with _usage_in_one_line():
            return super().invoke(ctx)


def in_one_line(command: Callable[[], Any], debug: bool) -> None:
    """Run a command; print an error as one line and exit with 2 for bad input, with 1 for anything else.

    Args:
        command: what to run.
        debug: whether to raise the error instead, and to show all messages of the libraries.
    """
    try:
        with nullcontext() if debug else only_relevant_messages():
            command()
    except Exception as error:
        if debug:
            raise
        let_the_first_speak()
        bad_input = isinstance(error, (ValueError, OSError))
        message = " ".join(str(error).split()) or "no message"
        named = bad_input or isinstance(error, DivergedError)
        typer.echo(f"error: {message if named else f'{type(error).__name__}: {message}'}", err=True)
        let_the_lost_be_named(error)
        sys.exit(2 if bad_input else 1)
