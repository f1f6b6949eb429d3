"""Small NIfTI folders named as the real data sets are."""

from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np

BRATS_AFFINE = np.array([[-1.0, 0, 0, 0], [0, -1, 0, 23], [0, 0, 1, 0], [0, 0, 0, 1]])
COARSER_AFFINE = np.array([[-1.1, 0, 0, 1], [0, -1.2, 0, 24], [0, 0, 1, 0], [0, 0, 0, 1]])  # about the same place in space
SHAPE = (24, 22, 20)


def write_nifti(path: Path, data: np.ndarray, affine: np.ndarray = BRATS_AFFINE) -> Path:
    """A NIfTI file; where `path` ends in .img, an Analyze pair, which has no affine of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.AnalyzeImage(data, None) if path.suffix == ".img" else nib.Nifti1Image(data, affine), path)
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


@dataclass(frozen=True)
class RealNames:
    """One subject as a data set really names its files; paths count from the source folder, `#k` is a channel of a 4D file."""

    spec: str
    subject: str
    patient: str
    files: dict[str, str]  # sequence -> path
    label: str | None = None
    label_values: dict[int, int] = field(default_factory=dict)  # value in the file -> value that is to be stored
    site: str | None = None
    field_strength_t: float | None = None
    trailing_axis: bool = False  # files have a fourth axis of length 1
    other_grids: tuple[str, ...] = ()  # sequences that lie on a grid of their own

    def __str__(self) -> str:
        return f"{self.spec}-{self.subject}"


def write_real_names(src: Path, names: RealNames, seed: int = 0) -> None:
    """Write the files of `names` below `src`."""
    channels: dict[str, list[np.ndarray]] = {}
    for number, (sequence, text) in enumerate(names.files.items()):
        if sequence in names.other_grids:
            write_nifti(src / text, head(seed * 10 + number, (SHAPE[0] + 4, *SHAPE[1:])), COARSER_AFFINE)
        else:
            channels.setdefault(text.partition("#")[0], []).append(head(seed * 10 + number))
    for path, volumes in channels.items():
        data = volumes[0] if len(volumes) == 1 else np.stack(volumes, axis=-1)
        write_nifti(src / path, data[..., np.newaxis] if names.trailing_axis else data)
    if names.label:
        label = blocks(tuple(names.label_values))
        write_nifti(src / names.label, label[..., np.newaxis] if names.trailing_axis else label)


def blocks(values: tuple[int, ...], shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """Label map, uint8: a box in the middle of the head, cut along z into one layer per value; 0 elsewhere."""
    label, start = np.zeros(shape, np.uint8), shape[2] // 2 - len(values) // 2
    for layer, value in enumerate(values, start):
        label[shape[0] // 2 - 3 : shape[0] // 2 + 3, shape[1] // 2 - 3 : shape[1] // 2 + 3, layer] = value
    return label


def in_folder(folder: str, subject: str, suffixes: dict[str, str], separator: str = "_", ending: str = ".nii.gz") -> dict[str, str]:
    """Paths of the BRATS kind: FOLDER/SUBJECT/SUBJECT_SUFFIX.nii.gz."""
    return {name: f"{folder}{subject}/{subject}{separator}{suffix}{ending}" for name, suffix in suffixes.items()}


PLAIN = {name: name for name in ("flair", "t1", "t1ce", "t2")}
GLI = {"flair": "t2f", "t1": "t1n", "t1ce": "t1c", "t2": "t2w"}
OLD, NEW, RESECTED = {2: 2, 1: 1, 4: 4}, {2: 2, 1: 1, 3: 3}, {2: 2, 1: 1, 3: 3, 4: 4}  # label values of the BraTS years
TISSUES = {1: 1, 2: 2, 3: 3}
# BrainCOLOR numbers: left and right white matter, left and right cortex, midline, left and right ventral DC, accumbens, vermis, CSF
BRAINCOLOR = {45: 1, 44: 3, 101: 2, 207: 2, 100: 4, 206: 4, 4: 12, 11: 13, 35: 14, 62: 17, 61: 27, 23: 0, 71: 0, 46: 0}


def _brats(spec: str, folder: str, subject: str, patient: str, values: dict[int, int], **more) -> RealNames:
    gli = spec.endswith("_gli")
    separator = "-" if gli else "_"
    files = in_folder(folder, subject, GLI if gli else PLAIN, separator, more.get("ending", ".nii.gz"))
    label = more.get("label", f"{subject}{separator}seg{more.get('ending', '.nii.gz')}")
    return RealNames(spec, subject, patient, files, f"{folder}{subject}/{label}", values)


REAL_NAMES = [
    _brats("phantom", "", "Phantom_0003", "Phantom_0003", OLD),
    RealNames("phantom_7t", "P_1", "P_1", in_folder("", "P_1", {"t1_3t": "t1_3t", "t1_7t": "t1_7t"}), "P_1/P_1_seg.nii.gz", TISSUES),
    _brats("brats2018", "HGG/", "Brats18_TCIA08_105_1", "Brats18_TCIA08_105", OLD),
    _brats("brats2018", "LGG/", "Brats18_2013_0_1", "Brats18_2013_0", OLD),
    _brats("brats2019", "LGG/", "BraTS19_TCIA10_387_1", "BraTS19_TCIA10_387", OLD),
    _brats("brats2019", "HGG/", "BraTS19_CBICA_AAB_1", "BraTS19_CBICA_AAB", OLD),
    _brats("brats2020", "", "BraTS20_Training_001", "BraTS20_Training_001", OLD, ending=".nii"),
    _brats("brats2020", "", "BraTS20_Training_355", "BraTS20_Training_355", OLD, ending=".nii", label="W39_1998.09.19_Segm.nii"),
    _brats("brats2021", "", "BraTS2021_00000", "BraTS2021_00000", OLD),
    _brats("brats2023_gli", "", "BraTS-GLI-00005-100", "BraTS-GLI-00005", NEW),
    _brats("brats2024_gli", "", "BraTS-GLI-02105-101", "BraTS-GLI-02105", RESECTED),
    _brats("fets2022", "", "FeTS2022_00000", "FeTS2022_00000", OLD),
    _brats("fets2024", "", "FeTS2022_01341", "FeTS2022_01341", OLD),
    RealNames(
        "msd_task01", "BRATS_001", "BRATS_001",
        {name: f"imagesTr/BRATS_001.nii.gz#{channel}" for channel, name in enumerate(PLAIN)}, "labelsTr/BRATS_001.nii.gz", TISSUES,
    ),
    RealNames(
        "ixi", "IXI002-Guys-0828", "IXI002", {n.lower(): f"IXI-{n}/IXI002-Guys-0828-{n}.nii.gz" for n in ("T1", "T2", "PD")},
        site="Guys", field_strength_t=1.5, other_grids=("t1",),
    ),
    RealNames("ixi", "IXI012-HH-1211", "IXI012", {"t1": "IXI-T1/IXI012-HH-1211-T1.nii.gz"}, site="HH", field_strength_t=3.0),
    RealNames("ixi", "IXI035-IOP-0873", "IXI035", {"pd": "IXI-PD/IXI035-IOP-0873-PD.nii.gz"}, site="IOP", field_strength_t=1.5),
    RealNames(
        "ibsr18", "IBSR_01", "IBSR_01", {"t1": "IBSR_01/IBSR_01_ana_strip.nii.gz"}, "IBSR_01/IBSR_01_segTRI_fill_ana.nii.gz", TISSUES,
        field_strength_t=1.5, trailing_axis=True,
    ),
    RealNames(
        "ibsr18_analyze", "IBSR_18", "IBSR_18", {"t1": "IBSR_18/IBSR_18_ana_strip.img"}, "IBSR_18/IBSR_18_segTRI_fill_ana.img", TISSUES,
        field_strength_t=1.5, trailing_axis=True,
    ),
    RealNames("malc2012", "1000_3", "1000", {"t1": "training-images/1000_3.nii.gz"}, "training-labels/1000_3_glm.nii.gz", BRAINCOLOR),
    RealNames("malc2012", "1003_3", "1003", {"t1": "testing-images/1003_3.nii.gz"}, "testing-labels/1003_3_glm.nii.gz", BRAINCOLOR),
    RealNames("paired_3t_7t", "sub01", "sub01", in_folder("", "sub01", {"t1_3t": "3T", "t1_7t": "7T"}), "sub01/sub01_seg.nii.gz", TISSUES),
    RealNames("paired_3t_7t", "sub02", "sub02", in_folder("", "sub02", {"t1_3t": "3T", "t1_7t": "7T"})),
]  # fmt: skip
