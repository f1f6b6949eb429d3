"""Run folders as training and `mstkd evaluate` leave them, with scores that a test makes up."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib.image
import numpy as np
import yaml

from mstkd import attempts
from mstkd.config import IntensityConfig, RunConfig, resolved
from mstkd.evaluate.cases import Row
from mstkd.evaluate.scoring import Score, conventions
from mstkd.evaluate.summary import summarise, write_rows
from mstkd.evaluate.synthesis import Completion, Likeness, summarise_completions, write_completions
from mstkd.evaluate.synthesis import conventions as likeness_conventions
from mstkd.files import write_json
from mstkd.run_folder import data_facts
from mstkd.subsets import all_subsets, subset_name

SEQUENCES, REGIONS = ("flair", "t1", "t1ce", "t2"), ("WT", "TC", "ET")
SUBSETS = [subset_name(SEQUENCES, subset) for subset in all_subsets(SEQUENCES)]
TRUTH_VOXELS = 100
PATIENTS = {f"scan{n}": f"P{n}" for n in range(8)}
PATTERNS = [f"{given}->{target}" for given in SEQUENCES for target in SEQUENCES if given != target]  # of translations
ALL_PATTERNS = [f"{subset}->{target}" for subset in SUBSETS for target in SEQUENCES if target not in subset.split("+")]


def write_cohort(folder: Path, patient: Mapping[str, str], train: Sequence[str] = ("train0",), test: Sequence[str] | None = None) -> Path:
    """A shard set's index and splits: subject -> patient; those not in `train` are the test split. There are no tars to read."""
    folder.mkdir(parents=True)
    subjects = [
        {"subject": key, "patient": owner, "sequences": SEQUENCES, "members": {}, "fingerprint": {}} for key, owner in ({"train0": "T0"} | patient).items()
    ]
    tar = {"file": "made-000000.tar", "bytes": 10240, "sha256": "0" * 64, "subjects": subjects}
    index = {"version": 1, "dataset": "made", "spec_sha256": "0" * 64, "sequences": SEQUENCES, "label_scheme": "brats2018", "shards": [tar]}
    (folder / "index.json").write_text(json.dumps(index))
    splits = {"version": 1, "folds": [{"train": list(train), "val": []}], "test": [key for key in patient if key not in train]}
    (folder / "splits.json").write_text(json.dumps(splits))
    return folder


def begin(shards: Path, name: str, seed: int, method: dict, data: dict, sections: dict) -> RunConfig:
    """<beside shards>/runs/<name> as training leaves it, without weights, and an empty evaluation/."""
    config = RunConfig.model_validate({
        "name": name, "seed": seed, "runs_dir": str(shards.parent / "runs"), "method": method,
        "data": {"shards": str(shards), **data}, "train": {"global_batch": 1, "steps": 1}, **sections,
    })  # fmt: skip
    (config.run_dir / "evaluation").mkdir(parents=True)
    (config.run_dir / "config.yaml").write_text(yaml.safe_dump(resolved(config)))
    attempts.begin(config.run_dir, world_size=2, job=None)
    (config.run_dir / "record.json").write_text(json.dumps({"seed": seed, "data": data_facts(config)}))
    return config


def tested(shards: Path) -> list[str]:
    return json.loads((shards / "splits.json").read_text())["test"]


def write_run(
    shards: Path,
    name: str,
    dice: Callable[[str, str, str], float],
    *,
    seed: int = 0,
    method: dict | None = None,
    subjects: Sequence[str] | None = None,
    subsets: Sequence[str] = SUBSETS,
    lacks: Mapping[str, str] = {},
    truth_voxels: int = TRUTH_VOXELS,
    notes: dict[str, str] | None = None,
    oracle: bool = False,
    **sections,
) -> Path:
    """<beside shards>/runs/<name>, evaluated: `dice(subject, subset, region)`; HD95 is 10 (1 - Dice) mm. `lacks`: subject -> sequence."""
    config = begin(shards, name, seed, method or {"name": "kd"}, {"crop": (8, 8, 8)}, sections)
    subjects = subjects or tested(shards)
    rows = []
    for subject in subjects:
        for network in ("student", "teacher"):
            for subset in subsets:
                for region in REGIONS if lacks.get(subject, "-") not in subset.split("+") else ():
                    value = 0.0 if network == "teacher" else float(np.clip(dice(subject, subset, region), 0, 1))
                    rows.append(Row(network, subject, subset, region, Score(value, truth_voxels, 90, 10 * (1 - value))))
    folder = config.run_dir / "evaluation"
    write_rows(folder / "per_case.csv", rows)
    texts = conventions(config.evaluate) | (notes or {})
    student = [row for row in rows if row.network == "student"]
    summary = summarise(student, SEQUENCES, config.method["name"], "test", 0, texts)
    write_json(folder / "summary.json", summary | ({"oracle": True} if oracle else {}))
    return config.run_dir


