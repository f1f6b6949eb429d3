"""From a recipe to DeepSpeed's configuration of each role."""

from dataclasses import dataclass

import torch

from mstkd.config import OptimizerConfig, RoleConfig, ScheduleConfig, TrainConfig
from mstkd.errors import UserError
from mstkd.methods import Role

REDUCE_BUCKET = 500_000_000  # elements; DeepSpeed's default, but never larger than the role
_DEEPSPEED_OPTIMIZER = {"adam": "Adam", "adamw": "AdamW", "sgd": "SGD"}


def check_precision(precision: str, device: torch.device) -> None:
    if precision == "fp16":
        raise UserError("train.precision fp16 is not built yet: it needs a loss scale that survives a resume; use bf16 or fp32")
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise UserError("train.precision bf16 is not supported by this GPU; use fp32")


@dataclass(frozen=True)
class RoleSettings:
    """What the method declares for a role, with the recipe's `train.roles` overrides applied."""

    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    zero_stage: int
    gradient_clipping: float


def role_settings(name: str, role: Role, train: TrainConfig) -> RoleSettings:
    """Raises UserError where the role cannot run under its ZeRO stage."""
    override = train.roles.get(name, RoleConfig())
    settings = RoleSettings(
        override.optimizer or role.optimizer,
        override.schedule or role.schedule,
        train.zero_stage if override.zero_stage is None else override.zero_stage,
        train.gradient_clipping if override.gradient_clipping is None else override.gradient_clipping,
    )
    if role.double_backward and settings.zero_stage == 3:
        raise UserError(f"train.roles.{name}.zero_stage: {name} differentiates twice, which ZeRO-3 cannot; use 0, 1 or 2")
    return settings


def deepspeed_config(settings: RoleSettings, train: TrainConfig, accumulation: int, parameters: int) -> dict:
    optimizer = settings.optimizer
    config = {
        "train_batch_size": train.global_batch,
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": settings.gradient_clipping,  # always written: DeepSpeed's silent default is 1.0
        "steps_per_print": 2**62,
        "zero_allow_untested_optimizer": True,  # plain SGD
        "optimizer": {"type": _DEEPSPEED_OPTIMIZER[optimizer.name], "params": _optimizer_parameters(optimizer)},
        # DeepSpeed allocates the bucket whole: never larger than the role itself
        "zero_optimization": {"stage": settings.zero_stage, "reduce_bucket_size": min(REDUCE_BUCKET, max(parameters, 1))},
    }
    if train.precision == "bf16":  # autocast keeps fp32 weights, which BatchNorm needs
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return config


def _optimizer_parameters(optimizer: OptimizerConfig) -> dict:
    common = {"lr": optimizer.lr, "weight_decay": optimizer.weight_decay}
    if optimizer.name == "sgd":
        return common | {"momentum": optimizer.momentum}
    # torch_adam: no compiled op, so no nvcc; adam_w_mode False: weight decay as an L2 gradient
    return common | {"betas": list(optimizer.betas), "torch_adam": True, "adam_w_mode": optimizer.name == "adamw"}
