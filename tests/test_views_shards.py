"""Shard sets of views: the generated digits, folders of files, what is checked of them, what the loader makes of them."""

import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import wavfile
from typer.testing import CliRunner

from mstkd.config import DataConfig, IntensityConfig
from mstkd.data.intensity import Intensity
from mstkd.data.loader import TrainLoader
from mstkd.data.store import BadSample, ShardStore
from mstkd.data.training import open_training
from mstkd.errors import UserError
from mstkd.launch.cli import app
from mstkd.shards.digits import make_digit, write_digits
from mstkd.shards.inspection import montage, table
from mstkd.shards.spec import read_index, read_splits
from mstkd.shards.verify import verify
from mstkd.shards.view_readers import BANDS, FRAMES, log_mel, mel_bands, read_spectrogram
from mstkd.shards.views import build_views


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder / "raw", subjects=60, seed=4)
    return folder / "raw"


@pytest.fixture(scope="module")
def shards(digits):
    build_views(digits, digits.parent / "shards", name="digits", subjects_per_shard=16)
    return digits.parent / "shards"


def small_source(folder: Path, views=("images", "audio")) -> Path:
    """Two classes of four subjects each, s0 to s7, as files."""
    draws = np.random.default_rng(1)
    for number in range(8):
        for view in views:
            (folder / view / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        if "images" in views:
            Image.fromarray(draws.integers(0, 256, (10, 12)).astype(np.uint8)).save(folder / "images" / "ab"[number % 2] / f"s{number}.png")
        if "audio" in views:
            wavfile.write(folder / "audio" / "ab"[number % 2] / f"s{number}.wav", 8000, draws.normal(0, 1000, 4000).astype(np.int16))
    return folder


def vectors_of(folder: Path, count=8, width=5) -> None:
    values = np.random.default_rng(2).normal(size=(count, width))
    lines = ["id," + ",".join(f"e{n}" for n in range(width)), *(f"s{n}," + ",".join(f"{v:.6f}" for v in row) for n, row in enumerate(values))]
    (folder / "embeddings.csv").write_text("\n".join(lines) + "\n")


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_a_generated_digit_depends_on_seed_and_index_alone():
    one, same, other = make_digit(13, seed=1), make_digit(13, seed=1), make_digit(13, seed=2)
    assert one.digit == 3 and one.image.shape == (28, 28) and one.audio.dtype == np.int16
    assert (one.image == same.image).all() and (one.audio == same.audio).all()
    assert (one.image != other.image).any() and (one.audio != other.audio).any()


def test_same_files_give_the_same_bytes_and_verify_passes(digits, shards, tmp_path):
    write_digits(tmp_path / "raw", subjects=60, seed=4)
    build_views(tmp_path / "raw", tmp_path / "again", name="digits", subjects_per_shard=16)
    assert digests(tmp_path / "again") == digests(shards)
    index = verify(shards)
    assert index.sequences == ("image", "audio") and index.classification.classes == tuple("0123456789")
    assert index.classification.views == {"image": (28, 28), "audio": (BANDS, FRAMES)}


def test_splits_are_stratified_by_class_and_tars_are_mixed(shards):
    splits, store = read_splits(shards), ShardStore(shards)
    label = {key: store.subject(key).label for key in store.subjects}
    assert len(splits.test) == 12 and len(splits.folds) == 5
    assert max(Counter(label[key] for key in splits.test).values()) <= 2
    for fold in splits.folds:
        assert set(fold.train) | set(fold.val) | set(splits.test) == set(label)
    assert all(len({label[entry.subject] for entry in tar.subjects}) >= 6 for tar in store.index.shards[:3])


def test_what_is_stored_is_the_file_z_scored(digits, shards):
    store = ShardStore(shards)
    sample = store.subject("digit_00007")
    pixels = np.asarray(Image.open(digits / "images/7/digit_00007.png")).astype(float)
    assert store.index.classification.classes[sample.label] == sample.meta.label == "7"
    np.testing.assert_allclose(sample.views["image"], (pixels - pixels.mean()) / pixels.std(), atol=2e-3)
    stats = sample.meta.stats["image"]
    np.testing.assert_allclose(sample.views["image"].astype(float) * stats.std + stats.mean, pixels, atol=0.2)


def test_a_tone_lights_the_mel_band_that_holds_it():
    rate = 8000
    time = np.arange(rate) / rate
    for hertz in (300.0, 1000.0, 2500.0):
        picture = log_mel(np.sin(2 * np.pi * hertz * time), rate)
        assert picture.shape == (BANDS, FRAMES) and np.isfinite(picture).all()
        mel = 2595 * np.log10(1 + np.array([50, hertz, 4000]) / 700)
        expected = (mel[1] - mel[0]) / (mel[2] - mel[0]) * (BANDS + 1) - 1
        assert abs(picture.mean(axis=1).argmax() - expected) <= 1
    np.testing.assert_allclose(mel_bands(np.linspace(0, 4000, 129)).sum(axis=1), 1)


@pytest.mark.parametrize("kind", ["stereo", "uint8", "float32", "longer", "shorter"])
def test_recordings_of_other_kinds_give_about_the_same_spectrogram(tmp_path, kind):
    wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(8000) / 8000)
    made = {"stereo": np.stack([wave, wave], 1), "uint8": 128 + 127 * wave, "float32": wave, "longer": np.r_[wave, wave], "shorter": wave[:7990]}[kind]
    made = {"uint8": made.astype(np.uint8), "float32": made.astype(np.float32)}.get(kind, (2**15 * made).astype(np.int16))
    wavfile.write(tmp_path / "a.wav", 8000, made)
    wavfile.write(tmp_path / "b.wav", 8000, (2**15 * wave).astype(np.int16))
    one, other = (read_spectrogram(tmp_path / name, 1.0) for name in ("a.wav", "b.wav"))
    assert np.corrcoef(one.ravel(), other.ravel())[0, 1] > 0.95


