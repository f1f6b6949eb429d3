"""Which networks a run takes over frozen, and the files that hold them: its own earlier stages', or those of `teacher.path`."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from mstkd.config import RunConfig, TeacherConfig
from mstkd.data.store import ShardStore
from mstkd.data.training import open_stores
from mstkd.engine.checkpoint import is_finished
from mstkd.engine.teacher import read_weights
from mstkd.errors import UserError
from mstkd.evaluate.overlap import refuse, training_overlap
from mstkd.evaluate.weights import best_files, safetensors_of
from mstkd.methods import Method, read_config
from mstkd.run_folder import read_record, read_run_config

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Where a frozen network, or one part of it, is to be found."""

    network: str
    part: str  # of its modules, by path; "": the whole network
    files: list[Path]  # one of them holds it
    pick: str | None = None  # the name that it has there, if it is another

    @property
    def name(self) -> str:
        return f"{self.network}.{self.part}" if self.part else self.network


def given_networks(config: RunConfig, method: Method, sequences: tuple[str, ...]) -> set[str]:
    """The frozen networks that `teacher.path` gives, which are shown these `sequences`.

    Raises UserError if there is nothing at it, no use for the section, or a run whose networks expect another input.
    """
    name, needed = config.method["name"], {network for stage in method.stages for network in method.needs(stage)}
    if not needed and config.teacher != TeacherConfig():
        key = next(key for key, value in config.teacher if value != getattr(TeacherConfig(), key))
        raise UserError(f"teacher.{key}: {name} freezes no network; remove the key")
    path = config.teacher.path
    if path is None:
        return set()
    files = [file for place in _places(path) for file in given_files(place)]
    for run in _runs(path):
        _check_input(run, method, sequences)
    if isinstance(path, dict):
        return _given_by_name(config, method, needed)
    if len(needed) == 1:
        return needed
    if config.teacher.network in needed:  # the file holds this one, with its name before the parameters' or without
        return {config.teacher.network}
    if config.teacher.network:
        raise UserError(f"teacher.network: {name} freezes {', '.join(sorted(needed))}, which are taken by their names; remove the key, or set it to one of them")
    held = {key.partition(".")[0] for file in files for key in read_weights(file)}
    if not needed & held:
        raise UserError(f"teacher.path {path}: holds {', '.join(sorted(held)[:8])}; {name} freezes {', '.join(sorted(needed))}")
    return needed & held


def _given_by_name(config: RunConfig, method: Method, needed: set[str]) -> set[str]:
    """The networks that a mapping at `teacher.path` names. Raises UserError on one that is not frozen, or whose parts are not the whole."""
    path = config.teacher.path
    if config.teacher.network:
        raise UserError("teacher.network: teacher.path gives networks by their names; remove the key")
    if unknown := sorted(path.keys() - needed):
        raise UserError(f"teacher.path.{unknown[0]}: {config.method['name']} freezes {', '.join(sorted(needed))}; name one of them")
    for network, parts in path.items():
        if isinstance(parts, str):
            continue
        module, covered = method.networks[network], set()
        there = [name for name, child in module.named_children() if child.state_dict()]
        for part in parts:
            try:
                covered |= {f"{part}.{key}" for key in module.get_submodule(part).state_dict()}
            except AttributeError:
                raise UserError(f"teacher.path.{network}.{part}: the network has no such part; it has {', '.join(there)}") from None
        if lacking := module.state_dict().keys() - covered:
            raise UserError(f"teacher.path.{network}: no file gives {min(lacking)}; the network consists of {', '.join(there)}, each of which needs one")
    return set(path)


def _places(path: str | dict[str, str | dict[str, str]]) -> list[str]:
    if isinstance(path, str):
        return [path]
    return [place for given in path.values() for place in ([given] if isinstance(given, str) else given.values())]


def _runs(path: str | dict[str, str | dict[str, str]] | None) -> list[Path]:
    """The run folders among what `teacher.path` names."""
    return [Path(place) for place in dict.fromkeys(_places(path)) if Path(place).is_dir()] if path else []


