"""Exponential moving averages of networks that a role trains (mean teacher, arXiv:1703.01780)."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import nn

from mstkd.engine.backend import RoleEngine
from mstkd.engine.distributed import average_buffers
from mstkd.engine.environment import Ranks
from mstkd.engine.frozen import freeze
from mstkd.engine.new_files import NewFiles
from mstkd.errors import UserError

FILE = "averages.safetensors"  # in the role's folder of a checkpoint, keys <network>.<parameter>


class Averages:
    """The averages that a role declares, plain frozen modules in fp32, whole on every rank.

    `a <- d a + (1 - d) w` per named parameter after the applied update k, counted from 0, `d = min(decay, (a + k) / (b + k))`
    with the role's `ramp` (a, b), so that the first ones follow a network which still changes fast; buffers are copied, and
    averaged over the ranks.
    Under ZeRO-3 each update gathers the role's whole weights once: as many bytes as one more forward.
    """

    def __init__(self, engine: RoleEngine, networks: dict[str, nn.Module], ranks: Ranks):
        """Begin as copies of the followed networks. Collective."""
        self.engine, self.ranks = engine, ranks
        self.pairs = {name: (networks[name], networks[followed]) for name, followed in engine.role.averages.items()}
        for name, (average, _) in self.pairs.items():
            freeze(average, name, {engine.name: engine.role})
        self._follow(decay=0.0)

    def update(self, step: int) -> None:
        """Take in the weights after the update `step`, counted from 0. Collective under ZeRO-3 and with running statistics."""
        above, below = self.engine.role.ramp
        self._follow(min(self.engine.role.decay, (above + step) / (below + step)))

    @torch.no_grad()
    def _follow(self, decay: float) -> None:
        if not self.pairs:
            return
        with self.engine.whole_weights():
            for average, followed in self.pairs.values():
                mine, theirs = (dict(network.named_parameters()) for network in (average, followed))
                for name, weight in mine.items():
                    weight.lerp_(theirs[name].to(weight), 1 - decay)
                for ours, other in zip(average.buffers(), followed.buffers(), strict=True):
                    ours.copy_(other)
        average_buffers({name: average for name, (average, _) in self.pairs.items()}, self.ranks)

    def save(self, files: NewFiles) -> None:
        """Beside the role's state in a checkpoint."""
        if self.pairs and self.ranks.main:
            content = save(self._state())
            files.write(f"{self.engine.name}/{FILE}", lambda stream: stream.write(content))

    def load(self, folder: Path) -> None:
        """As `save` left it, on any rank count and under any ZeRO stage."""
        if not self.pairs:
            return
        path = folder / self.engine.name / FILE
        if not path.is_file():
            raise UserError(f"checkpoint {folder.name}: no {FILE} for role {self.engine.name}; use an older checkpoint or resume=never")
        saved = load_file(path)
        for name, (average, _) in self.pairs.items():
            average.load_state_dict({key.removeprefix(f"{name}."): value for key, value in saved.items() if key.startswith(f"{name}.")})

    def _state(self) -> dict[str, torch.Tensor]:
        return {
            f"{name}.{key}": value.detach().cpu().contiguous().clone()
            for name, (average, _) in self.pairs.items()
            for key, value in average.state_dict().items()
        }
