"""NIfTI folders -> a shard set: standard WebDataset tars, `index.json`, `splits.json` and `fingerprint.json`.

The same input and spec give byte-identical files, whatever the number of workers or parts and however often the build
was interrupted.
"""

import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mstkd.errors import UserError
from mstkd.shards.cases import Case
from mstkd.shards.dataset import DatasetSpec, load_spec
from mstkd.shards.disk import FULL, check_space, estimate, full_disk
from mstkd.shards.parts import Part, Plan, WorkFolder, complete, software_versions
from mstkd.shards.pool import run_jobs
from mstkd.shards.progress import say, subject_progress
from mstkd.shards.pseudonyms import read_pseudonyms
from mstkd.shards.shard_writer import ShardRecord, TarJob, build_tar, sources_of
from mstkd.shards.spec import KEY_LIMIT, ShardIndex
from mstkd.shards.splits import check_patient_count, published_splits, read_explicit_splits

TERMINATED = 128 + signal.SIGTERM  # the shell's code


def build(
    spec: str | Path,
    src: Path,
    out: Path,
    workers: int = 1,
    seed: int = 0,
    splits: Path | None = None,
    allow_overlap: bool = False,
    subjects_per_shard: int = 8,
    part: Part | None = None,
    resume: bool = False,
    pseudonymise: bool = False,
    salt_file: Path | None = None,
) -> ShardIndex | None:
    """Build the shard set `out` from the NIfTI folder `src` as `spec` (a packaged name or a YAML file) describes it.

    `splits` is a file written by a person, or "published": the packaged one of this data set; without it `default_splits` of `seed` is used. `part` (i, n) builds every
    n-th tar from the i-th and returns None: `parts.merge` makes the set when all are there. `out` appears complete or
    not at all; what is finished of it waits in OUT.partial, and `resume` goes on there. With `pseudonymise` keys become
    hashes keyed by the salt in `salt_file`, by default one beside `out`, which is made if absent.
    Raises UserError on bad input, before any volume is read where possible, and if the disk cannot hold the set.
    """
    out, src = Path(out), Path(src)
    if out.exists():
        raise UserError(f"{out}: exists already; use another --out or remove it")
    _check_numbers(workers, subjects_per_shard, part)
    dataset = load_spec(spec, src)
    splits = published_splits(dataset.name) if str(splits) == "published" else splits
    cases, plan = _planned(dataset, src, out, seed, splits, allow_overlap, subjects_per_shard, pseudonymise, salt_file)
    work = WorkFolder(out)
    work.begin(plan, part, resume)
    with work.locked(part), _stopping(work, plan, part):
        _write_tars(work, plan, cases, src, workers, part)
        if part is not None:
            say(f"part {part[0]}/{part[1]} is done: {len(plan.tars_of(part))} tars; after all parts: mstkd shards merge {out}")
            return None
        index, text = complete(work, plan)
    say(text)
    return index


def _check_numbers(workers: int, subjects_per_shard: int, part: Part | None) -> None:
    if workers < 1:
        raise UserError(f"workers {workers}: give 1 or more")
    if subjects_per_shard < 1:
        raise UserError(f"subjects per shard {subjects_per_shard}: give 1 or more")
    if part is not None and not 1 <= part[0] <= part[1]:
        raise UserError(f"part {part[0]}/{part[1]}: give i/n with i from 1 to n")


