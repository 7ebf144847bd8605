"""Scores for classification and regression, from scikit-learn and SciPy, as a Trainer's ``compute_metrics``."""

from __future__ import annotations

from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, mean_squared_error
from transformers import EvalPrediction


def classification_scores(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy, F1 and Matthews correlation coefficient.

    Args:
        prediction: the Trainer's logits, (examples, classes), and labels, (examples,).

    Returns:
        ``"accuracy"``, ``"f1"`` (macro average) and ``"matthews"``.
    """
    predicted, labels = prediction.predictions.argmax(-1), prediction.label_ids
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "f1": float(f1_score(labels, predicted, average="macro")),
        "matthews": float(matthews_corrcoef(labels, predicted)),
    }


def regression_scores(prediction: EvalPrediction) -> dict[str, float]:
    """Pearson and Spearman correlation, and mean squared error.

    Args:
        prediction: the Trainer's outputs, (examples, 1), and labels, (examples,).

    Returns:
        ``"pearson"``, ``"spearman"`` and ``"mse"``.
    """
    predicted, labels = prediction.predictions.squeeze(-1), prediction.label_ids
    return {
        "pearson": float(pearsonr(labels, predicted).statistic),
        "spearman": float(spearmanr(labels, predicted).statistic),
        "mse": float(mean_squared_error(labels, predicted)),
    }
