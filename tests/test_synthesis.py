"""Synthesis runs on real shard sets: what is measured, what is left out, ranks, the way back, validation, what goes wrong."""

import shutil
from dataclasses import asdict

import numpy as np
import pytest
import torch
from monai.metrics.regression import compute_ssim_and_cs
from safetensors.torch import load_file, save_file
from small_synthesis import PAIRS, SEQUENCES, SINGLE, SIZE, read_rows, root, run, write  # noqa: F401  (root and run are fixtures)
from tiny_shards import write_set
from trained_run import method_and_source

from mstkd.config import InferenceConfig, SliceConfig, ValidateConfig
from mstkd.data.store import ShardStore
from mstkd.data.training import open_stores
from mstkd.engine.environment import Ranks
from mstkd.errors import UserError
from mstkd.evaluate.completion import Completer
from mstkd.evaluate.inference import evaluation_mode
from mstkd.evaluate.run import evaluate_run
from mstkd.evaluate.source import CaseSource
from mstkd.evaluate.synthesis import Truth, copied, psnr, rectangle, score_completions, ssim
from mstkd.evaluate.validation import Validation
from mstkd.run_folder import read_run_config
from mstkd.subsets import all_subsets, possible_subsets, proper
from mstkd.trained_run import open_run


@pytest.fixture(scope="module")
def noisy(root):
    """A run of a sampler that takes any sequences."""
    return write(root, "noisy", {"name": "toys.copying", "noise": 0.1}, 24, validate={"subsets": ["t1", "flair+t2"], "max_cases": 1})


def by_hand(sample):
    """(K, 4, S, S) in [0, 1] and WT (K, S, S) of the slices with 5 % brain, from the stored case, without Completer and Plane."""
    (x0, x1), (y0, y1), _ = sample.meta.crop_box
    images, tumours = [], []
    for k in range(sample.brain.shape[2]):
        if sample.brain[..., k].sum() < 0.05 * SIZE**2:
            continue
        image, tumour = np.zeros((4, SIZE, SIZE)), np.zeros((SIZE, SIZE), bool)
        for m, name in enumerate(SEQUENCES):
            stats = sample.meta.stats[name]
            raw = sample.image[m, ..., k].astype(np.float64) * stats.std + stats.mean
            image[m, x0:x1, y0:y1] = np.clip((raw - stats.p0_1) / (stats.p99_9 - stats.p0_1), 0, 1) * sample.brain[..., k]
        tumour[x0:x1, y0:y1] = sample.label[..., k] > 0
        images.append(image), tumours.append(tumour)
    return np.stack(images), np.stack(tumours)


# what is measured


def test_psnr_of_a_constant_error_and_of_none():
    truth = np.random.default_rng(0).random((16, 16)).astype(np.float32) * 0.9
    assert psnr(truth + np.float32(0.1), truth) == pytest.approx(20.0, abs=1e-5)
    assert psnr(truth + np.float32(0.01), truth) == pytest.approx(40.0, abs=1e-4)
    assert psnr(truth, truth) == 100.0


def test_ssim_is_one_for_equal_images_and_agrees_with_another_implementation():
    draws = np.random.default_rng(0)
    for size, noise in ((11, 0.2), (40, 0.05), (64, 0.5)):
        truth = draws.random((size, size)).astype(np.float32)
        image = np.clip(truth + noise * draws.standard_normal((size, size)), 0, 1).astype(np.float32)
        assert ssim(truth, truth) == pytest.approx(1.0, abs=1e-12)
        theirs, _ = compute_ssim_and_cs(torch.tensor(image)[None, None], torch.tensor(truth)[None, None], 2, (11, 11), (1.5, 1.5))
        assert ssim(image, truth) == pytest.approx(theirs.mean().item(), abs=1e-4)


def test_ssim_of_a_volume_looks_at_windows_that_lie_inside_it_along_every_axis():
    draws = np.random.default_rng(1)
    truth = draws.random((20, 16, 13)).astype(np.float32)
    image = np.clip(truth + 0.2 * draws.standard_normal(truth.shape), 0, 1).astype(np.float32)
    theirs, _ = compute_ssim_and_cs(torch.tensor(image)[None, None], torch.tensor(truth)[None, None], 3, (11,) * 3, (1.5,) * 3)
    assert ssim(image, truth) == pytest.approx(theirs.mean().item(), abs=1e-4)


