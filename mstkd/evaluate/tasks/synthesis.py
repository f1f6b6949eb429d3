"""The evaluation of a synthesis run: completed sequences, and as a floor a given one taken for what is missing."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from mstkd.errors import UserError
from mstkd.evaluate import fused
from mstkd.evaluate.completion_figures import completion_pictures, draw_completions
from mstkd.evaluate.evaluation import Evaluation, cost_of, pictured, refuse_clearing_up
from mstkd.evaluate.report import best_median_worst
from mstkd.evaluate.source import CaseSource
from mstkd.evaluate.synthesis import (
    COPY, Completion, conventions, print_likeness, score_completions, summarise_completions, write_completions,
)  # fmt: skip
from mstkd.files import write_json
from mstkd.measures import PSNR, SSIM

ORACLE = {"oracle": "this network was given the labels of these cases, which a user does not have: an upper bound, not ranked"}


def evaluate_completions(job: Evaluation) -> dict[str, dict]:
    """Score completed sequences; summaries by network."""
    run, source, folder, oracles = job.run, job.source, job.folder, job.run.method.oracles
    refuse_clearing_up(run)
    if {*oracles} & {*job.networks} and source.label_scheme != run.facts.label_scheme:
        raise UserError(f"data set {source.dataset} has another label scheme than {oracles[0]}, which is given labels, learned from; set evaluate.networks")
    completer = run.completer()
    kept = job.kept(Completion, *completer.clocks)
    scored = score_completions(completer, [*job.networks, COPY], source, job.subjects, job.subsets, rank=job.rank, world=job.world, kept=kept)
    rows, copies = ([row for row in scored if (row.network == COPY) == floor] for floor in (False, True))
    errors = fused.measure(completer, job.networks, source, job.subjects, job.rank, job.world)
    notes = conventions(run.config.data.slices, run.method.intensity, any(row.score.lpips is not None for row in rows)) | job.notes
    summaries = {}
    for network in job.networks:
        own, texts = [row for row in rows if row.network == network], notes | (ORACLE if network in oracles else {})
        summaries[network] = summarise_completions(own, source.sequences, *job.heading, network in oracles, texts)
    if job.rank == 0:
        job.begin()
        write_completions(folder / "per_case.csv", rows)
        write_json(folder / "cost.json", cost_of(completer))
        complete = set(source.complete(job.subjects))
        chosen = best_median_worst([row for row in rows if row.network == job.networks[0] and row.subject in complete], "psnr")
        drawn = draw_completions(folder, summaries, completion_pictures(completer, job.networks[0], source, chosen), source.sequences)
        facts = job.facts | _write_floor(folder, copies, source, job.heading) | pictured(chosen)
        if errors:
            facts |= errors.write(folder)
            drawn[fused.CAPTION] = folder / fused.PICTURE
        job.finish(summaries, facts, drawn, "synthesis.html.j2", print_likeness)
    return summaries


def _write_floor(folder: Path, copies: Sequence[Completion], source: CaseSource, heading: tuple[str, str, int]) -> dict[str, str]:
    """copy_per_case.csv and baseline.json: how like the missing sequence a given one is already."""
    mean = summarise_completions(copies, source.sequences, *heading, False, {})["mean"]
    write_completions(folder / "copy_per_case.csv", copies)
    write_json(folder / "baseline.json", {COPY: mean})
    text = f"PSNR {PSNR.dashed(mean['psnr'])} dB, SSIM {SSIM.dashed(mean['ssim'])} if the first given sequence were taken for the missing one"
    Console().print(f"baseline: {text}", highlight=False)
    return {"floor": text}
