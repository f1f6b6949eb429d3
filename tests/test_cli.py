"""The command line: what each command says, and that every failure is one line with the right exit code."""

import os
import pty
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from mstkd.launch import cli
from mstkd.launch.doctor import _package, _program
from mstkd.launch.doctor_finding import warn
from packaging.requirements import Requirement

MSTKD = str(Path(sys.executable).parent / "mstkd")


def mstkd(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    return subprocess.run([MSTKD, *words], capture_output=True, text=True, cwd=cwd, timeout=300)


def commands(command, words=()) -> dict[tuple[str, ...], object]:
    """Every command that does something, by its words."""
    nested = getattr(command, "commands", None)
    if nested is None:
        return {words: command}
    return {path: leaf for name, child in nested.items() for path, leaf in commands(child, (*words, name)).items()}


COMMANDS = commands(get_command(cli.app))


def test_the_commands_are_those_of_the_design():
    words = {" ".join(path) for path in COMMANDS}
    assert words == {
        "shards phantom", "shards prepare", "shards build", "shards merge", "shards index", "shards views", "shards verify", "shards inspect", "shards nnunet",
        "shards splits", "bench data", "bench step", "bench cost", "bench evaluate", "bench predict", "train", "plan", "submit", "status", "logs", "cancel", "study", "evaluate",
        "compare", "report", "predict", "export", "mlflow ui", "mlflow merge", "mlflow sync", "methods", "doctor",
    }  # fmt: skip


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_shows_an_example_whose_options_exist(words):
    help_text = COMMANDS[words].help
    examples = re.findall(r"Example: (mstkd .*)", help_text)
    assert examples
    options = {option for parameter in COMMANDS[words].params for option in parameter.opts}
    for example in examples:
        assert example.split()[1 : 1 + len(words)] == list(words)
        assert {word for word in example.split() if word.startswith("--")} <= options


def test_help_names_every_command():
    shown = mstkd("--help")
    assert shown.returncode == 0 and shown.stderr == ""
    assert all(words[0] in shown.stdout for words in COMMANDS)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ((), ("command", "mstkd --help")),
        (("trian",), ("trian", "train")),
        (("train",), ("RECIPE", "mstkd train --help")),
        (("train", "mst_kdnet_phantm"), ("mst_kdnet_phantm", "did you mean 'mst_kdnet_phantom'")),
        (("train", "mst_kdnet_phantom", "train.stepz=1"), ("train.stepz", "did you mean 'steps'")),
        (("shards", "phantom", "--out", "/proc/nowhere/x"), ("/proc/nowhere",)),
        (("status", "--runs-dir", "absent"), ("absent", "--runs-dir")),
        (("logs", "toy", "--runs-dir", "absent"), ("absent", "--runs-dir")),
        (("cancel", "12", "--runs-dir", "absent"), ("absent", "--runs-dir")),
        (("submit", "mst_kdnet_phantom", "--cluster", "absent"), ("absent", "no such cluster")),
        (("plan", "mst_kdnet_phantom"), ("demo/shards",)),
        (("plan", "mst_kdnet_phantom", "--world-size", "3"), ("train.global_batch 2", "1 or 2 ranks, not 3")),
        (("train", "mst_kdnet_phantom", "steps"), ("'steps'", "key=value")),
        (("shards", "build", "--spec", "brats2018", "--src", "a"), ("--out", "mstkd shards build --help")),
        (("shards", "phantom", "--out", "x", "--subjects", "0"), ("--subjects", "mstkd shards phantom --help")),
        (("shards", "verify", "absent"), ("absent",)),
        (("shards", "build", "--spec", "phantom", "--src", "a", "--out", "b", "--part", "3/2"), ("--part 3/2", "I/N")),
        (("shards", "merge", "absent"), ("absent", "--part 1/N")),
        (("shards", "index", "absent"), ("absent", "*.tar")),
        (("shards", "inspect", "absent"), ("absent",)),
        (("shards", "build", "--spec", "nope", "--src", "a", "--out", "b"), ("nope",)),
        (("evaluate",), ("RUN", "--pred")),
        (("evaluate", "absent", "--pred", "p"), ("RUN", "--pred")),
        (("evaluate", "--pred", "p"), ("--ref", "--spec")),
        (("evaluate", "absent"), ("absent",)),
        (("predict", "absent", "--input", "i", "--output", "o"), ("absent",)),
        (("export", "absent", "--out", "o"), ("absent",)),
        (("export", "absent", "--out", "o", "--format", "zip"), ("zip", "safetensors")),
        (("mlflow", "ui", "--runs-dir", "absent"), ("absent", "--runs-dir")),
        (("mlflow", "sync", "absent", "--to", "http://127.0.0.1:9"), ("absent",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_bad_input_is_one_line_on_stderr_and_exit_code_2(words, parts, tmp_path):
    done = mstkd(*words, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert all(part in line for part in parts), line
    assert not any(tmp_path.iterdir())


def test_a_taken_port_is_named(tmp_path):
    (tmp_path / "mlflow.db").touch()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        done = mstkd("mlflow", "ui", "--runs-dir", str(tmp_path), "--port", port)
    assert done.returncode == 2 and port in done.stderr and "--port" in done.stderr


def test_an_error_of_the_program_itself_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mstkd", "doctor"])
    monkeypatch.setattr("mstkd.launch.doctor.findings", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_ctrl_c_exits_with_130(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["mstkd", "doctor"])
    monkeypatch.setattr("mstkd.launch.doctor.findings", interrupted)
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 130


def test_methods_lists_every_method_with_its_stages():
    from mstkd.methods import available_methods, load

    shown = mstkd("methods")
    assert shown.returncode == 0
    for name in available_methods():
        assert name in shown.stdout and all(stage in shown.stdout for stage in load(name).stages)


def test_doctor_gives_a_line_per_dependency():
    done = mstkd("doctor")
    lines = done.stdout.splitlines()
    assert {"torch", "deepspeed", "mlflow", "accelerator", "g++", "disk"} <= {line.split()[1] for line in lines}
    assert done.returncode == int(any(line.startswith("FAIL") for line in lines))


def test_doctor_says_what_to_do():
    assert _package(Requirement("pydantic>=99")).state == "FAIL"
    assert str(_package(Requirement("no-such-package>=1"))).endswith('not installed; pip install "no-such-package>=1"')
    assert _package(Requirement("pydantic>=2,<3")).fix == ""
    assert _program("no-such-program", warn, "install it") == warn("no-such-program", "not found", "install it")


def test_from_phantom_to_a_verified_and_inspected_shard_set(tmp_path):
    steps = [
        ("shards", "phantom", "--out", "nifti", "--subjects", "4", "--size", "32"),
        ("shards", "build", "--spec", "phantom", "--src", "nifti", "--out", "shards"),
        ("shards", "verify", "shards"),
        ("shards", "inspect", "shards", "--png", "shards.png"),
    ]
    for words in steps:
        done = mstkd(*words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert "Phantom_0000" in done.stdout
    assert (tmp_path / "shards.png").read_bytes().startswith(b"\x89PNG")
    again = mstkd(*steps[1], cwd=tmp_path)
    assert again.returncode == 2 and len(again.stderr.splitlines()) == 1


def test_a_misspelt_key_is_named_before_the_one_it_leaves_missing(tmp_path):
    (tmp_path / "mine.yaml").write_text("name: x\nmethod: {name: mst_kdnet}\ndata: {shards: s, crop: [64, 64, 64]}\ntrian: {global_batch: 2}\n")
    done = mstkd("train", "mine.yaml", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "error: mine.yaml:4: unknown key trian; did you mean 'train'?\n")


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    done = mstkd("shards", "phantom", "--out", "file/nifti", "--subjects", "1", "--size", "32", cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "file" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("mstkd ev", {"evaluate"}), ("mstkd shards b", {"build"}), ("mstkd train utad_net_p", {"utad_net_phantom"}),
     ("mstkd study study_p", {"study_phantom"}), ("mstkd export runs/a --form", {"--format"})],
)  # fmt: skip
def test_a_shell_completes_commands_options_and_packaged_recipes(typed, offered):
    words = {"_MSTKD_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1)}
    done = subprocess.run([MSTKD], env=os.environ | words, capture_output=True, text=True, timeout=300)
    assert set(done.stdout.split()) == offered and done.returncode == 0


@pytest.mark.parametrize("words", [("evaluate", "runs/a", "--data"), ("compare", "runs/a", "runs/b", "--shards")])
def test_an_address_reaches_the_command_as_it_was_written(words):
    name, *given = words
    parsed = get_command(cli.app).commands[name].make_context(name, [*given, "s3://bucket/set"]).params
    assert parsed[given[-1].removeprefix("--")] == "s3://bucket/set"


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_no_color_is_respected_on_a_terminal(no_color, coloured):
    ours, theirs = pty.openpty()
    env = {key: value for key, value in os.environ.items() if key != "NO_COLOR"} | ({"NO_COLOR": no_color} if no_color else {})
    for words in (("train",), ("methods", "--help")):
        subprocess.run([MSTKD, *words], env=env | {"TERM": "xterm-256color"}, stdout=theirs, stderr=theirs, timeout=300)
        shown = os.read(ours, 65536).decode()
        assert shown.strip() and (re.search(r"\x1b\[[0-9;]*3[0-7]m", shown) is not None) == coloured, shown
    os.close(ours), os.close(theirs)
