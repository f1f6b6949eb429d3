"""What `mstkd methods` says of each method."""

from dataclasses import dataclass

import torch

from mstkd.methods import DataFacts, Method, available_methods, build, load
from mstkd.shards.spec import LABEL_SCHEMES

SEQUENCES = ("flair", "t1", "t1ce", "t2")
CROPS = ((160, 192, 128), (128, 128, 128), (160, 160, 80))  # voxels; position embeddings grow with them
SLICE = 128  # pixels per axis


@dataclass(frozen=True)
class Entry:
    name: str
    task: str
    stages: tuple[str, ...]
    paper: str
    reproduces: str
    parameters: int | None = None  # of all networks with default settings; None: they cannot be built so
    student: int | None = None  # of the network that evaluation reports first
    crop: tuple[int, int, int] | None = None  # (X, Y, Z) voxels for which they are counted; None: slices of SLICE pixels
    problem: str = ""  # why there is no count


def entries() -> list[Entry]:
    """One entry for each method file, by name; one that cannot be built says why."""
    return [_entry(name, load(name)) for name in available_methods()]


def _entry(name: str, method: type[Method]) -> Entry:
    facts = (name, method.task, method.stages, method.paper, method.reproduces)
    problem = ""
    for crop in CROPS if method.dimensions == 3 else (None,):
        data = DataFacts(SEQUENCES, LABEL_SCHEMES["brats2018"], crop, slice_size=None if crop else SLICE)
        try:
            with torch.device("meta"):  # shapes without memory
                built = build({"name": name}, data)
        except Exception as error:  # whatever a method raises, the others are listed
            problem = problem or f"{error or type(error).__name__}".split("\n")[0]
            continue
        first = next((network for network in built.scored if network in built.networks), None)
        return Entry(*facts, _count(*built.networks.values()), _count(built.networks[first]) if first else None, crop)
    return Entry(*facts, problem=problem)


def _count(*networks: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in torch.nn.ModuleList(networks).parameters())
