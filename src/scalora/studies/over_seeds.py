"""Statistics over the seeds of a method's runs: means and their errors, differences and shares of a gap."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
from scipy.stats import ttest_rel


def mean_and_error(values: Iterable[float]) -> tuple[float, float]:
    """Mean of some values and its standard error.

    Args:
        values: one value per seed.

    Returns:
        The mean, NaN without values, and its standard error, NaN for fewer than two values or if any is not finite.
    """
    array = np.asarray(list(values), dtype=float)
    if not len(array):
        return math.nan, math.nan
    certain = len(array) > 1 and bool(np.isfinite(array).all())
    return float(array.mean()), float(array.std(ddof=1) / math.sqrt(len(array))) if certain else math.nan


def paired_difference(values: pd.Series, baseline: pd.Series) -> tuple[float, float, float]:
    """Mean difference from the baseline over the seeds that both have, with its standard error and significance.

    Args:
        values: a method's values, indexed by seed.
        baseline: the baseline's values, indexed by seed.

    Returns:
        The mean difference, its standard error, and the p value of the two-sided paired t test. p is NaN if all
        differences are equal, as may happen for the accuracy on few examples: the test would report certainty.
    """
    both = pd.concat([values, baseline], axis=1, join="inner").to_numpy(dtype=float)
    differences = both[:, 0] - both[:, 1] if np.isfinite(both).all() else np.full(len(both), math.nan)
    mean, error = mean_and_error(differences)
    vary = len(both) > 1 and bool(np.ptp(differences) > 1e-12 * np.abs(both).max())
    return mean, error, float(ttest_rel(both[:, 0], both[:, 1]).pvalue) if vary else math.nan


def gap_closed(values: pd.Series, baseline: pd.Series, ceiling: pd.Series, *, larger: bool) -> float:
    """Share of the gap between the baseline's and the ceiling's means that a method closes.

    Args:
        values: the method's values, indexed by seed. Only seeds that all three have count.
        baseline: the baseline's values, indexed by seed.
        ceiling: the ceiling's values, indexed by seed.
        larger: whether larger values are better.

    Returns:
        0 at the baseline's mean, 1 at the ceiling's; NaN if the ceiling is not better than the baseline.
    """
    method, low, high = pd.concat([values, baseline, ceiling], axis=1, join="inner").mean().to_numpy()
    way, gap = (method - low, high - low) if larger else (low - method, low - high)
    return float(way / gap) if gap > 0 and math.isfinite(way) and math.isfinite(gap) else math.nan
