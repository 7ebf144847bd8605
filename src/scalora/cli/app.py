"""The command line: arguments in, one clear line out when something is wrong."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from scalora._version import __version__

# Click's own, of which newer versions of typer carry a copy.
_UsageError: Any = typer.BadParameter.__base__


class _OneLineErrors(TyperGroup):
    """Shows a wrong option as one line too, as `_in_one_line` does what is wrong with its value."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was named."""
        try:
            return super().invoke(ctx)
        except _UsageError as error:
            typer.echo(f"error: {error.format_message()}", err=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=_OneLineErrors,
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
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on from the run folder's last whole checkpoint (training.save_strategy)."),
    ] = False,
    debug: Debug = False,
) -> None:
    """Fine-tune a model and write a run folder: model, config, metrics, environment."""

    def run() -> None:
        from scalora.cli.settings import load_settings
        from scalora.cli.train import train as run_training

        run_training(load_settings(config, context.args), overwrite=overwrite, resume=resume)

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


@app.command(context_settings=_OVERRIDES)
def compare(
    context: typer.Context,
    study: Annotated[Path, typer.Argument(help="YAML file; any of its keys can be overridden with --key value.")],
    cores: Annotated[int | None, typer.Option(min=1, help="To use at once; all that there are when not given.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Of each run; as many runs at a time as cores / threads.")] = 1,
    table_only: Annotated[
        bool, typer.Option("--table-only", help="Run nothing: write the tables of what is finished.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Run methods, learning rates and seeds against each other and write a table; finished runs are kept."""

    def run() -> None:
        from scalora.cli.study import load_study_file

        wanted = load_study_file(study, context.args)
        if table_only:
            from scalora.cli.table_markdown import markdown, write_tables

            typer.echo(markdown(write_tables(wanted.folder)))
            return
        from scalora.cli.compare import compare as run_study

        if not run_study(wanted, cores=cores, threads=threads):
            sys.exit(1)

    _in_one_line(run, debug)


class ExportTarget(str, Enum):
    """What `scalora export` makes."""

    adapter = "adapter"
    merged = "merged"
    delta = "delta"


class ExportDtype(str, Enum):
    """Of the tensors that `scalora export` writes."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run folder, or one of its checkpoints.")],
    to: Annotated[
        ExportTarget,
        typer.Option(
            "--to", help="adapter: ordinary PEFT adapter; merged: whole model; delta: the exact state, for continuing."
        ),
    ] = ExportTarget.adapter,
    output: Annotated[Path | None, typer.Option(help="Folder to write; RUN/export-TO when not given.")] = None,
    rtol: Annotated[
        float | None,
        typer.Option(
            help="adapter: share of each layer's update (Frobenius norm) that may be left out; 0.001 when not given."
        ),
    ] = None,
    max_rank: Annotated[int | None, typer.Option(help="adapter: never more than this rank.")] = None,
    per_layer: Annotated[
        bool,
        typer.Option(
            "--per-layer",
            help="adapter: each layer its own rank. Smaller, but some serving engines want one rank for all.",
        ),
    ] = False,
    dtype: Annotated[ExportDtype, typer.Option(help="Of the tensors written.")] = ExportDtype.float32,
    debug: Debug = False,
) -> None:
    """Make something that others load out of a ScaLoRA run, and check it against the run."""

    def run_export() -> None:
        from scalora.cli.export import export as make

        make(run, to.value, output, rtol=rtol, max_rank=max_rank, per_layer=per_layer, dtype=dtype.value)

    _in_one_line(run_export, debug)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN|STUDY", help="The folder of a run or of a study.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder for report.html and figures/; that of the run or study when not given.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Make one HTML page, complete in itself, and its figures from a run or a study."""

    def run() -> None:
        from scalora.cli.report import report as make

        page = make(folder, output)
        for sentence in page.missing:
            typer.echo(f"left out: {sentence}")
        typer.echo(f"wrote {(output or folder) / 'report.html'} with {len(page.files) // 2} figures")

    _in_one_line(run, debug)


@app.command()
def inspect(
    run: Annotated[Path, typer.Argument(help="A run folder of any method, or one of its checkpoints.")],
    layers: Annotated[
        str | None, typer.Option(help="Only layers whose name contains this (a regular expression).")
    ] = None,
    batches: Annotated[
        int,
        typer.Option(
            min=0,
            help="Training batches whose gradients the next step is judged by; 0: leave that out. The gradients of all "
            "layers looked at are in memory together, as in full fine-tuning: --layers makes them fewer.",
        ),
    ] = 8,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Of the best adapter (oracle) it is held against; its own when not given.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="File to write; RUN/inspect.json when not given.")] = None,
    debug: Debug = False,
) -> None:
    """Look into a run, layer by layer: rank and size of the update, how good the next step would be, the factors."""

    def run_inspect() -> None:
        from scalora.cli.inspect_run import inspect_run, show
        from scalora.cli.run_folder import write_json

        inspected = inspect_run(run, layers=layers, batches=batches, rank=rank)
        show(inspected, str(run))
        target = output or run / "inspect.json"
        write_json(target, inspected)
        typer.echo(f"written to {target}")

    _in_one_line(run_inspect, debug)


def _in_one_line(command: Callable[[], Any], debug: bool) -> None:
    """Run a command; print an error as one line and exit with 2 for bad input, with 1 for anything else."""
    if not debug:
        # What they say of retries, and of errors that they raise as well, would bury the one line.
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        logging.getLogger("datasets").setLevel(logging.CRITICAL)
    try:
        command()
    except Exception as error:
        if debug:
            raise
        named = isinstance(error, (ValueError, OSError))
        message = " ".join(str(error).split()) or "no message"
        typer.echo(f"error: {message if named else f'{type(error).__name__}: {message}'}", err=True)
        sys.exit(2 if named else 1)
