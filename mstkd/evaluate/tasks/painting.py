"""The evaluation of a segmentation run's networks that paint images, before there is a segmenter."""

from mstkd.evaluate.evaluation import Evaluation, cost_of, refuse_clearing_up
from mstkd.evaluate.painting import CONVENTIONS, score_paintings
from mstkd.evaluate.synthesis import Completion, print_likeness, summarise_completions, write_completions
from mstkd.files import write_json


def evaluate_paintings(job: Evaluation) -> dict[str, dict]:
    """Score whole painted volumes; summaries by network."""
    run, source, folder = job.run, job.source, job.folder
    refuse_clearing_up(run)
    predictor = run.predictor()
    rows = score_paintings(predictor, job.networks, source, job.subjects, job.rank, job.world, kept=job.kept(Completion, *predictor.clocks))
    summaries = {
        n: summarise_completions([row for row in rows if row.network == n], source.sequences, *job.heading, False, CONVENTIONS | job.notes)
        for n in job.networks
    }
    if job.rank == 0:
        job.begin()
        write_completions(folder / "per_case.csv", rows)
        write_json(folder / "cost.json", cost_of(predictor))
        job.finish(summaries, job.facts, {}, "synthesis.html.j2", print_likeness)
    return summaries
