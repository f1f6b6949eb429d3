"""What several commands take, with what a shell can complete of it."""

import re
from pathlib import Path
from typing import Annotated

import typer

from mstkd.errors import UserError
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


def writable_file(json: Path | None) -> Path | None:
    """What --json names, checked before anything slow begins. Raises UserError."""
    if json is not None and (json.is_dir() or not json.absolute().parent.is_dir()):
        raise UserError(f"--json {json}: not a file in a folder that exists; create the folder, or give another name")
    return json


def parse_part(text: str | None) -> tuple[int, int] | None:
    """(2, 6) from "2/6". Raises UserError."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--part {text}: give I/N with I from 1 to N, e.g. 2/6")
    return int(match[1]), int(match[2])
