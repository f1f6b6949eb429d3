"""The recipe of a study: what its arms share, what each one changes, and the question fixed before looking."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from mstkd.config import RunConfig, Section
from mstkd.recipe import assign, find_recipe, parse_override, read_yaml, validate_section


class CohortConfig(Section):
    """A generated cohort, see `mstkd shards phantom`; its first subjects train, the next ones validate, the others test."""

    train: int = Field(120, ge=1)
    validation: int = Field(24, ge=1)
    test: int = Field(48, ge=1)
    size: int = 64  # voxels per axis
    seed: int = Field(0, ge=0)

    @property
    def subjects(self) -> int:
        return self.train + self.validation + self.test


class TuningConfig(Section):
    """Every arm tries each of its `tune` candidates; the best validation score is kept. The test split is not touched."""

    steps: int = Field(100, ge=1)  # of each stage of a candidate
    seed: int = Field(1000, ge=0)  # none of the study's own


class ArmConfig(Section):
    block: Literal["A", "B"] = "A"  # A: controlled, only the mechanism differs. B: systems as published
    of: str | None = None  # nothing is trained: that arm's runs are evaluated again, `recipe` says what changes in how they predict
    recipe: dict[str, Any] = {}  # merged over `common`
    tune: list[dict[str, Any]] = []  # candidates, merged over both


class StudyConfig(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    runs_dir: str = "runs"
    jobs: int = Field(1, ge=1)  # runs at once, each one process with one thread
    seeds: list[int] = Field([0, 1, 2], min_length=1)
    cohort: CohortConfig | None = None  # none: `common` gives data.shards
    tuning: TuningConfig = TuningConfig()
    method: str  # the arm of the primary question, against
    baseline: str  # this one
    common: dict[str, Any]
    arms: dict[str, ArmConfig] = Field(min_length=2)

    @model_validator(mode="after")
    def _question(self) -> "StudyConfig":
        for key in ("method", "baseline"):
            if getattr(self, key) not in self.arms:
                raise ValueError(f"{key}: {getattr(self, key)!r} is no arm; arms: {', '.join(self.arms)}")
        if self.method == self.baseline:
            raise ValueError(f"method and baseline are both {self.method!r}; name two arms")
        return self

    @model_validator(mode="after")
    def _own_seeds(self) -> "StudyConfig":
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0 or self.tuning.seed in self.seeds:
            raise ValueError(f"seeds {self.seeds}: give different ones from 0, none of them tuning.seed {self.tuning.seed}")
        return self

    @model_validator(mode="after")
    def _evaluated_again(self) -> "StudyConfig":
        for name, arm in self.arms.items():
            if arm.of is not None and (arm.of not in self.arms or self.arms[arm.of].of is not None):
                trained = ", ".join(other for other in self.arms if self.arms[other].of is None)
                raise ValueError(f"arms.{name}.of: {arm.of!r} is no arm that is trained; those are {trained}")
            if arm.of is not None and not arm.recipe:
                raise ValueError(f"arms.{name}: changes nothing of {arm.of}; say in its recipe how it predicts, e.g. method.sampler")
            if arm.of is not None and arm.tune:
                raise ValueError(f"arms.{name}: is another evaluation of {arm.of}, with what that was tuned to; remove tune")
        return self

    @model_validator(mode="after")
    def _same_budget(self) -> "StudyConfig":
        counts = {name: len(arm.tune) for name, arm in self.arms.items() if arm.of is None}
        if len(set(counts.values())) > 1:
            raise ValueError(f"arms differ in how many candidates they tune over: {counts}; give each of them equally many")
        return self

    def label(self, arm: str) -> str:
        """The arm's name, behind its block where there are two."""
        blocks = {declared.block for declared in self.arms.values()}
        return f"{self.arms[arm].block}: {arm}" if len(blocks) > 1 else arm

    @property
    def folder(self) -> Path:
        """runs_dir/<name>/: cohort/ tuning/ runs/ recipes/ comparison/."""
        return Path(self.runs_dir) / self.name


def load_study(recipe: str, overrides: list[str] = ()) -> StudyConfig:
    """A study's recipe with dotted overrides. Raises UserError, also for an arm whose own recipe cannot be right."""
    path = find_recipe(recipe)
    values, lines = read_yaml(path)
    values = json.loads(json.dumps(values))  # what anchors share is shared no more: an override changes the arm that it names
    origin = {key: f"{path.name}:{line}" for key, line in lines.items()}
    for override in overrides:
        key, value = parse_override(override)
        assign(values, key, value, override)
        origin[key] = f"override {override!r}"
    study = validate_section(StudyConfig, values, "", path.name, origin)
    for name in study.arms:
        for candidate in ({}, *study.arms[name].tune):
            run_config(study, name, "check", "checked", 0, candidate)
    return study


def run_config(study: StudyConfig, arm: str, shards: str, name: str, seed: int, *changes: dict[str, Any]) -> dict[str, Any]:
    """The recipe of one run: `common`, the arm's, then `changes`. Raises UserError if it cannot be right."""
    values, declared = study.common, study.arms[arm]
    trained = [study.arms[declared.of].recipe] if declared.of else []
    given = {"data": {"shards": shards}} if study.cohort else {}
    for part in (*trained, declared.recipe, given, *changes, {"name": name, "seed": seed}):
        values = merged(values, part)
    validate_section(RunConfig, values, "", f"arm {arm}")
    return values


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`, section by section; neither is changed."""
    both = {key: merged(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value for key, value in over.items()}
    return {**base, **both}
