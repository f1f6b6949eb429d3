"""Who holds a run up, read from the signs of life of its ranks."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
import torch

from mstkd import attempts
from mstkd.config import WatchdogConfig
from mstkd.engine.environment import Ranks
from mstkd.engine.heartbeat import HUNG, Beat, Heartbeat, diagnosis, read_beats

CONFIG = WatchdogConfig(heartbeat_s=1, hang_min=1)


def seen(**ranks):
    """{rank: (beat, written)} from r0=(step, phase, seconds since it was written) ..."""
    beats = {}
    for name, (step, phase, age_s, *part) in ranks.items():
        rank = int(name[1:])
        beats[rank] = Beat(rank, f"n{rank}", 100 + rank, attempt=1, stage="distill", step=step, phase=phase, part=sum(part)), 1000.0 - age_s
    return beats


@pytest.mark.parametrize(("beats", "expected"), [
    (seen(r0=(7, "agree", 0), r1=(7, "step", 60), r2=(7, "agree", 0)), "no sign of life from rank 1 on n1 (step 7, step)"),
    (seen(r0=(7, "agree", 0), r1=(7, "data", 0), r2=(7, "agree", 0)), "the others wait for rank 1 on n1 (step 7, data)"),
    (seen(r0=(7, "step", 0), r1=(6, "step", 0), r2=(7, "data", 0)), "the others wait for rank 1 on n1 (step 6, step)"),
    (seen(r0=(8, "validate", 0, 3), r1=(8, "validate", 0, 3), r2=(8, "validate", 0, 2)), "the others wait for rank 2 on n2 (step 8, validate)"),
    (seen(r0=(7, "step", 0), r1=(7, "step", 0), r2=(7, "step", 0)), "all ranks wait for each other, a node or a link between them may be down: rank 0 on n0"),
    (seen(r0=(0, "start", 0), r2=(0, "start", 0)), "rank 1 never started"),
])  # fmt: skip
def test_the_rank_that_holds_the_others_up_is_named(beats, expected):
    line = diagnosis(beats, attempt=1, world=3, config=CONFIG)
    assert line.startswith("no progress for 1 min (watchdog.hang_min): ") and expected in line


def test_beats_of_earlier_attempts_are_not_mistaken_for_signs_of_life():
    beats = seen(r0=(7, "step", 0), r1=(9, "step", 0))
    beats[1][0].attempt = 0
    assert "rank 1 never started" in diagnosis(beats, attempt=1, world=2, config=CONFIG)


def test_a_beat_says_where_a_rank_is(tmp_path):
    with Heartbeat(tmp_path, Ranks(0, 1, 0, torch.device("cpu")), attempts.begin(tmp_path, 1, None), CONFIG) as heartbeat:
        heartbeat.at("data", stage="distill", step=3, total_steps=9)
        heartbeat.at("validate", part=2)
        heartbeat.at("step")
    (beat, written), = read_beats(tmp_path / "heartbeats").values()
    assert (beat.stage, beat.step, beat.phase, beat.part, beat.pid) == ("distill", 3, "end", 0, os.getpid())
    assert abs(written - time.time()) < 3600


HANGS = """
import sys, time, torch
from pathlib import Path
from mstkd import attempts
from mstkd.config import WatchdogConfig
from mstkd.engine.environment import Ranks
from mstkd.engine.heartbeat import Heartbeat
run = Path(sys.argv[1])
config = WatchdogConfig(heartbeat_s=0.05, hang_min=0.005)
with Heartbeat(run, Ranks(0, 1, 0, torch.device("cpu")), attempts.begin(run, 1, None), config) as heartbeat:
    heartbeat.at("step", stage="distill", step=5)
    if sys.argv[2] == "superseded":
        attempts.begin(run, 1, None)
    time.sleep(600)
"""


@pytest.mark.parametrize("cause", ["hang", "superseded"])
def test_the_watchdog_ends_a_process_that_cannot_end_itself(tmp_path, cause):
    done = subprocess.run([sys.executable, "-c", HANGS, tmp_path, cause], timeout=300)
    assert done.returncode == HUNG
    first = attempts.read(tmp_path)[0].ending
    if cause == "hang":
        assert first.outcome == "hung" and "rank 0 on" in first.reason and (first.stage, first.step) == ("distill", 5)
    else:
        assert first is None  # the newer attempt owns the run folder now


def test_a_beat_being_replaced_is_left_out(tmp_path):
    (tmp_path / "rank-0.json").write_text(json.dumps(asdict(Beat(0, "n0", 1, 1))))
    (tmp_path / "rank-1.tmp").write_text("{")
    assert list(read_beats(tmp_path)) == [0]


def test_the_process_group_waits_longer_than_the_watchdog():
    with pytest.raises(ValueError, match="watchdog.collective_min 5 must be above watchdog.hang_min 20"):
        WatchdogConfig(collective_min=5)
