"""What `mstkd methods` says of each method."""

from dataclasses import dataclass

import torch

from mstkd.methods import DataFacts, Method, available_methods, build, load
from mstkd.shards.spec import LABEL_SCHEMES, Classification

SEQUENCES = ("flair", "t1", "t1ce", "t2")
CROPS = ((160, 192, 128), (128, 128, 128), (160, 160, 80))  # voxels; position embeddings grow with them
SLICE = 128  # pixels per axis
VIEWS = Classification(views={"image": (1, 28, 28), "audio": (1, 32, 32)}, classes=tuple("0123456789"))


@dataclass(frozen=True)
class Entry:
    name: str
    task: str
    stages: tuple[str, ...]
    paper: str
    reproduces: str
    parameters: int | None = None  # of all networks with default settings; None: they cannot be built so
    student: int | None = None  # of the network that evaluation reports first
    crop: tuple[int, int, int] | None = None  # (X, Y, Z) voxels for which they are counted; None: slices of SLICE pixels, or VIEWS
    problem: str = ""  # why there is no count

    @property
    def millions(self) -> str:
        """Parameters of all networks and, where it is another number, of the one that is reported."""
        if self.parameters is None:
            return "-"
        whole, student = (f"{count / 1e6:.2f} M" for count in (self.parameters, self.student or self.parameters))
        return whole if whole == student else f"{whole} ({student})"


def entries() -> list[Entry]:
    """One entry for each method file, by name; one that cannot be built says why."""
    return [_entry(name, load(name)) for name in available_methods()]


def _entry(name: str, method: type[Method]) -> Entry:
    facts = (name, method.task, method.stages, method.paper, method.reproduces)
    problem = ""
    for data in _examples(method):
        try:
            with torch.device("meta"):  # shapes without memory
                built = build({"name": name}, data)
        except Exception as error:  # whatever a method raises, the others are listed
            problem = problem or f"{error or type(error).__name__}".split("\n")[0]
            continue
        first = next((network for network in built.scored if network in built.networks), None)
        return Entry(*facts, _count(*built.networks.values()), _count(built.networks[first]) if first else None, data.crop)
    return Entry(*facts, problem=problem)


def _examples(method: type[Method]) -> list[DataFacts]:
    """What it may be built for, the preferred first."""
    if method.task == "classification":
        return [DataFacts(tuple(VIEWS.views), None, None, VIEWS)]
    scheme = LABEL_SCHEMES["brats2018"]
    if method.dimensions == 2:
        return [DataFacts(SEQUENCES, scheme, None, slice_size=SLICE)]
    return [DataFacts(SEQUENCES, scheme, crop) for crop in CROPS]


def _count(*networks: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in torch.nn.ModuleList(networks).parameters())
