"""The recipe of a study: what its arms share, what each one changes, and the question fixed before looking."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mstkd.config import RunConfig, Section
from mstkd.recipe import find_recipe, read_with_overrides, validate_section


class PairsConfig(Section):
    """Subjects of fold 1."""

    train: int = Field(ge=1)
    validation: int = Field(ge=1)


class CohortConfig(Section):
    """A generated cohort, see `mstkd shards phantom`; its first subjects train, the next ones validate, the others test."""

    train: int = Field(120, ge=1)
    validation: int = Field(24, ge=1)
    test: int = Field(48, ge=1)
    pairs: PairsConfig | None = None  # healthy people scanned at 3T and 7T instead of tumours, and so many more as fold 1, who are nobody of fold 0
    size: int = 64  # voxels per axis
    seed: int = Field(0, ge=0)

    def groups(self, names: list[str]) -> tuple[list[dict[str, list[str]]], list[str]]:
        """The folds and the test split of its `names`, or of as many as there are."""
        folds, left = [], names
        for part in (self, self.pairs) if self.pairs else (self,):
            end = part.train + part.validation
            folds.append({"train": left[: part.train], "val": left[part.train : end]})
            left = left[end:]
        return folds, left

    @property
    def subjects(self) -> int:
        return self.train + self.validation + self.test + (self.pairs.train + self.pairs.validation if self.pairs else 0)


class TuningConfig(Section):
    """Every arm tries each of its `tune` candidates; the best validation score is kept. The test split is not touched."""

    steps: int = Field(100, ge=1)  # of each stage of a candidate
    seed: int = Field(1000, ge=0)  # none of the study's own


class ArmConfig(Section):
    block: Literal["A", "B"] = "A"  # A: controlled, only the mechanism differs. B: systems as published
    of: str | None = None  # nothing is trained: that arm's runs are evaluated again, `recipe` says what changes in how they predict
    recipe: dict[str, Any] = {}  # merged over `common`
    tune: list[dict[str, Any]] = []  # candidates, merged over both
    takes: dict[str, str] = {}  # frozen networks: from which arm's run of the same seed, see `teacher.path`


class QuestionConfig(Section):
    """One comparison, fixed before looking."""

    method: str  # this arm
    baseline: str  # against this one
    arms: list[str] | None = None  # that stand in its tables; default: all


class StudyConfig(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    runs_dir: str = "runs"
    jobs: int = Field(1, ge=1)  # runs at once, each one process with one thread
    seeds: list[int] = Field([0, 1, 2], min_length=1)
    cohort: CohortConfig | None = None  # none: `common` gives data.shards
    tuning: TuningConfig = TuningConfig()
    method: str | None = None  # the arm of the primary question, against
    baseline: str | None = None  # this one
    questions: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")], QuestionConfig] = {}  # in place of the two where there are several
    common: dict[str, Any]
    arms: dict[str, ArmConfig] = Field(min_length=2)

    @model_validator(mode="after")
    def _asked(self) -> "StudyConfig":
        single = self.method is not None and self.baseline is not None
        if single == bool(self.questions) or (self.questions and (self.method or self.baseline)):
            raise ValueError("give method and baseline, or questions, each with its own")
        for name, question in self.comparisons.items():
            place = f"questions.{name}: " if name else ""
            for key, arm in (("method", question.method), ("baseline", question.baseline), *(("arms", arm) for arm in question.arms or ())):
                if arm not in self.arms:
                    raise ValueError(f"{place}{key}: {arm!r} is no arm; arms: {', '.join(self.arms)}")
            if question.method == question.baseline:
                raise ValueError(f"{place}method and baseline are both {question.method!r}; name two arms")
            if not {question.method, question.baseline} <= set(self.compared(question)):
                raise ValueError(f"{place}arms: method {question.method} and baseline {question.baseline} belong to them")
        return self

    @model_validator(mode="after")
    def _taken(self) -> "StudyConfig":
        seen: list[str] = []
        for name, arm in self.arms.items():
            for network, source in arm.takes.items():
                if source not in seen:
                    raise ValueError(f"arms.{name}.takes.{network}: {source!r} is no arm above it that is trained; those are: {', '.join(seen) or 'none'}")
            if arm.takes and arm.tune:
                raise ValueError(f"arms.{name}: takes {', '.join(arm.takes)} and is tuned; candidates have nobody to take from, leave one of the two out")
            if arm.of is None:
                seen.append(name)
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

    @property
    def comparisons(self) -> dict[str, QuestionConfig]:
        """The questions by name; a single one has none."""
        return self.questions or {"": QuestionConfig(method=self.method, baseline=self.baseline)}

    def compared(self, question: QuestionConfig) -> list[str]:
        """The arms of a question's tables."""
        return [arm for arm in self.arms if question.arms is None or arm in question.arms]

    @property
    def evaluated(self) -> set[str]:
        """The arms that stand in some table; the others only train what these take."""
        return {arm for question in self.comparisons.values() for arm in self.compared(question)}

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
    values, origin = read_with_overrides(path, overrides)
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
    config = validate_section(RunConfig, values, "", f"arm {arm}")
    return {**values, "stages": config.stages} if "stages" in values else values  # one by name is a list of one


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`, section by section; neither is changed."""
    both = {key: merged(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value for key, value in over.items()}
    return {**base, **both}
