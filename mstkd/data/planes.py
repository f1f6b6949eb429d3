"""Axial slices as 2D networks see them: the file's own plane as a square of one size.

By default the plane is padded to a square which is resampled. To pad, or to cut, to the size itself leaves every voxel as it is.
Letters: X Y voxels of a stored volume's plane, S pixels per axis of the square that a network sees.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from mstkd.errors import UserError
from mstkd.shards.spec import SubjectMeta


@dataclass(frozen=True)
class Plane:
    """Where the axial slices of one stored volume lie in the square."""

    start: tuple[int, int]  # of the stored plane in the padded one, voxels
    shape: tuple[int, int]  # (X, Y) of the stored plane, voxels
    side: int  # of the padded plane, voxels
    size: int  # S

    @classmethod
    def of(cls, meta: SubjectMeta, size: int, fit: Literal["resample", "pad"] = "resample") -> "Plane":
        """The plane of a subject's slices, for squares of `size` pixels. Raises UserError where `pad` would cut something off the brain's box."""
        lengths, box = meta.ras_shape[:2], meta.crop_box[:2]
        side = max(lengths) if fit == "resample" else size
        start = tuple(low + (side - length) // 2 for (low, _), length in zip(box, lengths, strict=True))
        plane = cls(start, tuple(high - low for low, high in box), side, size)
        if fit == "pad" and any(low < 0 or low + length > side for low, length in zip(start, plane.shape, strict=True)):
            taken = " and ".join(f"{low} to {low + length}" for low, length in zip(start, plane.shape, strict=True))
            raise UserError(
                f"data.slices.fit pad: the brain of subject {meta.subject} would lie at voxels {taken} of data.slices.size {size}; "
                "use a larger size, or fit: resample"
            )
        return plane

    def bring(self, slices: Tensor, fill: float) -> Tensor:
        """Images (..., X, Y) float32 as (..., S, S): bilinear, with antialiasing where pixels become coarser; around them `fill`."""
        return self.resample(self.pad(slices, fill))

    def bring_labels(self, slices: Tensor) -> Tensor:
        """Masks or label maps (..., X, Y) of any type as (..., S, S): each pixel from the nearest voxel, 0 around them."""
        return self.resample_labels(self.pad(slices, 0))

    def pad(self, slices: Tensor, fill: float) -> Tensor:
        """The first half of bringing: (..., X, Y) of any type in the padded plane, (..., side, side)."""
        padded = slices.new_full((*slices.shape[:-2], self.side, self.side), fill)
        padded[..., *self._inside] = slices
        return padded

    def resample(self, squares: Tensor) -> Tensor:
        """The second half, of images: (..., side, side) float32 as (..., S, S)."""
        return _bilinear(squares, self.size)

    def resample_labels(self, squares: Tensor) -> Tensor:
        """The second half, of masks and label maps: (..., side, side) as (..., S, S)."""
        nearest = ((torch.arange(self.size, device=squares.device) + 0.5) * (self.side / self.size)).long()
        return squares[..., nearest[:, None], nearest]

    def back(self, squares: Tensor) -> Tensor:
        """Images (..., S, S) float32 on the stored plane, (..., X, Y); bilinear."""
        return _bilinear(squares, self.side)[..., *self._inside]

    @property
    def _inside(self) -> tuple[slice, slice]:
        """The stored plane in the padded one."""
        rows, columns = (slice(start, start + length) for start, length in zip(self.start, self.shape, strict=True))
        return rows, columns


def _bilinear(squares: Tensor, size: int) -> Tensor:
    if squares.shape[-1] == size:
        return squares
    flat = squares.reshape(1, -1, *squares.shape[-2:])
    resampled = functional.interpolate(flat, (size, size), mode="bilinear", align_corners=False, antialias=True)
    return resampled.reshape(*squares.shape[:-2], size, size)
