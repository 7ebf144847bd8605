"""Whether a machine has what runs need: a GPU with the memory, room on the disks, a token, the packages."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import datasets
import torch
from huggingface_hub import constants, get_token

from scalora.bench.needs import Needs

GB = 1e9


class Machine(NamedTuple):
    """What there is.

    Attributes:
        gpu: name of the GPU with the least memory; None without GPUs.
        memory: its bytes.
        gpus: number of GPUs.
        cache: folder that models and data are downloaded to.
        cache_free: bytes that are free there.
        output: the output folder.
        output_free: bytes that are free there.
        token: whether there is a token for the hub.
    """

    gpu: str | None
    memory: int
    gpus: int
    cache: Path
    cache_free: int
    output: Path
    output_free: int
    token: bool


def machine(output: Path) -> Machine:
    """What this machine has.

    Args:
        output: the folder that results are written to.
    """
    found = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    least = min(found, key=lambda gpu: gpu.total_memory, default=None)
    caches = [Path(constants.HF_HUB_CACHE), Path(datasets.config.HF_DATASETS_CACHE)]
    cache = min(caches, key=_free)
    return Machine(
        gpu=None if least is None else least.name,
        memory=0 if least is None else least.total_memory,
        gpus=len(found),
        cache=cache,
        cache_free=_free(cache),
        output=output,
        output_free=_free(output),
        token=get_token() is not None,
    )


def missing(needs: Needs, there: Machine) -> list[str]:
    """What runs need and a machine lacks, each in a few words with what to do.

    Args:
        needs: what the runs need.
        there: what the machine has.
    """
    lacks = []
    if needs.gpu and there.gpu is None:
        lacks.append(f"a GPU with {needs.gpu / GB:.0f} GB: torch sees none")
    elif needs.gpu > there.memory:
        lacks.append(
            f"a GPU with {needs.gpu / GB:.0f} GB for {needs.hungriest}: {there.gpu} has {there.memory / GB:.0f} GB "
            "(set training.per_device_train_batch_size lower, and training.gradient_accumulation_steps higher)"
        )
    results = needs.kept + needs.passing * max(1, there.gpus)
    same = _device(there.cache) == _device(there.output)
    rooms = [("models and data", there.cache, needs.downloads + (results if same else 0), there.cache_free)]
    if not same:
        rooms.append(("results", there.output, results, there.output_free))
    for what, folder, wanted, free in rooms:
        if wanted > free:
            lacks.append(f"{wanted / GB:.0f} GB for {what} in {str(folder)!r}: {free / GB:.0f} GB are free")
    if needs.gated and not there.token:
        lacks.append(
            f"a token of the hub for {', '.join(needs.gated)}: accept the licence on the model's page, then `hf auth "
            "login` or HF_TOKEN"
        )
    absent = [name for name in needs.packages if not _is_installed(name)]
    if absent:
        lacks.append(f"packages: pip install {' '.join(absent)}")
    return lacks


def shown(needs: Needs, there: Machine, names: Sequence[tuple[str, str]] = ()) -> list[tuple[str, str]]:
    """What runs need beside what there is, as labels and values.

    Args:
        needs: what the runs need.
        there: what the machine has.
        names: rows to begin with.
    """
    rows = list(names)
    rows += [("model", f"{name}: {words}") for name, words in needs.models.items()]
    rows += [("model", f"{name}: nothing is known of it before it is downloaded") for name in needs.unknown]
    if needs.gpu:
        have = "none here" if there.gpu is None else f"{there.gpu} has {there.memory / GB:.0f} GB"
        rows.append(("GPU memory", f"about {needs.gpu / GB:.0f} GB at most, by {needs.hungriest}; {have}"))
    rows.append(
        ("downloads", f"about {needs.downloads / GB:.1f} GB to {there.cache}; {there.cache_free / GB:.0f} GB are free")
    )
    results = needs.kept + needs.passing * max(1, there.gpus)
    rows.append(("results", f"about {results / GB:.1f} GB in {there.output}; {there.output_free / GB:.0f} GB are free"))
    hours = "unknown" if needs.hours is None else f"about {_duration(needs.hours)} or more of one H100, an estimate"
    rows.append(("time", f"{hours}, for {needs.runs} run{'s' * (needs.runs != 1)}"))
    if needs.gated:
        rows.append(("gated", f"{', '.join(needs.gated)}; a token is {'there' if there.token else 'missing'}"))
    if needs.packages:
        rows.append(("packages", ", ".join(needs.packages)))
    return rows


def _duration(hours: float) -> str:
    return f"{max(1, round(60 * hours))} min" if hours < 1 else f"{hours:,.0f} h"


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _free(folder: Path) -> int:
    return shutil.disk_usage(_existing(folder)).free


def _device(folder: Path) -> int:
    return os.stat(_existing(folder)).st_dev
