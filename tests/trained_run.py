"""A finished run of the one-convolution method on a small phantom cohort, and the same calls on a pool's ranks."""

from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

from mstkd.config import InferenceConfig, RunConfig, resolved
from mstkd.data.store import ShardStore
from mstkd.engine import backend
from mstkd.engine.distributed import agreed
from mstkd.engine.environment import resolve_environment
from mstkd.evaluate.cases import score_subjects
from mstkd.evaluate.inference import Predictor
from mstkd.evaluate.run import evaluate_run
from mstkd.evaluate.source import CaseSource
from mstkd.evaluate.validation import Validation
from mstkd.evaluate.weights import load_networks
from mstkd.methods import DataFacts, build, load
from mstkd.run_folder import record_attempt
from mstkd.shards.build import build as build_shards
from mstkd.shards.phantom import write_phantom
from mstkd.subsets import all_subsets

CROP = (24, 24, 24)


def make_run(root: Path) -> Path:
    """root/nifti (10 phantoms), root/shards, and the run folder, which is returned."""
    write_phantom(root / "nifti", subjects=10, size=32, seed=5)
    build_shards("phantom", root / "nifti", root / "shards")
    return write_run(root, "toy", {"name": "toys.linear"})


def write_run(root: Path, name: str, method: dict, crop: tuple[int, int, int] | None = CROP, slices: dict | None = None) -> Path:
    """A run folder as training leaves it, with freshly built networks as its best weights, of the method's last stage.

    `slices`: of a method of two dimensions, instead of `crop`.
    """
    config = RunConfig.model_validate(
        {"name": name, "runs_dir": str(root / "runs"), "method": method, "data": {"shards": str(root / "shards"), "crop": crop, "slices": slices},
         "train": {"global_batch": 1, "steps": 1}}
    )  # fmt: skip
    best = config.run_dir / load(method["name"]).stages[-1] / "checkpoints" / "step-00000001"
    best.mkdir(parents=True)
    (config.run_dir / "config.yaml").write_text(yaml.safe_dump(resolved(config)))
    record_attempt(config, world_size=1)
    built, _ = method_and_source(root / "shards", method, crop, slices and slices["size"])
    weights = {f"{name}.{key}": value.clone() for name, net in built.networks.items() for key, value in net.state_dict().items()}
    save_file(weights, best / "both.safetensors")
    (best.parent / "best").write_text(best.name + "\n")
    return config.run_dir


def method_and_source(shards, section=None, crop=CROP, slice_size=None):
    source = CaseSource([ShardStore(Path(shards))])
    torch.manual_seed(0)
    return build(section or {"name": "toys.linear"}, DataFacts(source.sequences, source.label_scheme, crop, slice_size=slice_size)), source


def predictor_and_source(shards, section=None, window=None):
    method, source = method_and_source(shards, section)
    return Predictor(method, source.sequences, CROP, InferenceConfig(window=window), torch.device("cpu")), source


def evaluate(run: str) -> str:
    """A whole evaluation, as one of the ranks that share it; what went wrong here, or nothing."""
    ranks = resolve_environment()
    backend.start(ranks)
    try:
        with agreed(ranks):
            evaluate_run(Path(run), rank=ranks.rank, world=ranks.world)
    except Exception as error:
        return str(error)
    return ""


def on_ranks(shards: str, config: dict, run: str | None = None) -> tuple[list, dict]:
    """Scores of five cases and a validation, as one of the ranks that share them out; with the best weights of `run`, if given."""
    ranks = resolve_environment()
    backend.start(ranks)
    predictor, source = predictor_and_source(shards, config["method"])
    if run:
        load_networks(Path(run), predictor.method)
    subjects = source.subjects("all")[:5]
    subsets, options = all_subsets(source.sequences)[::4], RunConfig.model_validate(config).evaluate
    rows = score_subjects(predictor, ["student", "teacher"], source, subjects, subsets, source.label_scheme, options, ranks.rank, ranks.world)
    figures = Validation(RunConfig.model_validate(config), source.stores, ranks)(predictor.method, lambda: False)
    return [(row.network, row.subject, row.subset, row.region, vars(row.score)) for row in rows], figures
