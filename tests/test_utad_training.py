"""UTAD-Net and its baselines trained by the engine: the same on one rank, on two, and in a plain loop; who updates whom, and how often."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from small_utad import NETWORKS, START, make, make_batch, passes

from mstkd.engine.frozen import freeze, frozen
from mstkd.engine.seeding import reseed


def both(**optimizer) -> dict:
    return {"roles": {role: {"optimizer": optimizer, "schedule": {"name": "constant"}} for role in ("critics", "generator")}}


# Biases before an instance norm have a gradient of rounding alone, which Adam would blow up to its full step.
PLAIN, QUICK = both(name="sgd", lr=1e-3, momentum=0.9), both(name="adam", lr=1e-3)


def same(one: dict, other: dict) -> bool:
    return all(np.array_equal(one[key], other[key]) for key in one)


def furthest(one: dict, other: dict) -> float:
    return max(float(np.abs(one[name][key] - other[name][key]).max()) for name in one for key in one[name])


@pytest.fixture(scope="module")
def alone(one_rank):
    """Five updates of the critics and two of the generator on one rank without ZeRO, by stage."""
    return {stage: one_rank.run("utad_ranks.py", "train", stage=stage, n_critic=2, train={"zero_stage": 0, **PLAIN})[0] for stage in ("teacher", "student")}


@pytest.mark.parametrize("zero", [1, 2])
@pytest.mark.parametrize("stage", ["teacher", "student"])
def test_two_ranks_train_like_one(stage, zero, alone, two_ranks):
    first, second = two_ranks.run("utad_ranks.py", "train", stage=stage, n_critic=2, train={"zero_stage": zero, **PLAIN})
    assert furthest(first["after"], second["after"]) == 0 and first["skipped"] == 0
    assert furthest(first["after"], alone[stage]["after"]) < 2e-6  # float32 sums in another order
    for network in (stage, "critics"):
        assert not same(first["before"][network], first["after"][network]) and all(np.isfinite(w).all() for w in first["after"][network].values())
    assert stage == "teacher" or same(first["before"]["teacher"], first["after"]["teacher"])  # bit for bit


def test_the_engine_trains_like_a_plain_loop_over_the_joint_batch(alone):
    method = make(n_critic=2)
    roles = method.roles("student")
    method.begin("student")
    freeze(method.networks["teacher"], "teacher", roles)
    optimizers = {name: torch.optim.SGD(role.step.parameters(), lr=1e-3, momentum=0.9) for name, role in roles.items()}
    for step in range(5):
        carries = [{}, {}]
        for name, role in roles.items():
            if (step + 1) % role.every:
                continue
            optimizers[name].zero_grad()
            for j, carry in enumerate(carries):
                reseed(0, step, name, j)
                with frozen([method.networks[network] for network in role.borrows]):
                    output = role.step.train()(make_batch(seed=10 * step + j), carry, START)
                    (output.loss / 2).backward()
                carry |= output.carry
            optimizers[name].step()
    assert all(p.grad is None and not p.requires_grad for p in method.networks["teacher"].parameters())
    weights = {name: {key: value.numpy() for key, value in network.state_dict().items()} for name, network in method.networks.items()}
    assert furthest(weights, alone["student"]["after"]) < 2e-6


def test_a_generators_gradient_is_the_same_for_one_joint_batch():
    halves, joint, method = [make_batch(seed=seed) for seed in (1, 2)], make_batch(samples=4), make()
    for key in ("image", "available", "label"):
        setattr(joint, key, torch.cat([getattr(half, key) for half in halves]))
    step, carries = method.roles("student")["generator"].step.train(), [passes(method, "student", half)["critics"][0].carry for half in halves]
    gradients = []
    for batches, given in ((halves, carries), ([joint], [{key: torch.cat([carry[key] for carry in carries]) for key in carries[0]}])):
        step.zero_grad()
        for batch, carry in zip(batches, given, strict=True):
            (step(batch, carry, START).loss / len(batches)).backward()
        gradients.append([p.grad.clone() for p in step.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


def test_the_critics_alone_leave_the_generator_as_it_is(two_ranks):
    found = two_ranks.run("utad_ranks.py", "train", stage="teacher", count=4, train={"zero_stage": 2})[0]
    assert found["updates"] == {"critics": 4, "generator": 0}
    assert same(found["before"]["teacher"], found["after"]["teacher"]) and not same(found["before"]["critics"], found["after"]["critics"])


def test_100_steps_are_100_updates_of_the_critics_and_20_of_the_generator(one_rank):
    found = one_rank.run("utad_ranks.py", "train", stage="teacher", count=100, train={"zero_stage": 0, "global_batch": 4, "log_every": 100})[0]
    assert found["updates"] == {"critics": 100, "generator": 20} and found["skipped"] == 0


def test_zero_3_is_refused_for_the_critics_and_works_for_the_generator(alone, two_ranks):
    refused = two_ranks.run("utad_ranks.py", "train", stage="student", train={"zero_stage": 3})
    assert refused == ["train.roles.critics.zero_stage: critics differentiates twice, which ZeRO-3 cannot; use 0, 1 or 2"] * 2
    roles = {**PLAIN["roles"], "critics": {**PLAIN["roles"]["critics"], "zero_stage": 2}}
    found = two_ranks.run("utad_ranks.py", "train", stage="student", n_critic=2, train={"zero_stage": 3, "roles": roles})[0]
    assert furthest(found["after"], alone["student"]["after"]) < 2e-6


def test_bf16_trains_both_roles(two_ranks):
    found = two_ranks.run("utad_ranks.py", "train", stage="student", n_critic=2, train={"zero_stage": 2, "precision": "bf16", **QUICK})[0]
    assert found["skipped"] == 0 and all(np.isfinite(value) for value in found["figures"].values())
    assert all(not same(found["before"][network], found["after"][network]) for network in ("student", "critics"))


@pytest.mark.parametrize("name", ["stargan", "resvit"])
def test_baselines_train_on_two_ranks(name, two_ranks):
    first, second = two_ranks.run("utad_ranks.py", "train", stage="train", name=name, count=3, n_critic=2, train={"zero_stage": 1})
    assert first["updates"] == {"critics": 3, "generator": 1} and furthest(first["after"], second["after"]) == 0
    assert all(not same(first["before"][network], first["after"][network]) for network in ("student", "critics"))


def test_a_run_that_is_cut_in_the_students_stage_ends_as_the_whole_one(two_ranks, phantom_shards, tmp_path):
    """Both roles, the odd step between two updates of the generator, and the frozen teacher of the stage before."""
    section = {"name": "utad_net", "network": NETWORKS["utad_net"], "critic": {"width": 4, "layers": 3}, "n_critic": 2}
    words = [
        f"method={json.dumps(section)}", f"data.shards={phantom_shards}", "data.slices={size: 16, min_brain: 0.1}", "train.deterministic=true",
        "train.steps={teacher: 2, student: 7}", "train.log_every=1", "checkpoint.every_steps=100", "validate={every_steps: 100, max_cases: 1, subsets: [t1]}",
    ]  # fmt: skip
    runs = {name: [*words, f"runs_dir={tmp_path / name}"] for name in ("whole", "cut")}
    whole = two_ranks.run("train_ranks.py", "run", recipe="utad_net_phantom", overrides=runs["whole"])[0]
    stopped = two_ranks.run("train_ranks.py", "run", recipe="utad_net_phantom", overrides=runs["cut"], stop_at=3)[0]
    assert stopped["stopped_by"] == "SIGTERM" and 3 + 2 <= len(stopped["curve"]) < len(whole["curve"])
    rest = two_ranks.run("train_ranks.py", "run", recipe="utad_net_phantom", overrides=runs["cut"])[0]
    assert rest["curve"] == whole["curve"]
    ends = [load_file(weights(tmp_path / name / "utad_net_phantom", "student")) for name in ("whole", "cut")]
    assert same(*ends) and len(ends[0]) > 10


def weights(run, stage: str):
    """The consolidated generator of a stage."""
    checkpoints = run / stage / "checkpoints"
    return next((checkpoints / (checkpoints / "best").read_text().strip()).glob("generator*.safetensors"))
