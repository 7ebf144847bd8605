"""Tests the paper's claim and ablations (ScaLoRA, arXiv 2510.23818) on regression problems that run in minutes.

    python recipes/paper/synthetic.py [--experiment reach] [--output runs/paper] [--small]

Does ScaLoRA learn an update that plain LoRA can't represent, and which parts of the method does that take? Each method
gets its own learning rate, and its own target norm or scaling, from grids of equal size that grow until the best value
is inside. Results use other seeds than the tuning. Each experiment writes NAME.jsonl (one run per line), NAME.md and
NAME.svg to the output folder; docs/experiments.md discusses the results.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import figures
import torch
from bench import ENGINES, OPTIMIZERS, Problem, Run, Search, Setting, Tuned, train
from problems import LinearProblem, TwoLayerProblem

# Centre of each method's first grid of learning rates; grids grow if the best rate is at an end.
_CENTRES = {
    "full": {"SGD": 0.2, "momentum": 0.02, "AdamW": 2e-3},
    "LoRA": {"SGD": 0.8, "momentum": 0.16, "AdamW": 8e-3, "PairAdamW": 2e-3},
    "engine": {"SGD": 0.8, "momentum": 0.64, "AdamW": 1.6e-2, "PairAdamW": 2e-3},
}
_CENTRES["engine"] |= {f"{name}, β₁ = 0.8": _CENTRES["engine"][name] for name in ("AdamW", "PairAdamW")}

_NORMS = (0.125, 0.25, 0.5)
_SCALINGS = (0.5, 1.0, 2.0)
_TURNS = (2.0, 4.0, 8.0)

# Ablations use the optimizer that people use. With momentum the best learning rate is the last one before divergence,
# so differences would mostly show how close that is.
_ABLATED = ("AdamW",)


@dataclass(frozen=True)
class Size:
    """The size of an experiment.

    Attributes:
        steps: optimizer steps of a run, unless the experiment sets its own.
        tuning_seeds: seeds on which learning rates and norms are chosen.
        seeds: seeds of the reported results.
        rates: learning rates in a grid.
        values: values of the target norm or scaling in a grid.
        extensions: how many times a grid of learning rates may grow.
        optimizers: names of the optimizers, keys of `OPTIMIZERS`.
    """

    steps: int = 300
    tuning_seeds: Sequence[int] = (0, 1)
    seeds: Sequence[int] = (10, 11, 12, 13, 14)
    rates: int = 5
    values: int = 3
    extensions: int = 4
    optimizers: Sequence[str] = tuple(OPTIMIZERS)

    def search(self, problem: Callable[[int], Problem], steps: int | None = None) -> Search:
        """Make the tuning search of this size.

        Args:
            problem: makes a problem from a seed.
            steps: optimizer steps of a run; None uses `steps` of this size.
        """
        value_extensions = 2 if self.extensions else 0
        return Search(problem, steps or self.steps, self.tuning_seeds, self.rates, self.extensions, value_extensions)


SMALL = Size(steps=12, tuning_seeds=(0,), seeds=(10, 11), rates=2, values=1, extensions=0, optimizers=("AdamW",))


@dataclass(frozen=True)
class Variant:
    """One row of a table, before it has results.

    Attributes:
        label: name in the table.
        setting: everything but the optimizer, the learning rate and the searched field.
        x: position on the figure's x axis; NaN if the figure has none.
    """

    label: str
    setting: Setting
    x: float = math.nan

    def searched(self) -> tuple[str, Sequence[float]]:
        """Name and values of the field that is tuned besides the learning rate; empty if there is none."""
        if self.setting.method == "full":
            return "", ()
        if self.setting.mode == "matrix":
            return "turn", _TURNS
        if self.setting.method in ENGINES or self.setting.start == "oracle":
            return "target_norm", _NORMS
        return "scaling", _SCALINGS


@dataclass(frozen=True)
class Outcome:
    """One row of a table, with its results.

    Attributes:
        variant: the method and its settings.
        optimizer: name of the optimizer.
        tuned: the chosen learning rate and target norm or scaling.
        runs: runs with these values on the reported seeds.
    """

    variant: Variant
    optimizer: str
    tuned: Tuned
    runs: Sequence[Run]

    def lasting(self) -> list[Run]:
        """Runs that did not diverge."""
        return [run for run in self.runs if math.isfinite(run.risks[-1])]

    def risk(self) -> tuple[float, float]:
        """Mean and standard error of the final risk over the runs that did not diverge."""
        risks = [run.risks[-1] for run in self.lasting()]
        if len(risks) < 2:
            return (risks[0] if risks else math.inf), math.nan
        return mean(risks), stdev(risks) / len(risks) ** 0.5

    def risk_cell(self) -> str:
        """Format the risk for a table, with the number of diverged runs."""
        risk, error = self.risk()
        diverged = len(self.runs) - len(self.lasting())
        return f"{risk:.3g} ± {error:.1g}" + (f", {diverged} of {len(self.runs)} diverged" if diverged else "")

    def cells(self) -> list[str]:
        """Cells of the row: optimizer, method, risk, ranks, shares, learning rate, norm or scaling."""
        name, _ = self.variant.searched()
        runs = self.lasting() or self.runs
        value = f"{getattr(self.tuned.setting, name):g}" if name else ""
        shares = [mean(getattr(run, share) for run in runs) for share in ("column_share", "scalar_share")]
        return [
            self.optimizer,
            self.variant.label,
            self.risk_cell(),
            f"{mean(run.effective_ranks[-1] for run in runs):.1f}",
            f"{mean(run.numerical_rank for run in runs):.0f}",
            "" if math.isnan(shares[0]) else " / ".join(f"{100 * share:.0f}" for share in shares),
            f"{self.tuned.rate:.2g}" + ("" if self.tuned.inside else " (edge)"),
            value + ("" if self.tuned.value_inside else " (edge)"),
        ]


_HEADER = [
    "optimizer",
    "method",
    "risk",
    "effective rank",
    "numerical rank",
    "column / scalar, %",
    "learning rate",
    "norm or scaling",
]


def table(outcomes: Sequence[Outcome]) -> str:
    """Format outcomes as a Markdown table."""
    rows = [_HEADER, ["---"] * len(_HEADER), *(outcome.cells() for outcome in outcomes)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def compare(
    search: Search, variants: Sequence[Variant], size: Size, log: list[Run], optimizers: Sequence[str] | None = None
) -> list[Outcome]:
    """Tune every variant with every optimizer, run it on the reported seeds, and print its row.

    Args:
        search: budget for tuning.
        variants: rows of the table.
        size: size of the experiment.
        log: every run is appended to it.
        optimizers: names of the optimizers; None uses those of `size`.
    """
    outcomes = []
    for optimizer in optimizers or size.optimizers:
        for variant in variants:
            setting = replace(variant.setting, optimizer=optimizer)
            centre = _CENTRES["engine" if setting.method in ENGINES else setting.method][optimizer]
            name, values = variant.searched()
            if name:
                tuned = search.rate_and_value(setting, name, values[: size.values], centre, log)
            else:
                tuned = search.rate(setting, centre, log)
            runs = train(search.problem, tuned.setting, [tuned.rate], size.seeds, search.steps)
            log.extend(runs)
            outcomes.append(Outcome(variant, optimizer, tuned, runs))
            print("|", " | ".join(outcomes[-1].cells()), "|", flush=True)
    return outcomes


def _of(method: str, **settings: object) -> Setting:
    return Setting(method, "", **settings)  # type: ignore[arg-type]


_FULL, _LORA, _SCALORA = Variant("full", _of("full")), Variant("LoRA", _of("LoRA")), Variant("ScaLoRA", _of("ScaLoRA"))
_NORMALISED = Variant("normalised columns", _of("normalised columns"))


def reach(size: Size, log: list[Run], file: Path) -> str:
    """Every method on the linear problem."""
    wide = Variant("LoRA r = 32", _of("LoRA", rank=32))
    outcomes = compare(size.search(LinearProblem), [_FULL, wide, _LORA, _SCALORA, _NORMALISED], size, log)
    floor = mean(LinearProblem(seed).floor[4] for seed in size.seeds)
    figures.curves(file, outcomes, floor)
    return f"The best update of rank 4 has risk {floor:.4f}.\n\n" + table(outcomes)


def two_layers(size: Size, log: list[Run], file: Path) -> str:
    """Every method on the two-layer problem."""
    outcomes = compare(size.search(TwoLayerProblem), [_FULL, _LORA, _SCALORA, _NORMALISED], size, log, _ABLATED)
    figures.curves(file, outcomes)
    return table(outcomes)


def target_norm(size: Size, log: list[Run], file: Path) -> str:
    """A grid of target norms, with analytic factors and with normalised columns, each with its own learning rate."""
    norms = (0.0625, 0.125, 0.25, 0.5, 1.0, 2.0) if size.extensions else _NORMS[: size.values]
    search, text = size.search(LinearProblem), "| optimizer | method | " + " | ".join(f"{n:g}" for n in norms) + " |\n"
    text += "|---" * (2 + len(norms)) + "|\n"
    risks = {}
    for optimizer in size.optimizers:
        for variant in (_SCALORA, _NORMALISED):
            cells = []
            for norm in norms:
                setting = replace(variant.setting, optimizer=optimizer, target_norm=norm)
                tuned = search.rate(setting, _CENTRES["engine"][optimizer], log)
                runs = train(search.problem, tuned.setting, [tuned.rate], size.seeds, search.steps)
                log.extend(runs)
                outcome = Outcome(variant, optimizer, tuned, runs)
                risks[optimizer, variant.label, norm] = outcome.risk()
                edge = "" if tuned.inside else ", edge"
                cells.append(f"{outcome.risk_cell()} ({tuned.rate:.2g}{edge})")
            line = f"| {optimizer} | {variant.label} | " + " | ".join(cells) + " |\n"
            print(line, end="", flush=True)
            text += line
    figures.norms(file, risks, log)
    return text


def budget(size: Size, log: list[Run], file: Path) -> str:
    """Whether more steps reach full fine-tuning."""
    text, points = "", []
    for steps in (100, 300, 1000) if size.extensions else (6, 12):
        print(f"{steps} steps", flush=True)
        variants = [replace(v, x=steps) for v in (_FULL, _LORA, _SCALORA)]
        outcomes = compare(size.search(LinearProblem, steps), variants, size, log, _ABLATED)
        points += outcomes
        text += f"\n{steps} steps:\n\n" + table(outcomes)
    figures.lines(file, points, "optimizer steps")
    return text


def exact(size: Size, log: list[Run], file: Path) -> str:
    """No batch noise: every gradient is the gradient of the risk."""
    search = size.search(partial(LinearProblem, exact=True))
    outcomes = compare(search, [_FULL, _SCALORA, _NORMALISED], size, log, _ABLATED)
    figures.curves(file, outcomes)
    return table(outcomes)


def interval(size: Size, log: list[Run], file: Path) -> str:
    """Rescaling at every I-th step."""
    variants = [Variant(f"I = {i}", _of("ScaLoRA", interval=i), i) for i in (1, 5, 10, 20, 50)]
    outcomes = compare(size.search(LinearProblem), variants, size, log, _ABLATED)
    figures.lines(file, outcomes, "interval I")
    return table(outcomes)


def start(size: Size, log: list[Run], file: Path) -> str:
    """PEFT's zero start, a random start subtracted from the base, and the SVD oracle's start."""
    variants = [
        Variant(f"{method}, {start}", _of(method, start=start))
        for start in ("zero", "random", "oracle")
        for method in ("LoRA", "ScaLoRA")
    ]
    outcomes = compare(size.search(LinearProblem), variants, size, log, _ABLATED)
    figures.bars(file, outcomes)
    return table(outcomes)


def mode(size: Size, log: list[Run], file: Path) -> str:
    """Column scaling, scalar scaling, and the paper's rule that chooses between them."""
    variants = [Variant(mode, _of("ScaLoRA", mode=mode)) for mode in ("auto", "column", "scalar")]
    outcomes = compare(size.search(LinearProblem), variants, size, log)
    figures.bars(file, outcomes)
    return table(outcomes)


