"""``scalora report``: one page and its figures, from the folder of a study or of a run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd  # type: ignore[import-untyped]

from scalora.runs.errors import InputError
from scalora.runs.run_folder import json_lines
from scalora.runs.settings import run_settings
from scalora.saving.files import atomic_folder, atomic_write, naming_errors
from scalora.studies.reproduction import REPRODUCTION_FILE, reproduction_of
from scalora.studies.reproduction_table import read_reproduction, reproduction_markdown
from scalora.studies.study import STUDY_FILE
from scalora.studies.table import StudyResult, load_study
from scalora.studies.table_markdown import markdown

if TYPE_CHECKING:
    from scalora.report.page import Page
    from scalora.report.summaries import RunData, StudyData

_UPDATE_COLUMNS = ["step", "layer", "numerical_rank", "effective_rank", "norm", "singular_values"]
# The end of a report's title, by which one is recognised.
_TITLE = " · scalora report</title>"

_LAYER_COLUMNS = ["name", "numerical_rank", "effective_rank", "norm", "residual"]


def report(folder: Path, output: Path | None = None) -> Page:
    """Write ``report.html`` and ``figures/`` for a study, a recipe's table or a run.

    Args:
        folder: folder of the study, the table or the run.
        output: folder to write to; `folder` itself when None.

    Returns:
        The page, whose `missing` says which figures were left out and which commands add them.

    Raises:
        InputError: the folder is neither a study's nor a run's, or can't be read; the output folder has figures that no
            report has written; or matplotlib is missing.
        OSError: the report can't be written.
    """
    try:
        import matplotlib  # noqa: F401 - the extra is for it
    except ImportError:
        raise InputError("`scalora report` needs matplotlib: pip install 'scalora[report]'") from None
    output = folder if output is None else output
    figures = output / "figures"
    _check_replaceable(output / "report.html", figures)
    if (folder / REPRODUCTION_FILE).is_file():
        page = _table_page(folder)
    else:
        page = _study_page(folder) if (folder / STUDY_FILE).is_file() else _run_page(folder)
    with naming_errors(output):
        output.mkdir(parents=True, exist_ok=True)
    if page.files or figures.exists():
        with atomic_folder(figures, replace=True) as temporary:
            for name, content in page.files.items():
                (temporary / name).write_bytes(content)
    with atomic_write(output / "report.html") as temporary:
        temporary.write_text(page.html, encoding="utf-8")
    return page


def read_study(folder: Path) -> StudyData:
    """The numbers behind a study's figures, from its finished runs.

    Args:
        folder: folder of the study.

    Raises:
        InputError: it is not the folder of a study, or can't be read.
    """
    return _study(folder)[0]


def read_run(folder: Path) -> RunData:
    """The numbers behind a run's figures, finished or not.

    Args:
        folder: folder of the run.

    Raises:
        InputError: it is not the folder of a run, or can't be read.
    """
    from scalora.report.summaries import RunData

    run_settings(folder)
    try:
        inspected = _json(folder / "inspect.json")
        layers = pd.DataFrame(inspected.get("layers", [])).reindex(columns=_LAYER_COLUMNS)
        if inspected.get("step") != _json(folder / "summary.json").get("steps", inspected.get("step")):
            layers = layers.iloc[:0]  # of an earlier state of the run, or of a checkpoint
        run = RunData(
            metrics=pd.DataFrame(json_lines(folder / "metrics.jsonl")),
            updates=pd.DataFrame(json_lines(folder / "updates.jsonl")).reindex(columns=_UPDATE_COLUMNS),
            layers=layers,
            adapter_rank=_json(folder / "summary.json").get("adapter_rank"),
        )
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise InputError(f"run {str(folder)!r} can't be read: {error}") from None
    if len(run.metrics) and "step" not in run.metrics:
        raise InputError(f"{str(folder / 'metrics.jsonl')!r} has no steps: it is not the log of a run")
    return run


def _study_page(folder: Path) -> Page:
    from scalora.report.facts import study_facts, study_subtitle, study_verdict
    from scalora.report.page import Opening, study_page

    data, result, tables = _study(folder)
    opening = Opening(folder.resolve().name, study_subtitle(result), study_verdict(result), study_facts(result))
    settings = (folder / STUDY_FILE).read_text(encoding="utf-8")
    return study_page(data, opening, tables=tables, settings=settings)


@contextmanager
def _naming_damage(kind: str, folder: Path, command: str) -> Iterator[None]:
    """Context manager that names a study or table whose files are damaged, and the command that mends it."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise InputError(
            f"{kind} {str(folder)!r} can't be read ({error}): delete the folder of the damaged run and run "
            f"`scalora {command}` again"
        ) from None


