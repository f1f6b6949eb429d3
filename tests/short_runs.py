"""Ten steps of the real recipe at its smallest, for the tests that train through the composition root."""

import json
from pathlib import Path

TINY = [
    "method.network={width: 8, decoder_width: 2, embed_dim: 24, layers: 4, heads: 2, mlp_dim: 48, dropout: 0, fuse_dropout: 0}",
    "data.crop=[64, 32, 32]", "data.workers=0", "train.precision=fp32", "train.global_batch=2", "train.steps=10", "train.log_every=1",
    # the published rate, constant so that a shorter run is the beginning of a longer one
    "train.roles={networks: {optimizer: {lr: 1.0e-4, weight_decay: 1.0e-5}, schedule: {name: constant}}}",
    "validate={every_steps: 100, subsets: [flair+t1+t1ce+t2], max_cases: 1}", "inference.overlap=0",
]  # fmt: skip


def losses(metrics: Path) -> dict[int, float]:
    """The loss by step; a step that stands there twice is an error."""
    rows = [row for row in map(json.loads, metrics.read_text().splitlines()) if "train/loss_networks" in row]
    assert len({row["step"] for row in rows}) == len(rows)
    return {row["step"]: row["train/loss_networks"] for row in rows}
