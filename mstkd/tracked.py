"""What a tracker is told of a training run at its start: tags to search by, a description, and the data. No path, host, user, diff or subject."""

import json
from importlib import metadata
from typing import Any

from mstkd import run_folder
from mstkd.config import RunConfig
from mstkd.data.training import TrainingSet
from mstkd.methods import Method
from mstkd.track import Tracker, open_trackers

COMMIT_CHARS = 12


def track(config: RunConfig, method: Method, training: TrainingSet, stages: list[str], world: int, attempt: int) -> Tracker:
    """The trackers of the run, told what it is."""
    record = run_folder.read_record(config.run_dir)
    dataset = {"name": "+".join(record["data"]["names"]), "digest": record["data"]["digest"]} | _contents(config, training)
    tracker = open_trackers(config, config.run_dir, attempt=attempt, tags=_tags(config, method, stages, world, record), dataset=dataset)
    tracker.describe(_description(config, method, stages, world, record, dataset))
    return tracker


def _tags(config: RunConfig, method: Method, stages: list[str], world: int, record: dict) -> dict[str, Any]:
    return {
        "task": method.task, "stages": ",".join(stages), "data": "+".join(record["data"]["names"]), "fold": config.data.fold, "seed": config.seed,
        "ranks": world, "zero_stage": config.train.zero_stage, "precision": config.train.precision,
        "mstkd": metadata.version("mstkd"), "git": _commit(record),
    }  # fmt: skip


def _commit(record: dict) -> str:
    return (record["git"] or {}).get("commit", "none")


def _contents(config: RunConfig, training: TrainingSet) -> dict[str, dict]:
    """The data's schema, as MLflow's page shows one, and its profile."""
    splits = [store.fold(config.data.fold) for store in training.stores]
    test = sum(len(fold.test) + len(store.splits.test) for fold, store in zip(splits, training.stores, strict=True))
    profile = {
        "train": sum(len(fold.train) for fold in splits), "val": sum(len(fold.val) for fold in splits), "test": test, "fold": config.data.fold,
        "sequences": list(training.sequences), "dropped": len(training.dropped), "labelled": training.labelled,
    }  # fmt: skip
    if training.classification:
        return {"profile": profile}
    columns = [{"name": name, "type": "tensor", "tensor-spec": {"dtype": "float16", "shape": [-1, -1, -1]}} for name in training.sequences]
    label = [{"name": "label", "type": "tensor", "tensor-spec": {"dtype": "uint8", "shape": [-1, -1, -1]}}] if training.labelled else None
    return {"profile": profile, "schema": {"mlflow_tensorspec": {"features": json.dumps(columns), "targets": label and json.dumps(label)}}}


def _description(config: RunConfig, method: Method, stages: list[str], world: int, record: dict, dataset: dict) -> str:
    train, profile = config.train, dataset["profile"]
    steps = ", ".join(f"{count} ({stage})" for stage, count in train.steps.items()) if isinstance(train.steps, dict) else train.steps
    length = f"updates {steps}" if steps is not None else f"{train.epochs:g} epochs"
    people = f"{profile['train']} to train, {profile['val']} to validate, {profile['test']} to test"
    lines = {
        "Paper": method.paper or "none",
        "Task": f"{method.task}; {'views' if config.data.crop is None and config.data.slices is None else 'sequences'} {', '.join(profile['sequences'])}",
        "Data": f"{dataset['name']}, fold {config.data.fold}: subjects {people}",
        "Stages": " -> ".join(stages),
        "Training": f"{length}, global batch {train.global_batch}, seed {config.seed}",
        "Ranks": f"{world}, ZeRO {train.zero_stage}, {train.precision}",
        "Code": f"mstkd {metadata.version('mstkd')}, commit {_commit(record)[:COMMIT_CHARS]}",
        "Results": f"curves in the runs below it, one per stage, e.g. `{config.name}/{stages[-1]}`; the test split after `mstkd evaluate`, here and below",
    }
    return f"**{config.method['name']}**\n\n" + "\n".join(f"- **{key}:** {text}" for key, text in lines.items())
