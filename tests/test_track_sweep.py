"""Merged sweeps: one parent, members ranked by validation, and how MLflow's page shows them."""

import json
import os
import signal
import subprocess
import sys

from tracked_runs import answers, ask, client, evaluate, free_port, outcomes, rows, runs, runs_dir, submitted, sweep, train, wait_for  # noqa: F401  (runs_dir is a fixture)

from mstkd.config import load_config
from mstkd.launch.verdict import conclude_in_mlflow
from mstkd.run_folder import begin_run
from mstkd.track.mlflow_tracker import create_sweep_parent


def test_a_sweep_is_one_parent_with_its_members_ranked_by_validation(runs_dir):
    train(submitted(runs_dir, "alone"), {"student": [0.99]})
    sweep(runs_dir, {"S-4": [0.5, 0.8, 0.1], "S-7": [0.6], "S-10": []}, planned=("S-11",))
    evaluate(load_config("mst_kdnet_phantom", [f"runs_dir={runs_dir}", "name=S-7"]), 0.95)  # the best test figures by far
    assert outcomes(runs_dir) == {"S-10": "new", "S-4": "new", "S-7": "new", "S": "new", "alone": "new"}
    found = runs(runs_dir)
    parent = found["S"]
    for name in ("S-4", "S-7", "S-10"):
        assert found[name].data.tags["mlflow.parentRunId"] == parent.info.run_id and found[name].data.tags["sweep"] == "S"
    assert "mlflow.parentRunId" not in found["alone"].data.tags
    assert {name: found[name].data.tags.get("sweep.rank") for name in ("S-4", "S-7", "S-10", "alone")} == {
        "S-4": "1", "S-7": "2", "S-10": None, "alone": None,
    }  # fmt: skip
    assert parent.data.metrics == {} and parent.info.status == "RUNNING"  # S-11 waits in the queue
    table = parent.data.tags["mlflow.note.content"].splitlines()
    assert table[0] == "Validation data only, stage student. Ranked: 2 of 4 runs."
    assert [[cell.replace("&nbsp;", "").strip() for cell in line.strip("|").split("|")] for line in table[2:]] == [
        ["rank", "run", "method.tau", "best val/score", "at step"],
        5 * ["---"],
        ["1", "S-4", "4", "0.8000", "20"],
        ["2", "S-7", "7", "0.6000", "10"],
    ]
    assert "0.95" not in json.dumps([run.data.tags for run in (parent, found["S-7"])])
    before = rows(runs_dir / "mlflow.db")
    assert set(outcomes(runs_dir).values()) == {"unchanged"}
    assert rows(runs_dir / "mlflow.db") == before


def test_the_ranking_follows_what_comes_later(runs_dir):
    sweep(runs_dir, {"S-4": [0.5]}, planned=("S-7",))
    assert outcomes(runs_dir) == {"S-4": "new", "S": "new"}
    parent = runs(runs_dir)["S"]
    sweep(runs_dir, {"S-7": [0.6]}, planned=("S-4",))
    assert outcomes(runs_dir) == {"S-4": "unchanged", "S-7": "new", "S": "updated"}
    found = runs(runs_dir)
    assert found["S"].info.run_id == parent.info.run_id and found["S"].info.status == "FINISHED"
    assert found["S"].info.end_time == max(found[name].info.end_time for name in ("S-4", "S-7"))
    assert (found["S-7"].data.tags["sweep.rank"], found["S-4"].data.tags["sweep.rank"]) == ("1", "2")


def test_a_sweep_is_ranked_in_the_stage_that_its_most_advanced_member_has_come_to(runs_dir):
    """A teacher, who sees everything, outscores every student: it must not decide."""
    (runs_dir / "S").mkdir()
    names = ["S-1", "S-2", "S-3"]
    (runs_dir / "S" / "sweep.json").write_text(json.dumps({"axes": {"seed": [1, 2, 3]}, "runs": names}))
    configs = {name: submitted(runs_dir, name) for name in names}
    train(configs["S-3"], {"teacher": [0.9]})
    train(configs["S-1"], {"teacher": [0.95]})
    assert outcomes(runs_dir)["S"] == "new"
    assert [runs(runs_dir)[name].data.tags["sweep.rank"] for name in ("S-1", "S-3")] == ["1", "2"]
    train(configs["S-3"], {"student": [0.5]}, attempt=2)
    train(configs["S-2"], {"teacher": [0.8], "student": [0.6]})
    outcomes(runs_dir)
    assert [runs(runs_dir)[name].data.tags.get("sweep.rank") for name in names] == [None, "1", "2"]


def test_a_sweep_on_a_server_is_ranked_below_the_parent_that_the_launcher_made(runs_dir):
    uri = f"sqlite:///{runs_dir / 'mlflow.db'}"
    words = [f"runs_dir={runs_dir}", f"tracking.uri={uri}"]
    configs = {tau: load_config("mst_kdnet_phantom", [*words, f"name=S-{tau}", f"method.tau={tau}"]) for tau in (4, 7)}
    (runs_dir / "S").mkdir()
    parent = create_sweep_parent(configs[4], "S", runs_dir / "S")
    (runs_dir / "S" / "sweep.json").write_text(json.dumps({"axes": {"method.tau": [4, 7]}, "runs": ["S-4", "S-7"], "mlflow_parent": parent}))
    for tau, score in ((4, 0.5), (7, 0.6)):
        begin_run(configs[tau])
        train(configs[tau], {"student": [score]})
        conclude_in_mlflow(configs[tau].run_dir, failed=False)
        assert runs(runs_dir)["S"].info.status == ("RUNNING" if tau == 4 else "FINISHED")
    found = runs(runs_dir)
    assert [found[name].data.tags["sweep.rank"] for name in ("S-7", "S-4")] == ["1", "2"]
    assert found["S"].info.run_id == parent and "| 1 | S-7 | 7 | 0.6000 | 10 |" in found["S"].data.tags["mlflow.note.content"]


# the page


def test_the_page_nests_stages_below_runs_below_the_sweep(runs_dir):
    sweep(runs_dir, {"S-4": [0.5], "S-7": [0.6]})
    outcomes(runs_dir)
    port = free_port()
    code = f"from mstkd.launch.mlflow_cli import mlflow; mlflow(['ui', '--port', '{port}', '--runs-dir', {str(runs_dir)!r}])"
    with (runs_dir / "server.log").open("w") as log:
        server = subprocess.Popen([sys.executable, "-c", code], stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        wait_for(lambda: answers(f"http://127.0.0.1:{port}/health", server, runs_dir / "server.log"), seconds=120)
        experiment = client(runs_dir).get_experiment_by_name("mstkd").experiment_id
        listed = ask(port, "runs/search", {"experiment_ids": [experiment]})["runs"]
        names = {run["info"]["run_id"]: run["info"]["run_name"] for run in listed}
        tags = {run["info"]["run_name"]: {tag["key"]: tag["value"] for tag in run["data"]["tags"]} for run in listed}
        below = {name: names.get(tags[name].get("mlflow.parentRunId")) for name in tags}
        assert below == {"S": None, "S-4": "S", "S-7": "S", "S-4/student": "S-4", "S-7/student": "S-7"}
        assert tags["S-7"]["sweep.rank"] == "1" and "| 1 | S-7 |" in tags["S"]["mlflow.note.content"]
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)