def test_an_image_and_an_embedding_make_a_set_and_a_subject_may_lack_one(tmp_path):
    source = small_source(tmp_path / "src", views=("images",))
    vectors_of(source)
    (source / "images/a/s0.png").unlink()
    with pytest.raises(UserError, match="embeddings.csv: id 's0' has no file, and so no class"):
        build_views(source, tmp_path / "out")
    small_source(source)
    (source / "images/a/s0.png").unlink()
    (source / "embeddings.csv").write_text("\n".join((source / "embeddings.csv").read_text().splitlines()[:-1]) + "\n")
    (source / "patients.csv").write_text("id,patient\n" + "".join(f"s{n},p{n // 2}\n" for n in range(8)))
    index = build_views(source, tmp_path / "out")
    assert index.classification.views == {"image": (10, 12), "audio": (BANDS, FRAMES), "embedding": (5,)}
    entries = index.subjects()
    assert entries["s0"].sequences == ("audio", "embedding") and entries["s7"].sequences == ("image", "audio")
    assert entries["s5"].patient == "p2"
    verify(tmp_path / "out")
    views = ShardStore(tmp_path / "out").subject("s1").views
    expected = np.loadtxt(source / "embeddings.csv", delimiter=",", skiprows=2, max_rows=1, usecols=range(1, 6))
    np.testing.assert_allclose(views["embedding"], (expected - expected.mean()) / expected.std(), atol=2e-3)


