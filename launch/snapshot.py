"""The code of a submitted run: installed into the run folder, so that later edits cannot change what is queued."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from mstkd.errors import UserError

PACKAGES = ("mstkd", "mstkd.launch", "mstkd.shards")


def take_snapshot(code: Path) -> None:
    """Install this mstkd into the folder `code`, without network: from its checkout, or a copy of the installed package.

    An editable install's mapped packages would be found beside the snapshot; an installed one is complete (see
    `check_snapshot`). Raises UserError if pip cannot.
    """
    from mstkd.run_folder import SNAPSHOT_GIT, git_state

    code = Path(code)
    with tempfile.TemporaryDirectory(prefix="code.", dir=code.parent) as partial:
        checkout = _checkout()
        if checkout is None:
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(_folder("mstkd"), Path(partial) / "mstkd", ignore=ignored)
        else:
            _install(checkout, Path(partial))
        (Path(partial) / SNAPSHOT_GIT).write_text(json.dumps(git_state()))
        os.chmod(partial, 0o755)
        shutil.rmtree(code, ignore_errors=True)
        shutil.copytree(partial, code)


def check_snapshot(code: Path) -> None:
    """Raise UserError unless all of the project that runs here comes from the snapshot."""
    for package in PACKAGES:
        folder = _folder(package)
        if not folder.is_relative_to(Path(code).resolve()):
            raise UserError(f"{package} comes from {folder} and not from the run's snapshot {code}; check PYTHONPATH in the cluster's setup lines")


def _folder(package: str) -> Path:
    return Path(importlib.util.find_spec(package).origin).resolve().parent


def _checkout() -> Path | None:
    """The source tree this package runs from, if it is one (an editable install)."""
    root = _folder("mstkd").parent
    return root if (root / "pyproject.toml").is_file() and (root / "launch").is_dir() else None


def _install(checkout: Path, target: Path) -> None:
    # built from a copy: setuptools leaves its build folder in the source tree, which two submissions would share
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "source"
        shutil.copytree(checkout, source, ignore=_not_the_code(checkout))
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
        done = subprocess.run([*command, "--target", str(target), str(source)], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"the snapshot could not be installed: {_last_line(done.stderr)}; pip install 'setuptools>=77' wheel, and try again")


def _not_the_code(checkout: Path):
    """Of the top level only what a build reads: run folders and data may lie in the checkout, too."""
    wanted = {"pyproject.toml", "README.md", "LICENSE", "mstkd", "launch", "shards", "slurm"}

    def ignored(folder: str, names: list[str]) -> set[str]:
        return set(names) - wanted if Path(folder) == checkout else {name for name in names if name == "__pycache__"}

    return ignored


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "error" in line.lower()), lines[-1] if lines else "no message")
