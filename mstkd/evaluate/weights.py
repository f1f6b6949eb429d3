"""The weights of a run on disk, loaded into its method: the best ones of its stages, or those of another checkpoint."""

import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from mstkd.config import RunConfig
from mstkd.engine import averages, backend
from mstkd.engine.checkpoint import STATE, damage, read_state
from mstkd.engine.teacher import Identity, identity, load_weights
from mstkd.errors import UserError
from mstkd.methods import Method


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
