"""A build in pieces: by several workers, parts, or after an interruption, it ends in the same bytes or says what to do."""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nifti_trees import head, write_nifti, write_phantom_like

from mstkd.errors import UserError
from mstkd.shards.build import build
from mstkd.shards.dataset import SPEC_FOLDER, load_spec
from mstkd.shards.disk import estimate
from mstkd.shards.parts import WorkFolder, merge
from mstkd.shards.spec import read_index
from mstkd.shards.verify import verify

MSTKD = str(Path(sys.executable).parent / "mstkd")
PHANTOM_SPEC = (SPEC_FOLDER / "phantom.yaml").read_text().replace("name: phantom", "name: mine", 1)
SUBJECTS = 8
DEADLINE_S = 120


@pytest.fixture(scope="module")
def src(tmp_path_factory):
    return write_phantom_like(tmp_path_factory.mktemp("cohort") / "src", SUBJECTS)


@pytest.fixture(scope="module")
def whole(src, tmp_path_factory):
    """Digests of the set that one worker builds in one go."""
    out = tmp_path_factory.mktemp("whole") / "set"
    build("phantom", src, out, subjects_per_shard=1)
    verify(out)
    return digests(out)


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def one_each(src, out, **options):
    return build("phantom", src, out, subjects_per_shard=1, **options)


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_do_not_change_a_byte(src, whole, tmp_path, workers):
    one_each(src, tmp_path / "set", workers=workers)
    assert digests(tmp_path / "set") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_parts_in_any_order_do_not_change_a_byte(src, whole, tmp_path):
    out = tmp_path / "set"
    for number in (2, 3, 1):
        with pytest.raises(UserError):
            merge(out)
        assert one_each(src, out, part=(number, 3)) is None
        assert not out.exists()
    index, text = merge(out)
    assert digests(out) == whole and len(index.subjects()) == SUBJECTS and f"{SUBJECTS} subjects" in text
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    with pytest.raises(UserError, match="exists already, and nothing is left to merge"):
        merge(out)


def test_parts_at_the_same_time_and_more_of_them_than_tars(src, whole, tmp_path):
    words = ["shards", "build", "--spec", "phantom", "--src", src, "--out", tmp_path / "set", "--subjects-per-shard", "1"]
    parts = [subprocess.Popen([MSTKD, *map(str, words), "--part", f"{number}/10"]) for number in range(1, 11)]
    assert [part.wait(DEADLINE_S) for part in parts] == [0] * 10
    done = subprocess.run([MSTKD, "shards", "merge", str(tmp_path / "set")], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == f"wrote 8 subjects in 8 tars to {tmp_path / 'set'}\n", done.stderr
    assert digests(tmp_path / "set") == whole


def test_merge_names_the_parts_that_lack_tars(src, whole, tmp_path):
    out = tmp_path / "set"
    with pytest.raises(UserError, match=r"no plan\.json; build the parts first"):
        merge(out)
    one_each(src, out, part=(1, 3))
    with pytest.raises(UserError, match=r"5 of 8 tars are not built yet \(part 2/3, 3/3\)"):
        merge(out)
    one_each(src, out, resume=True)  # anyone may do the rest
    assert digests(out) == whole


def test_what_does_not_belong_together_is_refused(src, tmp_path):
    out = tmp_path / "set"
    one_each(src, out, part=(1, 3))
    for options, words in (
        ({"part": (1, 3)}, r"part 1/3 was begun before; go on with --resume"),
        ({"part": (1, 2)}, "was begun in 3 parts, --part says 2"),
        ({}, r"set\.partial: an unfinished build; go on with --resume, or remove it"),
        ({"part": (2, 3), "seed": 1}, "was begun otherwise: seed is another"),
        ({"resume": True, "pseudonymise": True}, "begun otherwise: --pseudonymise or its salt"),
    ):
        with pytest.raises(UserError, match=words):
            one_each(src, out, **options)
    with pytest.raises(UserError, match="subjects_per_shard is another"):
        build("phantom", src, out, part=(2, 3))
    assert not out.exists()


def test_changed_spec_and_changed_source_are_named(src, tmp_path):
    own, spec, out = shutil.copytree(src, tmp_path / "src"), tmp_path / "own.yaml", tmp_path / "set"
    spec.write_text(PHANTOM_SPEC)
    build(spec, own, out, subjects_per_shard=1, part=(1, 8))
    spec.write_text(PHANTOM_SPEC + "preprocessing: {margin_voxels: 2}\n")
    with pytest.raises(UserError, match="the spec's preprocessing was .* and is .*'margin_voxels': 2"):
        build(spec, own, out, subjects_per_shard=1, resume=True)
    spec.write_text(PHANTOM_SPEC)
    changed = own / "Phantom_0000" / "Phantom_0000_t1.nii.gz"
    times = changed.stat()
    os.utime(changed, (1, 1))
    with pytest.raises(UserError, match=r"source Phantom_0000/Phantom_0000_t1\.nii\.gz: changed since mine-000000\.tar was built of it"):
        build(spec, own, out, subjects_per_shard=1, resume=True)
    os.utime(changed, ns=(times.st_atime_ns, times.st_mtime_ns))
    shutil.rmtree(own / "Phantom_0005")
    with pytest.raises(UserError, match="subject Phantom_0005 is gone from the source"):
        build(spec, own, out, subjects_per_shard=1, resume=True)
    assert not out.exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_scan_costs_no_finished_tar(src, whole, tmp_path, workers):
    own, out = shutil.copytree(src, tmp_path / "src"), tmp_path / "set"
    scan = own / "Phantom_0007" / "Phantom_0007_t1.nii.gz"
    sound = scan.read_bytes()
    write_nifti(scan, head(0) * 0)
    with pytest.raises(UserError, match=r"Phantom_0007_t1\.nii\.gz: .*; [1-7] of 8 tars are kept in .*set\.partial, go on with .* --resume"):
        one_each(own, out, workers=workers)
    finished = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "set.partial" / "set").iterdir()}
    assert finished and all(name.endswith(".tar") for name in finished)
    scan.write_bytes(sound)
    one_each(own, out, workers=workers, resume=True)
    assert digests(out) == whole
    assert {name: (out / name).stat().st_mtime_ns for name in finished} == finished  # not built again


