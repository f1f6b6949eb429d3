"""The run folder: its resolved configuration, its record, and whether a run may continue in it.

runs/<name>/  config.yaml  record.json  attempts/  metrics.jsonl  mlflow.json  logs/  heartbeats/  <stage>/checkpoints/
              evaluation/    and, when submitted: code/  jobs/  jobs.json  mlflow.db
"""

import hashlib
import json
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase as fnmatch
from importlib import metadata
from pathlib import Path

import yaml

from mstkd import attempts
from mstkd.config import RunConfig, read_recipe, resolved
from mstkd.data.remote import open_folder, shown
from mstkd.errors import UserError
from mstkd.files import write_json, write_text
from mstkd.recipe import leaves
from mstkd.shards.layout import INDEX, SPLITS, parse_index
from mstkd.training_ranges import training_ranges

SNAPSHOT_GIT = "mstkd-git.json"  # beside the package in the snapshot of a submitted run
RECORDED = ("mstkd", "torch", "deepspeed", "monai", "webdataset", "mlflow", "numpy", "nibabel")
# What may differ between attempts of one run: none of it changes the updates. Everything else does.
# The data's bytes are compared by digest, so that a shard set may move.
FREE = ("resume", "runs_dir", "stages", "data.shards.*.path", "data.workers", "data.cache_dir", "data.cache_gib", "data.max_bad_samples",
        "data.on_bad_sample", "data.verify_sha256",
        "train.log_every", "train.max_skipped", "train.recompute", "checkpoint", "profile",
        "teacher.path", "teacher.placement", "teacher.cache_dir", "teacher.cache_gib",  # the weights are compared by sha256
        "validate.every_steps", "inference", "evaluate", "tracking", "watchdog")  # fmt: skip


def begin_run(config: RunConfig) -> None:
    """Create the run folder, or check that this configuration and data may continue in it. Raises UserError.

    Until a checkpoint exists there is nothing to continue, and everything may still change.
    """
    folder, path = config.run_dir, config.run_dir / "config.yaml"
    if next(folder.glob("*/checkpoints/step-*"), None):
        if config.resume == "never":
            raise UserError(f"run folder {folder} exists and resume=never; choose another name=... or use resume=auto")
        check_same(read_run_config(folder), config)
        check_same_data(read_record(folder)["data"], config)
    elif config.resume == "required":
        raise UserError(f"resume=required: {folder} holds no checkpoint; check name and runs_dir, or use resume=auto")
    elif path.is_file() and resolved(read_run_config(folder)) != recorded(config):
        for name in ("mlflow.json", "metrics.jsonl", "record.json"):  # of a run with other settings that never saved
            (folder / name).unlink(missing_ok=True)
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    write_text(path, yaml.safe_dump(recorded(config), sort_keys=False))


def recorded(config: RunConfig) -> dict:
    """The resolved configuration as it is kept: the addresses of shard sets without credentials."""
    values = resolved(config)
    for shard_set in values["data"]["shards"]:
        shard_set["path"] = shown(shard_set["path"])
    return values


def best_steps(folder: Path) -> dict[str, str]:
    """By stage: which checkpoint is its best at present."""
    return {pointer.parent.parent.name: pointer.read_text().strip() for pointer in sorted(Path(folder).glob("*/checkpoints/best"))}


