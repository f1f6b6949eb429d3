"""`mstkd status`, `logs` and `cancel` by what the run folders say, without SLURM; with it: test_status_slurm.py."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from status_runs import MSTKD, begin, make_run, make_sweep, mstkd, state_of, submitted

from mstkd import attempts
from mstkd.attempts import Ending
from mstkd.errors import UserError
from mstkd.launch.jobs import SubmittedJob, note_jobs
from mstkd.launch.queue import _members, look_up
from mstkd.launch.selection import find, ranked, read_sweep
from mstkd.launch.status import RunFiles, duration, statuses
from mstkd.track.jsonl import JsonlTracker


@pytest.fixture
def runs(tmp_path):
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


@pytest.fixture
def no_slurm(monkeypatch, tmp_path):
    """As on a machine without SLURM: none of its commands is on PATH."""
    bare = tmp_path / "bin"
    bare.mkdir()
    monkeypatch.setenv("PATH", str(bare))


def write_log(runs: Path, job: SubmittedJob, text: str, rank: int = 0, stream="out") -> Path:
    path = job.log(runs, rank, stream)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# from the run folder alone


@pytest.mark.parametrize(
    ("outcome", "state"),
    [
        ("finished", "finished"), ("stopped", "stopped"), ("interrupted", "interrupted"), ("bad_input", "failed"),
        ("failed", "failed"), ("hung", "hung"), ("killed", "failed"),
    ],
)  # fmt: skip
def test_an_ending_tells_the_state(runs, no_slurm, outcome, state):
    run = make_run(runs, "toy")
    attempts.end(run, begin(run), Ending(outcome, "for a reason", "distill", 30))
    assert state_of(run) == (state, "" if state == "finished" else "distill, step 30: for a reason")


def test_without_an_ending_the_heartbeats_tell_the_state(runs, no_slurm):
    run = make_run(runs, "toy")
    assert state_of(run) == ("not started", "")
    begin(run, world=3)
    assert state_of(run) == ("running", "")
    begin(run, world=3, silent=(1,))
    assert state_of(run) == ("hung", "no sign of life from rank 1 on host1 for 60 min")
    begin(run, world=3, silent=(-1,))
    assert state_of(run) == ("dead", "no sign of life for 60 min")


def test_heartbeats_of_an_earlier_attempt_do_not_make_a_new_one_look_silent(runs, no_slurm):
    run = make_run(runs, "toy")
    begin(run, world=2, silent=(-1,))
    attempts.begin(run, 1, None)
    assert state_of(run) == ("running", "")


def test_progress_is_that_of_the_stage(runs, no_slurm):
    run = make_run(runs, "toy")
    begin(run, world=2)
    (run / "mlflow.json").write_text(json.dumps({"run_id": "0123456789abcdef", "children": {}}))
    (found,), note = statuses([run])
    assert (found.stage, found.step, found.total_steps, found.steps_per_s, found.eta_s) == ("distill", 30, 100, 2.0, 35.0)
    assert (found.nodes, found.attempts, found.mlflow_run, note) == ("host0,host1", 1, "0123456789abcdef", None)
    attempts.end(run, 1, Ending("stopped", "by SIGTERM", "distill", 30))
    (found,), _ = statuses([run])
    assert (found.step, found.total_steps, found.steps_per_s, found.eta_s) == (30, 100, None, None)


def test_a_real_heartbeat_is_understood(runs, no_slurm):
    import torch

    from mstkd.config import WatchdogConfig
    from mstkd.engine.environment import Ranks
    from mstkd.engine.heartbeat import Heartbeat

    run = make_run(runs, "toy")
    number = attempts.begin(run, 1, None)
    with Heartbeat(run, Ranks(0, 1, 0, torch.device("cpu")), number, WatchdogConfig(heartbeat_s=0.05)) as heartbeat:
        (found,), _ = statuses([run])
        assert (found.state, found.stage, found.step, found.eta_s) == ("running", None, None, None)
        heartbeat.at("step", stage="distill", step=3, total_steps=9, steps_per_s=0.5)
    (found,), _ = statuses([run])
    assert (found.state, found.stage, found.step, found.total_steps, found.eta_s) == ("running", "distill", 3, 9, 12.0)


def test_a_submitted_run_without_slurm_says_that_the_queue_is_not_known(runs, no_slurm):
    run = make_run(runs, "toy")
    note_jobs(run, [submitted("12", run)])
    (found,), note = statuses([run])
    assert found.state == "unknown" and "cannot be asked" in found.reason and note == "squeue is not on PATH"
    attempts.end(run, begin(run, job="12"), Ending("interrupted", "by SIGUSR2", "distill", 30))
    assert state_of(run) == ("interrupted", "distill, step 30: by SIGUSR2; whether it is queued again cannot be asked")
    attempts.end(run, begin(run, job="12"), Ending("finished", "all stages trained"))
    (found,), note = statuses([run])
    assert (found.state, found.jobs, note) == ("finished", ("12",), None)


def test_a_run_that_was_started_by_hand_since_is_judged_by_that_start(runs, no_slurm):
    run = make_run(runs, "toy")
    job = submitted("12", run)
    note_jobs(run, [job.model_copy(update={"submitted": "2020-01-01T10:00:00+0100"})])
    begin(run)
    assert state_of(run) == ("running", "")


def test_the_newest_submission_is_the_one_that_counts(runs):
    run = make_run(runs, "toy")
    note_jobs(run, [submitted("1", run), submitted("2", run, after="1"), submitted("3", run), submitted("4", run, "evaluate", after="3")])
    assert [job.id for job in RunFiles(run).chain] == ["3", "4"]


def test_a_damaged_folder_hides_no_other(runs, no_slurm):
    make_run(runs, "sound")
    (make_run(runs, "damaged") / "jobs.json").write_text('[{"id": 1')
    shown = mstkd("status", runs=runs)
    assert shown.returncode == 0 and "sound" in shown.stdout and "damaged: unknown: its files cannot be read" in shown.stdout
    assert mstkd("cancel", "damaged", runs=runs).returncode == 2
    assert mstkd("status", "17", runs=runs).returncode == 2


@pytest.mark.parametrize(("file", "content"), [
    ("mlflow.json", "{"), ("config.yaml", "a: [1"), ("config.yaml", "watchdog: null"), ("config.yaml", "- 1"), ("heartbeats/rank-0.json", "{}"),
])  # fmt: skip
def test_a_damaged_file_hides_no_other_run(runs, no_slurm, file, content):
    for name in ("a", "b"):
        begin(make_run(runs, name))
    (runs / "a" / file).write_text(content)
    found, _ = statuses([runs / "a", runs / "b"])
    assert found[1].state == "running" and (found[0].state == "unknown" or file == "heartbeats/rank-0.json")


def test_the_table_shows_what_is_known_and_no_empty_column(runs, no_slurm):
    begin(make_run(runs, "toy"))
    shown = mstkd("status", runs=runs)
    assert shown.returncode == 0 and shown.stderr == ""
    header, _, row = shown.stdout.strip().splitlines()
    assert header.split() == ["run", "state", "nodes", "stage", "step", "step/s", "ETA", "attempts", "heartbeat"]
    assert row.split()[:8] == ["toy", "running", "host0", "distill", "30/100", "2", "35", "s"]
    assert mstkd("status", "toy", runs=runs).stdout.count("toy") == 1


def test_machines_get_the_same_as_json(runs, no_slurm, tmp_path):
    begin(make_run(runs, "toy"))
    (run,) = json.loads(mstkd("status", "--json", "-", runs=runs).stdout)
    assert (run["name"], run["state"], run["stage"], run["step"], run["total_steps"]) == ("toy", "running", "distill", 30, 100)
    done = mstkd("status", "--json", str(tmp_path / "status.json"), runs=runs)
    (written,) = json.loads((tmp_path / "status.json").read_text())
    assert done.stdout == "" and written.keys() == run.keys() and written["run_dir"] == str(runs / "toy")


def test_no_run_is_said(runs):
    shown = mstkd("status", runs=runs)
    assert shown.returncode == 0 and shown.stdout == f"no runs in {runs}\n"
    assert json.loads(mstkd("status", "--json", "-", runs=runs).stdout) == []


@pytest.mark.parametrize("command", ["status", "logs", "cancel"])
@pytest.mark.parametrize(
    ("word", "parts"),
    [("toi", ("toi", "did you mean 'toy'")), ("4711", ("job 4711", "--runs-dir")), ("4711_2", ("job 4711_2",))],
)  # fmt: skip
def test_an_unknown_run_or_job_is_one_line_and_exit_code_2(runs, command, word, parts):
    make_run(runs, "toy")
    done = mstkd(command, word, runs=runs)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert all(part in line for part in parts), line


def test_runs_dir_that_does_not_exist_is_named(tmp_path):
    for words in (("status",), ("status", "toy"), ("logs", "toy"), ("cancel", "12")):
        done = mstkd(*words, runs=tmp_path / "absent")
        assert done.returncode == 2 and "absent" in done.stderr and "--runs-dir" in done.stderr


def test_a_run_is_found_by_folder_name_and_job(runs, monkeypatch):
    run = make_run(runs, "toy")
    note_jobs(run, [submitted("12", run), submitted("15_3", run)])
    begin(run, job="99")  # a batch script of one's own
    monkeypatch.chdir(run.parent.parent)
    for word in ("toy", "runs/toy", str(run), "12", "15_3", "15", "99"):
        assert find(word, runs).run_dirs == (run,)
    with pytest.raises(UserError, match="job 5"):
        find("5", runs)


# sweeps


def test_a_sweep_is_ranked_by_its_best_validation_score_alone(runs):
    for run, scores in zip(make_sweep(runs), ([0.5, 0.3], [0.2, 0.7], [0.6]), strict=True):
        figures = JsonlTracker(run / "metrics.jsonl", 1)
        for step, score in enumerate(scores, 1):
            figures.log_metrics({"val/score": score, "test/score": 1 - score}, 10 * step, "distill")
        figures.log_metrics({"train/loss_networks": 0.1}, 10, "distill")
        (run / "evaluation").mkdir()
        (run / "evaluation" / "summary.json").write_text(json.dumps({"mean": {"WT": {"dice": 1 - scores[0]}}}))
    ranking = ranked(read_sweep(runs / "S"))
    assert [(member.values, member.score, member.step) for member in ranking] == [(("7",), 0.7, 20), (("10",), 0.6, 10), (("4",), 0.5, 10)]
    shown = mstkd("status", "S", runs=runs)
    header, _, *rows = shown.stdout.strip().splitlines()
    assert "method.tau" in header and "best val/score (distill)" in header
    assert [row.split()[:4] for row in rows] == [
        ["1", "S-tau7", "7", "0.7000"], ["2", "S-tau10", "10", "0.6000"], ["3", "S-tau4", "4", "0.5000"],
    ]  # fmt: skip


def test_scores_of_different_stages_are_not_compared(runs):
    first, second, third = make_sweep(runs)
    JsonlTracker(first / "metrics.jsonl", 1).log_metrics({"val/score": 0.9}, 10, "teacher")
    figures = JsonlTracker(second / "metrics.jsonl", 1)
    figures.log_metrics({"val/score": 0.8}, 10, "teacher")
    figures.log_metrics({"val/score": 0.4}, 5, "student")
    ranking = ranked(read_sweep(runs / "S"))
    assert [(member.run_dir.name, member.stage, member.score) for member in ranking] == [
        ("S-tau7", "student", 0.4), ("S-tau4", None, None), ("S-tau10", None, None),
    ]  # fmt: skip


def test_a_score_that_was_not_finite_is_none(runs):
    run, *_ = make_sweep(runs)
    JsonlTracker(run / "metrics.jsonl", 1).log_metrics({"val/score": float("nan")}, 10, "distill")
    assert all(member.score is None for member in ranked(read_sweep(runs / "S")))
    assert "place" not in mstkd("status", "S", runs=runs).stdout


def test_a_damaged_sweep_is_one_line(runs):
    (runs / "S").mkdir()
    (runs / "S" / "sweep.json").write_text("{}")
    done = mstkd("status", "S", runs=runs)
    assert done.returncode == 2 and "sweep.json" in done.stderr and len(done.stderr.splitlines()) == 1


# logs


def test_logs_of_a_run_that_was_not_submitted(runs, no_slurm):
    run = make_run(runs, "toy")
    begin(run)
    (run / "logs" / "rank-1.log").write_text("one\ntwo\n")
    assert mstkd("logs", "toy", "--rank", "1", runs=runs).stdout == "one\ntwo\n"
    for words, parts in ((("--rank", "0"), ("rank 0", "ranks 1")), (("--err",), ("--err", "toy"))):
        done = mstkd("logs", "toy", *words, runs=runs)
        assert done.returncode == 2 and done.stdout == "" and all(part in done.stderr for part in parts)


def test_logs_of_the_newest_job_that_has_written_and_of_a_named_one(runs, no_slurm):
    run = make_run(runs, "toy")
    jobs = [submitted("1", run), submitted("2", run), submitted("3", run, after="2"), submitted("4", run, "evaluate", after="3")]
    note_jobs(run, jobs)
    for job in jobs[:3]:
        write_log(runs, job, f"by {job.id}\n")
    write_log(runs, jobs[2], "oh\n", rank=1, stream="err")
    done = mstkd("logs", "toy", runs=runs)
    assert (done.returncode, done.stdout) == (0, "by 3\n")
    assert done.stderr == "job 4 has written nothing; squeue is not on PATH\n"
    assert mstkd("logs", "1", runs=runs).stdout == "by 1\n"
    assert mstkd("logs", "toy", "--err", "--rank", "1", runs=runs).stdout == "oh\n"
    begin(run, job="3", world=2)
    done = mstkd("logs", "3", "--rank", "2", runs=runs)
    assert done.returncode == 2 and "--rank 2" in done.stderr and "0 to 1" in done.stderr


def test_logs_of_several_runs_asks_for_one(runs):
    for member, run in enumerate(make_sweep(runs)):
        note_jobs(run, [submitted(f"12_{member}", run)])
    for word in ("S", "12"):
        done = mstkd("logs", word, runs=runs)
        assert done.returncode == 2 and "3 runs" in done.stderr and "S-tau4" in done.stderr


def test_a_reader_that_has_seen_enough_is_no_error(runs, no_slurm):
    run = make_run(runs, "toy")
    (run / "logs" / "rank-0.log").write_text("line\n" * 200_000)
    with subprocess.Popen([MSTKD, "logs", "toy", "--runs-dir", str(runs)], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as logs:
        assert logs.stdout.readline() == b"line\n"
        logs.stdout.close()
        assert logs.stderr.read() == b""
    assert logs.returncode == 0


def test_follow_prints_what_is_added_and_ends_with_the_run(runs, no_slurm):
    run = make_run(runs, "toy")
    number = begin(run)
    log = run / "logs" / "rank-0.log"
    log.write_text("first\n")
    command = [MSTKD, "logs", "toy", "--follow", "--runs-dir", str(runs)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as logs:
        assert logs.stdout.readline() == b"first\n"
        with log.open("a") as file:
            file.write("second\n")
        assert logs.stdout.readline() == b"second\n"
        replacement = log.with_suffix(".new")
        replacement.write_text("another file\n")
        os.replace(replacement, log)
        assert logs.stdout.readline() == b"another file\n"
        attempts.end(run, number, Ending("finished", "all stages trained"))
        assert logs.communicate(timeout=60) == (b"", b"toy: finished\n")
    assert logs.returncode == 0


# cancel


def test_cancel_of_a_run_outside_slurm_says_how_to_end_it(runs, no_slurm):
    run = make_run(runs, "toy")
    number = begin(run)
    done = mstkd("cancel", "toy", runs=runs)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert all(part in done.stderr for part in ("toy", "host0", "Ctrl-C", "kill -TERM"))
    attempts.end(run, number, Ending("finished", "all stages trained"))
    done = mstkd("cancel", "toy", runs=runs)
    assert (done.returncode, done.stdout) == (0, "toy: nothing to cancel, no job is live; toy is finished\n")


def test_cancel_without_slurm_names_the_jobs(runs, no_slurm):
    run = make_run(runs, "toy")
    note_jobs(run, [submitted("12", run), submitted("13", run, after="12")])
    done = mstkd("cancel", "toy", runs=runs)
    assert done.returncode == 2 and "scancel 12 13" in done.stderr and len(done.stderr.splitlines()) == 1


# parts


def test_members_of_an_array_as_the_accounting_names_them():
    assert _members("15") == ["15"] and _members("15_2") == ["15_2"]
    assert _members("15_[0-1]") == ["15_0", "15_1"]
    assert _members("15_[0,3-5%2]") == ["15_0", "15_3", "15_4", "15_5"]


def test_a_controller_that_cannot_be_reached_is_a_note(tmp_path, monkeypatch):
    if shutil.which("squeue") is None:
        pytest.skip("squeue is not installed")
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    queue = look_up(["1"])
    assert not queue.answered and queue.jobs == {} and "squeue" in queue.note and "\n" not in queue.note


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.4, "0 s"), (119, "119 s"), (120, "2 min"), (7199, "120 min"), (9000, "2.5 h"), (200_000, "2.3 d")]
)
def test_durations_are_short(seconds, shown):
    assert duration(seconds) == shown
