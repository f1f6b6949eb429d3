"""Who is trained on, validated on and tested on: `splits.json`."""

import hashlib
from pathlib import Path

from mstkd.errors import UserError
from mstkd.shards.dataset import DatasetSpec
from mstkd.shards.imported_splits import MAX_NAMED, import_splits
from mstkd.shards.layout import read_set
from mstkd.shards.progress import say
from mstkd.shards.spec import Fold, ShardIndex, Splits

PUBLISHED = Path(__file__).parent / "specs" / "splits"  # of packaged data sets, as papers use them
MAX_FOLDS = 5
TEST_EVERY = 5  # every fifth patient: 20 %
MIN_PATIENTS = 3
STRATA = 3  # terciles


def default_splits(patients: dict[str, str], volumes_ml: dict[str, float], seed: int) -> Splits:
    """20 % test and 5 folds, by patient, stratified by tumour-volume tercile, by a hash of (seed, patient).

    `patients`: subject -> patient; `volumes_ml`: subject -> volume that stratifies. Up to 5 patients there are as
    many folds as patients outside the test split; under 3 patients a UserError asks for an explicit file.
    """
    check_patient_count(patients)
    subjects = _by_patient(patients)
    return _deal(_deal_order({p: max(volumes_ml[s] for s in members) for p, members in subjects.items()}, seed), subjects)


def stratifying_volumes_ml(index: ShardIndex) -> dict[str, float]:
    """Subject -> volume of its largest region: the whole tumour, which contains the others; 0 without a label."""
    return {subject: max(entry.label_volume_ml.values(), default=0.0) for subject, entry in index.subjects().items()}


def counted_splits(folder: Path, train: int, val: int, test: int, within: tuple[str, ...] = (), seed: int = 0) -> Splits:
    """One fold with so many subjects of the shard set `folder`, by patient, drawn by a hash of (seed, patient).

    `within`: only subjects that the set's own splits have there, of "train", "val" (of fold 0) and "test"; those that get into the test
    are then from its own test, since whatever completes or initialises what is trained on these splits may have seen the others; (): any.
    Raises UserError: an unknown part, too few subjects, or counts that cannot be met without parting a patient's scans.
    """
    index, own = read_set(folder)
    parts = {"train": own.folds[0].train, "val": own.folds[0].val, "test": own.test}
    if unknown := [part for part in within if part not in parts]:
        raise UserError(f"--within {unknown[0]}: choose of {', '.join(parts)}")
    allowed = {key for part in within for key in parts[part]} if within else {*index.subjects()}
    subjects = _by_patient({key: entry.patient for key, entry in index.subjects().items() if key in allowed})
    unseen = {patient for patient, keys in subjects.items() if not within or {*keys} <= {*own.test}}
    left, chosen = sorted(subjects, key=lambda patient: _hashed(patient, seed)), {}
    for name, count in (("test", test), ("val", val), ("train", train)):
        taken: list[str] = []
        for patient in [*left]:
            if (name != "test" or patient in unseen) and len(taken) + len(subjects[patient]) <= count:
                taken += subjects[patient]
                left.remove(patient)
        if len(taken) < count:
            raise UserError(f"--{name} {count}: {len(allowed)} subjects to choose from, and only {len(taken)} are left for it; ask for fewer")
        chosen[name] = tuple(sorted(taken))
    if not chosen["train"] or not chosen["val"]:
        raise UserError("--train, --val: give at least one subject for each")
    return Splits(folds=(Fold(train=chosen["train"], val=chosen["val"]),), test=chosen["test"])


def leave_one_out(folder: Path, seed: int = 0) -> Splits:
    """As many folds as the shard set `folder` has patients: each is tested on once and chosen by once, in the fold before; drawn by a hash.

    Raises UserError under 3 patients.
    """
    index, _ = read_set(folder)
    patients = {key: entry.patient for key, entry in index.subjects().items()}
    check_patient_count(patients)
    subjects = _by_patient(patients)
    order = sorted(subjects, key=lambda patient: (_hashed(patient, seed), patient))
    folds = []
    for place, patient in enumerate(order):
        after = order[(place + 1) % len(order)]
        train = tuple(key for other in sorted({*order} - {patient, after}) for key in subjects[other])
        folds.append(Fold(train=train, val=tuple(subjects[after]), test=tuple(subjects[patient])))
    return Splits(folds=tuple(folds))


def splits_by_class(patients: dict[str, str], classes: dict[str, str], seed: int) -> Splits:
    """As `default_splits`, but stratified by class (`classes`: subject -> class), of a patient with several by the first."""
    check_patient_count(patients)
    subjects = _by_patient(patients)
    return _deal(sorted(subjects, key=lambda patient: (classes[subjects[patient][0]], _hashed(patient, seed))), subjects)


