"""The diffusion of missing sequences: tables, the forward process, samplers. Numbers: T = 1000, beta from 1e-4 to 0.02."""

import math

import pytest
import torch

from mstkd.models.diffusion import Diffusion, Noise, ancestral, complete, ddim
from mstkd.subsets import all_subsets

PUBLISHED = Diffusion.linear(1000, 1e-4, 0.02)
SHORT = Diffusion.linear(20, 0.005, 0.7)
SAMPLERS = {"ancestral": ancestral(SHORT), "ddim": ddim(SHORT, 5), "ddim eta": ddim(SHORT, 5, eta=0.7), "ddim once": ddim(SHORT, 1)}
each_sampler = pytest.mark.parametrize("moves", SAMPLERS.values(), ids=SAMPLERS)


def masks(sequences: int) -> torch.Tensor:
    """Every mask that is allowed: (2^M - 2, M) float, 1 = missing."""
    return 1 - torch.tensor([subset for subset in all_subsets("abcde"[:sequences]) if not all(subset)]).float()


def stacks(samples: int, sequences: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.rand(samples, sequences, 6, 6, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def noise(seed: int = 0, **options) -> Noise:
    return Noise(torch.Generator().manual_seed(seed), **options)


def blurred(x, t, missing):
    """Some network: what it makes depends on the whole stack, the time and the mask."""
    return torch.tanh(x.mean(1, keepdim=True) + 0.1 * x + t[:, None, None, None] / 40 + missing.sum(1)[:, None, None, None] / 9)


@pytest.mark.parametrize(("t", "kept", "root", "noise_root"), [
    (1, 9.999000e-01, 0.999950, 0.010000), (10, 9.981052e-01, 0.999052, 0.043529), (100, 8.970181e-01, 0.947110, 0.320908),
    (250, 5.240854e-01, 0.723937, 0.689866), (500, 7.858724e-02, 0.280334, 0.959902), (750, 3.350550e-03, 0.057884, 0.998323),
    (1000, 4.035830e-05, 0.006353, 0.999980),
])  # fmt: skip
def test_the_table_of_the_published_schedule(t, kept, root, noise_root):
    assert PUBLISHED.kept[t] == pytest.approx(kept, rel=1e-6)
    assert math.sqrt(PUBLISHED.kept[t]) == pytest.approx(root, abs=6e-7) and math.sqrt(1 - PUBLISHED.kept[t]) == pytest.approx(noise_root, abs=6e-7)
    assert (PUBLISHED.kept[0], PUBLISHED.beta[0], PUBLISHED.steps) == (1.0, 0.0, 1000)


def test_the_posterior():
    assert PUBLISHED.posterior(500) == pytest.approx((0.00307007, 0.99410667, 0.01004004), rel=2e-6)
    assert PUBLISHED.posterior(500, "beta_tilde")[2] == pytest.approx(0.01003136, rel=1e-6)
    assert PUBLISHED.posterior(2)[:2] == pytest.approx((0.54529150, 0.45470850), rel=1e-6)
    assert PUBLISHED.posterior(2, "beta_tilde")[2] == pytest.approx(5.453188e-05, rel=1e-6)
    assert PUBLISHED.posterior(1) == (1.0, 0.0, 1e-4) and PUBLISHED.posterior(1, "beta_tilde")[2] == 0.0


def test_the_cosine_schedule():
    cosine = Diffusion.cosine(100)
    expected = [(math.cos((t / 100 + 0.008) / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)) ** 2 for t in range(101)]
    assert cosine.kept[:100] == pytest.approx(expected[:100], rel=1e-9) and cosine.beta[100] == 0.999
    assert all(0 < beta <= 0.999 for beta in cosine.beta[1:]) and list(cosine.kept) == sorted(cosine.kept, reverse=True)


def test_a_constant_is_noised_to_its_mean_and_variance_in_one_step_or_in_many():
    torch.manual_seed(0)
    constant, all_missing = torch.ones(1, 1, 1000, 1000), torch.ones(1, 1)
    at_once = PUBLISHED.noised(constant, torch.tensor([500]), all_missing, torch.randn_like(constant))
    chained = torch.ones(100_000)
    for t in range(1, 501):
        chained = math.sqrt(1 - PUBLISHED.beta[t]) * chained + math.sqrt(PUBLISHED.beta[t]) * torch.randn_like(chained)
    for drawn, slack in ((at_once, 1), (chained, 3)):  # a tenth of the draws
        assert float(drawn.mean()) == pytest.approx(0.280334, abs=slack * 0.004)
        assert float(drawn.var()) == pytest.approx(0.921413, abs=slack * 0.006)


@pytest.mark.parametrize("sequences", [3, 4])
def test_observed_sequences_are_not_noised_and_missing_ones_share_a_time(sequences):
    missing = masks(sequences)
    image, t = stacks(len(missing), sequences), torch.arange(1, len(missing) + 1) * 60
    drawn = torch.randn(image.shape, generator=torch.Generator().manual_seed(1))
    noised = PUBLISHED.noised(image, t, missing, drawn)
    for n, row in enumerate(missing):
        kept = PUBLISHED.kept[int(t[n])]
        for m, gone in enumerate(row):
            expected = math.sqrt(kept) * image[n, m] + math.sqrt(1 - kept) * drawn[n, m]
            assert torch.equal(noised[n, m], image[n, m]) if not gone else torch.allclose(noised[n, m], expected, atol=1e-6)
    assert noised.dtype == torch.float32


@each_sampler
@pytest.mark.parametrize("sequences", [3, 4])
def test_a_network_that_knows_the_truth_returns_it(moves, sequences):
    missing = masks(sequences)
    assert len(missing) == 2**sequences - 2
    truth = stacks(len(missing), sequences)
    given = torch.where(missing[:, :, None, None].bool(), float("nan"), truth)
    assert torch.equal(complete(lambda x, t, v: truth, given, missing, moves, noise()), truth)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 19, 20])
