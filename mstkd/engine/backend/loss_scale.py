"""The dynamic loss scale of fp16.

Under autocast to fp16 DeepSpeed 0.19 scales by torch's GradScaler, which is right without ZeRO. Under ZeRO 1-3 it never lowers the
scale after an overflow, clips the scaled gradients and leaves the scale out of checkpoints; there its own loss scaler, which
knows all of that, takes the place.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LossScaleSettings:
    """Halved after an overflow, doubled after `window` updates without one. From the user's `fp16` section, else these."""

    initial: float = 2.0**16
    window: int = 1000
    hysteresis: int = 1  # overflows that are needed to halve it; ZeRO 1-3
    smallest: float = 1.0  # an overflow at this scale is no overflow but a diverged run

    @classmethod
    def of(cls, config: dict) -> "LossScaleSettings":
        """From DeepSpeed's configuration of a role."""
        section = config.get("fp16", {})
        return cls(
            2.0 ** section.get("initial_scale_power", 16), section.get("loss_scale_window", cls.window),
            section.get("hysteresis", cls.hysteresis), section.get("min_loss_scale", cls.smallest),
        )  # fmt: skip


class LossScale:
    """Of one DeepSpeed engine that computes in fp16."""

    def __init__(self, engine, settings: LossScaleSettings):
        self._engine, self.settings = engine, settings
        self._plain = None  # torch's, without ZeRO
        if engine.torch_autocast_z0_gradscaler is not None:
            device = next(engine.module.parameters()).device
            self._plain = torch.amp.GradScaler(device.type, init_scale=settings.initial, growth_interval=settings.window)
            engine.torch_autocast_z0_gradscaler = self._plain
        else:
            from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

            engine.optimizer.torch_autocast_gradscaler = None
            engine.optimizer.dynamic_loss_scale = True
            engine.optimizer.loss_scaler = DynamicLossScaler(
                settings.initial, settings.window, settings.smallest, settings.hysteresis, consecutive_hysteresis=False,
                raise_error_at_min_scale=False,
            )  # fmt: skip

    @property
    def value(self) -> float:
        return float(self._plain.get_scale() if self._plain else self._engine.optimizer.loss_scaler.cur_scale)

    def state(self) -> dict:
        """What a checkpoint must hold besides the optimiser's state, which has it under ZeRO 1-3."""
        return self._plain.state_dict() if self._plain else {}

    def load(self, state: dict) -> None:
        if self._plain and state:
            self._plain.load_state_dict(state)
