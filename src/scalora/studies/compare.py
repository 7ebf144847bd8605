"""``scalora compare``: runs the cells of a study, each in a process of its own, and skips those already finished."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from scalora.runs.claim import move_aside
from scalora.runs.errors import InputError
from scalora.runs.run_folder import SUMMARY_FILE, trainer_folder, write_json
from scalora.runs.settings import run_settings
from scalora.runs.yaml_file import yaml_dump
from scalora.saving.checkpoints import last_checkpoint
from scalora.saving.files import atomic_write
from scalora.studies.cell_tests import drop_weights, missing_tests, test_command
from scalora.studies.cells import DIVERGED, last_words, read_cells, summary_of
from scalora.studies.finished_cells import check_finished_cells, check_same_data, compared
from scalora.studies.slots import VISIBLE_GPUS, Slots, slots_of
from scalora.studies.study import STUDY_FILE, Cell, Study
from scalora.studies.table import StudyResult
from scalora.studies.table_markdown import ENVIRONMENT_FILE, write_tables

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_POLL_SECONDS = 0.1
_GRACE_SECONDS = 10.0  # between asking a process to end and killing it

_LOCK_FILE = ".lock"


class Comparison(NamedTuple):
    """The outcome of `compare`.

    Attributes:
        total: number of cells in the study.
        finished: number of finished cells, including those of earlier calls.
        failed: the cells whose run failed, each with the error in its log.
        result: the results, whose tables have been written; None if the study was stopped by a signal.
    """

    total: int
    finished: int
    failed: list[tuple[Cell, str]]
    result: StudyResult | None

    @property
    def complete(self) -> bool:
        """Whether every cell is finished."""
        return self.result is not None and not self.failed


def compare(
    study: Study,
    *,
    cores: int | None = None,
    threads: int | None = None,
    jobs: int | None = None,
    gpus: Sequence[str] | None = None,
) -> Comparison:
    """Run every cell that is not finished, then write the tables. Progress is shown on standard error.

    Ctrl-C and SIGTERM stop the running cells and return; a later call skips the finished cells.

    Args:
        study: the study, from `scalora.studies.study.load_study_file`.
        cores: CPU cores to use. None: all that this process may use.
        threads: CPU threads of each run; without GPUs, ``cores // threads`` runs execute in parallel. None: one, unless
            `jobs` says how many there are for a run: small models gain little from more, and with one thread the order
            of summation, and so the result, does not depend on the number of cores.
        jobs: runs to execute in parallel, among which the cores are divided; not with `threads` or GPUs.
        gpus: the GPUs to use, by number or name as in ``CUDA_VISIBLE_DEVICES``. Each executes one run at a time, or as
            many as it is named times. None: all that this process sees, unless the study's runs use the CPU.

    Returns:
        How many cells are finished, which failed, and the results.

    Raises:
        InputError: `threads`, `jobs` or `gpus` are out of range, the study folder can't be used, a finished cell was
            run with another config, or evaluation does not report the study's metric (found when the first cell
            finishes).
    """
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    slots = slots_of(study, available if cores is None else cores, threads=threads, jobs=jobs, gpus=gpus)
    _check_folder(study)
    study.folder.mkdir(parents=True, exist_ok=True)
    result = None
    with _locked(study.folder) as lock, _stop_signals() as stop:
        check_finished_cells(study)
        _record(study, slots.threads)
        runner = _Runner(study, slots, lock, stop)
        try:
            with runner.progress:
                runner.run(study.tuning_cells())
                best = read_cells(study).best
                runner.run(study.reported_cells(best))
                runner.run(study.share_cells(best))
            result = write_tables(study.folder)
        except _Stopped:
            pass
    failed = [(cell, last_words(cell)) for cell in runner.failed]
    return Comparison(runner.total, runner.finished, failed, result)


class _Stopped(Exception):
    """Ctrl-C or SIGTERM was received."""


class _Runner:
    """Runs cells in parallel processes and shows their progress."""

    def __init__(self, study: Study, slots: Slots, lock: int, stop: Event) -> None:
        self._study = study
        self._parallel = slots.runs
        self._free = list(slots.gpus)
        self._gpus: dict[Path, str] = {}  # of the cells that are running
        self._left: dict[Path, list[str]] = {}  # tests that a cell has still to do
        self._lock = lock
        self._stop = stop
        self._environment = os.environ | dict.fromkeys(_THREAD_VARIABLES, str(slots.threads))
        # The tokenizer's own threads would come on top of a run's threads.
        self._environment["TOKENIZERS_PARALLELISM"] = "false"
        self._started: dict[Path, float] = {}
        self._seconds: list[float] = []  # duration of each run of this call
        self.finished = 0
        self.failed: list[Cell] = []
        tuning = study.tuning_cells()
        later = set(study.seeds) - {cell.seed for cell in tuning}
        shares = len(study.shares()) * len(study.seeds) * (len(study.methods) - 1)
        self.total = len(tuning) + len(study.methods) * len(later) + shares
        console = Console(stderr=True)  # standard output is for the tables alone
        self.progress = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._bar = self.progress.add_task("", total=self.total)

    def run(self, cells: Iterable[Cell]) -> None:
        """Run the cells that were not tried in this call yet; leaves no process behind, whatever happens."""
        waiting = deque(cell for cell in cells if cell.folder not in self._started)
        running: dict[subprocess.Popen[bytes], Cell] = {}
        try:
            while waiting or running:
                while waiting and len(running) < self._parallel:
                    cell = waiting.popleft()
                    self._started[cell.folder] = time.monotonic()
                    if summary_of(cell) is None:
                        if self._free:
                            self._gpus[cell.folder] = self._free.pop(0)
                        running[self._start(cell)] = cell
                    else:
                        self._end(cell, "kept")
                names = ", ".join(map(str, running.values()))
                self.progress.update(self._bar, description=self._time_left() + names)
                if self._stop.wait(_POLL_SECONDS):
                    raise _Stopped
                for process in [process for process in running if process.poll() is not None]:
                    cell = running.pop(process)
                    if process.returncode == 0 and _is_trained(cell) and self._goes_on(cell):
                        running[self._start(cell)] = cell
                        continue
                    self._seconds.append(time.monotonic() - self._started[cell.folder])
                    self._end(cell, f"{_ending(process, cell)} after {self._seconds[-1]:.0f} s")
                    check_same_data(self._study)
        finally:
            _terminate(running)

    def _start(self, cell: Cell) -> subprocess.Popen[bytes]:
        """Start what a cell has not been through yet: training, or the next of its tests."""
        environment = self._environment
        if (gpu := self._gpus.get(cell.folder)) is not None:
            environment = environment | {VISIBLE_GPUS: gpu}
        if _is_trained(cell):
            command, mode = test_command(cell, missing_tests(cell)[0]), "ab"
        else:
            command, mode = self._training_command(cell), "wb"
        with _log_file(cell).open(mode) as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                # A run that outlives its killed parent keeps the study locked, so that no other is started beside it.
                pass_fds=(self._lock,),
            )

    def _training_command(self, cell: Cell) -> list[str]:
        resume = _is_resumable(cell)
        if resume:
            self._say(f"{cell}: goes on from its last checkpoint")
        # A failed or killed run has left a folder, which training would refuse to write to.
        elif os.path.lexists(cell.folder):
            self._say(f"{cell}: what an earlier try left is now in {str(move_aside(cell.folder))!r}")
        cell.folder.parent.mkdir(parents=True, exist_ok=True)
        config = _config_file(cell)
        # Without what the run needs, which has been checked for all runs.
        config.write_text(yaml_dump(cell.settings.model_dump(exclude={"needs"})), encoding="utf-8")
        return [sys.executable, "-m", "scalora", "train", str(config), *(["--resume"] if resume else [])]

    def _end(self, cell: Cell, how: str) -> None:
        if (gpu := self._gpus.pop(cell.folder, None)) is not None:
            self._free.append(gpu)
        cell.folder.mkdir(exist_ok=True)
        if _log_file(cell).exists():
            _log_file(cell).replace(cell.folder / "log.txt")
        _config_file(cell).unlink(missing_ok=True)
        summary = summary_of(cell)
        if summary is None:
            self.failed.append(cell)
        else:
            self.finished += 1
            drop_weights(cell, keep=bool(self._study.run.get("save_model")))
            self._require_scores(cell, summary)
        self.progress.advance(self._bar)
        done = self.finished + len(self.failed)
        self._say(f"[{done}/{self.total}] {self._time_left()}{cell}: {how}")

    def _goes_on(self, cell: Cell) -> bool:
        """Whether a test is left to do, other than one that has just written no scores and yet ended well."""
        left = missing_tests(cell)
        before, self._left[cell.folder] = self._left.get(cell.folder), left
        return bool(left) and left != before

    def _say(self, line: str) -> None:
        self.progress.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _require_scores(self, cell: Cell, summary: dict[str, Any]) -> None:
        if DIVERGED in summary:
            return
        for name in ("eval_loss", self._study.metric):
            # A run that only chooses a learning rate has no tests.
            if name not in summary and bool(cell.tests) == bool(self._study.tests):
                given = ", ".join(key for key in summary if key.startswith("eval_")) or "none"
                raise InputError(f"metric {name!r} is not among the scores of the evaluations, which are {given}")

    def _time_left(self) -> str:
        left = self.total - self.finished - len(self.failed)
        if not self._seconds or not left:
            return ""
        seconds = sum(self._seconds) / len(self._seconds) * math.ceil(left / self._parallel)
        return f"about {timedelta(seconds=round(seconds))} left, "


def _ending(process: subprocess.Popen[bytes], cell: Cell) -> str:
    """How a process ended. A signal, which leaves no message in the log, is recorded there."""
    if (summary := summary_of(cell)) is not None:
        return "diverged" if DIVERGED in summary else "finished"
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        with _log_file(cell).open("a", encoding="utf-8") as log:
            log.write(f"\nerror: ended by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}\n")
    return "failed"


def _terminate(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """Ask processes to end, and kill those that don't."""
    for process in processes:
        process.terminate()
    try:
        for process in processes:
            process.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _check_folder(study: Study) -> None:
    folder = study.folder
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir {str(folder)!r} is a file: choose another")
    content = {path.name for path in folder.iterdir()} - {_LOCK_FILE} if folder.exists() else set()
    # A study file alone may be the user's own.
    if content and not _is_environment(folder / ENVIRONMENT_FILE):
        raise InputError(f"output_dir {str(folder)!r} is not empty and not the folder of a study: choose another")


