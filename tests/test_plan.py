"""`mstkd plan`: its figures against what DeepSpeed really allocates, keeps, sends and writes."""

import json
import subprocess
import sys
from pathlib import Path

import plan_ranks
import pytest
import torch
from small_mst_kdnet import CROP, make, make_batch
from tiny_shards import TARS, write_set
from traffic import _settings

from mstkd.config import load_config
from mstkd.dry_step import empty_batch, fake_tensors, kept_for_backward
from mstkd.engine.backend import PLAIN_BUCKET, role_settings
from mstkd.engine.backend.settings import deepspeed_config
from mstkd.errors import UserError
from mstkd.footprint import checkpoint_bytes, role_memory
from mstkd.plan import plan
from mstkd.shards.build import build as build_set
from mstkd.shards.phantom import write_phantom
from mstkd.traffic import Elements, count_elements

MSTKD = str(Path(sys.executable).parent / "mstkd")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("plan") / "shards", TARS)


def planned(shards, world: int, *words: str, recipe: str = "mst_kdnet_brats2024"):
    return plan(load_config(recipe, [f"data.shards={shards}", *words]), world)


# the published network: what the README says


@pytest.mark.parametrize(("world", "zero", "state_gb", "sent_gb"), [
    (2, 0, 5.0, 1.25), (2, 1, 3.7, 1.57), (2, 2, 3.1, 4.43), (2, 3, 2.5, 3.80), (8, 1, 2.8, 2.76), (8, 2, 1.7, 2.76), (8, 3, 0.6, 1.66),
])  # fmt: skip
def test_the_published_recipe_takes_what_the_readme_says(shards, world, zero, state_gb, sent_gb):
    (stage,) = planned(shards, world, f"train.zero_stage={zero}").stages
    networks, critic = stage.roles
    assert networks.networks == {"teacher": 154_334_148, "student": 154_334_148} and critic.parameters == 3_146_433
    state = sum(role.memory.weights + role.memory.gradients + role.memory.moments for role in stage.roles)
    assert state / 1e9 == pytest.approx(state_gb, abs=0.05) and stage.sent / 1e9 == pytest.approx(sent_gb, abs=0.005)
    assert stage.checkpoint / 1e9 == pytest.approx({0: 3.7, 1: 5.0, 2: 5.0, 3: 3.7}[zero], abs=0.05)
    assert networks.activations > 3e9 and stage.device_bytes > state + networks.activations


def test_data_steps_and_disk_add_up(shards, tmp_path):
    words = ("train.global_batch=4", "train.epochs=10", "checkpoint.keep=3", "checkpoint.keep_every=8", f"runs_dir={tmp_path}/not/yet")
    found = planned(shards, 2, *words)
    (stage,) = found.stages
    assert (found.items, found.tars, found.steps_per_epoch, found.accumulation, found.rank_counts) == (9, 4, 2.25, 2, [1, 2, 4])
    assert stage.steps == 23  # 90 items in steps of 4
    assert found.data_bytes == sum(tar.stat().st_size for tar in Path(shards).glob("*.tar"))
    copies = 3 + 2 + 23 // 8  # kept, best and being written, every eighth
    assert stage.disk == pytest.approx(copies * stage.checkpoint + stage.best, rel=1e-4) and found.free_bytes > 0


def test_a_rank_count_that_does_not_divide_names_those_that_do(shards):
    with pytest.raises(UserError, match="1, 2, 4 or 8 ranks, not 3"):
        planned(shards, 3)


def test_what_the_roles_contradict_is_found_without_ranks(shards):
    with pytest.raises(UserError, match=r"train\.deepspeed: zero_optimization\.stage is 2"):
        planned(shards, 2, "train.deepspeed={zero_optimization: {stage: 2}}")
    with pytest.raises(UserError, match=r"train\.deepspeed: DeepSpeed refuses it: .*overlap_com"):
        planned(shards, 2, "train.deepspeed={zero_optimization: {overlap_com: true}}")
    with pytest.raises(UserError, match="has no such role; its roles: critic, networks"):
        planned(shards, 2, "train.roles={judge: {zero_stage: 1}}")


def test_every_stage_is_planned_and_frozen_networks_count_by_their_placement(shards):
    sizes = {}
    for placement in ("replicate", "zero3", "cpu"):
        found = plan(_two_stage(shards, placement), 2)
        assert [stage.name for stage in found.stages] == ["teacher", "student"]
        student = found.stages[1]
        assert student.frozen == {"teacher": 327} and [role.name for role in student.roles] == ["student"]
        sizes[placement] = student.frozen_bytes
    assert sizes == {"replicate": 1308, "zero3": 654, "cpu": 0}


def _two_stage(shards, placement: str = "replicate"):
    from mstkd.config import RunConfig

    return RunConfig.model_validate({
        "name": "toy", "method": {"name": "toys.two_stage"}, "data": {"shards": str(shards), "crop": [8, 8, 8]}, "teacher": {"placement": placement},
        "train": {"global_batch": 4, "steps": 10, "precision": "fp32"},
    })  # fmt: skip


def test_a_method_that_looks_at_numbers_is_planned_without_activations(shards, monkeypatch):
    from toys.two_stage import Fit

    plain = Fit.forward
    monkeypatch.setattr(Fit, "forward", lambda self, batch, *more: plain(self, batch, *more) if batch.image.sum().item() else None)
    found = plan(_two_stage(shards), 2)
    (role,) = found.stages[0].roles
    assert role.activations is None and found.stages[0].device_bytes is None and role.memory.weights == 1308
    assert "activations are not known, the dry step stops at DataDependentOutputException" in found.note


