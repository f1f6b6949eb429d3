"""A torch profiler trace of a few updates, on request (`profile.steps`)."""

import gzip
import json
import logging
import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from mstkd.engine.environment import Ranks

log = logging.getLogger(__name__)
IDENTIFYING = ("host_name", "traceName")  # of what the profiler writes: the machine, and a path


class Trace:
    """Records the updates `first` to `last`, counted from 1 as in the log, into one file per rank.

    Without a request it does nothing. The file opens in Perfetto or chrome://tracing; the parts of engine/clock.py are
    named ranges in it. No shapes, stacks or paths are recorded, and the host's name is taken out.
    """

    def __init__(self, steps: str | None, folder: Path, ranks: Ranks):
        self.folder, self.ranks = folder, ranks
        first, _, last = (steps or "0").partition("-")
        self.first, self.last = int(first), int(last or first)
        self._profile: profile | None = None

    def before(self, step: int) -> None:
        """The update `step` is about to begin."""
        if step == self.first:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.ranks.device.type == "cuda")
            self._profile = profile(activities=activities)
            self._profile.start()

    def after(self, step: int) -> Path | None:
        """The update `step` is done; the file, once the last one is."""
        return self.close() if step == self.last else None

    def close(self) -> Path | None:
        """Write what was recorded, if anything is open."""
        if self._profile is None:
            return None
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize(self.ranks.device)
        recorded, self._profile = self._profile, None
        recorded.stop()
        path = self.folder / f"steps-{self.first}-{self.last}.rank-{self.ranks.rank}.json.gz"
        try:
            _write(recorded, path)
        except (OSError, ValueError) as error:  # of a full disk; no reason to end a run
            log.warning("%s: the trace cannot be written: %s", path, error)
            return None
        log.info("trace of updates %d to %d: %s", self.first, self.last, path)
        return path


def _write(recorded: profile, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".json") as raw:
        recorded.export_chrome_trace(raw.name)
        events = json.loads(Path(raw.name).read_text())
    with gzip.open(path, "wt") as stream:
        json.dump({key: value for key, value in events.items() if key not in IDENTIFYING}, stream)
