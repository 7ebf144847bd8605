"""The command line: arguments in, one clear line out when something is wrong."""

from __future__ import annotations

import os
import signal
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from scalora._version import __version__
from scalora.cli.cost import bench, estimate
from scalora.cli.one_line import Debug, OneLineErrors, in_one_line
from scalora.parallel.job import is_first, leave
from scalora.runs.errors import InputError


class _WithKeys(TyperCommand):
    """A command whose help lists the keys of a config."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help, then the keys."""
        from scalora.runs.config_template import key_list

        super().format_help(ctx, formatter)
        formatter.write(f"\n{key_list()}")


app = typer.Typer(
    cls=OneLineErrors,
    help="Fine-tune with ScaLoRA: LoRA's cost without LoRA's rank limit.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help is wider on 80 columns, and does not wait for rich to be imported
    pretty_exceptions_enable=False,
)


_OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
Config = Annotated[
    Path, typer.Argument(help="Config file (YAML). --key value and --section.key value override its keys.")
]
Gpus = Annotated[
    str | None,
    typer.Option(
        help="GPUs to use, such as 0,1,2,3. Each executes one run at a time; name it twice for two (default: all)."
    ),
]


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


@app.command(cls=_WithKeys, context_settings=_OVERRIDES)
def train(
    context: typer.Context,
    config: Config,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Move an earlier run in the folder aside, to NAME.earlier-N, and train anew."),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue from the last complete checkpoint in the run folder. Checkpoints are written according to "
            "training.save_strategy.",
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check everything and show what the run would do, with examples of what it would train on. Trains and "
            "writes nothing.",
        ),
    ] = False,
    debug: Debug = False,
) -> None:
    """Fine-tune a model.

    Writes a run folder with the model, the config, the metrics and the environment.
    """

    def run() -> None:
        from scalora.runs.settings import load_settings

        if overwrite and resume:
            raise InputError(
                "--overwrite trains anew, and --resume goes on with the run that is there: give one of them"
            )
        settings = load_settings(config, context.args, _options(context))
        from scalora.cli.run_output import show_plan, show_summary

        if settings.needs != type(settings.needs)() and is_first():
            from scalora.bench.needs import Job
            from scalora.cli.needs_output import require_needs

            require_needs([Job(settings.method, settings)], Path(settings.output_dir), show=dry_run)
        if dry_run:
            from scalora.runs.dry_run import dry_run as make_plan

            show_plan(make_plan(settings, overwrite=overwrite, resume=resume))
            return
        from scalora.runs.stopping import TerminatedError
        from scalora.runs.train import train as run_training
        from scalora.runs.unfinished import how_to_go_on, is_unfinished

        try:
            folder = run_training(settings, overwrite=overwrite, resume=resume)
        except (TerminatedError, KeyboardInterrupt) as stopped:
            run_folder = Path(settings.output_dir)
            if is_first() and is_unfinished(run_folder):
                typer.echo(f"error: run {str(run_folder)!r} was stopped: {how_to_go_on(run_folder)}", err=True)
            if isinstance(stopped, KeyboardInterrupt):
                raise
            # As the signal would have ended it: no other exit status says that to who has sent it.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        if is_first():
            show_summary(folder, settings)
        leave()

    in_one_line(run, debug)


class ConfigTask(str, Enum):
    """The tasks of a run."""

    sft = "sft"
    classification = "classification"
    regression = "regression"
    dpo = "dpo"
    kto = "kto"
    orpo = "orpo"
    reward = "reward"
    grpo = "grpo"


