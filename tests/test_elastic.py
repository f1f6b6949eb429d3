"""A run saved by some number of ranks goes on with another: the same curve, the same weights, for every ZeRO stage.

test_train.py has the same through the composition root, with the real loader.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from rank_pool import RankPool
from test_engine import curve, flip_a_bit

from mstkd.engine.backend.universal import _own_step_counters

LOSSES = ("train/loss_networks", "train/loss_critic")
# bf16: what is summed over ranks and over micro-batches is rounded elsewhere. Without any resume one and two ranks differ by as much.
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-3}


@pytest.fixture(scope="module")
def whole(one_rank, tmp_path_factory):
    """Ten uninterrupted steps on one rank, made once per kind: the stages have equal curves (test_engine.py)."""
    made = {}

    def run(**kind):
        key = json.dumps(kind, sort_keys=True)
        if key not in made:
            made[key] = one_rank.run("engine_ranks.py", "train", folder=str(tmp_path_factory.mktemp("whole")), zero=1, **kind)[0]
        return made[key]

    return run


def assert_goes_on(before, after, folder, expected, zero, stop_after=4, precision="fp32", **kind):
    """Train on pool `before` to a stop, on pool `after` to the end; returns the last results."""
    words = {"folder": str(folder), "zero": zero, "precision": precision, **kind}
    first = before.run("engine_ranks.py", "train", stop_after=stop_after, **words)
    loaded = after.run("engine_ranks.py", "train", stop_after=stop_after, **words)
    assert {result["step"] for result in loaded} == {stop_after}
    for result in loaded:  # bit for bit what was saved, BatchNorm's statistics included, on every rank
        for name, network in first[0]["weights"].items():
            for key, value in network.items():
                np.testing.assert_array_equal(result["weights"][name][key], value)
        assert result["counters"] == first[0]["counters"]
    last = after.run("engine_ranks.py", "train", **words)
    assert list(curve(last[0])) == list(range(stop_after + 1, 11))
    for name in LOSSES:
        joined, wanted = curve(first[0], name) | curve(last[0], name), curve(expected, name)
        assert joined.keys() == wanted.keys()
        assert max(abs(joined[step] - wanted[step]) for step in wanted) < TOLERANCE[precision]
    return last


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize(("before", "after"), [("one_rank", "two_ranks"), ("two_ranks", "one_rank")])
def test_another_rank_count_goes_on_exactly(before, after, zero, whole, tmp_path, request):
    pools = request.getfixturevalue(before), request.getfixturevalue(after)
    last = assert_goes_on(*pools, tmp_path, whole(), zero)
    assert last[0]["finished"] and json.loads((tmp_path / "step-00000010/state.json").read_text())["ranks"] == len(last)
    assert not list(tmp_path.glob("*.universal*"))  # gone with the first save


@pytest.mark.parametrize(("zero", "before", "after"), [(1, "two_ranks", "one_rank"), (2, "one_rank", "two_ranks"), (3, "two_ranks", "one_rank")])
def test_in_bf16_within_what_rank_counts_differ_by(zero, before, after, whole, tmp_path, request):
    assert_goes_on(request.getfixturevalue(before), request.getfixturevalue(after), tmp_path, whole(precision="bf16"), zero, precision="bf16")


@pytest.mark.parametrize(("zero", "stop_after"), [(1, 2), (3, 2), (2, 7)])
def test_with_a_role_that_rarely_steps_a_skipped_update_and_a_large_tensor(zero, stop_after, one_rank, two_ranks, whole, tmp_path):
    """Stopped after step 2 the critic has never stepped; the large tensor is one that ZeRO-3 really cuts (above 100,000 elements)."""
    kind = {"method": {"critic_every": 3, "nan_at": [1], "width": 1000}}
    last = assert_goes_on(two_ranks, one_rank, tmp_path, whole(**kind), zero, stop_after, **kind)
    assert last[0]["counters"]["networks"] == (10, 1)


@pytest.mark.slow
def test_two_ranks_to_four(two_ranks, whole, tmp_path):
    four_ranks = RankPool(4)
    try:
        for zero in (1, 2, 3):
            assert_goes_on(two_ranks, four_ranks, tmp_path / str(zero), whole(), zero)
    finally:
        four_ranks.close()


def test_the_converted_copy_serves_again_and_is_never_stale(one_rank, two_ranks, tmp_path):
    two_ranks.run("engine_ranks.py", "train", folder=str(tmp_path / "a"), stop_after=3)
    copy = tmp_path / "a/step-00000003.universal"

    def resume():
        return one_rank.run("engine_ranks.py", "train", folder=str(tmp_path / "a"), stop_after=3)[0]["weights"]["student"]["0.weight"]

    trained = resume()
    made = (copy / "state.json").stat().st_mtime_ns
    np.testing.assert_array_equal(resume(), trained)
    assert (copy / "state.json").stat().st_mtime_ns == made
    victim = copy / "networks/zero/student.0.weight/fp32.pt"
    victim.write_bytes(victim.read_bytes()[:-1])
    np.testing.assert_array_equal(resume(), trained)
    assert (copy / "state.json").stat().st_mtime_ns != made  # damaged: converted anew
    two_ranks.run("engine_ranks.py", "train", folder=str(tmp_path / "b"), stop_after=3, optimizer="adamw")
    shutil.rmtree(tmp_path / "a/step-00000003")
    shutil.copytree(tmp_path / "b/step-00000003", tmp_path / "a/step-00000003")
    assert not np.array_equal(resume(), trained)  # another checkpoint of the same name


def test_what_cannot_be_converted_says_so_and_changes_nothing(one_rank, two_ranks, tmp_path):
    two_ranks.run("engine_ranks.py", "train", folder=str(tmp_path), stop_after=3, optimizer="sgd")
    (reply,) = one_rank.run("engine_ranks.py", "train", folder=str(tmp_path), optimizer="sgd")
    assert reply.startswith("UserError: ") and "2 ranks wrote it; role networks is trained by sgd" in reply and "resume on 2" in reply
    assert two_ranks.run("engine_ranks.py", "train", folder=str(tmp_path), optimizer="sgd")[0]["finished"]


@pytest.mark.parametrize("zero", [1, 3])
def test_no_room_for_the_converted_copy(zero, one_rank, two_ranks, tmp_path):
    one_rank.run("engine_ranks.py", "train", folder=str(tmp_path), zero=zero, stop_after=3)
    full = {"at": [], "bytes": 3000, "at_resume": [0]}
    replies = two_ranks.run("engine_ranks.py", "train", folder=str(tmp_path), zero=zero, no_room=full)
    assert replies[0].startswith(f"TrainingError: {tmp_path}/step-00000003.universal: cannot be written (") and "\n" not in replies[0]
    assert replies[0].endswith("free some space there, or resume on 1 ranks") and replies[1].startswith("FailedElsewhereError")
    assert not list(tmp_path.glob("*.universal*"))
    assert two_ranks.run("engine_ranks.py", "train", folder=str(tmp_path), zero=zero)[0]["finished"]


def test_a_damaged_newest_checkpoint_falls_back_on_another_rank_count_too(one_rank, two_ranks, whole, tmp_path):
    two_ranks.run("engine_ranks.py", "train", folder=str(tmp_path), every_steps=2, stop_after=5)
    flip_a_bit(tmp_path / "step-00000005")
    rest = one_rank.run("engine_ranks.py", "train", folder=str(tmp_path), every_steps=2)[0]
    assert min(curve(rest)) == 5 and max(abs(curve(rest)[step] - curve(whole())[step]) for step in range(5, 11)) < 1e-5


def test_groups_of_parameters_do_not_share_a_step_counter():
    """DeepSpeed's ZeRO-3 loads one counter into all its groups (one per 10^9 parameters), and each would then count for all."""
    first, second = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.Adam([first, second])
    first.grad = second.grad = torch.ones(1)
    optimizer.step()
    optimizer.state[second]["step"] = optimizer.state[first]["step"]
    _own_step_counters(optimizer)
    optimizer.step()
    assert [float(optimizer.state[parameter]["step"]) for parameter in (first, second)] == [2, 2]
