"""`mstkd study`: several arms, several seeds, one comparison."""

import typer

from mstkd.launch.arguments import Overrides, StudyName


def study(
    recipe: StudyName,
    overrides: Overrides = None,
) -> None:
    """Run a study: make its cohort, tune every arm alike, train and evaluate each arm with each seed, and compare.

    Interrupted, or with a run that failed: the same command goes on where it was.

    Example: mstkd study study_phantom jobs=2
    """
    from mstkd.study.config import load_study

    config = load_study(recipe, overrides or [])
    from mstkd.study.run import run_study

    typer.echo(f"comparison: {run_study(config, typer.echo)}")
