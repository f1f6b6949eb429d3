"""What every evaluation of a run shares: its place, its scores so far, and how it ends."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rich.console import Console

from mstkd.engine.distributed import on_main
from mstkd.engine.environment import Ranks
from mstkd.engine.figures import peak_memory_gib
from mstkd.errors import UserError
from mstkd.evaluate.completed_inputs import CompletingPredictor
from mstkd.evaluate.completion import Completer
from mstkd.evaluate.inference import Predictor
from mstkd.evaluate.kept import KeptScores
from mstkd.evaluate.report import write_report
from mstkd.evaluate.source import CaseSource
from mstkd.evaluate.tracked import track
from mstkd.files import write_json, write_text
from mstkd.run_folder import best_steps, recorded
from mstkd.subsets import Subset
from mstkd.trained_run import TrainedRun

SCORED = "scored"  # folder of what was scored until all is


@dataclass(frozen=True)
class Evaluation:
    """What is scored, by which networks, and where the results go."""

    run: TrainedRun
    front: TrainedRun | None  # a synthesis run that completes what the networks see
    source: CaseSource
    split: str
    subjects: Sequence[str]
    subsets: Sequence[Subset] | None  # None: each case once, given all that it has
    networks: Sequence[str]  # the first is what the run is for
    notes: dict[str, str]  # of the run itself: they go below the conventions
    folder: Path
    rank: int
    world: int

    @property
    def facts(self) -> dict[str, str]:
        """What the report says at its top."""
        return {
            "method": self.run.config.method["name"],
            "data": f"{self.source.dataset}, {self.split} split, {len(self.subjects)} cases",
            "trained on": f"{self.run.dataset}, fold {self.run.config.data.fold}",
        }

    @property
    def heading(self) -> tuple[str, str, int]:
        """Method, split and fold, as summaries name them."""
        return self.run.config.method["name"], self.split, self.run.config.data.fold

    def kept(self, kind: type, *clocks: dict[str, list]) -> KeptScores:
        """The scores that an interrupted evaluation of the same weights, cases and conventions left behind, to go on from. Collective."""
        kept = KeptScores(self.folder / SCORED, kind, clocks)
        on_main(lambda: kept.begin(self._identity()), Ranks(self.rank, self.world, self.rank, torch.device("cpu")))
        return kept

    def _identity(self) -> dict[str, Any]:
        return {
            "run": self.run.identity(), "front": self.front and self.front.identity(), "networks": self.networks, "subsets": self.subsets,
            "evaluate": self.run.config.evaluate.model_dump(), "data": self.source.digest,
        }  # fmt: skip

    def begin(self) -> None:
        """Make the folder and note whose weights are scored; summary.json is written last: where it lies, all of the evaluation does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "summary.json").unlink(missing_ok=True)
        write_json(self.folder / "weights.json", best_steps(self.run.folder))
        if self.folder.parent != self.run.folder:  # not the run's own, which its recipe describes
            write_text(self.folder / "config.yaml", yaml.safe_dump(recorded(self.run.config), sort_keys=False))

    def finish(
        self, summaries: dict[str, dict], facts: dict[str, str], drawn: dict[str, Path], template: str, print_summary: Callable[[dict, str], None]
    ) -> None:
        """Report, summaries, MLflow and the tables in the terminal."""
        name, report = self.run.config.name, self.folder / "report.html"
        write_report(report, f"Evaluation of {name}", facts, summaries, drawn, template)
        _write_summaries(self.folder, summaries)
        shutil.rmtree(self.folder / SCORED, ignore_errors=True)
        track(self.run, self.folder, summaries, self.source, len(self.subjects))
        for network, summary in summaries.items():
            oracle = " (oracle)" if summary.get("oracle") else ""
            print_summary(summary, f"{name}, {network}{oracle}, {self.split} split of {self.source.dataset}, {len(self.subjects)} cases")
        Console().print(f"report: {report}", highlight=False, soft_wrap=True)


def refuse_clearing_up(run: TrainedRun) -> None:
    """Raise UserError where the recipe clears up label maps and there are none."""
    if run.config.inference.postprocess != "none":
        raise UserError(f"inference.postprocess {run.config.inference.postprocess}: is for label maps of tumours (WT, TC, ET); set it to none")
    for key in ("mirror", "largest_component", "min_volume_ml"):
        if getattr(run.config.inference, key):
            raise UserError(f"inference.{key}: is for label maps; leave it out")


def pictured(chosen: dict[str, str]) -> dict[str, str]:
    """A fact for the report: which cases its pictures show."""
    return {"pictured": ", ".join(f"{rank} {subject}" for rank, subject in chosen.items())}


def _write_summaries(folder: Path, summaries: dict[str, dict[str, Any]]) -> None:
    for number, (network, summary) in enumerate(summaries.items()):
        write_json(folder / (f"summary_{network}.json" if number else "summary.json"), summary)


def cost_of(predictor: Predictor | Completer) -> dict[str, Any]:
    """By network: how long one case took from one subset, completion included, and where slices are completed one slice; on this rank.

    The peak is the whole evaluation's: of the GPU's memory, without one of the process's resident memory.
    """
    front = predictor.completion_seconds if isinstance(predictor, CompletingPredictor) else None
    cost = {}
    for network, seconds in predictor.seconds.items():
        cost[network] = {"seconds_per_case": float(np.mean(seconds)) + (front or 0), "predictions": len(seconds), "device": predictor.device.type}
        cost[network]["peak_memory_gib"] = peak_memory_gib(predictor.device)
        if front is not None:
            cost[network]["completion_seconds_per_case"] = front
        if isinstance(predictor, Completer):
            cost[network]["seconds_per_slice"] = sum(seconds) / sum(predictor.slices_done[network])
    return cost
