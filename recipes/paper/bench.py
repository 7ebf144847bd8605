"""Trains a method on many copies of a small problem at once, each with its own seed and learning rate, and tunes it.

The copies are separate modules of one model, and none sees another's data, gradients or optimizer state. Training them
together costs a fraction of training them one by one.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from statistics import mean
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from problems import LinearProblem, TwoLayerProblem
from torch import Tensor, nn
from torch.optim import Optimizer

from scalora import PairAdamW, ScaLora, ScaLoraConfig, add_block_signs, effective_rank, numerical_rank, optimal_start
from scalora.maths.mode import COLUMN, SCALAR
from scalora.maths.scaling import Grams, Scaling, scaling_of_grams
from scalora.rivals.controls import normalising_rule, scale_gradients_only

Problem = LinearProblem | TwoLayerProblem

OPTIMIZERS: dict[str, Callable[[nn.Module, list[dict[str, Any]]], Optimizer]] = {
    "SGD": lambda model, groups: torch.optim.SGD(groups),
    "momentum": lambda model, groups: torch.optim.SGD(groups, momentum=0.9),
    "AdamW": lambda model, groups: torch.optim.AdamW(groups, weight_decay=0.0),
    "PairAdamW": lambda model, groups: PairAdamW(model, groups),
    # Which momentum is best depends on the noise; for comparisons in which both have it tuned.
    "AdamW, β₁ = 0.8": lambda model, groups: torch.optim.AdamW(groups, betas=(0.8, 0.999), weight_decay=0.0),
    "PairAdamW, β₁ = 0.8": lambda model, groups: PairAdamW(model, groups, betas=(0.8, 0.999)),
}

# The engine's two replaceable decisions: how the factors are chosen, and how optimizer state is carried over.
ENGINES: dict[str, dict[str, Callable[..., Any]]] = {
    "ScaLoRA": {},
    "normalised columns": {"scaling_rule": normalising_rule},
    "no transport": {"transport": scale_gradients_only},
    "matrix": {},
}

_CHECKS = 50
_RANK_CHECKS = 10


@dataclass(frozen=True)
class Setting:
    """A method and all its settings except the learning rate.

    Attributes:
        method: "full", "LoRA" or one of `ENGINES`.
        optimizer: one of `OPTIMIZERS`.
        rank: rank of the adapter.
        scaling: alpha/r of the adapter.
        target_norm: column norm that the engine's scaling aims at; without effect in mode "matrix".
        turn: angle by which a step turns a column, in mode "matrix".
        interval: optimizer steps from one rescale to the next.
        warmup_steps: optimizer steps before the first rescale.
        mode: which scalings the engine tries: "auto", "column", "scalar" or "matrix".
        optimum: which matrices the engine takes in mode "matrix": "polar" or "exact".
        start: "zero" is PEFT's start; "random" makes lora_B random too and subtracts the product from the base weight;
            "oracle" is `scalora.optimal_start`.
        blocks: number of block signs of each side; 0 for none.
    """

    method: str
    optimizer: str
    rank: int = 4
    scaling: float = 1.0
    target_norm: float = 1.0
    turn: float = ScaLoraConfig.turn
    interval: int = 1
    warmup_steps: int = 10
    mode: str = "auto"
    optimum: str = "polar"
    start: str = "zero"
    blocks: int = 0

    def config(self) -> ScaLoraConfig:
        """Settings of the engine."""
        return ScaLoraConfig(
            target_norm=None if self.mode == "matrix" else self.target_norm,
            turn=self.turn,
            interval=self.interval,
            warmup_steps=self.warmup_steps,
            mode=self.mode,
            optimum=self.optimum,
        )


@dataclass
class Run:
    """Settings and measurements of one copy.

    Attributes:
        setting: the method and its settings.
        rate: learning rate at the first step; it falls linearly to zero.
        seed: seed of the problem, the batches and the adapter.
        steps: steps at which `risks` were measured.
        risks: risk relative to that at the start; infinite once the run has diverged.
        rank_steps: steps at which `effective_ranks` were measured.
        effective_ranks: effective rank of the weight update so far, mean over layers.
        numerical_rank: numerical rank of the final update, mean over layers.
        column_share: share of rescales that used the column optimum; NaN without an engine.
        scalar_share: share of rescales that used the scalar optimum; NaN without an engine.
        column_norm: mean norm of the adapter's columns right after a rescale; NaN without an engine.
    """

    setting: Setting
    rate: float
    seed: int
    steps: list[int] = field(default_factory=list)
    risks: list[float] = field(default_factory=list)
    rank_steps: list[int] = field(default_factory=list)
    effective_ranks: list[float] = field(default_factory=list)
    numerical_rank: float = math.nan
    column_share: float = math.nan
    scalar_share: float = math.nan
    column_norm: float = math.nan

    def row(self) -> dict[str, Any]:
        """Convert to a dict for JSON, with None for NaN and infinity."""
        return asdict(self, dict_factory=lambda items: {key: _finite(value) for key, value in items})


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Chosen:
    """Wraps a scaling rule and records, per copy, which scaling it chose and the resulting column norms."""

    def __init__(self, rule: Callable[..., Scaling], copies: int) -> None:
        self.counts = torch.zeros(4, copies)
        self._rule = rule

    def __call__(self, grams: Grams, *, target_norm: Tensor) -> Scaling:
        scaling = self._rule(grams, target_norm=target_norm)
        A, B = (gram.diagonal(dim1=-2, dim2=-1).sqrt() for gram in grams.of_factors)
        norms = A * scaling.alpha + B * scaling.beta
        counts = torch.stack(
            [scaling.choice == COLUMN, scaling.choice == SCALAR, norms.mean(-1) / 2, scaling.choice >= 0]
        )
        # Layers are ordered by shape, and within a shape by copy.
        self.counts += counts.unflatten(-1, (-1, self.counts.shape[-1])).sum(-2)
        return scaling

    def means(self) -> Tensor:
        """Share of column scalings, share of scalar scalings, and mean column norm, (3, copies)."""
        return self.counts[:3] / self.counts[3]


def train(
    problem: Callable[[int], Problem],
    setting: Setting,
    rates: Sequence[float],
    seeds: Sequence[int],
    steps: int,
    *,
    only_the_end: bool = False,
) -> list[Run]:
    """Run every pair of a rate and a seed, with learning rates that fall linearly to zero.

    Args:
        problem: makes a problem from a seed.
        setting: the method and its settings.
        rates: learning rates at the first step.
        seeds: seeds of problem, batches and adapter.
        steps: optimizer steps of each run.
        only_the_end: measure risk and ranks only after the last step, not along the way.
    """
    runs = [Run(setting, rate, seed) for rate, seed in itertools.product(rates, seeds)]
    problems = {seed: problem(seed) for seed in seeds}
    copies = nn.ModuleDict({f"run{i}": problems[run.seed].student() for i, run in enumerate(runs)})
    begun = [[w.detach().clone() for w in _weights(copy)] for copy in copies.values()]
    model = copies if setting.method == "full" else _adapted(copies, setting)
    modules = list((copies if setting.method == "full" else model.base_model.model).values())

    def backward() -> None:
        batches = {seed: problem.batch() for seed, problem in problems.items()}
        losses = []
        for run, module in zip(runs, modules, strict=True):
            x, y = batches[run.seed]
            losses.append((module(x) - y).square().sum(1).mean() / 2)
        sum(losses).backward()

    if setting.method != "full":
        _start(model, modules, runs, backward)
    if setting.blocks:
        add_block_signs(model, setting.blocks)
    groups = [
        {"params": [p for p in module.parameters() if p.requires_grad], "lr": run.rate}
        for run, module in zip(runs, modules, strict=True)
    ]
    optimizer = OPTIMIZERS[setting.optimizer](model, groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    chosen = None
    if setting.method in ENGINES:
        config, decisions = setting.config(), dict(ENGINES[setting.method])
        if setting.mode != "matrix":
            rule = decisions.pop("scaling_rule", partial(scaling_of_grams, mode=config.mode))
            decisions["scaling_rule"] = chosen = _Chosen(rule, len(runs))
        ScaLora(model, optimizer, config, **decisions)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from copies that diverge, which their risks show
        for step in range(1, steps + 1):
            backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step == steps or not (only_the_end or step % max(1, steps // _CHECKS)):
                for run, module in zip(runs, modules, strict=True):
                    risk = problems[run.seed].risk(module)
                    run.steps.append(step)
                    run.risks.append(risk if risk < 1e3 else math.inf)
            if step == steps or not (only_the_end or step % max(1, steps // _RANK_CHECKS)):
                _measure_ranks(runs, modules, begun, step)
    if chosen is not None and chosen.counts.any():
        for run, (column, scalar, norm) in zip(runs, chosen.means().T.tolist(), strict=True):
            run.column_share, run.scalar_share, run.column_norm = column, scalar, norm
    return runs


def _adapted(copies: nn.ModuleDict, setting: Setting) -> nn.Module:
    names = [name for name, module in copies.named_modules() if isinstance(module, nn.Linear)]
    return get_peft_model(
        copies, LoraConfig(r=setting.rank, lora_alpha=setting.scaling * setting.rank, target_modules=names)
    )


def _lora_layers(module: nn.Module) -> list[LoraLayer]:
    return [m for m in module.modules() if isinstance(m, LoraLayer)]


def _weights(module: nn.Module) -> list[Tensor]:
    """Each layer's effective weight, adapter included."""
    if layers := _lora_layers(module):
        return [layer.base_layer.weight + layer.get_delta_weight("default") for layer in layers]
    return [m.weight for m in module.modules() if isinstance(m, nn.Linear)]


