"""Every command of the README: run as it stands on small generated data, or read with all its words where it needs a cluster or data of its own."""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from forked_command import call, processes
from short_runs import TINY
from small_uhf import SMALL as SMALL_UHF
from typer.main import get_command

from mstkd.config import load_config
from mstkd.launch import cli
from mstkd.launch.cluster import load_cluster
from mstkd.launch.submit import prepare
from mstkd.method_list import entries
from mstkd.methods import available_methods, load, read_config
from mstkd.shards.dataset import load_spec
from mstkd.shards.phantom import write_phantom
from mstkd.study.config import load_study

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"^```bash\n(.*?)^```", re.S | re.M)
SCRIPT = re.compile(r"^```python\n# (\S+\.py)\n(.*?)^```", re.S | re.M)
HEREDOC = re.compile(r"<<'(\w+)'\n.*?^\1$", re.S | re.M)

LITTLE = ["data.workers=0", "train.global_batch=2", "validate.max_cases=1", "validate.every_steps=100", "checkpoint.every_steps=100"]
SEGMENT = [*(word for word in TINY if "steps" not in word), "train.steps=1", "train.zero_stage=1", *LITTLE]
UNETS = ["data.crop=[32,32,32]", "train.steps=1", "inference.overlap=0", *LITTLE]
SLICES = ["data.slices.size=16", "data.slices.min_brain=0.4", "train.steps=1", "train.micro_batch=2", "inference.batch=64", *LITTLE]
SMALLER = {  # by recipe: the words that make it small
    "mst_kdnet_phantom": SEGMENT, "kd_phantom": UNETS, "monai_network_phantom": UNETS,
    "shaspec_phantom": ["data.crop=[32,32,32]", "method.network.width=4", "train.steps={complete: 1, missing: 1}", "method.warm_restart=1", "inference.overlap=0", *LITTLE],
    "m2dn_phantom": [*SLICES, "method.network={width: 4, bottleneck: 4}", "method.sampler.steps=2"],
    "one_shot_phantom": [*SLICES, "method.network={width: 4, bottleneck: 4}"],
    "voxel_regression_phantom": SLICES,
    "utad_net_phantom": [*SLICES, "method.network={width: 4, levels: 2}", "method.critic={width: 4, layers: 3}"],
    "uhf_phantom": [*SMALL_UHF, "train.steps=1", *LITTLE],
    "shaspec_digits_phantom": ["train.epochs=null", "train.steps=2", "method.width=8", *LITTLE, "train.global_batch=64"],
}  # fmt: skip

def write_scripts(folder: Path) -> None:
    """What readers put into files of their own."""
    for name, code in SCRIPT.findall(README):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(code)


def commands() -> list[list[str]]:
    """The words of every simple command, in reading order."""
    found = []
    for block in BLOCK.findall(README):
        for line in HEREDOC.sub("", block.replace("\\\n", " ")).splitlines():
            part = []
            for word in [*shlex.split(line, comments=True), "&&"]:
                if word == "&&":
                    found += [part] if part else []
                    part = []
                elif part or not re.fullmatch(r"[A-Z_]+=.*", word):  # an assignment before the command
                    part.append(word)
    return found


def of_mstkd(words: list[str]) -> list[str] | None:
    """What `mstkd` is given, also behind a launcher; None for another program."""
    if words[0] == "mstkd" or words[0] == "srun":
        return words[words.index("mstkd") + 1 :]
    if words[0] in ("deepspeed", "torchrun"):
        return ["train", *words[words.index("mstkd.train") + 1 :]]
    return None


COMMANDS = commands()
OURS = [given for words in COMMANDS if (given := of_mstkd(words))]
OTHERS = [shlex.join(words) for words in COMMANDS if of_mstkd(words) is None]


def parsed(words: list[str]) -> tuple[str, dict]:
    """The command's name and its parameters, as the command line reads them. Raises click's errors."""
    command, names, rest = get_command(cli.app), [], list(words)
    while hasattr(command, "commands"):
        names.append(rest[0])
        command = command.commands[rest.pop(0)]
    return " ".join(names), command.make_context(names[-1], rest).params


