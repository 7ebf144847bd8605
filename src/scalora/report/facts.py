"""What someone wants to know first about a run or a study, in a few short facts and, for a study, one sentence."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd  # type: ignore[import-untyped]

from scalora.report.summaries import RunData
from scalora.report.tables import with_error
from scalora.runs.settings import Settings
from scalora.studies.reproduction import AVERAGE
from scalora.studies.reproduction_table import ReproductionResult
from scalora.studies.study import Study
from scalora.studies.table import StudyResult

# Scores of which the first that a run has gets a fact of its own; whether it is a share, shown in per cent.
_SCORES = {
    "eval_accuracy": ("Evaluation accuracy", True),
    "eval_mean_token_accuracy": ("Token accuracy in evaluation", True),
    "eval_pearson": ("Evaluation correlation (Pearson)", False),
}

_SIGNIFICANT = 0.05  # the usual level, below which a difference is said to be more than noise


@dataclass(frozen=True)
class Fact:
    """One fact: what it is, its value with unit, and a few words that belong to it."""

    label: str
    value: str
    note: str = ""


def run_subtitle(summary: Mapping[str, Any], settings: Settings) -> str:
    """What was trained how: method, model, task and steps.

    Args:
        summary: the run's summary, empty while it is not finished.
        settings: the run's settings.
    """
    steps = f"{summary['steps']} steps" if "steps" in summary else "not finished"
    return f"{settings.method} on {_model_name(settings.model)}, {settings.task}, {steps}"


def run_facts(run: RunData, summary: Mapping[str, Any]) -> list[Fact]:
    """Losses before and after, the rank that was reached, and the costs of a run; only what there is.

    Args:
        run: the run's numbers.
        summary: the run's summary, empty while it is not finished.
    """
    facts = [
        _first_to_last(run.metrics, "loss", "Training loss", share=False),
        _first_to_last(run.metrics, "eval_loss", "Evaluation loss", share=False),
        next((fact for name, how in _SCORES.items() if (fact := _first_to_last(run.metrics, name, *how))), None),
        _rank(run),
    ]
    known = {name: value for name, value in summary.items() if value is not None}
    if "training_seconds" in known:
        facts.append(Fact("Training time", duration(known["training_seconds"])))
    if "seconds_per_step" in known:
        facts.append(Fact("Time per step", duration(known["seconds_per_step"]), "median"))
    if "peak_memory_bytes" in known:
        facts.append(Fact("Peak memory", memory(known["peak_memory_bytes"])))
    if "trainable_parameters" in known:
        facts.append(Fact("Trainable parameters", f"{known['trainable_parameters']:,}"))
    return [fact for fact in facts if fact is not None]


def _first_to_last(metrics: pd.DataFrame, name: str, label: str, share: bool) -> Fact | None:
    if name not in metrics or metrics[name].isna().all():
        return None
    values = metrics[name].dropna()
    first, last = (f"{value:.1%}" if share else f"{value:.4g}" for value in (values.iloc[0], values.iloc[-1]))
    return Fact(label, f"{first} → {last}", "first → last") if len(values) > 1 else Fact(label, last, "at the end")


def _rank(run: RunData) -> Fact | None:
    if run.updates.empty:
        return None
    ranks = run.updates.loc[run.updates["step"] == run.updates["step"].max(), "numerical_rank"]
    note = f"median of {len(ranks)} layers, {ranks.min()} to {ranks.max()}"
    if run.adapter_rank is not None:
        note = f"from an adapter of rank {run.adapter_rank}; {note}"
    return Fact("Rank of the update", str(statistics.median_low(ranks)), note)


def study_subtitle(result: StudyResult) -> str:
    """How many methods, seeds and runs a study has, and on which model.

    Args:
        result: the study's results.
    """
    study, finished = result.study, int((result.cells["status"] == "finished").sum())
    model = _model_name(str(study.run.get("model", "")))
    methods, seeds = _count(len(study.methods), "method"), _count(len(study.seeds), "seed")
    return f"{methods} on {model}, {seeds}, {finished} of {len(result.cells)} runs finished"


def table_subtitle(result: ReproductionResult) -> str:
    """How many tasks and methods a recipe has, and how much of it is finished.

    Args:
        result: the results of the recipe.
    """
    studies = list(result.reproduction.studies.values())
    tasks = _count(len(studies), "task")
    methods = _count(max(len(study.methods) for study in studies), "method")
    return f"{tasks}, {methods}, {result.finished} of {result.runs} runs finished"


def table_facts(result: ReproductionResult) -> list[Fact]:
    """The average of each method of which the paper reports one, with the paper's.

    Args:
        result: the results of the recipe.
    """
    several = result.table["table"].nunique() > 1
    averages = result.table[(result.table["column"] == AVERAGE) & result.table["paper"].notna()]
    return [
        Fact(
            f"{row['method']}, average" + (f" of {row['table']}" if several else ""),
            "not finished" if math.isnan(row["ours"]) else f"{with_error(row['ours'], row['error'])} %",
            f"paper: {row['paper']:.2f} %",
        )
        for row in averages.to_dict("records")
    ]


def study_verdict(result: StudyResult) -> str:
    """Which method is best, by how much it beats the baseline, and whether that is more than noise.

    Args:
        result: the study's results.
    """
    study, rows = result.study, _best_first(result)
    if not len(rows):
        return f"No method has a finished run with {study.metric!r} yet."
    best = rows.iloc[0]
    direction = "highest" if study.larger_is_better() else "lowest"
    mean = with_error(best["metric_mean"], best["metric_se"])
    sentence = f"{best['method']} reaches the {direction} {study.metric}: {mean}"
    if study.baseline not in set(rows["method"]):
        return f"{sentence}. The baseline {study.baseline} has no finished run to compare with."
    if best["method"] != study.baseline:
        return f"{sentence}. {_against(study, best, len(rows) - 1)}"
    if len(rows) == 1:
        return f"{sentence}. No other method has a finished run."
    return f"{sentence}. It is the baseline. The next is {rows.iloc[1]['method']}: " + _against(
        study, rows.iloc[1], len(rows) - 1, named=False
    )


def study_facts(result: StudyResult) -> list[Fact]:
    """The best method's score, its difference from the baseline, and what it costs compared with it.

    Args:
        result: the study's results.
    """
    study, rows = result.study, _best_first(result)
    if not len(rows):
        return []
    best = rows.iloc[0]
    found = rows[rows["method"] == study.baseline]
    baseline = found.iloc[0] if len(found) and best["method"] != study.baseline else None
    mean = with_error(best["metric_mean"], best["metric_se"])
    note = f"{study.metric} {mean}, learning rate {best['learning_rate']:g}"
    facts = [Fact("Best method", str(best["method"]), note)]
    if baseline is not None and not math.isnan(best["metric_difference"]):
        facts.append(Fact(f"Against {study.baseline}", _difference(best), _significance(best, len(rows) - 1)))
    for label, name, shown in (
        ("Time per step", "seconds_per_step", duration),
        ("Peak memory", "peak_memory_bytes", memory),
        ("Rank of the update", "numerical_rank", "{:.0f}".format),
    ):
        if math.isnan(best[name]):
            continue
        other = "" if baseline is None or math.isnan(baseline[name]) else f"{study.baseline}: {shown(baseline[name])}"
        facts.append(Fact(label, shown(best[name]), other))
    return facts


def _best_first(result: StudyResult) -> pd.DataFrame:
    """The rows of the methods that have the metric, the best first."""
    table = result.table
    known = table[table["metric_mean"].map(math.isfinite)]
    return known.sort_values("metric_mean", ascending=not result.study.larger_is_better(), kind="stable")


def _against(study: Study, row: pd.Series, comparisons: int, *, named: bool = True) -> str:
    if math.isnan(row["metric_difference"]):
        return f"It has no seed in common with {study.baseline}, so there is no difference to test."
    difference = f"{_difference(row)}, {_significance(row, comparisons)}."
    return f"Against {study.baseline} it is {difference}" if named else difference


def _difference(row: pd.Series) -> str:
    return with_error(row["metric_difference"], row["metric_difference_se"], sign="+")


def _significance(row: pd.Series, comparisons: int) -> str:
    """In words, what a method's p says about its difference from the baseline.

    Among several methods, some difference is significant by chance, so p is corrected for their number (Bonferroni).
    """
    p = row["metric_p"]
    if math.isnan(row["metric_difference_se"]):
        return "from one seed, which can't be told from noise"
    if math.isnan(p):
        return "the same on every seed, which gives no p value"
    if p >= _SIGNIFICANT:
        return f"level within noise (p = {p:.2g})"
    corrected = min(1.0, comparisons * p)
    if comparisons == 1:
        return f"more than noise (p = {p:.2g})"
    if corrected >= _SIGNIFICANT:
        return f"level within noise (p = {p:.2g}, but {corrected:.2g} corrected for {comparisons} comparisons)"
    return f"more than noise (p = {p:.2g}, {corrected:.2g} corrected for {comparisons} comparisons)"


def duration(seconds: float) -> str:
    """A time as people say it: ``"340 ms"``, ``"12.3 s"``, ``"3 min 12 s"``, ``"2 h 5 min"``.

    Args:
        seconds: the time, at least 0.
    """
    if seconds < 0.9995:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 59.95:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min"


def memory(size: float) -> str:
    """A number of bytes in MiB or GiB.

    Args:
        size: bytes.
    """
    return f"{size / 2**20:.0f} MiB" if size < 2**30 else f"{size / 2**30:.3g} GiB"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _model_name(model: str) -> str:
    """A model without its organisation or its folders; the last two folders if it is called ``model``, as in a run."""
    parts = model.rstrip("/").split("/")
    return "/".join(parts[-2:] if parts[-1] == "model" else parts[-1:])
