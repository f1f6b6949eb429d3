"""`mstkd bench step`: a training step of MST-KDNet beside the same step in plain PyTorch, on one machine in one run."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from mstkd.bench.reference_step import ReferenceStep
from mstkd.bench.report import Figure, Report, Target, figure, machine, ratio, versions
from mstkd.bench.step_program import OURS, REFERENCE, Job
from mstkd.errors import UserError
from mstkd.methods.mst_kdnet import NetworkConfig
from mstkd.models.mst_kdnet import STRIDE

PUBLISHED_CROP = (160, 192, 128)
SMALL = {"width": 8, "decoder_width": 4, "embed_dim": 96, "layers": 4, "heads": 4, "mlp_dim": 192}  # of the ranks' networks
SMALL_CROP = (64, 64, 32)
CONTENDERS = {
    "plain PyTorch, fp32": {"kind": REFERENCE},
    "mstkd, fp32": {"kind": OURS},
    "mstkd, fp32, recompute": {"kind": OURS, "recompute": True},
    "mstkd, bf16": {"kind": OURS, "precision": "bf16"},
    "mstkd, bf16, recompute": {"kind": OURS, "precision": "bf16", "recompute": True},
}
PLAIN, FP32, FP32_RECOMPUTE, BF16, BF16_RECOMPUTE = CONTENDERS
DIFFERENCE = "largest difference of a loss term"
SHARED = {"OMP_NUM_THREADS": "1"}  # of ranks that share this machine's cores


@dataclass(frozen=True)
class Settings:
    """What a run of the benchmark is asked for. `network`: sizes that differ from the published ones."""

    crop: tuple[int, int, int] = (96, 96, 96)
    rounds: int = 3
    steps: int = 2  # timed per turn
    network: dict = field(default_factory=dict)
    ranks: bool = True  # also two ranks beside one

    def facts(self) -> dict:
        """For the report's title."""
        return {"crop": "x".join(map(str, self.crop)), "batch": 1, "rounds": self.rounds, "steps_per_round": self.steps, "dropout": 0, "ZeRO": 0}


def bench_step(settings: Settings, say: Callable[[str], None]) -> Report:
    """Every contender in turn, `rounds` times, each time in a fresh process. `say` gets a line per turn.

    Raises UserError where the crop does not fit or a contender ends, e.g. for want of memory.
    """
    if any(size < STRIDE or size % STRIDE for size in settings.crop):
        raise UserError(f"--crop {','.join(map(str, settings.crop))}: each axis must be divisible by {STRIDE}")
    facts = machine()
    turns: dict[str, list[dict]] = {name: [] for name in CONTENDERS}
    for number in range(settings.rounds):
        for name, contender in CONTENDERS.items():
            say(f"round {number + 1} of {settings.rounds}: {name}")
            turns[name] += run_ranks(Job(**contender, crop=settings.crop, network=settings.network, steps=settings.steps))
    figures = step_figures(turns, step_flops(settings))
    device = turns[PLAIN][0]["device"]
    if settings.ranks and (device == "cpu" or torch.cuda.device_count() > 1):
        say("one rank and two")
        figures += scaling_figures(settings.rounds)
    return Report("step", settings.facts(), {**facts, "device": device, "threads": torch.get_num_threads()}, versions(), figures, targets(figures, device))


def run_ranks(job: Job, world: int = 1, **environment: str) -> list[dict]:
    """What `step_program` finds, by rank, each in a process of its own. Raises UserError if one of them ends early."""
    with tempfile.TemporaryDirectory(prefix="mstkd-bench-") as folder:
        if world > 1:
            job = replace(job, store=str(Path(folder) / "ranks"))
            environment |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "unused"}
        command = [sys.executable, "-m", "mstkd.bench.step_program", job.to_json()]
        processes = []
        for rank in range(world):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}
            env = {**os.environ, **environment, **own}
            processes.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        outputs = [process.communicate() for process in processes]
    for process, (_, said) in zip(processes, outputs, strict=True):
        if process.returncode:
            reason = said.strip().splitlines()[-1] if said.strip() else f"exit code {process.returncode}"
            raise UserError(f"bench step: a contender ended early ({reason}); if that is for want of memory, a smaller --crop needs less")
    return [json.loads(told.splitlines()[-1]) for told, _ in outputs]


