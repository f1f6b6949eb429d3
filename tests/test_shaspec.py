"""ShaSpec: losses, stages, what the recipe says, ranks with disjoint subsets, both stages through the composition root."""

import json
import math

import pytest
import torch
import yaml
from safetensors.torch import load_file
from small_mst_kdnet import facts
from small_shaspec import CROP, NETWORK, START, SUBSETS, make, make_batch

from mstkd.batch import Progress
from mstkd.config import InferenceConfig, load_config
from mstkd.data.store import ShardStore
from mstkd.engine.schedule import lr_factor
from mstkd.errors import UserError
from mstkd.evaluate.inference import Predictor, predict_logits
from mstkd.evaluate.run import evaluate_run
from mstkd.losses.dice import plain_dice
from mstkd.losses.domain import alignment, classification, undecided
from mstkd.methods import build
from mstkd.methods.shaspec import task_terms
from mstkd.models.recompute import recompute

ALL, ONE, PAIR = (True,) * 4, (False, True, False, False), (True, False, True, False)
FOUR = [(0, m) for m in range(4)]


# alignment


def shared(*values) -> torch.Tensor:
    return torch.stack([torch.full((6, 2, 2, 2), float(value)) for value in values])


def test_alignment_by_hand_has_the_scale_of_the_reference():
    features = shared(1, 0, 0, 0)
    assert float(alignment(features, FOUR, 4)) == pytest.approx(4 / 6 * 3) == pytest.approx(2.0)
    assert float(alignment(features, FOUR, 4, cyclic=True)) == pytest.approx(2.0)
    assert float(alignment(shared(1, 0, 1, 0), FOUR, 4, cyclic=True)) == pytest.approx(4.0)
    assert float(alignment(shared(1, 0, 1, 0), FOUR, 4)) == pytest.approx(4 / 6 * 4)  # all six pairs, two of which are equal


@pytest.mark.parametrize("kind", ["l1", "mse", "kl"])
def test_alignment_is_0_for_equal_features_and_for_a_single_one(kind):
    torch.manual_seed(0)
    feature = torch.randn(1, 6, 2, 2, 2)
    assert float(alignment(feature.expand(4, -1, -1, -1, -1), FOUR, 4, kind)) == 0
    assert float(alignment(feature, [(0, 2)], 4, kind)) == 0
    assert float(alignment(torch.randn(2, 6, 2, 2, 2), [(0, 2), (1, 3)], 4, kind)) == 0  # of two samples
    assert float(alignment(torch.randn(2, 6, 2, 2, 2), [(0, 2), (0, 3)], 4, kind)) > 0


def test_other_kinds_by_hand():
    pairs = [(0, 0), (0, 1)]
    assert float(alignment(shared(1, 4), pairs, 2, "mse")) == pytest.approx(2 * 9)
    p, q = torch.tensor([0.2, 0.8]), torch.tensor([0.5, 0.5])
    features = torch.stack([p.log(), q.log()])[:, :, None, None, None].expand(-1, -1, 2, 2, 2)
    expected = sum(float((a * (a / b).log()).sum()) for a, b in ((p, q), (q, p))) / 2
    assert float(alignment(features, pairs, 2, "kl")) == pytest.approx(2 * expected, rel=1e-5)
    assert float(undecided(torch.zeros(3, 4))) == pytest.approx(0, abs=1e-6)
    logits = torch.tensor([[3.0, 0.0, 0.0, 0.0]])
    assert float(undecided(logits)) == pytest.approx(float(-logits.log_softmax(1).mean()) - math.log(4))


def test_samples_of_a_batch_count_equally_and_do_not_meet():
    pairs = [(0, 0), (0, 3), (1, 1)]
    assert float(alignment(shared(1, 0, 100), pairs, 4)) == pytest.approx((4 * 1 + 0) / 2)


# the other terms


