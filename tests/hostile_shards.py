"""Shard sets made to harm who reads them. Each attack changes a small sound set, its index going along where it can."""

import gzip
import hashlib
import json
import os
import pickle
import tarfile

import numpy as np
from tiny_shards import npy, write_set

TAR = "tiny-000000.tar"
TEN_GB = 10 * 10**9
SUBJECTS = [["a0", "a1"], ["b0"]]


class Poison:
    """Unpickling it leaves a file."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return exec, (f"open({self.mark!r}, 'w').close()",)


def npy_header(header, version=1, claimed=None):
    """An `.npy` file of nothing but a header, whose length may be claimed to be another."""
    width = 2 if version == 1 else 4
    return b"\x93NUMPY" + bytes([version, 0]) + (len(header) if claimed is None else claimed).to_bytes(width, "little") + header


def claiming(shape, descr="'<f2'"):
    return npy_header(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n") + b"\0" * 64


def piece(name, payload=b"", kind=tarfile.REGTYPE, link="", claimed=None):
    """A header block and its padded payload; `claimed` is the size that the header states."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(payload) if claimed is None else claimed
    return info.tobuf(tarfile.GNU_FORMAT)[-512:] + payload + b"\0" * (-len(payload) % 512)


def edit(folder, change, name="index.json"):
    values = json.loads((folder / name).read_text())
    change(values)
    (folder / name).write_text(json.dumps(values))


def first_subject(change):
    return lambda folder: edit(folder, lambda index: change(index["shards"][0]["subjects"][0]))


def whole_tar(data):
    """Another first tar, of the size and hash that the index states."""

    def attack(folder):
        (folder / TAR).write_bytes(data)
        restate(folder)

    return attack


def restate(folder):
    data = (folder / TAR).read_bytes()
    edit(folder, lambda index: index["shards"][0].update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest()))


def member(suffix, payload):
    """Another payload for a member of a0; offsets in the index follow."""

    def attack(folder):
        data = payload(folder) if callable(payload) else payload
        with tarfile.open(folder / TAR) as tar:
            pieces = [(info.name, data if info.name == f"a0.{suffix}" else tar.extractfile(info).read()) for info in tar]
        rebuild(folder, pieces)

    return attack


def rebuild(folder, pieces):
    blocks, places = [], {}
    for name, payload in pieces:
        places[name] = (sum(map(len, blocks)) + 512, len(payload))
        blocks.append(piece(name, payload))
    (folder / TAR).write_bytes(b"".join(blocks) + b"\0" * 1024)
    restate(folder)

    def follow(index):
        for entry in index["shards"][0]["subjects"]:
            entry["members"] = {suffix: places[f"{entry['subject']}.{suffix}"] for suffix in entry["members"]}

    edit(folder, follow)


def in_front(*pieces, end=b""):
    """Blocks before the sound members; offsets in the index follow."""

    def attack(folder):
        blocks = b"".join(pieces)
        data = blocks + (folder / TAR).read_bytes() + end
        (folder / TAR).write_bytes(data)
        restate(folder)

        def follow(index):
            for entry in index["shards"][0]["subjects"]:
                entry["members"] = {suffix: (offset + len(blocks), size) for suffix, (offset, size) in entry["members"].items()}

        edit(folder, follow)

    return attack


def twice(folder):
    with tarfile.open(folder / TAR) as tar:
        pieces = [(info.name, tar.extractfile(info).read()) for info in tar]
    rebuild(folder, [*pieces[:1], *pieces])


def sparse_file(path, size_bytes):
    path.unlink()
    with path.open("wb") as stream:
        stream.truncate(size_bytes)


def replace_by(name, make):
    def attack(folder):
        (folder / name).unlink()
        make(folder / name)

    return attack


def deep(levels=100_000):
    return b"[" * levels + b"]" * levels


def meta_with(**fields):
    def attack(folder):
        with tarfile.open(folder / TAR) as tar:
            values = json.load(tar.extractfile("a0.meta.json"))
        member("meta.json", json.dumps({**values, **fields}).encode())(folder)

    return attack


def scheme_of_values(*values):
    scheme = {"name": "mine", "values": [0, *values], "regions": {"R": list(values)}, "paint": {"R": values[0]}}
    return lambda folder: edit(folder, lambda index: index.update(label_scheme=scheme))


def poison(folder):
    return pickle.dumps(Poison(folder / "executed"))


def object_array(folder):
    return npy(np.array([[[[Poison(folder / "executed")]]]], dtype=object), allow_pickle=True)


def listed(**fields):
    return first_subject(lambda entry: entry["members"].update({suffix.replace("_", "."): place for suffix, place in fields.items()}))


TAR_NAMED = lambda name: lambda folder: edit(folder, lambda index: index["shards"][0].update(file=name))  # noqa: E731
PICKLE_MEMBER = piece("a0.evil.pkl", b"cos\nsystem\n(S'touch executed'\ntR.")
GZIP_BOMB = gzip.compress(b"\0" * 200 * 2**20)

