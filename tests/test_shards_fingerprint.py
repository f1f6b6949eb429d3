"""fingerprint.json: figures that can be counted by hand, the same in any order, and a warning for each thing that bites."""

import json
import re

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nifti_trees import BRATS_AFFINE, head, tumour, write_nifti
from volume_cases import case_of, data_set

from mstkd.shards.dataset import Case
from mstkd.shards.dataset_fingerprint import Fingerprint, as_text, summarise, write_fingerprint
from mstkd.shards.preprocess import Preprocessed, preprocess
from mstkd.shards.spec import LABEL_SCHEMES, ShardEntry, ShardIndex, SubjectEntry

SCHEME = LABEL_SCHEMES["brats2018"]
BRAIN = np.all([head(seed) != 0 for seed in range(9)], axis=0)
INSIDE = tumour(3, (2, 1, 4)) * BRAIN
SPEC = data_set("t1", "t2", allow_missing=True)


def made(folder, subject, spec=SPEC, images=None, label="tumour", affine=BRATS_AFFINE, brain=None, **more) -> Preprocessed:
    """One subject preprocessed from files; `images`: sequence -> voxels."""
    seed = sum(subject.encode())
    images = {"t1": head(seed), "t2": head(seed + 1)} if images is None else images
    files = {name: write_nifti(folder / subject / f"{name}.nii", data, affine) for name, data in images.items()}
    if isinstance(label, str):
        label = INSIDE
    paths = [None if data is None else write_nifti(folder / subject / f"{name}.nii", data, affine) for name, data in (("seg", label), ("brain", brain))]
    case = case_of(files, *paths, **more)
    return preprocess(Case(subject, f"patient-{subject}", case.files, case.label, case.brain, case.site, case.field_strength_t), spec)


def volumes_ml(one: Preprocessed) -> dict[str, float]:
    if one.label is None:
        return {}
    return {name: float(np.isin(one.label, values).sum() * np.prod(one.meta.spacing_mm) / 1000) for name, values in SCHEME.regions.items()}


def index_of(subjects: list[Preprocessed], sequences=("t1", "t2")) -> ShardIndex:
    entries = tuple(
        SubjectEntry(
            subject=one.meta.subject, patient=one.meta.patient, sequences=one.meta.sequences, members={}, fingerprint={},
            label_volume_ml=volumes_ml(one),
        )
        for one in subjects
    )  # fmt: skip
    shards = (ShardEntry(file="any-000000.tar", bytes=0, sha256="", subjects=entries),)
    return ShardIndex(dataset="any", spec_sha256="", sequences=sequences, label_scheme="brats2018", shards=shards)