def test_a_rectangle_is_the_smallest_one_and_grows_to_the_window_inside_the_image():
    mask = np.zeros((40, 30), bool)
    assert rectangle(mask) is None
    mask[10:30, 5:25] = True
    assert rectangle(mask) == (slice(10, 30), slice(5, 25))
    for place, box in (((0, 29), (slice(0, 11), slice(19, 30))), ((20, 15), (slice(15, 26), slice(10, 21))), ((39, 2), (slice(29, 40), slice(0, 11)))):
        mask[:] = False
        mask[place] = True
        assert rectangle(mask) == box
    mask[30:40] = True
    assert rectangle(mask) == (slice(29, 40), slice(0, 30))


@pytest.fixture(scope="module")
def parts(root):
    """Completer, source and a case with a tumour, of the method that copies."""
    method, source = method_and_source(root / "shards", SINGLE, None, SIZE)
    completer = Completer(method, source.sequences, SliceConfig(size=SIZE), InferenceConfig(precision="fp32", batch=4), torch.device("cpu"))
    key = next(key for key in source.subjects("all") if source.subject(key).label.any())
    return completer, source, key


def test_local_figures_ignore_what_is_outside_the_rectangle(parts):
    completer, source, key = parts
    case = completer.slices(source.subject(key))
    truth, completed = Truth.of(completer, case, source), completer.unit(case.image) * 0.9
    before = truth.likeness(completed, 1, True, None)
    changed = completed.clone()
    for n, box in enumerate(truth.local):
        outside = torch.ones(SIZE, SIZE, dtype=torch.bool)
        outside[box or (slice(0), slice(0))] = False
        changed[n, 1][outside] = 0.77
    after = truth.likeness(changed, 1, True, None)
    assert (after.local_psnr, after.local_ssim) == (before.local_psnr, before.local_ssim) and before.local_slices > 0
    assert after.psnr != before.psnr and after.ssim != before.ssim
    changed[:, 0] = 0.5  # another channel
    assert truth.likeness(changed, 1, True, None) == after


def test_slices_with_enough_brain_are_the_ones_looked_at(parts):
    completer, source, key = parts
    sample = source.subject(key)
    images, tumours = by_hand(sample)
    case = completer.slices(sample)
    assert 0 < len(case.position) == len(images) < sample.brain.shape[2]
    np.testing.assert_allclose(completer.unit(case.image).numpy(), images, atol=1e-5)
    np.testing.assert_array_equal(case.label.numpy() > 0, tumours)
    assert len(completer.slices(sample, min_brain=0).position) == sample.brain.shape[2]
    with pytest.raises(UserError, match=f"subject {key}: no axial slice of it is 99 % brain; lower data.slices.min_brain"):
        completer.slices(sample, min_brain=0.99)


def test_copying_scores_as_the_source_against_the_target(run):
    source, rows = open_run(run, tasks=("synthesis",)).source, read_rows(run)
    students = [row for row in rows if row["network"] == "student"]
    assert len(students) == 2 * 12 and {row["pattern"] for row in rows} == set(PAIRS)  # what is given is never a target
    for row in students:
        images, tumours = by_hand(source.subject(row["subject"]))
        given, target = (images[:, SEQUENCES.index(name)] for name in row["pattern"].split("->"))
        assert int(row["slices"]) == len(images) and int(row["local_slices"]) == tumours.any((1, 2)).sum()
        assert float(row["psnr"]) == pytest.approx(np.mean([10 * np.log10(1 / np.mean((a - b) ** 2)) for a, b in zip(given, target)]), abs=1e-3)
        assert float(row["ssim"]) == pytest.approx(np.mean([ssim(a, b) for a, b in zip(given, target)]), abs=1e-4)
        boxes = [(a, b, rectangle(tumour)) for a, b, tumour in zip(given, target, tumours) if tumour.any()]
        assert float(row["local_ssim"]) == pytest.approx(np.mean([ssim(a[box], b[box]) for a, b, box in boxes]), abs=1e-4)
        assert float(row["local_psnr"]) == pytest.approx(np.mean([psnr(a[box], b[box]) for a, b, box in boxes]), abs=1e-3)


# what is shown, and what is left out


def test_nan_in_hidden_sequences_changes_nothing(parts):
    completer, source, key = parts
    sample, subset = source.subject(key), (True, False, True, False)
    spoilt = source.subject(key)
    spoilt.image = spoilt.image.copy()
    spoilt.image[[1, 3]] = np.nan
    with evaluation_mode(completer.method):
        for network in ("student", "teacher"):
            before = completer.complete(network, completer.slices(sample), subset)
            assert torch.equal(completer.complete(network, completer.slices(spoilt), subset), before) and not before.isnan().any()
        np.testing.assert_array_equal(completer.volume("student", spoilt, subset), completer.volume("student", sample, subset))


