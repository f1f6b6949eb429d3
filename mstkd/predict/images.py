"""Images that lie on the grid of a case's file."""

from pathlib import Path

import nibabel as nib
from numpy.typing import NDArray

from mstkd.shards.dataset import Volume


def save_like(data: NDArray, reference: Volume, path: Path, description: str = "") -> None:
    """Write `data`, which lies on the grid of the volume `reference`, as NIfTI."""
    nib.save(like(data, reference, description), path)


def like(data: NDArray, reference: Volume, description: str = "") -> nib.Nifti1Image:
    """`data`, which lies on the grid of the volume `reference`, with its geometry, its own type and none of the other's texts."""
    source = nib.load(reference.path)
    if not isinstance(source, nib.Nifti1Pair):  # Analyze, MGH: their headers mean other things
        image = nib.Nifti1Image(data, source.affine)
        image.header["descrip"] = description.encode()
        return image
    header = source.header.copy()
    header.extensions.clear()
    for text in {"descrip", "aux_file", "db_name", "intent_name"}.intersection(header.keys()):  # NIfTI-2 has no db_name
        header[text] = b""  # may name people or places
    header["descrip"] = description.encode()
    header["cal_min"] = header["cal_max"] = 0
    header.set_data_dtype(data.dtype)
    kind = nib.Nifti2Image if isinstance(source, nib.Nifti2Image | nib.Nifti2Pair) else nib.Nifti1Image
    return kind(data, source.affine, header)
