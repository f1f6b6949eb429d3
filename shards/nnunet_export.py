"""A shard set as nnU-Net's raw data folder: imagesTr, labelsTr, imagesTs, labelsTs, dataset.json and splits_final.json.

Volumes lie on the grid and in the orientation of the files they came from, as raw intensities inside the brain (to the precision
of float16 z-scores) and 0 outside it. Synthetic sequences have the scale that their network gave them.
"""

from pathlib import Path

import nibabel as nib
import numpy as np

from mstkd.errors import UserError
from mstkd.files import whole_folder, write_json
from mstkd.shards.geometry import restore, restore_image
from mstkd.shards.layout import read_set
from mstkd.shards.members import read_member
from mstkd.shards.progress import subject_progress
from mstkd.shards.spec import BRAIN, FILE_LABEL, IMAGE, LABEL, META, LabelScheme, ShardIndex, SubjectEntry, SubjectMeta

ENDING = ".nii.gz"


def export_nnunet(folder: Path, out: Path) -> dict[str, int]:
    """Write the shard set `folder` as `out`, named DatasetXXX_Name by nnU-Net's custom; number of cases by part, "Tr" and "Ts".

    Label values are renumbered to 0, 1, 2, ... as nnU-Net wants them; regions stay regions. splits_final.json has the set's folds,
    for nnU-Net's folder of preprocessed data. Raises UserError: `out` exists, views instead of volumes, no labels, a subject that
    lacks a sequence or a label.
    """
    folder, out = Path(folder), Path(out)
    index, splits = read_set(folder)
    _check(folder, index, out)
    numbers = {value: number for number, value in enumerate(index.scheme.values)}
    with whole_folder(out) as partial:
        for part in ("Tr", "Ts"):
            for kind in ("images", "labels"):
                (partial / f"{kind}{part}").mkdir(parents=True)
        counts = {"Tr": 0, "Ts": 0}
        with subject_progress(f"{out.name}: export", len(index.subjects())) as tally:
            for tar in index.shards:
                for entry in tar.subjects:
                    part = "Ts" if entry.subject in splits.test else "Tr"
                    _write_case(folder / tar.file, entry, index, numbers, partial, part)
                    counts[part] += 1
                    tally(1, sum(size for _, size in entry.members.values()))
        write_json(partial / "dataset.json", _description(index, numbers, counts["Tr"]))
        write_json(partial / "splits_final.json", [{"train": list(fold.train), "val": list(fold.val)} for fold in splits.folds])
    return counts


def _check(folder: Path, index: ShardIndex, out: Path) -> None:
    if out.exists():
        raise UserError(f"{out}: exists already; use another --out or remove it")
    if index.classification is not None or index.scheme is None:
        raise UserError(f"{folder}: holds {'views' if index.classification is not None else 'no labels'}; nnU-Net needs labelled volumes")
    for key, entry in index.subjects().items():
        if lacking := [name for name in index.sequences if name not in entry.sequences]:
            raise UserError(f"{folder}: subject {key} lacks {lacking[0]}, and nnU-Net needs every channel; complete the set first, see mstkd predict")
        if LABEL not in entry.members:
            raise UserError(f"{folder}: subject {key} has no label; leave it out of the set")


def _description(index: ShardIndex, numbers: dict[int, int], training: int) -> dict:
    """dataset.json; regions in the order in which the scheme paints them."""
    scheme: LabelScheme = index.scheme
    regions = {region: [numbers[value] for value in values] for region, values in scheme.regions.items()}
    paint = {region: numbers[scheme.paint[region]] for region in regions}
    named = {value for values in regions.values() for value in values}
    for value in sorted(set(numbers.values()) - named - {0}):  # values outside every region
        regions[f"label_{value}"], paint[f"label_{value}"] = [value], value
    overlapping = any(len(values) > 1 for values in regions.values())
    return {
        "channel_names": {str(number): name for number, name in enumerate(index.sequences)},
        "labels": {"background": 0, **{region: values if len(values) > 1 else values[0] for region, values in regions.items()}},
        **({"regions_class_order": list(paint.values())} if overlapping else {}),
        "numTraining": training,
        "file_ending": ENDING,
    }


def _write_case(tar: Path, entry: SubjectEntry, index: ShardIndex, numbers: dict[int, int], out: Path, part: str) -> None:
    meta = SubjectMeta.model_validate(read_member(tar, entry, META))
    image, brain = read_member(tar, entry, IMAGE), read_member(tar, entry, BRAIN)
    affine = np.asarray(meta.original_affine)
    for channel, name in enumerate(index.sequences):
        stats = meta.stats[name]
        raw = np.where(brain > 0, image[channel].astype(np.float32) * np.float32(stats.std) + np.float32(stats.mean), np.float32(0))
        nib.save(nib.Nifti1Image(restore_image(raw, meta), affine), out / f"images{part}" / f"{entry.subject}_{channel:04d}{ENDING}")
    if FILE_LABEL in entry.members:
        label = read_member(tar, entry, FILE_LABEL)
    else:
        label = restore(read_member(tar, entry, LABEL), meta)
    table = np.zeros(256, np.uint8)
    table[list(numbers)] = list(numbers.values())
    nib.save(nib.Nifti1Image(table[label], affine), out / f"labels{part}" / f"{entry.subject}{ENDING}")
