"""A minimal writer of shard sets, independent of the one under shards/: small volumes, and bad ones on request."""

import hashlib
import io
import json
import tarfile

import numpy as np

from mstkd.shards import fingerprint
from mstkd.shards.spec import FORMAT_VERSION

SEQUENCES = ("flair", "t1", "t1ce", "t2")
SHAPE = (14, 12, 10)
TARS = [["a0", "a1", "a2"], ["b0", "b1"], ["c0", "c1", "c2"], ["d0"]]


def npy(array, **options):
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def members_of(key, present=SEQUENCES, labelled=True, shape=SHAPE):
    draws = np.random.default_rng(int(hashlib.sha256(key.encode()).hexdigest()[:8], 16))
    brain = draws.random(shape) < 0.8
    there = np.array([s in present for s in SEQUENCES])[:, None, None, None]
    image = (draws.standard_normal((len(SEQUENCES), *shape)) * brain * there).astype(np.float16)
    stats = dict(mean=300, std=100, min=0, max=900, p0_1=10, p0_5=20, p99_5=800, p99_9=850)
    meta = {
        "subject": key, "patient": key, "sequences": present, "stats": {s: stats for s in present}, "spacing_mm": (1, 1, 1),
        "original_shape": shape, "original_affine": np.eye(4).tolist(), "orientation": "RAS", "crop_box": [(0, n) for n in shape],
    }  # fmt: skip
    members = {"image.npy": npy(image), "brain.npy": npy(brain.astype(np.uint8))}
    if labelled:
        members["label.npy"] = npy((draws.random(shape) < 0.1).astype(np.uint8) * 2)
    return {**members, "meta.json": json.dumps(meta).encode()}


def content_of(members, present):
    """What the index says of the content of sound members."""
    image = np.load(io.BytesIO(members["image.npy"]))
    facts = {"fingerprint": {name: fingerprint.encode(volume) for name, volume in zip(SEQUENCES, image) if name in present}}
    if "label.npy" in members:  # all that is labelled is oedema, voxels of 1 mm
        facts["label_volume_ml"] = {"WT": int((np.load(io.BytesIO(members["label.npy"])) > 0).sum()) / 1000, "TC": 0.0, "ET": 0.0}
    return facts


def write_set(folder, tars, test=(), val=(), present=None, unlabelled=(), replace=None, **index_fields):
    """A shard set of tars = [[subject, ...], ...]; `replace` maps (subject, member) to other bytes. Without them, with `val`
    subjects and everyone labelled, `mstkd shards verify` passes it."""
    folder.mkdir()
    entries = []
    for number, subjects in enumerate(tars):
        path = folder / f"tiny-{number:06d}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for key in subjects:
                for member, data in members_of(key, (present or {}).get(key, SEQUENCES), key not in unlabelled).items():
                    info = tarfile.TarInfo(f"{key}.{member}")
                    data = (replace or {}).get((key, member), data)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        with tarfile.open(path) as tar:
            found = {key: {} for key in subjects}
            for info in tar:
                key, member = info.name.split(".", 1)
                found[key][member] = (info.offset_data, info.size)
        entries.append({
            "file": path.name, "bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "subjects": [{"subject": k, "patient": k, "sequences": (present or {}).get(k, SEQUENCES), "members": m,
                          **content_of(members_of(k, (present or {}).get(k, SEQUENCES), k not in unlabelled), (present or {}).get(k, SEQUENCES))} for k, m in found.items()],
        })  # fmt: skip
    index = {"version": FORMAT_VERSION, "dataset": "tiny", "spec_sha256": "0", "sequences": SEQUENCES, "label_scheme": "brats2018", "shards": entries}
    (folder / "index.json").write_text(json.dumps({**index, **index_fields}))
    train = [key for tar in tars for key in tar if key not in (*test, *val)]
    (folder / "splits.json").write_text(json.dumps({"folds": [{"train": train, "val": list(val)}], "test": list(test)}))
    return folder