@torch.no_grad()
def _measure_ranks(runs: list[Run], modules: list[nn.Module], begun: list[list[Tensor]], step: int) -> None:
    for run, module, weights in zip(runs, modules, begun, strict=True):
        updates = [now - before for now, before in zip(_weights(module), weights, strict=True)]
        finite = all(update.isfinite().all() for update in updates)
        run.rank_steps.append(step)
        run.effective_ranks.append(mean(map(effective_rank, updates)) if finite else math.nan)
        run.numerical_rank = mean(map(numerical_rank, updates)) if finite else math.nan


def _start(model: nn.Module, modules: list[nn.Module], runs: list[Run], backward: Callable[[], None]) -> None:
    """Initialise the adapters: the same seed gives the same adapter at every learning rate."""
    setting = runs[0].setting
    for run, module in zip(runs, modules, strict=True):
        torch.manual_seed(run.seed)
        for layer in _lora_layers(module):
            layer.reset_lora_parameters("default", True)
            if setting.start == "random":
                lora_B = layer.lora_B["default"].weight
                nn.init.uniform_(lora_B, -(lora_B.shape[0] ** -0.5), lora_B.shape[0] ** -0.5)
                with torch.no_grad():
                    layer.base_layer.weight -= layer.get_delta_weight("default")
    if setting.start == "oracle":
        optimal_start(model, backward, target_norm=setting.target_norm)


