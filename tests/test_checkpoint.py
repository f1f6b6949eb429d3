"""What becomes of a checkpoint: which are kept, what a full disk does, a changed network, weights put together for export."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file
from test_engine import curve, flip_a_bit
from trained_run import make_run, write_run

from mstkd.config import CheckpointConfig
from mstkd.engine.checkpoint import Checkpoints, NotWrittenError, TrainState, damage, read_state
from mstkd.engine.environment import Ranks
from mstkd.engine.new_files import NewFiles
from mstkd.errors import UserError
from mstkd.export import export

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


def steps_in(folder):
    return sorted(path.name for path in folder.glob("step-*"))


def step_names(*numbers):
    return [f"step-{number:08d}" for number in numbers]


def train(pool, folder, **words):
    return pool.run("engine_ranks.py", "train", folder=str(folder), **words)


def text(reply):
    assert isinstance(reply, str), "the run went on"
    return reply


def test_the_newest_the_best_and_every_nth_are_kept(two_ranks, tmp_path):
    (tmp_path / "step-00000003.tmp").mkdir()  # of an attempt that was killed while it saved
    train(two_ranks, tmp_path, every_steps=1, keep=1, keep_every=4)  # validated at 5, the best, and 10, no better
    assert steps_in(tmp_path) == step_names(4, 5, 8, 10)
    train(two_ranks, tmp_path / "two", every_steps=1, keep=2)
    assert steps_in(tmp_path / "two") == step_names(5, 9, 10)


def test_every_file_is_hashed_also_one_that_a_callback_wrote_by_itself(two_ranks, tmp_path):
    def write(files):
        files.write("role/weights", lambda stream: stream.write(b"trained"))
        (files.folder / "average").write_bytes(b"averaged")

    Checkpoints(tmp_path, ALONE, CheckpointConfig()).save(TrainState(step=1), {}, write)
    folder = tmp_path / "step-00000001"
    assert set(json.loads((folder / "state.json").read_text())["sha256"]) == {"role/weights", "average"} and damage(folder) is None
    (folder / "average").write_bytes(b"average?")
    assert damage(folder) == "average does not match its checksum"
    train(two_ranks, tmp_path / "ranks", steps=1)
    folder = tmp_path / "ranks/step-00000001"  # the hashes were taken by two ranks while they wrote
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {"state.json"}
    assert set(json.loads((folder / "state.json").read_text())["sha256"]) == names and damage(folder) is None


@pytest.mark.parametrize("zero", [1, 3])
def test_a_changed_network_names_the_first_parameter_that_differs(two_ranks, tmp_path, zero):
    train(two_ranks, tmp_path, zero=zero, stop_after=2)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    replies = train(two_ranks, tmp_path, zero=zero, method={"width": 9})
    assert text(replies[0]).startswith("UserError: ") and text(replies[1]).startswith("FailedElsewhereError: ")
    assert "step-00000002: teacher.0.weight of role networks is [8, 4, 3, 3, 3] in the checkpoint and [9, 4, 3, 3, 3] here; restore" in replies[0]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    sealed = json.loads((tmp_path / "step-00000002/state.json").read_text())
    del sealed["roles"]["networks"]["student.1.running_mean"]
    (tmp_path / "step-00000002/state.json").write_text(json.dumps(sealed))
    reply = text(train(two_ranks, tmp_path, zero=zero)[0])
    assert "student.1.running_mean of role networks is missing in the checkpoint and [8] here" in reply


def test_a_full_disk_is_kept_until_all_ranks_can_hear_of_it(tmp_path):
    files = NewFiles(tmp_path)
    (tmp_path / "full").symlink_to("/dev/full")
    for _ in range(2):
        files.write("full", lambda stream: torch.save({"weights": torch.zeros(100_000)}, stream))
    files.write("late", lambda stream: pytest.fail("nothing is written after an error"))
    assert files.problem == f"{tmp_path / 'full'}: No space left on device" and not files.sha256


@pytest.mark.parametrize(("zero", "rank"), [(1, 1), (3, 0), (0, 0)])
def test_a_save_that_fails_on_one_rank_stops_all_and_the_last_sound_one_stays(two_ranks, tmp_path, zero, rank):
    full = {"at": [[7, rank]], "bytes": 2000}
    replies = train(two_ranks, tmp_path, zero=zero, every_steps=4, no_room=full)
    assert text(replies[1]) == "FailedElsewhereError: rank 0 failed and says why"
    assert text(replies[0]).startswith(f"TrainingError: stage distill: step 8: not saved: rank {rank}: {tmp_path}/step-00000008.tmp/networks/")
    assert "File too large; the updates after step 5 are lost: make room there and give the same command again, or set" in replies[0]
    assert steps_in(tmp_path) == step_names(4, 5) and (tmp_path / "latest").read_text() == "step-00000005\n"
    rest = train(two_ranks, tmp_path, zero=zero, every_steps=4)[0]
    assert min(curve(rest)) == 6 and rest["finished"]


def test_a_run_that_may_go_on_without_a_checkpoint_does_and_counts(two_ranks, tmp_path):
    whole = train(two_ranks, tmp_path / "whole", every_steps=2, best=True)[0]
    full = {"at": [[3, 1], [4, 0]], "bytes": 2000}  # the save of step 4, and the one before the validation of step 5
    results = train(two_ranks, tmp_path / "full", every_steps=2, keep=9, best=True, no_room=full, on_failure="continue")
    assert steps_in(tmp_path / "full") == step_names(2, 6, 8, 10)
    counted = {number: row["checkpoint/failed_saves"] for number, row in results[0]["rows"] if "checkpoint/failed_saves" in row}
    assert counted == {4: 1.0, 5: 2.0} and {result["state"]["failed_saves"] for result in results} == {2}
    assert curve(results[0]) == curve(whole)
    assert [number for number, row in results[0]["rows"] if "val/score" in row] == [5, 10]
    assert (tmp_path / "full/best").read_text() == "step-00000010\n" and results[0]["state"]["best_step"] == 10  # those of step 5 are nowhere


@pytest.mark.parametrize("policy", ["stop", "continue"])
@pytest.mark.parametrize("words", [
    {"no_room": {"at": [[9, 1]], "bytes": 2000}},  # at the end
    {"stop_after": 6, "no_room": {"at": [[6, 1]], "bytes": 2000}},  # at a signal
    {"stop_in_validation_at": 5, "no_room": {"at": [[4, 1]], "bytes": 2000}},  # at a signal in the validation
    {"no_data": [7, 0], "no_room": {"at": [[7, 1]], "bytes": 2000}},  # with another error
], ids=["end", "signal", "validation", "data"])  # fmt: skip
def test_a_last_save_that_fails_is_never_called_saved(two_ranks, tmp_path, words, policy):
    replies = train(two_ranks, tmp_path, every_steps=4, on_failure=policy, **words)
    assert text(replies[0]).startswith("TrainingError: stage distill: step ") and "are lost: make room there and give the same command" in replies[0]
    assert {reply for reply in replies[1:]} == {"FailedElsewhereError: rank 0 failed and says why"}
    assert not list(tmp_path.glob("*.tmp"))


def test_best_weights_that_cannot_be_written(two_ranks, tmp_path):
    full = {"at": [], "bytes": 2000, "in_validation": [[5, 0]]}
    reply = text(train(two_ranks, tmp_path / "stop", best=True, no_room=full)[0])
    assert "step 5: its validation and best weights not kept: rank 0: " in reply and "no update is lost" in reply
    assert not (tmp_path / "stop/best").exists() and damage(tmp_path / "stop/step-00000005") is None
    done = train(two_ranks, tmp_path / "stop", best=True)[0]
    assert done["finished"] and [number for number, row in done["rows"] if "val/score" in row] == [5, 10]  # made up for
    result = train(two_ranks, tmp_path / "on", best=True, no_room=full, on_failure="continue")[0]
    assert result["finished"] and (tmp_path / "on/best").read_text() == "step-00000010\n"
    at_end = {**full, "in_validation": [[10, 0]], "bytes": 500}  # no better: state.json alone
    reply = text(train(two_ranks, tmp_path / "end", best=True, no_room=at_end, on_failure="continue")[0])
    assert "step 10: its validation" in reply and reply.endswith("no update is lost: make room there and give the same command again")


def test_what_rank_0_cannot_seal_was_not_written(tmp_path):
    checkpoints = Checkpoints(tmp_path, ALONE, CheckpointConfig())
    checkpoints.save(TrainState(step=1), {}, lambda files: files.write("a", lambda stream: stream.write(b"1")))
    (tmp_path / "latest.tmp").symlink_to("/dev/full")
    with pytest.raises(NotWrittenError, match="rank 0: .*No space left on device"):
        checkpoints.save(TrainState(step=2), {}, lambda files: files.write("a", lambda stream: stream.write(b"2")))
    assert steps_in(tmp_path) == step_names(1) and (tmp_path / "latest").read_text() == "step-00000001\n" and checkpoints.saved_step == 1


def test_what_is_written_in_the_background_counts_when_all_have_written_it(tmp_path):
    checkpoints, weights, state = Checkpoints(tmp_path, ALONE, CheckpointConfig()), torch.zeros(1000), TrainState(1)

    def save(step):
        assert state.step == step
        checkpoints.save(state, {}, lambda files: files.write("a", lambda stream: torch.save(weights, stream)), background=True)
        weights.add_(1)  # the next update: what was saved must not change by it
        state.step += 1

    save(1)
    checkpoints.finish()
    save(2)
    assert checkpoints.pending and (tmp_path / "latest").read_text() == "step-00000001\n"
    after_a_crash = Checkpoints(tmp_path, ALONE, CheckpointConfig())
    assert after_a_crash.newest_sound()[0].name == "step-00000001"
    checkpoints.finish()
    assert not checkpoints.pending and after_a_crash.newest_sound()[0].name == "step-00000002"
    assert [float(torch.load(tmp_path / name / "a")[0]) for name in step_names(1, 2)] == [0, 1]
    assert [read_state(tmp_path / name).step for name in step_names(1, 2)] == [1, 2]


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_a_run_that_saves_in_the_background_is_the_same_run(two_ranks, tmp_path, zero):
    whole = train(two_ranks, tmp_path / "whole", zero=zero, every_steps=2, best=True)
    got = train(two_ranks, tmp_path / "background", zero=zero, every_steps=2, best=True, keep=9, background=True, stop_after=7)
    assert steps_in(tmp_path / "background") == step_names(2, 4, 5, 6, 7) and got[1]["state"]["failed_saves"] == 0
    rest = train(two_ranks, tmp_path / "background", zero=zero, every_steps=2, best=True, keep=9, background=True)
    assert curve(got[0]) | curve(rest[0]) == curve(whole[0])
    assert steps_in(tmp_path / "background") == step_names(2, 4, 5, 6, 7, 8, 10)
    assert [damage(folder) for folder in tmp_path.glob("background/step-*")] == [None] * 7


def test_a_write_that_fails_in_the_background(two_ranks, tmp_path):
    """The validations of steps 5 and 10 wait for the saves of steps 4 and 8, and save their own steps."""
    words = {"steps": 14, "every_steps": 4, "keep": 9, "background": True, "no_room": {"at": [[7, 1], [8, 1], [9, 1]], "bytes": 2000}}
    replies = train(two_ranks, tmp_path / "stop", **words)
    assert "step 8: not saved: rank 1: " in text(replies[0]) and "the updates after step 5 are lost" in replies[0]
    results = train(two_ranks, tmp_path / "on", on_failure="continue", **words)
    assert {result["state"]["failed_saves"] for result in results} == {2} and results[0]["finished"]
    assert steps_in(tmp_path / "on") == step_names(4, 5, 12, 14)


@pytest.fixture(scope="module")
def trained(two_ranks, tmp_path_factory):
    """A run folder whose stage two ranks trained, by ZeRO stage."""
    root, made = tmp_path_factory.mktemp("trained"), {}
    make_run(root)

    def run(zero):
        if zero not in made:
            made[zero] = write_run(root, f"zero-{zero}", {"name": "toys.co_trained"})
            shutil.rmtree(made[zero] / "distill/checkpoints")
            train(two_ranks, made[zero] / "distill/checkpoints", zero=zero, best=True, keep=9)
        return made[zero]

    return run


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_any_kept_checkpoint_is_exported_without_ranks(trained, tmp_path, zero):
    run = trained(zero)
    best = (run / "distill/checkpoints/best").read_text().strip()
    expected = load_file(export(run, tmp_path / "best") / "student.safetensors")
    got = load_file(export(run, tmp_path / "same", checkpoint=best) / "student.safetensors")
    assert got.keys() == expected.keys() and "1.running_var" in got
    for key, value in expected.items():
        np.testing.assert_array_equal(got[key], value)
        assert got[key].dtype == value.dtype
    others = {name: load_file(export(run, tmp_path / name, checkpoint=name) / "student.safetensors") for name in ("latest", *step_names(5, 10))}
    np.testing.assert_array_equal(others["latest"]["0.weight"], others["step-00000010"]["0.weight"])
    assert not np.array_equal(others["step-00000005"]["0.weight"], others["step-00000010"]["0.weight"])


def test_a_checkpoint_that_is_not_there_or_damaged_is_not_exported(trained, tmp_path):
    run = shutil.copytree(trained(1), tmp_path / "run")
    with pytest.raises(UserError, match="no checkpoint 'step-00000007'; there are best, latest, step-00000005, step-00000010"):
        export(run, tmp_path / "out", checkpoint="step-00000007")
    flip_a_bit(run / "distill/checkpoints/step-00000005")
    with pytest.raises(UserError, match="step-00000005 is damaged: networks/.* does not match its checksum; choose another"):
        export(run, tmp_path / "out", checkpoint="step-00000005")
    assert not (tmp_path / "out").exists()


def test_weights_with_batchnorm_evaluate_alike_on_one_and_two_ranks(trained, one_rank, two_ranks):
    run = trained(1)
    config = yaml.safe_load((run / "config.yaml").read_text())
    words = {"shards": str(run.parents[1] / "shards"), "config": config, "run": str(run)}
    config["validate"]["subsets"] = ["flair", "t1+t1ce"]
    (here,), shared = (pool.run("trained_run.py", "on_ranks", **words) for pool in (one_rank, two_ranks))
    assert shared[0] == shared[1] == here
    assert len({row[-1]["dice"] for row in here[0]}) > 5  # not all empty or full


def test_a_best_that_cannot_be_named_leaves_its_validation_to_be_done_again(one_rank, tmp_path):
    (tmp_path / "best").mkdir()  # no file can take this name
    reply = one_rank.run("engine_ranks.py", "train", folder=str(tmp_path), steps=5, best=True)[0]
    assert reply.startswith("TrainingError") and "best weights not kept" in reply
    (tmp_path / "best").rmdir()
    again = one_rank.run("engine_ranks.py", "train", folder=str(tmp_path), steps=5, best=True)[0]
    assert again["finished"] and again["state"]["best_step"] == 5
    assert (tmp_path / "best").read_text().strip() == "step-00000005" == (tmp_path / "latest").read_text().strip()


def test_a_best_score_without_a_best_checkpoint_is_forgotten(one_rank, tmp_path):
    one_rank.run("engine_ranks.py", "train", folder=str(tmp_path), steps=20, best=True, stop_after=7)
    (tmp_path / "best").unlink()
    again = one_rank.run("engine_ranks.py", "train", folder=str(tmp_path), steps=20, best=True)[0]
    assert again["state"]["best_step"] in (10, 15, 20) and (tmp_path / "best").is_file()


def test_a_run_that_diverges_keeps_what_is_still_being_written(two_ranks, tmp_path):
    nan = {"nan_at": list(range(4, 20))}
    reply = two_ranks.run("engine_ranks.py", "train", folder=str(tmp_path), every_steps=4, background=True, max_skipped=0, method=nan)[0]
    assert reply.startswith("TrainingError") and (tmp_path / "latest").read_text().strip() == "step-00000004"
