"""The statistics of a comparison against hand-made and independent references."""

from itertools import product

import numpy as np
import pytest
from scipy import stats

from mstkd.compare.published import ROUNDING, published_tables, read_published
from mstkd.compare.statistics import Replicates, holm, interval, mean_finite, seed_spread, signed_rank
from mstkd.errors import UserError
from mstkd.measures import COMPLETION


def every_sign(differences):
    """The two-sided p of the signed-rank test by its definition: all 2^n signs, zeros split between both."""
    ranks = stats.rankdata(np.abs(differences))
    half = ranks.sum() / 2
    seen = abs(ranks[differences > 0].sum() + ranks[differences == 0].sum() / 2 - half)
    # a zero's rank counts half on either side, whatever its sign
    moving = ranks[differences != 0]
    sums = [sum(r for r, up in zip(moving, signs) if up) + ranks[differences == 0].sum() / 2 for signs in product((0, 1), repeat=len(moving))]
    return np.mean(np.abs(np.array(sums) - half) >= seen - 1e-9)


def test_signed_rank_is_the_exact_test():
    differences = np.array([0.03, -0.01, 0.05, 0.02, 0.08, 0.07, -0.04, 0.06])
    found = signed_rank(differences)
    assert found.says == "exact" and found.p == pytest.approx(every_sign(differences))
    assert signed_rank(-differences).p == found.p


def test_ties_and_zeros_take_every_sign_change_in_small_groups():
    differences = np.array([0.02, 0.02, -0.02, 0.05, 0.0, 0.07, 0.04, 0.0, 0.03])
    found = signed_rank(differences)
    assert found.says == "all sign changes" and found.p == pytest.approx(every_sign(differences))


def test_large_groups_with_zeros_take_the_normal_approximation():
    draws = np.random.default_rng(0)
    differences = np.round(draws.normal(0.01, 0.05, 80), 2)
    assert (differences == 0).any()
    expected = stats.wilcoxon(differences, zero_method="zsplit", method="asymptotic").pvalue
    assert signed_rank(differences).p == pytest.approx(expected) and signed_rank(differences).says == "normal approximation"


def test_signed_rank_at_its_edges():
    assert signed_rank(np.zeros(9)).p == 1.0 and "all differences are zero" in signed_rank(np.zeros(9)).says
    assert signed_rank(np.full(9, 1e-16)).p == 1.0  # rounding in a mean is no sign
    few = signed_rank(np.array([0.1, 0.2, 0.3, 0.4, 0.5, np.nan]))
    assert few.p is None and few.says.startswith("not given: 5 patients")
    assert signed_rank(np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])).p == pytest.approx(2 / 2**6)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # 3 x .01; 2 x .03; max(.06, 1 x .04)
    assert holm([0.6, 0.9, 0.7]) == [1.0, 1.0, 1.0] and holm([0.02]) == [0.02] and holm([]) == []


def test_means_over_what_is_known():
    values = np.array([[1.0, np.nan], [3.0, np.nan]])
    np.testing.assert_array_equal(mean_finite(values, axis=0), [2.0, np.nan])


def test_seed_spread_by_hand():
    scores = np.array([[0.5, 0.7], [0.6, 1.0]])[..., None]  # means 0.6 and 0.8
    assert seed_spread(scores) == pytest.approx([0.2 / np.sqrt(2)]) and seed_spread(scores[:1]) is None


def test_a_replicate_is_the_mean_of_the_drawn_patients_and_seeds():
    draws = np.random.default_rng(1)
    scores = draws.random((3, 7, 2))
    scores[:, 2, 1] = np.nan  # a patient without this subset
    replicates = Replicates(7, seed=4, replicates=50)
    found = replicates.means(scores, stream=1)
    counts = np.random.default_rng([4, 1]).multinomial(3, [1 / 3] * 3, size=50)
    for b in (0, 17, 49):
        drawn = np.repeat(np.repeat(scores, counts[b], axis=0), replicates.patients[b].astype(int), axis=1)
        np.testing.assert_allclose(found[b], np.nanmean(drawn, axis=(0, 1)))
    np.testing.assert_array_equal(Replicates(7, 4, 50).means(scores, 1), found)
    assert not np.array_equal(replicates.means(scores, 2), found)


