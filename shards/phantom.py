"""The phantom: a generated cohort that behaves like the real thing, written as NIfTI in BraTS 2018 layout.

Tumour cohort: flair, t1, t1ce, t2 at 3T with labels 0, 1, 2, 4. Paired cohort: t1_3t, t1_7t of the same healthy
brain with tissue labels 1 CSF, 2 GM, 3 WM. A subject is a function of (seed, index, size) alone.
"""

import gzip
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import ArrayLike

from mstkd.errors import UserError
from mstkd.shards.anatomy import Anatomy, Grid, draw_brain
from mstkd.shards.lesions import draw_distractors, draw_tumour
from mstkd.shards.signal_equations import TISSUES_3T, TISSUES_7T, Tissue, signal

SEQUENCES = ("flair", "t1", "t1ce", "t2")
SIZES = range(32, 257)  # voxels per axis: coarser has no cortex left
_WM_COUNTS = 600  # stored value of white matter at gain 1
_NOISE_7T = 0.43  # of the noise at 3T, relative to the signal


@dataclass
class Subject:
    """One generated subject, RAS+; arrays are (X, Y, Z)."""

    name: str
    volumes: dict[str, np.ndarray]  # int16 by sequence, exactly 0 outside the brain
    label: np.ndarray  # uint8: brats2018, or tissue3 in the paired cohort
    tissue: np.ndarray  # uint8: 1 CSF, 2 GM, 3 WM as they were before the tumour, 0 outside the brain
    spacing_mm: float


@dataclass
class Compartment:
    """A tissue where it is: flat voxel numbers (V,) among the brain's, share of each (V,), times (numbers or (V,))."""

    voxels: np.ndarray
    share: np.ndarray
    tissue: Tissue
    concentration_mmol_l: ArrayLike = 0.0


def write_phantom(out: Path, subjects: int = 20, size: int = 64, seed: int = 0, paired_7t: bool = False) -> list[str]:
    """Write a cohort to `out/<subject>/<subject>_<sequence>.nii.gz` and `_seg`; returns the subjects' names.

    `size` is voxels per axis, spacing 176/size mm. Same arguments, same bytes; subject i is the same in every
    cohort of that seed and size. `out` appears only when complete. Raises UserError if it exists already or an
    argument is out of range.
    """
    out = Path(out)
    if out.exists():
        raise UserError(f"{out}: exists already; choose another --out or remove it")
    if subjects < 1 or seed < 0:
        raise UserError(f"phantom: --subjects {subjects} --seed {seed}: subjects must be at least 1, the seed at least 0")
    if size not in SIZES:
        raise UserError(f"phantom: --size {size}: must lie in {SIZES.start}..{SIZES.stop - 1} voxels per axis")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as holder:
            cohort = Path(holder) / "cohort"  # one level down: its permissions follow the umask
            cohort.mkdir()
            names = [_write_subject(make_subject(seed, index, size, paired_7t), cohort) for index in range(subjects)]
            cohort.rename(out)
    except OSError as error:
        raise UserError(f"{out}: cannot write the cohort: {error.strerror}; choose another --out") from None
    return names


def make_subject(seed: int, index: int, size: int = 64, paired_7t: bool = False) -> Subject:
    """Subject `index` of the cohort `seed`, rendered on `size`^3 voxels."""
    # independent streams, so that drawing one more thing in one part leaves the others as they are
    shape, lesion, times, scanner = np.random.default_rng([seed, index, int(paired_7t)]).spawn(4)
    if paired_7t:
        return _paired_subject(f"Phantom7T_{index:04d}", shape, times, scanner, size)
    anatomy = draw_brain(shape, size)
    tumour = draw_tumour(lesion, anatomy)
    shares = _layered(anatomy, [draw_distractors(lesion, anatomy), tumour.shares(anatomy) if tumour else {}])
    compartments = [_compartment(times, name, share, anatomy) for name, share in shares.items()]
    label = tumour.label(lesion, anatomy) if tumour else np.zeros(anatomy.brain.shape, np.uint8)
    volumes = {}
    for sequence in SEQUENCES:
        rendered = _render(sequence, compartments, int(anatomy.brain.sum()))
        volumes[sequence] = _scan(scanner, rendered, anatomy.grid, anatomy.brain, _wm_signal(sequence, TISSUES_3T))
    return Subject(f"Phantom_{index:04d}", volumes, label, anatomy.tissue(), anatomy.grid.spacing_mm)


