"""What travels between loader, method and engine: shapes, dtypes and units, said once.

Letters: B samples, M sequences (in the data set's order), K output channels, X Y Z voxels (RAS+). Methods that work on
axial slices get the same without Z: `(B, M, X, Y)`, both axes `data.slices.size` pixels long.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Batch:
    """One micro-batch of cropped, augmented, intensity-normalised volumes.

    `image` holds every sequence that exists in the data, also those the draw hides from the student;
    a sequence missing in the data is filled with `hidden_value`.
    """

    image: Tensor  # (B, M, X, Y, Z) float32
    brain: Tensor  # (B, X, Y, Z) bool
    present: Tensor  # (B, M) bool, True = the data has this sequence
    available: Tensor  # (B, M) bool, True = the student may see it; a non-empty subset of `present`
    subject: list[str]
    label: Tensor | None = None  # (B, X, Y, Z) uint8 in the declared label scheme
    hidden_value: float = 0.0  # what a hidden sequence is filled with, in normalised units

    def visible(self) -> Tensor:
        """(B, M, X, Y, Z): `image` with every sequence that is not available replaced by `hidden_value`."""
        return hide(self.image, self.available, self.hidden_value)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on `device`."""
        moved = {name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return Batch(**{**vars(self), **moved})


@dataclass
class ViewBatch:
    """One micro-batch of a set for classification: M views of a subject, each of a kind and shape of its own."""

    views: dict[str, Tensor]  # by name, in the set's order: (B, *shape of the view) float32; `hidden_value` where the data lacks it
    label: Tensor  # (B,) int64: index into the set's classes
    present: Tensor  # (B, M) bool, as in Batch
    available: Tensor  # (B, M) bool, as in Batch
    subject: list[str]
    hidden_value: float = 0.0

    def visible(self) -> dict[str, Tensor]:
        """`views` with every one that is not available replaced by `hidden_value`."""
        return {name: hide(view, self.available[:, m], self.hidden_value) for m, (name, view) in enumerate(self.views.items())}

    def to(self, device: torch.device | str) -> "ViewBatch":
        """The same batch on `device`."""
        moved = {name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return ViewBatch(**{**vars(self), **moved, "views": {name: view.to(device, non_blocking=True) for name, view in self.views.items()}})


def hide(values: Tensor, shown: Tensor, hidden_value: float | Tensor) -> Tensor:
    """Values (B, ...) or (B, M, ...) with those that are not `shown`, (B,) or (B, M) bool, replaced."""
    # where, not multiplication: NaN or inf in what is hidden must not reach a network
    return torch.where(shown[(..., *[None] * (values.dim() - shown.dim()))], values, hidden_value)


@dataclass
class StepOutput:
    """What a role's forward returns.

    `loss` is the scalar to descend; `scalars` are detached 0-d tensors, logged by name; `carry` hands
    detached tensors to later roles of the same micro-batch and is never logged or saved.
    """

    loss: Tensor
    scalars: dict[str, Tensor] = field(default_factory=dict)
    carry: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Progress:
    """Where training stands at the start of a step; the same on every rank."""

    step: int  # from 0
    epoch: int  # whole passes over the training items begun so far, from 0
    total_steps: int
    total_epochs: float
