"""`mstkd shards prepare`: raw scans to co-registered, skull-stripped images by programs that the user names.

OUT/<subject>/<subject>_<sequence>.nii.gz are the results of the last step per sequence, and
OUT/<subject>/<subject>_<step>.nii.gz that of each step per subject. Results of every step stay in OUT/.work with a
record of what made them: a second run repeats only what failed, or whose command or input changed.
"""

import hashlib
import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from mstkd.errors import UserError
from mstkd.files import write_json
from mstkd.shards.brain import checked_mask
from mstkd.shards.dataset import Volume
from mstkd.shards.external import Programs
from mstkd.shards.nifti import check_same_grid, grid_of, open_image, read_volume
from mstkd.shards.prepare_config import PrepareConfig, PrepareStep, load_prepare_config

WORK, LOGS, SUFFIX = ".work", "logs", ".nii.gz"


def prepare(config: Path, src: Path, out: Path, workers: int = 1) -> list[str]:
    """Run the steps of `config` on every subject under `src`; the subjects come back, sorted.

    `workers` subjects are at work at once. A subject that fails does not stop the others. Raises UserError: bad
    configuration, absent programs (before anything starts), or the first subject that failed, with step, exit code and
    the last line of its stderr.
    """
    plan = load_prepare_config(config)
    if workers < 1:
        raise UserError(f"workers {workers}: give 1 or more")
    _check_programs(plan, Path(config))
    subjects = plan.find_subjects(Path(src).absolute())
    out = Path(out).absolute()
    for name, scans in subjects.items():
        if inside := [scan for scan in scans.values() if scan.resolve().is_relative_to((out / name).resolve())]:
            raise UserError(f"--out {out}: holds the raw scan {inside[0]}, and results are replaced there; give another folder")
    out.mkdir(parents=True, exist_ok=True)
    console, programs, failures = Console(), Programs(), {}
    with _ends_on_sigterm(), ThreadPoolExecutor(workers) as pool:
        try:  # from the first program on: a signal may come while the others are still being submitted
            futures = {pool.submit(_Subject(name, scans, plan, out, programs).run): name for name, scans in subjects.items()}
            for number, future in enumerate(as_completed(futures), 1):
                name = futures[future]
                try:
                    done, kept = future.result()
                    text = f"{done} steps done, {kept} kept"
                except UserError as error:
                    failures[name], text = error, "failed"
                console.print(f"{name}: {text} ({number} of {len(subjects)} subjects)", highlight=False, markup=False)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            programs.stop()
            raise
    if failures:
        first = min(failures)
        others = f"; {len(failures) - 1} more failed: {', '.join(sorted(failures)[1:4])}" if len(failures) > 1 else ""
        raise UserError(f"{failures[first]}{others}")
    return list(subjects)


def _check_programs(plan: PrepareConfig, config: Path) -> None:
    absent = {step.words[0]: step.name for step in reversed(plan.steps) if shutil.which(step.words[0]) is None}
    if absent:
        listed = ", ".join(f"{program} (step {step})" for program, step in reversed(absent.items()))
        raise UserError(f"{config.name}: not on PATH: {listed}; install it or load its module, or change the step")


