"""`mstkd study`: several arms, several seeds, one comparison."""

from typing import Annotated

import typer


def study(
    recipe: Annotated[str, typer.Argument(metavar="STUDY", help="A packaged study or a path ending in .yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Dotted keys to change.")] = None,
) -> None:
    """Run a study: make its cohort, tune every arm alike, train and evaluate each arm with each seed, and compare.

    Interrupted, or with a run that failed: the same command goes on where it was.

    Example: mstkd study study_phantom jobs=2
    """
    from mstkd.study.config import load_study

    config = load_study(recipe, overrides or [])
    from mstkd.study.run import run_study

    typer.echo(f"comparison: {run_study(config, typer.echo)}")
