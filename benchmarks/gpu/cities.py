"""Trains text classifiers by several methods, rates, seeds and batch sizes, many at once on one GPU.

    python -m gpu.cities --model FOLDER --data FOLDER --studies FILE... --output FOLDER --minutes 5

`gpu.studies` describes the file of studies, `gpu.carry` makes the folders. Every finished run is a line of
``cities.jsonl``; runs that are in it are not done again. ``cities.md`` is written at the end. When the time is over it
ends, whatever is not finished.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpu.pool import answers
from gpu.studies import FILE, Cell, Studies
from gpu.tables import tables
from scalora.saving.files import atomic_write

HERE = Path(__file__).parent

# A process holds a CUDA context and a model with its activations.
_BYTES_PER_WORKER = 2 << 30
_MOST_WORKERS = 14
_TELL_EVERY = 10.0


def main(arguments: list[str] | None = None) -> None:
    """Run the studies and write the tables.

    Args:
        arguments: those of the command line, for tests.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the base model, or 'toy'")
    parser.add_argument("--data", type=Path, default=Path("runs"), help="folder with a folder for each task")
    parser.add_argument("--studies", type=Path, nargs="+", default=[HERE / "cities.json"], help="files of studies")
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--minutes", type=float, default=5.0, help="time for all of it")
    parser.add_argument("--workers", type=int, help="runs at once; by default by cores and memory")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + 60 * options.minutes
    options.output.mkdir(parents=True, exist_ok=True)
    studies = Studies.read(*options.studies)
    studies.results.update(read_results(options.output / FILE))
    workers = options.workers or _workers(options.device)
    print(f"{workers} runs at once on {options.device}, {options.minutes:g} minutes", flush=True)
    run_all(studies, options.output / FILE, (options.model, options.data, options.device), workers, deadline)
    text = tables(studies)
    with atomic_write(options.output / "cities.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(text, flush=True)


def run_all(studies: Studies, file: Path, setting: tuple[str, Path, str], workers: int, deadline: float) -> None:
    """Do the runs that have no result yet, and write each result as it comes.

    Args:
        studies: the studies; their results are filled in.
        file: the file of results, which is appended to.
        setting: the model, the folder of data and the device.
        workers: runs at once.
        deadline: `time.monotonic` at which to end.
    """

    def next_job() -> dict[str, Any] | None:
        cell = studies.next_cell()
        return None if cell is None else {"cell": cell._asdict(), "run": studies.run(cell)}

    start, told, done = time.monotonic(), 0.0, 0
    with file.open("a", encoding="utf-8") as lines:
        for job, result, error in answers(_worker, setting, workers, next_job, deadline):
            studies.results[Cell(**job["cell"])] = result
            lines.write(json.dumps({**job, "result": result, "error": error}) + "\n")
            lines.flush()
            done += 1
            if error:
                print(f"failed: {job['cell']}: {error}", flush=True)
            if (now := time.monotonic()) - told > _TELL_EVERY:
                told = now
                print(f"{done} runs after {now - start:.0f} s", flush=True)
    print(f"{done} runs in {time.monotonic() - start:.0f} s", flush=True)


def read_results(file: Path) -> dict[Cell, dict[str, Any] | None]:
    """The results of finished runs; of one that failed, none, so that it is tried again.

    Args:
        file: the file of results, whose last line may be cut off; need not exist.
    """
    results: dict[Cell, dict[str, Any] | None] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row["result"] is not None:
            results[Cell(**row["cell"])] = row["result"]
    return results


def _worker(model: str, data: Path, device: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    from transformers.utils import logging

    from gpu.classify import Corpora, train

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    corpora = Corpora(model, data, device)
    return partial(_do, partial(train, corpora=corpora, device=device))


def _do(train: Callable[[dict[str, Any]], dict[str, Any]], job: dict[str, Any]) -> dict[str, Any]:
    return train(job["run"])


def _workers(device: str) -> int:
    cores = len(os.sched_getaffinity(0))
    if not device.startswith("cuda"):
        return cores
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(1, min(cores - 2, _MOST_WORKERS, memory // _BYTES_PER_WORKER))


if __name__ == "__main__":
    main()
