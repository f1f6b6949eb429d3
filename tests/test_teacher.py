"""Frozen networks: where their weights come from, that they stay as they are, and where they lie."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from mlflow import MlflowClient
from safetensors.torch import load_file, save_file
from small_mst_kdnet import START, make, make_batch
from torch import nn

from mstkd.engine.teacher import load_weights
from mstkd.errors import UserError
from mstkd.evaluate.weights import load_given
from mstkd.losses.dice import soft_dice
from mstkd.trained_run import open_run

STEPS = 4


@pytest.fixture(scope="module")
def recipe(phantom_shards, tmp_path_factory):
    """The toy teacher and student on small crops: a recipe of a few seconds."""
    folder = tmp_path_factory.mktemp("toy")
    values = {
        "name": "toy", "method": {"name": "toys.frozen_teacher"},
        "data": {"shards": str(phantom_shards), "crop": [16, 16, 16], "workers": 0, "augment": {"noise_std": 0.1}},
        "train": {"global_batch": 2, "steps": STEPS, "log_every": 1, "precision": "fp32", "zero_stage": 0},
        "checkpoint": {"every_steps": 1, "keep": 9}, "inference": {"overlap": 0},
        "validate": {"every_steps": 100, "max_cases": 1, "subsets": ["flair", "t1ce"]},
    }  # fmt: skip
    (folder / "toy.yaml").write_text(yaml.safe_dump(values))
    return str(folder / "toy.yaml")


def best(run: Path, stage: str, role: str) -> Path:
    checkpoints = run / stage / "checkpoints"
    return checkpoints / (checkpoints / "best").read_text().strip() / f"{role}.safetensors"


def state(run: Path, stage: str) -> dict:
    return json.loads((best(run, stage, "any").parent / "state.json").read_text())["state"]


def losses(rows: dict) -> list[float]:
    return [rows["student"][step]["train/loss_student"] for step in range(1, STEPS + 1)]


@pytest.fixture(scope="module")
def trained(one_rank, recipe, tmp_path_factory):
    """A finished run of both stages on one rank: (folder, rows)."""
    runs = tmp_path_factory.mktemp("trained")
    return runs / "toy", one_rank.run("teacher_ranks.py", "run", recipe=recipe, overrides=[f"runs_dir={runs}"])[0]


# frozen


def test_a_teacher_stays_as_it_is_and_out_of_the_students_checkpoint(trained):
    run, rows = trained
    figures = [rows["student"][step] for step in range(1, STEPS + 1)]
    assert len({row["train/unchanged"] for row in figures}) == 1 and len({row["train/loss_student"] for row in figures}) == STEPS
    assert all(key.startswith("student.") for key in load_file(best(run, "student", "student")))
    weights = sum(path.stat().st_size for path in best(run, "student", "student").parent.rglob("*.pt"))
    assert weights < 64 * 1024 < best(run, "teacher", "teacher").stat().st_size  # the teacher's are 0.5 MB
    file = best(run, "teacher", "teacher")
    assert state(run, "student")["frozen"] == {"teacher": {"path": str(file.resolve()), "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}}
    assert state(run, "teacher")["frozen"] == {}


def test_every_stage_is_validated_by_what_it_trains(trained):
    """The student stage by the student over the recipe's subsets; the teacher's by the teacher, with all sequences."""
    _, rows = trained
    assert {name for name in rows["student"][STEPS] if name.startswith("val/dice_")} >= {"val/dice_flair", "val/dice_t1ce"}
    assert "val/dice_flair+t1+t1ce+t2" in rows["teacher"][STEPS] and "val/dice_flair" not in rows["teacher"][STEPS]


def test_a_stage_of_its_own_job_begins_like_one_in_the_same_job(trained, one_rank, recipe, tmp_path):
    overrides = [f"runs_dir={tmp_path}", "train.zero_stage=3"]
    together = one_rank.run("teacher_ranks.py", "run", recipe=recipe, overrides=overrides)[0]
    shutil.rmtree(tmp_path / "toy/student")
    alone = one_rank.run("teacher_ranks.py", "run", recipe=recipe, overrides=[*overrides, "stages=[student]"])[0]
    assert losses(alone) == losses(together) == pytest.approx(losses(trained[1]), rel=1e-5)


def test_a_stage_that_trains_what_it_needs_begins_there(one_rank, recipe, tmp_path):
    words = [f"runs_dir={tmp_path}", "method.name=toys.going_on", "train.roles={teacher: {optimizer: {lr: 0.05}}, student: {optimizer: {lr: 0.05}}}"]
    rows = one_rank.run("teacher_ranks.py", "run", recipe=recipe, overrides=words)[0]
    fits = [rows[stage][step]["train/fit"] for stage in ("teacher", "student") for step in (1, STEPS)]
    assert fits[0] > fits[2] > fits[3]  # the same first batch
    assert state(tmp_path / "toy", "student")["frozen"] == {}


def test_a_role_that_registers_its_frozen_network_is_found_out():
    from mstkd.engine.frozen import freeze
    from mstkd.methods import Role

    class Wrong(nn.Module):
        def __init__(self, teacher):
            super().__init__()
            self.teacher = teacher

    teacher = nn.Conv3d(1, 1, 1)
    with pytest.raises(RuntimeError, match="role student registers the frozen network teacher: keep it in a tuple"):
        freeze(teacher, "teacher", {"student": Role(Wrong(teacher), ("student",))})


def test_a_co_trained_teacher_that_is_detached_learns_from_its_own_terms_alone():
    torch.manual_seed(0)
    method, batch = make(detach_teacher=True), make_batch()
    teacher = method.networks["teacher"]
    method.roles("distill")["networks"].step(batch, {}, START).loss.backward()
    together = [p.grad.clone() for p in teacher.parameters() if p.grad is not None]
    teacher.zero_grad()
    target = method.channels.encode(batch.label)
    (method.config.weights.dice_teacher * soft_dice(teacher(batch.image).logits.sigmoid(), target).sum()).backward()
    alone = [p.grad for p in teacher.parameters() if p.grad is not None]
    assert len(together) == len(alone)
    for ours, own in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-9)


# where the weights come from


def file_of(tensors: dict, path: Path) -> Path:
    save_file({key: value.clone() for key, value in tensors.items()}, path)
    return path


def conv(seed: int = 0, channels: int = 2) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv3d(1, channels, 1), nn.BatchNorm3d(channels))


class Wrapped(nn.Module):
    def __init__(self, seed: int):
        super().__init__()
        self.net = conv(seed)


@pytest.mark.parametrize("prefix", ["", "teacher.", "other.", "net.", "teacher.net."])
@pytest.mark.parametrize("network", [conv, Wrapped])
def test_files_of_one_network_fit_whatever_leads_to_its_parameters(network, prefix, tmp_path):
    source, ours = conv(1), network(2)
    file = file_of({prefix + key: value for key, value in source.state_dict().items()}, tmp_path / "w.safetensors")
    assert load_weights(ours, "teacher", [file], None) == file
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), source.state_dict().values(), strict=True))


def test_a_network_is_picked_by_name_and_a_state_dict_of_torch_is_read(tmp_path):
    source, ours = conv(1), conv(2)
    both = {f"teacher.{k}": v for k, v in conv(3).state_dict().items()} | {f"keeper.{k}": v for k, v in source.state_dict().items()}
    load_weights(ours, "teacher", [file_of(both, tmp_path / "both.safetensors")], "keeper")
    assert torch.equal(ours[0].weight, source[0].weight)
    torch.save({"state_dict": conv(3).state_dict()}, tmp_path / "monai.pt")
    load_weights(ours, "teacher", [tmp_path / "monai.pt"], None)
    assert torch.equal(ours[0].weight, conv(3)[0].weight)


class Evil:
    def __reduce__(self):
        return print, ("unpickled",)


def test_weights_that_do_not_fit_are_named(tmp_path, capsys):
    def message(*files, pick=None):
        with pytest.raises(UserError) as caught:
            load_weights(conv(), "teacher", list(files), pick)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    wide = file_of(conv(channels=3).state_dict(), tmp_path / "wide.safetensors")
    assert "does not fit the network teacher: 0.weight is (3, 1, 1, 1, 1) in the file and (2, 1, 1, 1, 1) here" in message(wide)
    less = file_of({k: v for k, v in conv().state_dict().items() if k != "1.bias"}, tmp_path / "less.safetensors")
    assert "1.bias is missing in the file and (2,) here" in message(less)
    two = {f"{n}.{k}": v for n in ("a", "b") for k, v in conv().state_dict().items()}
    assert "no network c here; there are a, b; set teacher.network to one" in message(file_of(two, tmp_path / "two.safetensors"), pick="c")
    one = [file_of({f"teacher.{k}": v for k, v in conv().state_dict().items()}, tmp_path / f"{n}.safetensors") for n in "xy"]
    assert "both hold a network teacher; give the path of one of them" in message(*one)
    (tmp_path / "cut.safetensors").write_bytes(one[0].read_bytes()[:-8])
    assert "cut.safetensors: not readable as weights" in message(tmp_path / "cut.safetensors")
    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    assert "evil.pt: holds more than tensors" in message(tmp_path / "evil.pt") and "unpickled" not in capsys.readouterr().out


def test_a_teacher_from_elsewhere_trains_the_student_alone_and_its_path_stays_out_of_mlflow(trained, one_rank, recipe, tmp_path):
    run, rows = trained
    words = [f"runs_dir={tmp_path}", f"teacher.path={run}"]
    again = one_rank.run("teacher_ranks.py", "run", recipe=recipe, overrides=words)[0]
    assert losses(again) == losses(rows) and set(again) == {"student"} and not (tmp_path / "toy/teacher").exists()
    assert open_run(tmp_path / "toy").networks == ("student", "teacher")  # evaluated from where it was found
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    logged = [run.data.to_dictionary() for run in client.search_runs([e.experiment_id for e in client.search_experiments()])]
    assert logged and str(run) not in json.dumps(logged)


def test_a_trained_run_does_without_a_teacher_that_is_gone_unless_its_predictions_need_it(trained, one_rank, recipe, tmp_path):
    file = Path(shutil.copy(best(trained[0], "teacher", "teacher"), tmp_path / "teacher.safetensors"))
    words = [f"runs_dir={tmp_path}", f"teacher.path={file}", "train.steps=1"]
    one_rank.run("teacher_ranks.py", "run", recipe=recipe, overrides=words)
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    run = open_run(tmp_path / "toy")
    assert run.networks == ("student",)
    run.method.scored = ("student",)  # as where the frozen network is a part of how the student predicts
    with pytest.raises(UserError, match=f"its frozen network teacher came from {file}, which is not as it was"):
        load_given(run.folder, run.method, run.config, {"student"})


def cut_back(run: Path, step: int) -> None:
    """As if the student's run had stopped after `step`."""
    checkpoints = run / "student/checkpoints"
    for folder in checkpoints.glob("step-*"):
        if int(folder.name[5:]) > step:
            shutil.rmtree(folder)
    (checkpoints / "latest").write_text(f"step-{step:08d}\n")
    (checkpoints / "best").unlink()