def _is_environment(path: Path) -> bool:
    """Whether a file is what `_record` writes first into a study folder."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"command", "date", "threads"} <= content.keys()


def _is_resumable(cell: Cell) -> bool:
    """Whether an earlier try, with the settings that the cell has now, has left a checkpoint."""
    if last_checkpoint(trainer_folder(cell.settings)) is None:
        return False
    try:
        return compared(run_settings(cell.folder)) == compared(cell.settings)
    except (InputError, OSError):
        return False


def _is_trained(cell: Cell) -> bool:
    return bool(cell.tests) and (cell.folder / SUMMARY_FILE).is_file()


def _record(study: Study, threads: int) -> None:
    """Write the study's settings, and the command and the thread counts that its cells were or will be run with."""
    path = study.folder / ENVIRONMENT_FILE
    earlier = json.loads(path.read_text(encoding="utf-8"))["threads"] if path.is_file() else []
    unfinished = bool((read_cells(study).cells["status"] != "finished").any())
    environment = {
        "command": shlex.join(["scalora", *sys.argv[1:]]),
        "date": datetime.now().astimezone().isoformat(timespec="minutes"),
        "threads": sorted({*earlier, threads} if unfinished else earlier),
    }
    write_json(path, environment)
    with atomic_write(study.folder / STUDY_FILE) as temporary:
        resolved = study.model_dump() | {"greater_is_better": study.larger_is_better()}
        temporary.write_text(yaml_dump(resolved), encoding="utf-8")


def _config_file(cell: Cell) -> Path:
    return cell.folder.with_name(f"{cell.folder.name}.yaml")


def _log_file(cell: Cell) -> Path:
    """Log of a running process. It lies beside the run folder, because training creates that folder itself."""
    return cell.folder.with_name(f"{cell.folder.name}.log")


@contextmanager
def _locked(folder: Path) -> Iterator[int]:
    with (folder / _LOCK_FILE).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"study {str(folder)!r} is being run by another `scalora compare`, or by a training run that outlived "
                "one: wait until it ends, or stop it"
            ) from None
        yield file.fileno()


@contextmanager
def _stop_signals() -> Iterator[Event]:
    """An event that Ctrl-C and SIGTERM set. An exception instead might lose a process that is just being started."""
    stop = Event()
    earlier = {which: signal.signal(which, lambda *_: stop.set()) for which in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for which, handler in earlier.items():
            signal.signal(which, handler)