@app.command()
def config(
    task: Annotated[
        ConfigTask,
        typer.Option(
            help="sft, dpo, kto, orpo, grpo: a causal language model. classification, regression: a model with one "
            "label per text. reward: a model that scores answers."
        ),
    ] = ConfigTask.sft,
    method: Annotated[
        str | None, typer.Option(help="Fine-tuning method, whose options are added (default: scalora).")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="List all keys of lora and training, not just the common ones.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Print a config: keys, defaults and meaning.

    The file that `scalora config > run.yaml` makes is complete once model and data.train are set. --all lists all keys.
    """

    def run() -> None:
        from scalora.runs.config_template import config_template

        typer.echo(config_template(task.value, method, everything=everything), nl=False)

    in_one_line(run, debug)


@app.command(context_settings=_OVERRIDES)
def evaluate(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(help="Run folder, checkpoint, model folder, folder of an adapter, GGUF file, or hub id."),
    ],
    config: Annotated[
        str | None,
        typer.Argument(
            help="Config file (YAML). --key value and --section.key value override its keys. --harness needs none.",
            show_default=False,
        ),
    ] = None,
    harness: Annotated[
        list[str] | None,
        typer.Option(
            "--harness",
            metavar="KEY=VALUE",
            help="Score by lm-evaluation-harness: tasks=NAME,NAME and its other settings, such as num_fewshot=5, each "
            "after a --harness of its own.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            help="Also write the scores: to a JSON file (NAME.json), or to a folder, with the outputs for each "
            "example. The same command goes on from what a killed one left in the folder.",
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Score a model on the evaluation data of a config, or on tasks of lm-evaluation-harness.

    `scalora train --help` lists the keys of a config.
    """

    def run() -> None:
        path, words = _config_and_overrides(config, context.args)
        if harness:
            from scalora.runs.harness_settings import harness_settings

            wanted = harness_settings(harness)
            from scalora.cli.console import show_harness_scores
            from scalora.runs.harness import harness_scores
            from scalora.runs.scored_model import settings_of_model

            options = _options(context)
            settings = settings_of_model(model, path, words, options)
            show_harness_scores(harness_scores(model, settings, wanted, output))
            return
        if path is None:
            raise InputError("CONFIG is missing: give the file that says what to score on, or --harness")
        from scalora.runs.settings import load_settings

        settings = load_settings(path, words, _options(context))
        from scalora.cli.console import show_scores
        from scalora.runs.evaluate import evaluate as score
        from scalora.runs.run_folder import check_output, check_place, write_json

        file = output if output is not None and (output.suffix == ".json" or output.is_file()) else None
        if file is not None:
            check_place(file, "--output")
            check_output(file, "--output", {"weights", "examples"})
        scores = score(model, settings, output if file is None else None)
        if is_first():
            show_scores(scores)
            if file is not None:
                write_json(file, scores)
        leave()

    in_one_line(run, debug)


@app.command(context_settings=_OVERRIDES)
def compare(
    context: typer.Context,
    study: Annotated[Path, typer.Argument(help="Study file (YAML). --key value overrides its keys.")],
    cores: Annotated[int | None, typer.Option(min=1, help="CPU cores to use (default: all).")] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Threads per run; cores/threads runs execute in parallel without GPUs (default: 1)."),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Parallel runs, which share the cores; instead of --threads.")
    ] = None,
    gpus: Gpus = None,
    table_only: Annotated[
        bool,
        typer.Option(
            "--table-only",
            help="Train nothing; write the tables of the finished runs, of the study as it was run but for the keys "
            "given.",
        ),
    ] = False,
    debug: Debug = False,
) -> None:
    """Compare methods over learning rates and seeds, and write tables. Finished runs are kept."""

    def run() -> None:
        from scalora.studies.study import load_study_file

        wanted = load_study_file(study, context.args, _options(context))
        if table_only:
            from scalora.studies.finished_cells import check_finished_cells
            from scalora.studies.study import STUDY_FILE, study_of
            from scalora.studies.table_markdown import markdown, write_tables

            of_folder = study_of(wanted.folder)
            if context.args:
                words = [*context.args, "--output_dir", str(wanted.folder)]
                of_folder = load_study_file(wanted.folder / STUDY_FILE, words, _options(context))
            check_finished_cells(of_folder)
            typer.echo(markdown(write_tables(wanted.folder, of_folder)))
            return
        from scalora.cli.console import show_comparison
        from scalora.studies.compare import compare as run_study

        comparison = run_study(wanted, cores=cores, threads=threads, jobs=jobs, gpus=_names(gpus))
        show_comparison(comparison)
        if not comparison.complete:
            sys.exit(1)

    in_one_line(run, debug)


