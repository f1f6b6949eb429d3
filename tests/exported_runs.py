"""A run of a small U-Net on phantoms, to be exported, and what an export may not tell."""

import getpass
import os
import socket
import zipfile
from pathlib import Path

import torch
import yaml
from trained_run import make_run, write_run

from mstkd.methods import DataFacts, Method, build
from mstkd.shards.spec import LABEL_SCHEMES

SEQUENCES = ("flair", "t1", "t1ce", "t2")
UNET = {"name": "monai_network", "network": {"architecture": "UNet", "arguments": {"channels": [4, 8], "strides": [2]}}}
SUBJECT = "Phantom_0001"
TESTS = Path(__file__).parent


def unet_run(root: Path) -> Path:
    """root/nifti, root/shards and a run folder, which is returned. It predicts in float32, as graphs do."""
    make_run(root)
    run = write_run(root, "unet", UNET)
    recipe = yaml.safe_load((run / "config.yaml").read_text())
    recipe["inference"]["precision"] = "fp32"
    (run / "config.yaml").write_text(yaml.safe_dump(recipe))
    return run


def case_files(run: Path, *sequences: str) -> dict[str, Path]:
    """Of one subject."""
    folder = run.parents[1] / "nifti" / SUBJECT
    return {name: folder / f"{SUBJECT}_{name}.nii.gz" for name in sequences or SEQUENCES}


def small(section: dict, crop: tuple[int, int, int], sequences: tuple[str, ...] = SEQUENCES, scheme: str = "brats2018") -> Method:
    """A method with the same weights each time, and what depends on a batch's statistics moved away from where it starts."""
    torch.manual_seed(0)
    method = build(section, DataFacts(sequences, LABEL_SCHEMES[scheme], crop))
    for network in method.networks.values():
        for name, buffer in network.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
        network.eval()
    return method


def refuse_identifying(folder: Path, run: Path) -> None:
    """Fails where a file in `folder`, or in an archive there, holds a path of this machine, its name, its user or a subject."""
    words = {str(run.parents[1]), str(TESTS.parent), os.path.expanduser("~") + "/", "Phantom_", "site-packages"}
    words |= {f"/{getpass.getuser()}/"} | {name for name in [socket.gethostname()] if len(name) > 5}  # a shorter one may stand anywhere
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        contents = {path.name: path.read_bytes()}
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                contents |= {entry: archive.read(entry) for entry in archive.namelist()}
        for name, content in contents.items():
            found = [word for word in words if word.encode() in content or word in name]
            assert not found, f"{path.relative_to(folder)} ({name}) tells {found}"
