"""Building: any reader can open the tars, the bytes depend on data and spec alone, nothing half-made is left behind."""

import io
import json
import os
import tarfile
from pathlib import Path

import matplotlib.image
import nibabel as nib
import numpy as np
import pytest
import webdataset as wds
from nifti_trees import SHAPE, head, write_case, write_nifti, write_phantom_like
from volume_cases import case_of, data_set

from mstkd.errors import UserError
from mstkd.shards import fingerprint, inspection
from mstkd.shards.build import build
from mstkd.shards.dataset import load_spec
from mstkd.shards.geometry import restore
from mstkd.shards.preprocess import preprocess
from mstkd.shards.progress import rate_text
from mstkd.shards.spec import SubjectMeta, read_index, read_splits
from mstkd.shards.verify import verify

REAL_CASE = Path(__file__).resolve().parents[2] / "shared" / "data" / "real_case"
FLAT_SPEC = """
name: tcga
description: one flat folder
layout: flat
sequences: {flair: "{subject}_flair.nii.gz", t1: "{subject}_t1.nii.gz", t1ce: "{subject}_t1ce.nii.gz", t2: "{subject}_t2.nii.gz"}
label: "{subject}_seg.nii.gz"
label_scheme: brats2018
"""


@pytest.fixture(scope="module")
def src(tmp_path_factory):
    return write_phantom_like(tmp_path_factory.mktemp("cohort") / "src", 7)


@pytest.fixture(scope="module")
def built(src, tmp_path_factory):
    out = tmp_path_factory.mktemp("built") / "set"
    build("phantom", src, out, subjects_per_shard=3)
    return out


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_bytes_do_not_depend_on_workers_or_file_times(src, built, tmp_path):
    for path in src.rglob("*.nii.gz"):
        os.utime(path, (1, 1))
    build("phantom", src, tmp_path / "two", workers=2, subjects_per_shard=3)
    assert contents(tmp_path / "two") == contents(built)
    assert list(contents(built)) == ["fingerprint.json", "index.json", "phantom-000000.tar", "phantom-000001.tar", "phantom-000002.tar", "splits.json"]


def test_plain_tarfile_reads_members_in_order_and_the_index_says_where(built):
    index = read_index(built)
    for shard in index.shards:
        raw = (built / shard.file).read_bytes()
        with tarfile.open(built / shard.file) as tar:
            names = tar.getnames()
        assert names == [f"{e.subject}.{s}" for e in shard.subjects for s in ("image.npy", "brain.npy", "label.npy", "meta.json")]
        for entry in shard.subjects:
            offset, size = entry.members["label.npy"]
            label = np.load(io.BytesIO(raw[offset : offset + size]), allow_pickle=False)
            assert set(np.unique(label)) <= {0, 1, 2, 4}
    assert list(index.subjects()) == [f"Phantom_{i:04d}" for i in range(7)]


