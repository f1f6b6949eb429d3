"""Frozen networks of a stage: where their weights come from, which bytes those were, and where they lie.

A frozen network is in evaluation mode, without gradient, in no optimiser and in no checkpoint; the checkpoint's
state keeps {network: {"path", "sha256"}} of the file it came from.
"""

import logging
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mstkd.config import TeacherConfig
from mstkd.engine.backend import ShardedNetwork
from mstkd.engine.distributed import sums
from mstkd.engine.environment import Ranks
from mstkd.engine.frozen import freeze
from mstkd.engine.output_cache import CachedForward, OutputCache
from mstkd.errors import UserError
from mstkd.files import sha256_of
from mstkd.methods import Role

log = logging.getLogger(__name__)

Identity = dict[str, str]  # "path" and "sha256" of a weight file


def load_weights(network: nn.Module, name: str, files: list[Path], pick: str | None) -> Path:
    """Load the network `name` from the one of `files` that holds it, and return that file.

    A file has keys <network>.<parameter>, of which `pick`, else `name`, is taken, or parameter names alone. Raises
    UserError if none or several hold it, or naming the first parameter that differs.
    """
    wanted = pick or name
    held = {file: read_weights(file) for file in files}
    chosen = {file: _of_network(tensors, wanted) for file, tensors in held.items()}
    chosen = {file: tensors for file, tensors in chosen.items() if tensors}
    if not chosen and pick in (None, name) and len(held) == 1:  # a file of one network, whatever it was called there
        chosen = held
    if len(chosen) != 1:
        raise UserError(_ambiguous(wanted, held, list(chosen)))
    [(file, tensors)] = chosen.items()
    _copy(network, tensors, name, file)
    return file


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a state dict that torch saved (.pt, .pth); nothing else is unpickled."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, SafetensorError, EOFError, ValueError) as error:
        raise UserError(f"{file}: not readable as weights ({_first_line(error)}); copy it again or export it as safetensors") from None
    except Exception as error:  # what weights_only refuses
        raise UserError(f"{file}: holds more than tensors ({_first_line(error)}); save the network's state_dict() alone") from None
    loaded = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise UserError(f"{file}: holds no state dict; save the network's state_dict() alone")
    return loaded


def identity(file: Path) -> Identity:
    return {"path": str(file.resolve()), "sha256": sha256_of(file)}


def identities(files: dict[str, Path], before: dict[str, Identity]) -> dict[str, Identity]:
    """Those of frozen networks' files. Raises UserError if one holds other bytes than `before`; it may have moved."""
    now = {network: identity(file) for network, file in files.items()}
    for network in sorted(before.keys() & now.keys()):
        old, new = before[network]["sha256"], now[network]["sha256"]
        if old != new:
            raise UserError(
                f"{now[network]['path']}: the frozen network {network} is another one than this stage began with (sha256 {new[:12]}, was {old[:12]}, "
                f"from {before[network]['path']}); restore that file, or start another run with name=..."
            )
    return now


class FrozenNetworks:
    """The frozen networks of a stage while it trains: switched off as trainable, and placed as `teacher.placement` says."""

    def __init__(self, networks: dict[str, nn.Module], roles: dict[str, Role], config: TeacherConfig, ranks: Ranks, computes: str = ""):
        """Collective. `networks` hold their weights; `computes`: what else decides their outputs, for the cache."""
        self.ranks, self._sharded = ranks, []
        self._cache = OutputCache(Path(config.cache_dir), config.cache_gib) if networks and config.cache_dir else None
        for name, network in networks.items():
            freeze(network, name, roles)
            if config.placement != "replicate":
                self._sharded.append(ShardedNetwork(network, ranks.device, in_host_memory=config.placement == "cpu"))
                continue
            network.to(ranks.device)
            if self._cache:
                CachedForward(network, self._cache, computes)

    def report(self, stage: str) -> None:
        """Say what the cache was good for. Collective."""
        if self._cache:
            hits, misses = sums([self._cache.hits, self._cache.misses], self.ranks)
            log.info("stage %s: teacher.cache_dir: %d outputs found there, %d computed", stage, hits, misses)

    def destroy(self) -> None:
        for network in self._sharded:
            network.destroy()


def _of_network(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in tensors.items() if key.startswith(f"{name}.")}


def _copy(network: nn.Module, tensors: dict[str, Tensor], name: str, file: Path) -> None:
    """Load `tensors`; whatever module path all of their names share, and all of the network's own share, is left out of account."""
    own = network.state_dict()
    ours, theirs = _without_common_path(own), _without_common_path(tensors)
    for key in [*ours, *theirs]:
        here, there = (tuple(table[key].shape) if key in table else "missing" for table in (ours, theirs))
        if here != there:
            raise UserError(
                f"{file}: does not fit the network {name}: {key} is {there} in the file and {here} here; "
                "give the architecture it was trained with, or another file"
            )
    with torch.no_grad():
        for key, value in ours.items():
            value.copy_(theirs[key])


def _without_common_path(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    paths = [key.split(".")[:-1] for key in tensors]
    common = 0
    while all(len(path) > common and path[common] == paths[0][common] for path in paths):
        common += 1
    return {".".join(key.split(".")[common:]): value for key, value in tensors.items()}


def _ambiguous(wanted: str, held: dict[Path, dict[str, Tensor]], holders: list[Path]) -> str:
    if holders:
        return f"{holders[0]} and {holders[1]} both hold a network {wanted}; give the path of one of them"
    first = sorted({key.partition(".")[0] for tensors in held.values() for key in tensors})
    return f"{', '.join(str(file) for file in held)}: no network {wanted} here; there are {', '.join(first[:8])}; set teacher.network to one"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
