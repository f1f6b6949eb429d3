"""`mstkd evaluate RUN`: a run on a split of shard sets."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mstkd.console import log_to_console
from mstkd.data.training import open_store
from mstkd.engine import backend
from mstkd.engine.distributed import agreed
from mstkd.engine.environment import resolve_environment
from mstkd.errors import UserError
from mstkd.evaluate.completed_inputs import front_takes, open_front
from mstkd.evaluate.evaluation import Evaluation
from mstkd.evaluate.notes import overlap_note, untrained_note
from mstkd.evaluate.source import CaseSource
from mstkd.evaluate.tasks import TASKS, evaluate_paintings
from mstkd.export.tracked import check_model
from mstkd.run_folder import evaluation_folder
from mstkd.subsets import Subset, possible_subsets, proper
from mstkd.trained_run import TrainedRun, open_run


def evaluate_on_ranks(
    run_dir: Path, data: Path | str | None = None, split: str = "test", allow_overlap: bool = False, postprocess: str | None = None,
    complete: Path | None = None, overrides: Sequence[str] = (),
) -> None:  # fmt: skip
    """`evaluate_run`, cases shared out over the ranks that a launcher started."""
    ranks = resolve_environment()
    log_to_console(ranks.rank)
    if ranks.world > 1:
        backend.start(ranks)
    try:
        with agreed(ranks):
            evaluate_run(run_dir, data, split, allow_overlap, ranks.rank, ranks.world, postprocess, complete, overrides)
    finally:
        backend.shutdown()


def evaluate_run(
    run_dir: Path, data: Path | str | None = None, split: str = "test", allow_overlap: bool = False, rank: int = 0, world: int = 1,
    postprocess: str | None = None, complete: Path | None = None, overrides: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Score a run's best weights for every subset of sequences or views and write `<run>/evaluation/`; returns summary.json.

    `data` is another shard set than the run's own, a folder or an address, `postprocess` another rule than its `inference.postprocess`,
    `complete` a synthesis run instead of its `evaluate.complete`; `overrides` change other keys of its recipe that say how it predicts.
    Raises UserError: no run, no such split, other sequences, regions or classes, cases that training saw (unless `allow_overlap`
    or the recipe's `data.allow_overlap`). Collective with several ranks; rank 0 writes.
    """
    changes = [*overrides, *([f"evaluate.complete={complete}"] if complete else [])]
    run = open_run(run_dir, tasks=tuple(TASKS), painters=True, overrides=changes).postprocessed(postprocess)
    front = _front(run, run.config.evaluate.complete) if run.config.evaluate.complete else None
    source = CaseSource([open_store(str(data), run.config.data)]) if data else run.source
    subjects = source.subjects(split, run.config.data.fold)
    _check_data(run, source, split, subjects)
    check_model(run)
    notes = overlap_note(run, source, split, allow_overlap) | (overlap_note(front, source, split, allow_overlap) if front else {})
    subsets = _subsets(run, front)
    notes |= untrained_note(run, subsets) if subsets and not front else {}
    named = [*([postprocess] if postprocess else []), *([complete.name] if complete else []), *overrides]
    job = Evaluation(run, front, source, split, subjects, subsets, _networks(run), notes, _folder(run, source, split, named), rank, world)
    summaries = (evaluate_paintings if job.networks[0] in run.method.painters else TASKS[run.method.task])(job)
    return summaries[job.networks[0]]


def _front(run: TrainedRun, path: str) -> TrainedRun:
    if run.method.task != "segmentation":
        raise UserError(f"evaluate.complete: is for segmentations, and {run.config.method['name']} is for {run.method.task}; remove it")
    return open_front(path)


def _subsets(run: TrainedRun, front: TrainedRun | None) -> Sequence[Subset] | None:
    """What is given to the networks in turn; None: each case once, given all that it has."""
    sequences, method = run.facts.sequences, run.method
    if run.config.evaluate.given == "present":
        if method.task != "segmentation" or method.subsets is not None:
            raise UserError(f"evaluate.given present: is for segmentations that take any subset, not for {run.config.method['name']}; set it to subsets")
        return None
    subsets = possible_subsets(sequences, front_takes(front) if front else method.subsets)
    return proper(subsets) if method.task == "synthesis" else subsets


def _check_data(run: TrainedRun, source: CaseSource, split: str, subjects: Sequence[str]) -> None:
    if not subjects:
        raise UserError(f"split {split} of data set {source.dataset} is empty; choose another --split")
    if source.sequences != run.facts.sequences:
        theirs, ours = ", ".join(source.sequences), ", ".join(run.facts.sequences)
        raise UserError(f"data set {source.dataset} has sequences {theirs}; the run was trained on {ours}, in that order")
    if source.classification != run.facts.classification:
        raise UserError(f"data set {source.dataset} has other classes, or views of another shape, than the run was trained on; build it the same way")


def _networks(run: TrainedRun) -> list[str]:
    wanted = run.config.evaluate.networks
    unknown = sorted(set(wanted or ()) - set(run.networks))
    if unknown:
        raise UserError(f"evaluate.networks: {unknown[0]!r} is not trained or not scored; choose from {', '.join(run.networks)}")
    return [name for name in run.networks if wanted is None or name in wanted]


def _folder(run: TrainedRun, source: CaseSource, split: str, named: Sequence[str]) -> Path:
    """evaluation/ for the run's own test split as its recipe says, evaluation/<data>-<split>[-<what is `named`>]/ for anything else."""
    own, here = ([store.place for store in stores] for stores in (run.source.stores, source.stores))
    if own == here and split == "test" and not named:
        return run.folder / "evaluation"
    return evaluation_folder(run.folder, here, split, named)
