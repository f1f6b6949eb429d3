"""Flicker from slice to slice, and the error of the spatial spectrum: by hand, and of M2DN's shared noise."""

import numpy as np
import pytest
import torch
from small_m2dn import SIZE, SUBSETS, awake, make, make_batch

from mstkd.evaluate.texture import FLOOR, radial_spectrum, spectrum_error, z_gradient_error

SLICES = (3, 4, 5, 6)
BRAIN = np.ones((4, 8, 8), bool)


def images(seed=0):
    return np.random.default_rng(seed).random((4, 8, 8)).astype(np.float32)


def test_an_error_that_all_slices_share_is_no_flicker():
    truth = images()
    assert z_gradient_error(truth, truth, BRAIN, SLICES) == 0
    assert z_gradient_error(truth + 0.25 * images(1)[:1], truth, BRAIN, SLICES) == pytest.approx(0, abs=1e-6)


def test_an_error_that_comes_and_goes_counts_twice_per_step():
    truth, sign = images(), np.array([1, -1, 1, -1])[:, None, None]
    assert z_gradient_error(truth + 0.1 * sign, truth, BRAIN, SLICES) == pytest.approx(0.2, abs=1e-6)
    smooth = np.broadcast_to(np.arange(4)[:, None, None] / 10, (4, 8, 8))
    assert z_gradient_error(0 * smooth, smooth, BRAIN, SLICES) == pytest.approx(0.1)  # what the truth does and the completed images do not


def test_only_brain_on_both_sides_of_a_step_between_neighbours_counts():
    truth, made, brain = images(), images(), BRAIN.copy()
    made[:, 0] += np.array([0, 1, 0, 1])[:, None]  # in the first row alone
    brain[:2, 0] = False
    assert z_gradient_error(made, truth, brain, SLICES) == pytest.approx((8 * 1 + 0) / (56 + 56 + 64), abs=1e-6)  # the step from slice 2 to 3
    assert z_gradient_error(made, truth, BRAIN, (3, 5, 6, 9)) == pytest.approx(1 / 8, abs=1e-6)  # one step is left
    assert z_gradient_error(made, truth, BRAIN, (1, 3, 5, 7)) is None and z_gradient_error(made, truth, ~BRAIN, SLICES) is None
    assert z_gradient_error(made[:1], truth[:1], BRAIN[:1], (3,)) is None


@pytest.mark.parametrize("ring", [1, 3, 8])
def test_a_wave_has_its_power_in_its_ring(ring):
    x = np.cos(2 * np.pi * ring * np.arange(16) / 16)
    spectrum = radial_spectrum(0.5 + 0.25 * np.broadcast_to(x, (2, 16, 16)))
    assert spectrum.shape == (2, 8) and np.argmax(spectrum[0]) == ring - 1 and np.delete(spectrum, ring - 1, axis=1).max() < 1e-20


def test_white_noise_has_its_variance_at_every_frequency():
    noise = np.random.default_rng(0).normal(0.5, 0.1, (400, 16, 16))
    assert radial_spectrum(noise).mean(0) == pytest.approx(0.01, rel=0.08)  # ring 1 has 8 frequencies in 400 images
    assert radial_spectrum(noise + 3) == pytest.approx(radial_spectrum(noise))  # the mean grey value is left out


def test_the_spectrums_error_is_a_distance_in_decibels():
    truth = radial_spectrum(images())
    assert (spectrum_error(truth, truth) == 0).all()
    tenfold = 10 * (truth + FLOOR) - FLOOR
    assert spectrum_error(tenfold, truth) == pytest.approx(10) == spectrum_error(truth, tenfold)
    half = np.where(np.arange(truth.shape[1]) < 2, tenfold, truth)  # in 2 of 4 rings
    assert spectrum_error(half, truth) == pytest.approx(10 / np.sqrt(2))
    assert (spectrum_error(0 * truth, 0 * truth + FLOOR / 100) < 0.05).all()  # less than rounding to grey levels shows


def test_blur_and_noise_both_raise_the_spectrums_error():
    rough = np.random.default_rng(1).random((1, 32, 32))
    true = sum(np.roll(rough, (a, b), (1, 2)) for a in range(2) for b in range(2)) / 4
    blurred = sum(np.roll(true, (a, b), (1, 2)) for a in (-1, 0, 1) for b in (-1, 0, 1)) / 9
    noisy = true + np.random.default_rng(2).normal(0, 0.1, true.shape)
    errors = [float(spectrum_error(radial_spectrum(one), radial_spectrum(true))[0]) for one in (true, blurred, noisy)]
    assert errors[0] == 0 and errors[1] > 5 and errors[2] > 2


def test_shared_noise_does_not_flicker():
    """On eight equal slices: whatever the network makes of a noise, it makes it of all of them."""
    given = make_batch(SUBSETS[5]).image.repeat(8, 1, 1, 1)
    available = torch.tensor(SUBSETS[5])[None].expand(8, -1)
    found = {}
    for noise in ("fresh", "shared"):
        torch.manual_seed(0)
        made = awake(make(sampler={"noise": noise})).predict(given, available)[:, SUBSETS[5].index(False)].numpy()
        found[noise] = z_gradient_error(made, given[:, SUBSETS[5].index(False)].numpy(), np.ones((8, SIZE, SIZE), bool), range(8))
    assert found["shared"] < 1e-6 < 1e-3 < found["fresh"]
