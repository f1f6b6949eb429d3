"""Small methods of unpaired translation and what to feed them."""

import torch

from mstkd.batch import Batch, Progress
from mstkd.methods import DataFacts, Method, build
from mstkd.shards.spec import LABEL_SCHEMES

SEQUENCES = ("flair", "t1", "t1ce", "t2")
START = Progress(step=0, epoch=0, total_steps=100, total_epochs=100)
NETWORKS = {
    "utad_net": {"width": 4, "levels": 2},
    "stargan": {"width": 4, "levels": 2},
    "resvit": {"width": 4, "blocks": 2, "attending": [0], "embed_dim": 8, "layers": 1, "heads": 2, "mlp_dim": 8, "dropout": 0.0},
}
SIZES = {"utad_net": 16, "stargan": 16, "resvit": 32}  # the smallest that they take


def facts(size: int, scheme: str | None = "brats2018", sequences: tuple[str, ...] = SEQUENCES) -> DataFacts:
    return DataFacts(sequences, LABEL_SCHEMES[scheme] if scheme else None, None, slice_size=size)


def make(name: str = "utad_net", scheme: str | None = "brats2018", size: int | None = None, **section) -> Method:
    """With the same weights each time."""
    network, critic = NETWORKS[name] | section.pop("network", {}), {"width": 4, "layers": 3} | section.pop("critic", {})
    torch.manual_seed(0)
    return build({"name": name, "network": network, "critic": critic, **section}, facts(size or SIZES[name], scheme))


def make_batch(samples: int = 2, size: int = 16, seed: int = 1) -> Batch:
    """Slices of one sequence each, another in every sample; what the others hold nobody may look at."""
    draw = torch.Generator().manual_seed(seed)
    available = torch.eye(4, dtype=torch.bool)[(torch.arange(samples) + seed) % 4]
    values = torch.tensor([0, 1, 2, 4], dtype=torch.uint8)
    image = torch.rand(samples, 4, size, size, generator=draw) * 2 - 1
    return Batch(
        image=image.masked_fill(~available[:, :, None, None], float("nan")),
        brain=torch.ones(samples, size, size, dtype=torch.bool),
        present=torch.ones(samples, 4, dtype=torch.bool),
        available=available,
        subject=[f"subject-{n}" for n in range(samples)],
        label=values[torch.randint(4, (samples, size, size), generator=draw)],
        hidden_value=-1.0,
    )


def passes(method: Method, stage: str, batch: Batch, seed: int = 0) -> dict[str, tuple]:
    """The outputs of a stage's roles on one micro-batch, in update order, each with the carry it was given; nothing is updated."""
    carry, found = {}, {}
    for name, role in method.roles(stage).items():
        torch.manual_seed(seed)
        given, output = dict(carry), role.step.train()(batch, carry, START)
        carry |= output.carry
        found[name] = (output, given)
    return found
