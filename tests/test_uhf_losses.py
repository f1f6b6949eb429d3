"""Losses of UHF-guided segmentation against the values of its specification."""

import math

import pytest
import torch

from mstkd.losses.adversarial import least_squares_critic_loss, least_squares_deception_loss
from mstkd.losses.classes import class_dice, edge_weights, frequency_weights, weighted_cross_entropy
from mstkd.losses.distillation import feature_matching, moment_matching
from mstkd.methods._terms import weighted
from mstkd.methods.uhf_guided import WeightConfig, keeper_terms, teacher_terms
from mstkd.shards.spec import LABEL_SCHEMES
from mstkd.targets import ExclusiveClasses

IMAGE = (2, 1, 6, 5, 4)


def maps(shift: float = 0.0) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, c, 4, 3, 2) + shift for c in (2, 4, 8, 16, 32)]


def test_a_perfect_teacher_has_no_loss_and_a_constant_error_costs_a_hundred_times_itself():
    image, features = torch.rand(IMAGE), maps()
    assert float(weighted(teacher_terms(image, image, features, features[:4]), WeightConfig()).loss) == 0
    assert float(weighted(teacher_terms(image + 0.25, image, features, features[:4]), WeightConfig()).loss) == pytest.approx(25, rel=1e-5)


def test_the_teachers_maps_and_its_head_are_both_taught():
    features, predicted = ([x.requires_grad_() for x in maps(shift)] for shift in (0, 1))
    image = torch.rand(IMAGE)
    weighted(teacher_terms(image, image, features, predicted[:4]), WeightConfig()).loss.backward()
    assert all(x.grad.any() for x in (*features[:4], *predicted[:4])) and features[4].grad is None


@pytest.mark.parametrize("k", [0.0, 0.5, -2.0])
def test_features_moved_by_a_constant_cost_five_times_its_square_twice(k):
    assert float(feature_matching(maps(), maps(k))) == pytest.approx(5 * k**2, rel=1e-5)
    assert float(moment_matching(maps(), maps(k))) == pytest.approx(5 * k**2, rel=1e-4, abs=1e-10)


def test_spread_features_cost_what_their_standard_deviation_says():
    one, other = torch.tensor([-1.0, 1.0])[None, :, None, None, None], torch.tensor([-3.0, 3.0])[None, :, None, None, None]
    assert float(moment_matching([one], [other])) == pytest.approx(4)  # biased: 1 and 3
    flat = torch.ones(1, 4, 2, 2, 2, requires_grad=True)
    moment_matching([torch.rand(1, 4, 2, 2, 2)], [flat]).backward()
    assert flat.grad.isfinite().all()


def test_the_keepers_loss_is_that_of_its_parts():
    image, score = torch.rand(IMAGE), torch.full((2, 1, 3, 3, 3), 0.5)
    output = weighted(keeper_terms(maps(0.5), maps(), image + 0.1, image, score), WeightConfig())
    assert float(output.loss) == pytest.approx(1.25 + 1.25 + 10 + 0.125, rel=1e-4)


def test_a_critic_that_cannot_tell_costs_a_quarter():
    half = torch.full((1, 1, 3, 3, 3), 0.5)
    assert float(least_squares_critic_loss(half, half)) == 0.25 and float(least_squares_deception_loss(half)) == 0.125
    assert float(least_squares_critic_loss(torch.ones(2), torch.zeros(2))) == 0 == float(least_squares_deception_loss(torch.ones(2)))


@pytest.mark.parametrize(("classes", "value"), [(4, 1.386294), (28, 3.332205), (16, 2.772589)])
def test_cross_entropy_at_uniform_logits(classes, value):
    target = torch.zeros(1, 6, 6, dtype=torch.int64)
    assert float(torch.nn.functional.cross_entropy(torch.zeros(1, classes, 6, 6), target)) == pytest.approx(value, abs=2e-6)
    assert float(weighted_cross_entropy(torch.zeros(1, classes, 6, 6), target)) == pytest.approx(math.log(classes), abs=2e-6)


def test_weights_of_one_label_and_of_two_halves():
    single = torch.full((1, 4, 6, 5), 2)
    assert torch.equal(frequency_weights(single, 4) + edge_weights(single), torch.ones(1, 4, 6, 5))
    halves = torch.zeros(1, 4, 6, 5, dtype=torch.int64)
    halves[:, :, 3:] = 1
    expected = torch.ones(1, 4, 6, 5)
    expected[:, :, 2:4] += 5
    assert torch.equal(frequency_weights(halves, 4) + edge_weights(halves), expected)


def test_rare_classes_weigh_more_and_five_times_at_most():
    target = torch.zeros(1, 100, dtype=torch.int64)
    target[:, :30], target[:, 30:32] = 1, 2
    found = frequency_weights(target, 5)
    assert found[0, [0, 30, 99]].tolist() == pytest.approx([1.0, 5.0, 30 / 68])


def test_thin_structures_are_all_border():
    target = torch.zeros(1, 5, 5, dtype=torch.int64)
    target[:, 2, 2] = 1
    assert edge_weights(target)[0, 2, 2] == 5 and int((edge_weights(target) > 0).sum()) == 5


def test_dice_of_classes_leaves_absent_ones_out():
    target = torch.tensor([[[0, 0, 1, 1]]])
    logits = 50 * torch.nn.functional.one_hot(target, 4).movedim(-1, 1).float()
    assert float(class_dice(logits, target)) == pytest.approx(0, abs=1e-6)
    assert float(class_dice(logits, target, "counted")) == pytest.approx(0.5, abs=1e-6)  # two of the four classes


@pytest.mark.parametrize("scheme", ["tissue3", "malc27", "brats2018"])
def test_every_label_becomes_one_class_and_comes_back(scheme):
    classes = ExclusiveClasses(LABEL_SCHEMES[scheme])
    label = torch.tensor(LABEL_SCHEMES[scheme].values, dtype=torch.uint8).reshape(1, -1, 1, 1)
    onehot = torch.nn.functional.one_hot(classes.encode(label), classes.count).movedim(-1, 1)
    assert torch.equal(onehot.sum(1), torch.ones_like(onehot.sum(1))) and torch.equal(classes.decode(onehot.float()), label)
