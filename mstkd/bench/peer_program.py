"""Runs one peer in an interpreter that has it: `python peer_program.py PEER`, commands as JSON lines.

It needs the standard library, NumPy, PyTorch and the peer, not mstkd. Commands on stdin, answers on stdout:
{"do": "write", "tars": [...], "folder": ...}, {"do": "digests"}, {"do": "rate", "seconds": s}.
"""

import importlib.util
import io
import json
import os
import sys
import tarfile
import types
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from reading import Stopwatch, digests, dtype_of, to_tensor  # noqa: E402  (its neighbour: mstkd itself may be absent here)

PARTS = ("image", "brain", "label")


def subjects(tars: list[str]) -> Iterator[dict]:
    """The subjects of our tars, in order: key, the arrays of PARTS, and meta (str)."""
    import numpy as np

    sample: dict = {}
    for path in tars:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, part, _ = member.name.split(".")
                payload = tar.extractfile(member).read()
                if sample and sample["key"] != key:
                    yield sample
                    sample = {}
                value = payload.decode() if part == "meta" else np.load(io.BytesIO(payload), allow_pickle=False)
                sample |= {"key": key, part: value}
    yield sample


class Mds:
    """MosaicML Streaming: MDS shards with raw array columns, no compression, read in stored order."""

    distribution = "mosaicml-streaming"

    def __init__(self) -> None:
        if importlib.util.find_spec("torchvision") is None:
            # its image data sets want torchvision, which CPU builds of PyTorch often lack; nothing here needs them
            sys.modules.setdefault("streaming.vision", types.ModuleType("streaming.vision"))
        import streaming

        self._streaming = streaming

    def write(self, tars: list[str], folder: str) -> None:
        columns: dict = {}
        for sample in subjects(tars):
            if not columns:
                columns = {p: f"ndarray:{sample[p].dtype}:{','.join(map(str, sample[p].shape))}" for p in PARTS}
                columns |= {"key": "str", "meta": "str"}
                writer = self._streaming.MDSWriter(out=folder, columns=columns, compression=None, hashes=None, size_limit="256mb")
            writer.write(sample)
        writer.finish()
        self._data = self._streaming.StreamingDataset(local=folder, shuffle=False, batch_size=1)

    def epoch(self) -> Iterator[dict]:
        for number in range(len(self._data)):  # indexing is faster than its iterator, which adds a thread
            sample = self._data[number]
            json.loads(sample["meta"])
            yield {part: to_tensor(sample[part]) for part in PARTS}


class LitData:
    """litdata: chunks without compression, read in stored order."""

    distribution = "litdata"

    def __init__(self) -> None:
        import litdata
        from litdata.streaming.cache import Cache

        self._litdata, self._cache = litdata, Cache

    def write(self, tars: list[str], folder: str) -> None:
        cache = self._cache(folder, chunk_bytes=256 << 20)
        for number, sample in enumerate(subjects(tars)):
            cache[number] = sample
        cache.done()
        cache.merge()
        self._folder = folder

    def epoch(self) -> Iterator[dict]:
        for sample in self._litdata.StreamingDataset(self._folder, shuffle=False):
            json.loads(sample["meta"])
            yield {part: to_tensor(sample[part]) for part in PARTS}


PEERS = {"mds": Mds, "litdata": LitData}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not get among the answers
    kind = PEERS[sys.argv[1]]

    def answer(**values: object) -> None:
        print(json.dumps(values), file=answers, flush=True)

    try:
        peer = kind()
    except ImportError as error:
        answer(absent=f"no module {error.name}")
        return
    answer(version=version(kind.distribution), numpy=version("numpy"), torch=version("torch"))
    stopwatch = None
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "write":
            peer.write(command["tars"], command["folder"])
            stopwatch = Stopwatch(peer.epoch)
            answer(done=True)
        elif command["do"] == "digests":
            answer(digests=[digests(sample) for sample in peer.epoch()], dtype=dtype_of(next(peer.epoch())))
        else:
            answer(rate=stopwatch.rate(command["seconds"]))


if __name__ == "__main__":
    main()
