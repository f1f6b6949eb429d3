"""A cluster without internet: the wheelhouse made here, installed and used in a network namespace that reaches nothing."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WHEELHOUSE = ROOT / "launch" / "wheelhouse.sh"
DEFINITION = ROOT / "slurm" / "mstkd.def"


def call(*words, env: dict[str, str] | None = None, cwd: Path | None = None) -> subprocess.CompletedProcess:
    return subprocess.run([str(word) for word in words], env=env, cwd=cwd, capture_output=True, text=True)


def why_no_namespace() -> str | None:
    if os.geteuid() != 0:
        return "network namespaces need root"
    if missing := [name for name in ("unshare", "ip") if shutil.which(name) is None]:
        return f"no program {missing[0]}: install util-linux and iproute2"
    tried = call("unshare", "-n", "ip", "link", "set", "lo", "up")
    return None if tried.returncode == 0 else f"no network namespace here: {tried.stderr.strip()}"


@pytest.fixture(scope="module")
def namespaces():
    if reason := why_no_namespace():
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)


def section(name: str) -> str:
    """The body of a section of the container definition."""
    return re.search(rf"^%{name}\n(.*?)(?=^%|\Z)", DEFINITION.read_text(), re.MULTILINE | re.DOTALL).group(1)


@pytest.fixture(scope="module")
def wheelhouse(tmp_path_factory, namespaces) -> Path:
    out = tmp_path_factory.mktemp("airgap") / "wheelhouse"
    made = call("bash", WHEELHOUSE, out, env=os.environ | {"PYTHON": sys.executable})
    assert made.returncode == 0, made.stderr[-3000:]
    assert f"--install {out.name} mstkd-env" in made.stdout
    yield out
    shutil.rmtree(out, ignore_errors=True)


class Offline:
    """A node with nothing but its loopback: no network, no home, no settings of pip, no compiled code from elsewhere."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {
            "PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "HOME": str(folder), "TMPDIR": str(folder), "LC_ALL": "C.UTF-8",
            "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "MAX_JOBS": "2",
        }  # fmt: skip

    def call(self, *words) -> subprocess.CompletedProcess:
        return call("unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *words, env=self.environment, cwd=self.folder)

    def run(self, *words) -> str:
        done = self.call(*words)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout


@pytest.fixture(scope="module")
def offline(tmp_path_factory, wheelhouse):
    """A node where %post of the container definition has installed the wheelhouse."""
    node = Offline(tmp_path_factory.mktemp("node"))
    (install,) = (line for line in section("post").splitlines() if "--install" in line)
    install = install.replace("/opt/wheelhouse", str(wheelhouse)).replace("/opt/mstkd", str(node.folder / "venv"))
    node.run("sh", "-c", install.replace("/usr/bin/python3", sys.executable))
    yield node
    shutil.rmtree(node.folder, ignore_errors=True)


@pytest.mark.slow
def test_the_wheelhouse_holds_wheels_only_and_the_tested_versions(wheelhouse):
    wheels = {tuple(path.name.split("-")[:2]) for path in wheelhouse.glob("*.whl")}
    names = {name.lower() for name, _ in wheels}
    assert {"mstkd", "torch", "deepspeed", "mlflow", "setuptools", "wheel", "pip"} <= names
    pins = dict(line.split("==") for line in (ROOT / "launch" / "constraints.txt").read_text().splitlines() if "==" in line)
    pins = {name.lower().replace("-", "_").replace(".", "_"): version for name, version in pins.items()}
    for name, version in wheels:
        assert version.partition("+")[0] == pins.get(name.lower(), version.partition("+")[0]), name
    assert {path.name for path in wheelhouse.iterdir() if path.suffix != ".whl"} == {
        "SHA256SUMS", "constraints.txt", "platform.txt", "wheelhouse.sh",
    }  # fmt: skip


@pytest.mark.slow
def test_the_node_reaches_nothing(offline):
    code = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=60)"
    assert "Network is unreachable" in offline.call(sys.executable, "-c", code).stderr


@pytest.mark.slow
def test_the_installation_comes_from_the_wheelhouse(offline):
    python = offline.folder / "venv/bin/python"
    for module in ("mstkd", "mstkd.launch", "mstkd.shards", "torch", "deepspeed"):
        place = offline.run(python, "-c", f"from importlib.util import find_spec; print(find_spec('{module}').origin)")
        assert place.startswith(str(offline.folder / "venv")), place
    offline.run(python, "-m", "pip", "check")