def final_risk(runs: Sequence[Run]) -> float:
    """Mean final risk over the runs; infinite if any has diverged."""
    return mean(run.risks[-1] if math.isfinite(run.risks[-1]) else math.inf for run in runs)


@dataclass
class Tuned:
    """The best learning rate of a setting and, if another field was searched too, its best value.

    Attributes:
        setting: the setting, with the best value.
        rate: the learning rate with the lowest final risk, averaged over the seeds.
        tried: final risk for every rate tried at the best value.
        inside: whether worse rates were tried on both sides of the best one.
        by_value: lowest risk for every value of the other field; empty if there was none.
    """

    setting: Setting
    rate: float
    tried: dict[float, float]
    inside: bool
    by_value: dict[float, float] = field(default_factory=dict)

    @property
    def risk(self) -> float:
        """The lowest final risk."""
        return self.tried[self.rate]

    @property
    def value_inside(self) -> bool:
        """Whether worse values of the other field were tried on both sides of the best one."""
        best = min(self.by_value, key=lambda value: self.by_value[value]) if self.by_value else 0.0
        return not self.by_value or min(self.by_value) < best < max(self.by_value)


@dataclass(frozen=True)
class Search:
    """The budget for tuning.

    Attributes:
        problem: makes a problem from a seed.
        steps: optimizer steps of each run.
        seeds: seeds to tune on; results are reported on others.
        rates: learning rates in a grid, a factor of 2 apart.
        extensions: how many times a grid is extended, by half its length, while its best rate is at an end.
        value_extensions: how many times the other field's values are extended, by one, while the best is at an end.
    """

    problem: Callable[[int], Problem]
    steps: int
    seeds: Sequence[int]
    rates: int = 5
    extensions: int = 4
    value_extensions: int = 2

    def rate(self, setting: Setting, centre: float, log: list[Run]) -> Tuned:
        """Tune the learning rate.

        Args:
            setting: the method and its settings.
            centre: middle of the first grid of learning rates.
            log: every run is appended to it.
        """
        new = [centre * 2.0 ** (i - self.rates // 2) for i in range(self.rates)]
        tried: dict[float, float] = {}
        for _ in range(self.extensions + 1):
            runs = train(self.problem, setting, new, self.seeds, self.steps, only_the_end=True)
            log.extend(runs)
            tried |= {rate: final_risk([run for run in runs if run.rate == rate]) for rate in new}
            best, low, high = min(tried, key=lambda rate: tried[rate]), min(tried), max(tried)
            if low < best < high:
                break
            more = range(1, self.rates // 2 + 1)
            new = [low / 2**i for i in more] if best == low else [high * 2**i for i in more]
        return Tuned(setting, best, dict(sorted(tried.items())), low < best < high)

    def rate_and_value(
        self, setting: Setting, name: str, values: Sequence[float], centre: float, log: list[Run]
    ) -> Tuned:
        """Tune the learning rate for every value of another field, and keep the best of both.

        Args:
            setting: the method and its other settings.
            name: name of the field of `Setting`.
            values: values to try first.
            centre: middle of the first grid of learning rates.
            log: every run is appended to it.
        """
        tuned: dict[float, Tuned] = {}
        new = list(values)
        for _ in range(self.value_extensions + 1):
            tuned |= {value: self.rate(replace(setting, **{name: value}), centre, log) for value in new}
            best, low, high = min(tuned, key=lambda value: tuned[value].risk), min(tuned), max(tuned)
            if low < best < high:
                break
            new = [low / 2 if best == low else high * 2]
        return replace(tuned[best], by_value={value: tuned[value].risk for value in sorted(tuned)})
