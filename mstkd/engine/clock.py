"""How long the parts of a step take, without making the accelerator wait for the question."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import record_function

PARTS = ("data_wait", "forward", "backward", "optimizer_step", "communication")
HOST = ("data_wait",)  # where the process itself waits, whatever the GPU does meanwhile


class Clock:
    """Seconds per part since the last `flush`.

    On a GPU two events on the current stream mark each part, and they are read at `flush` only. `communication` is
    the time of collectives on the stream that called them; it lies inside the other parts, or beside them where
    DeepSpeed overlaps it with the backward pass. Every part is a named range in a profiler's trace.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._seconds: dict[str, float] = defaultdict(float)
        self._marks: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._open: set[str] = set()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time the block as `name`; a part inside itself counts once."""
        if name in self._open:
            yield
            return
        self._open.add(name)
        on_gpu = self.device.type == "cuda" and name not in HOST
        began = _event() if on_gpu else time.perf_counter()
        try:
            with record_function(name):
                yield
        finally:
            self._open.discard(name)
            if on_gpu:
                self._marks.append((name, began, _event()))
            else:
                self._seconds[name] += time.perf_counter() - began

    def flush(self) -> dict[str, float]:
        """Seconds of every part; then start over. On a GPU it waits for the last mark."""
        for name, began, ended in self._marks:
            ended.synchronize()
            self._seconds[name] += began.elapsed_time(ended) / 1000
        seconds = {name: self._seconds[name] for name in PARTS}
        self._marks.clear()
        self._seconds.clear()
        return seconds


def _event() -> torch.cuda.Event:
    """A mark on the current stream."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
