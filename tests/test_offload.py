"""Offload to host memory: the same updates as without, under DeepSpeed's compiled Adam; and where that does not compile."""

import os
import subprocess
import sys

import pytest

def curve(results) -> list[float]:
    return [row["train/loss_networks"] for _, row in results[0]["rows"] if "train/loss_networks" in row]


@pytest.fixture(scope="module")
def plain(two_ranks, tmp_path_factory):
    """The toy's loss by step without offload, by optimiser; equal under every ZeRO stage (test_engine.py)."""

    def train(optimizer: str) -> list[float]:
        more = {"roles": {"networks": {"optimizer": {"name": optimizer, "lr": 1e-2, "weight_decay": 0.1}}}}
        return curve(two_ranks.run("engine_ranks.py", "train", folder=str(tmp_path_factory.mktemp(optimizer)), zero=1, more=more))

    return {name: train(name) for name in ("adam", "adamw", "sgd")}


@pytest.mark.parametrize(("zero", "optimizer", "offload"), [
    (1, "adam", {"optimizer": True}), (2, "adam", {"optimizer": True}), (3, "adam", {"optimizer": True}), (2, "adamw", {"optimizer": True}),
    (2, "sgd", {"optimizer": True}), (3, "adam", {"optimizer": True, "parameters": True}), (3, "adam", {"parameters": True}),
])  # fmt: skip
def test_offloaded_training_gives_the_same_curve(two_ranks, plain, tmp_path, zero, optimizer, offload):
    more = {"offload": offload, "roles": {"networks": {"optimizer": {"name": optimizer, "lr": 1e-2, "weight_decay": 0.1}}}}
    got = curve(two_ranks.run("engine_ranks.py", "train", folder=str(tmp_path), zero=zero, more=more))
    assert max(abs(a - b) for a, b in zip(got, plain[optimizer], strict=True)) < 1e-5
    assert abs(plain["adam"][9] - plain["adamw"][9]) > 1e-4  # so that the kind of weight decay is seen


def test_the_compiled_adam_is_used_and_a_user_s_keys_go_with_it(two_ranks):
    given = {"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": False}}}
    for facts in two_ranks.run("settings_ranks.py", "engine_facts", train={"zero_stage": 2, "offload": {"optimizer": True}, "deepspeed": given}):
        assert facts["optimizer"] == "DeepSpeedCPUAdam" and facts["pin_memory"] is False


def test_a_resume_of_offloaded_training_continues_exactly(two_ranks, tmp_path):
    def run(name, **more):
        return two_ranks.run("engine_ranks.py", "train", folder=str(tmp_path / name), zero=2, more={"offload": {"optimizer": True}}, **more)

    whole = curve(run("whole"))
    first, second = curve(run("cut", stop_after=4)), curve(run("cut"))
    assert len(first) == 4 and first + second == whole


COMPILERS = """
import sys, torch
from mstkd.config import OffloadConfig, OptimizerConfig, ScheduleConfig
from mstkd.engine.backend import RoleSettings, load_ops
from mstkd.engine.environment import resolve_environment
settings = RoleSettings(OptimizerConfig(name=sys.argv[1]), ScheduleConfig(), 2, 0.0, OffloadConfig(optimizer=sys.argv[2] == "offload"))
try:
    load_ops([settings], sys.argv[2] == "compile", resolve_environment())
except Exception as error:
    print(f"{type(error).__name__}: {error}")
"""


def without_compiler(tmp_path, *words) -> list[str]:
    """What checking the operators says in a process whose compiler is not there."""
    away = {"CXX": "/nowhere/g++", "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    done = subprocess.run(
        [sys.executable, "-c", COMPILERS, *words], env={**os.environ, **away, "DS_ACCELERATOR": "cpu"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()


def test_an_operator_that_does_not_compile_is_one_line(tmp_path):
    (line,) = without_compiler(tmp_path, "adam", "offload")
    assert line.startswith("UserError: ") and str(tmp_path / "extensions") in line
    for part in ("cpu_adam does not compile", "/nowhere/g++: not found", "install g++", "train.offload.optimizer=false"):
        assert part in line


def test_sgd_needs_no_compiled_operator(tmp_path):
    assert without_compiler(tmp_path, "sgd", "offload") == []


def test_torch_compile_without_a_compiler_is_one_line(tmp_path):
    (line,) = without_compiler(tmp_path, "adam", "compile")
    assert line.startswith("UserError: train.compile: torch.compile does not work here (")
    assert "/nowhere/g++" in line and line.endswith("install g++ (or set CXX), or set train.compile=false")
