"""Writes the tables of a study: parquet for programs, Markdown for people."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd  # type: ignore[import-untyped]

from scalora.saving.files import atomic_write
from scalora.studies.grid import grid
from scalora.studies.shares import level_share
from scalora.studies.study import Study
from scalora.studies.table import StudyResult, load_study

ENVIRONMENT_FILE = "environment.json"

_NONE = "—"


def write_tables(folder: Path, study: Study | None = None) -> StudyResult:
    """Write ``cells``, ``curves``, ``table`` and ``shares.parquet``, and ``table.md``, into a study folder.

    Args:
        folder: the study folder; unfinished cells are left out of the tables.
        study: as for `scalora.studies.table.load_study`.

    Returns:
        The results that were written.

    Raises:
        InputError: the folder holds no valid study file.
        OSError: a file can't be written.
    """
    result = load_study(folder, study)
    for name in ("cells", "curves", "table", "shares"):
        with atomic_write(folder / f"{name}.parquet") as temporary:
            getattr(result, name).to_parquet(temporary, index=False)
    with atomic_write(folder / "table.md") as temporary:
        temporary.write_text(markdown(result), encoding="utf-8")
    return result


def markdown(result: StudyResult) -> str:
    """The report of a study in Markdown: provenance, scores, comparison with the baseline, costs, learning rates.

    With `step_shares`, the comparison with the baseline over fewer steps too.

    Args:
        result: the results of a study, finished or not.
    """
    study = result.study
    sections = [
        _header(result),
        *_reached(study, result.table.to_dict("records")),
        *_against_baseline(study, result.table.to_dict("records")),
        *(_fewer_steps(study, result.shares) if study.step_shares else []),
        *_costs(result.table.to_dict("records")),
        *_learning_rates(study, result.sensitivity.to_dict("records")),
    ]
    failed = result.cells[result.cells["status"] == "failed"].to_dict("records")
    if failed:
        sections += ["## Failed runs", "\n".join(f"- {row['folder']}: {row['error']}" for row in failed)]
    return "\n\n".join(sections) + "\n"


def _reached(study: Study, rows: list[dict[str, Any]]) -> list[str]:
    metric = study.metric
    names = {"metric": f"{metric}, final", "best_metric": f"{metric}, best"}
    names |= {} if metric == "eval_loss" else {"eval_loss": "eval_loss, final"}
    names |= {"train_loss": "training loss, end"}

    def line(row: dict[str, Any]) -> list[str]:
        rate = _number(row["learning_rate"], "g") + "*" * row["at_edge"]
        return [row["method"], rate, _seeds(row), *(_with_error(row, name) for name in names)]

    note = (
        f"Mean ± standard error over seeds. For {metric}, {'larger' if study.larger_is_better() else 'smaller'} is "
        "better; best: the best of each run's evaluations. Training loss: mean over the last quarter of the logs."
    )
    if any(row["at_edge"] for row in rows):
        note += "\n\n\\* at the edge of the method's learning rate grid: a better rate may lie outside."
    return [
        "## Scores at the best learning rate",
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

    note = "Differences are paired by seed. p: two-sided paired t test, not corrected for the number of methods. "
    if has_ceiling:
        note += (
            f"Gap closed: share of the difference between {baseline} and {study.ceiling}; none where {study.ceiling} "
            "is not better. "
        )
    note += (
        f"Steps and seconds: training until the mean evaluation loss reaches the minimum of {baseline}'s mean curve, "
        f"interpolated linearly between evaluations; in brackets, relative to {baseline} itself."
    )
    return [
        f"## Against {baseline}",
        grid(["method", *columns, f"steps to {baseline}'s best loss", "seconds"], map(line, rows)),
        note,
    ]


def _fewer_steps(study: Study, shares: pd.DataFrame) -> list[str]:
    baseline = study.baseline
    names = {"metric": study.metric} | ({} if study.metric == "eval_loss" else {"eval_loss": "eval_loss"})

    def line(row: dict[str, Any]) -> list[str]:
        scores = (_with_error(row, name) for name in names)
        return [row["method"], _percent(row["share"]), _number(row["steps"], ".0f"), _seeds(row), *scores]

    def level(method: str, name: str) -> str:
        own = shares[shares["method"] == method]
        if own[f"{name}_level"].isna().all():
            return _NONE
        share = level_share(shares, method, name)
        words = "not level" if share is None else f"level with {baseline} at {_percent(share)} of its steps"
        return words + " so far" * bool(own["unfinished"].any())

    others = [method for method in study.methods if method != baseline]
    return [
        "## Fewer steps, with a schedule of their own",
        grid(
            ["method", "share of the steps", "steps", "seeds", *(f"{shown}, final" for shown in names.values())],
            map(line, shares.to_dict("records")),
        ),
        grid(
            ["method", *(f"by {shown}" for shown in names.values())],
            [[method, *(level(method, name) for name in names)] for method in others],
        ),
        f"Each share is a run of its own at the method's best learning rate, whose schedule ends with it. Level: the "
        f"mean over the seeds that both have is at least as good as that of {baseline}'s full runs; the smallest share "
        "at which it is. Mean ± standard error over seeds.",
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
        "## Cost and rank of the update",
        grid(["method", *columns], map(line, rows)),
        "Ranks: of the final weight update, mean over the tracked layers (`track_updates`) and the seeds.",
    ]


def _learning_rates(study: Study, rows: list[dict[str, Any]]) -> list[str]:
    names = {"eval_loss": "eval_loss, final"} | ({} if study.metric == "eval_loss" else {"metric": study.metric})

    def line(row: dict[str, Any]) -> list[str]:
        rate = f"{row['learning_rate']:g}"
        figures = (_number(row[name], ".4f") for name in names)
        return [row["method"], f"**{rate}**" if row["best"] else rate, *figures, f"{row['finished']} of {row['seeds']}"]

    seeds = _listed(study.tuning_seeds or study.seeds)
    return [
        "## All learning rates",
        grid(["method", "learning rate", *names.values(), "runs finished"], map(line, rows)),
        f"Mean over the finished runs on seeds {seeds}. Bold: the best rate, "
        + ("that with the lowest evaluation loss." if study.chosen_by == "eval_loss" else f"by {study.metric}."),
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
    tuned = f", learning rates chosen on {_listed(study.tuning_seeds)}" if study.tuning_seeds else ""
    parts = [
        f"`{made['command']}`" if "command" in made else "",
        str(made.get("date", "")),
        ", ".join(f"{name} {' and '.join(sorted(found))}" for name, found in versions.items()),
        f"seeds {_listed(study.seeds)}{tuned}",
        f"threads per run: {_listed(made['threads'])}" if "threads" in made else "",
        f"{(result.cells['status'] == 'finished').sum()} of {len(result.cells)} runs finished",
    ]
    return f"# {result.folder.name}\n\n" + "; ".join(part for part in parts if part) + "."


def _number(value: float, form: str) -> str:
    return _NONE if math.isnan(value) else format(value, form)


def _percent(share: float) -> str:
    return f"{100 * share:g} %"


def _seeds(row: dict[str, Any]) -> str:
    return f"{row['seeds']} ({row['unfinished']} not finished)" if row["unfinished"] else str(row["seeds"])


def _error(value: float) -> str:
    return "" if math.isnan(value) else f" ± {value:.4f}"


def _with_error(row: dict[str, Any], name: str) -> str:
    return _number(row[f"{name}_mean"], ".4f") + _error(row[f"{name}_se"])


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))