def transport(size: Size, log: list[Run], file: Path) -> str:
    """With and without carrying over the optimizer's state; SGD has none."""
    variants = [
        Variant(f"{label}, I = {i}", _of(method, interval=i))
        for i in (1, 10)
        for method, label in (("ScaLoRA", "carried"), ("no transport", "left as it was"))
    ]
    outcomes = compare(size.search(LinearProblem), variants, size, log, [o for o in size.optimizers if o != "SGD"])
    figures.bars(file, outcomes)
    return table(outcomes)


def rank(size: Size, log: list[Run], file: Path) -> str:
    """Adapters of several ranks."""
    variants = [
        Variant(f"{method} r = {r}", _of(method, rank=r), r)
        for method in ("LoRA", "ScaLoRA")
        for r in (2, 4, 8, 16, 32)
    ]
    outcomes = compare(size.search(LinearProblem), variants, size, log, _ABLATED)
    figures.lines(file, outcomes, "rank r of the adapter")
    return table(outcomes)


def matrix(size: Size, log: list[Run], file: Path) -> str:
    """Matrix scaling with PairAdamW beside column scaling with AdamW, each with two momenta, and without rescales."""
    search, outcomes = size.search(LinearProblem), []
    for r in (2, 4, 8):
        columns = [Variant(f"columns, r = {r}", _of("ScaLoRA", rank=r), r)]
        outcomes += compare(search, columns, size, log, (*_ABLATED, "AdamW, β₁ = 0.8"))
        polar, exact = (
            Variant(f"{optimum}, r = {r}", _of("matrix", rank=r, mode="matrix", optimum=optimum, warmup_steps=1), r)
            for optimum in ("polar", "exact")
        )
        without = Variant(f"no rescale, r = {r}", _of("LoRA", rank=r), r)
        outcomes += compare(search, [polar, exact, without], size, log, ("PairAdamW",))
        outcomes += compare(search, [polar], size, log, ("PairAdamW, β₁ = 0.8",))
    figures.bars(file, [outcome for outcome in outcomes if "β₁" not in outcome.optimizer])
    return (
        table(outcomes)
        + "\nTuning seeds, best rate of each turn (norm, scaling):\n\n"
        + "".join(map(_by_value, outcomes))
    )


