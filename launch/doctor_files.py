"""The doctor's look at file systems: room for checkpoints, and code caches that nodes must not share."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mstkd.config import CheckpointConfig
from mstkd.errors import UserError
from mstkd.files import existing_folder, size_text
from mstkd.launch.doctor_finding import Finding, fail, ok, warn

MOUNTS = Path("/proc/self/mounts")
ENOUGH_GIB = 10  # where no checkpoint tells more
OVER_THE_NETWORK = {
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "sshfs", "afs", "panfs", "wekafs", "9p",
    "orangefs", "pvfs2", "daos", "s3fs", "gcsfuse", "moosefs", "juicefs",
}  # fmt: skip


def findings(runs_dir: Path) -> Iterator[Finding]:
    yield disk(runs_dir)
    yield cache("torch cache", "TORCH_EXTENSIONS_DIR")
    yield cache("triton cache", "TRITON_CACHE_DIR")


def disk(runs_dir: Path) -> Finding:
    """Free space where the runs lie, against what the newest run's checkpoints take."""
    place = existing_folder(runs_dir)
    free, kind = shutil.disk_usage(place).free, file_system(place)
    room = f"{size_text(free)} free in {place} ({kind})"
    if not os.access(place, os.W_OK):
        return fail("disk", f"{place} is not writable", "choose another folder with --runs-dir and runs_dir=...")
    known = newest_checkpoint(runs_dir)
    if known is None:
        if free < ENOUGH_GIB * 1024**3:
            return warn("disk", room, f"a published network's run takes some {ENOUGH_GIB} GiB: make room, or set runs_dir=...")
        return ok("disk", room)
    needed = known.size * known.copies
    takes = f"{room}; a run like {known.run} keeps up to {known.copies} checkpoints of {size_text(known.size)}, {size_text(needed)}"
    if free < known.size:
        return fail("disk", takes, "not one more fits: delete old runs, or set runs_dir=...")
    if free < needed:
        return warn("disk", takes, "delete old runs, lower checkpoint.keep, or set runs_dir=...")
    return ok("disk", takes)


@dataclass(frozen=True)
class KnownCheckpoint:
    run: str
    size: int  # bytes
    copies: int  # at most, at one moment, per stage


def newest_checkpoint(runs_dir: Path) -> KnownCheckpoint | None:
    """The newest complete checkpoint below `runs_dir`."""
    from mstkd.run_folder import read_run_config

    found = [(state.stat().st_mtime, state.parent) for state in Path(runs_dir).glob("*/*/checkpoints/step-????????/state.json")]
    if not found:
        return None
    folder = max(found)[1]
    run = folder.parents[2]
    stage, reached = folder.parents[1].name, int(folder.name.removeprefix("step-"))
    try:
        config = read_run_config(run)
        steps = config.train.steps
        steps = steps.get(stage, reached) if isinstance(steps, dict) else steps or reached  # of epochs only the data knows
        copies = config.checkpoint.most_copies(steps)
    except UserError:
        copies = CheckpointConfig().most_copies(reached)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return KnownCheckpoint(run.name, size, copies)


def cache(thing: str, variable: str, mounts: Path = MOUNTS) -> Finding:
    """Where compiled code will lie. mstkd chooses a folder on the node unless the variable names one."""
    given = os.environ.get(variable)
    place = existing_folder(Path(given or tempfile.gettempdir()))
    kind = file_system(place, mounts)
    if kind.removeprefix("fuse.") not in OVER_THE_NETWORK:
        return ok(thing, f"{given or f'a private folder in {place}'} ({kind})")
    trouble = f"{f'{variable}={given}' if given else place} lies on {kind}: nodes share it, and a killed build there blocks all of them"
    return warn(thing, trouble, f"unset {variable}, or name a folder on the node" if given else "set TMPDIR to a folder on the node")


def file_system(path: Path, mounts: Path = MOUNTS) -> str:
    """The type of the file system that holds `path`, e.g. "ext4", "nfs4"; "unknown" without /proc."""
    if not mounts.is_file():
        return "unknown"
    best, kind = -1, "unknown"
    for line in mounts.read_text().splitlines():
        _, where, found, *_ = line.split()
        where = Path(re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), where))  # a blank is written \040
        if Path(path).resolve().is_relative_to(where) and len(where.parts) >= best:
            best, kind = len(where.parts), found
    return kind
