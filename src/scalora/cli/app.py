"""The command line: arguments in, one clear line out when something is wrong."""

from __future__ import annotations

import logging
import os
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
        from scalora.runs.settings import load_settings
        from scalora.runs.train import train as run_training

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
        from scalora.cli.console import show_scores
        from scalora.runs.evaluate import evaluate as score
        from scalora.runs.run_folder import write_json
        from scalora.runs.settings import load_settings

        scores = score(model, load_settings(config, context.args))
        show_scores(scores)
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
        from scalora.studies.study import load_study_file

        wanted = load_study_file(study, context.args)
        if table_only:
            from scalora.studies.table_markdown import markdown, write_tables

            typer.echo(markdown(write_tables(wanted.folder)))
            return
        from scalora.studies.compare import compare as run_study

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
        from scalora.cli.console import show_export
        from scalora.runs.export import export as make

        target, report = make(
            run, to.value, output, rtol=rtol, max_rank=max_rank, per_layer=per_layer, dtype=dtype.value
        )
        show_export(report, target)

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
        from scalora.report.write import report as make

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
        from scalora.cli.console import show_inspected
        from scalora.runs.inspect import inspect_run
        from scalora.runs.run_folder import write_json

        inspected = inspect_run(run, layers=layers, batches=batches, rank=rank)
        show_inspected(inspected, str(run))
        target = output or run / "inspect.json"
        write_json(target, inspected)
        typer.echo(f"written to {target}")

    _in_one_line(run_inspect, debug)


@app.command()
def estimate(
    config: Annotated[Path, typer.Argument(help="A model's config.json, or the folder that holds it.")],
    r: Annotated[int | None, typer.Option(min=1, help="Rank of the adapter; 8.")] = None,
    target_modules: Annotated[
        str | None, typer.Option(help="Modules to adapt, with commas between; all-linear.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the base: float32, bfloat16 or float16; bfloat16.")] = None,
    quantization: Annotated[
        str | None, typer.Option(help="Of the base's linear layers: none, nf4 or int8; none.")
    ] = None,
    merge: Annotated[str | None, typer.Option(help="Where the remainder goes: auto, dense or factored; auto.")] = None,
    remainder_rank: Annotated[int | None, typer.Option(min=1, help="Of a factored remainder; 64.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Per step; 4096, one sequence of Llama 2's length.")] = None,
    bandwidth: Annotated[
        float | None, typer.Option(help="Of the machine's memory, GB/s; 3350, by NVIDIA's H100 SXM datasheet.")
    ] = None,
    tflops: Annotated[
        float | None,
        typer.Option(help="That the machine reaches; 0.4 of what the same datasheet says for the dtype (989, dense)."),
    ] = None,
    float32_tflops: Annotated[
        float | None,
        typer.Option(help="That it reaches in float32, as a rescale computes; 0.4 of the datasheet's 67, or --tflops."),
    ] = None,
    interval: Annotated[
        list[int] | None, typer.Option(min=1, help="Steps between rescales, may be given more than once; 1 and 10.")
    ] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Also write the estimate here as JSON.")] = None,
    debug: Debug = False,
) -> None:
    """Say what training a model would take with LoRA and with ScaLoRA, from its config alone."""

    def run() -> None:
        from scalora.bench.estimate import EstimateSettings, as_json, markdown
        from scalora.bench.estimate import estimate as make
        from scalora.runs.run_folder import write_json

        options = {
            "r": r,
            "target_modules": target_modules,
            "dtype": dtype,
            "quantization": quantization,
            "merge": merge,
            "remainder_rank": remainder_rank,
            "tokens": tokens,
            "bandwidth": bandwidth,
            "tflops": tflops,
            "float32_tflops": float32_tflops,
            "interval": tuple(interval) if interval else None,
        }
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        settings = EstimateSettings(config, **given)
        found = make(settings)
        typer.echo(markdown(settings, found))
        if json is not None:
            write_json(json, as_json(settings, found))

    _in_one_line(run, debug)


@app.command()
def bench(
    model: Annotated[
        str | None, typer.Argument(help="Folder or hub id of a causal language model; random weights when not given.")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="To measure against LoRA; scalora:10 rescales at every tenth step. scalora and scalora:10."),
    ] = None,
    width: Annotated[list[int] | None, typer.Option(min=64, help="Hidden size of the random model; 512.")] = None,
    layers: Annotated[list[int] | None, typer.Option(min=1, help="Layers of the random model; 4.")] = None,
    rank: Annotated[list[int] | None, typer.Option(min=1, help="r of the adapter; 8.")] = None,
    sequence: Annotated[list[int] | None, typer.Option(min=2, help="Tokens of a sequence; 256.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Of the base weights; float32.")] = None,
    merge: Annotated[list[str] | None, typer.Option(help="Where ScaLoRA's remainder goes; auto.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences per step.")] = 4,
    device: Annotated[str | None, typer.Option(help="cuda where there is one, else cpu.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Of interleaved steps; ratios are taken round by round.")] = 5,
    memory: Annotated[bool, typer.Option(help="Measure peak memory too, a process for each method.")] = True,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of torch on the CPU; its own choice when not given.")
    ] = None,
    native: Annotated[bool, typer.Option(help="Have ScaLoRA rescale in C++ (on a CPU).")] = False,
    output: Annotated[Path, typer.Option(help="Folder for the table, the figures and the data.")] = Path("runs/bench"),
    debug: Debug = False,
) -> None:
    """Measure what methods cost against LoRA, and a rescale against its floor.

    Of an option given more than once the first value is the base case; each other one is tried in its place alone.
    """
    # What torch's profiler says of itself on standard error; read when torch is loaded.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")

    def run() -> None:
        import torch

        from scalora.bench.bench import BenchSettings
        from scalora.bench.bench import bench as run_bench

        settings = BenchSettings(
            model=model,
            methods=method or ["scalora", "scalora:10"],
            width=width or [512],
            layers=layers or [4],
            rank=rank or [8],
            sequence=sequence or [256],
            dtype=dtype or ["float32"],
            merge=merge or ["auto"],  # type: ignore[arg-type]
            batch=batch,
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            rounds=rounds,
            memory=memory,
            threads=threads or torch.get_num_threads(),
            native=native,
        )
        typer.echo(run_bench(settings, output))

    _in_one_line(run, debug)


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