def _check_input(run: Path, method: Method, sequences: tuple[str, ...]) -> None:
    """Raise UserError if the networks of the folder `run` were trained on another input, or answer in other channels."""
    theirs, ours = read_config(read_run_config(run).method), getattr(method, "config", None)
    keys = ("targets", "rc_channel", "region") if method.runs_apart else ("intensity", "targets", "rc_channel", "region")
    pairs = {f"method.{key}": (getattr(theirs, key, None), getattr(ours, key, None)) for key in keys}
    if not method.runs_apart:
        pairs["the data's sequences"] = tuple(read_record(run)["data"]["sequences"]), tuple(sequences)
    for what, (there, here) in pairs.items():
        if there != here and None not in (there, here):
            raise UserError(f"teacher.path {run}: {what} was {_said(there)} there and is {_said(here)} here; make them equal, or take another teacher")


def _said(value: object) -> str:
    return str(value.model_dump(mode="json") if isinstance(value, BaseModel) else value)


def given_files(place: str) -> list[Path]:
    """The weight files at one path of `teacher.path`."""
    path = Path(place)
    if path.suffix in (".pt", ".pth") and path.is_file():
        return [path]
    try:
        return safetensors_of(path)
    except UserError as error:
        raise UserError(f"teacher.path: {error}") from None


def stages_left_out(method: Method, given: set[str]) -> list[str]:
    """The stages that train networks which are given and, beside them, only what the stage itself, or one that is left out, has a use for.

    A stage that goes on from a given network is none of them.
    """
    left_out: list[str] = []
    for stage in reversed(method.stages):
        results = {network for role in method.roles(stage).values() for network in role.results}
        useful = results & _used(method, method.stages)
        if useful and useful & _used(method, [other for other in method.stages if other not in left_out]) <= given - method.needs(stage).keys():
            left_out.append(stage)
    return left_out


def _used(method: Method, stages: Sequence[str]) -> set[str]:
    """The networks that are scored, or that one of these stages needs."""
    return {*method.scored, *(network for stage in stages for network in method.needs(stage))}


def refuse_seen(config: RunConfig, stores: Sequence[ShardStore]) -> None:
    """Raise UserError if a run at `teacher.path` was trained on a validation or test subject of this one: what it gives knows them.

    `data.allow_overlap` lets it pass. Where that run's shards are not here, the log says that nobody looked.
    """
    for run in _runs(config.teacher.path):
        theirs = read_run_config(run).data
        try:
            seen = open_stores(theirs)
        except UserError as error:
            log.warning("teacher.path: whether its training and this run's validation and test share a subject cannot be looked up: %s", error)
            continue
        for split in ("val", "test"):
            found = training_overlap(seen, theirs.fold, stores, split, config.data.fold)
            if not config.data.allow_overlap:
                refuse(found.unstated, split, "data.allow_overlap=true")


def sources_of(network: str, stage: str, config: RunConfig, given: set[str]) -> list[Source]:
    """Where `network`, which the earlier `stage` trains, is taken from: one source, or one for each part that `teacher.path` names."""
    path = config.teacher.path
    if network in given and isinstance(path, dict):
        parts = {"": path[network]} if isinstance(path[network], str) else path[network]
        return [Source(network, part, given_files(place)) for part, place in parts.items()]
    if network in given:
        return [Source(network, "", given_files(path), config.teacher.network)]
    checkpoints = config.run_dir / stage / "checkpoints"
    if not checkpoints.is_dir():
        raise UserError(
            f"{config.run_dir}: stage {stage} has no best checkpoint, and {network} is what this stage begins with: "
            f"`mstkd train {config.run_dir}/config.yaml stages=[{stage}]` trains it, or teacher.path=RUN takes it from another run"
        )
    files = best_files(config.run_dir, stage)
    if not is_finished(checkpoints):
        raise UserError(
            f"{config.run_dir}: stage {stage}, which trains {network}, is not finished; finish it first, "
            f"or take {network} as it is with name=... teacher.path={config.run_dir}"
        )
    return [Source(network, "", files)]
