"""`mstkd export`: the student's weights and what is needed to use them, in a folder of its own."""

import json
import shutil
from pathlib import Path
from typing import Literal

from safetensors.torch import save

from mstkd import __version__
from mstkd.errors import UserError
from mstkd.evaluate.weights import open_run


def export(run_dir: Path, out: Path, format: Literal["safetensors"] = "safetensors", checkpoint: str = "best") -> Path:
    """Write <out>/<network>.safetensors (keys are parameter and buffer names) and <out>/mstkd.json; returns `out`.

    The network is the one that the run is for, usually the student; one that it cannot do without lies beside it. mstkd.json holds no host, path or user.
    Weights of any other `checkpoint` than the best are put together from what DeepSpeed saved, without a GPU.
    Raises UserError: another format, `out` exists, the run has no such checkpoint.
    """
    out = Path(out)
    if format != "safetensors":
        raise UserError(f"export format {format!r}: choose safetensors")
    if out.exists():
        raise UserError(f"{out}: exists already; choose another --out or remove it")
    run = open_run(run_dir, checkpoint)
    name, config = run.networks[0], run.config
    scheme, companions = run.facts.label_scheme, run.method.companions.get(name, ())
    facts = {
        "mstkd": __version__,
        "network": name,
        **({"companions": companions} if companions else {}),
        "method": config.method,
        "dataset": run.dataset,
        "sequences": run.facts.sequences,
        "label_scheme": scheme.model_dump(mode="json") if scheme else None,
        "intensity": run.method.intensity.model_dump(mode="json"),
        "crop": config.data.crop,
        "inference": config.inference.model_dump(mode="json"),
    }
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for written in (name, *companions):
        state = run.method.networks[written].state_dict()
        tensors = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
        (partial / f"{written}.safetensors").write_bytes(save(tensors))  # its own save_file makes files for the owner alone
    (partial / "mstkd.json").write_text(json.dumps(facts, indent=1) + "\n")
    partial.rename(out)
    return out
