"""A trained run as it lies on disk: its recipe, its data, its method with the best weights."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from mstkd.config import InferenceConfig, RunConfig
from mstkd.data.training import open_stores
from mstkd.engine import averages, backend
from mstkd.engine.checkpoint import STATE, damage, read_state
from mstkd.engine.teacher import Identity, identity, load_weights
from mstkd.errors import UserError
from mstkd.evaluate.completion import Completer
from mstkd.evaluate.inference import Predictor
from mstkd.evaluate.source import CaseSource
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


def best_files(run_dir: Path, stage: str) -> list[Path]:
    """The consolidated weights, one file per role, of a stage's best checkpoint. Raises UserError if there are none."""
    pointer = Path(run_dir) / stage / "checkpoints" / "best"
    if not pointer.is_file():
        raise UserError(f"{run_dir}: stage {stage} has no best checkpoint; train it until its first validation")
    folder = pointer.parent / pointer.read_text().strip()
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder}: no weights (*.safetensors), though `best` points here; restore the folder or resume the run")
    return files


def safetensors_of(path: Path) -> list[Path]:
    """The weight files at `path`: a safetensors file, or the best ones of a run folder's stages."""
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        return [path]
    stages = sorted(pointer.parent.parent.name for pointer in path.glob("*/checkpoints/best"))
    if not stages:
        raise UserError(f"{path}: neither a safetensors file nor a run folder with a best checkpoint")
    return [file for stage in stages for file in best_files(path, stage)]


def load_networks(run_dir: Path, method: Method, stage: str | None = None) -> set[str]:
    """Load the best weights of `stage`, or of every stage that has some, into `method`; returns the networks loaded.

    A later stage wins where two hold the same network. Raises UserError if nothing is there or does not fit.
    """
    trained = [name for name in method.stages if (Path(run_dir) / name / "checkpoints" / "best").is_file()]
    wanted = [stage] if stage else trained or list(method.stages[:1])
    return {network for name in wanted for path in best_files(run_dir, name) for network in _load(path, method)}


def load_given(run_dir: Path, method: Method, config: RunConfig, loaded: set[str]) -> set[str]:
    """Load the frozen networks that a run took from elsewhere, from where it found them; returns those that are there.

    Raises UserError if one that is not scored, and so may serve those that are, is gone or holds other bytes.
    """
    origin: dict[str, Identity] = {}
    for stage in method.stages:
        pointer = Path(run_dir) / stage / "checkpoints" / "best"
        if pointer.is_file() and (folder := pointer.parent / pointer.read_text().strip()).joinpath(STATE).is_file():
            origin |= read_state(folder).frozen
    found = set()
    for network in sorted({name.partition(".")[0] for name in origin} - loaded):
        parts = {name: Path(there["path"]) for name, there in origin.items() if name.partition(".")[0] == network}
        changed = [name for name, file in parts.items() if not file.is_file() or identity(file)["sha256"] != origin[name]["sha256"]]
        if not changed:
            for name, file in parts.items():  # the whole network, or some of its modules each
                load_weights(method.networks[network].get_submodule(name.partition(".")[2]), name, [file], config.teacher.network)
            found.add(network)
        elif network not in method.scored:
            name = changed[0]
            raise UserError(f"{run_dir}: its frozen network {name} came from {parts[name]}, which is not as it was (sha256 {origin[name]['sha256'][:12]}); restore it")
    return found


def load_checkpoint(run_dir: Path, method: Method, checkpoint: str) -> set[str]:
    """As `load_networks`, but what the last stage trains comes from its `checkpoint`: latest, or step-00000120 and the like.

    These are the weights as DeepSpeed saved them, put together here. Raises UserError if it is not there, damaged or does not fit.
    """
    stages = [name for name in method.stages if any((Path(run_dir) / name / "checkpoints").glob("step-????????"))]
    if not stages:
        raise UserError(f"{run_dir}: no stage has a checkpoint; train it until its first save")
    before = [name for name in stages[:-1] if (Path(run_dir) / name / "checkpoints" / "best").is_file()]
    loaded = {network for name in before for path in best_files(run_dir, name) for network in _load(path, method)}
    folder = _checkpoint_folder(Path(run_dir) / stages[-1] / "checkpoints", checkpoint)
    for role_name, role in method.roles(stages[-1]).items():
        saved = backend.saved_weights(folder / role_name)
        saved_as = {id(tensor): key for key, tensor in role.step.state_dict(keep_vars=True).items()}
        for network in role.networks:
            own = method.networks[network].state_dict(keep_vars=True)
            _fill(method, network, {key: saved[name] for key, tensor in own.items() if (name := saved_as.get(id(tensor))) in saved}, folder)
            loaded.add(network)
        if role.averages:
            loaded |= set(_load(folder / role_name / averages.FILE, method))
    return loaded


def _checkpoint_folder(folder: Path, checkpoint: str) -> Path:
    pointer = folder / checkpoint
    chosen = folder / pointer.read_text().strip() if checkpoint == "latest" and pointer.is_file() else pointer
    kept = ", ".join(sorted(path.name for path in folder.glob("step-????????")))
    if not re.fullmatch(r"step-\d{8}", chosen.name) or not chosen.is_dir():
        raise UserError(f"{folder}: no checkpoint {checkpoint!r}; there are best, latest, {kept}")
    if problem := damage(chosen):
        raise UserError(f"{chosen} is damaged: {problem}; choose another one of best, {kept}")
    return chosen


def _load(path: Path, method: Method) -> list[str]:
    """Load the networks in a file with keys <network>.<parameter or buffer>; returns their names."""
    states: dict[str, dict[str, torch.Tensor]] = {}
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a sound safetensors file ({' '.join(str(error).split())}); restore it, or train again") from None
    for key, tensor in tensors.items():
        network, _, name = key.partition(".")
        states.setdefault(network, {})[name] = tensor
    for network, state in states.items():
        if network not in method.networks:
            raise UserError(f"{path}: network {network} is none of the method's; config.yaml and checkpoint differ")
        _fill(method, network, state, path)
    return list(states)


def _fill(method: Method, network: str, state: dict[str, torch.Tensor], path: Path) -> None:
    try:
        method.networks[network].load_state_dict(state)
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: does not fit network {network}: {detail}") from None
