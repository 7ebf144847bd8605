"""The table of a recipe: what the paper reports beside what was reached here, the difference, and its error.

All figures are in per cent. The error of a mean is its standard error over seeds. The paper states none that is known
here, so the error of a difference is ours alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd  # type: ignore[import-untyped]

from scalora.runs.errors import InputError
from scalora.saving.files import atomic_write
from scalora.studies.cells import read_cells
from scalora.studies.grid import grid
from scalora.studies.over_seeds import mean_and_error
from scalora.studies.reproduction import AVERAGE, Reproduction
from scalora.studies.study import Study
from scalora.studies.table_markdown import ENVIRONMENT_FILE

TABLE_FILE = "table.md"

_NONE = "—"
_PER_CENT = 100


@dataclass(frozen=True)
class ReproductionResult:
    """The results of a recipe, as far as its runs are finished.

    Attributes:
        reproduction: the recipe.
        table: one row per table, method and column: ``table``, ``method``, ``column``; ``paper``, the figure reported;
            ``ours`` and ``error``, mean over the finished seeds and its standard error; ``difference``, ours minus the
            paper's, whose error is the same; ``seeds`` that are finished, of ``wanted``. NaN where there is none.
        failed: folder and error of each run that failed.
        finished: number of finished runs.
        runs: number of runs.
    """

    reproduction: Reproduction
    table: pd.DataFrame
    failed: list[tuple[str, str]]
    finished: int
    runs: int


def read_reproduction(reproduction: Reproduction) -> ReproductionResult:
    """Read the results of a recipe without running anything.

    Args:
        reproduction: the recipe, whose folder is read.
    """
    cells = {task: read_cells(study).cells for task, study in reproduction.studies.items()}
    of_study = {id(study): cells[task] for task, study in reproduction.studies.items()}
    rows: list[dict[str, Any]] = []
    for title, columns in reproduction.columns().items():
        methods = dict.fromkeys(method for study, _ in columns.values() for method in study.methods)
        for method in methods:
            scores = {column: _scores(of_study[id(study)], method, score) for column, (study, score) in columns.items()}
            wanted = min(len(study.seeds) for study, _ in columns.values())
            # The mean of each seed that all columns have: their errors need not be independent.
            scores[AVERAGE] = pd.concat(scores, axis=1, join="inner").mean(axis=1, skipna=False)
            reported = reproduction.recipe.paper.get(title, {}).get(method, {})
            for column, values in scores.items():
                ours, error = mean_and_error(_PER_CENT * values)
                paper = reported.get(column, math.nan)
                rows.append(
                    {
                        "table": title,
                        "method": method,
                        "column": column,
                        "paper": paper,
                        "ours": ours,
                        "error": error,
                        "difference": ours - paper,
                        "seeds": len(values),
                        "wanted": wanted,
                    }
                )
    every = pd.concat(cells.values())
    bad = [
        (f"{reproduction.studies[task].folder.name}/{row['folder']}", row["error"])
        for task, frame in cells.items()
        for row in frame[frame["status"] == "failed"].to_dict("records")
    ]
    return ReproductionResult(
        reproduction, pd.DataFrame(rows), bad, int((every["status"] == "finished").sum()), len(every)
    )


def write_table(reproduction: Reproduction) -> ReproductionResult:
    """Write ``table.md`` and ``table.parquet`` into the folder of a recipe.

    Args:
        reproduction: the recipe; unfinished runs are left out of the tables.

    Returns:
        The results that were written.

    Raises:
        InputError: nothing was run yet.
        OSError: a file can't be written.
    """
    if not reproduction.folder.is_dir():
        raise InputError(f"nothing was run in {str(reproduction.folder)!r} yet: there is no table")
    result = read_reproduction(reproduction)
    with atomic_write(reproduction.folder / "table.parquet") as temporary:
        result.table.to_parquet(temporary, index=False)
    with atomic_write(reproduction.folder / TABLE_FILE) as temporary:
        temporary.write_text(reproduction_markdown(result), encoding="utf-8")
    return result


def reproduction_markdown(result: ReproductionResult) -> str:
    """The tables of a recipe in Markdown: averages first, then every column, what is not published, and what failed.

    Args:
        result: the results of a recipe, finished or not.
    """
    reproduction = result.reproduction
    recipe = reproduction.recipe
    sections = [f"# {recipe.title}", _header(result)]
    for title, rows in result.table.groupby("table", sort=False):
        sections += _sections(str(title), rows, several=len(reproduction.columns()) > 1)
    sections.append(
        "In per cent. ± is the standard error over seeds. Difference: ours minus the paper's, with our error alone: "
        f"the paper's is not known here. Average: the mean over the columns for each seed. {_chosen(reproduction)}"
    )
    sections.append(f"The paper's figures: {recipe.source}")
    if recipe.unpublished:
        taken = "\n".join(f"- {line}" for line in recipe.unpublished)
        sections += ["## What the paper leaves open, and what was taken", taken]
    if result.failed:
        failed = "\n".join(f"- {folder}: {error}" for folder, error in result.failed)
        sections += ["## Failed runs", failed]
    return "\n\n".join(sections) + "\n"


def _sections(title: str, rows: pd.DataFrame, *, several: bool) -> list[str]:
    averages = rows[rows["column"] == AVERAGE].to_dict("records")
    columns = [column for column in dict.fromkeys(rows["column"]) if column != AVERAGE]
    before = f"{title}: " if several else ""
    lines = [line for method, own in rows.groupby("method", sort=False) for line in _lines(str(method), own, columns)]
    return [
        f"## {before}average",
        grid(
            ["method", "paper", "ours", "difference", "seeds"],
            [
                [
                    row["method"],
                    _figure(row["paper"]),
                    _ours(row),
                    _difference(row),
                    f"{row['seeds']} of {row['wanted']}",
                ]
                for row in averages
            ],
        ),
        f"## {before}every column",
        grid(["method", "", *columns], lines),
    ]


def _lines(method: str, rows: pd.DataFrame, columns: list[str]) -> list[list[str]]:
    """A method's line of the table of all columns; three where the paper has figures of them."""
    cells = rows.set_index("column").to_dict("index")
    ours = [method, "ours", *(_ours(cells[column]) for column in columns)]
    papers = [cells[column]["paper"] for column in columns]
    if all(map(math.isnan, papers)):
        return [ours]
    differences = (_difference(cells[column]) for column in columns)
    return [[method, "paper", *map(_figure, papers)], ours, [method, "difference", *differences]]


