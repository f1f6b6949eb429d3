"""What a log line says: the figures of the updates since the last one."""

import logging
from datetime import timedelta
from pathlib import Path

import torch

from mstkd.engine.meter import Meter
from mstkd.engine.schedule import lr_factor
from mstkd.engine.stage import Stage

log = logging.getLogger(__name__)


def collect_figures(stage: Stage, step: int, meter: Meter, skipped: int, device: torch.device) -> dict[str, float]:
    """Means, rates and memory of the updates since the last call; `step` updates are done. Collective."""
    figures = meter.flush(stage.config.train.global_batch)
    progress = stage.progress(step - 1)  # of the update just done
    for engine in stage.engines.values():
        figures[f"lr/{engine.name}"] = engine.optimizer.lr * lr_factor(engine.schedule, progress)
        norm = engine.gradient_norm()
        if norm is not None:
            figures[f"gradient_norm/{engine.name}"] = norm
        if engine.scale is not None:
            figures[f"train/loss_scale_{engine.name}"] = engine.scale.value
    figures["train/skipped_steps"] = float(skipped)
    figures["memory/peak_gib"] = peak_memory_gib(device)
    return figures


def say_figures(stage: Stage, step: int, figures: dict[str, float]) -> None:
    """One line for the console and the rank's log."""
    losses = " ".join(f"{k.removeprefix('train/')} {v:.4g}" for k, v in figures.items() if k.startswith("train/loss_"))
    rate = figures["time/steps_per_s"]
    eta = timedelta(seconds=round((stage.total_steps - step) / rate))
    log.info(
        "%s step %d/%d  %s  %.2f step/s  data wait %.0f %%  %.2f GiB  ETA %s",
        stage.name, step, stage.total_steps, losses, rate,
        100 * figures["time/data_wait_share"], figures["memory/peak_gib"], eta,
    )  # fmt: skip


def peak_memory_gib(device: torch.device) -> float:
    """Peak device memory of this process on a GPU, else the peak of its resident memory, in GiB (1024^3 bytes)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1024**3
    return resident_bytes("VmHWM") / 1024**3


def resident_bytes(field: str) -> int:
    """This process's resident memory: VmRSS now, VmHWM at most so far. (What getrusage calls the peak begins with the parent's.)"""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) * 1024
