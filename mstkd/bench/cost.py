"""`mstkd bench cost`: what methods cost beside each other in training and at test, as the table of ShaSpec's paper (arXiv:2307.14126) asks."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from mstkd.bench.cost_program import Job
from mstkd.bench.report import Figure, Report, figure, machine, ratio, versions
from mstkd.config import load_config
from mstkd.errors import UserError

MEASURES = {"train": ("training iteration", "s"), "test": ("test iteration", "s"), "peak": ("peak memory", "GiB"), "parameters": ("parameters", "million")}


def bench_cost(recipes: Sequence[str], overrides: Sequence[str], subset: str, iterations: int, say: Callable[[str], None]) -> Report:
    """Each recipe in a process of its own, one after the other; ratios are to the first. `overrides` hold for all of them.

    Batch 1 of random values, one rank, ZeRO 0, the recipe's crop and precision, the last stage's roles. Raises UserError where one ends
    early, or takes no volumes.
    """
    for recipe in recipes:
        if load_config(recipe, list(overrides)).data.crop is None:
            raise UserError(f"bench cost: {recipe} gives no data.crop, and costs are measured for volumes; choose another recipe")
    facts, found = machine(), {}
    for recipe in recipes:
        say(f"{recipe}: {iterations} training and {iterations} test iterations")
        found[recipe] = _measured(Job(recipe, tuple(overrides), subset, iterations))
    figures = [entry for measure in MEASURES for entry in _beside([_figure(recipe, measure, turn) for recipe, turn in found.items()])]
    device = found[recipes[0]]["device"]
    settings = {"batch": 1, "iterations": iterations, "given": subset, "ZeRO": 0, **dict(word.split("=", 1) for word in overrides)}
    return Report("cost", settings, {**facts, "device": device, "threads": torch.get_num_threads()}, versions(), figures, [])


def _measured(job: Job) -> dict:
    command = [sys.executable, "-m", "mstkd.bench.cost_program", job.to_json()]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
        raise UserError(f"bench cost: {job.recipe} ended early ({reason}); if that is for want of memory, give data.crop=[64,64,32] or another machine")
    return json.loads(done.stdout.splitlines()[-1])


def _figure(recipe: str, measure: str, turn: dict) -> Figure:
    name, unit = MEASURES[measure]
    scale = {"peak": 2**-30, "parameters": 1e-6}.get(measure, 1.0)
    values = turn[measure] if isinstance(turn[measure], list) else [turn[measure]]
    note = f"{turn['trained'] / 1e6:.3f} million are trained" if measure == "parameters" else ""
    return figure(f"{recipe}: {name}", unit, [value * scale for value in values], note)


def _beside(figures: list[Figure]) -> list[Figure]:
    return [replace(entry, versus={"first": ratio(entry, figures[0])}) for entry in figures]
