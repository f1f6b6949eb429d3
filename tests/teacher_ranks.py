"""What the ranks do in test_teacher.py, test_kd.py and test_averages.py."""

import json

import torch
from small_mst_kdnet import NETWORK
from toys.frozen_teacher import network

from mstkd.config import TeacherConfig, load_config
from mstkd.engine import backend
from mstkd.engine.environment import resolve_environment
from mstkd.engine.stop import stop_signals
from mstkd.engine.teacher import FrozenNetworks
from mstkd.models.mst_kdnet import MSTKDNetwork
from mstkd.train import train

def run(recipe: str, overrides: list[str]) -> dict[str, dict[int, dict[str, float]]]:
    """Train a recipe; {stage: {step: figures}} of its metrics file."""
    config = load_config(recipe, overrides)
    with stop_signals() as stop:
        assert train(config, stop) is None
    rows: dict[str, dict[int, dict[str, float]]] = {}
    for line in (config.run_dir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        figures = {name: value for name, value in row.items() if name.startswith(("train/", "val/"))}
        rows.setdefault(row["stage"], {}).setdefault(row["step"], {}).update(figures)
    return rows


def placed(placement: str) -> dict:
    """A frozen network placed so: the elements that this rank holds at rest, and whether it still computes the same."""
    ranks = resolve_environment()
    backend.start(ranks)
    torch.manual_seed(0)
    teacher, image = network(4, 64), torch.randn(1, 4, 8, 8, 8)
    whole = sum(p.numel() for p in teacher.parameters())
    with torch.no_grad():
        expected = teacher.eval()(image)
        frozen = FrozenNetworks({"teacher": teacher.train()}, {}, TeacherConfig(placement=placement), ranks)
        before = _held(teacher)
        for _ in range(3):
            difference = float((teacher(image) - expected).abs().max())
    result = {"whole": whole, "before": before, "after": _held(teacher), "difference": difference, "training": teacher.training}
    frozen.destroy()
    return result


def placed_trunk(placement: str) -> float:
    """As `placed`, for MST-KDNet's network, where a convolution reads the weights of its normalisation: the largest difference."""
    ranks = resolve_environment()
    backend.start(ranks)
    torch.manual_seed(0)
    trunk, image = MSTKDNetwork(4, 4, (32, 32, 32), **NETWORK).eval(), torch.randn(1, 4, 32, 32, 32)
    with torch.no_grad():
        expected = trunk(image).logits
        frozen = FrozenNetworks({"teacher": trunk}, {}, TeacherConfig(placement=placement), ranks)
        difference = float((trunk(image).logits - expected).abs().max())
    frozen.destroy()
    return difference


def _held(network: torch.nn.Module) -> int:
    """Elements of the weights that this rank holds."""
    return sum(p.numel() + (p.ds_tensor.numel() if hasattr(p, "ds_tensor") else 0) for p in network.parameters())
