"""Compare a candidate model with its reference at the same seeds: metrics.json, a report, thresholds."""

from experiments.evaluation.evaluate import evaluate, evaluate_many
from experiments.evaluation.thresholds import THRESHOLDS

__all__ = ["THRESHOLDS", "evaluate", "evaluate_many"]