def step_flops(settings: Settings) -> int:
    """Floating-point operations of one step, forward and backward: the reference's, counted without computing anything."""
    sizes = {**NetworkConfig().model_dump(exclude={"norm", "bn_eval", "last_stride"}), **settings.network}
    device = torch.device("meta")
    with device:
        step = ReferenceStep(settings.crop, sizes, device)
        image, label = torch.empty(1, 4, *settings.crop), torch.empty(1, *settings.crop, dtype=torch.uint8)
        available = torch.ones(1, 4, dtype=torch.bool)
    with FlopCounterMode(display=False) as counter:
        step(image, available, label)
    return counter.get_total_flops()


def step_figures(turns: dict[str, list[dict]], flops: int) -> list[Figure]:
    """Time, memory and rate of each contender, beside plain PyTorch."""
    seconds = [figure(name, "s/step", [s for turn in found for s in turn["seconds"]]) for name, found in turns.items()]
    memory = [figure(f"{name}: peak memory", "GiB", [turn["peak"] / 2**30 for turn in found]) for name, found in turns.items()]
    rates = []
    ceiling = max(turn["matmul"] for found in turns.values() for turn in found)
    for time in seconds:
        rate = flops / time.median
        note = f"{rate / ceiling:.0%} of the device's best matrix product, {ceiling / 1e12:.3g}"
        rates.append(Figure(f"{time.name}: rate", "TFLOP/s", rate / 1e12, note=note))
    fp32 = [largest_difference(turns[PLAIN][0]["terms"], turn["terms"]) for name in (FP32, FP32_RECOMPUTE) for turn in turns[name]]
    return [*_beside(seconds), *_beside(memory), *rates, Figure(DIFFERENCE, "relative", max(fp32), note="fp32, first step, to plain PyTorch")]


def _beside(figures: list[Figure]) -> list[Figure]:
    """With each one's ratio to the first."""
    return [replace(entry, versus={"plain": ratio(entry, figures[0])}) for entry in figures]


def largest_difference(terms: dict[str, float], others: dict[str, float]) -> float:
    """Of the terms, relative to the size of each. KeyError where one lacks a term."""
    if terms.keys() != others.keys():
        raise KeyError(f"terms differ: {sorted(terms.keys() ^ others.keys())}")
    return max(abs(others[name] - value) / max(abs(value), 1e-12) for name, value in terms.items())  # with one token there is no attention to match


def scaling_figures(rounds: int) -> list[Figure]:
    """Seconds per step of one and of two ranks, one thread and one sample each, of a small network."""
    job = Job(OURS, SMALL_CROP, SMALL, zero_stage=1, steps=5)
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(rounds):
        for world in seconds:
            seconds[world] += run_ranks(job, world, **SHARED)[0]["seconds"]
    one, two = (figure(f"{world} rank{'s' * (world > 1)}, small network", "s/step", values) for world, values in seconds.items())
    efficiency = Figure("weak scaling, 1 rank to 2", "of ideal", ratio(one, two), note="one thread and one sample per rank, ZeRO-1, fp32")
    return [one, two, efficiency]


def targets(figures: list[Figure], device: str) -> list[Target]:
    """What our step is meant to reach on this kind of device, beside what these figures say."""
    named = {entry.name: entry for entry in figures}

    def times(name: str) -> float | None:
        return ratio(named[name], named[PLAIN])

    def memory(name: str) -> float | None:
        return ratio(named[f"{name}: peak memory"], named[f"{PLAIN}: peak memory"])

    equal = Target("fp32, difference of the loss terms", at_most=1e-4, reached=named[DIFFERENCE].median)
    if device != "cpu":
        return [
            equal,
            Target("bf16, steps per second / plain fp32", at_least=3, reached=ratio(named[PLAIN], named[BF16])),
            Target("bf16 with recomputation, peak memory / plain fp32", at_most=0.5, reached=memory(BF16_RECOMPUTE)),
        ]
    return [
        equal,
        Target("fp32, time / plain fp32", at_most=0.85, reached=times(FP32)),
        Target("fp32 with recomputation, peak memory / plain fp32", at_most=0.7, reached=memory(FP32_RECOMPUTE)),
        Target("bf16, time / plain fp32", at_most=0.6, reached=times(BF16)),
    ]