def broken(source: Path, name: str) -> str:
    """Break the source in one way; a part of the message that must come."""
    image, audio = source / "images/a/s0.png", source / "audio/b/s1.wav"
    match name:
        case "text for an image":
            image.write_text("no image")
            return "s0.png: cannot be read as an image"
        case "cut image":
            image.write_bytes(image.read_bytes()[:60])
            return "s0.png: cannot be read as an image"
        case "another size":
            Image.fromarray(np.zeros((9, 12), np.uint8)).save(image)
            return "bring them to one size"
        case "text for a recording":
            audio.write_text("no recording at all, but long enough for a header")
            return "s1.wav: cannot be read as WAV"
        case "empty recording":
            wavfile.write(audio, 8000, np.zeros(0, np.int16))
            return "s1.wav: is empty or holds values that are not finite"
        case "nan in a recording":
            wavfile.write(audio, 8000, np.full(4000, np.nan, np.float32))
            return "s1.wav: is empty or holds values that are not finite"
        case "two classes":
            shutil.copy(image, source / "images/b/s0.png")
            return "s0 is in class a too"
        case "another ending":
            image.rename(image.with_suffix(".jpg"))
            return "s0.jpg: expected <id>.png"
        case "a dot in the id":
            image.rename(image.with_name("s.0.png"))
            return "s.0.png: expected <id>.png"
        case "one view":
            shutil.rmtree(source / "audio")
            return "two views are needed, there is image alone"
        case "one class":
            shutil.rmtree(source / "audio/b"), shutil.rmtree(source / "images/b")
            return "all subjects are of class a"
        case _:
            return broken_table(source, name)


def broken_table(source: Path, name: str) -> str:
    """As `broken`, in what is given as CSV."""
    match name:
        case "a word in a vector":
            (source / "embeddings.csv").write_text("id,e0\ns0,much\n")
            return "every column but id holds a number"
        case "infinity in a vector":
            (source / "embeddings.csv").write_text("id,e0,e1\ns0,inf,1\n")
            return "not finite"
        case "a short line":
            (source / "embeddings.csv").write_text("id,e0,e1\ns0,1,2\ns1,1\n")
            return "embeddings.csv:3: 2 columns, the first line has 3"
        case "an id twice":
            (source / "embeddings.csv").write_text("id,e0\ns0,1\ns0,2\n")
            return "embeddings.csv:3: id 's0' is there twice"
        case "no patient":
            (source / "patients.csv").write_text("id,patient\ns0,p0\n")
            return "no patient of letters, digits, - and _ for id"


@pytest.mark.parametrize("name", [
    "text for an image", "cut image", "another size", "text for a recording", "empty recording", "nan in a recording", "two classes", "another ending",
    "a dot in the id", "one view", "one class", "a word in a vector", "infinity in a vector", "a short line", "an id twice", "no patient",
])  # fmt: skip
def test_a_bad_source_is_one_line_and_leaves_nothing(tmp_path, name):
    source = small_source(tmp_path / "src")
    expected = broken(source, name)
    with pytest.raises(UserError) as caught:
        build_views(source, tmp_path / "out")
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]


@pytest.mark.parametrize(("change", "expected"), [
    (lambda index: index["classification"]["views"].update(image=[28, 90]), "image.npy has .* bytes, which does not fit shape"),
    (lambda index: index["classification"]["views"].update(image=[]), "view image has no shape of an array"),
    (lambda index: index["classification"].update(classes=["0", "0"]), "lists class 0 twice"),
    (lambda index: index["classification"].update(classes=["0"]), "fewer than two classes"),
    (lambda index: index["sequences"].reverse(), "its views image, audio are not the sequences audio, image"),
    (lambda index: index["shards"][0]["subjects"][0].update(sequences=["image"]), "which do not fit"),
])  # fmt: skip
def test_an_index_that_cannot_be_true_is_refused(shards, tmp_path, change, expected):
    copy = shutil.copytree(shards, tmp_path / "copy")
    index = json.loads((copy / "index.json").read_text())
    change(index)
    (copy / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=expected):
        ShardStore(copy)


def test_damage_inside_a_tar_is_found_by_verify_and_by_the_reader(shards, tmp_path):
    copy = shutil.copytree(shards, tmp_path / "copy")
    entry = next(iter(read_index(copy).shards[0].subjects))
    tar, (offset, size) = copy / read_index(copy).shards[0].file, entry.members["meta.json"]
    data = tar.read_bytes()
    tar.write_bytes(data[:offset] + data[offset : offset + size].replace(b'"label":"', b'"label":"x', 1)[:size] + data[offset + size :])
    with pytest.raises(UserError, match=f"{tar.name}: .*sha256 differs"):
        verify(copy)
    with pytest.raises(BadSample, match=f"subject {entry.subject} cannot be decoded"):
        ShardStore(copy).subject(entry.subject)


