"""A trained run as it lies on disk: its recipe, its data, its method with the best weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import torch

from mstkd.config import InferenceConfig, RunConfig
from mstkd.data.training import open_stores
from mstkd.engine.teacher import identity
from mstkd.errors import UserError
from mstkd.evaluate.completion import Completer
from mstkd.evaluate.inference import Predictor
from mstkd.evaluate.source import CaseSource
from mstkd.evaluate.weights import best_files, load_checkpoint, load_given, load_networks
from mstkd.methods import DataFacts, Method, build
from mstkd.run_folder import check_prediction, git_state, read_record, read_run_config
from mstkd.shards.spec import Classification, LabelScheme, scheme_of


@dataclass(frozen=True)
class TrainedRun:
    """What evaluation, prediction and export need of a run."""

    folder: Path
    config: RunConfig
    dataset: str  # name of the (first) data set it was trained on
    facts: DataFacts
    method: Method
    networks: tuple[str, ...]  # loaded ones that the method scores; the first is what the run is for

    @cached_property
    def source(self) -> CaseSource:
        """The run's own data. Raises UserError if the shards are not here."""
        return CaseSource(open_stores(self.config.data))

    def postprocessed(self, rule: str | None) -> "TrainedRun":
        """The same run with another `inference.postprocess`; None: as its recipe says."""
        if rule is None:
            return self
        inference = InferenceConfig.model_validate(self.config.inference.model_dump() | {"postprocess": rule})
        return replace(self, config=self.config.model_copy(update={"inference": inference}))

    def identity(self) -> dict:
        """What its predictions follow from: the best weights by sha256, the method, how it is applied, and the code."""
        trained = [stage for stage in self.method.stages if (self.folder / stage / "checkpoints" / "best").is_file()]
        weights = {stage: [identity(file)["sha256"] for file in best_files(self.folder, stage)] for stage in trained}
        code = {"version": version("mstkd"), "git": git_state()}
        return {"weights": weights, "method": self.config.method, "inference": self.config.inference.model_dump(), "code": code}

    def placed(self) -> torch.device:
        """The GPU if there is one; the networks are moved there."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        for network in self.method.networks.values():
            network.to(device)
        return device

    def predictor(self, others: Sequence["TrainedRun"] = ()) -> Predictor:
        """Whole-volume prediction on the GPU if there is one, alone or in an ensemble with `others`: folds or seeds of the same.

        Raises UserError where one of those is of another method, other data, or applied in another way.
        """
        facts, config = self.facts, self.config
        for other in others:
            self._check_alike(other)
            other.placed()
        methods = [other.method for other in others]
        return Predictor(self.method, facts.sequences, config.data.crop, config.inference, self.placed(), facts.label_scheme, methods)

    def _check_alike(self, other: "TrainedRun") -> None:
        for what, of in ALIKE.items():
            mine, theirs = of(self), of(other)
            if mine != theirs:
                raise UserError(f"{other.folder}: {what} is {theirs}, that of {self.folder} {mine}; an ensemble is of runs that differ in fold or seed")

    def completer(self) -> Completer:
        """Completion of whole cases, slice by slice, on the GPU if there is one."""
        config = self.config
        return Completer(self.method, self.facts.sequences, config.data.slices, config.inference, self.placed())


ALIKE: dict[str, Callable[[TrainedRun], object]] = {  # in an ensemble
    "method": lambda run: run.config.method["name"],
    "the order of sequences": lambda run: ", ".join(run.facts.sequences),
    "label scheme": lambda run: run.facts.label_scheme and run.facts.label_scheme.name,
    "what labels mean": lambda run: run.facts.label_scheme,
    "network": lambda run: run.networks[0],
    "subsets taken": lambda run: run.method.subsets,
    "method.intensity": lambda run: run.method.intensity,
    "window": lambda run: run.config.inference.window or run.config.data.crop,
    "inference": lambda run: run.config.inference,
}


def open_run(
    run_dir: Path, checkpoint: str = "best", tasks: Sequence[str] = ("segmentation",), painters: bool = False, overrides: Sequence[str] = ()
) -> TrainedRun:
    """The run in `run_dir` with its best weights, or those of another `checkpoint` of its last stage (latest, step-00000120).

    `painters`: where nothing that the method scores is trained yet, `networks` are those of its painters that are. `overrides`: of how it
    predicts. Raises UserError: no run, no such checkpoint, a task that is none of `tasks`, an override of what was trained.
    """
    run_dir = Path(run_dir)
    config = read_run_config(run_dir, overrides)
    data = read_record(run_dir)["data"]
    declared = data["label_scheme"]
    scheme = LabelScheme.model_validate(declared) if isinstance(declared, dict) else declared
    views = data.get("classification")
    slice_size = config.data.slices.size if config.data.slices else None
    classification = views and Classification.model_validate(views)
    facts = DataFacts(tuple(data["sequences"]), scheme_of(scheme), config.data.crop, classification, slice_size)
    method = build(config.method, facts, config.origin)
    check_prediction(read_run_config(run_dir), config, method.sampling)
    if method.task not in tasks:
        raise UserError(f"{run_dir}: method {config.method['name']} is for {method.task}; this command takes runs of {' and '.join(tasks)}")
    loaded = load_networks(run_dir, method) if checkpoint == "best" else load_checkpoint(run_dir, method, checkpoint)
    loaded |= load_given(run_dir, method, config, loaded)
    networks = tuple(sorted((name for name in method.scored if name in loaded), key=lambda name: name in method.oracles))  # oracles last
    if not networks and painters:
        networks = tuple(name for name in method.painters if name in loaded)
    if not networks:
        raise UserError(f"{run_dir}: none of {', '.join(method.scored)} is trained yet; train the run's next stage")
    return TrainedRun(run_dir, config, data["names"][0], facts, method, networks)