def _planned(
    dataset: DatasetSpec,
    src: Path,
    out: Path,
    seed: int,
    splits: Path | None,
    allow_overlap: bool,
    subjects_per_shard: int,
    pseudonymise: bool,
    salt_file: Path | None,
) -> tuple[list[Case], Plan]:
    """The cases in stored order and under the keys they get, and the plan."""
    cases = dataset.find_cases(src)
    patients = {case.subject: case.patient for case in cases}
    if not pseudonymise:
        _check_lengths(cases)
    if splits is None:
        check_patient_count(patients)
    chosen = None if splits is None else read_explicit_splits(splits, patients, allow_overlap, dataset)
    pseudonyms = None
    if pseudonymise:
        pseudonyms = read_pseudonyms(salt_file, out)
        table = pseudonyms.write_table(cases, out)
        say(f"keys become hashes: salt {pseudonyms.salt_file}, table {table}; keep both out of what you share. Site and field strength stay")
        cases = pseudonyms.cases(cases)
        chosen = chosen and pseudonyms.splits(chosen)
    elif salt_file is not None:
        raise UserError(f"salt {salt_file}: only used with --pseudonymise; add it, or leave out --salt-file")
    plan = Plan(
        software=software_versions(),
        spec=dataset.model_dump(mode="json"),
        subjects={case.subject: case.patient for case in cases},
        subjects_per_shard=subjects_per_shard,
        seed=seed,
        splits=chosen,
        salt=pseudonyms and pseudonyms.check(),
    )
    return cases, plan


def _check_lengths(cases: list[Case]) -> None:
    longest = max((case.subject for case in cases), key=len)
    if len(longest) > KEY_LIMIT:
        raise UserError(f"subject {longest}: {len(longest)} characters; a key has at most {KEY_LIMIT}, rename it or use --pseudonymise")


def _write_tars(work: WorkFolder, plan: Plan, cases: list[Case], src: Path, workers: int, part: Part | None) -> None:
    """Build what is missing of a part's tars, after a look at the disk."""
    by_key = {case.subject: case for case in cases}
    groups = {tar: tuple(by_key[key] for key in keys) for tar, keys in plan.tars().items()}
    own, done = plan.tars_of(part), work.records(plan)
    for tar in own:
        if tar in done:
            _check_sources(work, tar, done[tar], sources_of(groups[tar], src))
    missing = [tar for tar in own if tar not in done]
    work.clear_unfinished(own)
    if not missing:
        return
    left = [case for tar, group in groups.items() if tar not in done for case in group]
    sizes = [record.shard.bytes / len(record.shard.subjects) for record in done.values()]
    expected = estimate(left, plan.dataset, sum(sizes) / len(sizes) if sizes else None)
    check_space(expected, work.path)
    say(f"{plan.spec['name']}: {len(left)} subjects need {expected.text()}")
    jobs = [(TarJob(plan.dataset, groups[tar], src, work.set / tar, work.record_path(tar), plan.digest()),) for tar in missing]
    finished = sum(len(groups[tar]) for tar in own if tar in done)
    with subject_progress(plan.spec["name"], sum(len(groups[tar]) for tar in own), finished) as tally:
        for _ in run_jobs(build_tar, jobs, workers, tally):
            pass


def _check_sources(work: WorkFolder, tar: str, record: ShardRecord, now: dict[str, tuple[int, int]]) -> None:
    if record.sources != now:
        file = min(name for name in record.sources.keys() | now.keys() if record.sources.get(name) != now.get(name))
        raise UserError(
            f"source {file}: changed since {tar} was built of it; put it back, or remove {work.record_path(tar)} to have that tar built again"
        )


@contextmanager
def _stopping(work: WorkFolder, plan: Plan, part: Part | None) -> Iterator[None]:
    """What is left behind, and said, when a build does not come to its end."""
    try:
        with _sigterm_ends():
            yield
    except UserError as error:
        raise UserError(_with_hint(str(error), work, plan, part)) from None
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise UserError(_with_hint(str(full_disk(error, work.path)), work, plan, part)) from None
    except (KeyboardInterrupt, SystemExit):
        say(_with_hint("stopped", work, plan, part))
        raise


def _with_hint(text: str, work: WorkFolder, plan: Plan, part: Part | None) -> str:
    """`text` and how to go on; a whole build of which no tar is finished leaves nothing."""
    own = plan.tars_of(part)
    work.clear_unfinished(own)
    kept = sum(work.record_path(tar).exists() for tar in own)
    if kept or part is not None:
        return f"{text}; {kept} of {len(own)} tars are kept in {work.path}, go on with the same command and --resume"
    shutil.rmtree(work.path, ignore_errors=True)
    return text


@contextmanager
def _sigterm_ends() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does; a scheduler sends it before it kills."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
