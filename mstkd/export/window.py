"""What `predict` asks of a method for one window, as one module: what is written down as a graph."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mstkd.batch import hide
from mstkd.errors import UserError
from mstkd.methods import Method
from mstkd.models.symmetric import symmetric_form
from mstkd.subsets import Subset, all_subsets, possible_subsets

TOLERANCE = 1e-2  # of a graph's logits, relative to their largest one: rounding stays far below, another computation far above


class WindowNetwork(nn.Module):
    """Logits (B, K, X, Y, Z) of image (B, M, X, Y, Z) in the method's intensities and available (B, M) bool, in float32.

    Whatever stands in a hidden sequence counts for nothing. Every subset takes the same path through the network.
    """

    def __init__(self, method: Method, network: str):
        super().__init__()
        self.networks = nn.ModuleDict({name: method.networks[name] for name in (network, *method.companions.get(network, ()))})
        self.method, self.network = (method,), network  # a tuple: its other networks are no part of this
        self.eval().requires_grad_(False)

    def forward(self, image: Tensor, available: Tensor) -> Tensor:
        (method,) = self.method
        visible = hide(image, available, method.intensity.hidden_value)
        with symmetric_form():
            return method.predict(visible, available, self.network).float()


def example(sequences: int, window: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """A window of noise with every sequence, batch 1, the same in every call."""
    image = torch.randn(1, sequences, *window, generator=torch.Generator().manual_seed(0))
    return image, torch.ones(1, sequences, dtype=torch.bool)


def tried_subsets(method: Method, sequences: tuple[str, ...]) -> list[Subset]:
    """Every sequence alone, one pair and all of them, as far as the method takes these."""
    listed = all_subsets(sequences)
    tried = [*listed[: len(sequences) + 1], listed[-1]]
    return [subset for subset in possible_subsets(sequences, method.subsets) if subset in tried] or possible_subsets(sequences, method.subsets)[:1]


class LabelRule(nn.Module):
    """Label maps (B, X, Y, Z) uint8 of logits (B, K, X, Y, Z)."""

    def __init__(self, method: Method):
        super().__init__()
        self.method = (method,)

    def forward(self, logits: Tensor) -> Tensor:
        return self.method[0].to_labels(logits)


def checked(method: Method, network: str, image: Tensor, subsets: list[Subset], graph: Callable[[Tensor, Tensor], Tensor]) -> str:
    """How near `graph` comes to what `predict` computes, in words. Raises UserError where it computes something else."""
    found = largest_difference(method, network, image, subsets, graph)
    if not found <= TOLERANCE:
        raise UserError(f"{network}: its graph differs from the network by {found:.1e} of the largest logit; nothing was written")
    return f"differs from torch by {found:.1e} of the largest logit at most, in {len(subsets)} subsets"


@torch.no_grad()
def largest_difference(method: Method, network: str, image: Tensor, subsets: list[Subset], graph: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Between the logits of `graph` and those of the method as `predict` runs it, over the subsets, relative to the largest logit."""
    worst = 0.0
    for subset in subsets:
        available = torch.tensor([subset])
        visible = hide(image, available, method.intensity.hidden_value)
        expected = method.predict(visible, available, network).float()
        worst = max(worst, float((graph(image, available) - expected).abs().max() / expected.abs().max()))
    return worst
