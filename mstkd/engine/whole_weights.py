"""Whole weights of a stage's networks, also where ZeRO-3 has cut them over the ranks."""

from safetensors.torch import save

from mstkd.engine.environment import Ranks
from mstkd.engine.new_files import NewFiles
from mstkd.engine.stage import Stage
from mstkd.methods import Method


class WholeWeights:
    def __init__(self, stage: Stage, ranks: Ranks):
        self.stage, self.ranks = stage, ranks
        self._copy: Method | None = None

    def method(self) -> Method:
        """The method with full weights: itself, or under ZeRO-3 a plain copy, whose forwards need no other rank. Collective."""
        if all(engine.zero_stage < 3 for engine in self.stage.engines.values()):
            return self.stage.method
        if self._copy is None:
            self._copy = self._plain_copy()
        for network in self._copy.networks.values():
            if next(network.parameters()).device.type != "meta":
                network.to(self.ranks.device)
        for engine in self.stage.engines.values():
            with engine.whole_weights():
                for name in engine.role.results:
                    self._copy.networks[name].load_state_dict(self.stage.method.networks[name].state_dict())
        return self._copy

    def put_away(self) -> None:
        """The copy waits in host memory until it is asked for again: under ZeRO-3 it is what the device has no room for."""
        if self._copy is not None:
            for network in self._copy.networks.values():
                if next(network.parameters()).device.type != "meta":
                    network.to("cpu")

    def _plain_copy(self) -> Method:
        """A method whose frozen networks hold their weights, and whose others wait for theirs."""
        method = self.stage.plain_copy()
        frozen = self.stage.method.needs(self.stage.name).keys() - {name for engine in self.stage.engines.values() for name in engine.role.results}
        for name, network in method.networks.items():
            if name not in frozen:
                network.to(self.ranks.device)
            elif self.stage.config.teacher.placement == "replicate":
                network.to(self.ranks.device).load_state_dict(self.stage.method.networks[name].state_dict())
            else:
                network.to("meta")  # too big to be held whole: its use fails
        return method

    def write(self, files: NewFiles) -> None:
        """<role>.safetensors: what evaluate, predict, export and later stages read. Collective."""
        for role, engine in self.stage.engines.items():
            with engine.whole_weights():
                if self.ranks.main:
                    weights = {
                        f"{name}.{key}": value.detach().cpu().contiguous().clone()
                        for name in engine.role.results
                        for key, value in self.stage.method.networks[name].state_dict().items()
                    }
                    content = save(weights)  # save_file makes files for the owner alone
                    files.write(f"{role}.safetensors", lambda stream: stream.write(content))
