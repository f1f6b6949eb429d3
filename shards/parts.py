"""A build in the making: the folder OUT.partial, which one process or the parts of a SLURM array fill.

`set/` gets the tars and becomes OUT in one rename when all are there; beside it lie the plan that all agree on, a record
per finished tar, and locks. All parts share this one folder: so a part that failed can be done by anyone, with any
number of processes, and merging moves no data.
"""

import fcntl
import hashlib
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from mstkd.errors import UserError
from mstkd.files import UNFINISHED, create_file
from mstkd.shards.dataset import DatasetSpec
from mstkd.shards.dataset_fingerprint import write_fingerprint
from mstkd.shards.layout import INDEX, SPLITS, write_model
from mstkd.shards.shard_writer import ShardRecord
from mstkd.shards.spec import CLAHE, FILE_LABEL, ShardIndex, Splits, Strict
from mstkd.shards.splits import default_splits, stratifying_volumes_ml

LOCK_NAME = re.compile(r"part-(\d+)-of-(\d+)\.lock")
SHAPING = ("mstkd", "nibabel", "numpy", "scipy")  # what the bytes may depend on
Part = tuple[int, int]  # (number from 1, how many)


class Plan(Strict):
    """All that the bytes of a set depend on, besides the files."""

    version: Literal[1] = 1
    software: dict[str, str]
    spec: dict[str, Any]
    subjects: dict[str, str]  # key -> patient, sorted by key
    subjects_per_shard: int
    seed: int
    splits: Splits | None  # None: default splits
    salt: str | None  # a check value of the salt; None: not pseudonymised

    @property
    def dataset(self) -> DatasetSpec:
        return DatasetSpec.model_validate(self.spec)

    def tars(self) -> dict[str, tuple[str, ...]]:
        """File name -> keys of its subjects, in order."""
        keys, name, step = list(self.subjects), self.spec["name"], self.subjects_per_shard
        return {f"{name}-{start // step:06d}.tar": tuple(keys[start : start + step]) for start in range(0, len(keys), step)}

    def tars_of(self, part: Part | None) -> list[str]:
        """The tars that a part builds: every n-th."""
        number, count = part or (1, 1)
        return list(self.tars())[number - 1 :: count]

    def digest(self) -> str:
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def difference(self, other: "Plan") -> str | None:
        """How `other` differs from this, the earlier one, in words; None if it does not."""
        for key in ("spec", "software"):
            before, now = getattr(self, key), getattr(other, key)
            name = next((name for name in before | now if before.get(name) != now.get(name)), None)
            if name:
                what = f"the spec's {name}" if key == "spec" else f"version of {name}"
                return f"{what} was {before.get(name)!r} and is {now.get(name)!r}"
        if self.salt != other.salt:
            return "--pseudonymise or its salt is another"
        if self.subjects != other.subjects:
            changed = min(set(self.subjects.items()) ^ set(other.subjects.items()))[0]
            state = "is new in" if changed not in self.subjects else "is gone from" if changed not in other.subjects else "has another patient in"
            return f"subject {changed} {state} the source"
        return next((f"{key} is another" for key in ("subjects_per_shard", "seed", "splits") if getattr(self, key) != getattr(other, key)), None)


def software_versions() -> dict[str, str]:
    """Versions of what turns files into bytes."""
    return {name: version(name) for name in SHAPING}


