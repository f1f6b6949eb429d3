"""A prediction to be looked at: outlines of its regions on three slices of the case, which go through where it is largest."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from mstkd.evaluate.figures import WINDOW, colours, oriented
from mstkd.evaluate.metrics import region_masks
from mstkd.shards.geometry import bounding_box
from mstkd.shards.spec import LabelScheme

PLANES = {2: "axial", 1: "coronal", 0: "sagittal"}


def draw_overlay(image: NDArray, labels: NDArray[np.uint8], scheme: LabelScheme, spacing_mm: tuple[float, ...], title: str, path: Path) -> None:
    """Write a PNG. image (X, Y, Z) RAS+ in any unit, background its most frequent value at the border; labels (X, Y, Z) in `scheme`.

    In radiological convention: the patient's right is on the left. Nothing in it says whose it is.
    """
    shown = image != np.median(image[:, :, [0, -1]])
    box = tuple(slice(start, stop) for start, stop in bounding_box(shown | (labels > 0), margin_voxels=2))
    image, labels, shown = image[box].astype(np.float32), labels[box], shown[box]
    low, high = np.percentile(image[shown] if shown.any() else image, WINDOW)
    masks = {region: mask for region, mask in region_masks(labels, scheme).items() if mask.any()}
    figure = Figure(figsize=(12, 4.6), layout="constrained", facecolor="black")
    for axes, (axis, plane) in zip(figure.subplots(1, 3), PLANES.items(), strict=True):
        others = tuple(other for other in range(3) if other != axis)
        position = int(np.count_nonzero(labels if labels.any() else shown, axis=others).argmax())
        aspect = spacing_mm[others[1]] / spacing_mm[others[0]]
        axes.imshow(oriented(image, axis, position), cmap="gray", vmin=low, vmax=max(high, low + 1e-6), origin="lower", aspect=aspect)
        for region, mask in masks.items():
            flat = oriented(mask, axis, position).astype(float)
            if flat.any():
                axes.contour(flat, levels=[0.5], colors=[colours(scheme)[region][1]], linewidths=1.2)
        axes.text(0.01, 0.5, "A" if axis == 0 else "R", color="white", fontsize=9, transform=axes.transAxes)  # anterior, the patient's right
        axes.set_title(plane, color="white", fontsize=10)
        axes.axis("off")
    figure.suptitle(title, color="white", fontsize=11)
    _legend(figure, masks, scheme, float(np.prod(spacing_mm)) / 1000)
    figure.savefig(path, dpi=100)


def _legend(figure: Figure, masks: dict[str, NDArray], scheme: LabelScheme, voxel_ml: float) -> None:
    handles = [
        matplotlib.lines.Line2D([], [], color=colours(scheme)[region][1], label=f"{region} {np.count_nonzero(mask) * voxel_ml:.1f} ml")
        for region, mask in masks.items()
    ]
    handles = handles or [matplotlib.lines.Line2D([], [], linestyle="none", label=f"none of {', '.join(scheme.regions)} found")]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6), fontsize=10, frameon=False, labelcolor="white")
