"""``scalora bench``: what methods cost, against LoRA in the same run, and a rescale beside its floor."""

from __future__ import annotations

import copy
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from scalora.bench.case import Case, Contender, method_and_interval
from scalora.bench.floor import rescale_work_of
from scalora.bench.measure import Machine, interleaved_steps, measure_machine, peak_memory, rescale_parts
from scalora.config import Merge
from scalora.engine import PARTS
from scalora.model.adapters import find_lora_pairs
from scalora.rescale.remainder import FactoredRemainder
from scalora.runs.errors import InputError
from scalora.runs.run_folder import write_json
from scalora.saving.files import atomic_write
from scalora.studies.table_markdown import grid

BASELINE = "lora"

_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class BenchSettings:
    """What to measure. The first value of each list is the base case; every other one is tried in its place alone.

    Attributes:
        model: folder or hub id; None for a Llama with random weights.
        methods: by name, ``scalora:10`` for an interval; LoRA is always among them.
        width: hidden sizes of the Llama with random weights.
        layers: its numbers of layers.
        rank: ranks of the adapter.
        sequence: tokens of a sequence.
        dtype: of the base weights.
        merge: where ScaLoRA's remainder goes.
        batch: sequences per step.
        device: to train on.
        rounds: of interleaved steps.
        memory: whether peak memory is measured, in a process of its own for each method.
        threads: that torch may use.
        native: whether ScaLoRA rescales in C++.

    Raises:
        InputError: a value is out of range.
    """

    model: str | None
    methods: list[str]
    width: list[int]
    layers: list[int]
    rank: list[int]
    sequence: list[int]
    dtype: list[str]
    merge: list[Merge]
    batch: int
    device: str
    rounds: int
    memory: bool
    threads: int
    native: bool

    def __post_init__(self) -> None:
        for name in self.methods:
            try:
                method_and_interval(name)
            except ValueError as error:
                raise InputError(f"--method {name!r}: {error}") from None
        if unknown := sorted(set(self.dtype) - set(_DTYPES)):
            raise InputError(f"--dtype {unknown[0]!r}: the dtypes are {', '.join(_DTYPES)}")
        if unknown := sorted(set(self.merge) - set(get_args(Merge))):
            raise InputError(f"--merge {unknown[0]!r}: the places are {', '.join(get_args(Merge))}")
        try:
            torch.empty(0, device=self.device)
        except (AssertionError, RuntimeError) as error:
            raise InputError(f"--device {self.device!r} can't be used: {str(error).splitlines()[0]}") from None

    def cases(self) -> list[tuple[str, Case]]:
        """The base case, then each other value of one list, with what is different about it."""
        axes = {
            name: getattr(self, name)
            for name in ("width", "layers", "rank", "sequence", "dtype", "merge")
            if self.model is None or name not in ("width", "layers")
        }
        base = Case(
            model=self.model,
            width=self.width[0],
            layers=self.layers[0],
            rank=self.rank[0],
            batch=self.batch,
            sequence=self.sequence[0],
            dtype=self.dtype[0],
            merge=self.merge[0],
            device=self.device,
            native=self.native,
        )
        others: list[tuple[str, Any]] = [(name, value) for name, values in axes.items() for value in values[1:]]
        return [("base", base), *((f"{name} {value}", replace(base, **{name: value})) for name, value in others)]


class Steps(NamedTuple):
    """A method in a case, beside LoRA in the same run.

    Attributes:
        case: which.
        method: likewise.
        seconds: of every step, (rounds, steps of a round).
        baseline_seconds: of LoRA's step at the same place.
        peak_memory: bytes.
        baseline_peak_memory: LoRA's.
    """

    case: str
    method: str
    seconds: list[list[float]]
    baseline_seconds: list[list[float]]
    peak_memory: int | None
    baseline_peak_memory: int | None

    @property
    def per_step(self) -> float:
        """Seconds: at each place of a round the median over the rounds, and of these the mean.

        A mean of medians, because a rescale that only some places have must count and a disturbance must not.
        """
        return float(np.median(self.seconds, axis=0).mean())

    @property
    def ratios(self) -> NDArray[np.float64]:
        """Over LoRA's, step by step, (rounds, steps of a round)."""
        ratios: NDArray[np.float64] = np.divide(self.seconds, self.baseline_seconds)
        return ratios

    @property
    def ratio(self) -> float:
        """Of `ratios`, as `per_step`."""
        return float(np.median(self.ratios, axis=0).mean())

    @property
    def middle_half(self) -> tuple[float, float]:
        """Between which half of all single ratios lies."""
        low, high = np.quantile(self.ratios, (0.25, 0.75))
        return float(low), float(high)


class Rescale(NamedTuple):
    """A rescale in a case: seconds of its parts, and at the least."""

    case: str
    merge: str
    parts: dict[str, float]
    floor: dict[str, float]


