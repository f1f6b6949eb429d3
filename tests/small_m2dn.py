"""A small M2DN and its comparators, and what to feed them."""

import torch

from mstkd.batch import Batch, Progress
from mstkd.methods import DataFacts, Method, build
from mstkd.subsets import Subset, all_subsets, proper

SEQUENCES = ("flair", "t1", "t1ce", "t2")
SUBSETS = proper(all_subsets(SEQUENCES))
SIZE = 16
START = Progress(step=0, epoch=0, total_steps=100, total_epochs=100)
DIFFUSION = {"steps": 20, "beta": [0.005, 0.7]}
SECTIONS = {
    "m2dn": {"network": {"width": 4, "bottleneck": 4}, "diffusion": DIFFUSION, "sampler": {"steps": 3}},
    "one_shot": {"network": {"width": 4, "bottleneck": 4}},
    "pix2pix": {"network": {"width": 4, "levels": 2}, "critic": {"width": 4, "layers": 2}},
}


def section(name: str = "m2dn", **changes) -> dict:
    """A recipe's `method:`, with its sections changed key by key."""
    usual = SECTIONS[name]
    return {"name": name, **usual, **{key: {**usual.get(key, {}), **value} if isinstance(value, dict) else value for key, value in changes.items()}}


def make(name: str = "m2dn", size: int = SIZE, sequences: tuple[str, ...] = SEQUENCES, **changes) -> Method:
    """With the same weights each time."""
    torch.manual_seed(0)
    return build(section(name, **changes), DataFacts(sequences, None, None, slice_size=size))


def awake(method: Method, network: str = "student") -> Method:
    """Fresh decoders return 0; give them weights, so that whatever comes before shows."""
    torch.manual_seed(1)
    for decoder in method.networks[network].decoders:
        torch.nn.init.normal_(decoder.body[-1].weight, std=0.3)
    return method


def make_batch(*subsets: Subset, size: int = SIZE, seed: int = 1) -> Batch:
    """Stacks of which these subsets are available; by default two, others for every seed."""
    draw, samples = torch.Generator().manual_seed(seed), len(subsets) or 2
    subsets = subsets or [SUBSETS[(3 * seed + 5 * n) % len(SUBSETS)] for n in range(samples)]
    return Batch(
        image=torch.rand(samples, len(subsets[0]), size, size, generator=draw) * 2 - 1,
        brain=torch.ones(samples, size, size, dtype=torch.bool),
        present=torch.ones(samples, len(subsets[0]), dtype=torch.bool),
        available=torch.tensor(subsets, dtype=torch.bool),
        subject=[f"subject-{n}" for n in range(samples)],
        hidden_value=-1.0,
    )
