"""One DeepSpeed engine per role."""

import functools
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from mstkd.batch import Batch, Progress, StepOutput
from mstkd.config import TrainConfig
from mstkd.engine.backend.library import deepspeed
from mstkd.engine.backend.loss_scale import LossScale, LossScaleSettings
from mstkd.engine.backend.settings import deepspeed_config, role_settings
from mstkd.engine.backend.universal import load_own, load_universal
from mstkd.engine.new_files import NewFiles
from mstkd.errors import UserError
from mstkd.methods import Role

PLAIN_BUCKET = 2**25  # elements of the copy through which gradients are reduced without ZeRO
LOSS_SCALE = "loss_scale"  # in the client state of a checkpoint


class RoleEngine:
    """A role's networks, optimiser and gradient reduction under one ZeRO stage."""

    def __init__(self, name: str, role: Role, train: TrainConfig, accumulation: int, device: torch.device):
        settings = role_settings(name, role, train)
        self.name, self.role = name, role
        self.optimizer, self.schedule, self.zero_stage = settings.optimizer, settings.schedule, settings.zero_stage
        role.step.to(device)
        parameters = [p for p in role.step.parameters() if p.requires_grad]
        if train.compile and not role.double_backward:  # AOTAutograd knows no second derivative
            for network in role.step.children():
                network.compile()  # in place: the names of its weights stay
        config = deepspeed_config(name, settings, train, accumulation, sum(p.numel() for p in parameters))
        _forget_autocast()
        self._engine, *_ = deepspeed().initialize(model=role.step, model_parameters=parameters, config=config)
        from mstkd.engine.backend.writer import Writer

        self._engine.checkpoint_engine = Writer()
        if self.zero_stage == 0:
            self._engine.allreduce_gradients = self._reduction(self._engine.allreduce_gradients)
        self._engine._copy_recovery_script = lambda folder: None  # a script for another layout, and rank 0 alone could fail at it
        self.scale = LossScale(self._engine, LossScaleSettings.of(config)) if train.precision == "fp16" else None
        self.rescaled = False  # the last update was skipped because of the loss scale, which has room to fall
        self._base_lr = self.optimizer.lr
        self._norm: Tensor | None = None  # of the gradients, where DeepSpeed keeps none

    def _reduction(self, allreduce: Callable) -> Callable:
        """Without ZeRO DeepSpeed reduces through a copy of all gradients, on one rank, too."""
        if torch.distributed.get_world_size() == 1:
            return lambda: None
        return functools.partial(allreduce, bucket_size=PLAIN_BUCKET)

    def set_lr_factor(self, factor: float) -> float:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = self._base_lr * factor
        return self._base_lr * factor

    def forward(self, batch: Batch, carry: dict[str, Tensor], progress: Progress) -> StepOutput:
        """The loss of one micro-batch; `backward` and `step` must follow.

        Raises UserError under `train.deterministic` at an operation that cannot be deterministic, as `backward` does.
        """
        self._engine.module.train()
        with self._determinism_asked_for(batch.available.device):
            return self._engine(batch, carry, progress)

    def backward(self, loss: Tensor) -> None:
        """Gradients of one micro-batch, reduced over the ranks when its ZeRO stage does so."""
        with self._determinism_asked_for(loss.device):
            self._engine.backward(loss)

    @contextmanager
    def _determinism_asked_for(self, device: torch.device) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if operation := re.match(r"(\S+) does not have a deterministic implementation", str(error)):
                raise UserError(
                    f"train.deterministic: {operation[1]}, which role {self.name} uses, has no deterministic implementation on "
                    f"{device.type}; set train.deterministic=false, or replace it in the method"
                ) from error
            raise

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
        norms = torch.stack(torch._foreach_norm(gradients))
        finite = bool(norms.isfinite().all())  # the one value that every update without ZeRO waits for
        if finite:
            self._norm = torch.linalg.vector_norm(norms) / (self.scale.value if self.scale else 1)  # of scaled gradients, still
        return finite

    def gradient_norm(self) -> float | None:
        """Of the newest update, before clipping; None before the first one. Where ZeRO skipped it, it is not finite."""
        norm = self._norm if self.zero_stage == 0 else self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def shapes(self) -> dict[str, list[int]]:
        """Of every parameter and buffer that is saved, in order."""
        state = self._engine.module.state_dict(keep_vars=True)
        return {name: list(getattr(value, "ds_shape", value.shape)) for name, value in state.items()}  # ds_shape: under ZeRO-3 the whole one

    def save(self, files: NewFiles) -> None:
        """Weights and optimiser state into the folder <role>. Collective."""
        state = {LOSS_SCALE: self.scale.state()} if self.scale else {}
        self._engine.checkpoint_engine.files = files
        self._engine.save_checkpoint(str(files.folder), tag=self.name, client_state=state, save_latest=False)

    def load(self, folder: Path, universal: bool = False) -> None:
        """From `folder`/<role>; `universal`: as `convert` wrote it. Collective."""
        load = load_universal if universal else load_own
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            path, state = load(self._engine, folder, self.name)
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
