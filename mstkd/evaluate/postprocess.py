"""Clearing up a label map after prediction: small components of any scheme, and of tumours the "prediction smoothness enhancement" of ShaSpec*.

Source of the latter: the post-processing of ShaSpec's released code (Wang et al., CVPR 2023, arXiv:2307.14126). There its thresholds are voxels and array
indices of 1 mm BraTS volumes; here they are mm^3 and mm along the body's axis, the same on such volumes and meant for any other grid.
"""

from collections.abc import Collection, Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2
from scipy.ndimage import find_objects, generate_binary_structure, label

from mstkd.shards.spec import LabelScheme

EIGHTEEN = generate_binary_structure(3, 2)  # neighbours by face or edge
TWENTY_SIX = generate_binary_structure(3, 3)  # or corner
Labels = NDArray[np.uint8]


def postprocess(
    labels: Labels, scheme: LabelScheme, spacing_mm: tuple[float, ...], bottom_mm: float = 0.0, t1ce: NDArray | None = None,
    *, component_mm3: float = 2000.0, component_share: float = 0.1, lowest_mm: float = 25.0, enhancing_mm3: float = 500.0,
) -> Labels:  # fmt: skip
    """A new label map (X, Y, Z, RAS+) in `scheme`, which has WT, TC and ET, after these rules in this order:

    1. 18-connected tumour components under `component_mm3`, or under `component_share` of the largest if that is less, become
       background, and so do those whose top is not more than `lowest_mm` above the lowest slice of the image;
    2. only where `t1ce` (X, Y, Z) is given, in any unit: oedema that looks like core becomes core, see `_core_in_oedema`;
    3. ET of less than `enhancing_mm3` in all becomes core: so small it is mostly false.

    `bottom_mm`: how far the first slice of `labels` lies above the lowest one of the image. Rules 1 and 3 change nothing when
    applied again.
    """
    voxel_mm3, result = float(np.prod(spacing_mm)), labels.copy()
    tumour, count = label(np.isin(labels, scheme.regions["WT"]), EIGHTEEN)
    if not count:
        return result
    sizes = np.bincount(tumour.ravel(), minlength=count + 1) * voxel_mm3
    tops_mm = [0.0, *(bottom_mm + (box[2].stop - 1) * spacing_mm[2] for box in find_objects(tumour))]
    smallest = min(component_mm3, component_share * sizes[1:].max())
    kept = (sizes >= smallest) & (np.array(tops_mm) > lowest_mm)
    kept[0] = False
    result[(tumour > 0) & ~kept[tumour]] = 0
    if t1ce is not None:
        for number in np.flatnonzero(kept):
            result[_core_in_oedema(result, tumour == number, t1ce, scheme, voxel_mm3)] = scheme.paint["TC"]
    enhancing = np.isin(result, scheme.regions["ET"])
    if np.count_nonzero(enhancing) * voxel_mm3 < enhancing_mm3:
        result[enhancing] = scheme.paint["TC"]
    return result


def clear_components(
    labels: Labels, scheme: LabelScheme, spacing_mm: tuple[float, ...], min_volume_ml: Mapping[str, float], largest: Collection[str] = ()
) -> Labels:
    """A new label map (X, Y, Z) without small components: region by region, in the order in which regions are painted.

    A 26-connected component of a region below its `min_volume_ml`, and of the `largest` regions every one but the largest, becomes what the
    region lies in: ET becomes core, core becomes oedema, the whole tumour (with all in it) background; a tissue background. Components and
    not the whole region are judged, since BraTS 2023 and later score by lesion, where every false component costs (see lesions.py);
    for ET as a whole see rule 3 of `postprocess`. Applied again it changes nothing.
    """
    voxel_ml, result = float(np.prod(spacing_mm)) / 1000, labels.copy()
    for region, values in scheme.regions.items():
        if region not in min_volume_ml and region not in largest:
            continue
        parts, count = label(np.isin(result, values), TWENTY_SIX)
        if not count:
            continue
        voxels = np.bincount(parts.ravel(), minlength=count + 1)
        kept = voxels * voxel_ml >= min_volume_ml.get(region, 0.0)
        if region in largest:
            kept &= np.arange(count + 1) == 1 + voxels[1:].argmax()
        kept[0] = True  # what is not of the region
        result[~kept[parts]] = scheme.around(region)
    return result


def _core_in_oedema(
    labels: Labels, component: NDArray[np.bool_], t1ce: NDArray, scheme: LabelScheme, voxel_mm3: float,
    et_of_whole: float = 0.12, et_share: float = 0.0125, et_mm3: float = 112.5, core_mm3: float = 10_000.0,
) -> NDArray[np.bool_]:  # fmt: skip
    """Which voxels of a component's oedema are core after all: the second brightest of three clusters by T1ce.

    None unless ET is under `et_of_whole` of the case's tumour, the component's ET under `et_share` of it and `et_mm3`, and the case's core
    without ET under `core_mm3`. The reference sums label values, so that its share 0.05 and 450 are 4 times these.
    """
    core, enhancing, oedema = (labels == scheme.paint[region] for region in ("TC", "ET", "WT"))
    own, inside = np.count_nonzero(enhancing & component), oedema & component
    whole = np.count_nonzero(np.isin(labels, scheme.regions["WT"]))
    poor = np.count_nonzero(enhancing) < et_of_whole * whole and own < et_share * np.count_nonzero(component)
    chosen = np.zeros_like(component)
    if not poor or own * voxel_mm3 >= et_mm3 or np.count_nonzero(core) * voxel_mm3 >= core_mm3:
        return chosen
    values = t1ce[inside].astype(float)
    starts = np.unique(np.quantile(values, (1 / 6, 1 / 2, 5 / 6))) if len(values) else values
    if len(starts) < 3:
        return chosen
    centres, cluster = kmeans2(values, starts, minit="matrix")
    chosen[inside] = cluster == np.argsort(centres)[1]
    return chosen