@dataclass
class _Subject:
    """The way of one subject through the steps."""

    name: str
    scans: dict[str, Path]  # per sequence what was there, then its latest result
    plan: PrepareConfig
    out: Path
    programs: Programs

    def run(self) -> tuple[int, int]:
        """How many commands were run, and how many results were there already."""
        images, files, done, kept = dict(self.scans), {}, 0, 0
        for step in self.plan.steps:
            targets = [None] if step.per == "subject" else [name for name in images if not step.only or name in step.only]
            results = {}
            for sequence in targets:
                try:
                    results[sequence], fresh = self._result(step, sequence, images, files)
                except UserError as error:
                    what = f"step {step.name}" + (f" ({sequence})" if sequence else "")
                    raise UserError(f"subject {self.name}: {what}: {error}") from None
                done, kept = done + fresh, kept + (not fresh)
            if step.per == "subject":
                files[step.name] = results[None]
            else:
                images.update(results)
            if step.same_grid:
                self._check_grids(step, images, [results[None]] if step.per == "subject" else [])
        for name, image in {**images, **files}.items():
            if image.is_relative_to(self.out):
                _publish(image, self.out / self.name / f"{self.name}_{name}{SUFFIX}")
        return done, kept

    def _result(self, step: PrepareStep, sequence: str | None, images: dict[str, Path], files: dict[str, Path]) -> tuple[Path, bool]:
        """The checked result of one command, and whether it was run now."""
        stem = self.name if sequence is None else f"{self.name}_{sequence}"
        output = self.out / WORK / step.name / f"{stem}{SUFFIX}"
        inputs = {**{f"input_{name}": path for name, path in images.items()}, **files}
        if sequence is not None:
            inputs["input"] = images[sequence]
        if lacking := sorted(step.placeholders - {*inputs, "output", "output_dir", "output_stem", "subject", "sequence"}):
            raise UserError(f"its command needs {{{lacking[0]}}}, which this subject lacks; leave the subject out")
        words = step.filled(
            {**{name: str(path) for name, path in inputs.items()}, "output": str(output), "output_dir": str(output.parent),
             "output_stem": stem, "subject": self.name, "sequence": sequence or ""}
        )  # fmt: skip
        record = output.with_name(f"{stem}.json")
        made_from = {"command": words, "mask": step.mask, "inputs": {name: _state(inputs[name]) for name in sorted(step.placeholders & set(inputs))}}
        if _recorded(record) == {**made_from, "output": _state(output)}:
            return output, False
        made = (*self.plan.sequences, *(each.name for each in self.plan.steps if each.per == "subject"))
        finals = (self.out / self.name / f"{self.name}_{name}{SUFFIX}" for name in made)
        for stale in (record, output, *finals):  # what is final must not outlive its making
            stale.unlink(missing_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        self.programs.run(words, self.out / LOGS / self.name / f"{step.name}{f'_{sequence}' if sequence else ''}.log", step.timeout_min)
        _check_image(output, step.mask)
        write_json(record, {**made_from, "output": _state(output)})
        return output, True

    def _check_grids(self, step: PrepareStep, images: dict[str, Path], files: list[Path]) -> None:
        first, *others = (Volume(path) for path in (*images.values(), *files))
        grid = grid_of(open_image(first), first)
        for volume in others:
            try:
                check_same_grid(volume, grid_of(open_image(volume), volume), first, grid)
            except UserError as error:
                raise UserError(f"subject {self.name}: step {step.name} promises same_grid, but {error}") from None


def _check_image(path: Path, mask: bool) -> None:
    """Raise UserError unless a command left a readable, finite image (and a mask where it promises one)."""
    if not path.is_file():
        raise UserError(f"ended well but left no {path}; correct the command's output")
    data, _ = read_volume(Volume(path))
    if not np.isfinite(data).all():
        raise UserError(f"{path}: holds NaN or infinite values; look at the scan and the command")
    if mask:
        checked_mask(data, Volume(path))


def _state(path: Path) -> list | None:
    """What tells that a file, or the files of a folder, changed: size and time, or a digest of them. None if absent."""
    if path.is_dir():
        listing = sorted((file.relative_to(path).as_posix(), *_state(file)) for file in path.rglob("*") if file.is_file())
        return [hashlib.sha256(json.dumps(listing).encode()).hexdigest()]
    if not path.is_file():
        return None
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _recorded(record: Path) -> dict | None:
    try:
        return json.loads(record.read_text())
    except (OSError, ValueError):
        return None


def _publish(image: Path, final: Path) -> None:
    """`image` under its final name, without a second copy of its bytes where the file system allows."""
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = final.with_name(f".{final.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        os.link(image, partial)
    except OSError:
        shutil.copyfile(image, partial)
    partial.replace(final)
    partial.unlink(missing_ok=True)  # rename leaves it where both are one file already


@contextmanager
def _ends_on_sigterm() -> Iterator[None]:
    """SIGTERM as Ctrl-C: running programs have sessions of their own and would outlive us."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
