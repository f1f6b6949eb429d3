"""Scores during training, on the fold's validation cases alone."""

import logging
from collections.abc import Callable, Sequence

import numpy as np

from mstkd.config import RunConfig
from mstkd.data.store import ShardStore
from mstkd.engine.environment import Ranks
from mstkd.errors import UserError
from mstkd.evaluate.cases import Row, score_subjects
from mstkd.evaluate.classification import accuracies, decide
from mstkd.evaluate.completion import Completer
from mstkd.evaluate.inference import Predictor
from mstkd.evaluate.painting import score_paintings
from mstkd.evaluate.source import CaseSource
from mstkd.evaluate.synthesis import pattern_scores, score_completions
from mstkd.methods import Method, load
from mstkd.subsets import Subset, parse_subset, possible_subsets, proper, subset_name

log = logging.getLogger(__name__)


class Validation:
    """Mean Dice, accuracy, SSIM or PSNR of one network over validation cases; the same figures on every rank."""

    def __init__(self, config: RunConfig, stores: Sequence[ShardStore], ranks: Ranks, possible: Sequence[str] | None = None):
        """`possible`: see `Method.subsets`. Raises UserError if `validate.subsets` names an unknown sequence, a subset not among these,
        one that leaves nothing to synthesise, or none that a validation case has."""
        self.config, self.ranks = config, ranks
        self.source = CaseSource(stores)
        self.subjects = self.source.subjects("val", config.data.fold)[: config.validation.max_cases]
        self.subsets = self._chosen(possible)
        if self.subjects and self.subsets is not None and not any(self.source.having(subset, self.subjects) for subset in self.subsets):
            raise UserError(
                f"validate.subsets: none of the {len(self.subjects)} validation cases has all sequences of one of them; "
                "set validate.subsets=null, and evaluate.given=present to give each case what it has"
            )

    def _chosen(self, possible: Sequence[str] | None) -> list[Subset] | None:
        """None: each case once, given all that it has."""
        names, sequences = self.config.validation.subsets, self.source.sequences
        task = load(self.config.method["name"]).task
        if not names:
            if self.config.evaluate.given == "present" and task == "segmentation" and possible is None:
                return None
            subsets = possible_subsets(sequences, possible)
            return proper(subsets) if task == "synthesis" else subsets
        try:
            chosen = [parse_subset(name, sequences) for name in names]
        except UserError as error:
            raise UserError(f"validate.subsets: {error}") from None
        if strange := [subset for subset in chosen if subset not in possible_subsets(sequences, possible)]:
            raise UserError(f"validate.subsets: the method cannot be given {subset_name(sequences, strange[0])}; choose from {', '.join(possible)}, or remove the key")
        if task == "synthesis" and proper(chosen) != chosen:
            raise UserError(f"validate.subsets: {'+'.join(sequences)} leaves nothing to synthesise; remove it from the list")
        return chosen

    def __call__(self, method: Method, stopping: Callable[[], bool], network: str | None = None, complete: bool = False) -> dict[str, float] | None:
        """"score", the mean over subsets x regions, which selects the best checkpoint, and its parts
        "dice_<region>" and "dice_<subset>"; of a classification the mean accuracy over subsets and "accuracy_<subset>"; of a
        synthesis the mean SSIM over patterns, "ssim" and "psnr" (dB), and "ssim_<target>"; of one of `painters` PSNR (dB), and "ssim". None where no case can be scored. Collective.

        `network`: by default the first that the method scores. One that `sees_all` is scored on complete input alone; with `complete` any.
        `stopping`, collective too, is asked before each case; raises Stopped when it says so.
        """
        if not self.subjects:
            return None
        network = network or method.scored[0]
        if method.task == "synthesis":
            return self._likeness(method, network, stopping)
        if network in method.painters:
            return self._painted(method, network, stopping)
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

    def _likeness(self, method: Method, network: str, stopping: Callable[[], bool]) -> dict[str, float] | None:
        config, sequences = self.config, self.source.sequences
        completer = Completer(method, sequences, config.data.slices, config.inference, self.ranks.device)
        cells = pattern_scores(score_completions(
            completer, (network,), self.source, self.subjects, self.subsets, regions=False, rank=self.ranks.rank, world=self.ranks.world, stopping=stopping
        ), sequences)  # fmt: skip
        if not cells:
            return None
        ssim, psnr = ({pattern: float(np.mean([getattr(s, key) for s in scores])) for pattern, scores in cells.items()} for key in ("ssim", "psnr"))
        mean = float(np.mean(list(ssim.values())))
        figures = {"score": mean, "ssim": mean, "psnr": float(np.mean(list(psnr.values())))}
        for target in sequences:
            if own := [value for pattern, value in ssim.items() if pattern.endswith(f"->{target}")]:
                figures[f"ssim_{target}"] = float(np.mean(own))
        return figures

    def _painted(self, method: Method, network: str, stopping: Callable[[], bool]) -> dict[str, float] | None:
        config, ranks = self.config, self.ranks
        predictor = Predictor(method, self.source.sequences, config.data.crop, config.inference, ranks.device)
        rows = score_paintings(predictor, (network,), self.source, self.subjects, ranks.rank, ranks.world, stopping)
        if not rows:
            return None
        psnr, ssim = (float(np.mean([getattr(row.score, key) for row in rows])) for key in ("psnr", "ssim"))
        return {"score": psnr, "psnr": psnr, "ssim": ssim}

    def _dice(self, rows: Sequence[Row]) -> dict[str, float] | None:
        if not rows:
            log.warning("no validation case has every sequence: nothing is scored, and the newest weights count as the best")
            return None
        cells: dict[tuple[str, str], list[float]] = {}
        for row in rows:
            cells.setdefault((row.subset, row.region), []).append(row.score.dice)
        means = {cell: float(np.mean(values)) for cell, values in cells.items()}
        figures = {"score": float(np.mean(list(means.values())))}
        for axis in (1, 0):
            for name in dict.fromkeys(cell[axis] for cell in means):
                figures[f"dice_{name}"] = float(np.mean([mean for cell, mean in means.items() if cell[axis] == name]))
        return figures