def _paired_subject(
    name: str, shape: np.random.Generator, times: np.random.Generator, scanner: np.random.Generator, size: int
) -> Subject:
    """A healthy brain scanned twice, drawn at half the voxel size and resampled.

    7T: cubic interpolation between the small voxels. 3T: averages over whole voxels, with slices 1.5 voxels
    thick that are interpolated back to the grid.
    """
    fine, grid = draw_brain(shape, 2 * size), Grid(size)
    in_plane, slices, cubic = _average(size), _thick_slices(size), _cubic(size)
    brain = _resample(fine.brain, in_plane, in_plane) >= 0.5
    shares = [_resample(share, in_plane, in_plane) for share in (fine.csf, fine.gm, fine.wm)]
    tissue = ((np.argmax(shares, axis=0) + 1) * brain).astype(np.uint8)
    volumes = {}
    for sequence, tissues, planes, through, noise_factor, bias in (
        ("t1_3t", TISSUES_3T, in_plane, slices, 1.0, 0.2),
        ("t1_7t", TISSUES_7T, cubic, cubic, _NOISE_7T, 0.4),
    ):
        compartments = [_compartment(times, part, getattr(fine, part), fine, tissues) for part in ("csf", "gm", "wm")]
        image = np.zeros(fine.brain.shape, np.float32)
        image[fine.brain] = _render(sequence, compartments, int(fine.brain.sum()))
        rendered = np.maximum(_resample(image, planes, through)[brain], 0)
        volumes[sequence] = _scan(scanner, rendered, grid, brain, _wm_signal(sequence, tissues), noise_factor, bias)
    return Subject(name, volumes, tissue, tissue, grid.spacing_mm)


