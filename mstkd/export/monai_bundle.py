"""A MONAI bundle that does without mstkd: the network as TorchScript, and a script that takes a case's files through it.

Metadata: `python -m monai.bundle verify_metadata` and `verify_net_in_out` accept it (MONAI 1.5).
"""

import json
import shutil
import warnings
import zipfile
from importlib import metadata
from pathlib import Path

import monai
import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from mstkd.errors import UserError
from mstkd.export import bundle_case
from mstkd.export.facts import FACTS, StudentFacts, write_facts
from mstkd.export.window import LabelRule, WindowNetwork, checked, example, tried_subsets
from mstkd.trained_run import TrainedRun

SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
PACKAGES = ("nibabel", "scipy")  # beside what MONAI itself needs
UNKNOWN = "not stated by whoever exported this"


class BundleNetwork(nn.Module):
    """The window's network, to be compiled by TorchScript; `available` may be left out where every sequence is there."""

    def __init__(self, graph: torch.jit.ScriptModule, rule: torch.jit.ScriptModule, sequences: int):
        super().__init__()
        self.graph, self.rule, self.sequences = graph, rule, sequences

    def forward(self, image: Tensor, available: Tensor | None = None) -> Tensor:
        """Logits (B, K, X, Y, Z) of image (B, M, X, Y, Z) and available (B, M) bool."""
        if available is None:
            available = torch.ones((image.shape[0], self.sequences), dtype=torch.bool, device=image.device)
        return self.graph(image, available)

    @torch.jit.export
    def labels(self, logits: Tensor) -> Tensor:
        """Label maps (B, X, Y, Z) uint8, in host memory, of logits (B, K, X, Y, Z) of any size."""
        return self.rule(logits.cpu())


def write_bundle(run: TrainedRun, facts: StudentFacts, folder: Path) -> None:
    """configs/, models/model.ts (and its state dict, model.pt), scripts/case.py, docs/README.md and LICENSE.

    Raises UserError: cases are prepared in a way that the script does not know, or a graph that computes something else.
    """
    _check_prepared(facts)
    for name in ("configs", "models", "scripts", "docs"):
        (folder / name).mkdir()
    network, logits = _scripted(run, facts)
    _save_without_lines(network, folder / "models" / "model.ts")
    torch.save(network.state_dict(), folder / "models" / "model.pt")
    write_facts(facts, folder / "configs")
    _write_json(_metadata(facts, logits), folder / "configs" / "metadata.json")
    _write_json(INFERENCE, folder / "configs" / "inference.json")
    shutil.copyfile(bundle_case.__file__, folder / "scripts" / "case.py")
    (folder / "scripts" / "__init__.py").touch()
    (folder / "docs" / "README.md").write_text(README.format(**_words(facts)))
    (folder / "LICENSE").write_text(LICENCE)


def _check_prepared(facts: StudentFacts) -> None:
    prepared = facts.files.preprocessing
    unknown = {
        f"cases are resampled to {prepared.spacing_mm} mm": prepared.spacing_mm,
        f"cases are brought to the grid of {prepared.common_grid}": prepared.common_grid,
        f"the background is what fills the {prepared.background}": prepared.background != "zero",
        "cases come with a brain mask": facts.files.brain_mask,
        "images are equalised (clahe)": facts.intensity.kind == "clahe",
        f"label maps are cleared up by {facts.inference.postprocess}": facts.inference.postprocess != "none",
        "small components are cleared": facts.inference.largest_component or facts.inference.min_volume_ml,
        f"windows are mirrored along {facts.inference.mirror}": facts.inference.mirror,
    }
    if found := [text for text, there in unknown.items() if there]:
        raise UserError(f"export format monai-bundle: {found[0]}, which the bundle's own script cannot do; use safetensors and mstkd.load")


def _scripted(run: TrainedRun, facts: StudentFacts) -> tuple[torch.jit.ScriptModule, Tensor]:
    """The compiled network, compared with torch, and logits of it."""
    method, (image, available) = run.method, example(len(facts.sequences), facts.window)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer, about shapes that are fixed here, and of its deprecation
        graph = torch.jit.trace(WindowNetwork(method, facts.network), (image, available), check_trace=False)
        logits = graph(image, available)
        rule = torch.jit.trace(LabelRule(method), (logits,), check_trace=False)
        network = torch.jit.script(BundleNetwork(graph, rule, len(facts.sequences)).eval())
        if not torch.equal(network.labels(logits), method.to_labels(logits)):
            raise UserError("model.ts draws other labels than torch; nothing was written")
    found = checked(method, facts.network, image, tried_subsets(method, facts.sequences), network)
    Console().print(f"model.ts: {found}", highlight=False, soft_wrap=True)
    return network, logits


