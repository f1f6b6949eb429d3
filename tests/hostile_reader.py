"""Run by test_shards_safety.py in a process of its own: opens crafted sets with hardly any memory to spare.

argv: a folder with the folders `sets`, whole shard sets, and `tars`, the same without their index. What is called `sound`
in them is read before the limits are set. Prints one JSON object: reader -> set -> [class of the exception or "read", message,
growth of the peak in MiB]. Standard output must be a pipe: no file may grow.
"""

import json
import resource
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from mstkd.data.store import ShardStore
from mstkd.shards.foreign import index_foreign
from mstkd.shards.verify import verify

SPARE_BYTES = 64 * 2**20


def store(folder: Path) -> None:
    """As training does."""
    opened = ShardStore(folder, verify_sha256=True)
    for key in opened.subjects:
        opened.subject(key)


def index(folder: Path) -> None:
    """As `shards index` does: from the tars alone."""
    index_foreign(folder, "phantom")


READERS = {"verify": ("sets", verify), "store": ("sets", store), "index": ("tars", index)}


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def outcome(reader: Callable, folder: Path) -> list:
    before = peak_mib()
    try:
        reader(folder)
    except Exception as error:
        return [type(error).__name__, str(error), peak_mib() - before]
    return ["read", "", peak_mib() - before]


def set_limits() -> None:
    """No file may grow, and the process may take 64 MiB more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + SPARE_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def main(root: Path) -> None:
    warnings.simplefilter("ignore")
    for kind, reader in READERS.values():  # modules are loaded, buffers made
        reader(root / kind / "sound")
    set_limits()
    found = {}
    for name, (kind, reader) in READERS.items():
        folders = sorted(path for path in (root / kind).iterdir() if path.name != "sound")
        found[name] = {folder.name: outcome(reader, folder) for folder in folders}
    found["limits"] = {"memory": outcome(lambda _: bytearray(2 * SPARE_BYTES), root), "disk": outcome(write_a_byte, root)}
    print(json.dumps(found))


def write_a_byte(folder: Path) -> None:
    """What the limits must prevent, else nothing is proven."""
    try:
        (folder / "grown").write_bytes(b"x")
    finally:
        (folder / "grown").unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