def batches_of(shards, rank=0, world=1, workers=0, start=0):
    config = DataConfig(shards=[{"path": str(shards)}], workers=workers, availability={"kind": "uniform"})
    training = open_training(config, 3, complete_only=False)
    loader = TrainLoader(training, config, Intensity(IntensityConfig()), global_batch=8, micro_batch=2, total_steps=8, start_step=start, rank=rank, world=world)
    return {(start + s, j): batch for s, step in enumerate(loader) for j, batch in step}


def flat(batch):
    return [*batch.views.values(), batch.label, batch.present, batch.available]


@pytest.mark.parametrize("options", [{"world": 2}, {"workers": 2}, {"start": 3}])
def test_batches_do_not_depend_on_ranks_workers_or_a_resume(shards, options):
    whole = batches_of(shards)
    parts = {}
    for rank in range(options.get("world", 1)):
        parts |= batches_of(shards, rank=rank, **options)
    assert parts.keys() == {key for key in whole if key[0] >= options.get("start", 0)}
    for key, batch in parts.items():
        assert batch.subject == whole[key].subject
        assert all(torch.equal(a, b) for a, b in zip(flat(batch), flat(whole[key]), strict=True))


def test_a_batch_holds_the_stored_views_and_hides_what_the_draw_says(shards):
    store, seen = ShardStore(shards), set()
    for batch in batches_of(shards).values():
        assert batch.label.dtype == torch.int64 and batch.present.all()
        for n, key in enumerate(batch.subject):
            sample = store.subject(key)
            assert sample.label == batch.label[n]
            for m, (name, view) in enumerate(batch.views.items()):
                stored = torch.tensor(sample.views[name]).float()
                assert torch.equal(view[n], stored)
                assert torch.equal(batch.visible()[name][n], stored if batch.available[n, m] else torch.zeros_like(stored))
            seen.add(tuple(batch.available[n].tolist()))
    assert seen == {(True, False), (False, True), (True, True)}


def test_a_view_that_a_subject_lacks_is_zero_and_never_available(tmp_path):
    source = small_source(tmp_path / "src")
    for number in range(0, 8, 2):
        (source / f"audio/a/s{number}.wav").unlink()
    build_views(source, tmp_path / "out")
    lacking = 0
    for batch in batches_of(tmp_path / "out").values():
        for n, key in enumerate(batch.subject):
            if int(key[1]) % 2 == 0:
                lacking += 1
                assert batch.present[n].tolist() == batch.available[n].tolist() == [True, False] and not batch.views["audio"][n].any()
    assert lacking


@pytest.mark.parametrize(("section", "expected"), [
    ({"crop": (8, 8, 8)}, "data.crop: is for volumes, and .* holds views of image and audio; remove the key"),
    ({"augment": {"noise_std": 0.1}}, "data.augment: is for volumes"),
    ({"crops": "fixed"}, "data.crops: is for volumes"),
])  # fmt: skip
def test_keys_for_volumes_are_refused(shards, section, expected):
    with pytest.raises(UserError, match=expected):
        open_training(DataConfig(shards=[{"path": str(shards)}], **section), 0, complete_only=False)


def test_the_commands_build_verify_and_show_a_set(tmp_path):
    run = CliRunner().invoke
    assert run(app, ["shards", "phantom", "--digits", "--out", f"{tmp_path}/raw", "--subjects", "20"]).exit_code == 0
    built = run(app, ["shards", "views", "--src", f"{tmp_path}/raw", "--out", f"{tmp_path}/set", "--name", "digits"])
    assert built.exit_code == 0 and "wrote 20 subjects of 10 classes, image and audio, in 1 tars" in built.stdout
    assert run(app, ["shards", "verify", f"{tmp_path}/set"]).exit_code == 0
    assert table(tmp_path / "set").row_count == 20
    picture = montage(tmp_path / "set", tmp_path / "look.png")
    assert Image.open(picture).size[0] > 100
    with pytest.raises(UserError, match="--digits: has no brains"):
        run(app, ["shards", "phantom", "--digits", "--paired-7t", "--out", f"{tmp_path}/x"], catch_exceptions=False)
