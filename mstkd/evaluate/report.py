"""`report.html`: tables, figures and conventions in one file that needs nothing else."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from mstkd.evaluate import figures
from mstkd.evaluate.cases import Row, labelled
from mstkd.evaluate.classification import Decision, confusion
from mstkd.evaluate.figures import CasePicture
from mstkd.evaluate.inference import Predictor, evaluation_mode
from mstkd.evaluate.source import CaseSource
from mstkd.evaluate.summary import beside, counted
from mstkd.evaluate.synthesis import Completion
from mstkd.files import write_text
from mstkd.measures import AUC, DICE, HD95, PSNR, SSIM
from mstkd.shards.spec import LabelScheme
from mstkd.subsets import Subset, possible_subsets, subset_name

TUMOUR_SCENARIOS = (("flair", "t1", "t1ce", "t2"), ("flair", "t1ce", "t2"), ("flair", "t1ce"), ("flair",))


def shown_subsets(sequences: Sequence[str], possible: Sequence[str] | None = None) -> list[Subset]:
    """The subsets of the qualitative figure, from all sequences down to one; of a method that takes few subsets (`possible`) these."""
    if possible is not None:
        return possible_subsets(sequences, possible)
    tumour = set(TUMOUR_SCENARIOS[0]) == set(sequences)
    given = TUMOUR_SCENARIOS if tumour else [sequences[:count] for count in range(len(sequences), 0, -1)]
    return [tuple(name in names for name in sequences) for names in given]


def best_median_worst(rows: Sequence[Row | Completion], figure: str = "dice") -> dict[str, str]:
    """"best", "median", "worst" -> subject, by the mean of a `figure` of their scores over all rows; fewer for fewer cases."""
    scores: dict[str, list[float]] = {}
    for row in rows:
        scores.setdefault(row.subject, []).append(getattr(row.score, figure))
    if not scores:
        return {}
    ranked = sorted(scores, key=lambda subject: (-np.mean(scores[subject]), subject))
    chosen = {"best": ranked[0], "worst": ranked[-1], "median": ranked[len(ranked) // 2]}
    distinct: dict[str, str] = {}
    for rank in ("best", "worst", "median"):
        if chosen[rank] not in distinct.values():
            distinct[rank] = chosen[rank]
    return {rank: distinct[rank] for rank in ("best", "median", "worst") if rank in distinct}


def case_pictures(
    predictor: Predictor, network: str, source: CaseSource, chosen: dict[str, str], scheme: LabelScheme, subsets: Sequence[Subset] | None = None
) -> list[CasePicture]:
    """The chosen cases, which must have every sequence, with their predictions from `subsets`, by default `shown_subsets`."""
    subsets = shown_subsets(predictor.sequences, predictor.takes) if subsets is None else subsets
    pictures = []
    with evaluation_mode(*predictor.methods):
        for rank, subject in chosen.items():
            sample = source.subject(subject)
            case, predictions = predictor.case(sample), {}
            for subset in subsets:
                predictions[subset_name(predictor.sequences, subset)] = predictor.labels(network, *case.given(subset))
            pictures.append(
                CasePicture(
                    title=rank,  # no subject key: pictures go to MLflow
                    images={name: np.where(sample.brain, image, image.min()) for name, image in zip(predictor.sequences, sample.image, strict=True)},
                    truth=labelled(source, subject),
                    truth_scheme=source.label_scheme,
                    predictions=predictions,
                    scheme=scheme,
                    spacing_mm=sample.meta.spacing_mm,
                )
            )
    return pictures


def draw_figures(folder: Path, summaries: dict[str, dict[str, Any]], cases: Sequence[CasePicture]) -> dict[str, Path]:
    """Write the PNG files; returns caption -> path."""
    drawn = {}
    for network, summary in summaries.items():
        path = folder / f"heat_map_{network}.png"
        figures.heat_map(summary, f"{network}: Dice by given sequences", path)
        drawn[f"Dice of the {network} by given sequences"] = path
    if not cases:
        return drawn
    everything = next(iter(cases[0].predictions))
    figures.montage(cases, everything, folder / "cases.png")
    figures.qualitative(cases, folder / "qualitative.png")
    drawn[f"Best, median and worst case, {everything} given (patient's right on the left)"] = folder / "cases.png"
    drawn["The same cases as sequences go missing"] = folder / "qualitative.png"
    return drawn


def draw_class_figures(
    folder: Path, summaries: dict[str, dict[str, Any]], decisions: Sequence[Decision], classes: Sequence[str]
) -> dict[str, Path]:
    """As `draw_figures`, of a classification: accuracy by subset and class, and who is taken for whom."""
    drawn = {}
    for network, summary in summaries.items():
        path = folder / f"heat_map_{network}.png"
        figures.heat_map(summary, f"{network}: accuracy by given views", path, "accuracy", "accuracy %")
        drawn[f"Accuracy of the {network} by given views"] = path
        path = folder / f"confusion_{network}.png"
        own = [decision for decision in decisions if decision.network == network]
        counts = {name: confusion([d for d in own if d.subset == name], len(classes)) for name in summary["subsets"]}
        figures.confusion_matrices(counts, classes, path)
        drawn[f"Cases by true class and by what the {network} decides"] = path
    return drawn


def write_report(
    path: Path, title: str, facts: dict[str, str], summaries: dict[str, dict[str, Any]], drawn: dict[str, Path], template: str = "report.html.j2"
) -> None:
    """One self-contained HTML file; `facts` are shown at its top. `template`: report.html.j2, or one that extends it."""
    environment = Environment(loader=PackageLoader("mstkd.evaluate", "."), autoescape=True, undefined=StrictUndefined)
    environment.filters |= {"percent": DICE.dashed, "millimetres": HD95.dashed, "area": AUC.dashed, "decibels": PSNR.dashed, "four_digits": SSIM.dashed}
    environment.filters |= {"beside": beside, "counted": counted}
    images = {caption: base64.b64encode(file.read_bytes()).decode() for caption, file in drawn.items()}
    html = environment.get_template(template).render(title=title, facts=facts, summaries=summaries, images=images)
    write_text(path, html)
