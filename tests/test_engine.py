"""The engine on real DeepSpeed ranks (gloo): equal curves for any rank count and ZeRO stage, exact resume, sound checkpoints."""

import json
import math
import signal

import numpy as np
import pytest

from mstkd.batch import Progress
from mstkd.config import ScheduleConfig
from mstkd.engine.schedule import lr_factor
from mstkd.engine.stop import StopFlag


def curve(result, name="train/loss_networks"):
    return {step: row[name] for step, row in result["rows"] if name in row}


@pytest.fixture(scope="module")
def reference(one_rank, tmp_path_factory):
    """Ten fp32 steps on one rank without ZeRO."""
    return one_rank.run("engine_ranks.py", "train", folder=str(tmp_path_factory.mktemp("reference")), zero=0)[0]


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("pool", ["one_rank", "two_ranks"])
def test_curve_is_the_same_for_every_rank_count_and_zero_stage(pool, zero, reference, tmp_path, request):
    results = request.getfixturevalue(pool).run("engine_ranks.py", "train", folder=str(tmp_path), zero=zero)
    for name in ("train/loss_networks", "train/loss_critic"):
        expected, got = curve(reference, name), curve(results[0], name)
        assert list(got) == list(range(1, 11))
        assert max(abs(expected[s] - got[s]) for s in got) < 1e-5
    assert curve(reference)[1] != curve(reference)[10]
    for result in results:  # weights and BatchNorm statistics agree on all ranks
        for key, value in results[0]["weights"]["student"].items():
            np.testing.assert_array_equal(value, result["weights"]["student"][key])


def test_clipping_acts_when_asked_for_and_alike_under_every_stage(one_rank, two_ranks, tmp_path):
    curves = {}
    for zero in (0, 1, 2, 3):
        rows = two_ranks.run("engine_ranks.py", "train", folder=str(tmp_path / str(zero)), zero=zero, clipping=0.05)[0]
        curves[zero] = curve(rows)
        assert max(abs(curves[zero][s] - curves[0][s]) for s in curves[0]) < 1e-5
    plain = one_rank.run("engine_ranks.py", "train", folder=str(tmp_path / "sgd"), zero=1, optimizer="sgd")[0]
    clipped = one_rank.run("engine_ranks.py", "train", folder=str(tmp_path / "sgd-clipped"), zero=1, optimizer="sgd", clipping=0.05)[0]
    first, second = (curve(plain), curve(clipped))
    assert first[1] == second[1] and abs(first[3] - second[3]) > 1e-3


def test_roles_run_by_their_schedule(two_ranks, tmp_path):
    rows = two_ranks.run("engine_ranks.py", "train", folder=str(tmp_path), method={"critic_every": 3})[0]
    assert list(curve(rows, "train/loss_critic")) == [3, 6, 9]
    assert list(curve(rows)) == list(range(1, 11))


@pytest.mark.parametrize("zero", [1, 3])
def test_stop_on_one_rank_stops_all_and_resume_continues_exactly(two_ranks, tmp_path, zero):
    whole = two_ranks.run("engine_ranks.py", "train", folder=str(tmp_path / "whole"), zero=zero)
    first = two_ranks.run("engine_ranks.py", "train", folder=str(tmp_path / "cut"), zero=zero, stop_after=4)
    assert [r["finished"] for r in first] == [False, False] and {r["step"] for r in first} == {4}
    second = two_ranks.run("engine_ranks.py", "train", folder=str(tmp_path / "cut"), zero=zero)
    joined = curve(first[0]) | curve(second[0])
    assert list(curve(second[0])) == [5, 6, 7, 8, 9, 10]
    assert joined == curve(whole[0])  # bit for bit
    for key, value in whole[0]["weights"]["student"].items():
        if "running" not in key:  # the extra save averages BatchNorm statistics once more
            np.testing.assert_array_equal(value, second[0]["weights"]["student"][key])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_non_finite_update_is_skipped_and_counted(two_ranks, tmp_path, zero, precision):
    results = two_ranks.run("engine_ranks.py", "train", folder=str(tmp_path), zero=zero, precision=precision, method={"nan_at": [3, 4]})
    for result in results:
        assert result["skipped"] == 2
        assert all(np.isfinite(v).all() for net in result["weights"].values() for v in net.values())
    rows = dict(curve(results[0]))
    assert 4 not in rows and 5 not in rows and math.isfinite(rows[10])


def test_skipped_updates_are_counted_over_a_resume(two_ranks, tmp_path):
    words = {"folder": str(tmp_path), "method": {"nan_at": [3, 8]}}
    assert [result["skipped"] for result in two_ranks.run("engine_ranks.py", "train", **words, stop_after=5)] == [1, 1]
    assert [result["skipped"] for result in two_ranks.run("engine_ranks.py", "train", **words)] == [2, 2]