def tiny(folder, **options):
    """The toy on a set of two cases with 14 x 12 x 10 voxels, slices of 16 x 16."""
    source = CaseSource([ShardStore(write_set(folder, [["a0", "a1"]], **options))])
    method, _ = method_and_source(folder, {"name": "toys.copying"}, None, 16)
    return Completer(method, SEQUENCES, SliceConfig(size=16), InferenceConfig(precision="fp32", batch=3), torch.device("cpu")), source


def test_a_case_is_left_out_of_patterns_whose_sequences_it_lacks(tmp_path):
    completer, source = tiny(tmp_path / "set", present={"a1": ("t1", "t2")})
    rows = score_completions(completer, ["student"], source, ["a0", "a1"], all_subsets(SEQUENCES))
    assert {row.pattern for row in rows if row.subject == "a1"} == {"t1->t2", "t2->t1"}
    assert len([row for row in rows if row.subject == "a0"]) == 4 * 3 + 6 * 2 + 4
    assert all(row.target not in row.given.split("+") for row in rows)


def test_without_labels_there_are_no_local_figures_and_no_oracle(tmp_path):
    completer, source = tiny(tmp_path / "set", unlabelled=("a1",))
    labelled, unlabelled = (score_completions(completer, ["student"], source, [key], [(True, False, False, True)])[0].score for key in ("a0", "a1"))
    assert labelled.local_psnr is not None and labelled.local_slices == labelled.slices
    assert (unlabelled.local_psnr, unlabelled.local_ssim, unlabelled.local_slices) == (None, None, 0) and unlabelled.psnr > 0
    with pytest.raises(UserError, match="subject a1 has no label, and teacher is given the labels of its cases; leave it out with evaluate.networks"):
        score_completions(completer, ["teacher"], source, ["a0", "a1"], [(True, False, False, True)])


def test_the_result_does_not_depend_on_the_rank_count(noisy, two_ranks):
    shared = two_ranks.run("synthesis_ranks.py", "scores", run=str(noisy))
    trained = open_run(noisy, tasks=("synthesis",))
    keys = trained.source.subjects("all")[:3]
    rows = score_completions(trained.completer(), trained.networks, trained.source, keys, proper(all_subsets(SEQUENCES))[::4])
    figures = validation(noisy, {"subsets": ["t1", "flair+t2"], "max_cases": 1})(trained.method, lambda: False)
    assert shared[0] == shared[1] == ([asdict(row) for row in rows], figures)
    assert len(rows) == 3 * 2 * (3 + 2 + 2 + 1) and {row.network for row in rows} == {"student", "teacher"}
    assert set(figures) == {"score", "ssim", "psnr", "ssim_flair", "ssim_t1", "ssim_t1ce", "ssim_t2"}


def test_a_samplers_draws_belong_to_case_and_slice_and_leave_others_alone(noisy):
    trained = open_run(noisy, tasks=("synthesis",))
    completer, keys = trained.completer(), trained.source.subjects("all")[:2]
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    with evaluation_mode(trained.method):
        one, other = (completer.slices(trained.source.subject(key)) for key in keys)
        first = completer.complete("student", one, (True, False, False, False))
        completer.complete("student", other, (True, False, False, False))
        assert torch.equal(completer.complete("student", one, (True, False, False, False)), first)
        noise = first[:, 1:] - completer.unit(one.image)[:, :1]
    assert noise.std() > 0.01 and torch.equal(torch.rand(1), expected)


# the way back


@pytest.mark.parametrize("size", [SIZE, 2 * SIZE, 24])
def test_a_completed_volume_lies_on_the_stored_grid(root, size):
    method, source = method_and_source(root / "shards", SINGLE, None, size)
    completer = Completer(method, SEQUENCES, SliceConfig(size=size), InferenceConfig(precision="fp32", batch=16), torch.device("cpu"))
    sample = source.subject(source.subjects("all")[0])
    inside = sample.brain > 0
    with evaluation_mode(method):
        volume = completer.volume("student", sample, (False, True, False, False))
    assert volume.shape == sample.image.shape and volume.dtype == np.float32
    assert not volume[:, ~inside].any() and volume.min() >= 0 and volume.max() <= 1
    stats = sample.meta.stats["t1"]
    raw = sample.image[1].astype(np.float64) * stats.std + stats.mean
    np.testing.assert_allclose(volume[1][inside], np.clip((raw - stats.p0_1) / (stats.p99_9 - stats.p0_1), 0, 1)[inside], atol=1e-5)
    copied, given = volume[0], volume[1]  # the toy copies
    if size == SIZE:
        np.testing.assert_allclose(copied, given, atol=1e-6)
    shifts = [np.abs(np.roll(copied, (x, y), (0, 1)) - given)[inside].mean() for x in (-1, 0, 1) for y in (-1, 0, 1)]
    assert np.argmin(shifts) == 4  # there and back nothing moves
    assert all(copied[..., k].any() for k in np.flatnonzero(inside.any((0, 1))))