def _ours(row: Mapping[Any, Any]) -> str:
    return _figure(row["ours"]) + _error(row["error"])


def _difference(row: Mapping[Any, Any]) -> str:
    return _NONE if math.isnan(row["difference"]) else _figure(row["difference"], "+") + _error(row["error"])


def _scores(cells: pd.DataFrame, method: str, score: str) -> pd.Series:
    """The final scores of a method's reported runs, indexed by seed; of a run that diverged it is NaN or infinite."""
    chosen = cells[
        (cells["method"] == method) & (cells["reported"] == True) & (cells["status"] == "finished")  # noqa: E712
    ].set_index("seed")
    if score not in chosen:
        return pd.Series(dtype=float)
    return chosen[score].dropna()


def _header(result: ReproductionResult) -> str:
    """The command, date and versions of the runs."""
    folder = result.reproduction.folder
    made: dict[str, Any] = {}
    versions: dict[str, set[str]] = {}
    for study in result.reproduction.studies.values():
        path = study.folder / ENVIRONMENT_FILE
        if path.is_file():
            made = json.loads(path.read_text(encoding="utf-8"))
        for run in (study.folder / "cells").glob(f"*/*/{ENVIRONMENT_FILE}"):
            for name, version in json.loads(run.read_text(encoding="utf-8"))["versions"].items():
                versions.setdefault(name, set()).add(version)
    first: Study = next(iter(result.reproduction.studies.values()))
    parts = [
        f"`{made['command']}`" if made else str(folder),
        str(made.get("date", "")),
        ", ".join(f"{name} {' and '.join(sorted(found))}" for name, found in versions.items()),
        f"seeds {', '.join(map(str, first.seeds))}",
        f"{result.finished} of {result.runs} runs finished",
    ]
    return "; ".join(part for part in parts if part) + "."


def _chosen(reproduction: Reproduction) -> str:
    study = next(iter(reproduction.studies.values()))
    by = "evaluation loss" if study.chosen_by == "eval_loss" else "metric"
    seeds = ", ".join(map(str, study.tuning_seeds or study.seeds))
    count = len(study.rates(next(iter(study.methods))))
    return f"Each method at the best of {count} learning rates of its own, by the {by} on seeds {seeds}."


def _figure(value: float, sign: str = "") -> str:
    return _NONE if math.isnan(value) else f"{value:{sign}.2f}"


def _error(value: float) -> str:
    return "" if math.isnan(value) else f" ± {value:.2f}"
