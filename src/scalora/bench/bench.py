"""``scalora bench``: the cost of methods relative to LoRA in the same run, and of a rescale relative to its floor."""

from __future__ import annotations

import copy
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from scalora.bench.case import Case, Contender
from scalora.bench.floor import seconds_of_parts
from scalora.bench.measure import Machine, interleaved_steps, measure_machine, peak_memory, rescale_parts
from scalora.bench.results import BASELINE, Rescale, Steps, rescales_table, steps_table
from scalora.bench.settings import BenchSettings
from scalora.model.adapters import find_lora_pairs
from scalora.model.placement import kind_of
from scalora.runs.errors import InputError
from scalora.runs.run_folder import write_json
from scalora.saving.files import atomic_write

Announce = Callable[[str], None]

# Options that take several values; the first two are those of the model with random weights.
_AXES = ("width", "layers", "rank", "sequence", "dtype", "merge")


def bench(settings: BenchSettings, folder: Path, announce: Announce) -> str:
    """Measure all cases and write ``bench.json``, ``bench.md`` and the figures.

    Args:
        settings: what to measure.
        folder: folder to write, created if it does not exist.
        announce: called with a few words before each measurement, to show progress.

    Returns:
        The content of ``bench.md``.

    Raises:
        InputError: the device can't be used, the model can't be read, or a method can't be built for it.
        OSError: the results can't be written.
    """
    _check_device(settings.device)
    torch.set_num_threads(settings.threads)
    steps: list[Steps] = []
    rescales: list[Rescale] = []
    announce("the machine")
    machine = measure_machine(settings.device)
    for name, case in _cases(settings):
        measured, rescale = _measure(name, case, settings, machine, announce)
        steps += measured
        rescales += [] if rescale is None else [rescale]
    folder.mkdir(parents=True, exist_ok=True)
    environment = _environment(settings, machine)
    results = {"steps": [row._asdict() for row in steps], "rescales": [row._asdict() for row in rescales]}
    write_json(folder / "bench.json", {"environment": environment, "settings": asdict(settings), **results})
    text = _markdown(settings, environment, steps, rescales)
    with atomic_write(folder / "bench.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    _draw(folder, steps, rescales)
    return text


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        raise InputError(f"--device {device!r} can't be used: {str(error).splitlines()[0]}") from None


def _cases(settings: BenchSettings) -> list[tuple[str, Case]]:
    """The base case, then each further value in its place, with the name of what is different."""
    names = _AXES if settings.model is None else _AXES[2:]
    base = Case(
        model=settings.model,
        batch=settings.batch,
        device=settings.device,
        native=settings.native,
        **{name: getattr(settings, name)[0] for name in _AXES},
    )
    others = [(name, value) for name in names for value in getattr(settings, name)[1:]]
    return [("base", base), *((f"{name} {value}", replace(base, **{name: value})) for name, value in others)]


def _measure(
    name: str, case: Case, settings: BenchSettings, machine: Machine, announce: Announce
) -> tuple[list[Steps], Rescale | None]:
    """Measure one case: the steps of all methods, and a rescale if ScaLoRA with an interval of 1 is among them."""
    methods = list(dict.fromkeys([BASELINE, *settings.methods]))
    announce(f"{name}: loading")
    try:
        base = case.base()
        contenders = [Contender(method, copy.deepcopy(base), case) for method in methods]
    except Exception as error:  # whatever the libraries raise
        raise InputError(f"{name}: {type(error).__name__}: {error}") from None
    seconds: dict[str, list[list[float]]] = {method: [] for method in methods}
    for number, timed in enumerate(interleaved_steps(contenders, settings.rounds), start=1):
        announce(f"{name}: round {number} of {settings.rounds}")
        for method, value in timed.items():
            seconds[method].append(value)
    rescale = None
    rescaling = next((c for c in contenders if c.name == "scalora"), None)
    if rescaling is not None:
        announce(f"{name}: the parts of a rescale")
        rescale = _rescale(name, rescaling, machine)
    del contenders, rescaling, base  # before peak memory is measured
    peaks: dict[str, int | None] = dict.fromkeys(methods)
    for method in methods if settings.memory else []:
        announce(f"{name}: peak memory of {method}")
        peaks[method] = peak_memory(method, case, settings.threads)
    return [
        Steps(name, method, seconds[method], seconds[BASELINE], peaks[method], peaks[BASELINE]) for method in methods
    ], rescale


def _rescale(name: str, contender: Contender, machine: Machine) -> Rescale:
    """The parts of a rescale and their lower bounds."""
    pairs = find_lora_pairs(contender.model, all_shapes=True)
    return Rescale(name, kind_of(pairs[0].remainder), rescale_parts(contender), seconds_of_parts(pairs, *machine))


def _environment(settings: BenchSettings, machine: Machine) -> dict[str, Any]:
    on_cuda = torch.device(settings.device).type == "cuda"
    return {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if on_cuda else f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": settings.threads,
        "bandwidth": machine.bandwidth,
        "rate": machine.rate,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }


def _markdown(settings: BenchSettings, environment: dict[str, Any], steps: list[Steps], rescales: list[Rescale]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in environment["versions"].items())
    sections = [
        f"{environment['date']}, {environment['device']}, {environment['threads']} threads, {versions}; "
        f"{settings.model or 'Llama with random weights'}; measured: "
        f"{environment['bandwidth'] / 1e9:.0f} GB/s, {environment['rate'] / 1e9:.0f} GFLOP/s (float32).",
        steps_table(steps),
        f"The methods take steps in turn, in {settings.rounds} rounds of whole intervals. Seconds per step: the median "
        f"over rounds at each place of a round, averaged over the places. Over {BASELINE}: the same for the ratio of "
        f"each step to {BASELINE}'s. Middle half: the quartiles of these ratios. "
        f"Base case: {_description(_cases(settings)[0][1])}.",
    ]
    if rescales:
        sections += [
            rescales_table(rescales),
            "A rescale at I = 1, median, by the profiler. Floor: every byte moved once and every operation done once, "
            "at the measured rates.",
        ]
    return "\n\n".join(sections) + "\n"


def _description(case: Case) -> str:
    model = "" if case.model else f"width {case.width}, {case.layers} layers, "
    native = ", native" if case.native else ""
    return f"{model}rank {case.rank}, {case.batch} × {case.sequence} tokens, {case.dtype}, merge {case.merge}{native}"


def _draw(folder: Path, steps: list[Steps], rescales: list[Rescale]) -> None:
    from scalora.report.figures import rescale_parts as draw_rescales
    from scalora.report.figures import step_ratios

    drawn = {
        "steps": step_ratios([(f"{s.method}, {s.case}", s.ratio, s.middle_half) for s in steps if s.method != BASELINE])
    }
    if rescales:
        drawn["rescale"] = draw_rescales([(r.case, r.parts, sum(r.floor.values())) for r in rescales])
    for name, figure in drawn.items():
        with atomic_write(folder / f"{name}.svg") as temporary:
            figure.savefig(temporary, format="svg", bbox_inches="tight")
