"""Writes the tables of a study: parquet for programs, Markdown for people."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from scalora.saving.files import atomic_write
from scalora.studies.study import Study
from scalora.studies.table import StudyResult, load_study

ENVIRONMENT_FILE = "environment.json"

_NONE = "—"


def write_tables(folder: Path) -> StudyResult:
    """Write ``cells``, ``curves`` and ``table`` as parquet and ``table.md``, from the cells that are there.

    Raises:
        InputError: it is not the folder of a study.
    """
    result = load_study(folder)
    for name in ("cells", "curves", "table"):
        with atomic_write(folder / f"{name}.parquet") as temporary:
            getattr(result, name).to_parquet(temporary, index=False)
    with atomic_write(folder / "table.md") as temporary:
        temporary.write_text(markdown(result), encoding="utf-8")
    return result


def markdown(result: StudyResult) -> str:
    """Where the figures come from, then what was reached, how soon, at what cost, and what each learning rate gave."""
    study = result.study
    sections = [
        _header(result),
        *_reached(study, result.table.to_dict("records")),
        *_against_baseline(study, result.table.to_dict("records")),
        *_costs(result.table.to_dict("records")),
        *_learning_rates(study, result.sensitivity.to_dict("records")),
    ]
    failed = result.cells[result.cells["status"] == "failed"].to_dict("records")
    if failed:
        sections += ["## Failed", "\n".join(f"- {row['folder']}: {row['error']}" for row in failed)]
    return "\n\n".join(sections) + "\n"


def _reached(study: Study, rows: list[dict[str, Any]]) -> list[str]:
    metric = study.metric
    names = {"metric": f"{metric}, final", "best_metric": f"{metric}, best"}
    names |= {} if metric == "eval_loss" else {"eval_loss": "eval_loss, final"}
    names |= {"train_loss": "training loss, end"}

    def line(row: dict[str, Any]) -> list[str]:
        rate = _number(row["learning_rate"], "g") + "*" * row["at_edge"]
        unfinished = f" ({row['unfinished']} not finished)" if row["unfinished"] else ""
        return [row["method"], rate, f"{row['seeds']}{unfinished}", *(_with_error(row, name) for name in names)]

    note = (
        f"Mean ± standard error over seeds; {metric}: {'larger' if study.larger_is_better() else 'smaller'} is better; "
        "best: of a run's evaluations; training loss: mean of the last quarter of the logged ones."
    )
    if any(row["at_edge"] for row in rows):
        note += "\n\n\\* at the edge of its grid of learning rates: a better one may lie outside."
    return [
        "## What each method reaches at its best learning rate",
        grid(["method", "learning rate", "seeds", *names.values()], map(line, rows)),
        note,
    ]


def _against_baseline(study: Study, rows: list[dict[str, Any]]) -> list[str]:
    baseline, has_ceiling = study.baseline, study.ceiling in study.methods
    names = {"metric": study.metric} | ({} if study.metric == "eval_loss" else {"eval_loss": "eval_loss"})
    columns = [
        column for shown in names.values() for column in (f"Δ {shown}", "p", *(["gap closed"] if has_ceiling else []))
    ]

    def line(row: dict[str, Any]) -> list[str]:
        cells = [row["method"]]
        for name in names:
            cells.append(_number(row[f"{name}_difference"], "+.4f") + _error(row[f"{name}_difference_se"]))
            cells.append(_number(row[f"{name}_p"], ".3g"))
            cells += [_number(row[f"{name}_gap_closed"], ".0%")] if has_ceiling else []
        for name in ("steps_to_baseline", "seconds_to_baseline"):
            share = row[f"{name}_share"]
            cells.append(_number(row[name], ".0f") + ("" if math.isnan(share) else f" ({share:.0%})"))
        return cells

    note = "Differences are paired by seed; p: paired t test, two-sided, not corrected for the number of methods. "
    if has_ceiling:
        note += f"Gap closed: of the way from {baseline} to {study.ceiling}; none where {study.ceiling} is no better. "
    note += (
        f"Steps and seconds of training: until the mean evaluation loss is at the smallest of {baseline}'s mean curve, "
        f"linear between evaluations; in brackets as a share of what {baseline} took."
    )
    return [
        f"## Against {baseline}",
        grid(["method", *columns, f"steps to {baseline}'s best loss", "seconds"], map(line, rows)),
        note,
    ]


def _costs(rows: list[dict[str, Any]]) -> list[str]:
    def line(row: dict[str, Any]) -> list[str]:
        return [
            row["method"],
            _number(row["seconds_per_step"], ".3g"),
            _number(row["peak_memory_bytes"] / 2**20, ".0f"),
            _number(row["trainable_parameters"], ",.0f"),
            _number(row["numerical_rank"], ".1f"),
            _number(row["effective_rank"], ".1f"),
        ]

    columns = ["seconds per step", "peak memory, MiB", "trainable parameters", "numerical rank", "effective rank"]
    return [
        "## Cost, and rank of the update",
        grid(["method", *columns], map(line, rows)),
        "Ranks: of the total update at the end, mean over the measured layers and the seeds (`track_updates`).",
    ]


def _learning_rates(study: Study, rows: list[dict[str, Any]]) -> list[str]:
    names = {"eval_loss": "eval_loss, final"} | ({} if study.metric == "eval_loss" else {"metric": study.metric})

    def line(row: dict[str, Any]) -> list[str]:
        rate = f"{row['learning_rate']:g}"
        figures = (_number(row[name], ".4f") for name in names)
        return [row["method"], f"**{rate}**" if row["best"] else rate, *figures, f"{row['finished']} of {row['seeds']}"]

    seeds = _listed(study.tuning_seeds or study.seeds)
    return [
        "## Every learning rate",
        grid(["method", "learning rate", *names.values(), "runs finished"], map(line, rows)),
        f"Mean over the seeds {seeds}; the best (bold) is the one with the smallest evaluation loss.",
    ]


def _header(result: StudyResult) -> str:
    path = result.folder / ENVIRONMENT_FILE
    made = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    versions: dict[str, set[str]] = {}
    for folder in result.cells.loc[result.cells["status"] == "finished", "folder"]:
        recorded = result.folder / folder / ENVIRONMENT_FILE
        for name, version in (json.loads(recorded.read_text())["versions"] if recorded.is_file() else {}).items():
            versions.setdefault(name, set()).add(version)
    study = result.study
    tuned = f", rates chosen on {_listed(study.tuning_seeds)}" if study.tuning_seeds else ""
    parts = [
        f"`{made['command']}`" if "command" in made else "",
        str(made.get("date", "")),
        ", ".join(f"{name} {' and '.join(sorted(found))}" for name, found in versions.items()),
        f"seeds {_listed(study.seeds)}{tuned}",
        f"threads a run: {_listed(made['threads'])}" if "threads" in made else "",
        f"{(result.cells['status'] == 'finished').sum()} of {len(result.cells)} runs finished",
    ]
    return f"# {result.folder.name}\n\n" + "; ".join(part for part in parts if part) + "."


def grid(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _number(value: float, form: str) -> str:
    return _NONE if math.isnan(value) else format(value, form)


def _error(value: float) -> str:
    return "" if math.isnan(value) else f" ± {value:.4f}"


def _with_error(row: dict[str, Any], name: str) -> str:
    return _number(row[f"{name}_mean"], ".4f") + _error(row[f"{name}_se"])


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))
