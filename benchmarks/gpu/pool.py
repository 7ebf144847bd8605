"""Worker processes that share one device, each of which does one job after another until a deadline.

A worker pays for its imports and for reading models and data once. A job that fails or kills its worker is an answer
like any other, and at the deadline everything is ended: nothing here can hang.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

Job = dict[str, Any]

_SPAWN = multiprocessing.get_context("spawn")


class Answer(NamedTuple):
    """What became of a job.

    Attributes:
        job: the job.
        result: what the worker's function returned; None if it failed.
        error: why it failed; empty if it did not.
    """

    job: Job
    result: dict[str, Any] | None
    error: str


class _Worker(NamedTuple):
    process: BaseProcess
    pipe: Connection


def answers(
    setup: Callable[..., Callable[[Job], dict[str, Any]]],
    arguments: tuple[Any, ...],
    workers: int,
    next_job: Callable[[], Job | None],
    deadline: float,
) -> Iterator[Answer]:
    """Have jobs done by processes, and yield their answers as they come.

    Args:
        setup: called in each process with `arguments`; returns the function that does a job. Must be importable.
        arguments: arguments of `setup`, which can be pickled.
        workers: number of processes.
        next_job: the job to do next; None if there is none now. Asked again after every answer, which may add jobs.
        deadline: `time.monotonic` at which all processes are ended, whatever they are doing.
    """
    running: dict[Connection, tuple[_Worker, Job]] = {}
    idle: list[_Worker] = []
    started = 0
    try:
        while True:
            while (len(running) < workers) and (job := next_job()) is not None:
                if not idle:
                    idle.append(_start(setup, arguments))
                    started += 1
                worker = idle.pop()
                worker.pipe.send(job)
                running[worker.pipe] = (worker, job)
            if not running or (left := deadline - time.monotonic()) <= 0:
                return
            for pipe in wait(list(running), timeout=left):
                worker, job = running.pop(pipe)  # type: ignore[index]
                try:
                    result, error = worker.pipe.recv()
                except (EOFError, OSError):
                    worker.process.join(1)
                    result, error = None, f"its process ended with exit code {worker.process.exitcode}"
                else:
                    idle.append(worker)
                yield Answer(job, result, error)
                if started > 2 * workers:  # more than half of all that were started have died
                    return
    finally:
        for worker in [*idle, *(worker for worker, _ in running.values())]:
            worker.process.kill()
        for worker in [*idle, *(worker for worker, _ in running.values())]:
            worker.process.join(5)


def _start(setup: Callable[..., Callable[[Job], dict[str, Any]]], arguments: tuple[Any, ...]) -> _Worker:
    mine, its = _SPAWN.Pipe()
    process = _SPAWN.Process(target=_serve, args=(its, setup, arguments), daemon=True)
    process.start()
    its.close()  # else its end would never be noticed
    return _Worker(process, mine)


def _serve(pipe: Connection, setup: Callable[..., Callable[[Job], dict[str, Any]]], arguments: tuple[Any, ...]) -> None:
    do = setup(*arguments)
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            answer: tuple[dict[str, Any] | None, str] = (do(job), "")
        except Exception as error:  # whatever it is, the other jobs go on
            answer = (None, f"{type(error).__name__}: {error}".splitlines()[0])
        pipe.send(answer)
