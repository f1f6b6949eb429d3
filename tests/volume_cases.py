"""Cases of one subject made by hand: any orientation, any files, any preprocessing."""

import itertools

import nibabel as nib
import numpy as np

from mstkd.shards.dataset import Case, DatasetSpec, PreprocessConfig, Volume

ORIENTATIONS = [
    "".join(codes[axis] for axis in order)
    for codes in itertools.product("LR", "AP", "SI")
    for order in itertools.permutations(range(3))
]


def data_set(*sequences: str, labels: bool = True, preprocessing: dict | None = None, **more) -> DatasetSpec:
    """A flat data set of those sequences in scheme brats2018."""
    label = {"labels": "optional", "label": "{subject}_seg.nii.gz", "label_scheme": "brats2018"} if labels else {"labels": "none"}
    files = {name: f"{{subject}}_{name}.nii.gz" for name in sequences}
    config = PreprocessConfig(**(preprocessing or {}))
    return DatasetSpec(name="any", description="", layout="flat", sequences=files, preprocessing=config, **{**label, **more})


def case_of(files: dict, label=None, brain=None, **more) -> Case:
    """A case of paths or volumes."""
    as_volume = lambda file: file if isinstance(file, Volume | None) else Volume(file)  # noqa: E731
    volumes = {name: as_volume(file) for name, file in files.items()}
    return Case("s", "p", volumes, as_volume(label), as_volume(brain), **more)


def oriented(ras: np.ndarray, spacing_mm, codes: str) -> tuple[np.ndarray, np.ndarray]:
    """The same volume as a file with those axis codes would hold it, and the file's affine."""
    to_file = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes))
    affine = np.diag([*spacing_mm, 1.0]) @ nib.orientations.inv_ornt_aff(to_file, ras.shape)
    return nib.apply_orientation(ras, to_file), affine
