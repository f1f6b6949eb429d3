"""Who is whose scan, and whether a run was trained on somebody it is tested on: read from the shard sets' indices."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mstkd.compare.runs import EvaluatedRun
from mstkd.config import RunConfig, ShardSetConfig
from mstkd.data.remote import open_folder, shown
from mstkd.errors import UserError
from mstkd.run_folder import data_digest
from mstkd.shards.layout import INDEX, SPLITS, parse_index, parse_splits
from mstkd.shards.spec import Splits

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cohort:
    """The shard sets of a recipe, as far as a comparison needs them."""

    patient: dict[str, str]  # of each subject
    splits: list[Splits]
    digest: str

    def seen(self, fold: int) -> list[str]:
        """Subjects that training or model selection saw."""
        folds = [splits.folds[fold] for splits in self.splits if fold < len(splits.folds)]
        return [subject for part in folds for subject in (*part.train, *part.val)]


def read_patients(runs: Sequence[EvaluatedRun], shards: Path | str | None = None) -> tuple[dict[str, str], list[str]]:
    """(test subject -> patient, names of the runs whose training data was not at hand), from the runs' shard sets or from `shards`.

    Raises UserError: no set says who the test subjects are; a run was trained or selected on a patient of its test
    cases, and its evaluation does not say that this was allowed.
    """
    elsewhere = [ShardSetConfig(path=str(shards))] if shards else []
    cohorts: dict[tuple[str, ...], Cohort | None] = {}
    patients: dict[str, str] = {}
    unchecked = []
    for run in runs:
        for sets in filter(None, (elsewhere, run.config.data.shards)):
            places = tuple(one.path for one in sets)
            if places not in cohorts:
                cohorts[places] = _read(run.config, sets, required=sets is elsewhere)
            if cohorts[places] is not None:
                patients = cohorts[places].patient | patients
        at_hand = [cohort for cohort in cohorts.values() if cohort is not None and cohort.digest == run.data["digest"]]
        if at_hand:
            _refuse_overlap(run, at_hand[0])
        else:
            unchecked.append(run.name)
    tested = sorted({subject for run in runs for subject in run.subjects})
    if unknown := [subject for subject in tested if subject not in patients]:
        place = shown(runs[0].config.data.shards[0].path)
        raise UserError(f"test case {unknown[0]}: no shard set at hand says whose scan it is ({place} is not here or lacks it); say --shards DIR")
    return {subject: patients[subject] for subject in tested}, unchecked


def _read(config: RunConfig, sets: list[ShardSetConfig], required: bool) -> Cohort | None:
    """None if one of the sets is not here, unless `required`: then UserError."""
    config = config.model_copy(update={"data": config.data.model_copy(update={"shards": sets})})
    patient, splits = {}, []
    try:
        for one in sets:
            folder, name = open_folder(one.path), shown(one.path)
            index = parse_index(folder.read_bytes(INDEX), f"{name}/{INDEX}")
            patient |= {key: entry.patient for key, entry in index.subjects().items()}
            splits.append(parse_splits(folder.read_bytes(SPLITS), f"{name}/{SPLITS}"))
        return Cohort(patient, splits, data_digest(config))
    except (OSError, UserError) as error:
        if required:
            raise UserError(f"--shards {sets[0].path}: not a readable shard set; give the folder that holds index.json and splits.json") from error
        log.info("shard set left out: %s", error)
        return None


def _refuse_overlap(run: EvaluatedRun, cohort: Cohort) -> None:
    """By patient. Equal images under other names were looked for when the run was trained and evaluated."""
    if "overlap" in run.notes:  # allowed, and said so
        return
    trained = {cohort.patient[key]: key for key in cohort.seen(run.config.data.fold) if key in cohort.patient}
    for subject in run.subjects:
        if (patient := cohort.patient.get(subject)) in trained:
            raise UserError(
                f"{run.folder}: test case {subject} and training case {trained[patient]} are of one patient; "
                "leave the run out, or evaluate it with --allow-overlap, which the report then says"
            )
