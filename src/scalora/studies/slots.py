"""How many runs of a study execute at the same time, and on which GPU or how many cores each."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

from scalora.runs.errors import InputError
from scalora.studies.study import Study

VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"
"""The variable that says which GPUs a process sees."""


class Slots(NamedTuple):
    """Places for runs.

    Attributes:
        runs: how many execute at the same time.
        threads: CPU threads of each.
        gpus: the GPU of each; empty on CPUs.
    """

    runs: int
    threads: int
    gpus: tuple[str, ...]


def slots_of(study: Study, cores: int, *, threads: int | None, jobs: int | None, gpus: Sequence[str] | None) -> Slots:
    """The places for a study's runs.

    Args:
        study: the study, whose runs may use the CPU although there are GPUs.
        cores: CPU cores to use.
        threads: CPU threads of each run. None: one, or those that `jobs` leaves for it.
        jobs: runs to execute in parallel. None: as many as there are GPUs, or cores for.
        gpus: the GPUs to use, each as often as it is to execute runs at the same time. None: each once that this
            process sees, unless the study's runs use the CPU.

    Raises:
        InputError: one of them is out of range, or they contradict each other.
    """
    if jobs is not None and threads is not None:
        raise InputError(f"--jobs {jobs} with --threads {threads}: each says how the cores are divided; give one")
    if jobs is not None and gpus is not None:
        raise InputError(f"--jobs {jobs} with --gpus {','.join(gpus)}: the GPUs say how many there are; give one")
    if jobs is not None and not 1 <= jobs <= cores:
        raise InputError(f"--jobs {jobs}: must be from 1 to the {cores} cores")
    if threads is not None and not 1 <= threads <= cores:
        raise InputError(f"--threads {threads}: must be from 1 to the {cores} cores")
    if jobs is not None:
        return Slots(jobs, cores // jobs, ())
    threads = threads or 1
    if gpus is None:
        gpus = _all_gpus() if _uses_gpus(study) else ()
    elif not all(gpus):
        raise InputError(f"--gpus {','.join(gpus)!r}: write the numbers of GPUs with commas between them")
    elif not _uses_gpus(study):
        raise InputError(f"--gpus {','.join(gpus)} with run.training.use_cpu=true: leave one of them out")
    return Slots(len(gpus), threads, tuple(gpus)) if gpus else Slots(cores // threads, threads, ())


def _uses_gpus(study: Study) -> bool:
    return not (study.run.get("training") or {}).get("use_cpu")


def _all_gpus() -> list[str]:
    """The GPUs that this process sees, by their names in `VISIBLE_GPUS`."""
    if (visible := os.environ.get(VISIBLE_GPUS)) is not None:
        return [name for name in visible.split(",") if name.strip() not in ("", "-1")]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]
