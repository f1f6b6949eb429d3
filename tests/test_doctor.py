"""mstkd doctor: what it reads from the machine, the runs and MLflow, and what it says about it."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from mstkd import attempts
from mstkd.config import RunConfig, load_config, resolved
from mstkd.errors import UserError
from mstkd.launch import doctor, doctor_files, doctor_runs
from mstkd.launch.doctor_finding import Answer, Finding, ask, ok, warn
from mstkd.launch.doctor_runs import Measured
from mstkd.launch.queue import Queue, SlurmJob
from mstkd.track.jsonl import JsonlTracker


@pytest.fixture
def config(tmp_path) -> RunConfig:
    config = load_config("mst_kdnet_phantom", [f"runs_dir={tmp_path / 'runs'}", "watchdog.heartbeat_s=2"])
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "config.yaml").write_text(yaml.safe_dump(resolved(config)))
    return config


# the machine


def test_a_line_says_state_thing_finding_and_fix():
    assert str(warn("disk", "almost full", "make room")) == "WARN disk            almost full; make room"
    assert str(ok("git", "/usr/bin/git")) == "OK   git             /usr/bin/git"


def test_everything_is_looked_at_in_one_go(tmp_path):
    found = list(doctor.findings(tmp_path))
    expected = {"python", "torch", "accelerator", "backend", "bf16", "g++", "git", "disk", "torch cache", "own address", "ports", "mlflow"}
    assert expected <= {finding.thing for finding in found}
    assert all(finding.fix for finding in found if finding.state != "OK")
    assert all("\n" not in str(finding) for finding in found)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("words", "parts"), [({"cluster": "nope"}, ("nope",)), ({"nodes": 2}, ("--nodes", "--cluster"))])
def test_bad_input_is_said_before_anything_is_looked_at(words, parts):
    with pytest.raises(UserError) as error:
        next(doctor.findings(**words))
    assert all(part in str(error.value) for part in parts)


def test_a_program_that_is_absent_fails_or_hangs_is_an_answer_too():
    assert ask("no-such-program").message == "no-such-program: No such file or directory"
    assert ask("sh", "-c", "echo one; echo two >&2; exit 3").message == "two"
    assert ask("sleep", "60", limit_s=0.1) == Answer(None, "", "sleep gives no answer within 0.1 s")


@pytest.mark.parametrize(("interface", "state"), [("lo", "OK"), ("no-such-interface", "FAIL")])
def test_the_interface_chosen_for_gloo_must_exist(interface, state, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", interface)
    finding = next(doctor.network())
    assert finding.state == state and interface in finding.what


def test_the_host_name_is_judged_by_what_it_resolves_to(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    finding = next(doctor.network())
    try:
        loopback = socket.gethostbyname(socket.gethostname()).startswith("127.")
    except OSError:
        loopback = True
    assert finding.state == ("WARN" if loopback else "OK")
    assert ("GLOO_SOCKET_IFNAME=" in finding.fix and "/etc/hosts" in finding.fix) == loopback


# files


def mounts(folder: Path) -> Path:
    path = folder / "mounts"
    shared = f"{folder}/a shared folder".replace(" ", "\\040")
    path.write_text(f"/dev/sda1 / ext4 rw,relatime 0 0\nserver:/x {shared} nfs4 rw,vers=4.2 0 0\ntmpfs {shared}/fast tmpfs rw 0 0\n")
    (folder / "a shared folder" / "fast").mkdir(parents=True)
    return path


def test_the_innermost_mount_says_what_file_system_it_is(tmp_path):
    table, shared = mounts(tmp_path), tmp_path / "a shared folder"
    kinds = [doctor_files.file_system(path, table) for path in (tmp_path, shared, shared / "x" / "y", shared / "fast")]
    assert kinds == ["ext4", "nfs4", "nfs4", "tmpfs"]
    assert doctor_files.file_system(Path("/proc")) == "proc"


def test_a_code_cache_on_a_network_file_system_is_a_warning(tmp_path, monkeypatch):
    table, shared = mounts(tmp_path), tmp_path / "a shared folder"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(shared / "cache"))
    finding = doctor_files.cache("torch cache", "TORCH_EXTENSIONS_DIR", table)
    assert finding.state == "WARN" and "nfs4" in finding.what and "unset TORCH_EXTENSIONS_DIR" in finding.fix
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(shared / "fast"))
    assert doctor_files.cache("torch cache", "TORCH_EXTENSIONS_DIR", table).state == "OK"
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setattr("tempfile.tempdir", str(shared))
    assert "TMPDIR" in doctor_files.cache("torch cache", "TORCH_EXTENSIONS_DIR", table).fix


@pytest.mark.parametrize(("gib", "state"), [(0.001, "OK"), (5 * 1024, "FAIL")])
def test_the_disk_must_hold_another_checkpoint_like_the_newest(config, gib, state):
    folder = config.run_dir / "student" / "checkpoints" / "step-00000100"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("{}")
    with (folder / "weights").open("wb") as file:
        file.truncate(round(gib * 1024**3))  # takes no room
    finding = doctor_files.disk(Path(config.runs_dir))
    assert finding.state == state and config.name in finding.what and f"{config.checkpoint.keep + 2} checkpoints" in finding.what


def test_checkpoints_that_are_kept_for_good_are_counted(config):
    folder = config.run_dir / "student" / "checkpoints" / "step-00000100"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("{}")
    recipe = yaml.safe_load((config.run_dir / "config.yaml").read_text())
    recipe["checkpoint"]["keep_every"], recipe["train"]["steps"] = 10, 500
    (config.run_dir / "config.yaml").write_text(yaml.safe_dump(recipe))
    assert f"{config.checkpoint.keep + 2 + 50} checkpoints" in doctor_files.disk(Path(config.runs_dir)).what


def test_a_folder_that_is_yet_to_be_made_is_judged_by_the_one_above(tmp_path):
    finding = doctor_files.disk(tmp_path / "not" / "yet")
    assert str(tmp_path) in finding.what and not (tmp_path / "not").exists()


# runs and MLflow


def test_the_times_are_the_slowest_of_the_newest_run(config):
    assert doctor_runs.measured(Path(config.runs_dir)) is None
    tracker = JsonlTracker(config.run_dir / "metrics.jsonl", attempt=1)
    for step, (rate, save) in enumerate([(0.01, 99.0), *[(2.0, 3.0)] * 19, (0.5, 1.0)], start=1):
        tracker.log_metrics({"time/steps_per_s": rate, "time/save_s": save}, step, "student")
        tracker.log_metrics({"val/score": 0.5}, step, "student")
    assert doctor_runs.measured(Path(config.runs_dir)) == Measured(config.name, 2.0, 3.0)


KILLED_RUN = """
import os, signal, sys, torch
from pathlib import Path
from mstkd import attempts
from mstkd.engine.environment import Ranks
from mstkd.engine.heartbeat import Heartbeat
from mstkd.run_folder import read_run_config
from mstkd.track import open_trackers

