"""A small MST-KDNet and what to feed it, for the tests of the method."""

import torch

from mstkd.batch import Batch, Progress
from mstkd.methods import DataFacts, build
from mstkd.methods.mst_kdnet import MSTKDNet
from mstkd.models.mst_kdnet import MSTKDNetwork
from mstkd.shards.spec import LABEL_SCHEMES

SEQUENCES = ("flair", "t1", "t1ce", "t2")
CROP = (64, 32, 32)
NETWORK = {"width": 8, "decoder_width": 2, "embed_dim": 24, "layers": 4, "heads": 3, "mlp_dim": 32}
STILL = {**NETWORK, "dropout": 0.0, "fuse_dropout": 0.0}
START = Progress(step=0, epoch=0, total_steps=100, total_epochs=100)
TERMS = {"dice_teacher", "dice_student", "content", "consistency", "kl", "mst", "evd", "gsm", "adversarial"}


def facts(scheme: str | None = "brats2018", crop=CROP) -> DataFacts:
    return DataFacts(SEQUENCES, LABEL_SCHEMES[scheme] if scheme else None, crop)


def make(scheme: str = "brats2018", crop=CROP, network: dict = STILL, **section) -> MSTKDNet:
    return build({"name": "mst_kdnet", "network": network, **section}, facts(scheme, crop))


def make_batch(samples: int = 1, scheme: str = "brats2018", crop=CROP) -> Batch:
    subsets = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.bool)
    values = torch.tensor(LABEL_SCHEMES[scheme].values, dtype=torch.uint8)
    return Batch(
        image=torch.rand(samples, 4, *crop),
        brain=torch.ones(samples, *crop, dtype=torch.bool),
        present=torch.ones(samples, 4, dtype=torch.bool),
        available=subsets[:samples],
        subject=[f"subject-{i}" for i in range(samples)],
        label=values[torch.randint(len(values), (samples, *crop))],
    )


def on_meta(**shape) -> MSTKDNetwork:
    with torch.device("meta"):
        return MSTKDNetwork(4, 4, **shape)


def shapes(tensors) -> list[tuple[int, ...]]:
    return [tuple(t.shape) for t in tensors]


def parameters(module) -> int:
    return sum(p.numel() for p in module.parameters())
