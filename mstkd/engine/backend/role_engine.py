"""One DeepSpeed engine per role."""

import re
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from mstkd.batch import Batch, Progress, StepOutput
from mstkd.config import TrainConfig
from mstkd.engine.backend.library import deepspeed
from mstkd.engine.backend.loss_scale import LossScale, LossScaleSettings
from mstkd.engine.backend.settings import deepspeed_config, role_settings
from mstkd.errors import UserError
from mstkd.methods import Role

LOSS_SCALE = "loss_scale"  # in the client state of a checkpoint


class RoleEngine:
    """A role's networks, optimiser and gradient reduction under one ZeRO stage."""

    def __init__(self, name: str, role: Role, train: TrainConfig, accumulation: int, device: torch.device):
        settings = role_settings(name, role, train)
        self.name, self.role = name, role
        self.optimizer, self.schedule, self.zero_stage = settings.optimizer, settings.schedule, settings.zero_stage
        role.step.to(device)
        parameters = [p for p in role.step.parameters() if p.requires_grad]
        if train.compile:
            for network in role.step.children():
                network.compile()  # in place: the names of its weights stay
        config = deepspeed_config(name, settings, train, accumulation, sum(p.numel() for p in parameters))
        _forget_autocast()
        self._engine, *_ = deepspeed().initialize(model=role.step, model_parameters=parameters, config=config)
        self.scale = LossScale(self._engine, LossScaleSettings.of(config)) if train.precision == "fp16" else None
        self.rescaled = False  # the last update was skipped because of the loss scale, which has room to fall
        self._base_lr = self.optimizer.lr

    def set_lr_factor(self, factor: float) -> float:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = self._base_lr * factor
        return self._base_lr * factor

    def forward_backward(self, batch: Batch, carry: dict[str, Tensor], progress: Progress) -> StepOutput:
        """One micro-batch: loss and gradients. The engine must be stepped after each one (`step`).

        Raises UserError under `train.deterministic` at an operation that cannot be deterministic.
        """
        self._engine.module.train()
        try:
            output = self._engine(batch, carry, progress)
            self._engine.backward(output.loss)
        except RuntimeError as error:
            if operation := re.match(r"(\S+) does not have a deterministic implementation", str(error)):
                raise UserError(
                    f"train.deterministic: {operation[1]}, which role {self.name} uses, has no deterministic implementation on "
                    f"{batch.image.device.type}; set train.deterministic=false, or replace it in the method"
                ) from error
            raise
        return output

    def step(self) -> bool:
        """Close a micro-batch; at the accumulation boundary update. False if non-finite gradients made it skip (on all ranks)."""
        engine = self._engine
        boundary = engine.is_gradient_accumulation_boundary()
        # Without ZeRO the optimiser would take the NaN: gradients are already equal on all ranks, so each decides alike.
        skip = boundary and self.zero_stage == 0 and not self._gradients_finite()
        if skip and self.scale is None:  # torch's loss scaler must see them, and skips by itself
            engine.zero_grad()
        before, scale = engine.skipped_steps, self.scale and self.scale.value
        engine.step()
        skip |= engine.skipped_steps > before
        self.rescaled = skip and scale is not None and scale > self.scale.settings.smallest
        return not skip

    def _gradients_finite(self) -> bool:
        gradients = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
        return bool(torch.stack(torch._foreach_norm(gradients)).isfinite().all())

    def gradient_norm(self) -> float | None:
        norm = self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def save(self, folder: Path) -> None:
        """Weights and optimiser state into `folder`/<role>. Collective."""
        state = {LOSS_SCALE: self.scale.state()} if self.scale else {}
        self._engine.save_checkpoint(str(folder), tag=self.name, client_state=state, save_latest=False)

    def load(self, folder: Path) -> None:
        """Collective."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            path, state = self._engine.load_checkpoint(str(folder), tag=self.name, load_lr_scheduler_states=False)
        if path is None:
            raise UserError(f"checkpoint {folder.name}: no state for role {self.name}; use an older checkpoint or resume=never")
        if self.scale:
            self.scale.load(state.get(LOSS_SCALE, {}))

    @contextmanager
    def whole_weights(self):
        """Full parameters of the role's networks inside the context, also under ZeRO-3. Collective."""
        if self.zero_stage < 3:
            yield
        else:
            with deepspeed().zero.GatheredParameters(list(self._engine.module.parameters())):
                yield

    def destroy(self) -> None:
        self._engine.destroy()


def _forget_autocast() -> None:
    """DeepSpeed remembers for the whole process that some engine used autocast; the next may be of another precision."""
    deepspeed()
    from deepspeed.runtime import torch_autocast

    torch_autocast.TORCH_AUTOCAST_INITIALIZED, torch_autocast.TORCH_AUTOCAST_DTYPE = False, None
