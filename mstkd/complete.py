"""Completing cases with a synthesis run: what a case is not given comes from the network.

`complete_folder` takes NIfTI cases and writes the sequences that they lack, `complete_shards` a shard set, of which it writes a
completed one. What the network makes is marked as synthetic wherever it lies. Its raw scale is 0 to 1: the scale of what was never
measured is unknown.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mstkd.config import AvailabilityConfig
from mstkd.data.availability import Availability
from mstkd.data.sample import Item, Sample, rng
from mstkd.data.store import ShardStore
from mstkd.errors import UserError
from mstkd.evaluate.completion import Completer
from mstkd.evaluate.inference import evaluation_mode
from mstkd.evaluate.overlap import training_overlap
from mstkd.files import whole_file, whole_folder, write_json
from mstkd.predict.cases import cases_of
from mstkd.predict.images import save_like
from mstkd.predict.output import refuse_existing
from mstkd.shards.dataset_fingerprint import write_fingerprint
from mstkd.shards.facts import SubjectFacts, subject_facts
from mstkd.shards.geometry import restore_image
from mstkd.shards.layout import INDEX, SPLITS, write_model
from mstkd.shards.members import encode_array
from mstkd.shards.preprocess import preprocess
from mstkd.shards.progress import say, subject_progress
from mstkd.shards.raw_case import grid_sequence
from mstkd.shards.shard_writer import add_member, shard_entry, subject_entry, tar_writer
from mstkd.shards.spec import BRAIN, FILE_LABEL, IMAGE, LABEL, META, ShardEntry, ShardIndex, SubjectEntry
from mstkd.shards.splits import read_explicit_splits
from mstkd.subsets import Subset, largest_given, parse_subset, part_of, possible_subsets, proper, subset_name
from mstkd.trained_run import TrainedRun, open_run

DRAWN = "drawn"  # one sequence per subject, drawn from the seed
UNIFORM = "uniform"  # so is a subset that leaves something out, each that the method takes equally likely
DESCRIPTION = "SYNTHETIC (mstkd), not measured"  # in the header


class Given:
    """Which sequences of a case the network is shown."""

    def __init__(self, run: TrainedRun, wanted: str | None = None, seed: int = 0):
        """`wanted`: a subset by name, "drawn", "uniform", or None for as many as the method takes. Raises UserError on an unknown sequence."""
        self._sequences, self._allowed, self._seed = run.facts.sequences, run.method.subsets, seed
        self.replaces = wanted is not None  # a shard set then keeps nothing but what is given
        self._draws = Availability(AvailabilityConfig(kind="single"), self._sequences) if wanted == DRAWN else None
        self._uniform = wanted == UNIFORM
        try:
            self._wanted = None if wanted in (None, DRAWN, UNIFORM) else parse_subset(wanted, self._sequences)
        except UserError as error:
            raise UserError(f"--given: {error}, or give {DRAWN} or {UNIFORM}") from None
        if self._wanted is not None and self._wanted not in possible_subsets(self._sequences, self._allowed):
            raise UserError(f"--given {wanted}: this run's network takes {', '.join(self._allowed)}; choose one of them")

    def __call__(self, subject: str, present: Subset) -> Subset:
        """The subset for a case that has `present`. Raises UserError where the case cannot be shown to the network."""
        if self._draws is not None:
            return self._draws.draw(self._seed, Item(0, 0, subject), present)
        if self._uniform:
            return self._any_part(subject, present)
        if self._wanted is None:
            return largest_given(subject, self._sequences, self._allowed, present)
        if not part_of(self._wanted, present):
            lacks = subset_name(self._sequences, tuple(w and not p for w, p in zip(self._wanted, present, strict=True)))
            raise UserError(f"{subject}: lacks {lacks}, which --given asks for; leave --given out to use what each case has")
        return self._wanted


    def _any_part(self, subject: str, present: Subset) -> Subset:
        taken = [subset for subset in proper(possible_subsets(self._sequences, self._allowed)) if part_of(subset, present)]
        if not taken:
            raise UserError(f"{subject}: has {subset_name(self._sequences, present)}, and this run's network needs {', '.join(self._allowed)}")
        return taken[int(rng(self._seed, subject, UNIFORM).integers(len(taken)))]


def complete(
    run_dir: Path, input: Path, output: Path, spec: str | None = None, wanted: str | None = None, seed: int = 0, splits: Path | None = None,
    overrides: Sequence[str] = (),
) -> str:  # fmt: skip
    """`mstkd predict` with a synthesis run; what was written, in words. `input`: a shard set, or a folder or list as for `predict_folder`.

    `splits`: of a completed shard set, instead of the set's own. `overrides`: of the recipe's keys that say how it predicts. Raises UserError
    as the functions below.
    """
    refuse_existing(output)
    run = open_run(run_dir, tasks=("synthesis",), overrides=overrides)
    if run.networks[0] in run.method.oracles:
        raise UserError(f"{run_dir}: only {run.networks[0]} is trained, which is given labels; train the run's next stage")
    given = Given(run, wanted, seed)
    if (input / INDEX).is_file():
        index = complete_shards(run, input, output, given, splits)
        return f"{len(index.subjects())} completed subjects in {len(index.shards)} tars"
    if splits:
        raise UserError(f"--splits: {input} is no shard set; only those have splits")
    return f"{len(complete_folder(run, input, output, spec, given))} synthetic volumes"


def complete_folder(run: TrainedRun, input: Path, output: Path, spec: str | None, given: Given) -> list[Path]:
    """Write <output>/<subject>/<subject>_<sequence>_synthetic.nii.gz, and a .json beside it, for every sequence that a case lacks.

    Float32, 0 to 1 inside the brain, with the geometry of the case's own files, which stay as they are. A case that has every
    sequence is left out. predictions.json says what was given and made. Raises UserError as `predict_folder`.
    """
    dataset, cases = cases_of(run, input, spec)
    completer, sequences, network = run.completer(), run.facts.sequences, run.networks[0]
    written, noted = [], {}
    with whole_folder(output) as partial, evaluation_mode(run.method):
        for case in cases:
            stored = preprocess(replace(case, label=None), dataset, sequences)
            missing = [name for name in sequences if name not in stored.meta.sequences]
            subset = given(case.subject, tuple(name in stored.meta.sequences for name in sequences))
            noted[case.subject] = {"given": subset_name(sequences, subset), "made": missing}
            if not missing:
                say(f"{case.subject}: has every sequence")
                continue
            volumes = completer.volume(network, Sample(stored.image, stored.brain, None, stored.meta), subset)
            (partial / case.subject).mkdir()
            for name in missing:
                path = Path(case.subject) / f"{case.subject}_{name}_synthetic.nii.gz"
                restored = restore_image(volumes[sequences.index(name)], stored.meta)
                save_like(restored, case.files[grid_sequence(case, dataset)], partial / path, DESCRIPTION)
                write_json((partial / path).with_suffix("").with_suffix(".json"), _sidecar(run, name, noted[case.subject]["given"]))
                written.append(output / path)
            say(f"{case.subject}: {', '.join(missing)} from {noted[case.subject]['given']}")
        write_json(partial / "predictions.json", noted)
    return written


def _sidecar(run: TrainedRun, sequence: str, given: str) -> dict:
    return {
        "synthetic": True,
        "sequence": sequence,
        "given": given,
        "method": run.config.method["name"],
        "run": run.config.name,
        "scale": "0 to 1 inside the brain, 0 outside it; the absolute scale of a sequence that was never measured is unknown",
    }


@dataclass(frozen=True)
class Completed:
    """A subject as it goes into the completed set."""

    sample: Sample
    file_label: NDArray[np.uint8] | None
    entry: SubjectEntry
    facts: SubjectFacts


def complete_shards(run: TrainedRun, source: Path, out: Path, given: Given, splits: Path | None = None) -> ShardIndex:
    """Write the set `source`, completed, as the set `out`, which appears complete or not at all.

    Measured sequences keep their bytes, with a choice of what is given (`Given.replaces`) only those; a synthetic one is z-scored over
    the brain like a measured one. Labels, splits and geometry stay. Raises UserError: other sequences than the run's, a test subject that
    the run was trained or validated on, a case that cannot be shown to the network.
    """
    store, completer = ShardStore(source), run.completer()
    if store.index.sequences != run.facts.sequences:
        raise UserError(f"{source}: has sequences {', '.join(store.index.sequences)}; the run was trained on {', '.join(run.facts.sequences)}")
    patients = {key: entry.patient for key, entry in store.subjects.items()}
    store.splits = read_explicit_splits(splits, patients, allow_overlap=False) if splits else store.splits
    _refuse_seen(run, store)
    shards, facts = [], []
    with whole_folder(out) as partial:
        with evaluation_mode(run.method), subject_progress(f"{out.name}: complete", len(store.subjects)) as tally:
            for tar in store.index.shards:
                done = [_complete(completer, run.networks[0], store, entry.subject, given) for entry in tar.subjects]
                shards.append(_write_tar(partial / tar.file, done))
                facts += [subject.facts for subject in done]
                tally(len(done), shards[-1].bytes)
        extra = tuple(member for member in store.index.extra_members if member == FILE_LABEL)  # others are made of measured sequences
        index = store.index.model_copy(update={"shards": tuple(shards), "extra_members": extra})
        write_model(partial / SPLITS, store.splits)
        text = write_fingerprint(partial, facts, index)
        write_model(partial / INDEX, index)
    say(text)
    return index


def _refuse_seen(run: TrainedRun, store: ShardStore) -> None:
    """Raise UserError if the completed set's test split holds a subject that trained or chose the weights which complete it."""
    found = training_overlap(run.source.stores, run.config.data.fold, [store], "test").unstated
    if found:
        seen, tested, reason = found[0]
        raise UserError(
            f"test subject {tested}: {run.config.name} was trained or validated on {seen} ({reason}; {len(found)} such pairs); "
            "choose others with --splits, see mstkd shards splits --within"
        )


