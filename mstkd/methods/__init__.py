"""The method protocol: what the engine, the loader and the evaluation may ask of a method.

A new method is one new file in this folder: a subclass of `Method`, bound to the name `METHOD`.
The engine knows this file and no method; methods never ask for a rank.
"""

import importlib
import pkgutil
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pydantic import BaseModel
from torch import Tensor, nn

from mstkd.batch import Batch, Progress, StepOutput, ViewBatch
from mstkd.config import AvailabilityConfig, DataConfig, IntensityConfig, OptimizerConfig, ScheduleConfig
from mstkd.errors import UserError
from mstkd.recipe import validate_section
from mstkd.shards.spec import Classification, LabelScheme


@dataclass(frozen=True)
class DataFacts:
    """What a method may know of the data when it builds its networks."""

    sequences: tuple[str, ...]  # in channel order, e.g. ("flair", "t1", "t1ce", "t2")
    label_scheme: LabelScheme | None
    crop: tuple[int, int, int] | None  # training crop (X, Y, Z) in voxels; None: views and slices have none
    classification: Classification | None = None  # the views, which are then the sequences, and the classes; None: volumes
    slice_size: int | None = None  # pixels per axis of the axial slices that a method of two dimensions sees


class RoleStep(nn.Module):
    """One role's trainable networks as submodules; `forward` computes the whole loss of one micro-batch.

    The engine wraps it in one DeepSpeed engine. Networks of other roles must not be registered here
    (keep them in a tuple); the engine freezes those a role borrows while the role runs.
    """

    def forward(self, batch: Batch | ViewBatch, carry: dict[str, Tensor], progress: Progress) -> StepOutput:
        raise NotImplementedError


@dataclass
class Role:
    """One optimiser and the networks it trains.

    A role updates in the steps where `(step + 1) % every == 0`. `double_backward` roles run under ZeRO 0-2 only.
    """

    step: RoleStep
    networks: tuple[str, ...]  # names in Method.networks that this role trains
    borrows: tuple[str, ...] = ()  # networks of other roles, used as plain frozen modules
    averages: dict[str, str] = field(default_factory=dict)  # moving averages (mean teachers): network name -> which of `networks` it follows
    decay: float = 0.999  # of the averages, per update
    ramp: tuple[int, int] = (0, 1)  # (a, b): after update k, counted from 0, their decay is at most (a + k) / (b + k)
    every: int = 1
    double_backward: bool = False
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    @property
    def results(self) -> tuple[str, ...]:
        """The networks that come out of this role: trained ones and averages."""
        return (*self.networks, *self.averages)


