"""Scores during training, on the fold's validation cases alone."""

from collections.abc import Callable, Sequence

import numpy as np

from mstkd.config import RunConfig
from mstkd.data.store import ShardStore
from mstkd.engine.environment import Ranks
from mstkd.errors import UserError
from mstkd.evaluate.cases import Row, score_subjects
from mstkd.evaluate.classification import accuracies, decide
from mstkd.evaluate.inference import Predictor
from mstkd.evaluate.source import CaseSource
from mstkd.methods import Method
from mstkd.subsets import Subset, parse_subset, possible_subsets, subset_name


class Validation:
    """Mean Dice, or accuracy, of one network over validation cases; the same figures on every rank."""

    def __init__(self, config: RunConfig, stores: Sequence[ShardStore], ranks: Ranks, possible: Sequence[str] | None = None):
        """`possible`: see `Method.subsets`. Raises UserError if `validate.subsets` names an unknown sequence, or a subset not among these."""
        self.config, self.ranks = config, ranks
        self.source = CaseSource(stores)
        self.subjects = self.source.subjects("val", config.data.fold)[: config.validation.max_cases]
        names = config.validation.subsets
        sequences = self.source.sequences
        self.subsets = [parse_subset(name, sequences) for name in names] if names else possible_subsets(sequences, possible)
        if strange := [subset for subset in self.subsets if subset not in possible_subsets(sequences, possible)]:
            raise UserError(f"validate.subsets: the method cannot be given {subset_name(sequences, strange[0])}; choose from {', '.join(possible)}, or remove the key")

    def __call__(self, method: Method, stopping: Callable[[], bool], network: str | None = None, complete: bool = False) -> dict[str, float] | None:
        """"score", the mean over subsets x regions, which selects the best checkpoint, and its parts
        "dice_<region>" and "dice_<subset>"; of a classification the mean accuracy over subsets and "accuracy_<subset>".
        None without validation cases. Collective.

        `network`: by default the first that the method scores. One that `sees_all` is scored on complete input alone; with `complete` any.
        `stopping`, collective too, is asked before each case; raises Stopped when it says so.
        """
        if not self.subjects:
            return None
        network = network or method.scored[0]
        subsets = [(True,) * len(self.source.sequences)] if complete or network in method.sees_all else self.subsets
        if method.task == "classification":
            return self._accuracy(method, network, subsets, stopping)
        config = self.config
        predictor = Predictor(method, self.source.sequences, config.data.crop, config.inference, self.ranks.device, self.source.label_scheme)
        rows = score_subjects(
            predictor, (network,), self.source, self.subjects, subsets, self.source.label_scheme,
            rank=self.ranks.rank, world=self.ranks.world, stopping=stopping,
        )  # fmt: skip
        return self._dice(rows)

    def _accuracy(self, method: Method, network: str, subsets: Sequence[Subset], stopping: Callable[[], bool]) -> dict[str, float]:
        shares = accuracies(decide(
            method, (network,), self.source, self.subjects, subsets, self.config.inference, self.ranks.device, self.ranks.rank, self.ranks.world, stopping
        ))  # fmt: skip
        return {"score": float(np.mean(list(shares.values()))), **{f"accuracy_{name}": share for name, share in shares.items()}}

    def _dice(self, rows: Sequence[Row]) -> dict[str, float]:
        cells: dict[tuple[str, str], list[float]] = {}
        for row in rows:
            cells.setdefault((row.subset, row.region), []).append(row.score.dice)
        means = {cell: float(np.mean(values)) for cell, values in cells.items()}
        figures = {"score": float(np.mean(list(means.values())))}
        for axis in (1, 0):
            for name in dict.fromkeys(cell[axis] for cell in means):
                figures[f"dice_{name}"] = float(np.mean([mean for cell, mean in means.items() if cell[axis] == name]))
        return figures
