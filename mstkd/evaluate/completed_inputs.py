"""A segmentation run behind a synthesis run: what a case is not given is completed first, and the segmentation sees every sequence."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mstkd.data.sample import Sample
from mstkd.errors import UserError
from mstkd.evaluate.inference import Case, Predictor, Volume
from mstkd.methods import Method
from mstkd.subsets import Subset, possible_subsets, subset_name
from mstkd.trained_run import TrainedRun, open_run


class CompletingPredictor(Predictor):
    """As its base, on cases that a synthesis run has completed."""

    def __init__(self, segmentation: TrainedRun, front: TrainedRun, others: Sequence[TrainedRun] = ()):
        """`others`: the rest of an ensemble, see `TrainedRun.predictor`. Raises UserError where the two runs do not fit each other."""
        plain = segmentation.predictor(others)
        super().__init__(plain.method, plain.sequences, plain.window, plain.inference, plain.device, plain.scheme, plain.members[1:])
        if front.facts.sequences != segmentation.facts.sequences:
            theirs, ours = ", ".join(front.facts.sequences), ", ".join(segmentation.facts.sequences)
            raise UserError(f"{front.folder}: completes {theirs}; {segmentation.config.name} was trained on {ours}, in that order")
        if front.networks[0] in front.method.oracles:
            raise UserError(f"{front.folder}: only {front.networks[0]} is trained, which is given labels; train the run's next stage")
        self.front, self.completer = front, front.completer()

    @property
    def methods(self) -> tuple[Method, ...]:
        return (*self.members, self.front.method)

    @property
    def clocks(self) -> list[dict[str, list[float]]]:
        return [self.seconds, *self.completer.clocks]

    @property
    def takes(self) -> tuple[str, ...]:
        return front_takes(self.front)

    @property
    def completion_seconds(self) -> float:
        """Mean of a case's completion; 0 where none was needed."""
        seconds = [second for each in self.completer.seconds.values() for second in each]
        return float(np.mean(seconds)) if seconds else 0.0

    def case(self, sample: Sample) -> Case:
        return CompletedCase(self.volume(sample.image, sample.brain, sample.meta), sample, self)


@dataclass(frozen=True)
class CompletedCase(Case):
    sample: Sample
    predictor: CompletingPredictor

    def given(self, subset: Subset) -> tuple[Volume, Subset]:
        whole = (True,) * len(subset)
        if subset == whole:
            return self.volume, whole
        made = self.predictor.completer.sample(self.predictor.front.networks[0], self.sample, subset)
        return self.predictor.volume(made.image, made.brain, made.meta), whole


def front_takes(front: TrainedRun) -> tuple[str, ...]:
    """The subsets that may be given, by name: all that the completing network takes, and every sequence."""
    sequences = front.facts.sequences
    whole = subset_name(sequences, (True,) * len(sequences))
    taken = [subset_name(sequences, subset) for subset in possible_subsets(sequences, front.method.subsets)]
    return tuple(taken) if whole in taken else (*taken, whole)


def open_front(path: str) -> TrainedRun:
    """The synthesis run at `path`. Raises UserError, saying where the path was given."""
    try:
        return open_run(Path(path), tasks=("synthesis",))
    except UserError as error:
        raise UserError(f"evaluate.complete: {error}") from None