def test_ddim_returns_the_truth_after_any_number_of_steps(steps):
    moves, truth, missing = ddim(SHORT, steps), stacks(1), torch.tensor([[1.0, 0, 1, 1]])
    assert len(moves) == steps and moves[0].t == 20 and [m.t for m in moves] == sorted({m.t for m in moves}, reverse=True) and moves[-1].t >= 1
    assert moves[-1][1:] == (1.0, 0.0, 0.0) and not any(move.std for move in moves)
    assert torch.equal(complete(lambda x, t, v: truth, truth, missing, moves, noise()), truth)


@each_sampler
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("gone", range(4))
def test_observed_sequences_come_back_bit_for_bit(moves, samples, gone):
    missing, given = torch.nn.functional.one_hot(torch.tensor([gone]), 4).float(), stacks(1)
    for seed in (0, 1):
        made = complete(blurred, given, missing, moves, noise(seed), samples)
        others = [m for m in range(4) if m != gone]
        assert torch.equal(made[:, others], given[:, others]) and not torch.equal(made[:, gone], given[:, gone])


@each_sampler
def test_what_the_network_makes_of_observed_sequences_and_what_hides_in_missing_ones_changes_nothing(moves):
    missing, given = masks(4), stacks(14)
    gone = missing[:, :, None, None].bool()
    expected = complete(blurred, given, missing, moves, noise(3))

    def worse(x, t, v):
        return torch.where(gone, blurred(x, t, v), 100 * torch.rand_like(x) - 50)

    assert torch.equal(complete(worse, given, missing, moves, noise(3)), expected)
    assert torch.equal(complete(blurred, torch.where(gone, float("nan"), given), missing, moves, noise(3)), expected)


@each_sampler
def test_a_seed_decides_the_sample(moves):
    missing, given = torch.tensor([[1.0, 0, 0, 1]]), stacks(1)
    one, again, other = (complete(lambda x, t, v: 0.9 * x, given, missing, moves, noise(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one[:, [0, 3]], other[:, [0, 3]]) and torch.equal(one[:, 1:3], other[:, 1:3])


def test_no_noise_is_added_at_the_end_and_the_variance_is_the_forward_one_or_the_posteriors():
    for variance in ("beta", "beta_tilde"):
        moves = ancestral(SHORT, variance)
        assert [move.t for move in moves] == list(range(20, 0, -1)) and moves[-1] == (1, 1.0, 0.0, 0.0)
        assert [move.std**2 for move in moves[:-1]] == pytest.approx([SHORT.posterior(t, variance)[2] for t in range(20, 1, -1)])
    assert ancestral(SHORT)[3].std ** 2 == pytest.approx(SHORT.beta[17])


def test_ddim_with_every_step_and_eta_1_is_the_ancestral_sampler():
    """Song et al., ICLR 2021: with the posterior's variance."""
    for one, other in zip(ddim(PUBLISHED, 1000, eta=1.0), ancestral(PUBLISHED, "beta_tilde"), strict=True):
        assert one == pytest.approx(other, rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("moves", [ancestral(PUBLISHED), ancestral(PUBLISHED, "beta_tilde"), ddim(PUBLISHED, 500)])
def test_with_the_best_denoiser_samples_have_the_distribution_of_the_data(moves):
    """Pixels of N(0.2, 0.3^2), whose clean mean given x_t is known."""
    mean, variance, missing = 0.2, 0.09, torch.tensor([[1.0, 0.0]])

    def best(x, t, v):
        kept = PUBLISHED.kept[int(t[0])]
        return mean + variance * math.sqrt(kept) / (variance * kept + 1 - kept) * (x - math.sqrt(kept) * mean)

    drawn = complete(best, torch.zeros(1, 2, 100, 100), missing, moves, noise(), clamp=False)[:, 0]
    assert float(drawn.mean()) == pytest.approx(mean, abs=0.015) and float(drawn.std()) == pytest.approx(0.3, rel=0.04)


def test_predictions_are_kept_between_the_ends_of_the_intensities():
    missing, given = torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2, 4, 4)
    made = [complete(lambda x, t, v: 3 + 0 * x, given, missing, SAMPLERS["ddim"], noise(), clamp=clamp) for clamp in (True, False)]
    assert (made[0][:, 0] == 1).all() and (made[1][:, 0] == 3).all()


def test_the_mean_of_samples_is_between_them():
    missing, given = torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2, 40, 40)
    denoise = lambda x, t, v: 0.9 * x  # noqa: E731
    spread = [float(complete(denoise, given, missing, SAMPLERS["ancestral"], noise(), samples)[:, 0].std()) for samples in (1, 16)]
    assert spread[0] / spread[1] == pytest.approx(4, rel=0.1)


@each_sampler
def test_shared_noise_is_the_same_for_every_slice_whatever_the_batch(moves):
    given = stacks(1).repeat(6, 1, 1, 1)
    missing = torch.tensor([[1.0, 0, 1, 0]]).repeat(6, 1)
    whole = complete(blurred, given, missing, moves, noise(shared=True))
    parts = [complete(blurred, given[:n], missing[:n], moves, noise(shared=True)) for n in (1, 5)]
    assert all(torch.equal(made, whole[:1]) for made in [*whole.split(1), *parts[0].split(1), *parts[1].split(1)])
    fresh = complete(blurred, given, missing, moves, noise())
    assert len({made.sum().item() for made in fresh}) == 6
