"""The first epoch from a slow source, nothing cached: seconds of ours beside plain WebDataset's."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

from mstkd.bench.contenders import PARTS
from mstkd.bench.reading import check, to_tensor
from mstkd.bench.report import Figure, figure
from mstkd.bench.slow_source import slow_source
from mstkd.data.store import ShardStore

OURS, PLAIN = "mstkd, cold first epoch", "plain WebDataset, cold first epoch"


def cold_figures(shards: Path, scratch: Path, megabytes_per_second: float, rounds: int) -> list[Figure]:
    """Seconds for one epoch over `shards`, served over HTTP at a limited rate; `scratch` holds our cache."""
    if shutil.which("curl") is None:
        return [Figure(name, "s", None, note="absent: plain WebDataset reads http with curl, which is not installed") for name in (OURS, PLAIN)]
    seconds: dict[str, list[float]] = {OURS: [], PLAIN: []}
    expected = len(ShardStore(shards).subjects)
    with slow_source(shards, megabytes_per_second) as url:
        for _ in range(rounds):
            seconds[OURS].append(_timed(lambda: _ours(url, scratch / "cache"), expected))
            shutil.rmtree(scratch / "cache")
            seconds[PLAIN].append(_timed(lambda: _plain(url, shards), expected))
    return [figure(name, "s", values, f"at {megabytes_per_second:g} MB/s") for name, values in seconds.items()]


def _timed(epoch: Callable[[], int], expected: int) -> float:
    start = time.perf_counter()
    count = epoch()
    spent = time.perf_counter() - start
    if count != expected:
        raise RuntimeError(f"{count} of {expected} subjects came from the slow source")
    return spent


def _ours(url: str, cache: Path) -> int:
    store = ShardStore(url, cache, cache_gib=1024)
    for count, key in enumerate(store.subjects, start=1):
        sample = store.subject(key)
        for part in PARTS:
            check(to_tensor(getattr(sample, part)))
    return count


def _plain(url: str, shards: Path) -> int:
    import webdataset

    urls = [f"{url}/{path.name}" for path in sorted(shards.glob("*.tar"))]
    for count, sample in enumerate(webdataset.WebDataset(urls, shardshuffle=False).decode(), start=1):
        for member in PARTS.values():
            check(to_tensor(sample[member]))
    return count
