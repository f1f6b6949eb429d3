"""Segmentation networks by name: the trunk of MST-KDNet and MONAI's, with logits and feature maps as one output.

Letters: B samples, M sequences, K channels of the logits, X Y Z voxels.
"""

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from monai.networks.blocks import Convolution, ResidualUnit, UnetBasicBlock, UnetResBlock, UnetUpBlock
from monai.networks.blocks.segresnet_block import ResBlock
from monai.networks.nets import DynUNet, SegResNet, SwinUNETR, UNet
from monai.networks.nets.swin_unetr import SwinTransformerBlock
from torch import Tensor, nn

from mstkd.models.mst_kdnet import MSTKDNetwork, ResidualBlock, Up
from mstkd.models.mst_kdnet import stride as mst_kdnet_stride
from mstkd.models.transformer_unet import Decoder, Layer

Axes = tuple[int, int, int]


class Segmentation(NamedTuple):
    logits: Tensor  # (B, K, X, Y, Z)
    features: tuple[Tensor, ...]  # each (B, C, x, y, z), in the order of Segmenter.features


@dataclass(frozen=True)
class Architecture:
    build: Callable[..., nn.Module]  # (in_channels, out_channels, crop, **arguments)
    stride: Callable[[dict], Axes]  # what each axis of the input must be divisible by
    features: Callable[[nn.Module], tuple[str, ...]]  # the default ones: the deepest map and the last of the decoder


class Segmenter(nn.Module):
    """A network of ARCHITECTURES that returns its logits and the outputs of the submodules named `features`.

    `channels` are those of the feature maps. The parameters' names are the network's own behind `net.`.
    """

    def __init__(
        self, architecture: str, in_channels: int, out_channels: int, crop: Axes, arguments: dict[str, Any] | None = None,
        features: Sequence[str] | None = None,
    ):  # fmt: skip
        """`arguments` go to the network's class. Raises ValueError where they, `features` or the crop (X, Y, Z) do not fit it."""
        super().__init__()
        kind = ARCHITECTURES[architecture]
        if (arguments or {}).get("deep_supervision"):
            raise ValueError("deep_supervision: the losses here take one logit map; leave it out")
        try:
            self.net = kind.build(in_channels, out_channels, crop, **(arguments or {}))
        except Exception as error:  # whatever MONAI raises about its arguments
            raise ValueError(f"{architecture}: {_first_line(error)}") from None
        self.features = tuple(features if features is not None else kind.features(self.net))
        names = dict(self.net.named_modules(remove_duplicate=False))
        if unknown := [name for name in self.features if name not in names]:
            raise ValueError(f"features: {architecture} has no submodule {unknown[0]!r}; its first ones: {', '.join(list(names)[1:9])}")
        self.channels = tuple(self._probe(architecture, in_channels, crop))

    def forward(self, image: Tensor) -> Segmentation:
        """Logits and features of `image` (B, M, X, Y, Z)."""
        with self._listening() as heard:
            output = self.net(image)
        return Segmentation(getattr(output, "logits", output), tuple(heard[name] for name in self.features))

    @contextmanager
    def _listening(self):
        """Yields a dict that the submodules' outputs are put into; for one forward, so that nothing outlives it."""
        heard: dict[str, Tensor] = {}

        def listen(name: str):
            return self.net.get_submodule(name).register_forward_hook(lambda module, inputs, output: heard.__setitem__(name, output))

        handles = [listen(name) for name in self.features]
        try:
            yield heard
        finally:
            for handle in handles:
                handle.remove()

    def _probe(self, architecture: str, in_channels: int, crop: Axes) -> list[int]:
        """The features' channels, from a forward without data or memory."""
        # deepcopy takes what its memo says of a parameter: so the copy never holds weights (functional_call mixes up DynUNet's shared modules)
        memo = {id(p): nn.Parameter(p.to("meta")) for p in self.parameters()} | {id(b): b.to("meta") for b in self.buffers()}
        try:
            with torch.no_grad():
                maps = copy.deepcopy(self, memo)(torch.empty(1, in_channels, *crop, device="meta")).features
        except Exception as error:
            raise ValueError(f"{architecture} cannot take a crop of {list(crop)}: {_first_line(error)}") from None
        if wrong := [name for name, value in zip(self.features, maps, strict=True) if not isinstance(value, Tensor) or value.ndim != 5]:
            raise ValueError(f"features: {wrong[0]!r} of {architecture} is no map (B, C, x, y, z); name another submodule")
        return [value.shape[1] for value in maps]


class Projections(nn.ModuleList):
    """One 1x1x1 convolution per feature map whose channels differ from the wanted ones; the others pass as they are."""

    def __init__(self, channels: Sequence[int], wanted: Sequence[int]):
        super().__init__(nn.Conv3d(c, w, 1) if c != w else nn.Identity() for c, w in zip(channels, wanted, strict=True))

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(project(feature) for project, feature in zip(self, features, strict=True))


def stride(architecture: str, arguments: dict[str, Any]) -> Axes:
    """What each axis (X, Y, Z) of this network's input must be divisible by."""
    return ARCHITECTURES[architecture].stride(arguments)


def _product(strides: Sequence) -> Axes:
    return tuple(math.prod(step if isinstance(step, int) else step[axis] for step in strides) for axis in range(3))


def _monai(network: type[nn.Module], **fixed) -> Callable[..., nn.Module]:
    return lambda m, k, crop, **arguments: network(in_channels=m, out_channels=k, **fixed, **arguments)


def _unet_features(net: nn.Module) -> tuple[str, ...]:
    """UNet is a nest of (down, skip connection around the next, up): the innermost body, the outermost connection."""
    name = "model.1"
    while isinstance(net.get_submodule(f"{name}.submodule"), nn.Sequential) and hasattr(net.get_submodule(f"{name}.submodule")[1], "submodule"):
        name += ".submodule.1"
    return (f"{name}.submodule", "model.1")


def _first_line(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line.rpartition("__init__() ")[2]


ARCHITECTURES = {
    "mst_kdnet": Architecture(MSTKDNetwork, lambda arguments: (mst_kdnet_stride(arguments.get("last_stride", 2)),) * 3, lambda net: ("bottleneck", "up0")),
    "SegResNet": Architecture(
        _monai(SegResNet, spatial_dims=3),
        lambda arguments: (2 ** (len(arguments.get("blocks_down", (1, 2, 2, 4))) - 1),) * 3,
        lambda net: (f"down_layers.{len(net.down_layers) - 1}", f"up_layers.{len(net.up_layers) - 1}"),
    ),
    "UNet": Architecture(_monai(UNet, spatial_dims=3), lambda arguments: _product(arguments.get("strides", ())), _unet_features),
    "DynUNet": Architecture(
        _monai(DynUNet, spatial_dims=3),
        lambda arguments: _product(arguments.get("strides", ())),
        lambda net: ("bottleneck", f"upsamples.{len(net.upsamples) - 1}"),
    ),
    "SwinUNETR": Architecture(
        _monai(SwinUNETR, spatial_dims=3), lambda arguments: (arguments.get("patch_size", 2) ** 5,) * 3, lambda net: ("encoder10", "decoder1")
    ),
}

# what `train.recompute` runs again: no smaller than a residual unit, so that little is kept between them
BLOCKS = (
    ResidualBlock, Up, Layer, Decoder, ResBlock, ResidualUnit, Convolution, UnetBasicBlock, UnetResBlock, UnetUpBlock, SwinTransformerBlock,
)  # fmt: skip