def block_signs(size: Size, log: list[Run], file: Path) -> str:
    """Block signs beside LoRA and matrix scaling, all with PairAdamW."""
    search, outcomes = size.search(LinearProblem), []
    for r in (4, 16):
        variants = [
            Variant(f"LoRA, r = {r}", _of("LoRA", rank=r), r),
            Variant(f"block signs, r = {r}", _of("LoRA", rank=r, blocks=8), r),
            Variant(f"matrices, r = {r}", _of("matrix", rank=r, mode="matrix", warmup_steps=1), r),
        ]
        outcomes += compare(search, variants, size, log, ("PairAdamW",))
    figures.bars(file, outcomes)
    return table(outcomes)


def _by_value(outcome: Outcome) -> str:
    risks = ", ".join(f"{value:g}: {risk:.4f}" for value, risk in outcome.tuned.by_value.items())
    return f"- {outcome.variant.label}: {risks}\n"


_ALL = (reach, target_norm, budget, exact, interval, start, mode, transport, rank, matrix, block_signs, two_layers)

EXPERIMENTS = {experiment.__name__: experiment for experiment in _ALL}


def main(words: Sequence[str] | None = None) -> None:
    """Run the chosen experiments.

    Args:
        words: command-line arguments; None reads `sys.argv`.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--experiment", choices=[*EXPERIMENTS, "all"], default="all", help="experiment to run (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/paper"), help="output folder (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="check that it runs; the numbers are meaningless")
    arguments = parser.parse_args(words)
    torch.set_num_threads(1)  # more threads slow down matrices of this size
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in EXPERIMENTS if arguments.experiment == "all" else [arguments.experiment]:
        print(f"{name}: {EXPERIMENTS[name].__doc__}", flush=True)
        log: list[Run] = []
        started = time.process_time()
        text = EXPERIMENTS[name](SMALL if arguments.small else Size(), log, arguments.output / f"{name}.svg")
        (arguments.output / f"{name}.md").write_text(text, encoding="utf-8")
        with (arguments.output / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(run.row()) + "\n" for run in log)
        print(f"{name}: {len(log)} runs in {time.process_time() - started:.0f} s of one core", flush=True)


if __name__ == "__main__":
    main()