def test_intervals_cover_as_often_as_they_say():
    """300 studies of 40 patients, and of 40 patients and 12 seeds whose shift is common to all patients."""
    draws = np.random.default_rng(2)
    for seeds, seed_sd in ((1, 0.0), (12, 1.0)):
        covered = []
        for study in range(300):
            patients, shifts = draws.normal(0, 1, (1, 40, 1)), draws.normal(0, seed_sd, (seeds, 1, 1))
            low, high = interval(Replicates(40, study, replicates=400).means(patients + shifts, 1))
            covered.append(low[0] <= 0 <= high[0])
        assert 0.88 <= np.mean(covered) <= 0.98, seeds  # percentile intervals of means are a little short


def test_the_same_patients_are_drawn_for_both_arms():
    scores = np.random.default_rng(3).random((1, 30, 4))
    replicates = Replicates(30, seed=0, replicates=200)
    low, high = interval(replicates.means(scores + 0.1, 2) - replicates.means(scores, 1))
    np.testing.assert_allclose(low, 0.1)
    np.testing.assert_allclose(high, 0.1)


def test_an_interval_of_nothing_is_unknown():
    scores = np.full((2, 6, 2), np.nan)
    scores[..., 0] = 0.5
    low, high = interval(Replicates(6, 0, 20).means(scores, 1))
    assert low[0] == high[0] == 0.5 and np.isnan(low[1]) and np.isnan(high[1])


# published tables


@pytest.mark.parametrize("name", published_tables())
def test_printed_means_are_those_of_the_cells_or_say_what_is(name):
    table = read_published(name)
    assert table.rows and table.title and table.source and table.conventions
    for method, regions in table.rows.items():
        assert list(regions) == table.measures and set(table.measures) <= {"WT", "TC", "ET"} | {measure.key for measure in COMPLETION}
        for region, row in regions.items():
            if not table.has_cells:
                assert row.cells == {} and row.recomputed_mean is None
                continue
            assert len(row.cells) == 15
            score, hd95 = (np.mean([getattr(cell, figure) for cell in row.cells.values()]) for figure in ("score", "hd95"))
            agrees = abs(score - row.printed_mean.score) <= ROUNDING and abs(hd95 - row.printed_mean.hd95) <= ROUNDING
            assert agrees == (row.recomputed_mean is None), (method, region)
            if not agrees:
                assert (row.recomputed_mean.score, row.recomputed_mean.hd95) == pytest.approx((score, hd95), abs=0.006)


def test_published_cells_are_keyed_by_sequences():
    row = read_published("mst_kdnet_brats2024").rows["MST-KDNet"]["ET"]
    assert row.cells[frozenset({"t1ce"})].score == 68.6 and row.cells[frozenset({"t1ce"})].hd95 == 4.5
    assert row.cells[frozenset({"flair", "t1", "t1ce", "t2"})].score == 73.9
    assert read_published("shaspec_brats2018").rows["ShaSpec"]["TC"].printed_mean.score == 77.45


def test_a_published_figure_is_shown_as_it_is_printed():
    table = read_published("utad_brats2020")
    assert len(table.rows) == 13 and table.measures == ["ssim", "psnr", "local_ssim", "local_psnr", "lpips"]
    student = {key: row.printed_mean for key, row in table.rows["Student WT"].items()}
    assert student["ssim"].score == 0.8742 and student["psnr"].text == "31.48±1.26" and student["lpips"].text == "0.0664±0.0230"
    assert [method for method in table.rows if "oracle" in method] == [f"Teacher {region} (oracle)" for region in ("WT", "TC", "ET")]


def test_an_unknown_table_is_named_with_the_nearest():
    with pytest.raises(UserError, match="--published mst_kdnet_brats2023: no such table; did you mean 'mst_kdnet_brats2024'"):
        read_published("mst_kdnet_brats2023")