def test_webdataset_iterates_with_its_keys(built):
    urls = [str(path) for path in sorted(built.glob("*.tar"))]
    samples = list(wds.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == list(read_index(built).subjects())
    for sample in samples:
        assert {"image.npy", "brain.npy", "label.npy", "meta.json"} <= sample.keys()
        assert json.loads(sample["meta.json"])["subject"] == sample["__key__"]


def test_stored_subject_returns_to_the_files_own_grid(src, built):
    for sample in wds.WebDataset([str(path) for path in sorted(built.glob("*.tar"))], shardshuffle=False):
        label = np.load(io.BytesIO(sample["label.npy"]), allow_pickle=False)
        original = nib.load(src / sample["__key__"] / f"{sample['__key__']}_seg.nii.gz")
        np.testing.assert_array_equal(restore(label, SubjectMeta.model_validate_json(sample["meta.json"])), np.asarray(original.dataobj))


def test_label_volumes_are_those_of_the_files(src, built):
    for subject, entry in read_index(built).subjects().items():
        label = np.asarray(nib.load(src / subject / f"{subject}_seg.nii.gz").dataobj)
        expected = {"WT": (label > 0).sum(), "TC": np.isin(label, (1, 4)).sum(), "ET": (label == 4).sum()}
        assert entry.label_volume_ml == pytest.approx({region: count / 1000 for region, count in expected.items()})


def test_no_path_of_the_source_is_kept(src, built):
    assert not any(str(src).encode() in data for data in contents(built).values())


def test_unlabelled_and_incomplete_subjects(tmp_path):
    spec = tmp_path / "loose.yaml"
    spec.write_text(FLAT_SPEC.replace("name: tcga", "name: loose\nallow_missing: true\nlabels: optional"))
    for seed, subject in enumerate("abcd"):
        files = {name: f"{subject}_{name}.nii.gz" for name in ("flair", "t1", "t1ce", "t2")[: 4 - seed]}
        write_case(tmp_path / "src", subject, files, seed, None if seed % 2 else f"{subject}_seg.nii.gz")
    build(spec, tmp_path / "src", tmp_path / "set")
    entries = verify(tmp_path / "set").subjects()
    assert entries["d"].sequences == ("flair",) and set(entries["d"].fingerprint) == {"flair"}
    assert "label.npy" not in entries["d"].members and entries["d"].label_volume_ml == {}


def test_bytes_are_those_of_webdatasets_own_writer(built):
    for tar in sorted(built.glob("*.tar")):
        stream = io.BytesIO()
        with tarfile.open(tar) as archive, wds.TarWriter(stream, user="mstkd", group="mstkd", mtime=0, encoder=False, compress=False) as writer:
            for member in archive:
                key, _, suffix = member.name.partition(".")
                writer.write({"__key__": key, suffix: archive.extractfile(member).read()})
        assert stream.getvalue() == tar.read_bytes()


def test_text_of_the_fingerprint_is_said(src, tmp_path, capfd):
    build("phantom", src, tmp_path / "set")
    said = capfd.readouterr().err
    assert "7 subjects of 7 patients" in said and "at most" in said and "7 of 7 subjects" in said


def test_progress_says_rate_and_time_left():
    assert rate_text(subjects=20, size_bytes=82_000_000, seconds=8, left=1000) == "2.50 subjects/s, 10.2 MB/s, 0:06:40 left"
    assert rate_text(subjects=0, size_bytes=0, seconds=8, left=10) == ""


@pytest.mark.parametrize("workers", [1, 2])
def test_failed_build_leaves_nothing_and_names_the_file(tmp_path, workers):
    bad = write_phantom_like(tmp_path / "bad", 4)
    write_nifti(bad / "Phantom_0003" / "Phantom_0003_t1.nii.gz", head(0) * 0)
    with pytest.raises(UserError, match=r"Phantom_0003_t1\.nii\.gz: every brain voxel has the same value") as error:
        build("phantom", bad, tmp_path / "set", workers=workers, subjects_per_shard=4)  # one tar, so none is finished
    assert "--resume" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad"]


def test_bad_arguments(src, built, tmp_path):
    with pytest.raises(UserError, match="exists already; use another --out"):
        build("phantom", src, built)
    for wrong, words in (({"workers": 0}, "workers 0"), ({"part": (3, 2)}, "part 3/2"), ({"subjects_per_shard": 0}, "per shard 0")):
        with pytest.raises(UserError, match=words):
            build("phantom", src, tmp_path / "set", **wrong)
    with pytest.raises(UserError, match="only used with --pseudonymise"):
        build("phantom", src, tmp_path / "set", salt_file=tmp_path / "salt")
    write_case(tmp_path / "long" / ("a" * 91), "", {n: f"{'a' * 91}_{n}.nii.gz" for n in ("flair", "t1", "t1ce", "t2")}, 0, f"{'a' * 91}_seg.nii.gz")
    with pytest.raises(UserError, match="91 characters; a key has at most 80"):
        build("phantom", tmp_path / "long", tmp_path / "set", splits=tmp_path / "any")
    write_phantom_like(tmp_path / "two", 2)
    with pytest.raises(UserError, match=r"2 patient\(s\): too few .* --splits"):
        build("phantom", tmp_path / "two", tmp_path / "set")
    splits = tmp_path / "splits.json"
    splits.write_text('{"folds": [{"train": ["Phantom_0000"], "val": ["Phantom_0009"]}]}')
    with pytest.raises(UserError, match="names subject 'Phantom_0009'"):
        build("phantom", src, tmp_path / "set", splits=splits)
    assert not (tmp_path / "set").exists()


def test_table_shows_the_set(built):
    view, splits = inspection.table(built), read_splits(built)
    columns = {column.header: list(column.cells) for column in view.columns}
    assert columns["subject"] == list(read_index(built).subjects())
    folds = {subject: f"val {number}" for number, fold in enumerate(splits.folds) for subject in fold.val}
    assert columns["split"] == [folds.get(subject, "test") for subject in columns["subject"]]
    volumes = [entry.label_volume_ml["WT"] for entry in read_index(built).subjects().values()]
    assert columns["WT (ml)"] == [f"{volume:.1f}" for volume in volumes]


def test_montage_paints_the_label_in_radiological_display(tmp_path):
    write_phantom_like(tmp_path / "src", 3)
    label = np.zeros(SHAPE, np.uint8)
    label[6:8, 7:9, 10] = 4  # the file's axes run to the left and to posterior: this is right and anterior
    label[6:8, 14:16, 10] = 1  # right and posterior
    label[16:18, 7:9, 10] = 2  # left and anterior
    write_nifti(tmp_path / "src" / "Phantom_0000" / "Phantom_0000_seg.nii.gz", label)
    build("phantom", tmp_path / "src", tmp_path / "set")
    picture = matplotlib.image.imread(inspection.montage(tmp_path / "set", tmp_path / "montage.png", subjects=1))
    red, green, blue = np.moveaxis(picture[..., :3], -1, 0)

    def middle(mask):
        """(x, y) of the painted pixels as fractions of the last of five panels."""
        assert mask.any()
        row, column = np.argwhere(mask).mean(axis=0)
        return column / picture.shape[1] * 5 - 4, row / picture.shape[0]

    enhancing = middle((red > 0.5) & (green < 0.3) & (blue < 0.3))
    core = middle((red > 0.5) & (green > 0.45) & (blue < 0.5 * green))
    oedema = middle((green > 1.3 * red) & (green > 1.3 * blue) & (green > 0.3))
    assert 0 < enhancing[0] < 0.5 < oedema[0] < 1 and 0 < core[0] < 0.5
    assert enhancing[1] < core[1] and abs(enhancing[1] - oedema[1]) < 0.05


def correlation(first, second):
    return np.corrcoef(fingerprint.decode(first), fingerprint.decode(second))[0, 1]


def test_fingerprint_sees_through_crop_intensity_map_and_rounding(tmp_path):
    def zscored(data, name):
        return preprocess(case_of({"t1": write_nifti(tmp_path / name, data)}), data_set("t1", labels=False)).image[0]

    raw = head(3)
    stored = fingerprint.encode(zscored(raw, "a.nii"))
    mapped = np.where(raw != 0, np.round(raw * 3.7 + 2000), 0).astype(np.int16)
    assert correlation(stored, fingerprint.encode(zscored(mapped, "b.nii"))) > fingerprint.SAME_SUBJECT_CORRELATION
    assert correlation(stored, fingerprint.encode(np.pad(zscored(raw, "c.nii"), ((2, 0), (0, 2), (1, 1))))) > 0.99999
    assert correlation(stored, fingerprint.encode(zscored(head(4), "d.nii"))) < fingerprint.SAME_SUBJECT_CORRELATION


def test_fingerprint_of_a_known_volume():
    """A solid 32^3 cube: its standard deviation is 32 / sqrt(12), so the blocks reach beyond it and hold shares of it."""
    means = fingerprint.block_means(np.pad(np.full((32, 32, 32), 2.0), 20))
    half = 5**0.5 * np.sqrt((32**2 - 1) / 12 + 1 / 12)  # reach from the centre, in voxels
    width = half / 8
    assert means[8, 8, 8] == pytest.approx(2.0)
    assert means.sum() * width**3 == pytest.approx(2.0 * 32**3)  # nothing is lost


@pytest.mark.skipif(not REAL_CASE.is_dir(), reason=f"no real case at {REAL_CASE}")
def test_real_case(tmp_path):
    spec, splits, key = tmp_path / "tcga.yaml", tmp_path / "splits.json", "TCGA-DU-7294"
    spec.write_text(FLAT_SPEC)
    splits.write_text(json.dumps({"folds": [{"train": [key], "val": [key]}], "test": [key]}))
    with pytest.raises(UserError, match=f"patient {key} is in folds.0.train and in folds.0.val"):
        build(spec, REAL_CASE, tmp_path / "set", splits=splits)
    build(spec, REAL_CASE, tmp_path / "set", splits=splits, allow_overlap=True)
    entry = verify(tmp_path / "set").subjects()[key]
    label = np.asarray(nib.load(REAL_CASE / f"{key}_seg.nii.gz").dataobj)
    assert entry.label_volume_ml["ET"] == 0 and entry.label_volume_ml["WT"] == pytest.approx((label > 0).sum() / 1000)
    dataset = load_spec(spec)
    (case,) = dataset.find_cases(REAL_CASE)
    subject = preprocess(case, dataset)
    np.testing.assert_array_equal(restore(subject.label, subject.meta), label)
    assert min(stats.min for stats in subject.meta.stats.values()) < 0  # negative brain voxels are kept
    wider = np.pad(subject.image[0], ((2, 0), (0, 2), (2, 2)))
    assert correlation(entry.fingerprint["flair"], fingerprint.encode(wider)) > 0.99999
    other = fingerprint.encode(subject.image[0][::-1])  # a mirrored brain is another brain
    assert correlation(entry.fingerprint["flair"], other) < 0.9
