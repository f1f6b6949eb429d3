"""`mstkd bench step` at a tiny size: the reference has our losses, the report is whole."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from small_mst_kdnet import NETWORK, START
from torch.utils.flop_counter import FlopCounterMode

from mstkd.bench import step as bench
from mstkd.bench.reference_step import WEIGHTS, ReferenceStep
from mstkd.bench.step_program import OURS, REFERENCE, Job, build_method, make_batch
from mstkd.errors import UserError
from mstkd.methods.mst_kdnet import NetworkConfig

CROP = (64, 32, 32)
TINY = bench.Settings(crop=(32, 32, 32), rounds=1, steps=1, network=NETWORK, ranks=False)
COMMAND = [sys.executable, "-c", "from mstkd.launch.cli import main; main()", "bench", "step"]


@pytest.fixture(scope="module")
def report():
    lines = []
    return bench.bench_step(TINY, lines.append), lines


@pytest.fixture
def pair():
    """Our method and the reference, with equal weights, and a batch."""
    method = build_method(Job(OURS, CROP, NETWORK))
    reference = ReferenceStep(CROP, method.config.network.model_dump(exclude={"norm", "bn_eval", "last_stride"}), torch.device("cpu"))
    for name, network in method.networks.items():
        getattr(reference, name).load_state_dict(network.state_dict())  # strict: the same names and shapes
    return method, reference, make_batch(CROP)


# the reference


def test_every_term_of_the_reference_is_ours(pair):
    method, reference, batch = pair
    roles = method.roles("distill")
    output = roles["networks"].step(batch, {}, START)
    ours = {**output.scalars, **roles["critic"].step(batch, output.carry, START).scalars}
    theirs = reference(batch.image, batch.available, batch.label)
    assert ours.keys() == theirs.keys() == {*WEIGHTS, "critic"}
    for name, value in theirs.items():
        assert ours[name].item() == pytest.approx(value.item(), rel=2e-5), name


def test_gradients_of_the_reference_are_ours(pair):
    method, reference, batch = pair
    method.networks["critic"].requires_grad_(False)  # as the engine does
    method.roles("distill")["networks"].step(batch, {}, START).loss.backward()
    reference(batch.image, batch.available, batch.label)
    for name in ("teacher", "student"):
        theirs = {key: parameter.grad for key, parameter in getattr(reference, name).named_parameters()}
        noise = 1e-5 * max(gradient.abs().max().item() for gradient in theirs.values())  # a bias before a normalisation has no other gradient
        for key, parameter in method.networks[name].named_parameters():
            tolerance = 2e-3 * theirs[key].abs().max().item() + noise
            torch.testing.assert_close(parameter.grad, theirs[key], rtol=0, atol=tolerance, msg=lambda said, key=key: f"{key}: {said}")


def test_weights_are_those_of_the_method():
    declared = build_method(Job(OURS, CROP, NETWORK)).config.weights.model_dump()
    assert {name: value for name, value in declared.items() if value} == pytest.approx(WEIGHTS)


# the report


def test_the_report_has_every_figure_and_target(report):
    found, lines = report
    named = {entry.name: entry for entry in found.figures}
    assert lines == [f"round 1 of 1: {name}" for name in bench.CONTENDERS]
    for name in bench.CONTENDERS:
        assert named[name].median > 0 and named[f"{name}: peak memory"].median > 0 and named[f"{name}: rate"].median > 0
        assert named[name].versus["plain"] == pytest.approx(named[name].median / named[bench.PLAIN].median)
    assert named[bench.DIFFERENCE].median < 1e-4
    assert [target.name for target in found.targets if target.verdict == "not measured"] == []


def test_the_report_states_machine_and_versions_but_no_host_and_no_path(report):
    text = report[0].to_json()
    values = json.loads(text)
    assert {"cpu", "cores", "memory_gib", "device", "threads"} <= values["machine"].keys() and "torch" in values["versions"]
    assert os.getcwd() not in text and os.uname().nodename not in text.replace("mstkd bench step", "")


def test_a_gpu_has_targets_of_its_own(report):
    names = {target.name for target in bench.targets(report[0].figures, "cuda")}
    assert "bf16, steps per second / plain fp32" in names and "bf16, time / plain fp32" not in names


def test_flops_are_those_of_three_passes():
    """Forward, gradient of the input, gradient of the weights; but for the input of the first layers, which needs none."""
    sizes = {**NetworkConfig().model_dump(exclude={"norm", "bn_eval", "last_stride"}), **NETWORK}
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        step = ReferenceStep((32, 32, 32), sizes, torch.device("meta"))
        for network in (step.teacher, step.student):
            network(torch.empty(1, 4, 32, 32, 32))
    assert 2.7 < bench.step_flops(TINY) / counter.get_total_flops() < 3.1


def test_two_ranks_take_a_step_together():
    found = bench.run_ranks(Job(OURS, (32, 32, 32), NETWORK), 2, **bench.SHARED)
    assert len(found) == 2 and found[0]["terms"] != found[1]["terms"] and all(rank["seconds"] for rank in found)


# bad input


def test_a_crop_that_does_not_fit_is_one_line():
    done = subprocess.run([*COMMAND, "--crop", "96,90,96"], capture_output=True, text=True)
    assert done.returncode == 2 and "--crop 96,90,96: each axis must be divisible by 32" in done.stderr.splitlines()[-1]


def test_a_contender_that_ends_early_is_named():
    with pytest.raises(UserError, match="a contender ended early .*smaller --crop"):
        bench.run_ranks(Job(REFERENCE, CROP, {**NETWORK, "heads": 5}))


def test_a_missing_term_is_noticed():
    assert bench.largest_difference({"a": 1.0, "b": -2.0}, {"a": 1.5, "b": -2.1}) == pytest.approx(0.5)
    with pytest.raises(KeyError, match="'b'"):
        bench.largest_difference({"a": 1.0, "b": 2.0}, {"a": 1.0})
