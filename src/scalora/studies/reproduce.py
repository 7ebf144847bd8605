"""``scalora reproduce``: runs the studies of a recipe one after the other, and writes its table."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from scalora.runs.errors import InputError
from scalora.runs.yaml_file import yaml_dump
from scalora.saving.files import atomic_write
from scalora.studies.compare import compare
from scalora.studies.reproduction import REPRODUCTION_FILE, Reproduction
from scalora.studies.reproduction_table import ReproductionResult, write_table
from scalora.studies.study import Cell
from scalora.studies.study_checks import check_data


class Reproduced(NamedTuple):
    """The outcome of `reproduce`.

    Attributes:
        failed: the runs that failed, each with the error in its log.
        broken: tasks whose study could not be run at all, each with the reason.
        result: the results, whose table has been written; None if it was stopped by a signal.
    """

    failed: list[tuple[Cell, str]]
    broken: list[tuple[str, str]]
    result: ReproductionResult | None

    @property
    def complete(self) -> bool:
        """Whether every run is finished."""
        return self.result is not None and not self.failed and not self.broken


def reproduce(
    reproduction: Reproduction,
    *,
    cores: int | None = None,
    threads: int | None = None,
    jobs: int | None = None,
    gpus: Sequence[str] | None = None,
) -> Reproduced:
    """Run every run of a recipe that is not finished, and write its table after each task.

    A task whose data can't be loaded, say, does not keep the others from being run.

    Args:
        reproduction: the recipe.
        cores: as in `scalora.studies.compare.compare`.
        threads: as there.
        jobs: as there.
        gpus: as there.

    Raises:
        InputError: the folder can't be used.
        OSError: a file can't be written.
    """
    folder = reproduction.folder
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir {str(folder)!r} is a file: choose another")
    if folder.exists() and any(folder.iterdir()) and not (folder / REPRODUCTION_FILE).is_file():
        raise InputError(f"output_dir {str(folder)!r} is not empty and not the folder of a table: choose another")
    folder.mkdir(parents=True, exist_ok=True)
    _write(reproduction.content, folder / REPRODUCTION_FILE)
    failed: list[tuple[Cell, str]] = []
    broken: list[tuple[str, str]] = []

    def give_up(task: str, error: InputError) -> None:
        broken.append((task, str(error)))
        print(f"{task} is left out: {error}", file=sys.stderr, flush=True)  # not days later

    usable = {}
    for task, study in reproduction.studies.items():
        try:
            check_data(study)
            usable[task] = study
        except InputError as error:
            give_up(task, error)
    result = None
    for number, (task, study) in enumerate(usable.items(), start=1):
        print(f"{task} ({number} of {len(usable)}), in {study.folder}", file=sys.stderr, flush=True)
        try:
            comparison = compare(study, cores=cores, threads=threads, jobs=jobs, gpus=gpus)
        except InputError as error:
            give_up(task, error)
            continue
        if comparison.result is None:
            return Reproduced(failed, broken, None)
        failed += comparison.failed
        result = write_table(reproduction)
    return Reproduced(failed, broken, result or write_table(reproduction))


def _write(content: dict[str, object], path: Path) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(yaml_dump(content), encoding="utf-8")
