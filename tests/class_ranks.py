"""What the ranks do in test_classification.py: decide cases of a trained run, shared out."""

from pathlib import Path

import torch

from mstkd.engine import backend
from mstkd.engine.environment import resolve_environment
from mstkd.evaluate.classification import decide
from mstkd.subsets import all_subsets
from mstkd.trained_run import open_run


def decisions(run: str) -> list[dict]:
    ranks = resolve_environment()
    backend.start(ranks)
    trained = open_run(Path(run), tasks=("classification",))
    made = decide(
        trained.method, trained.networks, trained.source, trained.source.subjects("all"), all_subsets(trained.source.sequences),
        trained.config.inference, torch.device("cpu"), ranks.rank, ranks.world,
    )  # fmt: skip
    return [vars(decision) for decision in made]