class Method(ABC):
    """A distillation method: its networks, its roles per stage, and how it predicts."""

    Config: ClassVar[type[BaseModel]]  # the recipe's `method:` section without `name`
    task: ClassVar[Literal["segmentation", "synthesis", "classification"]]
    stages: ClassVar[tuple[str, ...]]  # in order
    aliases: ClassVar[dict[str, str]] = {}  # other names of stages, for `stages=`
    dimensions: ClassVar[Literal[2, 3]] = 3  # 2: it is given axial slices, (B, M, X, Y)
    complete_only: ClassVar[bool] = True  # True: subjects that lack a sequence are dropped from training (counted)
    scored: ClassVar[tuple[str, ...]] = ("student", "teacher")  # what evaluation reports; the first that a stage trains selects its "best"
    exclusive: ClassVar[bool] = False  # True: the channels of its logits are classes, of which a voxel has one (softmax); else each is by itself (sigmoid)
    sees_all: ClassVar[tuple[str, ...]] = ()  # those of them made for complete input: validation shows them every sequence
    oracles: ClassVar[tuple[str, ...]] = ()  # those of them that are given the test labels, through `predict_oracle`: marked and never ranked

    offers_fused: ClassVar[bool] = False  # True: `fused` gives what the student distils; evaluation measures how near it is to the oracle's
    painters: ClassVar[tuple[str, ...]] = ()  # in a segmentation: networks that `predict` an image instead, see `painted`; their PSNR selects "best"
    companions: ClassVar[dict[str, tuple[str, ...]]] = {}  # scored network -> others that its `predict` calls; they are exported with it
    runs_apart: ClassVar[bool] = False  # True: its stages may train on different sets, so `teacher.path` may give networks that saw others, otherwise normalised

    sampling: ClassVar[tuple[str, ...]] = ()  # keys of its section that `predict` alone reads: `mstkd evaluate` may change them

    any_order: ClassVar[bool] = False  # True: networks know sequences by name; listed in another order, the same weights give the same output

    paper: ClassVar[str] = ""  # what `mstkd methods` says of its source, e.g. "Wang et al., CVPR 2023"
    reproduces: ClassVar[str] = ""  # and of how near to it this is

    blocks: ClassVar[tuple[type[nn.Module], ...]] = ()  # parts of the networks that `train.recompute` runs again in the backward pass

    config: BaseModel  # a `Config`
    networks: dict[str, nn.Module]  # by name, built in __init__

    @abstractmethod
    def __init__(self, config: BaseModel, facts: DataFacts): ...

    @property
    def intensity(self) -> IntensityConfig:
        """The normalisation that the loader and `predict` apply; here the recipe's `method.intensity`."""
        return self.config.intensity

    @abstractmethod
    def roles(self, stage: str) -> dict[str, Role]:
        """The roles of a stage by name, in update order."""

    def availability(self, stage: str) -> AvailabilityConfig | None:
        """What the student may see in `stage`; None: as the recipe's `data.availability` says."""
        return None

    @property
    def subsets(self) -> tuple[str, ...] | None:
        """The subsets of sequences it can be given, by name; None: all. Validation and evaluation leave out the others."""
        return None

    def needs(self, stage: str) -> dict[str, str]:
        """Networks that `stage` takes from an earlier one: network name -> stage name.

        What the stage also trains begins with those weights. The others stay as they are: in evaluation mode and without
        gradient, outside the role's registered modules (keep them in a tuple). With `teacher.placement` zero3 or cpu a call gathers weights from all ranks, so in training every
        rank calls them equally often and `predict` of a network that the stage trains does without them.
        """
        return {}

    def check_stage(self, stage: str) -> None:
        """Raise UserError where the data lacks what `stage` trains on; asked of every stage to be trained, before anything is written."""

    def check_available(self, available: Tensor) -> None:
        """Raise UserError where what samples show, (B, M) bool, is not what the method takes; asked of every micro-batch on the host, where it keeps no GPU waiting."""

    def painted(self, network: str) -> tuple[str, str]:
        """What one of `painters` is given, and which sequence it predicts: an image (B, 1, ...) in the method's intensities, which end at 0 and 1."""
        raise NotImplementedError(f"{type(self).__name__} names no painters")

    def begin(self, stage: str) -> None:
        """Called where `stage` begins, not where it resumes, once what it `needs` is loaded: networks that start from others are filled here."""

    @abstractmethod
    def predict(self, image: Tensor | dict[str, Tensor], available: Tensor, network: str = "student") -> Tensor:
        """Logits (B, K, X, Y, Z) of `network` for image (B, M, X, Y, Z), hidden sequences already filled; available (B, M) bool.

        Classification: logits (B, K) of the K classes for views by name, each (B, ...) as in ViewBatch. Synthesis: the
        completed stack (B, M, ...) in the method's intensities; what is available stands in it as it was given.
        """

    def predict_oracle(self, image: Tensor, available: Tensor, label: Tensor, network: str) -> Tensor:
        """As `predict`, for one of `oracles`: it also sees `label` (B, ...) uint8 in the data's label scheme."""
        raise NotImplementedError(f"{type(self).__name__} names no oracles")

    def fused(self, image: Tensor, available: Tensor, label: Tensor, network: str) -> Tensor:
        """Where a synthesis method `offers_fused`: the features (B, N, C, s, s) from which `network` makes each of the N missing sequences.

        In the same order for the student and the oracle that taught it; image, available and label as in `predict_oracle`.
        """
        raise NotImplementedError(f"{type(self).__name__} offers no fused features")

    def to_labels(self, logits: Tensor) -> Tensor:
        """Label map (B, X, Y, Z) uint8 in the data's label scheme from logits (B, K, X, Y, Z); classification: classes (B,)."""
        raise NotImplementedError(f"{type(self).__name__} is for {self.task}; it draws no label maps")

    def probabilities(self, logits: Tensor) -> dict[str, Tensor]:
        """By region of the data's label scheme (B, X, Y, Z), 0 to 1, of logits (B, K, X, Y, Z); nothing where a method tells none."""
        return {}

    def features(self, image: Tensor, available: Tensor) -> dict[str, tuple[Tensor, list[int]]]:
        """Where a method has features of single sequences: kind -> vectors (N, C) float32 and the sequence (index) of each of the N.

        For the figure of an evaluation; image and available as in `predict`.
        """
        return {}

    @classmethod
    def check_crop(cls, config: BaseModel, crop: tuple[int, int, int], key: str = "data.crop") -> None:
        """Raise UserError if the networks cannot take this crop, or the window `key`; called before anything heavy is built."""


