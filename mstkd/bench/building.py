"""How much longer a build takes than only loading the same files and writing the same bytes, per worker."""

import io
import shutil
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np

from mstkd.bench.report import Figure, figure
from mstkd.bench.volumes import SEQUENCES, write_splits
from mstkd.files import whole_file
from mstkd.shards.build import build
from mstkd.shards.members import encode_array
from mstkd.shards.shard_writer import add_member, tar_writer
from mstkd.shards.spec import BRAIN, IMAGE, LABEL

OURS, LOAD_AND_WRITE = "mstkd shards build", "load .nii.gz and write the same bytes"


def build_figures(nifti: Path, scratch: Path, rounds: int) -> list[Figure]:
    """Seconds per subject of both, one worker each, over the cases in the folder `nifti`."""
    cases = sorted(path for path in nifti.iterdir() if path.is_dir())
    splits = write_splits(scratch / "build-splits.json", [case.name for case in cases])
    seconds: dict[str, list[float]] = {OURS: [], LOAD_AND_WRITE: []}
    for _ in range(rounds):
        seconds[OURS].append(_timed(lambda: _build(nifti, scratch / "built", splits)) / len(cases))
        shutil.rmtree(scratch / "built")
        seconds[LOAD_AND_WRITE].append(_timed(lambda: _load_and_write(cases, scratch / "written.tar")) / len(cases))
        (scratch / "written.tar").unlink()
    return [figure(name, "s/subject", values) for name, values in seconds.items()]


def _timed(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _build(nifti: Path, out: Path, splits: Path) -> None:
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # its progress, and warnings about made-up heads
        build("phantom", nifti, out, workers=1, splits=splits)


def _load_and_write(cases: list[Path], out: Path) -> None:
    import nibabel as nib

    with whole_file(out) as stream, tar_writer(stream) as writer:
        for case in cases:
            files = [case / f"{case.name}_{name}.nii.gz" for name in (*SEQUENCES, "seg")]
            *volumes, label = (nib.load(path).get_fdata(dtype=np.float32) for path in files)
            arrays = {IMAGE: np.stack(volumes).astype(np.float16), BRAIN: label.astype(np.uint8), LABEL: label.astype(np.uint8)}
            for suffix, array in arrays.items():
                add_member(writer, case.name, suffix, encode_array(array))
