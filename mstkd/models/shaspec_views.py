"""ShaSpec's classification form: shared and specific encoders of views that may differ in kind and shape.

Letters: B samples, M views, F features, K classes. Normalisation is per sample, so that samples of a batch, and the
ranks of a run, do not see each other.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

SMALL_ENOUGH = 8  # along the longer side of an image, where its features are put into one vector
MOST_CHANNELS = 128


def stem(shape: tuple[int, ...], width: int) -> nn.Module:
    """From a view (B, *shape) to features (B, width): a vector (n,), an image (H, W), or one with channels first (C, H, W).

    Raises ValueError for any other shape.
    """
    if len(shape) == 1:
        return nn.Sequential(nn.Linear(shape[0], width), nn.LayerNorm(width), nn.ReLU())
    if len(shape) not in (2, 3):
        raise ValueError(f"a view of shape {shape} is neither a vector nor an image")
    layers: list[nn.Module] = [nn.Unflatten(1, (1, shape[0]))] if len(shape) == 2 else []
    channels, sides = (1 if len(shape) == 2 else shape[0]), shape[-2:]
    wider = 16
    while True:
        layers += [nn.Conv2d(channels, wider, 3, padding=1), nn.GroupNorm(4, wider), nn.ReLU()]
        channels, wider = wider, min(2 * wider, MOST_CHANNELS)
        if max(sides) <= SMALL_ENOUGH:
            break
        layers.append(nn.MaxPool2d(2, ceil_mode=True))
        sides = tuple(-(-side // 2) for side in sides)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * sides[0] * sides[1], width), nn.LayerNorm(width), nn.ReLU())


def body(width: int) -> nn.Module:
    """(B, F) -> (B, F)."""
    return nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, width))


class ResidualFusion(nn.Module):
    """f_i = r_i + P([r_i; s_i]) where view i is available, else the mean of the available shared features (P is not applied)."""

    def __init__(self, width: int):
        super().__init__()
        self.projection = nn.Linear(2 * width, width)

    def forward(self, shared: Tensor, specific: Tensor, available: Tensor) -> Tensor:
        """(B, M, F) from r and s (B, M, F) and `available` (B, M) bool. What stands at views that are not available is not used."""
        own = shared + self.projection(torch.cat([shared, specific], dim=-1))
        here = available[..., None]
        generated = torch.where(here, shared, 0).sum(1, keepdim=True) / here.sum(1, keepdim=True)
        return torch.where(here, own, generated)


class SharedSpecificClassifier(nn.Module):
    """One encoder shared by all views, behind a stem per view that gives them one size; one encoder of its own per view; FC-dropout-FC."""

    def __init__(self, views: Mapping[str, tuple[int, ...]], classes: int, width: int, hidden: int, dropout: float):
        """`views`: name -> shape. Raises ValueError for a shape that is neither a vector nor an image."""
        super().__init__()
        self.stems = nn.ModuleDict({f"view_{name}": stem(shape, width) for name, shape in views.items()})  # a bare name may be one of nn.Module's own
        self.shared = body(width)
        self.specific = nn.ModuleDict({f"view_{name}": nn.Sequential(stem(shape, width), body(width)) for name, shape in views.items()})
        self.domain = nn.Linear(width, len(views))
        self.fusion = ResidualFusion(width)
        self.head = nn.Sequential(nn.Linear(len(views) * width, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, classes))

    def forward(self, views: Mapping[str, Tensor], available: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (B, K), shared features (B, M, F) and domain logits (B, M, M) of the specific ones.

        `views` (B, *shape) by name, `available` (B, M) bool. Every encoder runs whatever is available: all ranks call
        the same modules equally often.
        """
        shared = torch.stack([self.shared(self.stems[f"view_{name}"](view)) for name, view in views.items()], dim=1)
        specific = torch.stack([self.specific[f"view_{name}"](view) for name, view in views.items()], dim=1)
        fused = self.fusion(shared, specific, available)
        return self.head(fused.flatten(1)), shared, self.domain(specific)