# validation


def validation(run, section, possible=None):
    config = read_run_config(run)
    config.validation = ValidateConfig(**section)
    return Validation(config, open_stores(config.data), Ranks(0, 1, 0, torch.device("cpu")), possible)


def test_a_validation_scores_what_differs_from_what_is_given(run):
    trained = open_run(run, tasks=("synthesis",))
    figures = validation(run, {"max_cases": 1}, trained.method.subsets)(trained.method, lambda: False, "student")
    key = trained.source.subjects("val")[:1]
    rows = score_completions(trained.completer(), ["student"], trained.source, key, possible_subsets(SEQUENCES, SEQUENCES))
    assert figures["score"] == figures["ssim"] == pytest.approx(np.mean([row.score.ssim for row in rows]))
    assert figures["psnr"] == pytest.approx(np.mean([row.score.psnr for row in rows]))
    assert figures["ssim_t1ce"] == pytest.approx(np.mean([row.score.ssim for row in rows if row.target == "t1ce"]))
    few = validation(run, {"max_cases": 1, "subsets": ["t1"]}, trained.method.subsets)(trained.method, lambda: False, "student")
    assert set(few) == {"score", "ssim", "psnr", "ssim_flair", "ssim_t1ce", "ssim_t2"}
    assert few["ssim"] == pytest.approx(np.mean([row.score.ssim for row in rows if row.given == "t1"]))


def test_a_validation_by_any_subset_leaves_out_the_complete_one(noisy):
    assert validation(noisy, {}).subsets == proper(all_subsets(SEQUENCES))


@pytest.mark.parametrize(
    ("subsets", "possible", "expected"),
    [
        (["t1", "pd"], None, r"validate.subsets: subset 'pd': join different ones of flair, t1, t1ce, t2"),
        (["t1", "flair+t1+t1ce+t2"], None, r"validate.subsets: flair\+t1\+t1ce\+t2 leaves nothing to synthesise; remove it from the list"),
        (["t1+t2"], SEQUENCES, r"validate.subsets: the method cannot be given t1\+t2; choose from flair, t1, t1ce, t2"),
    ],
)
def test_validation_subsets_that_make_no_sense_are_refused(run, subsets, possible, expected):
    with pytest.raises(UserError, match=expected):
        validation(run, {"subsets": subsets}, possible)


# what goes wrong


def test_every_error_is_one_clear_line(run, root, tmp_path):
    def fails(match, *arguments, **named):
        with pytest.raises(UserError, match=match) as caught:
            evaluate_run(*arguments, **named)
        assert "\n" not in str(caught.value)

    fails(r"inference.postprocess cc\+et: is for label maps of tumours", run, postprocess="cc+et")
    fails("split 'tset': choose one of test, val", run, split="tset")
    other = tmp_path / "other"
    shutil.copytree(root / "shards", other)
    (other / "index.json").write_text((other / "index.json").read_text().replace('"brats2018"', '"brats2023"'))
    fails("has another label scheme than teacher, which is given labels, learned from; set evaluate.networks", run, data=other, allow_overlap=True)
    zscore = write(root, "zscore", {"name": "toys.copying", "intensity": {"kind": "zscore"}})
    fails("method.intensity: z-scores have no smallest and largest value", zscore)
    diverged = write(root, "diverged", {**SINGLE, "given": ["flair"]}, evaluate={"networks": ["student"]})
    weights = next(diverged.glob("copy/checkpoints/*/*.safetensors"))
    save_file({name: tensor * np.nan for name, tensor in load_file(weights).items()}, weights)
    fails(r"network student: what it makes of case Phantom_\d+ from flair is not a number; look at the loss of its training", diverged)
    volumes = root / "runs" / "toy"
    with pytest.raises(UserError, match="toys.linear is for segmentation; this command takes runs of synthesis"):
        open_run(volumes, tasks=("synthesis",))
