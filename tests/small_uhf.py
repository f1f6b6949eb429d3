"""A small UHF-guided segmentation and what to feed it."""

import json

import torch

from mstkd.batch import Batch, Progress
from mstkd.methods import DataFacts, Method, build
from mstkd.shards.spec import LABEL_SCHEMES

PAIR = ("t1_3t", "t1_7t")
CROP = (32, 32, 32)  # the smallest that the critic takes
START = Progress(step=0, epoch=0, total_steps=100, total_epochs=100)
STAGES = {"base": {"base"}, "teacher": {"teacher"}, "keeper": {"keeper", "critic"}, "fusion": {"student"}}  # and what they train
NETWORK = {"width": 2, "keeper_width": 1, "critic_width": 2}
SMALL = [f"data.crop={list(CROP)}", f"method.network={json.dumps(NETWORK)}", "method.base.arguments={width: 5}", "train.steps=2", "train.global_batch=1", "train.log_every=1",
         "validate.every_steps=2", "validate.max_cases=1", "inference.overlap=0", "evaluate.assd=true"]  # fmt: skip


def facts(sequences: tuple[str, ...] = PAIR, scheme: str | None = "tissue3") -> DataFacts:
    return DataFacts(sequences, LABEL_SCHEMES[scheme] if scheme else None, CROP)


def make(sequences: tuple[str, ...] = PAIR, scheme: str | None = "tissue3", **section) -> Method:
    """With the same weights each time."""
    torch.manual_seed(0)
    given = {"network": NETWORK, "base": {"arguments": {"width": 5}}}
    return build({"name": "uhf_guided", **given, **section}, facts(sequences, scheme))


def make_batch(samples: int = 1, seed: int = 1) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    return Batch(
        image=torch.rand(samples, 2, *CROP, generator=draw),
        brain=torch.ones(samples, *CROP, dtype=torch.bool),
        present=torch.ones(samples, 2, dtype=torch.bool),
        available=torch.ones(samples, 2, dtype=torch.bool),
        subject=[f"subject-{n}" for n in range(samples)],
        label=torch.randint(4, (samples, *CROP), generator=draw, dtype=torch.uint8),
    )