def test_a_resume_notices_another_teacher_and_not_another_place(trained, one_rank, recipe, tmp_path):
    run, rows = trained
    file = shutil.copy(best(run, "teacher", "teacher"), tmp_path / "teacher.safetensors")
    words = [f"runs_dir={tmp_path}", f"teacher.path={file}"]
    one_rank.run("teacher_ranks.py", "run", recipe=recipe, overrides=words)
    cut_back(tmp_path / "toy", 2)
    tensors = load_file(file)
    tensors["teacher.0.bias"] += 1e-3
    other = file_of(tensors, tmp_path / "other.safetensors")
    old, new = (hashlib.sha256(Path(f).read_bytes()).hexdigest()[:12] for f in (file, other))
    with pytest.raises(AssertionError) as caught:
        one_rank.run("teacher_ranks.py", "run", recipe=recipe, overrides=[*words, f"teacher.path={other}"])
    last = str(caught.value).strip().splitlines()[-1]
    assert f"UserError: {other}: the frozen network teacher is another one" in last and f"sha256 {new}, was {old}" in last
    moved = shutil.move(file, tmp_path / "moved.safetensors")
    resumed = one_rank.run("teacher_ranks.py", "run", recipe=recipe, overrides=[*words, f"teacher.path={moved}"])[0]
    assert losses(resumed) == losses(rows)
    assert state(tmp_path / "toy", "student")["frozen"]["teacher"]["path"] == str(moved)


