"""The evaluation of a classification run."""

from mstkd.evaluate.classification import CONVENTIONS, decide, print_accuracies, summarise_decisions, write_decisions
from mstkd.evaluate.evaluation import Evaluation, refuse_clearing_up
from mstkd.evaluate.report import draw_class_figures


def evaluate_classes(job: Evaluation) -> dict[str, dict]:
    """Score decisions; summaries by network."""
    run, source, folder, classes = job.run, job.source, job.folder, job.source.classification.classes
    refuse_clearing_up(run)
    decisions = decide(
        run.method, job.networks, source, job.subjects, job.subsets, run.config.inference, run.placed(), job.rank, job.world
    )
    summaries = {
        n: summarise_decisions([d for d in decisions if d.network == n], source.sequences, classes, *job.heading, CONVENTIONS | job.notes)
        for n in job.networks
    }
    if job.rank == 0:
        job.begin()
        write_decisions(folder / "per_case.csv", decisions, classes)
        drawn = draw_class_figures(folder, summaries, decisions, classes)
        job.finish(summaries, job.facts, drawn, "classification.html.j2", print_accuracies)
    return summaries