config = read_run_config(Path(sys.argv[1]))
number = attempts.begin(config.run_dir, 1, sys.argv[2] if len(sys.argv) > 2 else None)
tracker = open_trackers(config, config.run_dir, attempt=number, tags={}, dataset={"name": "phantom", "digest": "0" * 64})
with tracker, Heartbeat(config.run_dir, Ranks(0, 1, 0, torch.device("cpu")), number, config.watchdog):
    tracker.child("student", start_step=0)
    tracker.child("evaluation")
    (config.run_dir / "student" / "checkpoints").mkdir(parents=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def kill_a_run(config: RunConfig, *job: str) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED_RUN, str(config.run_dir), *job], capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr


def grow_old(config: RunConfig, seconds: float) -> float:
    """Set the last sign of life back; returns when it is now."""
    then = time.time() - seconds
    for path in [*(config.run_dir / "attempts").iterdir(), *(config.run_dir / "heartbeats").iterdir()]:
        os.utime(path, (then, then))
    return then


def mlflow_runs(config: RunConfig) -> dict:
    client = MlflowClient(f"sqlite:///{config.runs_dir}/mlflow.db")
    ids = json.loads((config.run_dir / "mlflow.json").read_text())
    return {part: client.get_run(run_id).info for part, run_id in {"": ids["run_id"], **ids["children"]}.items()}


def mlflow_status(config: RunConfig) -> dict[str, str]:
    return {part: info.status for part, info in mlflow_runs(config).items()}


