"""NIfTI folders -> a shard set: standard WebDataset tars, `index.json` and `splits.json`.

The same input and spec give byte-identical files, whatever the number of workers.
"""

import hashlib
import math
import multiprocessing
import os
import shutil
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from webdataset import TarWriter

from mstkd.errors import UserError
from mstkd.shards import fingerprint
from mstkd.shards.dataset import Case, DatasetSpec, load_spec
from mstkd.shards.members import encode_array
from mstkd.shards.preprocess import Preprocessed, preprocess
from mstkd.shards.spec import BRAIN, IMAGE, LABEL, META, LabelScheme, ShardEntry, ShardIndex, Splits, SubjectEntry
from mstkd.shards.splits import check_patient_count, default_splits, read_explicit_splits


def build(
    spec: str | Path,
    src: Path,
    out: Path,
    workers: int = 1,
    seed: int = 0,
    splits: Path | None = None,
    allow_overlap: bool = False,
    subjects_per_shard: int = 8,
) -> ShardIndex:
    """Build the shard set `out` from the NIfTI folder `src` as `spec` (a packaged name or a YAML file) describes it.

    `splits` is a splits.json written by a person; without it `default_splits` of `seed` is used. `out` appears
    complete or not at all. Raises UserError on bad input, before any volume is read where possible.
    """
    out = Path(out)
    dataset = load_spec(spec)
    if out.exists():
        raise UserError(f"{out}: exists already; use another --out or remove it")
    if workers < 1:
        raise UserError(f"workers {workers}: give 1 or more")
    cases = dataset.find_cases(src)
    patients = {case.subject: case.patient for case in cases}
    if splits is None:
        check_patient_count(patients)
    chosen = None if splits is None else read_explicit_splits(splits, patients, allow_overlap)
    partial = out.absolute().with_name(f".{out.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        index = ShardIndex(
            dataset=dataset.name,
            spec_sha256=dataset.sha256(),
            sequences=tuple(dataset.sequences),
            label_scheme=dataset.label_scheme,
            shards=_write_shards(dataset, cases, partial, workers, subjects_per_shard),
        )
        chosen = chosen or default_splits(patients, _stratifying_volumes_ml(index), seed)
        _write_json(partial / "index.json", index)
        _write_json(partial / "splits.json", chosen)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return index


def label_volumes_ml(label: np.ndarray, scheme: LabelScheme, spacing_mm: tuple[float, float, float]) -> dict[str, float]:
    """Volume in ml of each region of a label map (X, Y, Z)."""
    voxel_ml = math.prod(spacing_mm) / 1000
    counts = np.bincount(label.ravel(), minlength=max(scheme.values) + 1)
    return {region: float(counts[list(values)].sum() * voxel_ml) for region, values in scheme.regions.items()}


def _write_shards(dataset: DatasetSpec, cases: list[Case], folder: Path, workers: int, per_shard: int) -> tuple[ShardEntry, ...]:
    chunks = [cases[start : start + per_shard] for start in range(0, len(cases), per_shard)]
    jobs = [(dataset, chunk, folder / f"{dataset.name}-{number:06d}.tar") for number, chunk in enumerate(chunks)]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    entries: dict[str, ShardEntry] = {}
    with Progress(*columns) as progress:
        bar = progress.add_task(f"{dataset.name}: subjects", total=len(cases))
        for entry in _run(jobs, workers):
            entries[entry.file] = entry
            progress.advance(bar, len(entry.subjects))
    return tuple(entries[name] for name in sorted(entries))


def _run(jobs: list[tuple], workers: int) -> Iterator[ShardEntry]:
    """Each job's entry as it gets ready. A job is one tar, so memory is bounded by one subject per worker."""
    if workers == 1:
        yield from (_write_shard(*job) for job in jobs)
        return
    # spawn: a forked child would inherit locks held by threads of the parent
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(_write_shard, *job) for job in jobs]
        try:
            yield from (future.result() for future in as_completed(futures))
        except BrokenProcessPool:
            raise UserError(f"a build process was killed (often: out of memory); use fewer --workers than {workers}") from None
        finally:
            pool.shutdown(cancel_futures=True)


def _write_shard(dataset: DatasetSpec, cases: list[Case], path: Path) -> ShardEntry:
    entries = []
    with path.open("wb") as stream, TarWriter(stream, user="mstkd", group="mstkd", mtime=0, encoder=False, compress=False) as writer:
        for case in cases:
            subject = preprocess(case, dataset)
            for suffix, payload in _payloads(subject).items():
                writer.write({"__key__": case.subject, suffix: payload})  # one by one: TarWriter sorts what it gets together
            entries.append(_entry(subject, dataset))
    offsets = _member_offsets(path)
    return ShardEntry(
        file=path.name,
        bytes=path.stat().st_size,
        sha256=file_sha256(path),
        subjects=tuple(entry.model_copy(update={"members": offsets[entry.subject]}) for entry in entries),
    )


def _payloads(subject: Preprocessed) -> dict[str, bytes]:
    payloads = {IMAGE: encode_array(subject.image), BRAIN: encode_array(subject.brain)}
    if subject.label is not None:
        payloads[LABEL] = encode_array(subject.label)
    return {**payloads, META: subject.meta.model_dump_json().encode()}


def _entry(subject: Preprocessed, dataset: DatasetSpec) -> SubjectEntry:
    channels = dict(zip(dataset.sequences, subject.image))
    meta, label = subject.meta, subject.label
    return SubjectEntry(
        subject=meta.subject,
        patient=meta.patient,
        sequences=meta.sequences,
        members={},  # known once the tar is written
        shape=subject.brain.shape,
        ranges={name: (float(channels[name].min()), float(channels[name].max())) for name in meta.sequences},
        fingerprint={name: fingerprint.encode(channels[name]) for name in meta.sequences},
        label_volume_ml={} if label is None else label_volumes_ml(label, dataset.scheme, meta.spacing_mm),
    )


def _member_offsets(path: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """Subject -> suffix -> (offset of the payload, size), as the tar itself says."""
    offsets: dict[str, dict[str, tuple[int, int]]] = {}
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            subject, _, suffix = member.name.partition(".")
            offsets.setdefault(subject, {})[suffix] = (member.offset_data, member.size)
    return offsets


def file_sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _stratifying_volumes_ml(index: ShardIndex) -> dict[str, float]:
    """Subject -> volume of its largest region: the whole tumour, which contains the others; 0 without a label."""
    return {subject: max(entry.label_volume_ml.values(), default=0.0) for subject, entry in index.subjects().items()}


def _write_json(path: Path, model: ShardIndex | Splits) -> None:
    path.write_text(model.model_dump_json(indent=1) + "\n")
