"""`mstkd bench data` at a tiny size: the report is whole, every contender delivers the same data, absent peers are named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mstkd.bench import data as bench
from mstkd.bench.contenders import Local, NiftiFolder, OurPatches, Ours, PlainWebDataset, RawRead, TarAndNumpy, compare, in_turn
from mstkd.bench.loader_memory import pss_bytes
from mstkd.bench.peers import NAMES, Peer
from mstkd.bench.reading import Stopwatch, check, digests, to_tensor
from mstkd.bench.report import Figure, Target, figure, ratio
from mstkd.bench.volumes import heads, write_nifti, write_shards
from mstkd.errors import UserError

SHAPE, COUNT = (20, 18, 16), 10
COMMAND = [sys.executable, "-c", "from mstkd.launch.cli import main; main()", "bench", "data"]
TINY = ["--volumes", "4", "--shape", "20,18,16", "--seconds", "0.05", "--slow-mb-per-s", "50"]


def bench_data(*words, **environment):
    return subprocess.run([*COMMAND, *map(str, words)], capture_output=True, text=True, env={**os.environ, **environment})


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(shard set, NIfTI folder, truths)."""
    folder = tmp_path_factory.mktemp("bench")
    write_nifti(folder / "nifti", 3, SHAPE)
    return folder / "set", folder / "nifti", write_shards(folder / "set", COUNT, SHAPE)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The JSON of one run of the command, what it printed, and the folder that it worked in."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "scratch").mkdir()
    done = bench_data(*TINY, "--json", folder / "bench.json", "--dir", folder / "scratch", COLUMNS="200")
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "bench.json").read_text()), done.stdout, folder / "scratch"


# the command


def test_the_report_has_every_figure_and_target(report):
    values, _, _ = report
    names = [entry["name"] for entry in values["figures"]]
    assert {RawRead.name, TarAndNumpy.name, PlainWebDataset.name, Ours.name, NiftiFolder.name, *NAMES.values()} < set(names)
    assert "mstkd, random 20x18x16 patches" in names and len(values["targets"]) == 7
    for entry in values["figures"]:
        if entry["median"] is None:
            assert entry["note"].startswith("absent: pip install "), entry
        elif entry["low"] is not None:
            assert 0 < entry["low"] <= entry["median"] <= entry["high"], entry
    for target in values["targets"]:
        assert target["verdict"] in (("not measured",) if target["reached"] is None else ("pass", "miss")), target


def test_ratios_are_to_plain_webdataset_and_mds_and_nothing_else(report):
    figures = {entry["name"]: entry for entry in report[0]["figures"]}
    assert figures[PlainWebDataset.name]["versus"]["WebDataset"] == 1
    ours = figures[Ours.name]
    assert ours["versus"]["WebDataset"] == pytest.approx(ours["median"] / figures[PlainWebDataset.name]["median"])
    assert ("MDS" in ours["versus"]) == (figures[NAMES["mds"]]["median"] is not None)


def test_the_report_states_types_machine_and_versions_but_no_host_and_no_path(report):
    values, printed, folder = report
    notes = {entry["name"]: entry["note"] for entry in values["figures"]}
    assert notes[Ours.name] == notes[PlainWebDataset.name] == notes[NiftiFolder.name] == "-> float16 tensor"
    assert {"cpu", "cores", "memory_gib", "kernel", "filesystem"} <= set(values["machine"])
    assert {"python", "torch", "numpy", "webdataset", "nibabel", "mstkd"} <= set(values["versions"])
    for text in (json.dumps(values), printed.replace("wrote", "")):
        assert str(folder) not in text and os.uname().nodename not in text.replace("mstkd bench data:", "")


def test_the_work_folder_is_left_empty(report):
    assert not list(report[2].iterdir())


def test_the_table_names_absent_peers(report):
    values, printed, _ = report
    absent = [entry for entry in values["figures"] if entry["median"] is None]
    assert all(entry["name"] in printed and entry["note"] in printed for entry in absent)


# contenders


@pytest.mark.parametrize("kind", [TarAndNumpy, PlainWebDataset, Ours])
def test_every_reader_delivers_what_was_written_as_writable_tensors(written, kind):
    folder, _, truths = written
    samples = list(kind(folder).epoch())
    assert [digests(sample) for sample in samples] == [truth.sha256 for truth in truths]
    for sample, head in zip(samples, heads(COUNT, SHAPE), strict=True):
        assert sample["image"].dtype == torch.float16 and sample["brain"].dtype == sample["label"].dtype == torch.uint8
        assert sample["image"].sum(dtype=torch.float64) == head.image().sum(dtype=np.float64) != 0
        for tensor in sample.values():
            tensor += 1  # a map of the file would fault here


def test_nifti_files_hold_the_same_volumes(written):
    _, nifti, truths = written
    assert [digests(sample) for sample in NiftiFolder(nifti).epoch()] == [truth.sha256 for truth in truths[:3]]


def test_raw_reading_covers_every_member(written):
    folder, _, truths = written
    contender = RawRead(folder)
    contender.check(truths)
    assert sum(len(sample["bytes"]) for sample in contender.epoch()) > COUNT * np.prod(SHAPE) * 10


def test_patches_are_cut_from_random_places_and_checked(written):
    folder, _, truths = written
    contender = OurPatches(folder, (8, 8, 8))
    contender.check(truths)
    first, second = (next(contender.epoch())["image"] for _ in range(2))
    assert first.shape == (4, 8, 8, 8) and not torch.equal(first, second)


def test_other_data_is_noticed(written):
    folder, _, truths = written

    class Brightened(TarAndNumpy):
        name = "brightened"

        def epoch(self):
            for sample in super().epoch():
                yield {**sample, "image": sample["image"] + 1}

    with pytest.raises(RuntimeError, match="brightened delivered other data for subject bench-00000"):
        Brightened(folder).check(truths)
    with pytest.raises(RuntimeError, match="delivered 0 of 10 subjects"):
        compare("empty", [], truths)


