"""What the ranks do in test_train.py: run a recipe exactly as `mstkd train` does, inside the pool's processes."""

import json
import os
import signal
import threading
from pathlib import Path

from mstkd.config import load_config
from mstkd.engine.stop import stop_signals
from mstkd.train import train


def run(recipe: str, overrides: list[str], stop_at: int | None = None) -> dict:
    """Train; with `stop_at`, rank 0 gets SIGTERM once its metrics show that step."""
    config = load_config(recipe, overrides)
    metrics = config.run_dir / "metrics.jsonl"
    if stop_at is not None and os.environ["RANK"] == "0":
        threading.Thread(target=_signal_at, args=(metrics, stop_at), daemon=True).start()
    with stop_signals() as stop:
        stopped_by = train(config, stop)
    return {"stopped_by": stopped_by, "curve": curve(metrics)}


def curve(metrics: Path) -> list[tuple[int, dict]]:
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [(row["step"], {k: v for k, v in row.items() if k.startswith("train/")}) for row in rows if any(k.startswith("train/loss_") for k in row)]


def _signal_at(metrics: Path, step: int) -> None:
    seen = threading.Event()
    while not seen.wait(0.02):
        if metrics.exists() and any(s >= step for s, _ in curve(metrics)):
            os.kill(os.getpid(), signal.SIGTERM)
            return