@app.command(context_settings=_OVERRIDES)
def reproduce(
    context: typer.Context,
    table: Annotated[
        str,
        typer.Argument(
            metavar="TABLE", help="glue, commonsense or math; or a recipe file (YAML). --key value overrides its keys."
        ),
    ],
    smoke: Annotated[
        bool,
        typer.Option(
            "--smoke",
            help="A few steps on a few examples, with one seed and one learning rate, of one task unless --only names "
            "others: to see that everything works before days are spent.",
        ),
    ] = False,
    only: Annotated[
        str | None,
        typer.Option(
            help="Tasks and methods to run, separated by commas (default: all). Naming only tasks keeps all methods, "
            "and the other way round."
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Say what it needs, and whether it is there. Downloads at most a model's config; trains and writes "
            "nothing.",
        ),
    ] = False,
    table_only: Annotated[
        bool, typer.Option("--table-only", help="Train nothing; write the table of the runs that are finished.")
    ] = False,
    write: Annotated[
        Path | None, typer.Option("--write", help="Write the recipe to this file, to change it, and do nothing else.")
    ] = None,
    gpus: Gpus = None,
    debug: Debug = False,
) -> None:
    """Reproduce a table of the paper, and write it next to the paper's figures. Finished runs are kept."""

    def run() -> None:
        from scalora.studies.reproduction import load_recipe, write_recipe

        if write is not None:
            write_recipe(table, write)
            typer.echo(f"wrote {write}")
            return
        wanted = load_recipe(table, context.args, _options(context), only=_names(only) or [], smoke=smoke)
        from scalora.studies.reproduction_table import reproduction_markdown, write_table

        if table_only:
            typer.echo(reproduction_markdown(write_table(wanted)))
            return
        from scalora.bench.needs import jobs_of
        from scalora.cli.console import show_reproduced
        from scalora.cli.needs_output import require_needs
        from scalora.studies.reproduce import reproduce as run_table

        if dry_run:
            typer.echo("dry run: nothing but a model's config is downloaded, nothing trained or written\n")
        require_needs(jobs_of(wanted), wanted.folder, show=dry_run, title=wanted.recipe.title)
        if dry_run:
            return
        reproduced = run_table(wanted, gpus=_names(gpus))
        show_reproduced(reproduced)
        if not reproduced.complete:
            sys.exit(1)

    in_one_line(run, debug)


class ExportTarget(str, Enum):
    """The forms of an export."""

    adapter = "adapter"
    merged = "merged"
    delta = "delta"