def _layered(anatomy: Anatomy, layers: Iterable[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Shares (X, Y, Z) of all tissues, adding up to 1 in the brain: each layer displaces what lies under it."""
    shares = {"csf": anatomy.csf, "gm": anatomy.gm, "wm": anatomy.wm}
    for layer in layers:
        left = 1 - sum(layer.values())
        shares = {name: share * left for name, share in shares.items()} | layer
    return shares


def _compartment(
    rng: np.random.Generator, name: str, share: np.ndarray, anatomy: Anatomy, tissues: dict[str, Tissue] = TISSUES_3T
) -> Compartment:
    """One tissue with this subject's times: a few per cent off the table; lesions more, and not uniform."""
    share = share[anatomy.brain]
    voxels = np.flatnonzero(share)
    if name in ("csf", "gm", "wm", "vessel", "choroid"):
        tissue = tissues[name].scaled(*np.exp(rng.normal(0, 0.03, 2)))
    else:
        within = 1 + 0.1 * _brain_field(rng, anatomy, 20.0)[voxels]
        tissue = tissues[name].wetter(np.exp(rng.normal(0, 0.2)) * np.maximum(within, 0.5))
    concentration = 0.0
    if name == "enhancing":
        concentration = rng.uniform(0.1, 0.6) * np.clip(1 + 0.4 * _brain_field(rng, anatomy, 9.0)[voxels], 0.1, 2)
    elif name in ("vessel", "choroid"):
        concentration = rng.uniform(0.2, 0.6)
    return Compartment(voxels, share[voxels], tissue, concentration)


def _brain_field(rng: np.random.Generator, anatomy: Anatomy, knot_mm: float) -> np.ndarray:
    return anatomy.grid.smooth_field(rng, knot_mm)[anatomy.brain]


def _render(sequence: str, compartments: list[Compartment], voxels: int) -> np.ndarray:
    """Noiseless signal (voxels,) of the brain: the tissues' signals, weighted by their shares."""
    rendered = np.zeros(voxels, np.float32)
    for part in compartments:
        rendered[part.voxels] += part.share * np.float32(signal(sequence, part.tissue, part.concentration_mmol_l))
    return rendered


def _wm_signal(sequence: str, tissues: dict[str, Tissue]) -> float:
    return float(signal(sequence, tissues["wm"]))


def _scan(
    rng: np.random.Generator,
    rendered: np.ndarray,
    grid: Grid,
    brain: np.ndarray,
    wm_signal: float,
    noise_factor: float = 1.0,
    bias: float = 0.2,
) -> np.ndarray:
    """(X, Y, Z) int16 as a scanner stores it: bias field of +-`bias`, Rician noise with 3 to 6 % of `wm_signal`, gain 0.5 to 2."""
    sensitivity = grid.smooth_field(rng, 60.0)[brain]
    sensitivity = 1 + np.float32(bias) * sensitivity / np.abs(sensitivity).max()
    noise_sd = np.float32(noise_factor * rng.uniform(0.03, 0.06) * wm_signal)
    gain = rng.uniform(0.5, 2) * _WM_COUNTS / wm_signal
    noise = noise_sd * rng.standard_normal((2, len(rendered)), dtype=np.float32)
    magnitude = np.hypot(rendered * sensitivity + noise[0], noise[1])
    stored = np.zeros(brain.shape, np.int16)
    stored[brain] = np.clip(np.round(gain * magnitude), 1, np.iinfo(np.int16).max)  # 0 is kept for the background
    return stored


def _resample(image: np.ndarray, in_plane: np.ndarray, through: np.ndarray) -> np.ndarray:
    """(2n, 2n, 2n) to (n, n, n) by an (n, 2n) matrix for x and y and one for z."""
    for matrix in (in_plane, in_plane, through):  # each turn takes the leading axis and moves it to the end
        image = np.tensordot(image.astype(np.float32, copy=False), matrix.astype(np.float32), (0, 1))
    return image


def _average(size: int) -> np.ndarray:
    """(n, 2n): the mean of each pair of small voxels."""
    return np.kron(np.eye(size), [[0.5, 0.5]])


def _cubic(size: int) -> np.ndarray:
    """(n, 2n): cubic interpolation midway between two small voxels, sharper than their mean."""
    rows, matrix = np.arange(size), np.zeros((size, 2 * size))
    for step, weight in zip((-1, 0, 1, 2), np.array([-1, 9, 9, -1]) / 16, strict=True):
        np.add.at(matrix, (rows, np.clip(2 * rows + step, 0, 2 * size - 1)), weight)
    return matrix


def _thick_slices(size: int) -> np.ndarray:
    """(n, 2n): slices 3 small voxels (1.5 voxels) thick, interpolated linearly at the n voxel centres."""
    count = -(-2 * size // 3)
    slices = np.kron(np.eye(count), np.full((1, 3), 1 / 3))[:, : 2 * size]
    slices /= slices.sum(axis=1, keepdims=True)
    position = np.clip((2 * np.arange(size) + 0.5 - 1) / 3, 0, count - 1)  # voxel centres, counted in slices
    return np.clip(1 - np.abs(position[:, None] - np.arange(count)), 0, 1) @ slices


def _write_subject(subject: Subject, cohort: Path) -> str:
    """`subject` as NIfTI, its name returned; the first two axes run to the left and to the back, as BraTS stores them."""
    folder = cohort / subject.name
    folder.mkdir()
    centre_mm = (len(subject.label) - 1) / 2 * subject.spacing_mm
    affine = np.diag([-subject.spacing_mm, -subject.spacing_mm, subject.spacing_mm, 1.0])
    affine[:3, 3] = centre_mm, centre_mm, -centre_mm
    for suffix, volume in (*subject.volumes.items(), ("seg", subject.label)):
        image = nib.Nifti1Image(np.ascontiguousarray(volume[::-1, ::-1]), affine)
        image.header.set_xyzt_units("mm")
        # without a time stamp: same bytes every time
        packed = gzip.compress(image.to_bytes(), compresslevel=1, mtime=0)
        (folder / f"{subject.name}_{suffix}.nii.gz").write_bytes(packed)
    return subject.name