def _save_without_lines(network: torch.jit.ScriptModule, path: Path) -> None:
    """TorchScript notes from which file and line each operation came: left out."""
    whole = path.with_suffix(".whole")
    torch.jit.save(network, whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as target:
        for entry in source.infolist():
            if not entry.filename.endswith(".debug_pkl"):
                target.writestr(entry, source.read(entry))
    whole.unlink()


def _metadata(facts: StudentFacts, logits: Tensor) -> dict:
    low, high = facts.intensity.interval
    value_range = [-10.0, 10.0] if facts.intensity.kind == "zscore" else [low, high]
    names = {str(channel): name for channel, name in enumerate(facts.sequences)}
    tensor = {"type": "image", "spatial_shape": list(facts.window), "is_patch_data": True, "dtype": "float32"}
    return {
        "schema": SCHEMA,
        "version": "0.1.0",
        "changelog": {"0.1.0": f"written by mstkd {facts.mstkd}"},
        "monai_version": monai.__version__,
        "pytorch_version": torch.__version__.partition("+")[0],
        "numpy_version": np.__version__,
        "required_packages_version": {name: metadata.version(name) for name in PACKAGES},
        "task": "Segmentation of brain MR images of which any subset of sequences may be missing",
        "description": f"Network {facts.network} of method {facts.method['name']}, trained on {facts.dataset}",
        "authors": UNKNOWN,
        "copyright": UNKNOWN,
        "data_type": "nibabel",
        "image_classes": f"channels {', '.join(facts.sequences)}, normalised as configs/{FACTS} says; what is missing holds {facts.hidden_value:g}",
        "label_classes": _regions(facts),
        "intended_use": "Research; not a medical device",
        "network_data_format": {
            "inputs": {"image": {**tensor, "format": "magnitude", "num_channels": len(names), "value_range": value_range, "channel_def": names}},
            "outputs": {"pred": {**tensor, "format": "segmentation", "num_channels": logits.shape[1], "value_range": []}},
        },
    }  # fmt: skip


INFERENCE = {
    "imports": ["$import torch", "$from scripts.case import predict_folder"],
    "bundle_root": ".",
    "dataset_dir": "$@bundle_root + '/input'",
    "output_dir": "$@bundle_root + '/output'",
    "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
    "network_def": {"_target_": "torch.jit.load", "f": "$@bundle_root + '/models/model.ts'", "map_location": "@device"},
    "run": ["$predict_folder(@network_def, @bundle_root, @dataset_dir, @output_dir, @device)"],
}

README = """# {network} of {method}

Segments brain MR images with any subset of {sequences}; trained on {dataset} by mstkd {mstkd}. For research; not a medical device.

Input: a folder per case with skull-stripped NIfTI files on one grid (background 0), named {files}; those that are missing are left out.

    cd BUNDLE
    python -m monai.bundle run --config_file configs/inference.json --meta_file configs/metadata.json --dataset_dir CASES --output_dir LABELS

Label maps have the grid of the case's first file and the values of scheme {scheme}: {values}.

- `models/model.ts`: TorchScript. `network(image, available)` gives logits of a window of {window} voxels; image (B, {count}, X, Y, Z) in the channel
  order above, available (B, {count}) bool; without `available` all are taken as there. `network.labels(logits)` gives label maps.
  `models/model.pt` is its state dict.
- `configs/mstkd.json`: how images are normalised and cut, window and overlap. `scripts/case.py` does what it says.
- The hidden sequences' voxels count for nothing.
"""

LICENCE = f"""What computes, in models/ and scripts/, comes from mstkd: Apache License 2.0, https://www.apache.org/licenses/LICENSE-2.0

The weights, in models/: {UNKNOWN}. What the data set that they were trained on allows holds for them, too.
"""


def _words(facts: StudentFacts) -> dict[str, str]:
    return {
        "network": facts.network, "method": facts.method["name"], "dataset": facts.dataset, "mstkd": facts.mstkd, "sequences": ", ".join(facts.sequences),
        "files": ", ".join(f"`{name}.nii.gz`" for name in facts.sequences), "scheme": facts.label_scheme.name,
        "values": _regions(facts),
        "window": " x ".join(map(str, facts.window)), "count": len(facts.sequences),
    }  # fmt: skip


def _regions(facts: StudentFacts) -> str:
    return ", ".join(f"{region} {list(values)}" for region, values in facts.label_scheme.regions.items())


def _write_json(content: dict, path: Path) -> None:
    path.write_text(json.dumps(content, indent=4) + "\n")
