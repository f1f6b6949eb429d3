"""What is computed quickly is what NumPy computes: order statistics, spread, float16 as float32, memory order, npy bytes."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mstkd.shards.geometry import in_stored_order
from mstkd.shards.half_precision import widened
from mstkd.shards.intensity_statistics import PERCENTILES, order_statistics, percentiles, statistics
from mstkd.shards.members import encode_array

FINITE = st.floats(-(2.0**99), 2.0**99, width=32)  # also -0.0 and subnormal ones
TIED = st.sampled_from([-3.5, -1, 0, 1, 2, 255, 256, 1e30]).map(np.float32)


@given(voxels=st.one_of(arrays(np.float32, st.integers(1, 60), elements=elements) for elements in (FINITE, TIED)))
def test_order_statistics_and_percentiles_are_those_of_a_full_sort(voxels):
    np.testing.assert_array_equal(order_statistics(voxels, np.arange(len(voxels))), np.sort(voxels))
    last = np.array([len(voxels) - 1])
    np.testing.assert_array_equal(order_statistics(voxels, last), voxels.max(keepdims=True))
    expected = np.percentile(voxels.astype(np.float64), PERCENTILES)
    np.testing.assert_allclose(percentiles(voxels, PERCENTILES), expected, rtol=1e-12, atol=1e-12 * np.abs(voxels).max())


@pytest.mark.parametrize("offset", [0, 1e5])
def test_statistics_are_right_to_float_precision_far_from_zero_and_over_several_chunks(offset):
    voxels = (np.random.default_rng(0).normal(offset, 3, 100_001)).astype(np.float32)
    stats, median = statistics(voxels)
    exact = voxels.astype(np.float64)
    wanted = [exact.mean(), exact.std(), exact.min(), exact.max(), *np.percentile(exact, (0.1, 0.5, 99.5, 99.9, 50))]
    found = [stats.mean, stats.std, stats.min, stats.max, stats.p0_1, stats.p0_5, stats.p99_5, stats.p99_9, median]
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_every_float16_is_widened_as_numpy_does():
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16).reshape(2, -1)
    np.testing.assert_array_equal(widened(halves), halves.astype(np.float32))
    assert widened(halves).dtype == np.float32


@given(
    shape=st.tuples(*[st.integers(1, 6)] * 3), axes=st.permutations(range(3)), flips=st.tuples(*[st.sampled_from([-1, 1])] * 3),
    start=st.integers(0, 2),
)  # fmt: skip
def test_stored_order_is_the_same_array_with_z_fastest_in_memory(shape, axes, flips, start):
    whole = np.arange(np.prod(shape), dtype=np.int16).reshape(shape).transpose(axes)
    data = whole[tuple(slice(None, None, step) for step in flips)][:, :, start:]
    turned = in_stored_order(data)
    np.testing.assert_array_equal(turned, data)
    assert turned.flags.c_contiguous and turned.dtype == np.int16


@pytest.mark.parametrize("dtype", [np.float16, np.uint8])
def test_an_encoded_array_is_what_numpy_saves(dtype):
    array = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5).astype(dtype)
    for one in (array, array[1], array.T, array[:, ::2]):
        saved = io.BytesIO()
        np.save(saved, np.ascontiguousarray(one))
        assert encode_array(one) == saved.getvalue()
