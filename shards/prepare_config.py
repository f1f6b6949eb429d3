"""The file that `mstkd shards prepare` follows: where raw scans lie, and the commands that turn them into images."""

import re
import shlex
from functools import cached_property
from pathlib import Path, PurePosixPath
from string import Formatter
from typing import Literal

from pydantic import Field, field_validator, model_validator

from mstkd.errors import UserError
from mstkd.recipe import read_yaml, validate_section
from mstkd.shards.spec import Strict

NAME = re.compile(r"[A-Za-z0-9_]+")
EITHER = ("output", "output_dir", "output_stem", "subject")  # what a command of any step may name
PER_SEQUENCE = ("input", "sequence")


class PrepareStep(Strict):
    """One external command, run without a shell for every sequence of a subject, or once for the subject."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    command: str
    per: Literal["sequence", "subject"] = "sequence"
    only: tuple[str, ...] = ()  # with per: sequence, these sequences; empty: all
    same_grid: bool = False  # promise: after this step all images of the subject lie on one grid
    mask: bool = False  # promise: the result is a binary mask, not empty (per: subject)
    timeout_min: float = Field(60, gt=0)

    @field_validator("command")
    @classmethod
    def _splits(cls, value: str) -> str:
        try:
            words = shlex.split(value)
        except ValueError as error:
            raise ValueError(f"cannot be split into words: {error}") from None
        if not words:
            raise ValueError("names no program")
        if "{" in words[0]:
            raise ValueError("the program cannot be a placeholder")
        return value

    @model_validator(mode="after")
    def _fits(self) -> "PrepareStep":
        if self.per == "subject" and self.only:
            raise ValueError("only: goes with per: sequence")
        if self.per == "sequence" and self.mask:
            raise ValueError("mask: goes with per: subject; the images of the sequences would become masks")
        if any(spec or conversion for word in self.words for _, _, spec, conversion in Formatter().parse(word)):
            raise ValueError("command: write placeholders as {name} alone, without : or !")
        named = self.placeholders
        if "output" not in named and not {"output_dir", "output_stem"} <= named:
            raise ValueError("command names no {output} (or {output_dir} and {output_stem}); the step would leave nothing")
        return self

    @cached_property
    def words(self) -> tuple[str, ...]:
        """The command, split once; placeholders are filled in afterwards, so that no value is ever split."""
        return tuple(shlex.split(self.command))

    @cached_property
    def placeholders(self) -> set[str]:
        """Names in braces. Raises ValueError where braces are not balanced."""
        return {field for word in self.words for _, field, _, _ in Formatter().parse(word) if field is not None}

    def filled(self, values: dict[str, str]) -> list[str]:
        """The command's words with every placeholder's value."""
        return [word.format_map(values) for word in self.words]


class PrepareConfig(Strict):
    sequences: dict[str, str] = Field(min_length=1)  # name -> file or folder under --src, with {subject}; * matches within a name
    allow_missing: bool = False  # subjects may lack sequences
    steps: tuple[PrepareStep, ...] = Field(min_length=1)

    @field_validator("sequences")
    @classmethod
    def _patterns(cls, value: dict[str, str]) -> dict[str, str]:
        for name, pattern in value.items():
            if not NAME.fullmatch(name):
                raise ValueError(f"sequence name {name!r}: use letters, digits and _")
            path = PurePosixPath(pattern)
            if "{subject}" not in pattern or path.is_absolute() or ".." in path.parts:
                raise ValueError(f"{pattern!r}: give a path below --src with {{subject}} in it")
        return value

    @model_validator(mode="after")
    def _steps_fit(self) -> "PrepareConfig":
        inputs = {f"input_{name}" for name in self.sequences}
        earlier: set[str] = set()
        for step in self.steps:
            if step.name in earlier or step.name in (*EITHER, *PER_SEQUENCE, *self.sequences) or step.name in inputs:
                raise ValueError(f"step {step.name}: that name is taken; choose another")
            known = {*EITHER, *inputs, *earlier, *(PER_SEQUENCE if step.per == "sequence" else ())}
            if strange := sorted(step.placeholders - known):
                raise ValueError(f"step {step.name}: nothing is called {{{strange[0]}}} there; known: {', '.join(sorted(known))}")
            if unknown := sorted(set(step.only) - set(self.sequences)):
                raise ValueError(f"step {step.name}: only names {unknown[0]}, which is no sequence; known: {', '.join(self.sequences)}")
            if step.per == "subject":
                earlier.add(step.name)
            elif any(step.name == other.name for other in self.steps if other is not step):
                raise ValueError(f"step {step.name}: two steps have that name; choose another")
        return self

    def find_subjects(self, src: Path) -> dict[str, dict[str, Path]]:
        """Subject -> sequence -> its file or folder under `src`, both sorted.

        Raises UserError: no such folder, nobody in it, a sequence that is missing or there twice.
        """
        if not src.is_dir():
            raise UserError(f"{src}: no such folder; give the one that holds the raw scans")
        found: dict[str, dict[str, Path]] = {}
        for name, pattern in self.sequences.items():
            regex = _regex(pattern)
            for path in sorted(src.glob(pattern.replace("{subject}", "*"))):
                match = regex.fullmatch(path.relative_to(src).as_posix())
                if match is None:
                    continue
                if other := found.setdefault(match[1], {}).get(name):
                    raise UserError(f"subject {match[1]}: two scans for {name}, {other} and {path}; narrow its pattern in sequences")
                found[match[1]][name] = path
        if not found:
            raise UserError(f"{src}: no scan fits {', '.join(self.sequences.values())}; correct sequences, or give another --src")
        for subject, scans in sorted(found.items()):
            missing = [name for name in self.sequences if name not in scans]
            if missing and not self.allow_missing:
                expected = src / self.sequences[missing[0]].replace("{subject}", subject)
                raise UserError(f"subject {subject}: no {missing[0]}; expected {expected}, or say allow_missing: true")
        return {subject: {name: scans[name] for name in self.sequences if name in scans} for subject, scans in sorted(found.items())}


def load_prepare_config(path: Path) -> PrepareConfig:
    """The configuration in a YAML file. Raises UserError naming key, file and line."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; start from prepare_example.yaml of mstkd.shards")
    values, lines = read_yaml(path)
    return validate_section(PrepareConfig, values, "", path.name, {key: f"{path.name}:{line}" for key, line in lines.items()})


def _regex(pattern: str) -> re.Pattern:
    """A subject is letters, digits, _ and -, and never starts with -, which a program would take for an option."""
    parts = re.split(r"(\{subject\}|\*)", pattern)
    first = parts.index("{subject}")
    known = {"{subject}": r"\1", "*": "[^/]*"}
    return re.compile("".join(r"([A-Za-z0-9_][A-Za-z0-9_-]*)" if i == first else known.get(part, re.escape(part)) for i, part in enumerate(parts)))
