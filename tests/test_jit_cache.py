"""Code compiled at run time: where it lies, one builder at a time, and killed builds that block nobody."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from mstkd.engine import jit_cache
from mstkd.engine.jit_cache import JitCache, one_builder, place_caches
from mstkd.errors import UserError

VARIABLES = ("TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR")

# torch's own lock, taken as its builds take it, and kept until this process is killed
HOLD_LOCK = """
import sys
from pathlib import Path
from torch.utils.file_baton import FileBaton
lock = Path(sys.argv[1])
lock.parent.mkdir(parents=True, exist_ok=True)
assert FileBaton(str(lock)).try_acquire()
print("held", flush=True)
sys.stdin.read()
"""

HOLD_TURN = """
import sys
from pathlib import Path
from mstkd.engine.jit_cache import JitCache, one_builder
with one_builder(JitCache(Path(sys.argv[1]), ours=True), "small"):
    print("held", flush=True)
    sys.stdin.read()
"""

BUILD = """
import sys
from pathlib import Path
from mstkd.engine.jit_cache import place_caches, one_builder
from torch.utils.cpp_extension import load
cache = place_caches()
with one_builder(cache, "small"):
    load("small", [sys.argv[1]], is_python_module=False)
import torch
assert torch.ops.small.answer() == 42
"""

SMALL = """
#include <torch/library.h>
static int64_t answer() { return 42; }
TORCH_LIBRARY(small, m) { m.def("answer() -> int", answer); }
"""

BUILD_COLLECTIVES = """
from mstkd.engine.jit_cache import place_caches, one_builder
cache = place_caches()
from deepspeed.accelerator import get_accelerator
builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
with one_builder(cache, builder.name):
    builder.load()
"""


@pytest.fixture
def node(tmp_path, monkeypatch):
    """A node whose temporary folder is empty and where nothing is set; what a test sets is undone."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("PATH", os.environ["PATH"])
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield tmp_path
    tempfile.tempdir = None