def test_networks_that_cannot_be_built_without_numbers_are_built_with_them(shards, monkeypatch):
    from toys.two_stage import TwoStage

    def build(self, config, facts):
        assert [x.item() for x in torch.linspace(0, 1, 2)] == [0, 1]  # as some networks do for their drop rates
        plain(self, config, facts)

    plain, expected = TwoStage.__init__, plan(_two_stage(shards), 2)
    monkeypatch.setattr(TwoStage, "__init__", build)
    assert plan(_two_stage(shards), 2).stages == expected.stages and expected.stages[0].roles[0].activations > 0


# the dry step


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_dry_step_keeps_what_a_real_step_keeps(precision):
    with fake_tensors():
        dry = kept_for_backward((method := make()), method.roles("distill"), empty_batch(1, 4, CROP, True), precision)
    torch.manual_seed(0)
    method, batch = make(), make_batch()
    roles = method.roles("distill")
    real = kept_for_backward(method, roles, batch, precision)
    assert dry.keys() == real.keys() == {"networks", "critic"}
    for role in dry:
        assert dry[role] == pytest.approx(real[role], rel=0.01)
    assert dry["networks"] == pytest.approx(_saved_tensors(method, roles["networks"], batch, precision), rel=0.05)


def _saved_tensors(method, role, batch, precision) -> int:
    """What autograd itself says that it saves in a real step: another count of the same."""
    from mstkd.batch import Progress
    from mstkd.engine.frozen import frozen

    rested = [*(t for network in method.networks.values() for t in network.state_dict().values()), *vars(batch).values()]
    given = {t.untyped_storage().data_ptr() for t in rested if isinstance(t, torch.Tensor)}
    saved = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    cast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16")
    with frozen([method.networks["critic"]]), cast, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = role.step(batch, {}, Progress(0, 0, 1, 1))
    assert output.loss.requires_grad
    return sum(saved.values())


def test_recomputation_lets_a_crop_of_128_fit_where_it_did_not(tmp_path):
    """A keeper of the published size, with its kernels of 7^3, in 4 GiB."""
    write_phantom(tmp_path / "nifti", subjects=3, size=32, paired_7t=True)
    build_set("phantom_7t", tmp_path / "nifti", tmp_path / "pairs")
    words = ("data.crop=[128, 128, 128]", "train.precision=fp32", "train.zero_stage=0")
    needed = {}
    for again in (False, True):
        found = planned(tmp_path / "pairs", 1, *words, f"train.recompute={again}", recipe="uhf_pairs")
        needed[again] = {stage.name: stage.device_bytes / 2**30 for stage in found.stages}
    assert list(needed[True]) == ["teacher", "keeper"] and max(needed[True].values()) < 4 < needed[False]["keeper"]


# DeepSpeed itself


@pytest.mark.parametrize(("zero", "precision", "offload"), [
    (0, "fp32", {}), (1, "fp32", {}), (2, "bf16", {}), (3, "bf16", {}), (2, "fp32", {"optimizer": True}),
    (3, "fp32", {"optimizer": True, "parameters": True}),
])  # fmt: skip
def test_memory_and_checkpoint_are_what_deepspeed_takes(two_ranks, tmp_path, zero, precision, offload, monkeypatch):
    found = two_ranks.run("plan_ranks.py", "measure", folder=str(tmp_path), zero=zero, precision=precision, offload=offload)[0]
    monkeypatch.setattr("traffic.NETWORK", plan_ranks.NETWORK)
    train, method = _settings(zero, precision, 2)
    train = type(train).model_validate({**train.model_dump(), "roles": {"networks": {"offload": offload}}})
    role = method.roles("distill")["networks"]
    elements, settings = count_elements(role.step, precision == "bf16"), role_settings("networks", role, train)
    assert (elements.all, elements.half) == (found["all"], found["half"])
    memory = role_memory(settings, deepspeed_config("networks", settings, train, 1, elements.all), elements, 2)
    at_rest = memory.weights + memory.moments + memory.master + memory.host  # on a CPU all of it is one memory
    if zero == 3:  # its gradients and buckets stay; the others' come and go within a step
        at_rest += memory.gradients + memory.buffers
    assert found["held"] == pytest.approx(at_rest, rel=0.05)
    written = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert written == pytest.approx(checkpoint_bytes(settings, elements), rel=0.05)


def test_without_zero_gradients_pass_through_a_bucket_and_the_tensor_that_fills_it():
    train, method = _settings(0, "fp32", 2)
    role = method.roles("distill")["networks"]
    settings = role_settings("networks", role, train)
    for whole, held in ((10**6, 10**6), (300 * 10**6, PLAIN_BUCKET + 5 * 10**6)):
        elements = Elements(all=whole, half=0, kept=0, kept_half=0, largest=5 * 10**6)
        assert role_memory(settings, {}, elements, 2).buffers == 4 * held and role_memory(settings, {}, elements, 1).buffers == 0


# the command


def test_the_command_shows_tables_and_writes_json(shards, tmp_path):
    words = ("plan", "mst_kdnet_phantom", "--world-size", "2", f"data.shards={shards}", "--json", "plan.json")
    done = subprocess.run([MSTKD, *words], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    values = json.loads((tmp_path / "plan.json").read_text())
    assert values["stages"][0]["roles"][0]["parameters"] == 2 * 3_099_936 and values["stages"][0]["device_bytes"] > 1e8
    for part in ("teacher 3,099,936", "accumulation 1; the global batch allows 1, 2", "moments", "activations", "sent per rank", "checkpoint", "disk:"):
        assert part in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