def bench(settings: BenchSettings, folder: Path) -> str:
    """Measure all cases; write ``bench.json``, ``bench.md`` and the figures; return the Markdown.

    Raises:
        InputError: a case can't be measured: the model can't be read, or a method can't be built for it.
        OSError: the results can't be written.
    """
    torch.set_num_threads(settings.threads)
    steps: list[Steps] = []
    rescales: list[Rescale] = []
    columns = TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("the machine", total=None)
        machine = measure_machine(settings.device)
        for name, case in settings.cases():
            for what in _measure(name, case, settings, machine, steps, rescales):
                progress.update(task, description=f"{name}: {what}")
    folder.mkdir(parents=True, exist_ok=True)
    environment = _environment(settings, machine)
    write_json(
        folder / "bench.json",
        {
            "environment": environment,
            "settings": asdict(settings),
            "steps": [row._asdict() for row in steps],
            "rescales": [row._asdict() for row in rescales],
        },
    )
    text = _markdown(settings, environment, steps, rescales)
    with atomic_write(folder / "bench.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    _draw(folder, steps, rescales)
    return text


def _measure(
    name: str,
    case: Case,
    settings: BenchSettings,
    machine: Machine,
    steps: list[Steps],
    rescales: list[Rescale],
) -> Iterator[str]:
    """Measure one case into the lists; yields what it is about to do."""
    methods = list(dict.fromkeys([BASELINE, *settings.methods]))
    yield "loading"
    try:
        base = case.base()
        contenders = [Contender(method, copy.deepcopy(base), case) for method in methods]
    except Exception as error:
        raise InputError(f"{name}: {type(error).__name__}: {error}") from None
    seconds: dict[str, list[list[float]]] = {method: [] for method in methods}
    for number, timed in enumerate(interleaved_steps(contenders, settings.rounds), start=1):
        yield f"round {number} of {settings.rounds}"
        for method, value in timed.items():
            seconds[method].append(value)
    rescaling = next((c for c in contenders if c.name == "scalora"), None)
    if rescaling is not None:
        yield "a rescale by its parts"
        pairs = find_lora_pairs(rescaling.model)
        merge = "factored" if isinstance(pairs[0].remainder, FactoredRemainder) else "dense"
        parts = rescale_parts(rescaling)
        rescales.append(Rescale(name, merge, parts, _floor(rescaling, machine)))
    del contenders, rescaling, base
    peaks: dict[str, int | None] = dict.fromkeys(methods)
    for method in methods if settings.memory else []:
        yield f"peak memory of {method}"
        peaks[method] = peak_memory(method, case, settings.threads)
    steps += [
        Steps(name, method, seconds[method], seconds[BASELINE], peaks[method], peaks[BASELINE]) for method in methods
    ]


def _floor(contender: Contender, machine: Machine) -> dict[str, float]:
    """Seconds of each part at the least; the Grams count with the solution, as the profiler sees them."""
    pairs = find_lora_pairs(contender.model)
    remainder = pairs[0].remainder
    total = rescale_work_of(pairs, remainder.max_rank if isinstance(remainder, FactoredRemainder) else None)
    solve = total.grams.seconds(*machine) + total.solve.seconds(*machine)
    return dict(zip(PARTS, (solve, total.merge.seconds(*machine), total.transport.seconds(*machine)), strict=True))


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
        grid(
            ["case", "method", "seconds per step", f"over {BASELINE}", "middle half", "peak memory, MiB", "over"],
            map(_steps_row, steps),
        ),
        f"Steps in turn, {settings.rounds} rounds of whole intervals; at each place of a round the median over the "
        f"rounds, and of these the mean; the ratio is taken step by step, and half of all single ratios lies where the "
        f"column says. Base case: {_base(settings)}.",
    ]
    if rescales:
        titles = [part.removeprefix("scalora::") for part in PARTS]
        sections += [
            grid(
                ["case", "merge", *(f"{title}, ms" for title in titles), "rescale, ms", "floor, ms", "over floor"],
                map(_rescale_row, rescales),
            ),
            "A rescale at I = 1, median, by the profiler; the floor: bytes moved once, arithmetic done once, at the "
            "measured rates.",
        ]
    return "\n\n".join(sections) + "\n"


def _base(settings: BenchSettings) -> str:
    case = settings.cases()[0][1]
    model = "" if case.model else f"width {case.width}, {case.layers} layers, "
    native = ", native" if case.native else ""
    return f"{model}rank {case.rank}, {case.batch} × {case.sequence} tokens, {case.dtype}, merge {case.merge}{native}"


def _steps_row(row: Steps) -> list[str]:
    if row.peak_memory is None or row.baseline_peak_memory is None:
        memory = ["—", "—"]
    else:
        memory = [f"{row.peak_memory / 2**20:.0f}", f"{row.peak_memory / row.baseline_peak_memory:.3f}"]
    low, high = row.middle_half
    spread = f"{low:.3f} … {high:.3f}"
    return [row.case, row.method, f"{row.per_step:.4g}", f"{row.ratio:.3f}", spread, *memory]


def _rescale_row(row: Rescale) -> list[str]:
    total, floor = sum(row.parts.values()), sum(row.floor.values())
    parts = (f"{1000 * seconds:.3g}" for seconds in row.parts.values())
    return [row.case, row.merge, *parts, f"{1000 * total:.3g}", f"{1000 * floor:.3g}", f"{total / floor:.1f}"]


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