def _table_page(folder: Path) -> Page:
    from scalora.report.facts import table_facts, table_subtitle
    from scalora.report.page import Opening, table_page

    with _naming_damage("table", folder, "reproduce"):
        result = read_reproduction(reproduction_of(folder))
        tables = reproduction_markdown(result)
    opening = Opening(result.reproduction.recipe.title, table_subtitle(result), "", table_facts(result))
    settings = (folder / REPRODUCTION_FILE).read_text(encoding="utf-8")
    return table_page(opening, tables=tables, settings=settings)


def _study(folder: Path) -> tuple[StudyData, StudyResult, str]:
    from scalora.report.summaries import StudyData

    with _naming_damage("study", folder, "compare"):
        result = load_study(folder)
        tables = markdown(result)
    study = result.study
    # The figures show full runs; those over a share of the steps have a table.
    cells, curves, updates = (frame[frame["share"] == 1] for frame in (result.cells, result.curves, result.updates))
    order = {method: result.table.set_index("method")["learning_rate"][method] for method in study.methods}
    data = StudyData(
        cells=cells[cells["status"] == "finished"],
        curves=curves,
        updates=updates,
        best={method: float(rate) for method, rate in order.items() if rate == rate},
        seeds=study.seeds,
        metric=study.metric,
        greater_is_better=study.larger_is_better(),
        baseline=study.baseline,
    )
    return data, result, tables


def _run_page(folder: Path) -> Page:
    from scalora.report.facts import run_facts, run_subtitle
    from scalora.report.page import Opening, run_page

    if not folder.is_dir():
        raise InputError(f"{str(folder)!r} does not exist: give the folder of a run or a study")
    if not (folder / "config.yaml").is_file():
        raise InputError(
            f"{str(folder)!r} holds neither {STUDY_FILE} nor config.yaml: give the folder of a run or a study"
        )
    run, summary = read_run(folder), _json(folder / "summary.json")
    subtitle = run_subtitle(summary, run_settings(folder))
    opening = Opening(folder.resolve().name, subtitle, "", run_facts(run, summary))
    settings = (folder / "config.yaml").read_text(encoding="utf-8")
    return run_page(run, opening, summary=summary, settings=settings)


def _json(path: Path) -> dict[str, Any]:
    """The content of a file that a run need not have; empty without it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, OSError) as error:
        raise InputError(f"{str(path)!r} can't be read: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{str(path)!r} must hold keys and values, not a {type(content).__name__}")
    return content


def _check_replaceable(page: Path, figures: Path) -> None:
    """Raise `InputError` if replacing the page and the figures would delete files that no report has written."""
    from scalora.report.charts import FILE_NAMES

    if page.is_file() and _TITLE not in page.read_text(encoding="utf-8", errors="replace"):
        raise InputError(f"{str(page)!r} is a page that no report has written: choose another --output")
    if figures.is_symlink():
        raise InputError(f"{str(figures)!r} is a link, which is not replaced: choose another --output, or remove it")
    foreign = sorted({path.name for path in figures.glob("*")} - FILE_NAMES)
    if foreign:
        raise InputError(f"{str(figures)!r} holds {foreign[0]!r}, which no report has written: choose another --output")
