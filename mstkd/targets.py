"""From label maps to what a network is trained on, and back."""

from typing import Literal

import torch
from torch import Tensor

from mstkd.errors import UserError
from mstkd.shards.spec import LabelScheme


class TumourChannels:
    """Label maps to target channels and logits back to label maps.

    Channels: region [WT, TC, ET, background], disjoint [core, oedema, ET, background]; with `rc_channel` the
    resection cavity follows as the fifth, otherwise it is background.
    """

    def __init__(self, scheme: LabelScheme | None, targets: Literal["region", "disjoint"], rc_channel: bool):
        if scheme is None or not {"WT", "TC", "ET"} <= scheme.regions.keys():
            found = scheme.name if scheme else "no label scheme"
            raise UserError(f"data.shards: the set declares {found}; it needs one with the regions WT, TC and ET, e.g. brats2018")
        whole, core, enhancing = (set(scheme.regions[region]) for region in ("WT", "TC", "ET"))
        cavity = set(scheme.values) - {0} - whole
        if rc_channel and len(cavity) != 1:
            raise UserError(f"method.rc_channel: label scheme {scheme.name} has no resection cavity; set method.rc_channel to false")
        self.scheme, self.targets = scheme, targets
        self.cavity = next(iter(cavity)) if rc_channel else None
        self.tumour = (whole, core, enhancing) if targets == "region" else (core - enhancing, whole - core, enhancing)
        self.count = 4 + rc_channel

    def encode(self, label: Tensor) -> Tensor:
        """Targets (B, K, X, Y, Z) in {0, 1}, float32, of label maps (B, X, Y, Z)."""
        tumour = [_is_any(label, values) for values in self.tumour]
        foreground = torch.stack(tumour).any(0)
        cavity = [] if self.cavity is None else [label == self.cavity]
        background = ~torch.stack([foreground, *cavity]).any(0)
        return torch.stack([*tumour, background, *cavity], 1).float()

    def decode(self, logits: Tensor) -> Tensor:
        """Label maps (B, X, Y, Z) uint8 of logits (B, K, X, Y, Z): probability above 0.5, painted WT, TC, ET in that order."""
        first, second, third = (logits[:, :3] > 0).unbind(1)
        whole, core = (first, second) if self.targets == "region" else (first | second | third, first | third)
        label = torch.zeros_like(first, dtype=torch.uint8)
        if self.cavity is not None:
            label[logits[:, 4] > 0] = self.cavity
        for region, mask in (("WT", whole), ("TC", core), ("ET", third)):
            label[mask] = self.scheme.paint[region]
        return label

    def probabilities(self, logits: Tensor) -> dict[str, Tensor]:
        """Of WT, TC and ET (B, X, Y, Z), above 0.5 where `decode` paints them: of disjoint channels a union has the largest of its parts'."""
        first, second, third = logits[:, :3].sigmoid().unbind(1)
        if self.targets == "region":
            return {"WT": first, "TC": second, "ET": third}
        core = torch.maximum(first, third)
        return {"WT": torch.maximum(core, second), "TC": core, "ET": third}


class ExclusiveClasses:
    """Label maps to class indices and back, where every voxel has one class: the scheme's values in rising order, background first."""

    def __init__(self, scheme: LabelScheme):
        self.scheme, self.values = scheme, tuple(sorted(scheme.values))
        self.count = len(self.values)

    def encode(self, label: Tensor) -> Tensor:
        """Class indices (B, ...) int64 of label maps (B, ...)."""
        return torch.bucketize(label.long(), torch.tensor(self.values, device=label.device))

    def decode(self, logits: Tensor) -> Tensor:
        """Label maps (B, ...) uint8 of logits (B, K, ...): the most likely class."""
        return torch.tensor(self.values, dtype=torch.uint8, device=logits.device)[logits.argmax(1)]

    def probabilities(self, logits: Tensor) -> dict[str, Tensor]:
        """Of every region (B, ...): the sum over its classes."""
        classes = logits.softmax(1)
        return {region: classes[:, [self.values.index(value) for value in values]].sum(1) for region, values in self.scheme.regions.items()}


class SidelessClasses(ExclusiveClasses):
    """The same for who cannot tell left from right, as in sagittal slices: left structures count as their right counterparts.

    A pair is two regions of the scheme, of one value each, whose names differ in left_ and right_.
    """

    def __init__(self, scheme: LabelScheme):
        super().__init__(scheme)
        kept = {value: value for value in self.values}
        for name, (value, *_) in scheme.regions.items():
            if name.startswith("left_") and (other := scheme.regions.get(f"right_{name.removeprefix('left_')}")):
                kept[value] = other[0]
        self.kept = tuple(sorted({*kept.values()}))  # the values that stand for a class, in the classes' order
        self.place = tuple(self.kept.index(kept[value]) for value in self.values)  # the class of every value
        self.count = len(self.kept)

    def encode(self, label: Tensor) -> Tensor:
        return torch.tensor(self.place, device=label.device)[super().encode(label)]

    def spread(self, probability: Tensor) -> Tensor:
        """Of these classes (B, K, ...): the same of all the scheme's values in rising order; both sides get what their class has."""
        return probability[:, list(self.place)]

    def decode(self, logits: Tensor) -> Tensor:
        return super().decode(self.spread(logits))

    def probabilities(self, logits: Tensor) -> dict[str, Tensor]:
        return super().probabilities(self.spread(logits))  # a pair shares what its class has


def _is_any(label: Tensor, values: set[int]) -> Tensor:
    return torch.isin(label, torch.tensor(sorted(values), dtype=label.dtype, device=label.device))