def test_a_lost_or_cut_tar_is_noticed(src, tmp_path):
    out = tmp_path / "set"
    for number in (1, 2):
        one_each(src, out, part=(number, 2))
    tar = WorkFolder(out).set / "phantom-000003.tar"
    data = tar.read_bytes()
    tar.write_bytes(data[:-512])
    with pytest.raises(UserError, match=rf"phantom-000003\.tar: has {len(data) - 512} bytes, not {len(data)}; remove .*json"):
        merge(out)
    tar.unlink()
    with pytest.raises(UserError, match=r"phantom-000003\.tar: is missing; remove .*phantom-000003\.tar\.json"):
        merge(out)


def test_two_at_once_are_refused(src, tmp_path):
    out = tmp_path / "set"
    one_each(src, out, part=(1, 2))
    one_each(src, out, part=(2, 2))
    with (WorkFolder(out).path / "part-1-of-2.lock").open("a+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"part-1-of-2\.lock: held; another process"):
            one_each(src, out, part=(1, 2), resume=True)
    with (WorkFolder(out).path / "build.lock").open("a+b") as held:
        fcntl.flock(held, fcntl.LOCK_SH)  # as a part does that is at work
        with pytest.raises(UserError, match=r"build\.lock: held"):
            merge(out)
        one_each(src, out, part=(1, 2), resume=True)
    merge(out)


# interruptions of a real process


@pytest.fixture(scope="module")
def slow_src(tmp_path_factory):
    """Subjects large enough that a build can be stopped in the middle."""
    src = tmp_path_factory.mktemp("slow") / "src"
    for number in range(24):
        subject = f"Phantom_{number:04d}"
        for channel, name in enumerate(("flair", "t1", "t1ce", "t2")):
            write_nifti(src / subject / f"{subject}_{name}.nii", head(number * 10 + channel, (96, 96, 72)))
        write_nifti(src / subject / f"{subject}_seg.nii", np.zeros((96, 96, 72), np.uint8))
    return src


@pytest.fixture(scope="module")
def slow_whole(slow_src, tmp_path_factory):
    out = tmp_path_factory.mktemp("slow-whole") / "set"
    one_each(slow_src, out, workers=2)
    return digests(out)


def started(src, out, workers, *words):
    """A build in a process of its own, once its first tar is finished."""
    command = [MSTKD, "shards", "build", "--spec", "phantom", "--src", str(src), "--out", str(out), "--workers", str(workers)]
    process = subprocess.Popen([*command, "--subjects-per-shard", "1", *words], stderr=subprocess.PIPE, text=True, start_new_session=True)
    partial, end = out.with_name(f"{out.name}.partial"), time.monotonic() + DEADLINE_S
    while not any(partial.glob("*.tar.json")):
        assert process.poll() is None and time.monotonic() < end, process.stderr.read()
        time.sleep(0.005)
    return process, partial


def workers_of(process):
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children]


