"""What the ranks do in test_recompute.py: a few steps through the engine, with and without recomputation."""

import torch
from small_mst_kdnet import NETWORK, START, make, make_batch

from mstkd.config import TrainConfig
from mstkd.engine import backend
from mstkd.engine.backend import RoleEngine
from mstkd.engine.environment import resolve_environment
from mstkd.models.recompute import recompute

CROP, STEPS = (32, 32, 32), 2
LARGE = {**NETWORK, "decoder_width": 4, "embed_dim": 96, "mlp_dim": 1200}  # weights above the 100,000 elements that ZeRO-3 leaves whole


def compare(zero: int) -> dict:
    """The losses of both, and the distinct counters of BatchNorm after recomputed steps."""
    ranks = resolve_environment()
    backend.start(ranks)
    found = {}
    for name in ("plain", "recomputed"):
        torch.manual_seed(0)
        method = make(crop=CROP, network=LARGE, no_gsme=True)
        if name == "recomputed":
            for network in method.networks.values():
                recompute(network, method.blocks)
        train = TrainConfig(global_batch=ranks.world, steps=STEPS, zero_stage=zero, precision="fp32")
        engine = RoleEngine("networks", method.roles("distill")["networks"], train, 1, ranks.device)
        found[name] = [_step(engine, step, ranks.rank) for step in range(STEPS)]
        engine.destroy()
    buffers = dict(method.networks["student"].named_buffers())
    return found | {"counters": sorted({int(value) for key, value in buffers.items() if key.endswith("num_batches_tracked")})}


def _step(engine: RoleEngine, step: int, rank: int) -> float:
    torch.manual_seed(10 * step + rank)
    loss = engine.forward(make_batch(crop=CROP), {}, START).loss
    engine.backward(loss)
    engine.step()
    return loss.item()
