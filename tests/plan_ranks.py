"""What the ranks do in test_plan.py: hold a role's engine and count what it really takes."""

import gc
from pathlib import Path

import torch
import traffic
from deepspeed.runtime.torch_autocast import get_comm_dtype

from mstkd.config import RoleConfig
from mstkd.engine import backend
from mstkd.engine.backend import RoleEngine
from mstkd.engine.environment import resolve_environment
from mstkd.engine.new_files import NewFiles

NETWORK = {"width": 8, "decoder_width": 2, "embed_dim": 48, "layers": 4, "heads": 4, "mlp_dim": 64, "dropout": 0, "fuse_dropout": 0}


def measure(folder: str, zero: int, precision: str, offload: dict) -> dict:
    """Bytes in the memory of this rank after a step and in the role's checkpoint, and what travels in 16 bits."""
    ranks = resolve_environment()
    backend.start(ranks)
    before = _tensor_bytes()
    traffic.NETWORK = NETWORK
    train, method = traffic._settings(zero, precision, 2)
    train.roles["networks"] = RoleConfig(offload=offload)
    role = method.roles("distill")["networks"]
    engine = RoleEngine("networks", role, train, 1, ranks.device)
    for step in range(2):
        traffic._micro_step(engine, step)
    held = _tensor_bytes() - before
    engine.save(NewFiles(Path(folder)))
    sizes = [(getattr(p, "ds_numel", p.numel()), get_comm_dtype(p) != torch.float32) for p in role.step.parameters()]
    engine.destroy()
    return {"held": held, "all": sum(n for n, _ in sizes), "half": sum(n for n, half in sizes if half)}


def _tensor_bytes() -> int:
    """Memory behind every tensor that is alive."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    tensors += [t.grad for t in tensors if t.grad is not None]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.device.type == "cpu"}
    return sum(storages.values())