def gone(pid):
    state = Path(f"/proc/{pid}/stat")
    try:
        return state.read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.parametrize("workers", [1, 3])
def test_killed_and_resumed_it_is_the_same_and_nothing_outlives_it(slow_src, slow_whole, tmp_path, workers):
    out = tmp_path / "set"
    process, partial = started(slow_src, out, workers)
    children = workers_of(process)
    process.kill()
    process.wait()
    assert not out.exists() and len(list(partial.glob("*.tar.json"))) < 24, "it was over before it was killed"
    end = time.monotonic() + DEADLINE_S
    while not all(map(gone, children)):
        assert time.monotonic() < end, "workers go on without their parent"
        time.sleep(0.005)
    with pytest.raises(UserError, match="an unfinished build; go on with --resume"):
        one_each(slow_src, out)
    kept = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.tar.json")}
    tars = {name.removesuffix(".json"): (partial / "set" / name.removesuffix(".json")).stat().st_mtime_ns for name in kept}
    one_each(slow_src, out, workers=2, resume=True)
    assert digests(out) == slow_whole
    assert {name: (out / name).stat().st_mtime_ns for name in tars} == tars
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize(("number", "code", "workers"), [(signal.SIGTERM, 143, 1), (signal.SIGTERM, 143, 2), (signal.SIGINT, 130, 2)])
def test_a_signal_ends_it_cleanly_and_says_how_to_go_on(slow_src, slow_whole, tmp_path, number, code, workers):
    out = tmp_path / "set"
    process, partial = started(slow_src, out, workers)
    os.killpg(process.pid, number)  # a terminal and a scheduler signal the workers too
    said = process.communicate(timeout=DEADLINE_S)[1]
    assert process.returncode == code, said
    assert f"tars are kept in {partial}, go on with the same command and --resume" in said and "Traceback" not in said
    assert not any(partial.rglob("*.tmp"))
    again = subprocess.run([*process.args, "--resume"], capture_output=True, text=True, timeout=DEADLINE_S)
    assert again.returncode == 0, again.stderr
    assert digests(out) == slow_whole


def test_a_killed_worker_is_named_and_the_rest_is_kept(slow_src, slow_whole, tmp_path):
    process, partial = started(slow_src, tmp_path / "set", 2)
    workers = [child for child in workers_of(process) if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
    os.kill(workers[0], signal.SIGKILL)
    said = process.communicate(timeout=DEADLINE_S)[1]
    assert process.returncode == 2 and "worker process was killed" in said and "--resume" in said
    one_each(slow_src, tmp_path / "set", resume=True)
    assert digests(tmp_path / "set") == slow_whole


# disk and memory


def test_a_set_that_cannot_fit_is_refused_before_it_starts(src, tmp_path):
    own = shutil.copytree(src, tmp_path / "src")
    header = nib.Nifti1Image(np.zeros((1, 1, 1), np.int16), np.eye(4)).header
    header.set_data_shape((30000, 30000, 30000))
    for name in ("flair", "t1", "t1ce", "t2"):
        (own / "Phantom_0004" / f"Phantom_0004_{name}.nii.gz").unlink()
        (own / "Phantom_0004" / f"Phantom_0004_{name}.nii").write_bytes(header.binaryblock + bytes(4))
    with pytest.raises(UserError, match=r"needs about [\d.]+ [GT]iB \(at most [\d.]+ [GT]iB, .*\), and its disk has [\d.]+ [MGT]iB free; make room"):
        one_each(own, tmp_path / "set")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]


def test_the_estimate_is_near_what_is_written(slow_src, slow_whole, tmp_path):
    dataset = load_spec("phantom")
    expected = estimate(dataset.find_cases(slow_src), dataset)
    one_each(slow_src, tmp_path / "set", workers=2)
    written = sum(path.stat().st_size for path in (tmp_path / "set").iterdir())
    assert 0.9 * written < expected.likely < 1.1 * written < expected.bound


