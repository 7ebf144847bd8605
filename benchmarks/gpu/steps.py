"""Measures the steps of ScaLoRA beside those of LoRA, DoRA and full training on a Llama of 1.2 billion random weights.

    python -m gpu.steps --output FOLDER --minutes 4

Blocks of whole intervals, one of each method, are timed in turn, round after round; within a block nothing waits for
the device, as in training. As many models are in memory at once as fit, and LoRA's is always among them. Then a rescale
is measured by its parts, beside the least time that its bytes take, and kernel launches are counted on models of two
depths. ``steps.json`` and ``steps.md`` are written again after every measurement; what no longer fits into the time, or
into memory, is listed in them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gpu.contenders import TOY, TOY_METHODS, Contender, Size, Spec, specs
from gpu.environment import environment
from gpu.rescales import launches, rescale
from gpu.residents import Clock, Resident, first_line, free, room, rounds
from gpu.step_tables import tables
from scalora.bench.measure import measure_machine
from scalora.saving.files import atomic_write

# Shares of the time at which each measurement ends, so that the later ones get theirs.
_STEPS_UNTIL, _PARTS_UNTIL = 0.74, 0.88

# Of the time for steps, what may go into loading models; of the rest, that of steps without gradient checkpointing.
_LOADING, _PLAIN = 0.4, 0.65

# Launches are counted on models so deep, which shows whether they grow with the layers.
_DEPTHS = (2, 4)


class Results:
    """What has been measured so far, in a file that is always whole.

    Args:
        folder: folder to write ``steps.json`` and ``steps.md`` to.
        size: model and batch.
    """

    def __init__(self, folder: Path, size: Size) -> None:
        self._folder = folder
        self.content: dict[str, Any] = {
            "environment": environment(size.device),
            "size": {**vars(size), "dtype": str(size.dtype)},
            "steps": [],
            "rescales": [],
            "launches": [],
            "left_out": [],
        }

    def add(self, kind: str, row: dict[str, Any]) -> None:
        """Add a row, and write everything.

        Args:
            kind: the list to add it to.
            row: the row.
        """
        self.content[kind].append(row)
        self.write()

    def leave_out(self, spec: Spec, what: str, why: str) -> None:
        """Note that something was not measured.

        Args:
            spec: the method.
            what: what would have been measured.
            why: why it was not.
        """
        print(f"{spec.name}, {what}: {why}", flush=True)
        self.add("left_out", {"method": spec.name, "what": what, "why": why})

    def measure(
        self, kind: str, spec: Spec, clock: Clock, until: float, measurement: Callable[[], dict[str, Any]]
    ) -> None:
        """Measure one thing and add it, or note why it was not measured.

        Args:
            kind: the list to add it to.
            spec: the method.
            clock: the time.
            until: share of the time after which nothing is begun.
            measurement: measures; returns the row.
        """
        if clock.spent() > until:
            self.leave_out(spec, kind, "no time was left")
            return
        try:
            self.add(kind, {"method": spec.name} | measurement())
        except Exception as error:  # the other measurements go on
            self.leave_out(spec, kind, first_line(error))
        free()

    def write(self) -> None:
        """Write the files."""
        for name, text in (("steps.json", json.dumps(self.content, indent=1)), ("steps.md", tables(self.content))):
            with atomic_write(self._folder / name) as temporary:
                temporary.write_text(text, encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Measure and write.

    Args:
        arguments: those of the command line, for tests.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--minutes", type=float, default=4.0, help="time for all of it")
    parser.add_argument("--layers", type=int, help="another number of layers")
    parser.add_argument("--only", help="measure LoRA and these methods only, by their names with ';' between them")
    parser.add_argument("--rounds", type=int, default=9, help="rounds after which to stop measuring steps")
    parser.add_argument("--toy", action="store_true", help="a tiny model on the CPU")
    options = parser.parse_args(arguments)
    clock = Clock(options.minutes)
    options.output.mkdir(parents=True, exist_ok=True)
    size = TOY if options.toy else Size()
    size = replace(size, layers=options.layers or size.layers)
    baseline, *others = specs()
    only = options.only.split(";") if options.only else TOY_METHODS if options.toy else None
    methods = [spec for spec in others if only is None or spec.name in only]
    results = Results(options.output, size)
    measure_steps(baseline, methods, size, results, clock, options.rounds)
    free()
    machine = measure_machine(size.device)
    results.content["environment"] |= machine._asdict()
    rescaling = [spec for spec in methods if spec.scalora is not None and spec.interval == 1]
    for spec in rescaling:
        results.measure(
            "rescales", spec, clock, _PARTS_UNTIL, lambda spec=spec: rescale(Contender(spec, size), machine)
        )
    for spec in [baseline, *rescaling]:
        for layers in _DEPTHS:
            few = replace(size, layers=layers, batch=1, sequence=16)
            results.measure("launches", spec, clock, 1, lambda spec=spec, few=few: launches(Contender(spec, few), few))
    results.write()


def measure_steps(
    baseline: Spec, methods: list[Spec], size: Size, results: Results, clock: Clock, most_rounds: int
) -> None:
    """Time all methods, in as many groups as memory makes necessary, each with the baseline.

    Args:
        baseline: what the others are compared with.
        methods: the others.
        size: model and batch.
        results: where the results go.
        clock: the time.
        most_rounds: rounds after which to stop even if there is time for more.
    """
    first = Resident(baseline, size)
    activations = first.activations()
    waiting = list(methods)
    while waiting and (now := clock.spent()) < _STEPS_UNTIL:
        loaded_until = now + _LOADING * (_STEPS_UNTIL - now)
        group = [first]
        while waiting and (clock.spent() < loaded_until or len(group) == 1):
            print(f"{clock.spent():.0%}: {waiting[0].name}", flush=True)
            why = ""
            try:
                group.append(Resident(waiting[0], size))
            except torch.OutOfMemoryError:
                why = "out of memory"
            except Exception as error:  # the other methods go on
                why = first_line(error)
            free()  # not before the exception is gone, whose frames hold tensors
            if not why and len(group) > 2 and room(size.device) < activations:
                group.pop()
                free()
                why = "out of memory"
            if why == "out of memory" and len(group) > 1:
                break  # the next group has room
            spec = waiting.pop(0)
            if why:
                results.leave_out(spec, "steps", why)
        # The groups share the time by their numbers of methods.
        share = len(group) / (len(group) + len(waiting))
        now = clock.spent()
        left = max(0.0, _STEPS_UNTIL - now) * share
        for checkpointing, until in ((False, now + _PLAIN * left), (True, now + left)):
            for row in rounds(group, checkpointing, until, clock, most_rounds):
                results.add("steps", row)
        for resident in group:
            for what, why in resident.failures.items():
                results.leave_out(resident.contender.spec, what, why)
            resident.failures.clear()
        del group, resident
        free()
    for spec in waiting:
        results.leave_out(spec, "steps", "no time was left")


if __name__ == "__main__":
    main()
