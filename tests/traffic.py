"""Bytes that two ranks send per step of MST-KDNet, counted by the kernel, against the formula of each ZeRO stage.

    python tests/traffic.py [ZERO/PRECISION/ACCUMULATION ...]     prints the table, or these rows of it

Linux, as root or where user namespaces are allowed.

The ranks run in a network namespace of their own: nobody else's packets are counted.
"""

import os
import subprocess
import sys
from pathlib import Path

from mstkd.traffic import PERSISTENT, Elements, bytes_per_step
from rank_pool import RankPool

WARM_UP, STEPS = 2, 2  # ZeRO-3 learns the order of the weights in its first step
NETWORK = {"width": 16, "decoder_width": 4, "embed_dim": 192, "layers": 4, "heads": 4, "mlp_dim": 512, "dropout": 0, "fuse_dropout": 0}
CASES = [(0, "fp32", 1), (1, "fp32", 1), (2, "fp32", 1), (3, "fp32", 1), (1, "fp32", 2), (2, "fp32", 2), (3, "fp32", 2),
         (0, "bf16", 1), (1, "bf16", 1), (2, "bf16", 1), (3, "bf16", 1)]  # fmt: skip


def measure(zero: int, precision: str, accumulation: int) -> dict:
    """Of the role `networks` on this rank: bytes that a rank sends per step, and what the formulas need. Collective."""
    import torch.distributed as dist
    from mstkd.engine import backend
    from mstkd.engine.backend import RoleEngine
    from mstkd.engine.environment import resolve_environment

    ranks = resolve_environment()
    backend.start(ranks)
    train, method = _settings(zero, precision, 2 * accumulation)
    role = method.roles("distill")["networks"]
    engine = RoleEngine("networks", role, train, accumulation, ranks.device)
    tensors = [(p, getattr(p, "ds_numel", p.numel())) for p in role.step.parameters()]
    before = 0
    for step in range(WARM_UP + STEPS):
        if step == WARM_UP:
            dist.barrier()
            before = _sent()
        for _ in range(accumulation):
            _micro_step(engine, step)
    dist.barrier()
    after = _sent()
    dist.barrier()
    engine.destroy()
    return {"bytes": (after - before) / STEPS / ranks.world, **_elements(tensors)}


def _settings(zero: int, precision: str, global_batch: int):
    import torch
    from mstkd import methods
    from mstkd.config import TrainConfig
    from mstkd.shards.spec import LABEL_SCHEMES

    torch.manual_seed(0)
    train = TrainConfig(global_batch=global_batch, steps=10, zero_stage=zero, precision=precision)
    facts = methods.DataFacts(("flair", "t1", "t1ce", "t2"), LABEL_SCHEMES["brats2018"], (32, 32, 32))
    return train, methods.build({"name": "mst_kdnet", "network": NETWORK, "no_gsme": True}, facts)


def _micro_step(engine, step: int) -> None:
    import torch
    from mstkd.batch import Batch, Progress

    image = torch.randn(1, 4, 32, 32, 32)
    here = torch.ones(1, 4, dtype=torch.bool)
    batch = Batch(image, torch.ones(1, 32, 32, 32, dtype=torch.bool), here, here, ["s"], (image.mean(1) > 0).to(torch.uint8))
    engine.backward(engine.forward(batch, {}, Progress(step, 0, 10, 1)).loss)
    engine.step()


def _elements(tensors: list) -> dict:
    """How many elements the role has, how many of them autocast sends in bf16, and how many ZeRO-3 keeps whole."""
    import torch
    from deepspeed.runtime.torch_autocast import get_comm_dtype

    return {
        "all": sum(n for _, n in tensors),
        "half": sum(n for p, n in tensors if get_comm_dtype(p) == torch.bfloat16),
        "kept": sum(n for _, n in tensors if n <= PERSISTENT),
        "kept_half": sum(n for p, n in tensors if n <= PERSISTENT and get_comm_dtype(p) == torch.bfloat16),
        "largest": max(n for _, n in tensors),
    }


def _sent() -> int:
    """Bytes out of the loopback device of this namespace, of all ranks."""
    (line,) = [line for line in Path("/proc/self/net/dev").read_text().splitlines() if line.strip().startswith("lo:")]
    return int(line.split(":")[1].split()[8])


def main() -> None:
    if sys.argv[1:2] != ["inside"]:
        alone = ["unshare", "--net", *(["--map-root-user"] if os.geteuid() else []), sys.executable, __file__, "inside", *sys.argv[1:]]
        os.execvp(alone[0], alone)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    chosen = [case for case in CASES if not sys.argv[2:] or "/".join(map(str, case)) in sys.argv[2:]]
    pool, world = RankPool(2), 2
    print(f"{'ZeRO':>4} {'precision':>9} {'accumulation':>12} {'measured MB':>12} {'formula MB':>11} {'ratio':>6}", flush=True)
    try:
        for zero, precision, accumulation in chosen:
            found = pool.run("traffic.py", "measure", zero=zero, precision=precision, accumulation=accumulation)[0]
            measured = found.pop("bytes")
            formula = bytes_per_step(zero, accumulation, world, Elements(**found), gloo=True)
            figures = f"{measured / 1e6:>12.2f} {formula / 1e6:>11.2f} {measured / formula:>6.3f}"
            print(f"{zero:>4} {precision:>9} {accumulation:>12} {figures}", flush=True)
    finally:
        pool.close()


if __name__ == "__main__":
    main()
