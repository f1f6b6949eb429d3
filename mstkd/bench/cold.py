"""The first epoch from a slow source, nothing cached: seconds of ours beside plain WebDataset's.

One process each, and the same whole volumes as writable tensors. Ours are read as training reads them: in its shuffled
order, from tars that are staged ahead and hashed; plain WebDataset decodes while curl streams, in stored order, and
keeps and checks nothing.
"""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

from mstkd.bench.contenders import PARTS
from mstkd.bench.reading import check, to_tensor
from mstkd.bench.report import Figure, figure
from mstkd.bench.slow_source import slow_source
from mstkd.config import DataConfig
from mstkd.data.store import ShardStore
from mstkd.data.training import open_training

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
    training = open_training(DataConfig(shards=url, crop=(1, 1, 1), cache_dir=str(cache), cache_gib=1024), seed=0, complete_only=False)
    items = training.items(range(training.order.items_per_epoch))
    for count, item in enumerate(items, start=1):
        sample = training.stores[item.source].subject(item.subject)
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
