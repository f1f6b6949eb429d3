"""Small NIfTI folders named as the real data sets are."""

from pathlib import Path

import nibabel as nib
import numpy as np

BRATS_AFFINE = np.array([[-1.0, 0, 0, 0], [0, -1, 0, 23], [0, 0, 1, 0], [0, 0, 0, 1]])
SHAPE = (24, 22, 20)


def write_nifti(path: Path, data: np.ndarray, affine: np.ndarray = BRATS_AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, affine), path)
    return path


def head(seed: int, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """A noisy ellipsoid off centre, int16; background 0, some voxels negative."""
    rng = np.random.default_rng(seed)
    grid = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    inside = sum(((g - c) / r) ** 2 for g, c, r in zip(grid, (0.1, -0.05, 0.0), (0.6, 0.7, 0.65))) < 1
    texture = 300 + 120 * grid[0] + rng.normal(0, 90, shape)
    values = np.where(inside, np.round(texture), 0).astype(np.int16)
    values[inside & (values == 0)] = -7
    return values


def tumour(seed: int, values: tuple[int, ...], shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """Nested boxes, uint8: values from outside in; its size depends on the seed."""
    label = np.zeros(shape, np.uint8)
    for depth, value in enumerate(values):
        half = 2 + seed % 4 - depth
        if half > 0:
            label[tuple(slice(n // 2 - half, n // 2 + half) for n in shape)] = value
    return label


def write_case(folder: Path, subject: str, sequences: dict[str, str], seed: int, label: str | None, values: tuple[int, ...] = (2, 1, 4)) -> None:
    """`sequences`: name -> file name in `folder`; `label`: file name or None."""
    for channel, file in enumerate(sequences.values()):
        write_nifti(folder / file, head(seed * 10 + channel))
    if label is not None:
        write_nifti(folder / label, tumour(seed, values))


def write_phantom_like(src: Path, subjects: int) -> Path:
    """A cohort with the names of the `phantom` spec."""
    for number in range(subjects):
        subject = f"Phantom_{number:04d}"
        files = {name: f"{subject}_{name}.nii.gz" for name in ("flair", "t1", "t1ce", "t2")}
        write_case(src / subject, subject, files, number, f"{subject}_seg.nii.gz")
    return src
