"""A small ShaSpec and what to feed it."""

import torch
from small_mst_kdnet import SEQUENCES, facts

from mstkd.batch import Batch, Progress
from mstkd.methods import build
from mstkd.methods.shaspec import ShaSpec
from mstkd.models.shaspec import ShaSpecNetwork
from mstkd.shards.spec import LABEL_SCHEMES
from mstkd.subsets import Subset, all_subsets

CROP = (64, 32, 16)  # two voxels of the bottleneck
NETWORK = {"width": 4, "blocks": (1, 1, 1, 1)}
START = Progress(step=0, epoch=0, total_steps=100, total_epochs=100)
SUBSETS = all_subsets(SEQUENCES)


def network(**arguments) -> ShaSpecNetwork:
    torch.manual_seed(0)
    return ShaSpecNetwork(**{"sequences": 4, "out_channels": 3, **NETWORK, **arguments})


def make(crop=CROP, scheme="brats2018", **section) -> ShaSpec:
    torch.manual_seed(0)
    return build({"name": "shaspec", "network": NETWORK | section.pop("network", {}), **section}, facts(scheme, crop))


def make_batch(*subsets: Subset, crop=CROP, scheme="brats2018", seed=1) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    values, samples = torch.tensor(LABEL_SCHEMES[scheme].values, dtype=torch.uint8), len(subsets)
    return Batch(
        image=torch.randn(samples, 4, *crop, generator=draw),
        brain=torch.ones(samples, *crop, dtype=torch.bool),
        present=torch.ones(samples, 4, dtype=torch.bool),
        available=torch.tensor(subsets, dtype=torch.bool),
        subject=[f"subject-{n}" for n in range(samples)],
        label=values[torch.randint(len(values), (samples, *crop), generator=draw)],
    )
