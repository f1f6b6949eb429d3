"""Memory of a training loader: what it adds to its processes, beside the volumes in flight.

Runs as a program, so that nothing else is in the process: `python -m mstkd.bench.loader_memory FOLDER WORKERS`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil

from mstkd.bench.report import Figure

PREFETCH = 2  # batches per worker that PyTorch's loader asks for ahead
NAME, IN_FLIGHT = "loader memory", "loader, batches in flight"


def memory_figures(shards: Path, workers: int) -> list[Figure]:
    """MiB that a loader of full volumes with `workers` processes adds, and MiB of the batches in flight."""
    command = [sys.executable, "-m", "mstkd.bench.loader_memory", str(shards), str(workers)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the loader whose memory is measured failed: {done.stderr.strip().splitlines()[-1]}")
    found = json.loads(done.stdout.splitlines()[-1])
    mib = {name: value / 2**20 for name, value in found.items()}
    return [
        Figure(NAME, "MiB", mib["added"], note=f"{workers} workers; PSS, anonymous and shared"),
        Figure(IN_FLIGHT, "MiB", mib["in_flight"], note=f"{workers} x {PREFETCH} prefetched and 1 in use, float32"),
        Figure("loader, mapped tars", "MiB", mib["mapped"], note="page cache, given up when memory is short"),
    ]


def pss_bytes(pid: int) -> tuple[int, int]:
    """(anonymous and shared memory, mapped files): a process's proportional share in bytes, from smaps_rollup."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return (kib["Pss_Anon"] + kib["Pss_Shmem"]) * 1024, kib["Pss_File"] * 1024


def _total() -> tuple[int, int]:
    pids = [os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))]
    shares = [pss_bytes(pid) for pid in pids]
    return sum(own for own, _ in shares), sum(mapped for _, mapped in shares)


def _measure(folder: str, workers: int) -> dict[str, int]:
    from mstkd.config import DataConfig, IntensityConfig
    from mstkd.data.intensity import Intensity
    from mstkd.data.loader import TrainLoader
    from mstkd.data.training import open_training

    shape = json.loads((Path(folder) / "index.json").read_text())["shards"][0]["subjects"][0]["shape"]
    config = DataConfig(shards=folder, crop=shape, workers=workers, foreground_share=0.5)
    training = open_training(config, seed=0, complete_only=True)
    steps = 6 * workers
    before, mapped_before = _total()
    loader = TrainLoader(training, config, Intensity(IntensityConfig()), global_batch=1, micro_batch=1, total_steps=steps)
    added = mapped = batch_bytes = 0
    for number, step in enumerate(loader):
        batch = step[0][1]
        tensors = [batch.image, batch.brain, batch.label]
        batch_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if number < steps - PREFETCH * workers:  # while the workers still fetch
            now, mapped_now = _total()
            added, mapped = max(added, now - before), max(mapped, mapped_now - mapped_before)
    return {"added": added, "mapped": mapped, "in_flight": (workers * PREFETCH + 1) * batch_bytes}


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1], int(sys.argv[2]))))
