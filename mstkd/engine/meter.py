"""Figures of the steps since the last log line, kept on the device and reduced over ranks once per line."""

import time

import torch
import torch.distributed as dist
from torch import Tensor

from mstkd.engine.clock import PARTS, Clock
from mstkd.engine.environment import Ranks


class Meter:
    """Means of scalars, rates, and the seconds that the parts of a step take."""

    def __init__(self, ranks: Ranks):
        self.ranks, self.clock = ranks, Clock(ranks.device)
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._restart()

    def add(self, scalars: dict[str, Tensor]) -> None:
        """Add one micro-batch's detached scalars; no synchronisation with the device."""
        for name, value in scalars.items():
            value = value.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def computed(self, flops: float) -> None:
        """This rank has done so many floating-point operations more."""
        self._flops += flops

    def step_done(self) -> None:
        self.steps += 1

    def flush(self, samples_per_step: int) -> dict[str, float]:
        """Means over micro-batches and ranks, plus time/* figures; then start over. One reduction. Collective."""
        seconds = self.clock.flush()
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        steps = max(self.steps, 1)
        means = self._means({name: (self._sums[name], self._counts[name]) for name in sorted(self._sums)} | {
            f"time/{part}_s": (torch.tensor(seconds[part]), steps) for part in PARTS
        })  # fmt: skip
        figures = means | {
            "time/steps_per_s": self.steps / elapsed,
            "time/samples_per_s": self.steps / elapsed * samples_per_step,
            "time/data_wait_share": means["time/data_wait_s"] * self.steps / elapsed,
        }
        if self._flops:
            figures["compute/tflop_per_s_per_rank"] = self._flops / elapsed / 1e12
        if self._save_s:
            figures["time/save_s"] = self._save_s
        self.restart()
        return figures

    def restart(self) -> None:
        """Forget everything so far: the rates count from here."""
        self.clock.flush()
        self._sums.clear()
        self._counts.clear()
        self._restart()

    def pause(self, seconds: float) -> None:
        """Leave `seconds` (a validation, a save) out of the rates."""
        self._since += seconds

    def saved(self, seconds: float) -> None:
        """A checkpoint took `seconds`: left out of the rates; the longest since the last line is reported as time/save_s."""
        self._save_s = max(self._save_s, seconds)
        self.pause(seconds)

    def _means(self, sums: dict[str, tuple[Tensor, int]]) -> dict[str, float]:
        totals = torch.stack([total.to(self.ranks.device, torch.float64) for total, _ in sums.values()])
        counts = torch.tensor([float(count) for _, count in sums.values()], dtype=torch.float64, device=self.ranks.device)
        table = torch.stack([totals, counts])
        if self.ranks.world > 1:
            dist.all_reduce(table)
        return dict(zip(sums, (table[0] / table[1]).tolist(), strict=True))

    def _restart(self) -> None:
        self._since, self.steps, self._save_s, self._flops = time.perf_counter(), 0, 0.0, 0.0