def can_mount():
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", tempfile.gettempdir()]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="no right to mount a small file system")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_disk_that_gets_full_ends_it_with_what_to_do(tmp_path, workers):
    """The first subject, which the estimate measures, has far more background than the others."""
    src, small = tmp_path / "src", tmp_path / "small"
    small.mkdir()
    for number in range(8):
        subject = f"Phantom_{number:04d}"
        for channel, name in enumerate(("flair", "t1", "t1ce", "t2")):
            volume = np.random.default_rng(number * 4 + channel).integers(1, 1000, (64, 64, 48), np.int16)
            if number == 0:
                volume[16:] = 0
            write_nifti(src / subject / f"{subject}_{name}.nii", volume)
        write_nifti(src / subject / f"{subject}_seg.nii", np.zeros((64, 64, 48), np.uint8))
    command = f"{MSTKD} shards build --spec phantom --src {src} --out {small}/set --subjects-per-shard 1 --workers {workers}"
    script = f"""
        mount -t tmpfs -o size=8m tmpfs {small}
        {command}; echo code $?
        ls {small}; find {small}/set.partial -name '*.tmp'
        mount -o remount,size=80m {small}
        {command} --resume; echo code $?
        cd {small}/set && sha256sum *
    """
    done = subprocess.run(["unshare", "-rm", "bash", "-c", script], capture_output=True, text=True, timeout=DEADLINE_S)
    one_each(src, tmp_path / "set")
    expected = [f"{digest}  {name}" for name, digest in digests(tmp_path / "set").items()]
    assert done.stdout.splitlines() == ["code 2", "set.partial", f"wrote 8 subjects in 8 tars to {small}/set", "code 0", *expected], done.stderr
    said = next(line for line in done.stderr.splitlines() if line.startswith("error"))
    assert re.search(r"set\.partial: the disk is full \([\d.]+ [KM]iB free\); make room; [2-4] of 8 tars are kept .* --resume", said)


def peak_mb(spec, src, out, per_tar):
    """The largest memory of a worker, in MB, of a build with two of them."""
    code = f"""
from resource import RUSAGE_CHILDREN, getrusage
from mstkd.shards.build import build
if __name__ == "__main__":
    build({str(spec)!r}, {str(src)!r}, {str(out)!r}, workers=2, subjects_per_shard={per_tar})
    print(getrusage(RUSAGE_CHILDREN).ru_maxrss / 1024)
"""
    script = out.with_name(f"{out.name}.py")
    script.write_text(code)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def test_memory_does_not_grow_with_the_subjects(slow_src, tmp_path):
    few, spec = tmp_path / "few", tmp_path / "wide.yaml"
    spec.write_text(PHANTOM_SPEC + "preprocessing: {margin_voxels: 100}\n")  # whole volumes are stored: 6.6 MB each
    few.mkdir()
    for number in range(6):
        (few / f"Phantom_{number:04d}").symlink_to(slow_src / f"Phantom_{number:04d}")
    small, large = peak_mb(spec, few, tmp_path / "small", 3), peak_mb(spec, slow_src, tmp_path / "large", 12)
    stored_mb = sum(size for _, size in next(iter(read_index(tmp_path / "large").subjects().values())).members.values()) / 1e6
    assert stored_mb > 6 and large < small + 3 * stored_mb, f"{small:.0f} MB for 6 subjects, {large:.0f} MB for 24 of {stored_mb:.0f} MB"


def test_a_terminal_sees_a_bar_with_rate_and_time_left(src, tmp_path):
    reader, terminal = os.openpty()
    command = [MSTKD, "shards", "build", "--spec", "phantom", "--src", str(src), "--out", str(tmp_path / "set")]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "160"}
    with subprocess.Popen(command, stderr=terminal, stdout=subprocess.DEVNULL, env=environment) as process:
        os.close(terminal)
        shown = b""
        with contextlib.suppress(OSError):  # the terminal's end
            while block := os.read(reader, 65536):
                shown += block
    os.close(reader)
    assert process.returncode == 0
    assert re.search(rb"phantom: subjects .*8/8.* subjects/s, [\d.]+ MB/s, 0:00:00 left", shown.replace(b"\x1b[0m", b""))