def write_translation(
    shards: Path,
    name: str,
    psnr: Callable[[str, str], float],
    *,
    seed: int = 0,
    method: dict | None = None,
    subjects: Sequence[str] | None = None,
    patterns: Sequence[str] = PATTERNS,
    slices: int = 20,
    lpips: bool = False,
    labelled: bool = True,
    texture: bool = False,
    oracle: Callable[[str, str], float] | None = None,
    copied: Callable[[str, str], float] | None = None,
    size: int = 64,
    **sections,
) -> Path:
    """<beside shards>/runs/<name>, a synthesis evaluated: `psnr(subject, pattern)` in dB; the other figures follow from it, see `likeness`.

    `oracle`: PSNR of a network "teacher" that is one. `copied`: of copying the source.
    """
    config = begin(shards, name, seed, method or {"name": "stargan"}, {"slices": {"size": size}}, sections)
    folder, cases = config.run_dir / "evaluation", [(subject, pattern) for subject in subjects or tested(shards) for pattern in patterns]

    def scored(network: str, figures: Callable[[str, str], float]) -> list[Completion]:
        return [Completion(network, s, *p.split("->"), likeness(figures(s, p), slices, lpips, labelled, texture)) for s, p in cases]

    networks = {"student": scored("student", psnr)} | ({"teacher": scored("teacher", oracle)} if oracle else {})
    write_completions(folder / "per_case.csv", [row for rows in networks.values() for row in rows])
    for network, rows in networks.items():
        texts = likeness_conventions(config.data.slices, IntensityConfig(kind="percentile"), lpips) | ({"oracle": "was given labels"} if network == "teacher" else {})
        summary = summarise_completions(rows, SEQUENCES, config.method["name"], "test", 0, network == "teacher", texts)
        write_json(folder / ("summary.json" if network == "student" else f"summary_{network}.json"), summary)
    if copied:
        write_completions(folder / "copy_per_case.csv", scored("copy", copied))
    return config.run_dir


def likeness(psnr: float, slices: int = 20, lpips: bool = False, labelled: bool = True, texture: bool = False) -> Likeness:
    """SSIM psnr / 40, round the tumour 5 dB and 0.2 less, LPIPS 1 - psnr / 40, z gradient 1 - psnr / 50, spectrum 40 - psnr; without labels no tumour."""
    local = (slices // 2, psnr - 5, psnr / 40 - 0.2) if labelled else (0, None, None)
    seen = (1 - psnr / 50, 40 - psnr) if texture else (None, None)
    return Likeness(slices, psnr, psnr / 40, psnr - 1, psnr / 40 - 0.1, *local, *seen, 1 - psnr / 40 if lpips else None)


def flat(level):
    """Scores that depend on the patient alone."""
    return lambda subject, subset, region: level + 0.01 * int(subject[-1])


def noisy(level, draw, spread=0.05):
    draws = np.random.default_rng(draw)
    return lambda subject, subset, region: level + 0.02 * int(subject[-1]) + draws.normal(0, spread)


def write_arms(shards, seeds=(0, 1), gain=0.05):
    """kd and mean_teacher, some seeds each."""
    runs = []
    for number, (method, level) in enumerate((("kd", 0.5), ("mean_teacher", 0.5 + gain))):
        runs += [write_run(shards, f"{method}-seed{s}", noisy(level, 10 * number + s), seed=s, method={"name": method}) for s in seeds]
    return runs


def pictures(folder: Path) -> list[str]:
    """Names of the PNG files in `folder`, each of which shows something."""
    names = sorted(path.name for path in folder.glob("*.png"))
    for name in names:
        pixels = matplotlib.image.imread(folder / name)
        assert min(pixels.shape[:2]) > 200 and pixels.std() > 0.05
    return names