# attack -> (what makes it, words of verify's line, words of the training store's: None if it never comes near, words of the
# reader of foreign tars: None if the attack is in index.json alone)
ATTACKS = {
    "pickle for a label": (member("label.npy", poison), "label.npy cannot be decoded", "not an npy array", "not an npy array"),
    "pickle for meta data": (member("meta.json", poison), "meta.json", "a0 cannot be decoded", "meta.json"),
    "array of objects": (member("image.npy", object_array), "npy holds object", "npy holds object", "npy holds object"),
    "structured objects": (member("image.npy", claiming("(1,)", "[('a', '|O')]")), "npy holds", "npy holds", "npy holds"),
    "pickle member": (in_front(PICKLE_MEMBER), "a0.evil.pkl' does not belong", None, "does not belong"),
    "pickle member, listed": (lambda f: (in_front(PICKLE_MEMBER)(f), listed(evil_pkl=(512, 30))(f)), "has member evil.pkl", "has member evil.pkl", "does not belong"),
    "pickle member, declared": (lambda f: edit(f, lambda i: i.update(extra_members=["evil.pkl"])), "'evil.pkl', which is not", "'evil.pkl', which is not", None),
    "path upwards": (in_front(piece("../escaped.meta.json", b"{}")), "'../escaped.meta.json' does not belong", None, "does not belong"),
    "path, absolute": (in_front(piece("/tmp/escaped.meta.json", b"{}")), "does not belong", None, "does not belong"),
    "path in a key": (first_subject(lambda e: e.update(subject="../../a0")), "'../../a0', which is not a subject key", "which is not a subject key", None),
    "NUL in a key": (first_subject(lambda e: e.update(subject="a0\0/x")), "which is not a subject key", "which is not a subject key", None),
    "path in a tar's name": (TAR_NAMED("../sound/tiny-000000.tar"), "which is not a plain file name", "which is not a plain file name", None),
    "command for a tar's name": (TAR_NAMED("pipe:touch executed"), "which is not a plain file name", "which is not a plain file name", None),
    "URL for a tar's name": (TAR_NAMED("http://127.0.0.1/x.tar"), "which is not a plain file name", "which is not a plain file name", None),
    "path in a hash": (lambda f: edit(f, lambda i: i["shards"][0].update(sha256="../" * 5)), "64 hex digits", "64 hex digits", None),
    "path in a sequence": (lambda f: edit(f, lambda i: i.update(sequences=["../x", *i["sequences"][1:]])), "which is not a sequence name", "which is not a sequence name", None),
    "shape overflows": (member("image.npy", claiming((2**32, 2**32, 1, 1))), r"10\^15 or more bytes", r"10\^15 or more bytes", r"10\^15 or more bytes"),
    "shape wraps to 64 bytes": (member("image.npy", claiming((2**62, 8, 2, 1))), r"10\^15 or more bytes", r"10\^15 or more", r"10\^15 or more"),
    "shape below 0": (member("image.npy", claiming((-4, -8, 1, 1))), "not made of counts", "not made of counts", "not made of counts"),
    "shape of 10 GB": (member("image.npy", claiming((5, 10**9, 1, 1))), "claims 10000000000 bytes", "claims 10000000000 bytes", "claims 10000000000 bytes"),
    "element of 1 GB": (member("image.npy", claiming("(1, 1, 1, 1)", "'|V1000000000'")), "npy", "npy", "npy"),
    "npy header of 4 GB": (member("image.npy", npy_header(b"{", 2, 2**32 - 1)), "header cannot be read", "header cannot be read", "header cannot be read"),
    "npy header of 1 MB": (member("image.npy", npy_header(b"(" * 10**6, 2)), "header cannot be read", "header cannot be read", "header cannot be read"),
    "npy header nested": (member("image.npy", npy_header(b"-" * 900 + b"1\n")), "header cannot be read", "header cannot be read", "header cannot be read"),
    "JSON nested": (member("meta.json", deep()), "nested too deeply", "nested too deeply", "nested too deeply"),
    "JSON of 20 MB": (member("meta.json", b" " * 20_000_000 + b"{}"), "at most 1048576", "at most 1048576", "at most 1048576"),
    "JSON number of a million digits": (member("meta.json", b"9" * 10**6), "meta.json", "a0 cannot be decoded", "meta.json"),
    "NaN in meta data": (meta_with(spacing_mm=[float("nan"), 1, 1]), "JSON holds NaN", "JSON holds NaN", "JSON holds NaN"),
    "grid of 10^15 voxels": (meta_with(original_shape=[10**5] * 3), "at most 1073741824", "at most 1073741824", None),
    "index nested": (replace_by("index.json", lambda p: p.write_bytes(deep())), "index.json: cannot be read", "index.json: cannot be read", None),
    "index of 2 GB": (lambda f: sparse_file(f / "index.json", 2**31), "not a plain file of up to", "not a plain file of up to", None),
    "index without end": (replace_by("index.json", lambda p: p.symlink_to("/dev/zero")), "not a plain file", "not a plain file", None),
    "index is a pipe": (replace_by("index.json", os.mkfifo), "not a plain file", "not a plain file", None),
    "splits nested": (replace_by("splits.json", lambda p: p.write_bytes(deep())), "splits.json: cannot be read", "splits.json: cannot be read", None),
    "tar without end": (replace_by(TAR, lambda p: p.symlink_to("/dev/zero")), f"{TAR}: no such file", f"{TAR}: .*not there", "not a plain file"),
    "tar is a pipe": (replace_by(TAR, os.mkfifo), f"{TAR}: no such file", f"{TAR}: .*not there", "not a plain file"),
    "label of value 10^12": (scheme_of_values(10**12), "outside 0..255", "outside 0..255", None),
    "offset below 0": (listed(meta_json=(-512, 10)), "is no place in a tar", "is no place in a tar", None),
    "offset beyond the tar": (listed(meta_json=(2**70, 10)), "is no place in a tar", "is no place in a tar", None),
    "size of 10 GB in the index": (listed(meta_json=(512, TEN_GB)), "is no place in a tar", "is no place in a tar", None),
    "members on one another": (first_subject(lambda e: e["members"].update({"brain.npy": e["members"]["image.npy"]})), "overlaps", "overlaps", None),
    "tar of 10 GB in the index": (lambda f: edit(f, lambda i: (i["shards"][0].update(bytes=TEN_GB), i["shards"][0]["subjects"][0]["members"].update({"meta.json": (10**9 - 10**9 % 512, 8 * 10**9)}))), "overlaps|truncated", "truncated|overlaps", None),
    "shape of 10^12 in the index": (first_subject(lambda e: e.update(shape=(10**4, 10**4, 10**4))), "does not fit shape", "does not fit shape", None),
    "fingerprint of 1 MB": (first_subject(lambda e: e["fingerprint"].update(flair="A" * 2**20)), "is not 8192 bytes", "is not 8192 bytes", None),
    "size of 10 GB in a header": (in_front(piece("a0.x.npy", b"", claimed=TEN_GB)), "claims 10000000000 bytes", None, "claims 10000000000 bytes"),
    "size below 0 in a header": (in_front(piece("a0.x.npy", b"", claimed=-512)), "below 0", None, "below 0"),
    "pax header of 10 GB": (in_front(piece("p", b"", tarfile.XHDTYPE, claimed=TEN_GB)), "pax", None, "pax"),
    "pax header that renames": (in_front(piece("p", b"21 path=../../evil.npy\n", tarfile.XHDTYPE)), "pax", None, "pax"),
    "pax header of times and more": (in_front(piece("p", b"20 mtime=1700000000\n21 path=../../evil.npy\n", tarfile.XHDTYPE)), "pax", None, "pax"),
    "GNU name of 10 GB": (in_front(piece("././@LongLink", b"", tarfile.GNUTYPE_LONGNAME, claimed=TEN_GB)), "extended", None, "extended"),
    "sparse file of 10 GB": (in_front(piece("a0.x.npy", b"", tarfile.GNUTYPE_SPARSE, claimed=TEN_GB)), "a sparse file", None, "a sparse file"),
    "symbolic link": (in_front(piece("a0.x.npy", kind=tarfile.SYMTYPE, link="/etc/passwd")), "a symbolic link", None, "a symbolic link"),
    "hard link": (in_front(piece("a0.x.npy", kind=tarfile.LNKTYPE, link="../sound/index.json")), "a hard link", None, "a hard link"),
    "device": (in_front(piece("a0.x.npy", kind=tarfile.CHRTYPE)), "a device", None, "a device"),
    "pipe in the tar": (in_front(piece("a0.x.npy", kind=tarfile.FIFOTYPE)), "a pipe", None, "a pipe"),
    "directory": (in_front(piece("a0", kind=tarfile.DIRTYPE)), "a directory", None, "a directory"),
    "member twice": (twice, "is there 2 times", None, "is there twice"),
    "gzip bomb": (whole_tar(GZIP_BOMB), "not a readable tar|is no place", "altered|is no place", "not a tar header"),
    "tar of 10 GB of nothing": (lambda f: sparse_file(f / TAR, TEN_GB), "bytes follow the end mark", "changed: 10000000000 bytes", "bytes follow the end mark"),
    "a tar more": (lambda f: (f / "more.tar").write_bytes(b"\0" * 1024), "more.tar: not in index", "more.tar: not in index", None),
}  # fmt: skip


def write_attacks(root):
    """`root`/sets: a sound set and one per attack. `root`/tars: the tars alone of those that a reader of foreign tars must refuse."""
    for kind in ("sets", "tars"):
        (root / kind).mkdir(parents=True)
    for name in ("sound", *ATTACKS):
        folder = write_set(root / "sets" / name, SUBJECTS, test=("a1",), val=("b0",))
        if name in ATTACKS:
            ATTACKS[name][0](folder)
        if name == "sound" or ATTACKS[name][3]:
            write_tars_alone(folder, root / "tars" / name)


def write_tars_alone(folder, target):
    target.mkdir()
    for tar in folder.glob("*.tar"):
        if tar.is_symlink():
            (target / tar.name).symlink_to(os.readlink(tar))
        else:
            os.link(tar, target / tar.name)
