"""A phantom recipe's method as small as it can be, and what the ranks do with it in test_baselines.py and test_mmformer.py."""

import torch

from mstkd.batch import Batch, Progress
from mstkd.config import AvailabilityConfig, RunConfig, TrainConfig, load_config
from mstkd.data.availability import Availability
from mstkd.engine import backend
from mstkd.engine.backend import RoleEngine
from mstkd.engine.environment import resolve_environment
from mstkd.engine.frozen import frozen
from mstkd.errors import UserError
from mstkd.methods import DataFacts, Method, build, load, read_config
from mstkd.shards.spec import LABEL_SCHEMES

SEQUENCES = ("flair", "t1", "t1ce", "t2")
START = Progress(step=0, epoch=0, total_steps=10, total_epochs=100)
STEPS = 2
RECIPES = {"uhf_guided": "uhf", "uhf_guided_2d": "uhf_2d"}  # where a recipe is not called as its method is
UHF = {"network": {"width": 2, "keeper_width": 1, "critic_width": 2}, "base": {"arguments": {"width": 5}}}
NARROWER = {"uhf_guided": UHF, "uhf_guided_2d": UHF, "shaspec": {"network": {"width": 4, "blocks": [1, 1, 1, 1]}}}  # than their recipes
WIDE = ("shaspec",)  # on a map of two voxels every channel's mean is the same, and the norm of its global context sees rounding alone


def phantom(name: str) -> RunConfig:
    return load_config(f"{RECIPES.get(name, name)}_phantom")


def small(name: str, sequences: tuple[str, ...] = SEQUENCES, **changes) -> Method:
    """The method of its phantom recipe or a narrower one, with the same weights each time."""
    config = phantom(name)
    torch.manual_seed(0)
    return build(config.method | NARROWER.get(name, {}) | changes, DataFacts(sequences, LABEL_SCHEMES["brats2018"], crop_of(name)), config.origin)


def crop_of(name: str) -> tuple[int, int, int]:
    """The smallest one that the method takes, else its recipe's."""
    config = phantom(name)
    if name in WIDE:
        return config.data.crop
    for crop in ((16, 16, 16), (32, 16, 16), (32, 32, 32)):
        try:
            load(name).check_crop(read_config(config.method), crop)
            return crop
        except UserError:
            continue
    return config.data.crop


def seen_in(method: Method, stage: str, samples: int) -> torch.Tensor:
    """(samples, M) bool: subsets that the stage can draw, one with as few sequences as possible and what it leaves, in turn."""
    every = Availability(method.availability(stage) or AvailabilityConfig(), SEQUENCES).possible({(True,) * 4})
    few = min(every, key=lambda subset: (sum(subset), subset))
    rest = tuple(not there for there in few)
    return torch.tensor([rest if sample % 2 and rest in every else few for sample in range(samples)])


def make_batch(method: Method, stage: str, crop: tuple[int, int, int], samples: int = 2, seed: int = 1) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    values = torch.tensor([0, 1, 2, 4], dtype=torch.uint8)
    return Batch(
        image=torch.rand(samples, 4, *crop, generator=draw),
        brain=torch.ones(samples, *crop, dtype=torch.bool),
        present=torch.ones(samples, 4, dtype=torch.bool),
        available=seen_in(method, stage, samples),
        subject=[f"subject-{sample}" for sample in range(samples)],
        label=values[torch.randint(4, (samples, *crop), generator=draw)],
        hidden_value=method.intensity.hidden_value,
    )


def steps(name: str) -> dict[str, dict]:
    """A few updates of every stage under ZeRO 1 and 3: losses, and sums of absolute weights before and after, by zero/stage/role.

    The ranks see disjoint subsets wherever the method draws any.
    """
    ranks = resolve_environment()
    backend.start(ranks)
    found = {}
    for zero in (1, 3):
        # else all of so small a network would stay whole on every rank
        train = TrainConfig(
            global_batch=ranks.world, steps=STEPS, zero_stage=zero, precision="fp32",
            deepspeed={"zero_optimization": {"stage3_param_persistence_threshold": 1000}} if zero == 3 else {},
        )  # fmt: skip
        for stage in load(name).stages:
            method = small(name)
            before = {role: _size(method, parts.networks) for role, parts in method.roles(stage).items()}
            engines = {role: RoleEngine(role, parts, train, 1, ranks.device) for role, parts in method.roles(stage).items()}
            losses = [_update(engines, method, name, stage, step, ranks) for step in range(STEPS)]
            for role, engine in engines.items():
                with engine.whole_weights():
                    after = _size(method, engine.role.networks)
                found[f"{zero}/{stage}/{role}"] = {"losses": [step[role] for step in losses], "before": before[role], "after": after}
                engine.destroy()
    return found


def _update(engines: dict[str, RoleEngine], method: Method, name: str, stage: str, step: int, ranks) -> dict[str, float]:
    whole = make_batch(method, stage, crop_of(name), ranks.world, seed=step)
    mine = {key: value[ranks.rank : ranks.rank + 1] if isinstance(value, torch.Tensor | list) else value for key, value in vars(whole).items()}
    losses, carry = {}, {}
    for role, engine in engines.items():
        torch.manual_seed(100 * step + ranks.rank)
        with frozen([method.networks[network] for network in engine.role.borrows]):
            output = engine.forward(Batch(**mine), carry, START)
            engine.backward(output.loss)
        assert engine.step()
        carry |= output.carry
        losses[role] = float(output.loss.detach())
    return losses


def _size(method: Method, networks: tuple[str, ...]) -> float:
    return sum(float(p.detach().abs().double().sum()) for network in networks for p in method.networks[network].parameters())