def run_findings(config: RunConfig, fix: bool = False) -> list[Finding]:
    return [finding for finding in doctor_runs.findings(Path(config.runs_dir), fix) if finding.thing == "mlflow run"]


def test_a_run_that_was_killed_is_named_and_closed(config):
    kill_a_run(config)
    assert run_findings(config) == []  # it may be alive: its last heartbeat is fresh
    then = grow_old(config, 600)
    (finding,) = run_findings(config)
    assert finding.state == "WARN" and "no sign of life for 10 min" in finding.what and "(the run itself, student)" in finding.what
    assert finding.fix == "mstkd doctor --fix sets it to KILLED"
    assert set(mlflow_status(config).values()) == {"RUNNING"}
    (finding,) = run_findings(config, fix=True)
    assert finding.state == "OK" and finding.what.endswith("now KILLED")
    # somebody may be evaluating: that part gives no sign of life
    assert mlflow_status(config) == {"": "KILLED", "student": "KILLED", "evaluation": "RUNNING"}
    ended = mlflow_runs(config)["student"]
    assert ended.end_time >= max(ended.start_time, round(1000 * then) - 1)
    assert run_findings(config) == []


@pytest.mark.parametrize(
    ("outcome", "status"), [("failed", "FAILED"), ("hung", "FAILED"), ("interrupted", "KILLED"), ("finished", "FINISHED")]
)
def test_an_attempt_that_said_how_it_ended_is_closed_so(config, outcome, status):
    attempts.begin(config.run_dir, 1, None)
    attempts.end(config.run_dir, 1, attempts.Ending(outcome, "a reason"))
    end = doctor_runs.ending(config.run_dir, config, Queue(), time.time())
    assert end.status == status and outcome in end.why


@pytest.mark.parametrize(
    ("queue", "dead"),
    [
        (Queue({"7_1": SlurmJob("7_1", "PENDING")}, answered=True), False),
        (Queue({"7_1": SlurmJob("7_1", "FAILED")}, answered=True), True),
        (Queue({}, answered=True), True),
        (Queue(note="no answer"), False),
    ],
)
def test_a_run_with_a_job_is_dead_only_if_slurm_says_so(config, queue, dead):
    attempts.begin(config.run_dir, 1, "7_1")
    end = doctor_runs.ending(config.run_dir, config, queue, time.time() + 3600)
    assert (end is not None) == dead


def test_an_evaluation_counts_as_dead_after_a_day(config):
    from mstkd.track.reconcile import OpenRun

    now = time.time()
    assert not doctor_runs._gone(config.run_dir, OpenRun("1", "evaluation", now - 3600), now)
    assert doctor_runs._gone(config.run_dir, OpenRun("1", "evaluation", now - 25 * 3600), now)


def test_a_run_whose_data_base_is_gone_makes_no_new_one(config):
    attempts.begin(config.run_dir, 1, None)
    attempts.end(config.run_dir, 1, attempts.Ending("failed", "a reason"))
    (config.run_dir / "mlflow.json").write_text('{"run_id": "abc", "children": {}}')
    assert run_findings(config, fix=True) == []
    assert not (Path(config.runs_dir) / "mlflow.db").exists()


class Health(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 401)
        self.end_headers()

    def log_message(self, *_words):
        pass


def test_a_tracking_server_is_asked_whether_it_lives():
    with HTTPServer(("127.0.0.1", 0), Health) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        uri = f"http://127.0.0.1:{server.server_port}"
        there, refused = doctor_runs._given_store(f"{uri}/"), doctor_runs._given_store(f"{uri}/prefix")
        server.shutdown()
        thread.join()
    assert there == ok("mlflow", f"{uri}/ answers")
    assert refused.state == "WARN" and "401" in refused.what
    gone = doctor_runs._given_store(uri)
    assert gone.state == "WARN" and "refused" in gone.what and "metrics.jsonl" in gone.fix


def test_a_data_base_that_cannot_be_read_is_a_failure(tmp_path):
    (tmp_path / "mlflow.db").write_text("this is no data base, whatever its name says" * 100)
    first = next(doctor_runs.findings(tmp_path, fix=False))
    assert first.state == "FAIL" and "mlflow.db" in first.what