def test_zero_logits():
    target = torch.zeros(1, 3, 10, 10, 10)
    target[:, :, :5] = 1  # half of 1000 voxels
    terms = task_terms(torch.zeros_like(target), target, reference_dice=True)
    assert float(terms["dice"]) == pytest.approx(0.500500, abs=1e-6) and float(terms["bce"]) == pytest.approx(2.079442, abs=1e-6)
    dco = float(classification(torch.zeros(4, 4), FOUR))
    assert dco == pytest.approx(1.386294, abs=1e-6)
    dao = float(alignment(shared(1, 1, 1, 1), FOUR, 4))
    assert float(terms["dice"] + terms["bce"]) + 0.1 * dao + 0.02 * dco == pytest.approx(2.607668, abs=1e-6)


def test_dice_of_an_empty_target_teaches_silence_but_in_the_reference_form():
    empty = torch.zeros(1, 1, 10, 10, 10)
    probability = torch.full_like(empty, 0.1).requires_grad_()
    for reference in (False, True):
        loss = plain_dice(probability, empty, reference).sum()
        (gradient,) = torch.autograd.grad(loss, probability)
        assert (gradient.abs().max() == 0) == reference and (float(loss.detach()) == 1) == reference
    full = torch.ones_like(empty)
    assert float(plain_dice(full, full)) == 0 and float(plain_dice(full, full, True)) == pytest.approx(1 - 2000 / 2001, abs=1e-6)


def test_dice_is_the_mean_over_samples_and_not_over_pooled_voxels():
    probability, target = torch.rand(2, 3, 4, 4, 4), (torch.rand(2, 3, 4, 4, 4) > 0.5).float()
    single = torch.stack([plain_dice(probability[n : n + 1], target[n : n + 1]) for n in range(2)])
    torch.testing.assert_close(plain_dice(probability, target), single.mean(0))


# the step


def step_of(method, stage="missing"):
    return method.roles(stage)[stage].step


@pytest.mark.parametrize("kind", ["l1", "ce"])
def test_the_loss_is_the_weighted_sum(kind):
    output = step_of(make(alignment=kind, weights={"dao": 0.3, "dco": 0.7}))(make_batch(PAIR, ONE), {}, START)
    terms = {name: float(value) for name, value in output.scalars.items()}
    assert set(terms) == {"dice", "bce", "dao", "dco"} and not any(value.requires_grad for value in output.scalars.values())
    assert float(output.loss.detach()) == pytest.approx(terms["dice"] + terms["bce"] + 0.3 * terms["dao"] + 0.7 * terms["dco"], rel=1e-6)


@pytest.mark.parametrize("kind", ["l1", "mse", "kl", "ce"])
def test_alignment_trains_the_shared_encoder_alone(kind):
    method = make(alignment=kind)
    step, batch = step_of(method), make_batch(PAIR)
    step._alignment(step.student(batch.image, batch.available)).backward()
    assert moved(method) == {"shared"} | ({"alignment"} if kind == "ce" else set())


def test_classification_trains_the_available_specific_encoders_before_their_pyramids():
    method, batch = make(), make_batch(PAIR)
    student = method.networks["student"]
    output = student(batch.image, batch.available)
    classification(output.domains, output.pairs).backward()
    assert moved(method) == {"specific", "domain"}
    seen = [m for m, encoder in enumerate(student.specific) if any(p.grad is not None and p.grad.abs().max() > 0 for p in encoder.parameters())]
    assert seen == [0, 2]
    pyramids = [p.grad for encoder in student.specific for p in encoder.pyramid.parameters()]
    assert all(gradient is None or gradient.abs().max() == 0 for gradient in pyramids)


def moved(method) -> set[str]:
    """Parts of the networks with a gradient other than 0."""
    parts = [(name, p) for name, p in method.networks["student"].named_parameters()]
    parts += [("alignment", p) for p in method.networks["alignment"].parameters()] if "alignment" in method.networks else []
    return {name.partition(".")[0] for name, p in parts if p.grad is not None and p.grad.abs().max() > 0}


@pytest.mark.parametrize("include", [False, True])
def test_missing_sequences_take_part_in_the_auxiliary_losses_only_where_asked(include):
    step, batch = step_of(make(include_missing=include)).train(), make_batch(ONE)
    output = step(batch, {}, START)
    assert (float(output.scalars["dao"]) > 0) == include
    assert len(step.student(batch.image, batch.available).pairs) == (4 if include else 1)


