"""Every normalisation against its direct computation on raw intensities."""

import numpy as np
import pytest

from mstkd.config import IntensityConfig
from mstkd.data.intensity import Intensity
from mstkd.shards.spec import SequenceStats, SubjectMeta

SEQUENCES = ("flair", "t1", "t2")


def stats_of(values):
    q = np.percentile(values, [0.1, 0.5, 99.5, 99.9])
    return SequenceStats(
        mean=values.mean(), std=values.std(), min=values.min(), max=values.max(), p0_1=q[0], p0_5=q[1], p99_5=q[2], p99_9=q[3]
    )


def case(raw, brain, sequences=SEQUENCES):
    """z-scored volume and meta data as the shard builder stores them, from raw (M, X, Y, Z)."""
    stats = {name: stats_of(raw[m][brain]) for m, name in enumerate(SEQUENCES) if name in sequences}
    image = np.zeros(raw.shape, np.float32)
    for m, name in enumerate(SEQUENCES):
        if name in sequences and stats[name].std > 0:
            image[m][brain] = (raw[m][brain] - stats[name].mean) / stats[name].std
    meta = SubjectMeta(
        subject="s", patient="s", sequences=sequences, stats=stats, spacing_mm=(1, 1, 1), original_shape=raw.shape[1:],
        original_affine=tuple(map(tuple, np.eye(4))), orientation="RAS", crop_box=tuple((0, n) for n in raw.shape[1:]),
    )  # fmt: skip
    return image, meta


@pytest.fixture
def raw_case():
    draws = np.random.default_rng(0)
    brain = draws.random((14, 12, 10)) < 0.7
    raw = np.where(brain, draws.gamma(3, 100, (3, 14, 12, 10)) + [[[[50]]], [[[-200]]], [[[0]]]], 0)
    return raw, brain


def direct(raw, brain, config):
    """The definition, on raw values: (low, high) -> interval, clipped; outside the brain the background value."""
    if config.kind == "zscore":
        return np.where(brain, (raw - raw[brain].mean()) / raw[brain].std(), 0)
    inside = raw[brain]
    tails = {"0.1": (0.1, 99.9), "0.5": (0.5, 99.5)}[config.percentile]
    low, high = {
        "minmax": (inside.min(), inside.max()),
        "percentile": tuple(np.percentile(inside, tails)),
        "reference_minmax": (raw.min(), raw.max()),  # the whole array, with its zeros
    }[config.kind]
    a, b = config.interval
    mapped = np.clip((raw - low) / (high - low), 0, 1) * (b - a) + a
    return mapped if config.kind == "reference_minmax" else np.where(brain, mapped, a)


@pytest.mark.parametrize("interval", [(0.0, 1.0), (-1.0, 1.0)])
@pytest.mark.parametrize(
    "kind, percentile", [("zscore", "0.5"), ("minmax", "0.5"), ("percentile", "0.5"), ("percentile", "0.1"), ("reference_minmax", "0.5")]
)
def test_equals_the_direct_computation(raw_case, kind, percentile, interval):
    raw, brain = raw_case
    config = IntensityConfig(kind=kind, percentile=percentile, interval=interval)
    image, meta = case(raw, brain)
    result = Intensity(config).apply(image, brain, meta, SEQUENCES)
    assert result.dtype == np.float32
    for m in range(3):
        np.testing.assert_allclose(result[m], direct(raw[m], brain, config), atol=2e-6)


def test_a_sequence_that_the_subject_lacks_is_hidden_value_whatever_its_voxels_hold(raw_case):
    raw, brain = raw_case
    image, meta = case(raw, brain, sequences=("flair", "t2"))
    image[1] = np.nan
    for kind, value in (("zscore", 0), ("minmax", -1), ("percentile", -1), ("reference_minmax", -1)):
        intensity = Intensity(IntensityConfig(kind=kind, interval=(-1, 1)))
        result = intensity.apply(image, brain, meta, SEQUENCES)
        assert intensity.hidden_value == value
        assert (result[1] == value).all() and np.isfinite(result).all()


@pytest.mark.parametrize("kind", ["zscore", "minmax", "percentile", "reference_minmax"])
def test_a_constant_sequence_gives_no_nan(raw_case, kind):
    raw, brain = raw_case
    raw[0] = 0.0
    raw[1] = np.where(brain, 7.0, 0)
    image, meta = case(raw, brain)
    result = Intensity(IntensityConfig(kind=kind, interval=(-1, 1))).apply(image, brain, meta, SEQUENCES)
    assert np.isfinite(result).all()
    assert (result[0] == (0 if kind == "zscore" else -1)).all()
    if kind == "reference_minmax":  # 0 and 7 are the ends of that range
        assert (result[1] == np.where(brain, 1, -1)).all()


@pytest.mark.parametrize("kind, background", [("zscore", 0), ("minmax", -1), ("percentile", -1)])
def test_padding_and_whatever_lies_outside_the_brain_is_background(raw_case, kind, background):
    raw, brain = raw_case
    image, meta = case(raw, brain)
    image[:, ~brain] = 3.0  # as interpolation may leave it
    result = Intensity(IntensityConfig(kind=kind, interval=(-1, 1))).apply(image, brain.astype(np.uint8), meta, SEQUENCES)
    assert (result[:, ~brain] == background).all()
