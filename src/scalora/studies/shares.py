"""Time to target with a schedule of its own: at how many of the baseline's steps a method is level with it.

Where a curve of one long run crosses a target says little: in the middle of its schedule a run is worse than one whose
learning rate has fallen to zero by then. Here, every method is run anew for each number of steps.
"""

from __future__ import annotations

import math
from typing import Any

import pandas as pd  # type: ignore[import-untyped]

from scalora.studies.over_seeds import mean_and_error
from scalora.studies.study import Study

# Means that are equal in exact arithmetic may differ by so much of their size, in either direction.
_ROUNDING = 1e-12


def share_table(study: Study, cells: pd.DataFrame) -> pd.DataFrame:
    """Compare runs over a share of the steps with the baseline's full runs.

    Args:
        study: the study's settings.
        cells: one row per cell, as in `scalora.studies.cells.StudyCells`.

    Returns:
        One row per method and share, in ascending order and ending with 1, the full runs; the baseline has those alone.

        - ``method``, ``share``, ``steps`` of the runs; ``seeds``: number of finished seeds; ``unfinished``: number of
          failed or missing seeds.
        - ``metric_mean``, ``metric_se``, ``eval_loss_mean``, ``eval_loss_se``: final scores, means over seeds and their
          standard errors.
        - ``metric_level``, ``eval_loss_level``: whether the mean over the seeds that both have is at least as good as
          that of the baseline's full runs; missing for the baseline itself, and without a common seed.
    """
    used = cells["reported"].astype(bool) | (cells["share"] < 1)
    finished = cells[used & (cells["status"] == "finished")]
    baseline = finished[finished["method"] == study.baseline].set_index("seed")
    rows = []
    for method in study.methods:
        for share in (1.0,) if method == study.baseline else (*study.shares(), 1.0):
            runs = finished[(finished["method"] == method) & (finished["share"] == share)].set_index("seed")
            row: dict[str, Any] = {
                "method": method,
                "share": share,
                "steps": runs["steps"].max(),
                "seeds": len(runs),
                "unfinished": len(study.seeds) - len(runs),
            }
            for name, column, larger in (
                ("metric", study.metric, study.larger_is_better()),
                ("eval_loss", "eval_loss", False),
            ):
                row[f"{name}_mean"], row[f"{name}_se"] = mean_and_error(runs[column])
                both = pd.concat([runs[column], baseline[column]], axis=1, join="inner")
                row[f"{name}_level"] = (
                    None if method == study.baseline or both.empty else _is_level(*both.mean(), larger=larger)
                )
            rows.append(row)
    return pd.DataFrame(rows).astype({"metric_level": "boolean", "eval_loss_level": "boolean"})


def level_share(shares: pd.DataFrame, method: str, name: str) -> float | None:
    """The smallest share of the steps at which a method is level with the baseline's full runs; None if at no share.

    Args:
        shares: the table from `share_table`.
        method: a method of the study.
        name: ``"metric"`` or ``"eval_loss"``.
    """
    level = shares.loc[(shares["method"] == method) & shares[f"{name}_level"].fillna(False), "share"]
    return None if level.empty else float(level.min())


def _is_level(method: float, baseline: float, *, larger: bool) -> bool:
    """Whether one mean is at least as good as the other; one that is not finite, of a run that diverged, never is."""
    if not math.isfinite(method) or not math.isfinite(baseline):
        return math.isfinite(method)
    ahead = method - baseline if larger else baseline - method
    return ahead >= -_ROUNDING * abs(baseline)