def test_encoding_zeros_for_the_skips_alone_leaves_the_losses_as_they_are():
    step, batch = step_of(make(network={**NETWORK, "skip_fill": "reference"})).train(), make_batch(ONE)
    assert float(step(batch, {}, START).scalars["dao"]) == 0
    assert len(step.student(batch.image, batch.available).pairs) == 1


def test_every_parameter_gets_a_gradient_whatever_is_missing():
    for kind in ("l1", "ce"):
        method = make(alignment=kind)
        step_of(method).train()(make_batch(ONE), {}, START).loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for net in method.networks.values() for p in net.parameters())


def test_bf16_terms_stay_close_to_float32_and_constant_volumes_finite():
    method, batch = make(), make_batch(PAIR, ALL)
    step = step_of(method)
    exact = step(batch, {}, START)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = step(batch, {}, START)
        batch.image.fill_(3.0)
        flat = step(batch, {}, START)
    assert rough.loss.dtype == torch.float32
    for name, value in exact.scalars.items():
        assert float(rough.scalars[name]) == pytest.approx(float(value), rel=0.1, abs=0.02), name
    flat.loss.backward()
    assert all(p.grad.isfinite().all() for p in step.parameters())


def test_recomputation_changes_nothing():
    losses = []
    for again in (False, True):
        method = make()
        count = recompute(method.networks["student"], method.blocks) if again else 1
        output = step_of(method).train()(make_batch(PAIR), {}, START)
        output.loss.backward()
        norm = sum(float(p.grad.square().sum()) for p in method.networks["student"].parameters())
        losses.append((float(output.loss.detach()), norm))
        assert count == (5 * (4 + 1) + 4 if again else 1)  # bottlenecks and pyramid of five encoders, four steps up
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_few_steps_bring_the_loss_down():
    method, batch = make(), make_batch(ALL, PAIR)
    batch.label = torch.zeros_like(batch.label)
    batch.label[:, 20:] = 4
    batch.image[:, :, 20:] += 2
    step = step_of(method).train()
    optimizer = torch.optim.SGD(step.parameters(), lr=1e-2, momentum=0.9, nesterov=True)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        output = step(batch, {}, START)
        output.loss.backward()
        optimizer.step()
        losses.append(float(output.loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


# stages, as published


def test_stages_and_their_optimiser():
    method = make()
    assert method.stages == ("complete", "missing") and not method.complete_only
    assert method.availability("complete").kind == "natural" and method.availability("missing") is None
    assert method.needs("complete") == {} and method.needs("missing") == {"student": "complete"}
    assert make(alignment="ce").needs("missing") == {"student": "complete", "alignment": "complete"} and make(two_stages=False).needs("missing") == {}
    for stage in method.stages:
        optimizer = method.roles(stage)[stage].optimizer
        assert (optimizer.name, optimizer.lr, optimizer.momentum, optimizer.nesterov, optimizer.weight_decay) == ("sgd", 0.01, 0.99, True, 0)


def test_learning_rate_of_both_stages():
    """The specification counts steps through both stages: 79,999 of 80,000, and 80,000 of 180,000."""
    roles = {stage: make(warm_restart=80_000).roles(stage)[stage] for stage in ("complete", "missing")}
    for stage, step, total, expected in (("complete", 0, 80_000, 1e-2), ("complete", 79_999, 80_000, 3.866e-7), ("missing", 0, 100_000, 5.8919e-3)):
        progress = Progress(step=step, epoch=0, total_steps=total, total_epochs=1)
        assert roles[stage].optimizer.lr * lr_factor(roles[stage].schedule, progress) == pytest.approx(expected, rel=1e-3)


def test_the_channels_are_regions_of_the_datas_scheme():
    """(WT, TC, ET) of the logits: the label values of every scheme, a resection cavity outside all of them."""
    logits = torch.tensor([[1, 1, 1], [1, 1, -1], [1, -1, -1], [-1, -1, -1]]).T[None, :, :, None, None].float()
    for scheme, expected in (("brats2018", [4, 1, 2, 0]), ("brats2023", [3, 1, 2, 0]), ("brats2024", [3, 1, 2, 0]), ("msd_task01", [3, 2, 1, 0])):
        assert make(scheme=scheme).to_labels(logits).flatten().tolist() == expected
    step, batch = step_of(make(scheme="brats2024")), make_batch(ALL, scheme="brats2024")
    cavity = make_batch(ALL, scheme="brats2024")
    cavity.label[batch.label == 4] = 0
    assert torch.equal(step(batch, {}, START).loss, step(cavity, {}, START).loss)


# prediction


def test_voxels_of_a_missing_sequence_never_change_a_prediction():
    method, image = make(), torch.randn(1, 4, *CROP)
    method.networks["student"].eval()
    for subset in SUBSETS[:-1]:
        available = torch.tensor([subset])
        hidden = ~available[:, :, None, None, None]
        clean = method.predict(image, available)
        assert torch.equal(clean, method.predict(image.masked_fill(hidden, math.nan), available)) and not clean.requires_grad


def test_one_tile_is_the_direct_forward_and_small_volumes_are_padded_and_cut(phantom_shards):
    method, image = make(), torch.randn(1, 4, *CROP)
    method.networks["student"].eval()
    available = torch.tensor([PAIR])
    for inference in (InferenceConfig(), InferenceConfig(blend="uniform", average="probabilities", overlap=0.33)):
        tiled = predict_logits(method, "student", image, available, CROP, inference)
        torch.testing.assert_close(tiled, method.predict(image, available), atol=1e-3, rtol=1e-3)
    store = ShardStore(phantom_shards)
    sample = store.subject(next(iter(store.subjects)))
    predictor = Predictor(method, ("flair", "t1", "t1ce", "t2"), CROP, InferenceConfig(), torch.device("cpu"))
    assert sample.brain.shape[0] < CROP[0]
    assert predictor.labels("student", predictor.volume(sample.image, sample.brain, sample.meta), PAIR).shape == sample.brain.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop": (60, 64, 40)}, r"data.crop \[60, 64, 40\]: needs multiples of \[32, 32, 16\], more than one of them; use \[64, 64, 48\]"),
        ({"crop": (32, 32, 16)}, r"more than one of them; use \[64, 32, 16\]"),
        ({"scheme": "tissue3"}, "declares tissue3; it needs one with the regions WT, TC and ET"),
        ({"network": {"width": 6}}, "method.network.width"),
        ({"alignment": "l2"}, "method.alignment"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        make(**change)


def test_a_window_that_does_not_fit_and_missing_labels_are_refused():
    with pytest.raises(UserError, match=r"inference.window \[48, 32, 16\]"):
        make().predict(torch.rand(1, 4, 48, 32, 16), torch.ones(1, 4, dtype=torch.bool))
    batch = make_batch(ALL)
    batch.label = None
    with pytest.raises(UserError, match="subject-0: no label"):
        step_of(make())(batch, {}, START)


# ranks


@pytest.fixture(scope="module")
def alone(one_rank):
    """Three steps of two micro-batches with disjoint sequences on one rank, ZeRO-0."""
    return one_rank.run("shaspec_ranks.py", "steps", zero=0)[0]


@pytest.mark.parametrize("zero", [1, 3])
def test_ranks_with_disjoint_sequences_train_like_one(zero, alone, two_ranks):
    found = two_ranks.run("shaspec_ranks.py", "steps", zero=zero)
    for rank in range(2):
        for mine, expected in zip(found[rank], alone[rank::2], strict=True):
            assert mine == pytest.approx(expected, rel=1e-4)
    assert sum(terms["loss"] for terms in alone[-2:]) < sum(terms["loss"] for terms in alone[:2])


def test_bf16_under_zero_3(alone, two_ranks):
    found = two_ranks.run("shaspec_ranks.py", "steps", zero=3, precision="bf16")
    for rank in range(2):
        assert found[rank][0]["loss"] == pytest.approx(alone[rank]["loss"], rel=0.05)
        assert all(math.isfinite(value) for terms in found[rank] for value in terms.values())


# through the composition root


def recipe(tmp_path, shards, **train) -> str:
    values = {
        "name": "small", "runs_dir": str(tmp_path), "method": {"name": "shaspec", "network": {**NETWORK, "blocks": [1, 1, 1, 1]}, "warm_restart": 4},
        "data": {"shards": str(shards), "crop": [32, 32, 32], "workers": 0, "foreground_share": 1.0, "availability": {"kind": "size_first"}},
        "train": {"global_batch": 2, "steps": {"complete": 4, "missing": 6}, "log_every": 1, "precision": "fp32", "zero_stage": 1, **train},
        "inference": {"overlap": 0}, "validate": {"every_steps": 100, "max_cases": 1, "subsets": ["flair"]},
    }  # fmt: skip
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(values))
    return str(tmp_path / "small.yaml")


def test_both_stages_train_stop_go_on_and_are_evaluated(two_ranks, phantom_shards, tmp_path):
    small = recipe(tmp_path, phantom_shards)
    whole = two_ranks.run("teacher_ranks.py", "run", recipe=small, overrides=[])[0]
    assert list(whole) == ["complete", "missing"] and whole["complete"].keys() >= {1, 4} and whole["missing"].keys() >= {1, 6}
    assert whole["missing"][6]["train/loss_missing"] < whole["complete"][1]["train/loss_complete"]
    rows = [json.loads(line) for line in (tmp_path / "small/metrics.jsonl").read_text().splitlines()]
    rate = {(row["stage"], row["step"]): row[key] for row in rows if (key := f"lr/{row['stage']}") in row}
    # it starts again: (1 - 4/10)^0.9, after (1 - 3/4)^0.9
    assert rate["missing", 1] == pytest.approx(1e-2 * 0.6**0.9) and rate["complete", 4] == pytest.approx(1e-2 * 0.25**0.9)
    # the second stage began with what the first had learnt
    first = load_file(next((tmp_path / "small/complete/checkpoints").glob("step-*4/complete.safetensors")))
    assert {key.partition(".")[0] for key in first} == {"student"}
    two_ranks.run("teacher_ranks.py", "run", recipe=small, overrides=["name=cut", "stages=[complete]"])
    resumed = two_ranks.run("teacher_ranks.py", "run", recipe=small, overrides=["name=cut"])[0]
    assert resumed["missing"][6]["train/loss_missing"] == pytest.approx(whole["missing"][6]["train/loss_missing"], rel=1e-5)
    summary = evaluate_run(tmp_path / "small")
    assert len(summary["subsets"]) == 15 and 0 <= summary["mean"]["WT"]["dice"] <= 1


def test_a_dedicated_model_sees_one_subset_and_the_evaluation_says_so(two_ranks, phantom_shards, tmp_path):
    words = ["method.two_stages=false", "method.warm_restart=0", "stages=[missing]", "train.steps=2", "data.availability={kind: fixed, subsets: [t1+t2]}"]
    rows = two_ranks.run("teacher_ranks.py", "run", recipe=recipe(tmp_path, phantom_shards), overrides=words)[0]
    assert list(rows) == ["missing"] and math.isfinite(rows["missing"][2]["train/loss_missing"])
    notes = evaluate_run(tmp_path / "small")["conventions"]
    assert "flair+t1+t1ce+t2" in notes["never trained"] and "t1+t2," not in notes["never trained"].replace("+t1+t2", "")


@pytest.mark.parametrize(("name", "width"), [("shaspec_phantom", 8), ("shaspec_brats2018", 64)])
def test_recipes_build(name, width):
    config = load_config(name)
    with torch.device("meta"):
        method = build(config.method, facts(crop=config.data.crop))
    assert method.config.network.width == width and config.data.availability.kind == "size_first"
    assert method.config.warm_restart == config.train.steps["complete"] and set(config.train.roles) <= set(method.stages)