@pytest.mark.parametrize(("change", "expected"), [
    (["teacher.path=nowhere.safetensors"], "teacher.path: nowhere.safetensors: no such file"),
    (["teacher.path=nowhere"], "teacher.path: nowhere: neither a safetensors file nor a run folder"),
    (["teacher.path=RUN", "stages=[teacher]"], "stages: teacher.path gives what teacher would train"),
    (["teacher.path=RUN", "method.width=32"], "does not fit the network teacher: 0.weight is (64, 4, 3, 3, 3) in the file and (32, 4, 3, 3, 3) here"),
    (["teacher.path=RUN", "teacher.network=critic"], "no network critic here; there are student, teacher; set teacher.network to one"),
    (["stages=[student]"], "stage teacher has no best checkpoint"),
    (["teacher.cache_dir=cache"], "teacher.cache_dir needs data.crops=fixed"),
    (["teacher.cache_dir=cache", "data.crops=fixed", "teacher.placement=zero3"], "teacher.cache_dir needs teacher.placement=replicate"),
    (["method.name=toys.linear", "teacher.placement=zero3"], "teacher.placement: toys.linear freezes no network; remove the key"),
])  # fmt: skip
def test_bad_input_is_one_line(change, expected, trained, one_rank, recipe, tmp_path):
    words = [word.replace("RUN", str(trained[0])) for word in change]
    with pytest.raises(AssertionError) as caught:
        one_rank.run("teacher_ranks.py", "run", recipe=recipe, overrides=[f"runs_dir={tmp_path}", *words])
    last = str(caught.value).strip().splitlines()[-1]
    assert last.startswith("mstkd.errors.UserError") and expected in last


