"""Losses of MST-KDNet against closed-form values and invariances."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mstkd.losses.dice import soft_dice
from mstkd.losses.distillation import attention_extremes, consistency, feature_matching, ramp_up, reference_kl, standardised_kl
from mstkd.losses.style import cross_gram, reference_style_matching, style_matching

SHAPE = (2, 4, 6, 5, 4)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def logits_of(*classes: float) -> torch.Tensor:
    return torch.tensor(classes, dtype=torch.float64)[None, :, None, None, None].expand(1, -1, 2, 3, 4).clone()


def attention(layers: int = 4, tokens: int = 12) -> list[torch.Tensor]:
    return [torch.randn(2, 3, tokens, tokens, dtype=torch.float64).softmax(-1) for _ in range(layers)]


# Dice


def test_dice_of_one_half_on_half_positive_voxels_is_a_third():
    target = torch.zeros(1, 4, 4, 4, 4)
    target[:, :, :2] = 1
    torch.testing.assert_close(soft_dice(torch.full_like(target, 0.5), target), torch.full((4,), 1 / 3), atol=1e-5, rtol=0)


def test_dice_of_a_perfect_prediction_is_zero():
    target = (torch.rand(SHAPE) > 0.5).float()
    assert soft_dice(target, target).abs().max() < 1e-6


def test_dice_equals_the_library_form():
    from monai.losses import DiceLoss

    probability, target = torch.rand(SHAPE, dtype=torch.float64), (torch.rand(SHAPE) > 0.7).double()
    library = DiceLoss(squared_pred=True, batch=True, smooth_nr=0.0, smooth_dr=1e-7, reduction="none")
    torch.testing.assert_close(soft_dice(probability, target), library(probability, target).flatten())


def test_dice_of_an_empty_target_has_loss_one_and_no_gradient():
    probability = torch.rand(SHAPE, dtype=torch.float64, requires_grad=True)
    loss = soft_dice(probability, torch.zeros(SHAPE, dtype=torch.float64))
    loss.sum().backward()
    assert torch.equal(loss, torch.ones(4, dtype=torch.float64)) and probability.grad.abs().max() == 0


# Consistency and its ramp


@pytest.mark.parametrize(("epoch", "weight"), [(0, 0.06738), (1, 0.10971), (5, 0.60055), (10, 2.86505), (15, 7.31616), (20, 10), (300, 10)])
def test_ramp(epoch, weight):
    assert 10 * ramp_up(epoch, 20) == pytest.approx(weight, abs=5e-6)


def test_consistency_counts_every_channel():
    full, missing = torch.zeros(SHAPE), torch.zeros(SHAPE)
    missing[:, 3] = 0.5  # the background too
    assert consistency(full, missing).item() == pytest.approx(0.25)


def test_feature_matching_sums_layers_of_different_sizes():
    full = [torch.zeros(1, 2, 3), torch.zeros(1, 5, 7)]
    assert feature_matching(full, [t + 2 for t in full]).item() == pytest.approx(8)


# Logit distillation


@pytest.mark.parametrize(("temperature", "value"), [(7.0, 1.06911), (1.0, 1.22996)])
@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (0.3, 20.0)])
def test_kl_of_two_one_hot_logits(temperature, value, a, b):
    assert standardised_kl(logits_of(a, 0, 0, 0), logits_of(0, b, 0, 0), temperature).item() == pytest.approx(value, abs=1e-5)


@settings(max_examples=30)
@given(scale=st.floats(0.1, 50), shift=st.floats(-100, 100), seed=st.integers(0, 2**31))
def test_kl_ignores_a_positive_affine_change_of_each_voxel(scale, shift, seed):
    generator = torch.Generator().manual_seed(seed)
    full, missing = (torch.randn(SHAPE, dtype=torch.float64, generator=generator) for _ in range(2))
    per_voxel = scale * (1 + torch.rand((2, 1, 6, 5, 4), dtype=torch.float64, generator=generator))
    expected = standardised_kl(full, missing, 7.0)
    assert standardised_kl(full, per_voxel * missing + shift, 7.0).item() == pytest.approx(expected.item(), abs=1e-5)


def test_kl_sees_a_negative_scale():
    full = torch.randn(SHAPE, dtype=torch.float64)
    assert standardised_kl(full, full, 7.0) == 0 and standardised_kl(full, -full, 7.0) > 0.1


def test_kl_is_not_symmetric_and_goes_from_teacher_to_student():
    full, missing = logits_of(3, 1, 0, -1), logits_of(0, 0, 0, 1)
    forward, backward = standardised_kl(full, missing, 1.0), standardised_kl(missing, full, 1.0)
    assert abs(forward - backward) > 0.01

    def soft(logits):  # by hand, one voxel
        x = logits[0, :, 0, 0, 0]
        return ((x - x.mean()) / x.std()).softmax(0)

    p, q = soft(full), soft(missing)
    torch.testing.assert_close(forward, (p * (p / q).log()).sum(), atol=1e-5, rtol=0)


def test_kl_of_constant_logits_has_finite_gradients():
    missing = torch.zeros(SHAPE, requires_grad=True)
    loss = standardised_kl(torch.randn(SHAPE), missing, 7.0)
    loss.backward()
    assert loss.isfinite() and missing.grad.isfinite().all()


def test_reference_kl_by_hand():
    full, missing = torch.randn(SHAPE, dtype=torch.float64), torch.randn(SHAPE, dtype=torch.float64)

    def soft(x):
        return ((x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True) / 7).softmax(1)

    p, q = soft(missing), soft(full)  # the student is the target
    expected = 49 * (p * (p / q).log()).sum() / SHAPE[0] / full.numel()
    torch.testing.assert_close(reference_kl(full, missing, 7.0), expected, atol=1e-9, rtol=1e-5)


# Attention extremes


def test_evd_of_uniform_against_identity_at_120_tokens():
    uniform = [torch.full((1, 12, 120, 120), 1 / 120, dtype=torch.float64)] * 4
    identity = [torch.eye(120, dtype=torch.float64).expand(1, 12, 120, 120)] * 4
    raw = attention_extremes(uniform, identity)
    assert raw.item() == pytest.approx(0.0999862, abs=1e-7)
    scaled = attention_extremes(uniform, identity, scale=120) * (1e8 / 120**4)
    assert scaled.item() == pytest.approx(9.9986e6, rel=1e-5) and scaled.item() == pytest.approx(1e8 * raw.item(), rel=1e-12)


def test_evd_is_the_sum_over_layers_and_statistics():
    full, missing = attention(), attention()
    expected = 0.0
    for layer in range(4):
        for statistic in (lambda m: torch.stack(m).amax(0), lambda m: torch.stack(m).amin(0), lambda m: torch.stack(m).mean(0)):
            expected += (full[layer] * statistic(full) - missing[layer] * statistic(missing)).square().mean()
    torch.testing.assert_close(attention_extremes(full, missing), expected)


@settings(max_examples=20)
@given(heads=st.permutations(range(3)), tokens=st.permutations(range(12)))
def test_evd_ignores_a_common_permutation_of_heads_and_tokens(heads, tokens):
    full, missing = attention(), attention()
    permuted = [[m[:, heads][:, :, tokens][:, :, :, tokens] for m in maps] for maps in (full, missing)]
    torch.testing.assert_close(attention_extremes(*permuted), attention_extremes(full, missing))


# Style


def test_gram_is_symmetric_positive_semidefinite_and_crosses_transpose():
    a, b = torch.randn(2, 6, 3, 4, 5, dtype=torch.float64), torch.randn(2, 6, 3, 4, 5, dtype=torch.float64)
    gram = cross_gram(a, a)
    torch.testing.assert_close(gram, gram.transpose(1, 2))
    assert torch.linalg.eigvalsh(gram).min() > -1e-12
    torch.testing.assert_close(cross_gram(a, b), cross_gram(b, a).transpose(1, 2))


@pytest.mark.parametrize("matching", [style_matching, reference_style_matching])
def test_style_matching_ignores_voxel_order_and_averages_over_the_batch(matching):
    full, missing = ([torch.randn(2, 6, 3, 4, 5, dtype=torch.float64) for _ in range(3)] for _ in range(2))
    value = matching(full, missing)
    order = torch.randperm(60)
    shuffled = [[f.flatten(2)[:, :, order].view_as(f) for f in features] for features in (full, missing)]
    torch.testing.assert_close(matching(*shuffled), value)
    singles = [matching([f[i : i + 1] for f in full], [f[i : i + 1] for f in missing]) for i in range(2)]
    torch.testing.assert_close(sum(singles) / 2, value)
    assert value > 0 and matching(full, full) == 0


def test_reference_style_constants():
    full, missing = ([torch.randn(1, 128, 20, 24, 2, dtype=torch.float64) for _ in range(3)] for _ in range(2))

    def matrices(features):
        encoded, style, content = (f[0].flatten(1) / math.sqrt(f[0].numel()) for f in features)
        return torch.stack([encoded @ content.T, style @ encoded.T, content @ style.T])

    squared_norms = (matrices(full) - matrices(missing)).square().sum()
    factor = 1e-4 / (4 * 128**2 * (20 * 24) ** 2)
    assert factor == pytest.approx(6.6e-15, rel=0.01)
    torch.testing.assert_close(reference_style_matching(full, missing), factor * squared_norms, atol=0, rtol=1e-9)