def _complete(completer: Completer, network: str, store: ShardStore, key: str, given: Given) -> Completed:
    sample, sequences = store.subject(key), store.index.sequences
    measured = tuple(name in store.subjects[key].measured for name in sequences)
    subset = given(key, measured)
    kept = subset if given.replaces else measured
    completed = completer.sample(network, sample, subset, kept)
    meta, scheme = completed.meta, store.index.scheme
    entry = subject_entry(completed.image, sample.label, key, meta.patient, sequences, sequences, scheme, meta.spacing_mm)
    facts = subject_facts(completed.image, sample.brain, sample.label, meta, sequences, scheme)
    return Completed(completed, store.file_label(key), entry.model_copy(update={"synthetic": meta.synthetic}), facts)


def _write_tar(path: Path, subjects: list[Completed]) -> ShardEntry:
    with whole_file(path) as stream, tar_writer(stream) as writer:
        for subject in subjects:
            arrays = {IMAGE: subject.sample.image, BRAIN: subject.sample.brain, LABEL: subject.sample.label, FILE_LABEL: subject.file_label}
            for suffix, array in arrays.items():
                if array is not None:
                    add_member(writer, subject.entry.subject, suffix, encode_array(np.ascontiguousarray(array)))
            add_member(writer, subject.entry.subject, META, subject.sample.meta.model_dump_json().encode())
    return shard_entry(path, [subject.entry for subject in subjects])
