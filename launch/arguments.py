"""What several commands take, with what a shell can complete of it."""

from typing import Annotated

import typer

from mstkd.recipe import recipe_folder


def _packaged(studies: bool) -> list[str]:
    names = sorted(path.stem for path in recipe_folder().glob("*.yaml"))
    return [name for name in names if name.startswith("study_") == studies]


RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A packaged recipe or a path ending in .yaml.", autocompletion=lambda: _packaged(studies=False))
]
StudyName = Annotated[
    str, typer.Argument(metavar="STUDY", help="A packaged study or a path ending in .yaml.", autocompletion=lambda: _packaged(studies=True))
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Dotted recipe keys to change.")]
