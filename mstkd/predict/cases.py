"""Which cases are to be predicted: those in a folder, named as a data set spec says, or those of a list."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mstkd.errors import UserError
from mstkd.predict.case_list import read_case_list
from mstkd.run_folder import read_record, read_run_config
from mstkd.shards.cases import find_usable_cases
from mstkd.shards.dataset import Case, DatasetSpec, known_specs, load_spec
from mstkd.shards.raw_case import check_headers
from mstkd.trained_run import TrainedRun


@dataclass(frozen=True)
class Found:
    """What an input holds."""

    dataset: DatasetSpec
    cases: Mapping[str, Case]  # by subject
    problems: Mapping[str, str]  # by subject, why it cannot be predicted

    def subjects(self, part: tuple[int, int] | None = None) -> list[str]:
        """All in order, or those of the i-th of n parts: every n-th."""
        number, count = part or (1, 1)
        return sorted({*self.cases, *self.problems})[number - 1 :: count]


def find(run_dir: Path, input: Path, spec: str | None) -> Found:
    """The cases in a folder or a list for the run in `run_dir`, whose weights are not looked at.

    Raises UserError: no run, no such input, a list that cannot be read, no case with a known sequence.
    """
    read_run_config(run_dir)
    data = read_record(run_dir)["data"]
    folder = input if input.is_dir() else input.parent
    dataset = _dataset(run_dir, data["names"][0], data["sequences"], spec, folder)
    cases, problems = read_case_list(input, dataset) if input.is_file() else find_usable_cases(dataset, input)
    if not cases:
        raise UserError(f"{input}: no case can be predicted: {next(iter(problems.values()))}")
    return Found(dataset, {case.subject: case for case in cases}, problems)


def cases_of(run: TrainedRun, input: Path, spec: str | None) -> tuple[DatasetSpec, list[Case]]:
    """The cases in a folder or a list, all headers read: a bad last case must not cost the others. Raises UserError as `find`, and for any bad case."""
    found = find(run.folder, input, spec)
    if found.problems:
        raise UserError(next(iter(found.problems.values())))
    for case in found.cases.values():
        check_headers(case, found.dataset)
    return found.dataset, list(found.cases.values())


def dataset_of(run: TrainedRun, spec: str | None, input: Path | None = None) -> DatasetSpec:
    """How the run's cases lie on disk and are prepared: as in its own data set, or as `spec` says. Raises UserError where that is not known."""
    return _dataset(run.folder, run.dataset, run.facts.sequences, spec, input)


def _dataset(run_dir: Path, name: str, sequences: Sequence[str], spec: str | None, input: Path | None) -> DatasetSpec:
    if spec is None and name not in known_specs():
        raise UserError(f"{run_dir}: its data set {name} has no packaged spec; say how files are named with --spec FILE")
    dataset = load_spec(spec or name, input)
    if unknown := [sequence for sequence in dataset.sequences if sequence not in sequences]:
        raise UserError(f"spec {dataset.name}: the run knows no sequence {unknown[0]}, only {', '.join(sequences)}; choose another --spec")
    return dataset