def test_only_a_second_interrupt_ends_at_once():
    flag = StopFlag()
    flag.set(signal.SIGUSR2)
    flag.set(signal.SIGINT)  # the first one
    assert flag.reason == "SIGINT"
    with pytest.raises(KeyboardInterrupt):
        flag.set(signal.SIGINT)


def test_too_many_non_finite_updates_end_the_run(two_ranks, tmp_path):
    replies = two_ranks.run("engine_ranks.py", "train", folder=str(tmp_path), max_skipped=2, method={"nan_at": list(range(2, 9))})
    assert all(reply.startswith("TrainingError: ") and "3 non-finite updates in a row" in reply for reply in replies)


def test_checkpoints_keep_newest_and_best_with_consolidated_weights(two_ranks, tmp_path):
    from safetensors.numpy import load_file

    results = two_ranks.run("engine_ranks.py", "train", folder=str(tmp_path), zero=3, every_steps=2, best=True, keep=1)
    best, latest = (tmp_path / (tmp_path / name).read_text().strip() for name in ("best", "latest"))
    assert latest.name == "step-00000010"
    assert {p for p in tmp_path.glob("step-*")} == {best, latest}
    state = json.loads((best / "state.json").read_text())
    assert state["state"]["best_step"] == int(best.name.removeprefix("step-"))
    weights = load_file(best / "networks.safetensors")
    assert {k.split(".")[0] for k in weights} == {"teacher", "student"}
    if best == latest:
        for key, value in results[0]["weights"]["student"].items():
            np.testing.assert_array_equal(weights[f"student.{key}"], value)
    assert set(load_file(best / "critic.safetensors")) == {f"critic.{k}" for k in results[0]["weights"]["critic"]}


def flip_a_bit(checkpoint):
    victim = next(checkpoint.glob("networks/*model_states.pt"))
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 0xFF
    victim.write_bytes(data)


def test_damaged_newest_checkpoint_falls_back_to_the_one_before(two_ranks, tmp_path):
    two_ranks.run("engine_ranks.py", "train", folder=str(tmp_path), every_steps=4, stop_after=9, steps=14)
    newest = tmp_path / (tmp_path / "latest").read_text().strip()
    assert newest.name == "step-00000009"
    flip_a_bit(newest)
    again = two_ranks.run("engine_ranks.py", "train", folder=str(tmp_path), every_steps=4, steps=14, stop_after=8, keep=1)[0]
    assert curve(again) == {} and again["step"] == 8  # nothing newer was taken for it
    once_more = two_ranks.run("engine_ranks.py", "train", folder=str(tmp_path), every_steps=4, steps=14, keep=1)[0]
    assert min(curve(once_more)) == 9 and once_more["finished"]
    assert (tmp_path / "latest").read_text().strip() == "step-00000014"
    assert (tmp_path / "step-00000014/state.json").is_file() and (tmp_path / "step-00000009.damaged").is_dir()


def test_saves_after_a_fallback_are_kept_and_a_lost_best_is_named_anew(two_ranks, tmp_path):
    """The damaged folder has a higher step number than what is saved next, and was the best."""
    two_ranks.run("engine_ranks.py", "train", folder=str(tmp_path), every_steps=4, stop_after=5, best=True, steps=20)
    assert (tmp_path / "best").read_text().strip() == (tmp_path / "latest").read_text().strip() == "step-00000005"
    flip_a_bit(tmp_path / "step-00000005")
    again = two_ranks.run("engine_ranks.py", "train", folder=str(tmp_path), every_steps=2, stop_after=7, keep=1, best=True, steps=20)[0]
    assert again["step"] == 7 and again["state"]["best_step"] == 5
    for name in ("best", "latest"):
        assert (tmp_path / (tmp_path / name).read_text().strip() / "state.json").is_file()


def test_no_sound_checkpoint_is_an_error_and_not_a_fresh_start(one_rank, tmp_path):
    one_rank.run("engine_ranks.py", "train", folder=str(tmp_path), stop_after=2)
    flip_a_bit(tmp_path / "step-00000002")
    for _ in range(2):  # also when the damaged one has been set aside already
        (reply,) = one_rank.run("engine_ranks.py", "train", folder=str(tmp_path))
        assert reply.startswith("UserError: ") and "every checkpoint is damaged; restore one" in reply