def test_read_only_and_strided_arrays_are_copied_others_are_not():
    own = np.arange(6, dtype=np.float16)
    assert to_tensor(own).data_ptr() == own.ctypes.data
    frozen = np.frombuffer(own.tobytes(), np.float16)
    assert to_tensor(frozen).data_ptr() != frozen.ctypes.data
    check(to_tensor(own[::2]))
    with pytest.raises(RuntimeError, match="not contiguous and writable"):
        check(torch.from_numpy(own)[::2])


def test_contenders_take_turns(written):
    asked = []

    class Named(Local):
        absent = None

        def __init__(self, name):
            self.name = name

        def rate(self, seconds):
            asked.append((self.name, seconds))
            return float(len(asked))

    a, b = Named("a"), Named("b")
    b_rates = in_turn([a, b], rounds=3, seconds=6)[1].per_second
    assert asked == [("a", 2), ("b", 2)] * 3 and b_rates == [2, 4, 6]
    b.absent = "absent: pip install b"
    assert in_turn([a, b], rounds=1, seconds=1)[1].per_second == []


def test_the_stopwatch_counts_samples_over_epochs(monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr("mstkd.bench.reading.time.perf_counter", lambda: next(ticks))
    watch = Stopwatch(lambda: iter([{"n": 1}, {"n": 2}]))
    assert watch.rate(seconds=5) == 1  # one tick a sample: five of them, over three epochs


# peers


def test_a_peer_that_is_not_installed_is_named(tmp_path):
    bare = tmp_path / "python"
    bare.write_text(f"#!/bin/sh\nexec {sys.executable} -I -S \"$@\"\n")  # no site-packages: no peer
    bare.chmod(0o755)
    for kind, named in (("mds", "mosaicml-streaming (no module streaming)"), ("litdata", "litdata (no module litdata)")):
        with Peer(kind, bare) as peer:
            assert peer.absent == f"absent: pip install {named}"
            peer.write(tmp_path, tmp_path / kind)
            peer.check([])
            assert peer.versions() == {}


@pytest.mark.parametrize("kind", NAMES)
def test_an_installed_peer_delivers_the_same_data(written, kind, tmp_path):
    python = Path(os.environ.get("MSTKD_PEER_PYTHON", sys.executable))
    with Peer(kind, python) as peer:
        if peer.absent:
            pytest.skip(f"{peer.name}: {peer.absent}; MSTKD_PEER_PYTHON names an interpreter that has it")
        folder, _, truths = written
        peer.write(folder, tmp_path / kind)
        peer.check(truths)
        assert peer.dtype == "float16" and peer.rate(0.01) > 0
        with pytest.raises(RuntimeError, match="delivered 10 of 9 subjects"):
            peer.check(truths[1:])


def test_a_peer_program_that_breaks_is_one_line(tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'no such module' >&2\nexit 3\n")
    broken.chmod(0o755)
    with pytest.raises(UserError, match="no such module.*--peer-python"):
        Peer("mds", broken)
    with pytest.raises(UserError, match="cannot be started"):
        Peer("mds", tmp_path / "missing")


# bad input, report


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--shape", "20,18"], "--shape 20,18: give three whole numbers"),
        (["--shape", "8,20,20"], "at least 16 voxels"),
        (["--seconds", "0"], "--seconds 0: give a positive number"),
        (["--dir", "/no/such/folder"], "--dir /no/such/folder: no such folder"),
        (["--json", "/no/such/folder/x.json"], "--json /no/such/folder/x.json: not a file in a folder that exists"),
    ],
)
def test_bad_input_is_one_line(words, said):
    done = bench_data(*words)
    assert done.returncode == 2 and said in done.stderr.splitlines()[-1]


def test_a_disk_that_is_too_small_stops_before_anything_is_written(monkeypatch, tmp_path):
    lines = []
    settings = bench.Settings()
    monkeypatch.setattr(bench.shutil, "disk_usage", lambda _: type("Usage", (), {"free": settings.needed_bytes - 1}))
    with pytest.raises(UserError, match="GB free, .* GB needed"):
        bench.bench_data(settings, tmp_path, None, lines.append)
    assert "needs 3." in lines[0] and not list(tmp_path.iterdir())


def test_medians_spread_ratios_and_verdicts():
    fast, slow, gone = figure("fast", "volumes/s", [30, 10, 20]), figure("slow", "volumes/s", [4]), figure("gone", "volumes/s", [])
    assert (fast.median, fast.low, fast.high) == (20, 10, 30)
    assert ratio(fast, slow) == 5 and ratio(fast, gone) is None and ratio(None, slow) is None
    assert [Target("t", at_least=3, reached=reached).verdict for reached in (3, 2.9, None)] == ["pass", "miss", "not measured"]
    assert [Target("t", at_most=2, reached=reached).verdict for reached in (2, 2.1)] == ["pass", "miss"]


def test_targets_without_peers_are_not_measured():
    verdicts = {target.name: target.verdict for target in bench.targets([Figure(Ours.name, "volumes/s", 9.0), Figure(PlainWebDataset.name, "volumes/s", 3.0)])}
    assert verdicts["full volumes / plain WebDataset"] == "pass" and verdicts["full volumes / MDS"] == "not measured"


def test_memory_of_this_process_is_read_in_bytes():
    before, mapped = pss_bytes(os.getpid())
    block = np.ones(64 << 20, np.uint8)
    after, _ = pss_bytes(os.getpid())
    assert after - before > 60 << 20 and mapped > 0 and block[-1] == 1
