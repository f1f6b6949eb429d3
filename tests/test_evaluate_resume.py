"""An evaluation that was interrupted goes on where it stopped, on any number of ranks, and never mixes what does not belong together."""

import csv
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from trained_run import make_run

from mstkd.engine.distributed import raise_together
from mstkd.engine.environment import Ranks
from mstkd.errors import FailedElsewhereError, UserError
from mstkd.evaluate.cases import Row
from mstkd.evaluate.kept import KeptScores
from mstkd.evaluate.evaluation import SCORED
from mstkd.evaluate.run import evaluate_run
from mstkd.evaluate.scoring import Score
from mstkd.evaluate.sharing import score_each, shared_out
from mstkd.evaluate.synthesis import Completion, Likeness
from mstkd.shards.spec import LABEL, read_index, read_splits

RESULTS = ("per_case.csv", "summary.json", "summary_teacher.json", "baseline.json")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was evaluated without interruption."""
    run = make_run(tmp_path_factory.mktemp("whole"))
    evaluate_run(run)
    return run


@pytest.fixture
def run(whole, tmp_path):
    """The same run, not evaluated yet, with shards of its own."""
    shutil.copytree(whole.parents[1] / "shards", tmp_path / "shards")
    run = tmp_path / "runs" / "toy"
    shutil.copytree(whole, run, ignore=shutil.ignore_patterns("evaluation", "mlflow.json"))
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["shards"], config["runs_dir"] = [{"path": str(tmp_path / "shards")}], str(tmp_path / "runs")
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return run


def held_out(run: Path) -> list[str]:
    return list(read_splits(run.parents[1] / "shards").test)


class Damaged:
    """The label of the last test subject cannot be decoded, as long as the block lasts."""

    def __init__(self, run: Path):
        shards = run.parents[1] / "shards"
        self.subject = held_out(run)[-1]
        tar = next(tar for tar in read_index(shards).shards if self.subject in [entry.subject for entry in tar.subjects])
        members = next(entry.members for entry in tar.subjects if entry.subject == self.subject)
        self.file, self.place = shards / tar.file, members[LABEL][0]

    def __enter__(self):
        self.before = self._write(b"no array")

    def __exit__(self, *_):
        self._write(self.before)

    def _write(self, content: bytes) -> bytes:
        with self.file.open("r+b") as stream:
            stream.seek(self.place)
            before = stream.read(len(content))
            stream.seek(self.place)
            stream.write(content)
        return before


def interrupt(run: Path) -> None:
    with Damaged(run), pytest.raises(UserError, match="cannot be decoded"):
        evaluate_run(run)


def results(run: Path) -> dict[str, str]:
    return {name: (run / "evaluation" / name).read_text() for name in RESULTS}


def again(run: Path, caplog) -> tuple[list[str], list[str]]:
    """Evaluate; which subjects were scored, and of which the scores had been kept."""
    caplog.clear()
    with caplog.at_level(logging.INFO, "mstkd.evaluate.sharing"):
        evaluate_run(run)
    said = [record.getMessage().split() for record in caplog.records if record.name == "mstkd.evaluate.sharing"]
    return [words[1] for words in said if words[0] == "scored"], [words[4] for words in said if words[0] == "kept"]


def test_a_restart_scores_what_is_missing_and_ends_as_if_nothing_had_happened(whole, run, caplog):
    interrupt(run)
    *kept, last = held_out(run)
    assert not (run / "evaluation" / "summary.json").exists()
    assert sorted(path.stem for path in (run / "evaluation" / SCORED).glob("*.json") if path.name[0] != ".") == sorted(kept) and kept
    assert again(run, caplog) == ([last], kept)
    assert results(run) == results(whole)
    cost, uninterrupted = (json.loads((one / "evaluation" / "cost.json").read_text()) for one in (run, whole))
    assert all(cost[network]["predictions"] == uninterrupted[network]["predictions"] for network in ("student", "teacher"))
    assert not (run / "evaluation" / SCORED).exists()
    assert again(run, caplog) == ([*kept, last], [])  # a finished evaluation is made anew


def test_other_weights_or_conventions_begin_anew(whole, run, caplog):
    interrupt(run)
    (weights,) = (run / "distill" / "checkpoints").glob("step-*/both.safetensors")
    changed = {name: value + 0.2 if name == "student.0.bias" else value for name, value in load_file(weights).items()}
    save_file(changed, weights)
    assert again(run, caplog) == (held_out(run), [])
    assert results(run)["summary.json"] != results(whole)["summary.json"] and results(run)["summary_teacher.json"] == results(whole)["summary_teacher.json"]
    interrupt(run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["evaluate"]["hd95"] = "pooled"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert again(run, caplog) == (held_out(run), [])


def test_a_file_that_was_cut_short_is_scored_again(whole, run, caplog):
    interrupt(run)
    first = held_out(run)[0]
    path = run / "evaluation" / SCORED / f"{first}.json"
    path.write_bytes(path.read_bytes()[:100])
    scored, kept = again(run, caplog)
    assert first in scored and first not in kept and results(run) == results(whole)


def test_ranks_share_cases_and_what_was_kept(whole, run, two_ranks):
    interrupt(run)  # alone
    assert two_ranks.run("trained_run.py", "evaluate", run=str(run)) == ["", ""]
    assert results(run) == results(whole)
    shutil.rmtree(run / "evaluation")
    with Damaged(run):
        first, second = two_ranks.run("trained_run.py", "evaluate", run=str(run))
    bad = held_out(run).index(Damaged(run).subject) % 2
    said, other = (first, second) if bad == 0 else (second, first)
    assert "cannot be decoded" in said and other == f"rank {bad} failed and says why"
    assert two_ranks.run("trained_run.py", "evaluate", run=str(run)) == ["", ""]
    assert results(run) == results(whole)


def test_calibration_is_in_the_files(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["evaluate"]["calibration"] = True
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    summary = evaluate_run(run)
    rows = list(csv.DictReader((run / "evaluation" / "per_case.csv").open()))
    mine = [float(row["ece"]) for row in rows if (row["network"], row["subset"], row["region"]) == ("student", "flair", "WT")]
    assert 0 < summary["subsets"]["flair"]["WT"]["ece"] < 1 and summary["subsets"]["flair"]["WT"]["ece"] == pytest.approx(sum(mine) / len(mine))
    assert "15 bins" in summary["conventions"]["ece"] and "ECE %" in (run / "evaluation" / "report.html").read_text()


# in small


values = st.none() | st.floats(0, 400)
scores = st.builds(Score, st.floats(0, 1), st.integers(0, 10**7), st.integers(0, 10**7), *[values] * 9)
rows = st.builds(Row, st.just("student"), st.just("a"), st.sampled_from(["flair", "flair+t1"]), st.sampled_from(["WT", "ET"]), scores)


@settings(max_examples=30)
@given(st.lists(rows, max_size=5))
def test_scores_come_back_as_they_were(tmp_path_factory, found):
    kept = KeptScores(tmp_path_factory.mktemp("kept") / "scored", Row, [{}])
    kept.begin({})
    assert kept.keep("a", lambda subject: found) == found
    assert kept.read("a") == found and kept.read("b") is None


def test_what_a_case_took_is_kept_beside_it(tmp_path):
    likeness = [Completion("student", "a", "t1", "t2", Likeness(3, 20.5, 0.5))]
    seconds, slices = {"student": [9.0]}, {}

    def score(subject: str) -> list[Completion]:
        seconds["student"].append(2.5)
        slices.setdefault("student", []).append(3)
        return likeness

    kept = KeptScores(tmp_path / "scored", Completion, [seconds, slices])
    kept.begin({"weights": 1})
    assert score_each(["a"], score, kept=kept) == likeness
    later = KeptScores(tmp_path / "scored", Completion, [{}, {}])
    later.begin({"weights": 1})
    assert score_each(["a"], score, kept=later) == likeness and later.clocks == [{"student": [2.5]}, {"student": [3]}]
    later.begin({"weights": 2})
    assert later.read("a") is None


def test_work_that_fails_says_so_at_once():
    def work(number: int) -> list[int]:
        if number == 2:
            raise UserError("case 2: bad")
        return [number]

    with pytest.raises(UserError, match="case 2: bad"):
        shared_out(5, work)
    assert shared_out(2, work) == [0, 1]


def test_a_failure_elsewhere_stays_one_when_alone():
    with pytest.raises(FailedElsewhereError):
        raise_together(FailedElsewhereError(1, 2), Ranks(0, 1, 0, torch.device("cpu")))
