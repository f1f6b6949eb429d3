"""M2DN's network without diffusion: one pass from the observed sequences and the mask to all of them.

The comparator that shows what sampling is for. Network, loss, patterns, optimiser, moving average and ablation switches are those of `m2dn`;
missing sequences are background instead of noise, and t is always 1. It learns the mean of what there could be, so that it is expected to win in
PSNR and to blur.
"""

import torch
from torch import Tensor

from mstkd.batch import Batch
from mstkd.methods.m2dn import CompletionConfig, CompletionStep, SliceCompletion, missing_of
from mstkd.models.diffusion import hidden


class OneShotStep(CompletionStep):
    def completed(self, batch: Batch, missing: Tensor) -> Tensor:
        return self.network(batch.visible(), once(missing), missing)


class OneShot(SliceCompletion):
    Config = CompletionConfig
    paper = "none: m2dn without diffusion"
    reproduces = "one pass of the same network, all else equal"

    def step(self, network: torch.nn.Module) -> OneShotStep:
        return OneShotStep(network, self.config)

    @torch.no_grad()
    def predict(self, image: Tensor, available: Tensor, network: str = "student") -> Tensor:
        self.check_available(available)
        missing = missing_of(available)
        gone = hidden(missing)
        seen = image.masked_fill(gone, self.intensity.hidden_value)
        return torch.where(gone, self.networks[network](seen, once(missing), missing).to(image.dtype), image)


def once(missing: Tensor) -> Tensor:
    """t (B,) for v (B, M)."""
    return torch.ones(len(missing), device=missing.device)


METHOD = OneShot
