"""Classes of cases from every subset of views: decisions, accuracy and AUC, `per_case.csv` and `summary.json`.

Letters: B cases, M views, K classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.metrics import compute_roc_auc
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mstkd.batch import hide
from mstkd.config import InferenceConfig
from mstkd.evaluate.inference import evaluation_mode
from mstkd.evaluate.sharing import shared_out
from mstkd.evaluate.source import CaseSource
from mstkd.evaluate.summary import mean_cell, mean_known
from mstkd.files import write_csv
from mstkd.measures import ACCURACY, AUC
from mstkd.methods import Method
from mstkd.precision import autocast
from mstkd.subsets import Subset, all_subsets, subset_name

BLOCK_CASES = 64  # given to a network together; always the same ones, so that the rank count changes nothing
ALL = "all"  # the entry beside the classes
CONVENTIONS = {
    "accuracy": "share of the cases whose most probable class is the true one; of a class: among its own cases",
    "auc": "area under the ROC curve of a class's probability against the rest, ties count half; all: unweighted mean over the classes",
    "subset": "cases that lack one of its views are left out",
    "mean": "unweighted mean over subsets; n is summed",
}


@dataclass(frozen=True)
class Decision:
    """What a network made of a case, given a subset; classes by their index."""

    network: str
    subject: str
    subset: str
    truth: int
    predicted: int
    probabilities: tuple[float, ...]  # (K,), softmax of the logits


def decide(
    method: Method, networks: Sequence[str], source: CaseSource, subjects: Sequence[str], subsets: Sequence[Subset],
    inference: InferenceConfig, device: torch.device, rank: int = 0, world: int = 1, stopping: Callable[[], bool] | None = None,
) -> list[Decision]:  # fmt: skip
    """Decisions on every subject x network x subset, the same on every rank and for any number of ranks.

    A subset is left out for a case that lacks one of its views. Collective with several ranks. `stopping` (collective)
    is asked before each round of `world` blocks of cases; raises Stopped when it says so.
    """
    blocks = [subjects[start : start + BLOCK_CASES] for start in range(0, len(subjects), BLOCK_CASES)]

    def decisions(number: int) -> list[Decision]:
        return _decide_block(method, networks, source, blocks[number], subsets, inference, device)

    with evaluation_mode(method):
        return shared_out(len(blocks), decisions, rank, world, stopping)


def _decide_block(method, networks, source, keys, subsets, inference, device) -> list[Decision]:
    samples = [source.subject(key) for key in keys]
    views = {name: _stacked(samples, name, shape).to(device) for name, shape in source.classification.views.items()}
    decisions = []
    for network in networks:
        for subset in subsets:
            asked = {name for name, given in zip(source.sequences, subset, strict=True) if given}
            logits = _logits(method, network, views, subset, inference)
            predicted, probabilities = method.to_labels(logits).tolist(), logits.softmax(1).tolist()
            decisions += [
                Decision(network, key, subset_name(source.sequences, subset), sample.label, predicted[n], tuple(probabilities[n]))
                for n, (key, sample) in enumerate(zip(keys, samples, strict=True))
                if asked <= sample.views.keys()
            ]
    return decisions


def _stacked(samples: Sequence, name: str, shape: tuple[int, ...]) -> Tensor:
    """(B, *shape) float32; 0, which is the mean, for cases that lack the view."""
    absent = np.zeros(shape, np.float16)
    return torch.from_numpy(np.stack([sample.views.get(name, absent) for sample in samples]).astype(np.float32))


def _logits(method: Method, network: str, views: dict[str, Tensor], subset: Subset, inference: InferenceConfig) -> Tensor:
    """(B, K) float32."""
    first = next(iter(views.values()))
    available = torch.tensor(subset, device=first.device).expand(len(first), -1)
    visible = {name: hide(view, available[:, m], method.intensity.hidden_value) for m, (name, view) in enumerate(views.items())}
    with autocast(first.device, inference.precision):
        return method.predict(visible, available, network).float()


def accuracies(decisions: Sequence[Decision]) -> dict[str, float]:
    """Subset -> share of right decisions."""
    right: dict[str, list[bool]] = {}
    for decision in decisions:
        right.setdefault(decision.subset, []).append(decision.predicted == decision.truth)
    return {subset: float(np.mean(values)) for subset, values in right.items()}


def summarise_decisions(
    decisions: Sequence[Decision], sequences: Sequence[str], classes: Sequence[str], method: str, split: str, fold: int, conventions: dict[str, str]
) -> dict[str, Any]:
    """The content of `summary.json` for the decisions of one network: per subset the classes and "all". Fractions; None over no case."""
    by_subset: dict[str, list[Decision]] = {}
    for decision in decisions:
        by_subset.setdefault(decision.subset, []).append(decision)
    order = [name for subset in all_subsets(sequences) if (name := subset_name(sequences, subset)) in by_subset]
    subsets = {name: _cells(by_subset[name], classes) for name in order}
    mean = {region: mean_cell([cells[region] for cells in subsets.values()]) for region in (ALL, *classes)}
    return {"method": method, "split": split, "fold": fold, "subsets": subsets, "mean": mean, "conventions": conventions}


def confusion(decisions: Sequence[Decision], classes: int) -> NDArray[np.int64]:
    """(K, K): cases by true class (rows) and decided class."""
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, ([d.truth for d in decisions], [d.predicted for d in decisions]), 1)
    return counts


def _cells(decisions: Sequence[Decision], classes: Sequence[str]) -> dict[str, dict[str, float | int | None]]:
    truth, right = np.array([d.truth for d in decisions]), np.array([d.predicted == d.truth for d in decisions])
    probabilities = torch.tensor([d.probabilities for d in decisions])
    cells = {}
    for number, name in enumerate(classes):
        own = truth == number
        both = own.any() and not own.all()
        auc = float(compute_roc_auc(probabilities[:, number], torch.from_numpy(own).float())) if both else None
        cells[name] = {"accuracy": float(right[own].mean()) if own.any() else None, "auc": auc, "n": int(own.sum())}
    return {ALL: {"accuracy": float(right.mean()), "auc": mean_known([cell["auc"] for cell in cells.values()]), "n": len(decisions)}, **cells}


def write_decisions(path: Path, decisions: Sequence[Decision], classes: Sequence[str]) -> None:
    """`per_case.csv`: one line per network x case x subset, with the probability of every class."""
    columns = ("network", "subject", "subset", "truth", "predicted", *(f"p_{name}" for name in classes))
    write_csv(path, columns, ((d.network, d.subject, d.subset, classes[d.truth], classes[d.predicted], *d.probabilities) for d in decisions))


def print_accuracies(summary: dict[str, Any], title: str, console: Console | None = None) -> None:
    """One line per subset: accuracy in per cent, AUC, number of cases; the conventions below."""
    console = console or Console()
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("given", no_wrap=True)
    for heading in ("accuracy %", "AUC", "cases"):
        table.add_column(heading, justify="right")
    for name, cells in summary["subsets"].items():
        table.add_row(name, ACCURACY.dashed(cells[ALL]["accuracy"]), AUC.dashed(cells[ALL]["auc"]), str(cells[ALL]["n"]))
    table.add_section()
    table.add_row("mean", ACCURACY.dashed(summary["mean"][ALL]["accuracy"]), AUC.dashed(summary["mean"][ALL]["auc"]), "", style="bold")
    console.print(table)
    for key, text in summary["conventions"].items():
        console.print(f"{key}: {text}", style="dim", highlight=False, markup=False)