def read_run_config(folder: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The resolved configuration of a run folder, with dotted overrides. Raises UserError if it is not one."""
    path = Path(folder) / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder} is not a run folder: it has no config.yaml")
    return read_recipe(path, overrides)


def evaluation_folder(run: Path, places: Sequence[str], split: str, named: Sequence[str]) -> Path:
    """<run>/evaluation/<data>-<split>[-<what is `named`>]/, where an evaluation of shard sets at `places` lies that is not the run's own."""
    data = "+".join(place.rpartition("/")[2] for place in places)
    return Path(run) / "evaluation" / "-".join([data, split, *(re.sub(r"[^\w.=+-]+", "-", name) for name in named)])


def check_prediction(before: RunConfig, now: RunConfig, sampling: Sequence[str]) -> None:
    """Raise UserError naming the first key whose change would ask for another training; `sampling`: see `Method.sampling`."""
    free = ("inference", "evaluate", *(f"method.{key}" for key in sampling))
    old, new = dict(leaves(resolved(before))), dict(leaves(resolved(now)))
    for key in sorted({*old, *new}):
        if old.get(key) != new.get(key) and not any(fnmatch(key, name) or fnmatch(key, f"{name}.*") for name in free):
            raise UserError(
                f"{key}={new.get(key)}: {before.name} was trained with {old.get(key)}; only {', '.join(f'{name}.*' for name in free)} can be changed "
                "afterwards: train another run with it"
            )


def check_same(before: RunConfig, now: RunConfig) -> None:
    """Raise UserError naming the first key whose change would make the resumed run another run."""
    old, new = dict(leaves(resolved(before))), dict(leaves(resolved(now)))
    for key in sorted({*old, *new}):
        if any(fnmatch(key, free) or fnmatch(key, free + ".*") for free in FREE) or old.get(key) == new.get(key):
            continue
        raise UserError(
            f"{now.run_dir}: {key} was {old.get(key)!r} and is now {new.get(key)!r}; "
            "a resumed run keeps its configuration: undo the change, or start another run with name=..."
        )


def check_same_data(before: dict, config: RunConfig) -> None:
    """Raise UserError if the shard sets are not those that the run began with (`before`: the record's data facts)."""
    if before["digest"] != data_digest(config):
        raise UserError(
            f"{config.run_dir}: the shards in {', '.join(shown(s.path) for s in config.data.shards)} are not those this run began with "
            "(index.json or splits.json differ); restore them, or start another run with name=..."
        )


def data_digest(config: RunConfig) -> str:
    """sha256 over the indices and splits of the run's shard sets: which bytes, which roles."""
    digest = hashlib.sha256()
    for shard_set in config.data.shards:
        for name in (INDEX, SPLITS):
            digest.update(open_folder(shard_set.path).read_bytes(name))
    return digest.hexdigest()


def data_facts(config: RunConfig) -> dict:
    """What must be known of the training data to use the run without it."""
    places = [s.path for s in config.data.shards]
    indices = [parse_index(open_folder(place).read_bytes(INDEX), f"{shown(place)}/{INDEX}") for place in places]
    return {
        "names": [index.dataset for index in indices],
        "sequences": list(indices[0].sequences),
        **indices[0].model_dump(mode="json", include={"label_scheme", "classification"}),
        "digest": data_digest(config),
        "ranges": training_ranges(places),
    }


def read_record(folder: Path) -> dict:
    """The record of a run folder. Raises UserError if it has none."""
    path = Path(folder) / "record.json"
    if not path.is_file():
        raise UserError(f"{folder}: no record.json; the run was never started")
    return json.loads(path.read_text())


def record_attempt(config: RunConfig, world_size: int, job: str | None = None) -> int:
    """Note this start in the run folder; returns its number, from 1. `job`: SLURM's id of it."""
    git, versions = git_state(), {name: metadata.version(name) for name in RECORDED}
    number = attempts.begin(config.run_dir, world_size, job, git and git["commit"], versions)
    path = config.run_dir / "record.json"
    record = json.loads(path.read_text()) if path.is_file() else {}
    record |= {
        "git": git,  # of the newest attempt; every attempt below has its own commit and versions
        "versions": versions,
        "python": platform.python_version(),
        "seed": config.seed,
        "data": data_facts(config),
        "world_size": world_size,
        "attempts": [asdict(attempt) for attempt in attempts.read(config.run_dir)],
    }
    write_json(path, record)
    return number


def git_state() -> dict[str, str] | None:
    """Commit and uncommitted diff of the checkout that holds this package, or that its snapshot was taken from; else None."""
    root = Path(__file__).parent
    noted = root.parent / SNAPSHOT_GIT
    if noted.is_file():
        return json.loads(noted.read_text())

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout if done.returncode == 0 else None

    # tracked there, not merely below some other project's checkout (a virtual environment inside one, say)
    if git("ls-files", "--error-unmatch", "run_folder.py") is None:
        return None
    return {"commit": (git("rev-parse", "HEAD") or "").strip(), "diff": git("diff", "HEAD") or ""}
