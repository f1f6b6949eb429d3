"""Slices that are padded or cut to their size: no voxel changes, there and back, in training and in completion."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mstkd.config import DataConfig, InferenceConfig, IntensityConfig, SliceConfig
from mstkd.data.intensity import Intensity
from mstkd.data.loader import TrainLoader
from mstkd.data.planes import Plane
from mstkd.data.training import open_training
from mstkd.errors import UserError
from mstkd.evaluate.completion import Completer
from mstkd.evaluate.source import CaseSource
from mstkd.methods import DataFacts, build
from mstkd.shards.spec import SubjectMeta

INTENSITY = IntensityConfig(kind="percentile", percentile="0.1", interval=(-1, 1))


def meta_of(shape, box) -> SubjectMeta:
    return SubjectMeta(
        subject="s", patient="s", sequences=(), stats={}, spacing_mm=(1.0, 1.0, 1.0), original_shape=(*shape, 5),
        original_affine=tuple(map(tuple, np.eye(4))), orientation="RAS", crop_box=(*box, (0, 5)),
    )  # fmt: skip


@st.composite
def metas(draws):
    shape = [draws(st.integers(8, 60)) for _ in range(2)]
    return meta_of(shape, [tuple(sorted(draws(st.tuples(st.integers(0, n - 4), st.integers(4, n)).filter(lambda ends: ends[1] - ends[0] >= 4)))) for n in shape])


@given(metas(), st.integers(16, 90))
def test_voxels_are_there_and_come_back_or_the_subject_is_refused(meta, size):
    box = meta.crop_box[:2]
    low = [start + (size - n) // 2 for (start, _), n in zip(box, meta.ras_shape)]  # the plane's middle is the square's
    shape = tuple(stop - start for start, stop in box)
    if any(start < 0 or start + n > size for start, n in zip(low, shape)):
        with pytest.raises(UserError, match="data.slices.fit pad: the brain of subject s would lie at voxels") as caught:
            Plane.of(meta, size, "pad")
        assert "\n" not in str(caught.value)
        return
    plane, image = Plane.of(meta, size, "pad"), torch.rand(3, *shape) + 1
    brought, labels = plane.bring(image, -1.0), plane.bring_labels((image > 1.5).byte())
    inside = (..., slice(low[0], low[0] + shape[0]), slice(low[1], low[1] + shape[1]))
    assert brought.shape == labels.shape == (3, size, size) and torch.equal(brought[inside], image) and torch.equal(plane.back(brought), image)
    assert torch.equal(labels[inside], (image > 1.5).byte()) and int(labels.sum()) == int((image > 1.5).sum())
    brought[inside] = -1
    assert (brought == -1).all()


def test_240_pixels_become_256_with_8_on_each_side():
    plane = Plane.of(meta_of((240, 240), ((50, 190), (30, 220))), 256, "pad")
    assert (plane.start, plane.shape, plane.side, plane.size) == ((58, 38), (140, 190), 256, 256)
    assert Plane.of(meta_of((240, 240), ((50, 190), (30, 220))), 256).side == 240


def stacks(shards, **slices) -> tuple[torch.Tensor, list[str]]:
    """Four training slices as a network gets them."""
    config = DataConfig(shards=str(shards), slices=SliceConfig(**slices), workers=0, augment={"flip_prob": 0})
    training = open_training(config, 0, complete_only=True)
    ((_, batch),) = next(iter(TrainLoader(training, config, Intensity(INTENSITY), global_batch=4, micro_batch=4, total_steps=1)))
    return batch.image, batch.subject


def test_the_loader_pads(phantom_shards):
    """The phantom's plane has 32 pixels, so that a square of 32 is not resampled."""
    image, subjects = stacks(phantom_shards, size=32, min_brain=0.25)
    padded, same = stacks(phantom_shards, size=64, fit="pad", min_brain=0.25 / 4)
    assert same == subjects and torch.equal(padded[..., 16:48, 16:48], image) and image.max() > 0
    padded[..., 16:48, 16:48] = -1
    assert (padded == -1).all()


def test_too_small_a_square_ends_the_start_with_one_line(phantom_shards):
    with pytest.raises(UserError, match=r"data\.slices\.fit pad: the brain of subject Phantom_\d+ would lie at voxels .* of data\.slices\.size 16; use a larger size"):
        stacks(phantom_shards, size=16, fit="pad")


def test_completed_cases_are_not_interpolated(phantom_shards):
    source = CaseSource(open_training(DataConfig(shards=str(phantom_shards), slices=SliceConfig(size=48, fit="pad"), workers=0), 0, True).stores)
    method = build({"name": "toys.copying"}, DataFacts(source.sequences, source.label_scheme, None, slice_size=48))
    nn.init.constant_(method.networks["student"].eval().weight, 0.5)
    sample = source.subject(source.subjects("test")[0])
    completer = Completer(method, source.sequences, SliceConfig(size=48, fit="pad"), InferenceConfig(batch=8), torch.device("cpu"))
    with torch.no_grad():
        made = completer.volume("student", sample, (True, False, False, False))
    brain = sample.brain > 0
    given = 2 * made[0][brain] - 1  # in the method's intensities
    assert np.ptp(given) > 1
    np.testing.assert_allclose(2 * made[2][brain] - 1, 0.5 * given, atol=1e-6)