class ExportDtype(str, Enum):
    """The dtypes of exported tensors."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class ExportQuantization(str, Enum):
    """The quantisations of a base."""

    nf4 = "nf4"
    int8 = "int8"


@app.command()
def export(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER", help="Run folder, output folder of a Trainer, folder of a saved model, or checkpoint."
        ),
    ],
    to: Annotated[
        ExportTarget,
        typer.Option(
            "--to",
            help="adapter: an ordinary PEFT adapter. merged: the whole model. delta: the exact state, to resume from.",
        ),
    ] = ExportTarget.adapter,
    output: Annotated[Path | None, typer.Option(help="Folder to write (default: FOLDER/export-TO).")] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Base model: hub id, folder or GGUF file (default: the one that training loaded)."),
    ] = None,
    base_dtype: Annotated[
        ExportDtype | None,
        typer.Option(help="dtype to load the base in, if the folder does not say it (default: that of training)."),
    ] = None,
    quantization: Annotated[
        ExportQuantization | None,
        typer.Option(help="How to quantise the base, if the folder does not say it (default: as in training)."),
    ] = None,
    base_name: Annotated[
        str | None,
        typer.Option(help="adapter: what it names as its base (default: where the base was loaded from)."),
    ] = None,
    rtol: Annotated[
        float | None,
        typer.Option(
            help="adapter: share of each layer's update, in the Frobenius norm, that may be left out (default: 0.001)."
        ),
    ] = None,
    max_rank: Annotated[int | None, typer.Option(help="adapter: maximum rank (default: no limit).")] = None,
    per_layer: Annotated[
        bool,
        typer.Option(
            "--per-layer",
            help="adapter: give each layer its own rank. Smaller, but some serving engines need one rank for all.",
        ),
    ] = False,
    dtype: Annotated[ExportDtype, typer.Option(help="dtype of the exported tensors.")] = ExportDtype.float32,
    skip_loss: Annotated[
        bool,
        typer.Option(
            "--skip-loss",
            help="Do not compare the evaluation loss with the run's, as where data.eval is no longer there.",
        ),
    ] = False,
    debug: Debug = False,
) -> None:
    """Export the result of training with ScaLoRA as an adapter or a model. The export is verified after writing."""

    def run_export() -> None:
        from scalora.cli.console import show_export
        from scalora.runs.export import export as make

        target, report = make(
            run,
            to.value,
            output,
            rtol=rtol,
            max_rank=max_rank,
            per_layer=per_layer,
            dtype=dtype.value,
            base=base,
            base_dtype=base_dtype and base_dtype.value,
            quantization=quantization and quantization.value,
            name=base_name,
            with_loss=not skip_loss,
        )
        show_export(report, target)

    in_one_line(run_export, debug)


@app.command()
def report(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN|STUDY|TABLE", help="Folder of a run, a study or a table of `reproduce`.")
    ],
    output: Annotated[
        Path | None, typer.Option(help="Folder for report.html and figures/ (default: that of the run or study).")
    ] = None,
    debug: Debug = False,
) -> None:
    """Write an HTML page with figures for a run or a study, or a page for a table. The page is self-contained."""

    def run() -> None:
        from scalora.report.write import report as make

        page = make(folder, output)
        for sentence in page.missing:
            typer.echo(f"left out: {sentence}")
        typer.echo(f"wrote {(output or folder) / 'report.html'} with {len(page.files) // 2} figures")

    in_one_line(run, debug)


@app.command()
def inspect(
    run: Annotated[Path, typer.Argument(help="Run folder of any method, or one of its checkpoints.")],
    layers: Annotated[
        str | None,
        typer.Option(help="Only layers whose name contains a match of this regular expression (default: all)."),
    ] = None,
    batches: Annotated[
        int,
        typer.Option(
            min=0,
            help="Training batches for the gradient that the next step is judged by; 0 leaves that out. The gradients "
            "of all selected layers are in memory at once, as in full fine-tuning; --layers selects fewer. Left out "
            "for grpo.",
        ),
    ] = 8,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="Rank of the oracle, the best adapter for the step (default: the run's own)."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file to write (default: RUN/inspect.json).")] = None,
    debug: Debug = False,
) -> None:
    """Analyse the layers of a run.

    Prints the rank and size of each layer's update, the quality of the next step, and the rescaling factors.
    """

    def run_inspect() -> None:
        from scalora.cli.console import show_inspected
        from scalora.runs.inspect import inspect_run
        from scalora.runs.run_folder import check_output, check_place, write_json

        target = output or run / "inspect.json"
        if output is not None:
            check_place(output, "--output")
        check_output(target, "--output", {"step", "layers", "factors"})
        inspected = inspect_run(run, layers=layers, batches=batches, rank=rank)
        show_inspected(inspected, str(run))
        write_json(target, inspected)
        typer.echo(f"written to {target}")

    in_one_line(run_inspect, debug)


app.command()(estimate)
app.command()(bench)


def _names(listed: str | None) -> list[str] | None:
    """The names in an option's list with commas."""
    return None if listed is None else [name.strip() for name in listed.split(",")]


def _config_and_overrides(config: str | None, words: list[str]) -> tuple[Path | None, list[str]]:
    """Tell a config from an override, which stands in its place where there is none."""
    if config is None or not config.startswith("--"):
        return None if config is None else Path(config), words
    return None, [config, *words]


def _options(context: typer.Context) -> list[str]:
    """The options of a command, such as ``--overwrite``."""
    options = (option for parameter in context.command.get_params(context) for option in parameter.opts)
    return [option for option in options if option.startswith("--")]
