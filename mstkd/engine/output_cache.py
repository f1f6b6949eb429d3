"""Outputs of a frozen network kept on a local disk, for inputs that come again.

A value's name is the sha256 of the network's weights and structure, the method's settings, the versions, the device, the precision
and the input's bytes: what is found is what would be computed. One file per sample, `<name>.safetensors`.
"""

import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from mstkd.errors import UserError

log = logging.getLogger(__name__)


class OutputCache:
    """Files in `folder`, at most `limit_gib` of them, shared by the processes of a node; the least recently used leaves first."""

    def __init__(self, folder: Path, limit_gib: float):
        self.folder, self.limit_bytes, self.limit_gib = Path(folder), int(limit_gib * 2**30), limit_gib
        self.hits = self.misses = 0
        self._writable = True
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"teacher.cache_dir {folder}: cannot be created ({error.strerror}); name a folder on a local disk") from None

    def get(self, name: str) -> list[Tensor] | None:
        """The tensors stored under `name`; None if there are none, or, with a warning, if the file is damaged."""
        path = self._path(name)
        try:
            with safe_open(path, "pt") as file:
                tensors = [file.get_tensor(str(place)) for place in range(len(file.keys()))]
                sound = (file.metadata() or {}).get("sha256") == _digest(tensors)
            with suppress(OSError):
                _used_now(path)
        except FileNotFoundError:  # never stored, or evicted meanwhile
            sound, tensors = True, None
        except (SafetensorError, OSError):
            sound = False
        if not sound:
            log.warning("teacher.cache_dir: %s is damaged; its value is computed again", path)
            path.unlink(missing_ok=True)
            return self._missed()
        if tensors is None:
            return self._missed()
        self.hits += 1
        return tensors

    def put(self, name: str, tensors: list[Tensor]) -> None:
        """Store tensors. Where they cannot be written, a warning says so once and nothing more is kept: a run does not end for a cache.

        Raises UserError if they alone exceed the limit.
        """
        if not self._writable:
            return
        data = save({str(place): tensor for place, tensor in enumerate(tensors)}, {"sha256": _digest(tensors)})
        if len(data) > self.limit_bytes:
            raise UserError(f"teacher.cache_gib {self.limit_gib:g}: one output takes {len(data) / 2**30:.2g} GiB; raise it")
        path = self._path(name)
        partial = self.folder / "partial"  # of whoever holds the lock
        try:
            with self._locked():
                self._make_room(len(data))
                partial.write_bytes(data)
                _used_now(partial)
                os.replace(partial, path)
        except OSError as error:
            self._writable = False
            log.warning("teacher.cache_dir %s: cannot be written to (%s); outputs are kept no more", self.folder, error.strerror)

    def _missed(self) -> None:
        self.misses += 1

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _make_room(self, size: int) -> None:
        files = sorted(((path.stat(), path) for path in self.folder.glob("*.safetensors")), key=lambda pair: pair[0].st_mtime_ns)
        excess = sum(stat.st_size for stat, _ in files) + size - self.limit_bytes
        for stat, path in files:
            if excess <= 0:
                return
            path.unlink()
            excess -= stat.st_size

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer at a time; closing the file, or the process's end, releases it."""
        with open(self.folder / "lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


class CachedForward:
    """The forward of a frozen network, asking the cache first, sample by sample."""

    def __init__(self, network: nn.Module, cache: OutputCache, computes: str = ""):
        """Takes the place of `network.forward`: whoever calls the network notices nothing. `computes`: what decides its output besides weights and input."""
        self._compute: Callable[..., Any] = network.forward
        state = network.state_dict()
        self.cache, self._weights = cache, f"{_digest([tensor.cpu() for tensor in state.values()])}/{list(state)}/{network}/{computes}"
        self._structure: TreeSpec | None = None  # of the output: known from the first call, which computes
        network.forward = self

    def __call__(self, *inputs: Tensor) -> Any:
        """Of tensors with one entry per sample each."""
        if any(given.requires_grad for given in inputs):  # somebody wants the gradient through this network
            return self._compute(*inputs)
        names = [self._name(sample) for sample in zip(*inputs, strict=True)]
        found = [self.cache.get(name) for name in names]
        missing = [place for place, value in enumerate(found) if value is None or self._structure is None]
        if missing:
            computed = self._samples([given[missing] for given in inputs] if len(missing) < len(names) else inputs)
            for place, tensors in zip(missing, computed, strict=True):
                if found[place] is None:
                    self.cache.put(names[place], [tensor.cpu().contiguous() for tensor in tensors])
                found[place] = tensors
        leaves = [torch.stack([tensor.to(inputs[0].device) for tensor in parts]) for parts in zip(*found, strict=True)]
        return tree_unflatten(leaves, self._structure)

    def _samples(self, inputs: Sequence[Tensor]) -> list[list[Tensor]]:
        """The output's tensors of each sample of `inputs`."""
        leaves, self._structure = tree_flatten(self._compute(*inputs))
        count = len(inputs[0])
        if not all(isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == count for leaf in leaves):
            raise UserError("teacher.cache_dir: this network's output is not a set of tensors with one entry per sample; leave it out")
        return [[leaf[place] for leaf in leaves] for place in range(count)]

    def _name(self, sample: Sequence[Tensor]) -> str:
        device = sample[0].device.type
        precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else sample[0].dtype
        digest = hashlib.sha256(f"{self._weights}/{device}/{precision}".encode())
        for part in sample:
            digest.update(f"/{part.dtype}/{tuple(part.shape)}/".encode())
            digest.update(_bytes(part.cpu().contiguous()))
        return digest.hexdigest()


def _used_now(path: Path) -> None:
    """Note the time of use, which eviction sorts by; the system's own stamps are equal for several milliseconds."""
    now = time.time_ns()
    os.utime(path, ns=(now, now))


def _digest(tensors: list[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(_bytes(tensor.contiguous()))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.flatten().view(torch.uint8).numpy())
