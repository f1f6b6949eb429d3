"""Label maps of a data set: read, translated to the scheme's values, and checked."""

import numpy as np

from mstkd.errors import UserError
from mstkd.shards.dataset import DatasetSpec, Volume
from mstkd.shards.nifti import read_volume


def read_labels(volume: Volume, dataset: DatasetSpec) -> tuple[np.ndarray, np.ndarray]:
    """Label map (3 axes, as in the file) uint8 in the data set's scheme, and affine (4, 4). Raises UserError.

    A value that `label_map` names becomes its target; another one but 0 `label_rest`, where that is given. What is left
    must be a value of the scheme.
    """
    data, affine = read_volume(volume)
    return scheme_labels(data, dataset, volume), affine


def scheme_labels(data: np.ndarray, dataset: DatasetSpec, volume: Volume) -> np.ndarray:
    """`data` as the data set's scheme numbers it, uint8; UserError naming `volume` where a value has no place in it."""
    scheme, mapping = dataset.scheme, dataset.label_map or {}
    values = _distinct(data)
    known = set(scheme.values)
    rest = dataset.label_rest
    # a rest is made of whole numbers: fractions come from interpolation, and NaN or negative values from a broken file
    others = [rest if rest is not None and value > 0 and float(value).is_integer() else value for value in values.tolist()]
    targets = [mapping.get(value, other) for value, other in zip(values.tolist(), others)]
    strange = [f"{value:g}" for value, target in zip(values.tolist(), targets) if target not in known]
    if strange:
        allowed = ", ".join(str(value) for value in scheme.values)
        shown = ", ".join(strange[:5]) + (", ..." if len(strange) > 5 else "")
        unmapped = " and not in its label_map" if mapping else ""
        fix = "correct it or the spec's label_map" if mapping else "correct it or the spec's label_scheme"
        raise UserError(f"{volume}: label values {shown} are outside scheme {scheme.name} ({allowed}){unmapped}; {fix}")
    if not mapping and rest is None:
        return data.astype(np.uint8)
    return np.array(targets, np.uint8)[np.searchsorted(values, data)]


def _distinct(data: np.ndarray) -> np.ndarray:
    """np.unique(data), quickly where most of it is 0."""
    some = data.T[data.T != 0]  # in the order of a file's memory
    return np.unique(some if some.size == data.size else np.append(some, data.dtype.type(0)))
