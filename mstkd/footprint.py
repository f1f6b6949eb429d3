"""Bytes that one role takes on each rank and in a checkpoint, as DeepSpeed 0.19.8 allocates them."""

from dataclasses import dataclass

from torch import nn

from mstkd.engine.backend import PLAIN_BUCKET, RoleSettings
from mstkd.traffic import REUSED, Elements

FP32 = 4  # bytes


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank by part: on the device, and on the host where they are offloaded."""

    weights: float
    gradients: float  # at the end of a backward pass
    moments: float  # of Adam, or SGD's momentum
    master: float  # DeepSpeed's own fp32 copy of the weights that the rank updates
    buffers: float  # in which gradients are collected, reduced and copied
    gathered: float = 0.0  # ZeRO-3: whole weights, between forward and backward
    host: float = 0.0

    @property
    def state(self) -> float:
        """Everything but activations, on the device."""
        return self.weights + self.gradients + self.moments + self.master + self.buffers + self.gathered


def role_memory(settings: RoleSettings, config: dict, elements: Elements, world: int) -> Memory:
    """`config`: DeepSpeed's configuration of the role."""
    stage, whole, part = settings.zero_stage, FP32 * elements.all, FP32 * elements.all / world
    moments = moments_of(settings) * (whole if stage == 0 else part)
    if stage == 0:
        bucket = min(elements.all, PLAIN_BUCKET + elements.largest)  # it is full when a tensor goes over its size
        return Memory(whole, whole, moments, 0, FP32 * bucket if world > 1 else 0)
    buckets = _buckets(config, elements, stage)
    if stage < 3:
        # ZeRO-1 holds whole gradients, and beside them the rank's own part of their mean
        gradients, copies = (whole, part) if stage == 1 else (part, 0)
        if not settings.offload.optimizer:
            return Memory(whole, gradients, moments, part, buckets + copies)
        # on the host: fp32 copy, moments, gradients, and a buffer for the updated weights
        return Memory(whole, whole if stage == 1 else 0, 0, 0, buckets, host=3 * part + moments)
    kept = FP32 * elements.kept * (1 - 1 / world)
    weights, gradients, master, host = part + kept, part, part, 0.0
    if settings.offload.optimizer:
        host += master + moments + 2 * gradients  # as they arrive, and in fp32 for the update
        master = moments = gradients = 0
    if settings.offload.parameters:
        host, weights = host + part, kept
    return Memory(weights, gradients, moments, master, buckets, FP32 * min(elements.all, REUSED), host)


def moments_of(settings: RoleSettings) -> int:
    """Numbers that the optimiser remembers per parameter."""
    optimizer = settings.optimizer
    return 2 if optimizer.name != "sgd" else int(optimizer.momentum > 0)


def _buckets(config: dict, elements: Elements, stage: int) -> float:
    """One bucket per type that travels; two each where communication overlaps with the backward pass."""
    zero = config["zero_optimization"]
    size = min(int(zero["reduce_bucket_size"]), 2**62)
    full, half = elements.all > elements.half, elements.half > 0
    if stage == 3:  # allocated at the start, each in its own type
        return size * (FP32 * full + 2 * half)
    overlap = zero.get("overlap_comm") is True
    return size * FP32 * (full + half) * (2 if overlap else 1)


def checkpoint_bytes(settings: RoleSettings, elements: Elements) -> float:
    """A role's part of one checkpoint, all ranks' files together."""
    whole = FP32 * elements.all
    weights = whole if settings.zero_stage in (1, 2) else 0  # beside the fp32 copy, which is cut by ranks
    return weights + whole + moments_of(settings) * whole


def weight_bytes(networks: list[nn.Module]) -> float:
    """Weights and buffers; also the size of their safetensors."""
    return sum(t.numel() * t.element_size() for network in networks for t in (*network.parameters(), *network.buffers()))
