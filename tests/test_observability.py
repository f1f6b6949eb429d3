"""Where the time goes: parts of a step, rates, traces, and that asking costs no wait."""

import gzip
import json
import socket

import numpy as np
import pytest
import torch

from mstkd.config import ProfileConfig
from mstkd.engine.clock import PARTS
from mstkd.engine.figures import peak_memory_gib, resident_bytes


def last_row(result):
    return [row for _, row in result["rows"] if "time/steps_per_s" in row][-1]


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_a_step_is_split_into_its_parts(two_ranks, tmp_path, zero):
    results = two_ranks.run("engine_ranks.py", "train", folder=str(tmp_path), zero=zero, log_every=5, steps=10)
    row = last_row(results[0])
    parts = {part: row[f"time/{part}_s"] for part in PARTS}
    assert all(seconds > 0 for seconds in parts.values())
    own = sum(seconds for part, seconds in parts.items() if part != "communication")  # which lies inside the others
    assert parts["communication"] < own < 1 / row["time/steps_per_s"] * 1.5  # the parts are means over ranks, the rate is rank 0's
    assert row["time/data_wait_share"] == pytest.approx(parts["data_wait"] * row["time/steps_per_s"], rel=0.01)
    assert row["time/samples_per_s"] == pytest.approx(4 * row["time/steps_per_s"])
    assert row["memory/peak_gib"] > 0 and row["train/skipped_steps"] == 0
    assert all(row[f"gradient_norm/{role}"] > 0 for role in ("networks", "critic"))


def test_one_rank_alone_communicates_nothing_that_takes_time(one_rank, tmp_path):
    row = last_row(one_rank.run("engine_ranks.py", "train", folder=str(tmp_path), zero=0, log_every=5)[0])
    assert row["time/communication_s"] < row["time/backward_s"]


def test_operations_are_counted_per_rank_whatever_the_rank_count(one_rank, two_ranks, tmp_path):
    alone = last_row(one_rank.run("engine_ranks.py", "train", folder=str(tmp_path / "1"), log_every=10)[0])
    shared = last_row(two_ranks.run("engine_ranks.py", "train", folder=str(tmp_path / "2"), log_every=10)[0])
    flops = {n: row["compute/tflop_per_s_per_rank"] * 1e12 / row["time/steps_per_s"] for n, row in ((1, alone), (2, shared))}
    assert flops[1] == pytest.approx(2 * flops[2], rel=1e-6)  # four micro-batches, or two on each of two ranks
    # by hand, of one network: forward 2 x 512 voxels x (27 x 4 x 8 + 8 x 3), backward to the weights as much, to the input for the second layer only
    first, second = 2 * 512 * 27 * 4 * 8, 2 * 512 * 8 * 3
    networks = 2 * (2 * first + 3 * second)
    assert flops[1] / 4 > networks and flops[1] / 4 == pytest.approx(networks, rel=0.2)  # the rest is the critic


def test_figures_cost_one_reduction_per_line_and_no_read_per_step(two_ranks, tmp_path):
    counts = {
        steps: two_ranks.run("observed_ranks.py", "counted", folder=str(tmp_path / str(steps)), steps=steps, log_every=20)[0] for steps in (20, 40)
    }
    more = {place: counts[40]["reads"][place] - counts[20]["reads"].get(place, 0) for place in counts[40]["reads"]}
    # in 20 more updates: one more log line; per update, and in each of four validations, a vote between hosts, which waits for no device
    assert more.pop("distributed.sums") == 20 + 4
    per_step = {place: n for place, n in more.items() if n >= 20}
    assert not per_step, per_step
    assert counts[40]["reductions"]["meter._means"] - counts[20]["reductions"]["meter._means"] == 1


def test_a_trace_on_request_names_the_parts_and_no_machine(two_ranks, tmp_path):
    results = two_ranks.run("engine_ranks.py", "train", folder=str(tmp_path), profile="3-4", steps=6)
    files = sorted((tmp_path / "toy/distill/profile").iterdir())
    assert [file.name for file in files] == ["steps-3-4.rank-0.json.gz", "steps-3-4.rank-1.json.gz"]
    assert [r["artifacts"] for r in results] == [[(str(files[0]), "profile/distill")], []]
    text = gzip.open(files[0], "rt").read()
    events = json.loads(text)["traceEvents"]
    ranges = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    # two updates, two micro-batches each, two roles
    assert ranges.count("forward") == ranges.count("backward") == 8 and ranges.count("data_wait") == 2
    assert "host_name" not in text and str(tmp_path) not in text and f'"{socket.gethostname()}"' not in text


def test_without_a_request_nothing_is_recorded_and_a_stop_closes_the_trace(two_ranks, tmp_path):
    assert two_ranks.run("engine_ranks.py", "train", folder=str(tmp_path / "a"), steps=3)[0]["artifacts"] == []
    cut = two_ranks.run("engine_ranks.py", "train", folder=str(tmp_path / "b"), steps=9, profile="2-8", stop_after=4)
    assert len(cut[0]["artifacts"]) == 1 and (tmp_path / "b/toy/distill/profile/steps-2-8.rank-1.json.gz").is_file()


@pytest.mark.parametrize("steps", ["4-2", "0", "0-3"])
def test_a_range_that_makes_no_sense_is_refused(steps):
    with pytest.raises(ValueError, match=f"profile.steps {steps}: give one update or a range"):
        ProfileConfig(steps=steps)
    assert ProfileConfig(steps=7).steps == "7"


def test_a_trace_that_cannot_be_written_ends_no_run(two_ranks, tmp_path):
    (tmp_path / "toy/distill").mkdir(parents=True)
    (tmp_path / "toy/distill/profile").write_text("a file where the folder should be")
    results = two_ranks.run("engine_ranks.py", "train", folder=str(tmp_path), profile="3-4", steps=6)
    assert [(r["finished"], r["artifacts"]) for r in results] == [(True, []), (True, [])]


def test_gradient_norms_are_those_of_the_whole_role_under_every_stage(two_ranks, tmp_path):
    norms = {}
    for zero in (0, 1, 2, 3):
        rows = two_ranks.run("engine_ranks.py", "train", folder=str(tmp_path / str(zero)), zero=zero, steps=3)[0]["rows"]
        norms[zero] = [row["gradient_norm/networks"] for _, row in rows if "gradient_norm/networks" in row]
    assert all(norms[zero] == pytest.approx(norms[0], rel=1e-4) for zero in (1, 2, 3))


def test_the_peak_of_memory_outlives_what_was_held():
    held = np.ones(2**28, np.uint8)  # 256 MiB
    resident = resident_bytes("VmRSS")
    del held
    peak = peak_memory_gib(torch.device("cpu")) * 2**30
    assert peak > resident - 2**26 > 2**27  # the kernel counts pages of several cores a little late
