"""The command line: arguments in, one clear line out when something is wrong."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from scalora._version import __version__

app = typer.Typer(
    help="Fine-tune with ScaLoRA: LoRA's cost, without LoRA's rank.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
Config = Annotated[Path, typer.Argument(help="YAML file; any of its keys can be overridden with --key value.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"scalora {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command(context_settings=_OVERRIDES)
def train(
    context: typer.Context,
    config: Config,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run folder that exists.")] = False,
    debug: Debug = False,
) -> None:
    """Fine-tune a model and write a run folder: model, config, metrics, environment."""

    def run() -> None:
        from scalora.cli.settings import load_settings
        from scalora.cli.train import train as run_training

        run_training(load_settings(config, context.args), overwrite=overwrite)

    _in_one_line(run, debug)


@app.command(context_settings=_OVERRIDES)
def evaluate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A run folder, a model folder, a GGUF file or a hub id.")],
    config: Config,
    output: Annotated[Path | None, typer.Option("--output", help="Also write the scores here as JSON.")] = None,
    debug: Debug = False,
) -> None:
    """Score a model on the config's evaluation data."""

    def run() -> None:
        from scalora.cli.evaluate import evaluate as score
        from scalora.cli.evaluate import show
        from scalora.cli.run_folder import write_json
        from scalora.cli.settings import load_settings

        scores = score(model, load_settings(config, context.args))
        show(scores)
        if output is not None:
            write_json(output, scores)

    _in_one_line(run, debug)


def _in_one_line(command: Callable[[], Any], debug: bool) -> None:
    """Run a command; print an error as one line and exit with 2 for bad input, with 1 for anything else."""
    if not debug:
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries would bury the one line
    try:
        command()
    except Exception as error:
        if debug:
            raise
        named = isinstance(error, (ValueError, OSError))
        message = " ".join(str(error).split()) or "no message"
        typer.echo(f"error: {message if named else f'{type(error).__name__}: {message}'}", err=True)
        sys.exit(2 if named else 1)
