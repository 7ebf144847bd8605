"""Figures of a study and of a run, for ``scalora report`` and for notebooks. May import `studies` and below.

Needs matplotlib and pandas.
"""

from scalora.report.facts import Fact
from scalora.report.figures import (
    column_share_by_steps,
    factors,
    final_metric,
    layer_heat_map,
    learning_rate_sensitivity,
    loss_by_seconds,
    loss_by_steps,
    memory_and_speed,
    oracle_distance,
    rank_by_steps,
    run_loss,
    run_rank,
    run_spectrum,
    scaling_shares,
)
from scalora.report.page import Opening, Page, run_page, study_page
from scalora.report.summaries import NoData, RunData, StudyData

__all__ = [
    "Fact",
    "NoData",
    "Opening",
    "Page",
    "RunData",
    "StudyData",
    "column_share_by_steps",
    "factors",
    "final_metric",
    "layer_heat_map",
    "learning_rate_sensitivity",
    "loss_by_seconds",
    "loss_by_steps",
    "memory_and_speed",
    "oracle_distance",
    "rank_by_steps",
    "run_loss",
    "run_page",
    "run_rank",
    "run_spectrum",
    "scaling_shares",
    "study_page",
]