def _by_patient(patients: dict[str, str]) -> dict[str, list[str]]:
    """Patient -> subjects, sorted."""
    subjects: dict[str, list[str]] = {}
    for subject in sorted(patients):
        subjects.setdefault(patients[subject], []).append(subject)
    return subjects


def _deal(dealt: list[str], subjects: dict[str, list[str]]) -> Splits:
    """Patients dealt round-robin in this order."""
    is_test = [i % TEST_EVERY == TEST_EVERY // 2 for i in range(len(dealt))]  # the middle one: 3 patients have a test case too
    rest = [patient for patient, test in zip(dealt, is_test) if not test]
    folds = min(MAX_FOLDS, len(rest))

    def keys(chosen: list[str]) -> tuple[str, ...]:
        return tuple(sorted(subject for patient in chosen for subject in subjects[patient]))

    return Splits(
        folds=tuple(
            Fold(train=keys([p for i, p in enumerate(rest) if i % folds != k]), val=keys(rest[k::folds])) for k in range(folds)
        ),
        test=keys([patient for patient, test in zip(dealt, is_test) if test]),
    )


def check_patient_count(patients: dict[str, str]) -> None:
    """UserError if there are too few patients for train, val and test."""
    count = len(set(patients.values()))
    if count < MIN_PATIENTS:
        raise UserError(f"{count} patient(s): too few for train, val and test; say who goes where with --splits FILE")


def read_explicit_splits(path: Path, patients: dict[str, str], allow_overlap: bool, dataset: DatasetSpec | None = None) -> Splits:
    """A splits file made elsewhere, checked against the data set; UserError names the first problem.

    Our own splits.json, nnU-Net's splits_final.json or a MONAI datalist, recognised by content. `patients`: subject ->
    patient; `dataset` tells which file of a datalist is which subject's.
    """
    splits = import_splits(Path(path), patients, dataset)
    splits = splits.model_copy(update={"allow_overlap": splits.allow_overlap or allow_overlap})
    check_splits(splits, patients, str(path))
    used = {*splits.test, *(key for fold in splits.folds for key in (*fold.train, *fold.val, *fold.test))}
    if unused := len(patients) - len(used):
        say(f"splits {path}: {unused} of {len(patients)} subjects are in no fold and not in test; nothing will use them")
    return splits


def published_splits(name: str) -> Path:
    """The file of the split that is published for the packaged data set `name`. Raises UserError where there is none."""
    path = PUBLISHED / f"{name}.json"
    if not path.is_file():
        raise UserError(f"--splits published: none is packaged for data set {name}; there are {', '.join(sorted(p.stem for p in PUBLISHED.glob('*.json')))}")
    return path


def check_splits(splits: Splits, patients: dict[str, str], source: str) -> None:
    """UserError unless every key exists, no part is empty or repeats a key, and no patient is on two sides."""
    if not splits.folds:
        raise UserError(f"splits {source}: no folds; give at least one with train and val")
    for number, fold in enumerate(splits.folds):
        sides = {f"folds.{number}.train": fold.train, f"folds.{number}.val": fold.val, f"folds.{number}.test": fold.test, "test": splits.test}
        for name, keys in sides.items():
            _check_side(name, keys, patients, source)
        if not splits.allow_overlap:
            _check_disjoint(sides, patients, source)


def _check_side(name: str, keys: tuple[str, ...], patients: dict[str, str], source: str) -> None:
    if not keys and not name.endswith("test"):
        raise UserError(f"splits {source}: {name} is empty; name at least one subject")
    unknown = list(dict.fromkeys(key for key in keys if key not in patients))
    if unknown:
        shown = ", ".join(map(repr, unknown[:MAX_NAMED])) + (f", ... ({len(unknown)} in all)" if len(unknown) > MAX_NAMED else "")
        raise UserError(f"splits {source}: {name} names subject{'s' * (len(unknown) > 1)} {shown}, which the data set does not have")
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise UserError(f"splits {source}: {name} names subject {twice!r} twice")


def _check_disjoint(sides: dict[str, tuple[str, ...]], patients: dict[str, str], source: str) -> None:
    seen: dict[str, str] = {}  # patient -> side
    for name, keys in sides.items():
        for key in keys:
            side = seen.setdefault(patients[key], name)
            if side != name:
                raise UserError(f"splits {source}: patient {patients[key]} is in {side} and in {name}; move one, or state --allow-overlap")


def _deal_order(volumes_ml: dict[str, float], seed: int) -> list[str]:
    """Patients by tercile of volume, within a tercile by hash: dealing them round-robin stratifies."""
    ranked = sorted(volumes_ml, key=lambda patient: (volumes_ml[patient], _hashed(patient, seed)))
    return sorted(ranked, key=lambda patient: (ranked.index(patient) * STRATA // len(ranked), _hashed(patient, seed)))


def _hashed(patient: str, seed: int) -> str:
    return hashlib.sha256(f"{seed}:{patient}".encode()).hexdigest()
