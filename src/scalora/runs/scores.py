"""Scores for classification and regression, from scikit-learn and SciPy, as a Trainer's ``compute_metrics``.

Of a model with outputs that are not numbers (NaN) every score is NaN, and no class is predicted for it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, mean_squared_error
from transformers import EvalPrediction
from transformers.trainer_utils import PredictionOutput

CLASSIFICATION_SCORES = ("accuracy", "f1", "matthews")
REGRESSION_SCORES = ("pearson", "spearman", "correlation", "mse")


def classification_scores(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy, F1 and Matthews correlation coefficient.

    Args:
        prediction: the Trainer's logits, (examples, classes), and labels, (examples,).

    Returns:
        ``"accuracy"``, ``"f1"`` (macro average) and ``"matthews"``.
    """
    logits, labels = head_outputs(prediction), prediction.label_ids
    if np.isnan(logits).any():
        return dict.fromkeys(CLASSIFICATION_SCORES, float("nan"))
    predicted = logits.argmax(-1)
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "f1": float(f1_score(labels, predicted, average="macro")),
        "matthews": float(matthews_corrcoef(labels, predicted)),
    }


def regression_scores(prediction: EvalPrediction) -> dict[str, float]:
    """Pearson and Spearman correlation, their mean, and mean squared error.

    Args:
        prediction: the Trainer's outputs, (examples, 1), and labels, (examples,).

    Returns:
        ``"pearson"``, ``"spearman"``, ``"correlation"`` (the mean of the two, as GLUE scores STS-B) and ``"mse"``. The
        correlations of a single example are NaN.
    """
    outputs, labels = head_outputs(prediction).squeeze(-1), prediction.label_ids
    if not np.isfinite(outputs).all():
        return dict.fromkeys(REGRESSION_SCORES, float("nan"))
    correlated = len(labels) > 1
    pearson = float(pearsonr(labels, outputs).statistic) if correlated else float("nan")
    spearman = float(spearmanr(labels, outputs).statistic) if correlated else float("nan")
    return {
        "pearson": pearson,
        "spearman": spearman,
        "correlation": (pearson + spearman) / 2,
        "mse": float(mean_squared_error(labels, outputs)),
    }


def head_outputs(prediction: EvalPrediction | PredictionOutput) -> Any:
    """The outputs of a head, which come first where a model returns hidden states too.

    Args:
        prediction: the Trainer's predictions.

    Returns:
        An array of (examples, outputs).
    """
    predictions = prediction.predictions
    return predictions[0] if isinstance(predictions, tuple) else predictions
