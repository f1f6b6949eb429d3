"""One DeepSpeed engine per role; the only file that imports deepspeed."""

import logging
import os
import subprocess
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, nn

from mstkd.batch import Batch, Progress, StepOutput
from mstkd.config import OptimizerConfig, RoleConfig, ScheduleConfig, TrainConfig, WatchdogConfig
from mstkd.engine.environment import Ranks
from mstkd.engine.jit_cache import JitCache, one_builder, place_caches
from mstkd.errors import UserError
from mstkd.methods import Role

REDUCE_BUCKET = 500_000_000  # elements; DeepSpeed's default, but never larger than the role
_DEEPSPEED_OPTIMIZER = {"adam": "Adam", "adamw": "AdamW", "sgd": "SGD"}


def start(ranks: Ranks, watchdog: WatchdogConfig = WatchdogConfig()) -> None:
    """Join the process group (nccl on GPUs, gloo on CPUs). Collective.

    Raises UserError where DeepSpeed's collectives for CPU ranks do not compile.
    """
    cache = place_caches()
    if ranks.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        _compile_collectives(cache)
    else:
        torch.cuda.set_device(ranks.device)
    backend = "nccl" if ranks.device.type == "cuda" else "gloo"
    if ranks.world == 1 and not torch.distributed.is_initialized():  # alone: no port that another process could take first
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    timeout = timedelta(minutes=watchdog.collective_min)  # rank 0 may hash or copy for longer than DeepSpeed's 10 minutes
    _deepspeed().init_distributed(dist_backend=backend, timeout=timeout, verbose=False)


def _compile_collectives(cache: JitCache) -> None:
    """DeepSpeed's shared-memory collectives: compiled by one rank per node here; init_distributed then finds them loaded."""
    _deepspeed()
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or not builder.is_compatible():
        return
    try:
        with one_builder(cache, builder.name):
            builder.load()
    except (RuntimeError, ImportError, OSError, subprocess.SubprocessError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        reason = next((line for line in lines if "error:" in line or "not found" in line), lines[0])[:200]
        raise UserError(
            f"{cache.folder}: DeepSpeed's collectives for CPU ranks do not compile ({reason}); "
            "install g++, ninja and the headers of Python on every node, see mstkd doctor"
        ) from error


def shutdown() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


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


class RoleEngine:
    """A role's networks, optimiser and gradient reduction under one ZeRO stage."""

    def __init__(self, name: str, role: Role, train: TrainConfig, accumulation: int, device: torch.device):
        settings = role_settings(name, role, train)
        self.name, self.role = name, role
        self.optimizer, self.schedule, self.zero_stage = settings.optimizer, settings.schedule, settings.zero_stage
        role.step.to(device)
        parameters = [p for p in role.step.parameters() if p.requires_grad]
        self._engine, *_ = _deepspeed().initialize(
            model=role.step,
            model_parameters=parameters,
            config=_deepspeed_config(settings, train, accumulation, sum(p.numel() for p in parameters)),
        )
        self._base_lr = self.optimizer.lr

    def set_lr_factor(self, factor: float) -> float:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = self._base_lr * factor
        return self._base_lr * factor

    def forward_backward(self, batch: Batch, carry: dict[str, Tensor], progress: Progress) -> StepOutput:
        """One micro-batch: loss and gradients. The engine must be stepped after each one (`step`)."""
        self._engine.module.train()
        output = self._engine(batch, carry, progress)
        self._engine.backward(output.loss)
        return output

    def step(self) -> bool:
        """Close a micro-batch; at the accumulation boundary update. False if non-finite gradients made it skip (on all ranks)."""
        engine = self._engine
        boundary = engine.is_gradient_accumulation_boundary()
        # Without ZeRO the optimiser would take the NaN: gradients are already equal on all ranks, so each decides alike.
        skip = boundary and self.zero_stage == 0 and not self._gradients_finite()
        if skip:
            engine.zero_grad()
        before = engine.skipped_steps
        engine.step()
        return not (skip or engine.skipped_steps > before)

    def _gradients_finite(self) -> bool:
        gradients = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
        return bool(torch.stack(torch._foreach_norm(gradients)).isfinite().all())

    def gradient_norm(self) -> float | None:
        norm = self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def save(self, folder: Path) -> None:
        """Weights and optimiser state into `folder`/<role>. Collective."""
        self._engine.save_checkpoint(str(folder), tag=self.name, save_latest=False)

    def load(self, folder: Path) -> None:
        """Collective."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            path, _ = self._engine.load_checkpoint(str(folder), tag=self.name, load_lr_scheduler_states=False)
        if path is None:
            raise UserError(f"checkpoint {folder.name}: no state for role {self.name}; use an older checkpoint or resume=never")

    @contextmanager
    def whole_weights(self):
        """Full parameters of the role's networks inside the context, also under ZeRO-3. Collective."""
        if self.zero_stage < 3:
            yield
        else:
            with _deepspeed().zero.GatheredParameters(list(self._engine.module.parameters())):
                yield

    def destroy(self) -> None:
        self._engine.destroy()


@contextmanager
def frozen(networks: list[nn.Module]):
    """No gradient for `networks` inside the context; each parameter's `requires_grad` is restored afterwards."""
    parameters = [(p, p.requires_grad) for network in networks for p in network.parameters()]
    for parameter, _ in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in parameters:
            parameter.requires_grad_(flag)


def _deepspeed():
    import deepspeed  # several seconds; only when training starts

    deepspeed.utils.logger.setLevel(logging.WARNING)
    return deepspeed


def _deepspeed_config(settings: RoleSettings, train: TrainConfig, accumulation: int, parameters: int) -> dict:
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
