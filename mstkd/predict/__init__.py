"""`mstkd predict`: label maps for NIfTI cases, each with whatever sequences it has.

What a synthesis run makes is in `mstkd/complete.py`.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.affines import voxel_sizes
from rich.console import Console

from mstkd.errors import CasesFailedError, UserError
from mstkd.evaluate.completed_inputs import CompletingPredictor
from mstkd.evaluate.inference import Predictor, evaluation_mode
from mstkd.methods import Method, load
from mstkd.predict.case import Prediction, entropy_bits, predict_case
from mstkd.predict.case_warnings import CaseWarnings
from mstkd.predict.cases import Found, find
from mstkd.predict.images import like
from mstkd.predict.output import Output, Record
from mstkd.predict.overlay import draw_overlay
from mstkd.run_folder import read_run_config
from mstkd.shards.dataset import Case, DatasetSpec
from mstkd.shards.geometry import ras_spacing_mm, to_ras
from mstkd.shards.nifti import read_volume
from mstkd.shards.progress import say, subject_progress
from mstkd.shards.raw_case import grid_sequence
from mstkd.shards.shard_writer import label_volumes_ml, sources_of
from mstkd.trained_run import TrainedRun, open_run

__all__ = ["Beside", "predict_folder"]


@dataclass(frozen=True)
class Beside:
    """What is written beside a label map."""

    probabilities: bool = False  # probabilities/<subject>_<REGION>.nii.gz, float32, before anything is cleared up
    uncertainty: bool = False  # uncertainty/<subject>.nii.gz, float32, see `entropy_bits`
    overlay: bool = False  # overlays/<subject>.png

    @property
    def told(self) -> bool:
        return self.probabilities or self.uncertainty


def predict_folder(
    runs: Path | Sequence[Path], input: Path, output: Path, spec: str | None = None, postprocess: str | None = None, complete: Path | None = None,
    *, overrides: Sequence[str] = (), beside: Beside = Beside(), part: tuple[int, int] | None = None,
) -> list[Path]:  # fmt: skip
    """Write <output>/<subject>.nii.gz for every case in `input`, a folder or a list (see case_list.py), and predictions.json.

    Several `runs`, folds or seeds of the same, are an ensemble. The layout and file names of a folder are those of `spec`, by default of the
    run's own data set; any non-empty subset of sequences will do, labels are not looked at. Label maps are uint8 in the run's label scheme,
    on the grid of the case's first sequence (of the spec's `common_grid`, where it has one). If the spec resamples, the networks' logits are
    interpolated on that grid and labels decided there. `postprocess`: another rule than the run's own. `complete`: a synthesis run that first
    makes what a case lacks; the networks then see every sequence. `overrides`: of recipe keys that say how it predicts. `part` (i, n): every
    n-th case; parts may share `output` at the same time. What lies there already is not made again, if inputs and settings are the same.

    Raises UserError: output of something else or begun with other settings, no usable case, runs that do not fit; CasesFailedError at the
    end, when all others are done, where cases cannot be read or predicted.
    """
    members = [Path(run) for run in ([runs] if isinstance(runs, str | Path) else runs)]
    for run in members:
        name = read_run_config(run).method["name"]
        if (task := load(name).task) != "segmentation":
            raise UserError(f"{run}: method {name} is for {task}; this command takes runs of segmentation")
    found, out = find(members[0], Path(input), spec), Output(output)
    with out.opened():
        job = Job(_opened(members, postprocess, overrides), complete and open_run(complete, tasks=("synthesis",)), found.dataset, beside, out)
        out.settle(job.head)
    return _predict(job, found, found.subjects(part))


def _opened(members: Sequence[Path], postprocess: str | None, overrides: Sequence[str]) -> list[TrainedRun]:
    if len({run.resolve() for run in members}) < len(members):
        raise UserError(f"{members[0]}: is named twice; an ensemble is of different runs")
    return [open_run(run, overrides=overrides).postprocessed(postprocess) for run in members]


def _predict(job: "Job", found: Found, subjects: Sequence[str]) -> list[Path]:
    """The parts of `predict_folder` that take long; the label maps that lie there at the end."""
    began = time.perf_counter()
    states = {subject: "kept" for subject in subjects if subject in found.cases and job.lies_there(found.cases[subject], job.out.noted(subject))}
    if states:
        say(f"{len(states)} of {len(subjects)} cases lie there already")
    try:
        with evaluation_mode(*job.predictor.methods), subject_progress(f"{job.out.folder.name}: predict", len(subjects), len(states)) as tally:
            for subject in [subject for subject in subjects if subject not in states]:
                case = found.cases.get(subject)
                states[subject] = job.predict(case) if case else job.refuse(subject, found.problems[subject])
                tally(1, _read_bytes(case) if states[subject] == "done" else 0)
    finally:
        noted = job.out.summarise(job.head | {"unchecked": job.unchecked}, found.subjects())
    done = [subject for subject, state in states.items() if state == "done"]
    if done:
        seconds = time.perf_counter() - began
        networks_s = sum(noted["cases"][subject]["inference_seconds"] for subject in done)
        say(f"{len(done)} cases in {seconds:.1f} s, {seconds / len(done):.2f} s per case, of which the networks took {networks_s / len(done):.2f} s")
    failed = [subject for subject, state in states.items() if state == "failed"]
    if failed:
        named = ", ".join(failed[:5]) + (", ..." if len(failed) > 5 else "")
        raise CasesFailedError(f"{len(failed)} of {len(subjects)} cases failed: {named}; the others are in {job.out.folder}, see predictions.json for why")
    return [job.out.folder / f"{subject}.nii.gz" for subject in subjects if states[subject] != "busy"]


class Job:
    """All that the cases of one command share."""

    def __init__(self, runs: Sequence[TrainedRun], front: TrainedRun | None, dataset: DatasetSpec, beside: Beside, out: Output):
        """Raises UserError where runs do not fit each other, or `beside` asks for what their method does not tell."""
        self.runs, self.front, self.dataset, self.beside, self.out = runs, front, dataset, beside, out
        first, *others = runs
        self.predictor: Predictor = CompletingPredictor(first, front, others) if front else first.predictor(others)
        self.network = first.networks[0]
        if beside.told and type(first.method).probabilities is Method.probabilities:
            raise UserError(f"{first.config.method['name']}: tells no probabilities; leave out --probabilities and --uncertainty")
        self.warnings = [CaseWarnings(run, completed=front is not None) for run in runs]

    @property
    def unchecked(self) -> list[str]:
        """What no case could be compared in."""
        return sorted({name for warnings in self.warnings for name in warnings.unchecked})

    @cached_property
    def head(self) -> dict[str, Any]:
        """What predictions.json says of all cases: by what they were made."""
        scheme, beside = self.predictor.scheme, asdict(self.beside)
        return {
            "mstkd": version("mstkd"),
            "runs": [_provenance(run) for run in self.runs],
            "complete": self.front and _provenance(self.front),
            "settings": {
                "network": self.network, "sequences": list(self.predictor.sequences), "label_scheme": scheme.name, "regions": list(scheme.regions),
                "dataset": self.dataset.name, "spec_sha256": self.dataset.sha256(), "window": list(self.predictor.window),
                "inference": self.predictor.inference.model_dump(mode="json"), **beside,
            },
        }  # fmt: skip

    def predict(self, case: Case) -> str:
        """Predict a case unless that is done: "done", "kept", "failed", or "busy" where another process is at it."""
        with self.out.claimed(case.subject) as record:
            if record is None:
                say(f"{case.subject}: another process predicts it")
                return "busy"
            try:
                if self.lies_there(case, record.read()):  # another process was faster
                    return "kept"
                self._predict(case, record)
            except UserError as error:
                return self._failed(case, str(error), record)
        return "done"

    def lies_there(self, case: Case, noted: dict[str, Any] | None) -> bool:
        """Whether a case was predicted from the very files that it has now, and all that was written still lies there."""
        if noted is None or "case" not in noted:
            return False
        try:
            return self.out.lies_there(noted["files"]) and noted["inputs"] == _digest(case)
        except UserError:  # a file is gone, which its turn will say
            return False

    def refuse(self, subject: str, problem: str) -> str:
        """Note why a case that was found cannot be predicted."""
        with self.out.claimed(subject) as record:
            return "busy" if record is None else self._failed(Case(subject, subject, {}), problem, record)

    def _failed(self, case: Case, problem: str, record: Record) -> str:
        say(f"{case.subject}: failed: {problem}")
        for volume in (*case.files.values(), *([case.brain] if case.brain else [])):
            problem = problem.replace(str(volume.path), volume.path.name)
        self.out.remove((record.read() or {}).get("files", ()))  # of the files that it had before
        record.write({"failed": " ".join(Path(word).name if word.startswith("/") else word for word in problem.split(" "))})
        return "failed"

    def _predict(self, case: Case, record: Record) -> None:
        began, inputs = time.perf_counter(), _digest(case)  # before they are read: what changes meanwhile is noticed later
        found = predict_case(self.predictor, self.network, case, self.dataset, self.beside.told)
        warnings = list(dict.fromkeys(text for run in self.warnings for text in run.of(found.stored, found.subset)))
        files = self._write(case, found)
        scheme, affine = self.predictor.scheme, found.stored.meta.original_affine
        volumes_ml = label_volumes_ml(found.labels, scheme, tuple(voxel_sizes(np.asarray(affine))))
        record.write({"inputs": inputs, "files": files, "case": {
            "subset": found.subset_name, "volumes_ml": {region: round(volume, 3) for region, volume in volumes_ml.items()}, "warnings": warnings,
            "seconds": round(time.perf_counter() - began, 3), "inference_seconds": round(found.inference_s, 3),
        }})  # fmt: skip
        Console().print(f"{case.subject}: {found.subset_name}", highlight=False)
        for text in warnings:
            say(f"{case.subject}: warning: {text}")

    def _write(self, case: Case, found: Prediction) -> list[str]:
        """Everything that is asked for; names below the output folder, the label map last."""
        subject, reference, written = case.subject, case.files[grid_sequence(case, self.dataset)], []
        maps = {f"probabilities/{subject}_{region}.nii.gz": data for region, data in found.probabilities.items() if self.beside.probabilities}
        if self.beside.uncertainty:
            maps[f"uncertainty/{subject}.nii.gz"] = entropy_bits(found.probabilities)
        maps[f"{subject}.nii.gz"] = found.labels
        if self.beside.overlay:
            written.append(f"overlays/{subject}.png")
            with self.out.placed(subject, written[0]) as path:
                data, affine = read_volume(reference)
                image, labels = to_ras(data, affine), to_ras(found.labels, affine)
                draw_overlay(image, labels, self.predictor.scheme, ras_spacing_mm(affine), f"given {found.subset_name}", path)
        for name, data in maps.items():
            with self.out.placed(subject, name) as path:
                like(data, reference).to_filename(path)
            written.append(name)
        return written


def _provenance(run: TrainedRun) -> dict[str, Any]:
    """What a run's predictions follow from, and nothing of where it lies."""
    config = run.config
    return {"name": config.name, "method": config.method["name"], "fold": config.data.fold, "seed": config.seed, "weights_sha256": run.identity()["weights"]}


def _read_bytes(case: Case) -> int:
    return sum(size for size, _ in sources_of((replace(case, label=None),), Path()).values())


def _digest(case: Case) -> str:
    """sha256 over which files a case has, their names, sizes and times of change. Raises UserError if one is gone."""
    anchor = next(iter(case.files.values())).path.parent
    channels = {name: volume.channel for name, volume in case.files.items()}
    found = [sources_of((replace(case, label=None),), anchor), channels]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()
