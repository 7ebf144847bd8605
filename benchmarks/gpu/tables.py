"""Markdown tables of the results of `gpu.cities`: scores by method, against the first method, over rates and shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

from gpu.studies import Cell, Studies
from scalora.studies.grid import grid

_NONE = "—"


def tables(studies: Studies) -> str:
    """All tables of all studies, as far as their runs are finished.

    Args:
        studies: the studies with their results.
    """
    return "\n\n".join(section for name in studies.names() for section in _study(studies, name)) + "\n"


def paired_p(differences: Sequence[float]) -> float:
    """The p value of the two-sided paired t test.

    Args:
        differences: one for each seed.

    Returns:
        NaN for fewer than two differences, or if all are equal.
    """
    count = len(differences)
    if count < 2 or (deviation := stdev(differences)) == 0:
        return math.nan
    return t_probability(mean(differences) / (deviation / math.sqrt(count)), count - 1)


def t_probability(t: float, freedom: int) -> float:
    """The probability that Student's t is at least as far from zero: its finite series for whole degrees of freedom.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.

    Args:
        t: the statistic.
        freedom: degrees of freedom.
    """
    angle = math.atan(abs(t) / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    series = term if freedom > 1 else 0.0
    for number in range(2 + odd, freedom - 1, 2):
        term *= cosine**2 * (number - 1) / number
        series += term
    inside = 2 / math.pi * (angle + sine * series) if odd else sine * series
    return max(0.0, 1 - inside)


def _study(studies: Studies, name: str) -> list[str]:
    methods = studies.methods(name)
    found = {method: _reported(studies, name, method, 1) for method in methods}
    baseline = found[methods[0]]
    title = studies.settings(name, methods[0])
    sections = [
        f"### {name}",
        f"{title['steps']} steps of {title['batch']}, task {title['task']!r}, head's rate {title['head_rate']:g}. "
        f"Means over seeds ± standard errors; p: paired t test against {methods[0]}; *: at the edge of its grid.",
        grid(
            ["method", "rate", "seeds", "accuracy", "loss", "training loss", "Δ accuracy", "p", "Δ loss", "p", "s/run"],
            [_row(studies, name, method, found[method], baseline) for method in methods],
        ),
        grid(["method", "loss by rate, tuning seeds"], [_rates(studies, name, method) for method in methods]),
    ]
    shares = sorted({share for method in methods for share in studies.settings(name, method)["shares"]})
    if len(shares) > 1:
        rows = [[method, *(_score(studies, name, method, share) for share in shares)] for method in methods]
        sections += [
            "Accuracy and loss over a share of the steps, with its own schedule, at the rate that is best over all:",
            grid(["method", *(f"{100 * share:g} %" for share in shares)], rows),
        ]
    return sections


def _reported(studies: Studies, study: str, method: str, share: float) -> dict[int, dict[str, Any]]:
    """Results at the method's best rate, by seed."""
    rate = studies.best_rate(study, method)
    if rate is None:
        return {}
    cells = [Cell(study, method, rate, seed, share) for seed in studies.settings(study, method)["seeds"]]
    return {cell.seed: result for cell in cells if (result := studies.results.get(cell)) is not None}


def _row(
    studies: Studies, study: str, method: str, own: dict[int, dict[str, Any]], baseline: dict[int, dict[str, Any]]
) -> list[str]:
    settings = studies.settings(study, method)
    rate = studies.best_rate(study, method)
    edge = "*" if rate in (min(settings["rates"]), max(settings["rates"])) and len(settings["rates"]) > 1 else ""
    row = [method, _NONE if rate is None else f"{rate:g}{edge}", f"{len(own)}/{len(settings['seeds'])}"]
    row += [_with_error([result[key] for result in own.values()]) for key in ("accuracy", "loss", "train_loss")]
    for key in ("accuracy", "loss"):
        both = [own[seed][key] - baseline[seed][key] for seed in own if seed in baseline] if own is not baseline else []
        p = paired_p(both)
        row += [_with_error(both, "+.4f"), _NONE if math.isnan(p) else f"{p:.2g}"]
    return [*row, f"{mean(result['seconds'] for result in own.values()):.1f}" if own else _NONE]


def _rates(studies: Studies, study: str, method: str) -> list[str]:
    settings = studies.settings(study, method)
    losses = []
    for rate in settings["rates"]:
        cells = [Cell(study, method, rate, seed, 1) for seed in settings["tuning_seeds"]]
        done = [result["loss"] for cell in cells if (result := studies.results.get(cell)) is not None]
        losses.append(f"{rate:g}: {mean(done):.4f}" if done else f"{rate:g}: {_NONE}")
    return [method, ", ".join(losses)]


def _score(studies: Studies, study: str, method: str, share: float) -> str:
    results = _reported(studies, study, method, share).values()
    return ", ".join(_with_error([result[key] for result in results]) for key in ("accuracy", "loss"))


def _with_error(values: Sequence[float], form: str = ".4f") -> str:
    if not values:
        return _NONE
    error = f" ± {stdev(values) / math.sqrt(len(values)):.4f}" if len(values) > 1 else ""
    return f"{mean(values):{form}}{error}"
