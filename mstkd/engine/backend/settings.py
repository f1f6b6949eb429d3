"""From a recipe to DeepSpeed's configuration of each role."""

from dataclasses import dataclass
from typing import Any

import torch

from mstkd.config import OffloadConfig, OptimizerConfig, RoleConfig, ScheduleConfig, TrainConfig
from mstkd.engine.backend.library import deepspeed
from mstkd.engine.backend.user_json import Owned, merge
from mstkd.errors import UserError
from mstkd.methods import Role
from mstkd.precision import AUTOCAST

REDUCE_BUCKET = 500_000_000  # elements; DeepSpeed's default, but never larger than the role
_DEEPSPEED_OPTIMIZER = {"adam": "Adam", "adamw": "AdamW", "sgd": "SGD"}


@dataclass(frozen=True)
class RoleSettings:
    """What the method declares for a role, with the recipe's `train.roles` overrides applied."""

    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    zero_stage: int
    gradient_clipping: float
    offload: OffloadConfig


def role_settings(name: str, role: Role, train: TrainConfig) -> RoleSettings:
    """Raises UserError where the role cannot run under its ZeRO stage."""
    override = train.roles.get(name, RoleConfig())
    settings = RoleSettings(
        override.optimizer or role.optimizer,
        override.schedule or role.schedule,
        train.zero_stage if override.zero_stage is None else override.zero_stage,
        train.gradient_clipping if override.gradient_clipping is None else override.gradient_clipping,
        override.offload or train.offload,
    )
    stage, offload = settings.zero_stage, _key("offload", name, train)
    if train.compile and stage == 3:
        raise UserError(f"train.compile: {name} runs under ZeRO-3, whose fetching of weights torch.compile cannot follow; use zero_stage 0, 1 or 2")
    if role.double_backward and stage == 3:
        raise UserError(f"train.roles.{name}.zero_stage: {name} differentiates twice, which ZeRO-3 cannot; use 0, 1 or 2")
    if settings.offload.optimizer and stage == 0:
        raise UserError(f"{offload}.optimizer: {name} runs under ZeRO-0, which offloads nothing; use zero_stage 1, 2 or 3")
    if settings.offload.parameters and stage != 3:
        raise UserError(f"{offload}.parameters: {name} runs under ZeRO-{stage}, and only ZeRO-3 offloads parameters; use zero_stage 3")
    return settings


def deepspeed_config(name: str, settings: RoleSettings, train: TrainConfig, accumulation: int, parameters: int) -> dict:
    """DeepSpeed's configuration of the role `name` with so many `parameters`: the user's own (`train.deepspeed`) and ours.

    Raises UserError where the two contradict.
    """
    owned = {
        "train_batch_size": Owned(train.global_batch, "train.global_batch"),
        "train_micro_batch_size_per_gpu": Owned(train.micro_batch, "train.micro_batch"),
        "gradient_accumulation_steps": Owned(accumulation, "train.global_batch, train.micro_batch or the number of ranks"),
        # always written: DeepSpeed's silent default is 1.0
        "gradient_clipping": Owned(settings.gradient_clipping, _key("gradient_clipping", name, train)),
        "zero_allow_untested_optimizer": Owned(True, None),  # plain SGD
        "zero_optimization.stage": Owned(settings.zero_stage, _key("zero_stage", name, train)),
        **_optimizer(name, settings, train),
        **_offload(name, settings, train),
        **_precision(train),
    }
    defaults = {
        "steps_per_print": 2**62,
        # DeepSpeed allocates the bucket whole: never larger than the role itself
        "zero_optimization.reduce_bucket_size": min(REDUCE_BUCKET, max(parameters, 1)),
    }
    if settings.optimizer.name != "sgd" and not settings.offload.optimizer:
        defaults["optimizer.params.fused"] = True  # in one pass; torch's other forms make copies as large as the weights
    return merge(train.deepspeed, owned, defaults)


def check_role(name: str, role: Role, train: TrainConfig, accumulation: int) -> RoleSettings:
    """The role's settings, once everything about them has been checked. Raises UserError."""
    settings = role_settings(name, role, train)
    _check_config(deepspeed_config(name, settings, train, accumulation, sum(p.numel() for p in role.step.parameters())))
    return settings


def _check_config(config: dict) -> None:
    """Raise UserError where DeepSpeed itself refuses the configuration: a section's unknown key, or a value out of range."""
    deepspeed()
    from deepspeed.runtime.config import DeepSpeedConfig

    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    alone = {"train_batch_size": world, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    try:
        DeepSpeedConfig({**config, **alone})
    except Exception as error:  # pydantic's, its own and assertions
        if hasattr(error, "errors"):
            first = error.errors()[0]
            said = f"{error.title} {'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
        else:
            said = str(error).split("\n")[0]
        raise UserError(f"train.deepspeed: DeepSpeed refuses it: {said}; correct the JSON") from None


def _key(setting: str, name: str, train: TrainConfig) -> str:
    """Where the recipe sets this for the role, or for all roles."""
    special = name in train.roles and getattr(train.roles[name], setting) is not None
    return f"train.roles.{name}.{setting}" if special else f"train.{setting}"


def _optimizer(name: str, settings: RoleSettings, train: TrainConfig) -> dict[str, Owned]:
    optimizer, key = settings.optimizer, f"train.roles.{name}.optimizer"
    values: dict[str, Any] = {"lr": optimizer.lr, "weight_decay": optimizer.weight_decay}
    if optimizer.name == "sgd":
        values |= {"momentum": optimizer.momentum, "nesterov": optimizer.nesterov}
    else:
        values |= {"betas": list(optimizer.betas)}
    owned = {f"optimizer.params.{name}": Owned(value, f"{key}.{name}") for name, value in values.items()}
    if optimizer.name != "sgd":
        # torch's Adam: no compiled op, so no nvcc; on the host DeepSpeed's own. adam_w_mode False: weight decay as an L2 gradient
        owned["optimizer.params.torch_adam"] = Owned(not settings.offload.optimizer, _key("offload", name, train) + ".optimizer")
        owned["optimizer.params.adam_w_mode"] = Owned(optimizer.name == "adamw", f"{key}.name")
    return {"optimizer.type": Owned(_DEEPSPEED_OPTIMIZER[optimizer.name], f"{key}.name"), **owned}


def _offload(name: str, settings: RoleSettings, train: TrainConfig) -> dict[str, Owned]:
    """Both sections, where the recipe or the user's JSON has them."""
    zero, key = train.deepspeed.get("zero_optimization"), _key("offload", name, train)
    owned = {}
    for section, part in (("offload_optimizer", "optimizer"), ("offload_param", "parameters")):
        wanted = getattr(settings.offload, part)
        if wanted or isinstance(zero, dict) and isinstance(zero.get(section), dict):
            owned[f"zero_optimization.{section}.device"] = Owned("cpu" if wanted else "none", f"{key}.{part}")
    return owned


def _precision(train: TrainConfig) -> dict[str, Owned]:
    """bf16 and fp16 are autocast over fp32 weights, which BatchNorm needs; DeepSpeed's own sections would cast the weights."""
    key = "train.precision, which computes over fp32 weights"
    owned = {f"{section}.enabled": Owned(False, key) for section in ("bf16", "fp16")}
    owned["torch_autocast.enabled"] = Owned(train.precision in AUTOCAST, key)
    if train.precision in AUTOCAST:
        owned["torch_autocast.dtype"] = Owned(str(AUTOCAST[train.precision]).removeprefix("torch."), key)
    if train.precision == "fp16":
        owned["fp16.loss_scale"] = Owned(0, None)  # dynamic
    return owned
