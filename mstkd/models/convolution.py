"""The 3^3 convolution of MST-KDNet, with what a CPU needs."""

import torch
from torch import Tensor, nn


class Conv3d(nn.Conv3d):
    """nn.Conv3d with kernel 3 and padding 1; on a CPU with a layout that is fast and a precision that is right."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__(inputs, outputs, 3, stride=stride, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return super().forward(x)
        if x.shape[2] == 2:  # oneDNN's bf16 weight gradient is uninitialised memory where the first axis has 2 voxels
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.float())
        # Channels-last makes the bf16 weight gradient of few channels several times faster; group normalisation is
        # slow in that layout.
        return super().forward(x.contiguous(memory_format=torch.channels_last_3d)).contiguous()