@pytest.mark.parametrize("words", OURS, ids=shlex.join)
def test_every_option_and_key_exists(words, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    write_scripts(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    command, given = parsed(words)
    recipe, overrides = given.get("recipe"), given.get("overrides") or []
    if command == "study":
        if recipe != "mine.yaml":
            assert load_study(recipe, overrides).arms
    elif command == "submit":
        config = "kd_phantom" if given["stages"] == "teacher,student" else "mst_kdnet_phantom"  # where it says RECIPE
        cluster = load_cluster("gpu" if given["cluster"] == "gpu" else "devcluster")
        assert prepare(config if recipe == "RECIPE" else recipe, given["cluster"], cluster, given["stages"], overrides, given["sweep"] or []).runs
    elif command == "evaluate" and overrides:  # a run that is called as its recipe
        assert read_config(load_config(given["run"].name, overrides).method)
    elif recipe is not None:
        for name in recipe if isinstance(recipe, list) else [recipe]:
            assert read_config(load_config(name, overrides).method)


def test_the_files_shown_are_what_they_are_said_to_be(tmp_path):
    data_set, recipe, cluster = re.findall(r"^```yaml\n(.*?)^```", README, re.S | re.M)
    for name, text in (("mine", data_set), ("my", recipe), ("cluster", cluster)):
        (tmp_path / f"{name}.yaml").write_text(text)
    assert load_spec(str(tmp_path / "mine.yaml")).sequences and load_cluster(str(tmp_path / "cluster.yaml")).tasks_per_node == 4
    config = load_config(str(tmp_path / "my.yaml"))
    load(config.method["name"]).check_crop(read_config(config.method), config.data.crop)
    assert not load_config(str(tmp_path / "my.yaml"), ["train.epochs=null", "train.steps=500"]).train.epochs


# Beginnings of commands that are not run here, and the tests that run the like of them
ELSEWHERE = {
    ("submit", "status", "logs", "cancel"): "test_slurm.py", ("doctor",): "test_doctor_slurm.py", ("mlflow",): "test_track_merge.py", ("train mst_kdnet_phantom tracking.uri",): "test_track.py",
    ("bench",): "test_bench_step.py", ("study",): "test_study.py", ("compare runs/kd", "compare runs/stargan", "compare runs/uhf"): "test_compare.py",
    ("report runs/mst_kdnet-seed0",): "test_report_page.py", ("shards splits shards/pairs", "shards splits shards/brats2020"): "test_shards_splits.py",
    ("train mst_kdnet_brats2024", "train uhf_ibsr18", "evaluate runs/uhf_pairs", "plan"): "test_plan.py",  # of full size
    ("evaluate --pred predictions",): "test_shards_nnunet_export.py",  # what nnU-Net would have written
    ("shards build --spec brats2021",): "test_shards_parts.py",
    ("evaluate runs/mst_kdnet_brats2024 --data",): "test_another_evaluation.py",
}  # fmt: skip
SUBSTITUTES = {"/data/": "data/", "brats2024_gli": "phantom", "/scratch/": "scratch/", "'$SLURM_ARRAY_TASK_ID/8'": "1/8"}  # what is not here
NOT_HERE = tuple(beginning for beginnings in ELSEWHERE for beginning in beginnings)
HERE = [words for words in OURS if not " ".join(words).startswith(NOT_HERE)]
PROGRAMS = {  # what is no `mstkd`: who runs it, "" where nobody does
    "launch/demo.sh": "test_readme.py", "tests/run.sh": "../.ci/run", "launch/wheelhouse.sh": "test_airgap.py", "wheelhouse/wheelhouse.sh": "test_airgap.py",
    "slurm/devcluster/": "devcluster.py", "mlflow models serve": "test_export_mlflow.py", "launch/complete_or_distil.sh": "test_complete_or_distil.py",
    "python -": "test_export_mlflow.py", "git clone ": "", "cd ": "", "python3 -m venv ": "", "pip install -c ": "../launch/setup_env.sh", "source ": "", "export ": "", "xdg-open ": "", "apptainer ": "", "python -m venv peers": "", "peers/bin/pip ": "",
}  # fmt: skip


@pytest.fixture(scope="module")
def at_desk(tmp_path_factory):
    """Runs a command in a folder as a reader has it after the demo, and after training on data of their own, with everything small."""
    folder, server = tmp_path_factory.mktemp("desk"), processes()
    write_scripts(folder)
    write_phantom(folder / "demo" / "nifti", subjects=24, size=32, seed=0)
    for name in ("data/BraTS2024-GLI", "data/new", "cases"):
        for case in sorted((folder / "demo" / "nifti").iterdir())[:3]:
            shutil.copytree(case, folder / name / case.name)
    for case in (folder / "cases").iterdir():
        next(case.glob("*_t1.nii.gz")).unlink()
    given = [f"{case.name},cases/{case.name}/{case.name}_flair.nii.gz" for case in (folder / "cases").iterdir()]
    (folder / "cases.csv").write_text("\n".join(["subject,flair", *given]))

    def run(words: list[str]) -> None:
        smaller = SMALLER[words[1]] if words[0] == "train" else []
        files = [name for word in words for name in (sorted(folder.glob(word)) if "*" in word else [word])]
        assert call(server, [*map(str, files), *smaller], folder) == 0, " ".join(words)

    run(["shards", "build", "--spec", "phantom", "--src", "demo/nifti", "--out", "demo/shards"])
    run(["shards", "splits", "demo/shards", "--train", "10", "--val", "8", "--test", "6", "--out", "demo/shards/splits.json"])  # few to score, enough to split again
    run(["train", "mst_kdnet_phantom"])
    run(["evaluate", "runs/mst_kdnet_phantom"])
    for name in ("mst_kdnet_brats2024", "fold0", "fold1"):
        shutil.copytree(folder / "runs" / "mst_kdnet_phantom", folder / "runs" / name)
    return run


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_commands_run_in_their_order(at_desk):
    assert len(HERE) > 45
    for words in HERE:
        text = shlex.join(words)
        for there, here in SUBSTITUTES.items():
            text = text.replace(there, here)
        at_desk(shlex.split(text))


def test_the_table_of_methods_is_what_mstkd_methods_says():
    rows = re.findall(r"^\| `(\w+)` \| (?:segmentation|synthesis|classification) .*$", README, re.M)
    assert rows == available_methods()
    for entry in entries():
        assert f"| `{entry.name}` | {entry.task} | {', '.join(entry.stages)} | {entry.paper} | {entry.millions} | {entry.reproduces} |" in README


def test_every_other_program_is_known():
    for program in OTHERS:
        assert any(name in program for name in PROGRAMS), program
    for name, test in PROGRAMS.items():
        assert any(name in program for program in OTHERS), name
    for beginning, test in [*ELSEWHERE.items(), *PROGRAMS.items()]:
        assert (ROOT / "tests" / test).exists(), beginning


@pytest.mark.slow
def test_the_demo(tmp_path):
    """launch/demo.sh in a copy of the project, in an environment that it takes for set up, with the words that make it small."""
    copy, environment = tmp_path / "copy", tmp_path / "environment"
    shutil.copytree(ROOT / "launch", copy / "launch")
    shutil.copy(ROOT / "pyproject.toml", copy)
    wanted = hashlib.sha256((copy / "pyproject.toml").read_bytes() + (copy / "launch" / "constraints.txt").read_bytes()).hexdigest()
    environment.mkdir()
    (environment / ".mstkd-installed").write_text(f"{wanted}  {copy}\n")
    called = {**os.environ, "VIRTUAL_ENV": str(environment), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", copy / "launch" / "demo.sh", *SEGMENT], env=called, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (copy / "demo/runs/mst_kdnet_phantom/evaluation/report.html").is_file() and "flair+t1+t1ce+t2" in done.stdout
