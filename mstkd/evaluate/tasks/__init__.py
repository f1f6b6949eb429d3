"""What `mstkd evaluate` does for each task: a function of the job that scores, writes, draws, and returns the summaries by network."""

from mstkd.evaluate.tasks.classification import evaluate_classes
from mstkd.evaluate.tasks.painting import evaluate_paintings
from mstkd.evaluate.tasks.segmentation import evaluate_volumes
from mstkd.evaluate.tasks.synthesis import evaluate_completions

__all__ = ["TASKS", "evaluate_paintings"]

TASKS = {"segmentation": evaluate_volumes, "classification": evaluate_classes, "synthesis": evaluate_completions}
