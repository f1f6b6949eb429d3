"""Reading image files: NIfTI (one file or a pair), Analyze and MGH, whole or one channel of a 4D file.

Of a header only the geometry is used; its text fields are never read.
"""

import gzip
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError, SerializableImage
from nibabel.nifti1 import Nifti1Header
from nibabel.spatialimages import HeaderDataError, SpatialImage

from mstkd.errors import UserError
from mstkd.shards.dataset import Volume

AFFINE_TOLERANCE_MM = 1e-3
COMPRESSED = (".gz", ".mgz")
UNREADABLE = (ImageFileError, HeaderDataError, OSError, EOFError, ValueError, zlib.error)

Grid = tuple[tuple[int, ...], np.ndarray]  # shape (3 axes) and affine (4, 4), voxel -> mm


class OpenFiles:
    """Reads volumes one after the other and keeps the last 4D file, so that its channels cost one reading."""

    def __init__(self):
        self._path, self._data = None, None

    def read(self, volume: Volume) -> tuple[np.ndarray, np.ndarray]:
        """As `read_volume`."""
        image = open_image(volume)
        shape, affine = grid_of(image, volume)
        if volume.path != self._path:
            try:
                self._path, self._data = volume.path, _voxels(image, volume.path)
            except UNREADABLE:
                raise UserError(f"{volume}: truncated or not a NIfTI; copy or download it again") from None
        data = self._data
        if volume.channel is None:
            self._path, self._data = None, None
        if data.dtype.kind not in "iuf":
            raise UserError(f"{volume}: expected one real number per voxel, found {data.dtype}; convert it to grey values")
        return (data if volume.channel is None else data[..., volume.channel]).reshape(shape), affine


def _voxels(image: SpatialImage, path: Path) -> np.ndarray:
    """All voxels of an opened file, scaled. A compressed one is unpacked whole, and its checksum compared.

    nibabel unpacks piece by piece, which takes longer, and stops before the checksum.
    """
    if path.suffix in COMPRESSED and isinstance(image, SerializableImage):
        image = type(image).from_bytes(gzip.decompress(path.read_bytes()))
    return np.asanyarray(image.dataobj)


def read_volume(volume: Volume | Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (3 axes, as in the file, scaled) and affine (4, 4) of a volume. Raises UserError naming the file."""
    return OpenFiles().read(_as_volume(volume))


def open_image(volume: Volume | Path) -> SpatialImage:
    """The file of a volume, its header read and its voxels not yet. Raises UserError."""
    volume = _as_volume(volume)
    try:
        return nib.load(volume.path)
    except FileNotFoundError:
        raise UserError(f"{volume}: no such file") from None
    except UNREADABLE:
        raise UserError(f"{volume}: truncated or not a NIfTI; copy or download it again") from None


def grid_of(image: SpatialImage, volume: Volume) -> Grid:
    """Shape (3 axes) and affine of a volume, from the header. Raises UserError: not one volume, singular affine.

    Trailing axes of length 1 are dropped (IBSR's files have one).
    """
    affine, shape = image.affine, image.shape
    if not np.isfinite(affine).all() or np.isnan(nib.io_orientation(affine)).any():
        raise UserError(f"{volume}: the affine in its header is singular; restore the header's geometry")
    if volume.channel is not None:
        if len(shape) != 4 or 0 in shape:
            raise UserError(f"{volume}: expected a file with 4 axes, found shape {shape}; drop #{volume.channel} from the spec's file pattern")
        if volume.channel >= shape[3]:
            raise UserError(f"{volume}: the file has {shape[3]} channels (numbered from 0); correct the spec's file pattern")
        return shape[:3], affine
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3 or 0 in shape:
        fix = "name one channel, as in file.nii.gz#0, in the spec" if len(shape) == 4 else "store one volume per file"
        raise UserError(f"{volume}: expected a volume with 3 axes, found shape {shape}; {fix}")
    return shape, affine


def orientation_is_convention(image: SpatialImage) -> bool:
    """Whether the header does not say where left is, so that nibabel's convention decides (Analyze, or NIfTI with both codes 0)."""
    header = image.header
    if isinstance(header, Nifti1Header):
        return int(header["qform_code"]) == 0 and int(header["sform_code"]) == 0
    return isinstance(image, nib.AnalyzeImage)


def same_grid(first: Grid, second: Grid) -> bool:
    """Whether two grids are one, to 1e-3 mm."""
    return tuple(first[0]) == tuple(second[0]) and bool(np.allclose(first[1], second[1], rtol=0, atol=AFFINE_TOLERANCE_MM))


def check_same_grid(volume: Volume, grid: Grid, reference: Volume, reference_grid: Grid) -> None:
    """Raise UserError naming both files unless they lie on one grid."""
    if tuple(grid[0]) != tuple(reference_grid[0]):
        raise UserError(f"{volume}: shape {grid[0]} differs from {reference_grid[0]} of {reference}; resample them to one grid")
    if not same_grid(grid, reference_grid):
        raise UserError(f"{volume}: its affine differs from that of {reference}; resample them to one grid")


def _as_volume(volume: Volume | Path) -> Volume:
    return volume if isinstance(volume, Volume) else Volume(Path(volume))
