"""Shard sets whose slices differ: from none of the brain to all of it, with and without a lesion, in a plane larger than the box."""

import json

import numpy as np
from tiny_shards import SEQUENCES, SHAPE, members_of, npy, write_set

GRID = (18, 22, 12)  # of the file; it is turned by 180 degrees about Z
BOX = ((2, 16), (7, 19), (1, 11))  # of what is stored, SHAPE voxels
SIDE = 22  # of the padded square, where BOX begins at (4, 7)


def subject_members(key: str, present=SEQUENCES) -> dict[str, bytes]:
    """Members of one subject: slice k has about k / 10 of its box in the brain, every third one a lesion of scattered voxels."""
    draws = np.random.default_rng(sum(map(ord, key)))
    members = members_of(key, present)
    meta = {**json.loads(members["meta.json"]), "original_shape": GRID, "orientation": "LPS", "crop_box": BOX}
    brain = (draws.random(SHAPE) < np.arange(SHAPE[2]) / 10).astype(np.uint8)
    there = np.array([name in present for name in SEQUENCES])[:, None, None, None]
    image = (draws.standard_normal((4, *SHAPE)) * brain * there).astype(np.float16)
    label = brain * (draws.random(SHAPE) < 0.2) * (np.arange(SHAPE[2]) % 3 == 0) * draws.choice([1, 2, 4], SHAPE)
    return {"image.npy": npy(image), "brain.npy": npy(brain), "label.npy": npy(label.astype(np.uint8)), "meta.json": json.dumps(meta).encode()}


def write_slices(folder, tars, replace=None, present=None, **options):
    """As `write_set`, of such subjects."""
    present = present or {}
    members = {(key, name): data for tar in tars for key in tar for name, data in subject_members(key, present.get(key, SEQUENCES)).items()}
    return write_set(folder, tars, present=present, replace={**members, **(replace or {})}, **options)
