"""Scalars of the steps since the last log line, kept on the device and reduced over ranks once per line."""

import time

import torch
import torch.distributed as dist
from torch import Tensor

from mstkd.engine.environment import Ranks


class Meter:
    """Means of scalars, step rate and the share of time that steps waited for data."""

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._restart()

    def add(self, scalars: dict[str, Tensor]) -> None:
        """Add one micro-batch's detached scalars; no synchronisation with the device."""
        for name, value in scalars.items():
            value = value.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def waited(self, seconds: float) -> None:
        """The next step's data came after `seconds`."""
        self._wait_s += seconds

    def step_done(self) -> None:
        self.steps += 1

    def flush(self, samples_per_step: int) -> dict[str, float]:
        """Means over micro-batches and ranks, plus time/* figures; then start over. Collective."""
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        names = sorted(self._sums)
        figures = dict(zip(names, self._means(names), strict=True))
        rate = self.steps / elapsed
        figures |= {
            "time/steps_per_s": rate,
            "time/samples_per_s": rate * samples_per_step,
            "time/data_wait_share": self._wait_s / elapsed,
        }
        if self._save_s:
            figures["time/save_s"] = self._save_s
        self._sums.clear()
        self._counts.clear()
        self._restart()
        return figures

    def pause(self, seconds: float) -> None:
        """Leave `seconds` (a validation, a save) out of the rates."""
        self._since += seconds

    def saved(self, seconds: float) -> None:
        """A checkpoint took `seconds`: left out of the rates; the longest since the last line is reported as time/save_s."""
        self._save_s = max(self._save_s, seconds)
        self.pause(seconds)

    def _means(self, names: list[str]) -> list[float]:
        if not names:
            return []
        table = torch.stack([torch.stack([self._sums[n] for n in names]),
                             torch.tensor([float(self._counts[n]) for n in names], dtype=torch.float64, device=self.ranks.device)])
        if self.ranks.world > 1:
            dist.all_reduce(table)
        return (table[0] / table[1]).tolist()

    def _restart(self) -> None:
        self._since, self.steps, self._wait_s, self._save_s = time.perf_counter(), 0, 0.0, 0.0