def available_methods() -> list[str]:
    """Names of the method files in this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def load(name: str) -> type[Method]:
    """The method class of `mstkd/methods/<name>.py`, or of a dotted module path outside this project."""
    module_name = name if "." in name else f"{__name__}.{name}"
    try:
        return importlib.import_module(module_name).METHOD
    except ModuleNotFoundError as error:
        if error.name and not module_name.startswith(error.name):
            raise  # the method exists, something it imports does not
        raise UserError(f"method.name: no method {name!r}; known: {', '.join(available_methods())}") from None


def read_config(section: dict, origin: dict[str, str] | None = None) -> BaseModel:
    """The method's typed settings from a recipe's `method:` section; raises UserError on an unknown or ill-typed key.

    `origin`: where each dotted key was given, see `RunConfig.origin`.
    """
    values = {key: value for key, value in section.items() if key != "name"}
    return validate_section(load(section["name"]).Config, values, "method", "recipe", origin)


def resolve(section: dict, origin: dict[str, str] | None = None) -> dict:
    """A recipe's `method:` section with every default written out."""
    return {"name": section["name"], **read_config(section, origin).model_dump(mode="json")}


def stage_names(section: dict, names: list[str] | None) -> list[str] | None:
    """`names` of stages of a recipe's method with aliases resolved. Raises UserError on one that it does not have."""
    method = load(section["name"])
    resolved = names and [method.aliases.get(name, name) for name in names]
    if unknown := sorted(set(resolved or ()) - set(method.stages)):
        also = f" (or {', '.join(method.aliases)})" if method.aliases else ""
        raise UserError(f"stages: {unknown[0]!r} is no stage of {section['name']}; its stages: {', '.join(method.stages)}{also}")
    return resolved


def check_input(section: dict, data: DataConfig) -> None:
    """Raise UserError where a recipe's `data:` section lacks the training crop, or the slices, that the method works on."""
    method = load(section["name"])
    key, takes, wanted = "crop", "volumes", "the training crop in voxels, e.g. [128, 128, 128]"
    if method.dimensions == 2:
        key, takes, wanted = "slices", "axial slices", "their size in pixels, e.g. {size: 128}"
    if method.task != "classification" and getattr(data, key) is None:
        raise UserError(f"data.{key}: missing, and {section['name']} takes {takes}; give {wanted}")


def build(section: dict, facts: DataFacts, origin: dict[str, str] | None = None) -> Method:
    """The method described by a recipe's `method:` section; raises UserError where it cannot be built."""
    method, config = load(section["name"]), read_config(section, origin)
    if (method.task == "classification") != (facts.classification is not None):
        held = "volumes, not views with classes" if facts.classification is None else f"views of {' and '.join(facts.sequences)}, not volumes"
        raise UserError(f"method.name: {section['name']} is for {method.task}, and the shard set holds {held}; choose another of the two")
    if (method.dimensions == 2) != (facts.slice_size is not None) and facts.classification is None:
        given, wanted = ("data.crop", "data.slices") if method.dimensions == 2 else ("data.slices", "data.crop")
        raise UserError(f"{given}: {section['name']} works on {'axial slices' if method.dimensions == 2 else 'volumes'}; give {wanted} instead")
    method.check_crop(config, facts.crop)
    return method(config, facts)