def started(code: str, *words) -> subprocess.Popen:
    """A process that has said that it holds what it should hold."""
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, words)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def killed(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()


def run_together(code: str, count: int, environment: dict[str, str], *words) -> None:
    command = [sys.executable, "-c", code, *map(str, words)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [subprocess.Popen(command, env=environment, **streams) for _ in range(count)]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * count, outputs


def environment_of(node: Path) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in VARIABLES} | {
        "TMPDIR": str(node), "OMP_NUM_THREADS": "1", "MAX_JOBS": "2", "DS_ACCELERATOR": "cpu",
    }  # fmt: skip


def built_files(folder: Path) -> list[str]:
    """What ninja built, once per time that it built it."""
    return sorted(line.split("\t")[3] for line in (folder / ".ninja_log").read_text().splitlines()[1:])


def test_caches_lie_in_a_private_folder_of_the_node(node):
    cache = place_caches()
    (folder,) = node.iterdir()
    assert cache == JitCache(folder / "extensions", ours=True)
    assert [os.environ[name] for name in VARIABLES] == [str(folder / "extensions"), str(folder / "triton")]
    assert folder.stat().st_mode & 0o777 == 0o700
    assert place_caches() == cache  # a child process, whose environment has it already


def test_what_the_user_set_stays(node, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(node / "mine"))
    assert place_caches() == JitCache(node / "mine", ours=False)
    assert os.environ["TRITON_CACHE_DIR"].startswith(str(node / "mstkd-"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(node / "kernels"))
    place_caches()
    assert os.environ["TRITON_CACHE_DIR"] == str(node / "kernels")


def test_other_versions_and_other_cpus_get_other_folders(node, monkeypatch):
    keys = {jit_cache._build_key()}
    monkeypatch.setattr(jit_cache, "_cpu_features", lambda: "flags: another CPU")
    keys.add(jit_cache._build_key())
    monkeypatch.setattr(jit_cache.metadata, "version", lambda package: "9.9")
    keys.add(jit_cache._build_key())
    assert len(keys) == 3


@pytest.mark.parametrize("spoil", ["others may write", "a link", "a file"])
def test_a_folder_that_others_could_have_filled_is_refused(node, spoil):
    place_caches()
    (folder,) = node.iterdir()
    for name in VARIABLES:
        del os.environ[name]
    folder.rmdir()
    if spoil == "others may write":
        folder.mkdir()
        folder.chmod(0o777)
    elif spoil == "a link":
        folder.symlink_to(node)
    else:
        folder.touch()
    with pytest.raises(UserError, match=f"{folder.name}.*remove it, or set TMPDIR|cannot make .*{folder.name}.*set TMPDIR"):
        place_caches()
    assert not any(name in os.environ for name in VARIABLES)


def test_the_lock_of_a_killed_build_is_removed(tmp_path):
    lock = tmp_path / "small" / "lock"
    killed(started(HOLD_LOCK, lock))
    assert lock.exists()
    with one_builder(JitCache(tmp_path, ours=True), "small", limit_s=0):
        assert not lock.exists()


def test_the_lock_of_a_live_build_is_left_alone(tmp_path):
    lock = tmp_path / "small" / "lock"
    holder = started(HOLD_LOCK, lock)
    with pytest.raises(UserError, match=f"{lock}.*process {holder.pid}; end that build"), one_builder(JitCache(tmp_path, True), "small", 0):
        pass
    assert lock.exists()
    killed(holder)


def test_a_compiler_that_outlives_its_build_is_waited_for(tmp_path):
    lock = tmp_path / "small" / "lock"
    killed(started(HOLD_LOCK, lock))
    compiler = subprocess.Popen(["cat"], cwd=lock.parent, stdin=subprocess.PIPE)
    with pytest.raises(UserError, match=f"process {compiler.pid};"), one_builder(JitCache(tmp_path, True), "small", 0):
        pass
    compiler.communicate()
    with one_builder(JitCache(tmp_path, True), "small", 0):
        assert not lock.exists()


def test_in_a_folder_of_the_user_a_lock_is_named_and_kept(tmp_path):
    lock = tmp_path / "small" / "lock"
    killed(started(HOLD_LOCK, lock))
    with pytest.raises(UserError, match=f"{lock}.*delete the file if none is running"), one_builder(JitCache(tmp_path, False), "small", 0):
        pass
    assert lock.exists()


def test_a_builder_that_is_killed_gives_up_its_turn(tmp_path):
    holder = started(HOLD_TURN, tmp_path)
    waiting = subprocess.Popen([sys.executable, "-c", HOLD_TURN, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    killed(holder)
    assert waiting.stdout.readline() == "held\n"
    killed(waiting)


def test_ninja_is_found_where_the_environment_is_not_activated(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    for _ in range(2):
        with one_builder(JitCache(tmp_path, ours=True), "small"):
            assert os.environ["PATH"].split(os.pathsep) == ["/nowhere", jit_cache.sysconfig.get_path("scripts")]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    cache = JitCache(tmp_path / "file", ours=False)
    with pytest.raises(UserError, match="TORCH_EXTENSIONS_DIR: cannot write to .*file"), one_builder(cache, "small"):
        pass


def test_processes_that_start_at_once_compile_once(node):
    source = node / "small.cpp"
    source.write_text(SMALL)
    environment = environment_of(node)
    run_together(BUILD, 3, environment, source)
    (folder,) = node.glob("mstkd-*/extensions/small")
    assert built_files(folder) == ["small.o", "small.so"]
    killed(started(HOLD_LOCK, folder / "lock"))
    run_together(BUILD, 2, environment, source)
    assert built_files(folder) == ["small.o", "small.so"]


@pytest.mark.slow
def test_deepspeeds_collectives_are_compiled_once_per_node(node):
    run_together(BUILD_COLLECTIVES, 2, environment_of(node))
    (folder,) = node.glob("mstkd-*/extensions/deepspeed_shm_comm")
    assert built_files(folder) == ["deepspeed_shm_comm.so", "shm.o", "shm_interface.o"]