class WorkFolder:
    """OUT.partial, the folder of an unfinished set."""

    def __init__(self, out: Path):
        self.out = Path(out).absolute()
        self.path = self.out.with_name(f"{self.out.name}.partial")
        self.set = self.path / "set"

    def begin(self, plan: Plan, part: Part | None, resume: bool) -> None:
        """Make the folder, or go on with it. Raises UserError where that would mix what does not belong together."""
        if part is None and self.path.exists() and not resume:
            raise UserError(f"{self.path}: an unfinished build; go on with --resume, or remove it to begin anew")
        self._check_part(part, resume)
        self.set.mkdir(parents=True, exist_ok=True)
        if create_file(self.path / "plan.json", plan.model_dump_json().encode()):
            return
        difference = self.plan().difference(plan)
        if difference:
            raise UserError(f"{self.path}: was begun otherwise: {difference}; put it back as it was, or remove the folder to begin anew")

    def _check_part(self, part: Part | None, resume: bool) -> None:
        if part is None:
            return
        number, count = part
        begun = self._parts_begun()
        other = next((of for _, of in begun if of != count), None)
        if other:
            raise UserError(f"{self.path}: was begun in {other} parts, --part says {count}; keep to one number")
        if part in begun and not resume:
            raise UserError(f"{self.path}: part {number}/{count} was begun before; go on with --resume")

    def _parts_begun(self) -> set[Part]:
        matches = (LOCK_NAME.fullmatch(path.name) for path in self.path.glob("part-*.lock"))
        return {(int(match[1]), int(match[2])) for match in matches if match}

    def plan(self) -> Plan:
        """The plan of the build. Raises UserError: no such folder, or no readable plan."""
        try:
            return Plan.model_validate_json((self.path / "plan.json").read_bytes())
        except FileNotFoundError:
            if self.out.exists():
                raise UserError(f"{self.out}: exists already, and nothing is left to merge") from None
            raise UserError(f"{self.path}: no plan.json; build the parts first: mstkd shards build ... --part 1/N") from None
        except ValidationError:
            raise UserError(f"{self.path / 'plan.json'}: cannot be read; remove the folder and build anew") from None

    def record_path(self, tar: str) -> Path:
        return self.path / f"{tar}.json"

    def records(self, plan: Plan) -> dict[str, ShardRecord]:
        """The record of each finished tar, in the order of the set. Raises UserError on one that does not fit."""
        found = {}
        for tar, keys in plan.tars().items():
            path = self.record_path(tar)
            try:
                record = ShardRecord.model_validate_json(path.read_bytes())
            except FileNotFoundError:
                continue
            except ValidationError:
                raise UserError(f"{path}: cannot be read; remove it to have its tar built again") from None
            if record.plan != plan.digest() or tuple(entry.subject for entry in record.shard.subjects) != keys:
                raise UserError(f"{path}: is of another build; remove it to have its tar built again")
            size = (self.set / tar).stat().st_size if (self.set / tar).is_file() else -1
            if size != record.shard.bytes:
                state = "is missing" if size < 0 else f"has {size} bytes, not {record.shard.bytes}"
                raise UserError(f"{self.set / tar}: {state}; remove {path} to have it built again")
            found[tar] = record
        return found

    @contextmanager
    def locked(self, part: Part | None) -> Iterator[None]:
        """Hold this part, or the whole folder for None. Raises UserError if another process is at it."""
        with ExitStack() as held:
            held.enter_context(_lock(self.path / "build.lock", fcntl.LOCK_EX if part is None else fcntl.LOCK_SH))
            if part is not None:
                held.enter_context(_lock(self.path / f"part-{part[0]}-of-{part[1]}.lock", fcntl.LOCK_EX))
            yield

    def clear_unfinished(self, tars: list[str]) -> None:
        """Remove what a killed process left of these tars."""
        for tar in tars:
            for path in (*self.set.glob(f"{tar}.*{UNFINISHED}"), *self.path.glob(f"{tar}.json.*{UNFINISHED}")):
                path.unlink(missing_ok=True)

    def missing_text(self, plan: Plan, missing: list[str]) -> str:
        """Which parts lack tars, or which tars where the parts are not known."""
        counts = {of for _, of in self._parts_begun()}
        if len(counts) != 1:
            return f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}"
        (count,) = counts
        return "part " + ", ".join(f"{n}/{count}" for n in range(1, count + 1) if set(plan.tars_of((n, count))) & set(missing))


def merge(out: Path) -> tuple[ShardIndex, str]:
    """Make the set `out` of its finished parts: its index, and the text of its fingerprint.

    Raises UserError: parts that are missing, unfinished, still at work, or of another spec, source or software.
    """
    work = WorkFolder(out)
    plan = work.plan()
    with work.locked(None):
        return complete(work, plan)


def complete(work: WorkFolder, plan: Plan) -> tuple[ShardIndex, str]:
    """As `merge`, for who holds the folder."""
    if work.out.exists():
        raise UserError(f"{work.out}: exists already; remove or rename it")
    records = work.records(plan)
    missing = [tar for tar in plan.tars() if tar not in records]
    if missing:
        raise UserError(
            f"{work.path}: {len(missing)} of {len(plan.tars())} tars are not built yet ({work.missing_text(plan, missing)}); "
            "build them with --resume, then merge"
        )
    dataset = plan.dataset
    index = ShardIndex(
        dataset=dataset.name,
        spec_sha256=dataset.sha256(),
        sequences=tuple(dataset.sequences),
        label_scheme=dataset.label_scheme,
        extra_members=_extra_members(records.values()),
        shards=tuple(record.shard for record in records.values()),
    )
    splits = plan.splits or default_splits(plan.subjects, stratifying_volumes_ml(index), plan.seed)
    work.clear_unfinished(list(records))
    write_model(work.set / INDEX, index)
    write_model(work.set / SPLITS, splits)
    text = write_fingerprint(work.set, [facts for record in records.values() for facts in record.facts], index)
    work.set.rename(work.out)
    shutil.rmtree(work.path, ignore_errors=True)
    return index, text


def _extra_members(records: Iterable[ShardRecord]) -> tuple[str, ...]:
    suffixes = {suffix for record in records for entry in record.shard.subjects for suffix in entry.members}
    return tuple(suffix for suffix in (CLAHE, FILE_LABEL) if suffix in suffixes)


@contextmanager
def _lock(path: Path, kind: int) -> Iterator[None]:
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path}: held; another process builds or merges here, wait for it or stop it") from None
        except OSError:
            pass  # a file system without locks: writes are atomic anyway, work might be done twice
        yield