def fingerprint_of(*subjects: Preprocessed) -> Fingerprint:
    return summarise([one.facts for one in subjects], index_of(list(subjects)))


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Six subjects with nothing to warn of."""
    folder = tmp_path_factory.mktemp("cohort")
    sites = ("Guys", "HH", "Guys", None, "HH", "Guys")
    return [made(folder, f"s{k}", site=site, field_strength_t=3.0 if site == "HH" else 1.5) for k, site in enumerate(sites)]


def test_figures_are_those_counted_by_hand(cohort):
    fingerprint = fingerprint_of(*cohort)
    assert (fingerprint.subjects, fingerprint.patients, fingerprint.labelled) == (6, 6, 6)
    assert fingerprint.orientations == {"LPS": 6} and fingerprint.subsets == {"t1+t2": 6}
    assert fingerprint.file_shape.min == fingerprint.file_shape.max == (24, 22, 20)
    assert fingerprint.sites == {"Guys": 3, "HH": 2} and fingerprint.field_strengths_t == {"1.5": 4, "3": 2}
    means = sorted(one.meta.stats["t1"].mean for one in cohort)
    spread = fingerprint.sequences["t1"].intensity["mean"]
    assert (spread.min, spread.median, spread.max) == (means[0], pytest.approx((means[2] + means[3]) / 2), means[-1])
    largest = [np.abs(one.image[1].astype(float)).max() for one in cohort]
    assert fingerprint.sequences["t2"].z_score.max == max(largest)
    volumes = [(one.label == 4).sum() / 1000 for one in cohort]
    region = fingerprint.regions["ET"]
    assert (region.subjects, region.absent, region.volume_ml.median) == (6, 0, pytest.approx(np.median(volumes)))
    assert fingerprint.warnings == () and as_text(fingerprint).endswith("no warnings")


def test_volumes_are_those_of_the_subjects_that_have_the_region(cohort, tmp_path):
    region = fingerprint_of(*cohort, made(tmp_path, "x", label=np.where(INSIDE == 4, 1, INSIDE))).regions["ET"]
    assert (region.subjects, region.absent) == (6, 1) and region.volume_ml.min > 0


@settings(max_examples=25)
@given(seed=st.integers(0, 2**16), levels=st.integers(3, 2000))
def test_clipped_voxels_are_those_beyond_the_percentiles(tmp_path_factory, seed, levels):
    """Also where many voxels lie exactly on a percentile."""
    rng = np.random.default_rng(seed)
    image = (rng.integers(0, levels, (20, 20, 20)) ** 2 / levels + 1).astype(np.int16)
    label = np.where(image > np.quantile(image, 0.9), 2, 0).astype(np.uint8)
    image[0], label[0] = 0, 0
    one = made(tmp_path_factory.mktemp("clip"), "a", images={"t1": image, "t2": image}, label=label)
    raw, stats = image[label > 0], one.meta.stats["t1"]
    spacing = stats.std * np.abs(one.image[0].astype(float)).max() * 2.0**-10  # of float16: closer ones are one
    for name, (low, high) in {"0.1-99.9": (stats.p0_1, stats.p99_9), "0.5-99.5": (stats.p0_5, stats.p99_5)}.items():
        counted = one.facts.sequences["t1"].clipped[name]
        sure = ((raw < low - spacing) | (raw > high + spacing)).sum()
        assert sure <= counted <= ((raw < low) | (raw > high)).sum()
    assert one.facts.sequences["t1"].median == pytest.approx(np.median(image[image > 0]), abs=stats.std * 2e-3)
    assert one.facts.labelled_voxels == one.facts.labelled_in_brain == (label > 0).sum()


@settings(max_examples=15)
@given(order=st.permutations(range(6)))
def test_the_file_does_not_depend_on_the_order_of_the_facts(cohort, order, tmp_path_factory):
    index, (first, second) = index_of(cohort), (tmp_path_factory.mktemp("order") for _ in range(2))
    text = write_fingerprint(first, [one.facts for one in cohort], index)
    assert write_fingerprint(second, [cohort[k].facts for k in order], index) == text
    assert (first / "fingerprint.json").read_bytes() == (second / "fingerprint.json").read_bytes()


def test_what_is_written_can_be_read_and_names_no_subject(cohort, tmp_path):
    text = write_fingerprint(tmp_path, [one.facts for one in cohort], index_of(cohort))
    values = json.loads((tmp_path / "fingerprint.json").read_text())
    assert as_text(Fingerprint.model_validate(values)) == text
    values.pop("warnings")
    assert not [one for one in cohort if f'"{one.meta.subject}"' in json.dumps(values) or one.meta.patient in json.dumps(values)]
    assert "t1: 6 subjects (100 %)" in text and "labelled voxels clipped" in text and "WT: " in text


def test_facts_survive_json_and_must_fit_the_index(cohort):
    fact = cohort[0].facts
    assert type(fact).model_validate_json(fact.model_dump_json()) == fact
    with pytest.raises(ValueError, match="not about the same subjects"):
        summarise([one.facts for one in cohort[1:]], index_of(cohort))


def spiked():
    image = head(5)
    image[12, 11, 10] = 32000
    return image


def beyond():
    """A tumour far brighter than the percentiles."""
    image = head(5)
    image[tumour(0, (2,)) > 0] = np.arange(64) * 90 + 900
    return image


def stray():
    label = INSIDE.copy()
    label[0:2, 0:2, 0:2] = 2
    return label


def few_voxels():
    label = tumour(2, (2, 1)) * BRAIN
    label[12, 11, 10] = 4
    return label


THICK = BRATS_AFFINE @ np.diag([1.0, 1, 4, 1])
OTHER = BRATS_AFFINE @ np.diag([1.3, 1, 1, 1])
WARNINGS = {
    "spacing": ([{"affine": OTHER}], "spacing along X differs in the set, 1 to 1.3 mm"),
    "thick": ([{"affine": THICK}], r"strongly anisotropic voxels \(ratio over 3\) in subject x0"),
    "rare": ([{"images": {"t1": head(1)}}] * 7, "t2: only 6 of 13 subjects have it"),
    "constant": ([{"images": {"t1": head(1), "t2": head(1) * 0}}], "t2: carries one value throughout in subject x0; counted as missing"),
    "spike": ([{"images": {"t1": spiked(), "t2": head(1)}}], "t1: voxels more than 30 standard deviations from the mean in subject x0"),
    "full": ([{"images": {"t1": np.abs(head(1)) + 9, "t2": np.abs(head(2)) + 9}}], "the brain fills the volume in subject x0; skull-strip"),
    "outside": ([{"label": stray()}] * 2, r"labelled voxels lie outside the brain in 2 subjects \(x0, x1\), most in x0 \(8\)"),
    "tiny": ([{"label": few_voxels()}] * 4, r"ET: under 0\.05 ml in 4 subjects \(x0, x1, x2, \.\.\.\)"),
    "unlabelled": ([{"label": None}], "no label in subject x0"),
    "clipped": ([{"images": {"t1": beyond(), "t2": head(1)}, "label": tumour(0, (2, 1))}] * 30, r"t1: the percentile range 0\.5-99\.5 clips \d+\.\d % of the labelled voxels; use a wider one"),
}  # fmt: skip


@pytest.mark.parametrize("name", WARNINGS)
def test_a_person_is_warned(cohort, tmp_path, name):
    subjects, message = WARNINGS[name]
    odd = [made(tmp_path, f"x{k}", **changes) for k, changes in enumerate(subjects)]
    fingerprint = fingerprint_of(*cohort, *odd)
    assert any(re.search(message, warning) for warning in fingerprint.warnings), fingerprint.warnings
    assert re.search("WARNING: .*" + message, as_text(fingerprint))
    assert not any(re.search(message, warning) for warning in fingerprint_of(*cohort).warnings)


def test_left_by_convention_a_missing_region_and_a_missing_common_grid_are_told(tmp_path):
    nib.save(nib.Nifti1Image(head(1), None), tmp_path / "t1.nii")
    spec = data_set("t1", "t2", allow_missing=True, preprocessing={"common_grid": "t1"})
    silent = preprocess(case_of({"t1": tmp_path / "t1.nii"}), spec)
    other = made(tmp_path, "b", spec=spec, images={"t2": head(2)}, label=tumour(3, (2,)))
    warnings = "\n".join(fingerprint_of(silent, other).warnings)
    assert "the header does not say where left is in subject s" in warnings
    assert "ET: no subject has it; check the label scheme" in warnings
    assert "most subjects lie on the grid of t2, but not subject s" in warnings


def test_a_set_without_labels_has_a_fingerprint(tmp_path):
    one = made(tmp_path, "a", spec=data_set("t1", "t2", labels=False), label=None)
    index = index_of([one]).model_copy(update={"label_scheme": None})
    fingerprint = summarise([one.facts], index)
    assert fingerprint.regions == {} and fingerprint.labelled == 0 and fingerprint.sequences["t1"].clipped == {}
    assert "label" not in "\n".join(fingerprint.warnings) and "0 with a label" in as_text(fingerprint)