@pytest.mark.slow
def test_without_network_it_makes_data_and_trains(offline):
    """The environment is not activated, as in a job whose batch line names the interpreter by path."""
    mstkd, runs = offline.folder / "venv/bin/mstkd", offline.folder / "runs"
    assert "train" in offline.run(mstkd, "--help")
    assert "mst_kdnet" in offline.run(mstkd, "methods")
    offline.run(mstkd, "shards", "phantom", "--out", "nifti", "--subjects", "6", "--size", "32")
    offline.run(mstkd, "shards", "build", "--spec", "phantom", "--src", "nifti", "--out", "shards")
    offline.run(mstkd, "train", "mst_kdnet_phantom", "data.shards=shards", "data.crop=[32,32,32]", "train.steps=1", "train.global_batch=1",
                "train.log_every=1", "validate.max_cases=1", "validate.subsets=[flair]", "name=one", f"runs_dir={runs}")  # fmt: skip
    records = [json.loads(line) for line in (runs / "one/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "train/loss_networks" in record] == [1], records
    assert (runs / "one/distill/checkpoints/latest").read_text() == "step-00000001\n"


@pytest.mark.slow
def test_a_damaged_wheel_is_named(wheelhouse, tmp_path):
    (torch_wheel,) = (path.name for path in wheelhouse.glob("torch-*.whl"))
    copy = wheelhouse.with_name("copy")
    shutil.copytree(wheelhouse, copy, copy_function=os.link)
    (copy / torch_wheel).unlink()
    (copy / torch_wheel).write_bytes(b"half a file")
    refused = call("bash", copy / "wheelhouse.sh", "--install", copy, tmp_path / "venv", env=os.environ | {"PYTHON": sys.executable})
    shutil.rmtree(copy)
    assert refused.returncode == 2 and refused.stdout == f"{torch_wheel}: FAILED\n"
    assert refused.stderr.strip().endswith("missing or damaged; copy it again") and not (tmp_path / "venv").exists()


def house_for(folder: Path, platform: str) -> Path:
    folder.mkdir()
    (folder / "SHA256SUMS").touch()
    (folder / "platform.txt").write_text(platform + "\n")
    return folder


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "usage: bash launch/wheelhouse.sh OUT_DIR"),
        (["--instal", "a", "b"], "usage: bash launch/wheelhouse.sh OUT_DIR"),
        (["--install", "house"], "usage: bash wheelhouse.sh --install WHEELHOUSE VENV"),
        (["--install", "empty", "venv"], "empty is no wheelhouse .* copy all of it"),
        (["--install", "other", "venv"], "is for cpython 3.99 linux riscv64, .* make another wheelhouse"),
        (["full"], "full is not empty: remove it, or name another folder"),
    ],
)
def test_bad_input_is_one_line(tmp_path, words, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "old.whl").touch()
    house_for(tmp_path / "other", "cpython 3.99 linux riscv64")
    refused = call("bash", WHEELHOUSE, *words, cwd=tmp_path, env=os.environ | {"PYTHON": sys.executable})
    assert refused.returncode == 2
    assert re.fullmatch(f"error: .*{message}.*\n", refused.stderr), refused.stderr


def test_a_missing_interpreter_is_named(tmp_path):
    refused = call("bash", WHEELHOUSE, tmp_path / "out", env=os.environ | {"PYTHON": "python9"})
    assert refused.returncode == 2 and "no program python9: load a Python module" in refused.stderr


@pytest.mark.parametrize("name", ["post", "environment", "test", "runscript"])
def test_the_shell_of_the_container_definition_is_valid(name):
    subprocess.run(["sh", "-n", "-c", section(name)], check=True)


def test_the_container_definition_names_what_the_wheelhouse_needs():
    text = DEFINITION.read_text()
    assert re.search(r"^Bootstrap: docker\nFrom: \S+$", text, re.MULTILINE)
    assert section("files").split() == ["wheelhouse", "/opt/wheelhouse"]
    assert {"g++", "python3-dev", "python3-venv"} <= set(section("post").split())
    assert set(re.findall(r"^%(\w+)", text, re.MULTILINE)) == {"files", "post", "environment", "test", "runscript", "labels"}
