"""UHF-guided segmentation on slices: every network of `uhf_guided` once for each plane, and what they say fused to one volume.

For label maps of many structures, as published for the 27 of MICCAI 2012. The planes' networks share nothing; they are trained side by
side, which is the same as one after the other (Adam works number by number), and the checkpoint is chosen by what they say together.
From each volume of a micro-batch every plane draws `slices` that show brain; critic and keeper see the same ones.
Sagittal slices cannot tell left from right: there a left structure is taken for its right counterpart.
Where this differs from the released code, beside what `uhf_guided` says:
- probabilities are fused, 0.4 axial, 0.4 coronal, 0.2 sagittal (there labels, which forgets how sure each plane was);
- soft Dice is the mean over the classes that the slices show (there over all, so that an absent one costs 1 always): `absent: counted`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from mstkd.batch import Batch, Progress, StepOutput
from mstkd.losses.classes import class_dice, weighted_cross_entropy
from mstkd.methods import RoleStep
from mstkd.methods.uhf_guided import UHFGuided, UHFGuidedConfig, build_networks, segmented, stage_steps
from mstkd.models.uhf_planes import Planes, cut, draw_slices, slice_by_slice
from mstkd.targets import ExclusiveClasses, SidelessClasses

WEIGHTS = {"axial": 0.4, "coronal": 0.4, "sagittal": 0.2}
EPSILON = 1e-9  # probabilities stay so far from 0 when they become logits


class UHFGuided2DConfig(UHFGuidedConfig):
    planes: list[Literal["axial", "coronal", "sagittal"]] = ["axial", "coronal", "sagittal"]
    slices: int = Field(16, ge=1)  # of each volume of a micro-batch, per plane
    absent: Literal["skipped", "counted"] = "skipped"  # classes that the slices do not show, in soft Dice

    @field_validator("planes", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _different(self) -> "UHFGuided2DConfig":
        if not self.planes or len({*self.planes}) < len(self.planes):
            raise ValueError(f"planes {self.planes}: name one or more different ones")
        return self


class PlanesStep(RoleStep):
    """The steps of all planes, each on slices of its own; the losses are added up."""

    def __init__(self, trained: Planes, steps: dict[str, RoleStep], slices: int):
        super().__init__()
        self.trained, self.slices = trained, slices
        self.steps = tuple(steps.items())  # a tuple: what they train is registered once, above

    def forward(self, batch: Batch, carry: dict[str, Tensor], progress: Progress) -> StepOutput:
        loss, scalars, drawn = 0.0, {}, {}
        for plane, step in self.steps:
            key = f"slices_{plane}"
            drawn[key] = carry[key] if key in carry else draw_slices(batch.brain, plane, self.slices)
            output = step(sliced(batch, plane, drawn[key]), {}, progress)
            loss = loss + output.loss
            scalars |= {f"{name}_{plane}": value for name, value in output.scalars.items()}
        return StepOutput(loss, scalars, drawn)


class UHFGuided2D(UHFGuided):
    Config = UHFGuided2DConfig
    reproduces = "as uhf_guided, on slices of three planes"
    config: UHFGuided2DConfig

    def _build(self) -> dict[str, nn.Module]:
        scheme = self.facts.label_scheme
        kinds = {plane: SidelessClasses if plane == "sagittal" else ExclusiveClasses for plane in self.config.planes}
        self.plane_classes = {plane: kind(scheme) if scheme else None for plane, kind in kinds.items()}
        built = {plane: build_networks(self.config, 2, classes.count if classes else 1) for plane, classes in self.plane_classes.items()}
        names = next(iter(built.values()))
        return {name: Planes({plane: networks[name] for plane, networks in built.items()}) for name in names}

    def begin(self, stage: str) -> None:
        if stage == "fusion":
            for plane, student in self.networks["student"].planes.items():
                student.segmenter.load_state_dict(self.networks["base"].planes[plane].state_dict())

    def _steps(self, stage: str) -> dict[str, RoleStep]:
        steps: dict[str, dict[str, RoleStep]] = {}
        for plane in self.config.planes:
            for name, step in self._plane_steps(stage, plane).items():
                steps.setdefault(name, {})[plane] = step
        return {name: PlanesStep(self.networks[name], of_planes, self.config.slices) for name, of_planes in steps.items()}

    def _plane_steps(self, stage: str, plane: str) -> dict[str, RoleStep]:
        """As `_steps`, of one plane; what they train is reached through `Planes`, which registers it."""
        teacher, terms = self.networks["teacher"].planes[plane], partial(slice_terms, absent=self.config.absent)
        of = partial(self._of, plane=plane)
        return stage_steps(stage, of, teacher, self.low, self.high, self.config.weights, self.plane_classes[plane], terms)

    def _of(self, name: str, plane: str) -> Callable:
        return partial(self.networks[name], plane)

    def predict(self, image: Tensor, available: Tensor, network: str = "student") -> Tensor:
        """As of `uhf_guided`; logits are logarithms of the planes' probabilities fused, images means over the planes."""
        seen = image[:, [self.high if network == "teacher" else self.low]]
        with torch.no_grad():
            made = {plane: slice_by_slice(partial(self._plane, network, plane), seen, plane) for plane in self.config.planes}
        if network in self.painters:
            return torch.stack(list(made.values())).mean(0)
        return fuse({plane: logits.float().softmax(1) for plane, logits in made.items()}, self.plane_classes).clamp_min(EPSILON).log()

    def _plane(self, network: str, plane: str, slices: Tensor) -> Tensor:
        """What a plane's network makes of slices (n, 1, h, w)."""
        if network == "teacher":
            return self._of(network, plane)(slices).image
        if network == "keeper":
            return self.networks["teacher"].planes[plane].decoder(self._of(network, plane)(slices))
        return segmented(slices, self._of(network, plane), self._of("keeper", plane) if network == "student" else None)


def sliced(batch: Batch, plane: str, places: Tensor) -> Batch:
    """The slices at `places` (B, n) as a batch of B n of them."""
    count = places.shape[1]
    label = None if batch.label is None else cut(batch.label[:, None], plane, places)[:, 0]
    return Batch(
        image=cut(batch.image, plane, places), brain=cut(batch.brain[:, None], plane, places)[:, 0], label=label,
        present=batch.present.repeat_interleave(count, 0), available=batch.available.repeat_interleave(count, 0),
        subject=[subject for subject in batch.subject for _ in range(count)], hidden_value=batch.hidden_value,
    )  # fmt: skip


def slice_terms(logits: Tensor, target: Tensor, absent: Literal["skipped", "counted"]) -> dict[str, Tensor]:
    """Of logits (n, K, h, w) and class indices (n, h, w)."""
    return {"ce": weighted_cross_entropy(logits, target), "dice": class_dice(logits, target, absent)}


def fuse(probabilities: dict[str, Tensor], classes: dict[str, ExclusiveClasses]) -> Tensor:
    """(B, K, ...) weighted means, of K values of the scheme, of what the planes say, each (B, its own classes, ...)."""
    total = sum(WEIGHTS[plane] for plane in probabilities)
    fused = 0.0
    for plane, probability in probabilities.items():
        own = classes[plane]
        fused = fused + WEIGHTS[plane] / total * (own.spread(probability) if isinstance(own, SidelessClasses) else probability)
    return fused


METHOD = UHFGuided2D
