"""What the ranks do in test_synthesis.py: complete and score cases of a run, shared out, and validate."""

from dataclasses import asdict
from pathlib import Path

from mstkd.engine import backend
from mstkd.engine.environment import resolve_environment
from mstkd.evaluate.synthesis import score_completions
from mstkd.evaluate.validation import Validation
from mstkd.subsets import all_subsets, proper
from mstkd.trained_run import open_run


def scores(run: str) -> tuple[list[dict], dict]:
    """Of three cases, every fourth pattern of given sequences, both networks; and a validation."""
    ranks = resolve_environment()
    backend.start(ranks)
    trained = open_run(Path(run), tasks=("synthesis",))
    source, subsets = trained.source, proper(all_subsets(trained.source.sequences))[::4]
    rows = score_completions(
        trained.completer(), trained.networks, source, source.subjects("all")[:3], subsets, rank=ranks.rank, world=ranks.world
    )
    return [asdict(row) for row in rows], Validation(trained.config, source.stores, ranks)(trained.method, lambda: False)