def test_stop_during_validation_costs_no_update_and_the_validation_is_made_up_for(two_ranks, tmp_path):
    first = two_ranks.run("engine_ranks.py", "train", folder=str(tmp_path), best=True, stop_in_validation_at=10)
    assert not first[0]["finished"] and first[0]["step"] == 10 and first[0]["state"]["validated_step"] == 5
    second = two_ranks.run("engine_ranks.py", "train", folder=str(tmp_path), best=True)
    assert second[0]["finished"] and second[0]["state"]["validated_step"] == 10
    assert list(curve(second[0])) == [] and [step for step, row in second[0]["rows"] if "val/score" in row] == [10]


def test_a_rank_without_data_ends_all_ranks_after_a_save(two_ranks, tmp_path):
    replies = two_ranks.run("engine_ranks.py", "train", folder=str(tmp_path), no_data=[3, 1])
    assert replies == ["FailedElsewhereError: rank 1 failed and says why", "UserError: no data on rank 1"]
    assert (tmp_path / "latest").read_text().strip() == "step-00000003"


def test_a_batch_that_the_method_does_not_take_ends_all_ranks_after_a_save(two_ranks, tmp_path):
    replies = two_ranks.run("engine_ranks.py", "train", folder=str(tmp_path), method={"at_most": 2})
    assert replies == ["UserError: more than 2 sequences", "FailedElsewhereError: rank 0 failed and says why"]
    assert (tmp_path / "latest").read_text().strip() == "step-00000002"


def test_skipped_samples_are_counted_over_all_ranks_and_attempts(two_ranks, tmp_path):
    run = lambda **more: two_ranks.run("engine_ranks.py", "train", folder=str(tmp_path), bad=[[2, 0], [3, 1], [5, 1], [8, 0]], **more)  # noqa: E731
    replies = run(max_bad_samples=2)
    message = "data.max_bad_samples 2: 3 samples were skipped in this stage, by all ranks in all attempts"
    assert replies[0].startswith(f"UserError: {message}") and replies[1].startswith("FailedElsewhereError: rank 0")
    assert (tmp_path / "latest").read_text().strip() == "step-00000005"
    assert message in run(max_bad_samples=2)[0]  # a resume does not begin to count anew
    assert [reply["state"]["bad_samples"] for reply in run(max_bad_samples=4)] == [4, 4]


def progress(step, epoch, steps=1000, epochs=100.0):
    return Progress(step=step, epoch=epoch, total_steps=steps, total_epochs=epochs)


def test_poly_per_epoch_has_the_published_values_and_never_reaches_zero():
    poly = ScheduleConfig(name="poly", per="epoch", power=0.9)
    for epoch, lr in ((0, 1.0e-4), (50, 5.3589e-5), (99, 1.5849e-6)):
        assert 1e-4 * lr_factor(poly, progress(epoch * 10, epoch)) == pytest.approx(lr, rel=1e-4)
    for name in ("poly", "constant"):
        for per in ("step", "epoch"):
            schedule = ScheduleConfig(name=name, per=per)
            assert min(lr_factor(schedule, progress(s, s // 10)) for s in range(1000)) > 0


def test_a_warm_restart_begins_where_the_longer_curve_is():
    """ShaSpec: 80,000 steps, then 100,000 more on the curve of 180,000; the facts of its specification."""
    first, second = ScheduleConfig(name="poly"), ScheduleConfig(name="poly", after_steps=80_000)
    assert 1e-2 * lr_factor(first, progress(79_999, 0, 80_000)) == pytest.approx(3.866e-7, rel=1e-3)
    assert 1e-2 * lr_factor(second, progress(0, 0, 100_000)) == pytest.approx(5.8919e-3, rel=1e-4)
    whole = ScheduleConfig(name="poly")
    for step in (0, 50_000, 99_999):
        assert lr_factor(second, progress(step, 0, 100_000)) == pytest.approx(lr_factor(whole, progress(80_000 + step, 0, 180_000)))


def test_linear_falls_after_a_constant_share_to_its_end_in_the_last_step():
    schedule = ScheduleConfig(name="linear", constant_share=0.2, min_lr_ratio=0.5)
    factors = [lr_factor(schedule, progress(s, 0, steps=10)) for s in range(10)]
    assert factors == pytest.approx([1, 1, *(1 - 0.5 * n / 8 for n in range(1, 9))])
    whole = ScheduleConfig(name="linear", min_lr_ratio=0.1)
    assert [lr_factor(whole, progress(s, 0, steps=3)) for s in range(3)] == pytest.approx([0.7, 0.4, 0.1])


def test_warm_up_then_cosine():
    schedule = ScheduleConfig(name="cosine", warmup_steps=10, min_lr_ratio=0.1)
    factors = [lr_factor(schedule, progress(s, 0)) for s in range(1001)]
    assert factors[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert factors[10] == pytest.approx(1.0) and factors[1000] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(factors[10:], factors[11:], strict=False))
