"""The precisions of a recipe (`train.precision`, `inference.precision`): what they compute in, and which devices do."""

import torch

from mstkd.config import Precision
from mstkd.errors import UserError

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}  # over fp32 weights
WITHOUT_BF16 = ("this GPU does not compute in it", "use train.precision=fp16 or fp32")  # what is wrong, what to do


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """A context in which networks on `device` compute in this precision."""
    return torch.autocast(device.type, AUTOCAST.get(precision), enabled=precision in AUTOCAST)


def gpu_computes_bf16() -> bool:
    """Whether this process's GPU does. Older ones (V100, T4) emulate it, slower than fp32: they do not."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def check_precision(precision: Precision, device: torch.device) -> None:
    """Raises UserError where the device does not compute in this precision."""
    if precision == "fp16" and device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        raise UserError("train.precision fp16: this machine's CPU does not compute in it (no AVX512-FP16); use bf16 or fp32, or train on a GPU")
    if precision == "bf16" and device.type == "cuda" and not gpu_computes_bf16():
        raise UserError(f"train.precision bf16: {'; '.join(WITHOUT_BF16)}")