# placement


@pytest.mark.parametrize(("through", "zero"), [(False, 0), (True, 3)])
def test_the_curve_is_the_same_wherever_the_teacher_lies(through, zero, trained, two_ranks, recipe, tmp_path):
    """Also where the student itself is cut, and where the student's gradient passes through the teacher."""
    words = [f"teacher.path={trained[0]}", f"train.zero_stage={zero}", f"method.gradient_through={str(through).lower()}"]
    curves = {
        placement: losses(two_ranks.run(
            "teacher_ranks.py", "run", recipe=recipe, overrides=[*words, f"runs_dir={tmp_path / placement}", f"teacher.placement={placement}"]
        )[0])
        for placement in ("replicate", "zero3", "cpu")
    }  # fmt: skip
    assert curves["zero3"] == pytest.approx(curves["replicate"], rel=1e-6) == curves["cpu"]
    if not through:
        assert curves["replicate"] == pytest.approx(losses(trained[1]), rel=1e-5)


def test_a_cut_teacher_is_held_in_parts(two_ranks):
    whole = two_ranks.run("teacher_ranks.py", "placed", placement="replicate")
    assert all(result["before"] == result["whole"] for result in whole)
    for placement in ("zero3", "cpu"):
        for result in two_ranks.run("teacher_ranks.py", "placed", placement=placement):
            assert result["difference"] < 1e-6 and not result["training"]
            assert result["before"] == pytest.approx(result["whole"] / 2, rel=0.01)
            assert result["after"] < 0.6 * result["whole"]  # small tensors stay once gathered


@pytest.mark.parametrize("placement", ["zero3", "cpu"])
def test_a_cut_teacher_may_read_the_weights_of_its_other_modules(placement, two_ranks):
    assert max(two_ranks.run("teacher_ranks.py", "placed_trunk", placement=placement)) < 1e-5


@pytest.mark.parametrize("zero", [0, 3])
def test_validation_sees_whole_frozen_networks_whatever_the_student_is_cut_into(zero, two_ranks, tmp_path):
    """As a method needs it whose student predicts through a frozen network."""
    results = two_ranks.run("engine_ranks.py", "train", folder=str(tmp_path), zero=zero, steps=2, method={"name": "toys.given"})
    assert all((result["weights"]["teacher"]["0.weight"] == 0.25).all() for result in results)


# cache


def test_kept_outputs_give_the_same_curve_and_are_found_again(trained, two_ranks, recipe, tmp_path):
    words = [f"teacher.path={trained[0]}", "data.crops=fixed", "train.steps=12"]
    cached = [*words, f"teacher.cache_dir={tmp_path / 'cache'}"]
    plain, first, second = (
        two_ranks.run("teacher_ranks.py", "run", recipe=recipe, overrides=[*chosen, f"runs_dir={tmp_path}", f"name={name}"])[0]["student"]
        for name, chosen in (("plain", words), ("first", cached), ("second", cached))
    )
    assert [row["train/loss_student"] for row in first.values()] == [row["train/loss_student"] for row in plain.values()]
    assert [row["train/loss_student"] for row in second.values()] == [row["train/loss_student"] for row in plain.values()]

    def counts(name):
        [line] = [line for line in (tmp_path / name / "logs/rank-0.log").read_text().splitlines() if "teacher.cache_dir:" in line]
        return [int(word) for word in line.split() if word.isdigit()]

    files = len(list((tmp_path / "cache").glob("*.safetensors")))
    found, computed = counts("first")
    assert computed >= files > 0 and found + computed == 48  # two calls per micro-batch
    assert counts("second") == [48, 0]
