"""Which networks a run takes over frozen, and the files that hold them: its own earlier stages', or those of `teacher.path`."""

import logging
from collections.abc import Sequence
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


def given_networks(config: RunConfig, method: Method, sequences: tuple[str, ...]) -> set[str]:
    """The frozen networks that `teacher.path` gives, which are shown these `sequences`.

    Raises UserError if there is nothing at it, no use for the section, or a run whose networks expect another input.
    """
    name, needed = config.method["name"], {network for stage in method.stages for network in method.needs(stage)}
    if not needed and config.teacher != TeacherConfig():
        key = next(key for key, value in config.teacher if value != getattr(TeacherConfig(), key))
        raise UserError(f"teacher.{key}: {name} freezes no network; remove the key")
    if config.teacher.path is None:
        return set()
    files = given_files(config)
    if Path(config.teacher.path).is_dir():
        _check_input(Path(config.teacher.path), method, sequences)
    if len(needed) == 1:
        return needed
    if config.teacher.network in needed:  # the file holds this one, with its name before the parameters' or without
        return {config.teacher.network}
    if config.teacher.network:
        raise UserError(f"teacher.network: {name} freezes {', '.join(sorted(needed))}, which are taken by their names; remove the key, or set it to one of them")
    held = {key.partition(".")[0] for file in files for key in read_weights(file)}
    if not needed & held:
        raise UserError(f"teacher.path {config.teacher.path}: holds {', '.join(sorted(held)[:8])}; {name} freezes {', '.join(sorted(needed))}")
    return needed & held


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


def given_files(config: RunConfig) -> list[Path]:
    """The weight files at `teacher.path`."""
    path = Path(config.teacher.path)
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
    """Raise UserError if the run at `teacher.path` was trained on a validation or test subject of this one: what it gives knows them.

    `data.allow_overlap` lets it pass. Where that run's shards are not here, the log says that nobody looked.
    """
    if config.teacher.path is None or not Path(config.teacher.path).is_dir():
        return
    theirs = read_run_config(Path(config.teacher.path)).data
    try:
        seen = open_stores(theirs)
    except UserError as error:
        log.warning("teacher.path: whether its training and this run's validation and test share a subject cannot be looked up: %s", error)
        return
    for split in ("val", "test"):
        found = training_overlap(seen, theirs.fold, stores, split, config.data.fold)
        if not config.data.allow_overlap:
            refuse(found.unstated, split, "data.allow_overlap=true")


def source_of(network: str, stage: str, config: RunConfig, given: set[str]) -> tuple[list[Path], str | None]:
    """The files to look for `network` of the earlier `stage` in, and the name it has there, if it is another."""
    if network in given:
        return given_files(config), config.teacher.network
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
    return files, None
