"""Where code compiled at run time lies, and who compiles it.

torch keeps extensions in the home folder, which the nodes of a cluster share, though the code is for one kind of CPU,
and a killed build leaves a lock file there for which every later process waits for ever. So: a folder on the node, and
one builder at a time, under a lock that the kernel releases however its holder ends.
"""

import fcntl
import hashlib
import importlib.util
import logging
import os
import platform
import stat
import sysconfig
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

from mstkd.errors import UserError

log = logging.getLogger(__name__)
BUILD_LIMIT_S = 20 * 60  # no operator takes that long; who waits longer waits for a dead builder
POLL_S = 0.2


@dataclass(frozen=True)
class JitCache:
    """The folder with one subfolder per extension; `ours` if only this program's builders use it, else the user chose it."""

    folder: Path
    ours: bool


def place_caches() -> JitCache:
    """Point the caches of torch's extensions, triton and torch.compile, where the user has not set them, into a private folder of this node.

    The folder lies under $TMPDIR (else /tmp) and is named by user, versions of torch, DeepSpeed and Python, and CPU features.
    Call before torch compiles anything and before triton is imported. Raises UserError if others may write to the folder.
    """
    node = Path(tempfile.gettempdir()) / f"mstkd-{os.geteuid()}-{_build_key()}"
    places = {"TORCH_EXTENSIONS_DIR": node / "extensions", "TRITON_CACHE_DIR": node / "triton", "TORCHINDUCTOR_CACHE_DIR": node / "inductor"}
    unset = [name for name in places if not os.environ.get(name)]
    if unset:
        _private_folder(node)
    os.environ.update({name: str(places[name]) for name in unset})
    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    return JitCache(folder, ours=folder == places["TORCH_EXTENSIONS_DIR"])  # also when a parent process set it


@contextmanager
def one_builder(cache: JitCache, extension: str, limit_s: float = BUILD_LIMIT_S):
    """Inside, this process alone on the node may compile and load `extension`; the others wait and then find it compiled.

    A lock file left by a killed build is removed first. Raises UserError if somebody else still holds it after `limit_s`
    seconds, or if the folder's file system has no locks. ninja is found also where the environment is not activated.
    """
    _find_programs_of_this_environment()
    try:
        cache.folder.mkdir(parents=True, exist_ok=True)
        turn = (cache.folder / f"{extension}.turn").open("a")
    except OSError as error:
        raise UserError(f"TORCH_EXTENSIONS_DIR: cannot write to {cache.folder} ({error.strerror}); name another folder") from None
    with turn:
        try:
            fcntl.flock(turn, fcntl.LOCK_EX)
        except OSError as error:
            fix = "set TORCH_EXTENSIONS_DIR to a folder on the node"
            raise UserError(f"{cache.folder} has no file locks ({error.strerror}); {fix}") from None
        _clear(cache.folder / extension / "lock", cache.ours, limit_s)
        yield


def _clear(lock: Path, ours: bool, limit_s: float) -> None:
    """Return once torch's lock file is gone.

    In our folder every builder holds its turn, which is now ours: the file is stale as soon as the dead builder's compiler,
    which may outlive it, has ended too. Elsewhere its holder may be another program, on another node.
    """
    deadline = time.monotonic() + limit_s
    while lock.exists():
        holders = _at_work(lock)
        if ours and not holders:
            log.warning("removed %s, left by a build that was killed", lock)
            lock.unlink(missing_ok=True)
            return
        if time.monotonic() >= deadline:
            holder = f"held by process {holders[0]}" if holders else "not held by any process of yours on this node"
            fix = "end that build, or delete the file if none is running"
            raise UserError(f"{lock} has been there for more than {limit_s / 60:.0f} min, {holder}; {fix}")
        time.sleep(POLL_S)


def _at_work(lock: Path) -> list[int]:
    """Processes of this user that hold the lock file open or work in its folder, as ninja and the compiler do."""
    path, folder, mine = str(lock.resolve()), str(lock.parent.resolve()), os.geteuid()
    found = []
    for process in psutil.process_iter():
        try:
            if process.uids().effective != mine:
                continue
            if process.cwd() == folder or path in {file.path for file in process.open_files()}:
                found.append(process.pid)
        except (psutil.Error, OSError):  # ended while we looked
            continue
    return found


def _find_programs_of_this_environment() -> None:
    path, scripts = os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")
    if scripts not in path.split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([path, scripts])


def _private_folder(folder: Path) -> Path:
    """Make `folder` for this user only. Code is loaded from it, so nobody else may have put it there. Raises UserError."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        facts = folder.lstat()
    except OSError as error:
        raise UserError(f"cannot make {folder} ({error.strerror}); set TMPDIR to a folder of this node that you can write to") from None
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid() or facts.st_mode & 0o022:
        raise UserError(f"{folder} is not a folder that only you can write to; remove it, or set TMPDIR to a folder of your own")
    return folder


def _build_key() -> str:
    """What compiled code depends on: it is used again only where all of this is the same."""
    parts = [platform.machine(), _cpu_features(), sysconfig.get_config_var("SOABI") or ""]
    for package in ("torch", "deepspeed"):
        spec = importlib.util.find_spec(package)
        parts += [metadata.version(package), str(spec.origin)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _cpu_features() -> str:
    """DeepSpeed compiles with -march=native: the code may not run on another kind of CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
