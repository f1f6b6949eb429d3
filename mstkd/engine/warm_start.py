"""Starting from weights of another run: what fits is taken, what does not is listed layer by layer."""

import logging
from pathlib import Path

from safetensors.torch import load_file

from mstkd.errors import UserError
from mstkd.methods import Method

log = logging.getLogger(__name__)


def warm_start(method: Method, files: list[Path]) -> None:
    """Copy tensors of equal name and shape from safetensors `files` (keys <network>.<parameter>) into the method's networks.

    Raises UserError if not a single tensor fits.
    """
    given = {key: value for file in files for key, value in load_file(file).items()}
    taken = 0
    for name, network in method.networks.items():
        own = network.state_dict()
        for key, value in own.items():
            source = given.get(f"{name}.{key}")
            if source is None:
                log.warning("init_from: %s.%s is not in the file; left as initialised", name, key)
            elif source.shape != value.shape:
                log.warning("init_from: %s.%s is %s in the file and %s here; left as initialised", name, key, tuple(source.shape), tuple(value.shape))
            else:
                value.copy_(source)
                taken += 1
    known = {f"{name}.{key}" for name, network in method.networks.items() for key in network.state_dict()}
    for key in sorted(set(given) - known):
        log.warning("init_from: %s has no place in this method; ignored", key)
    if not taken:
        raise UserError(f"init_from: no tensor of {', '.join(str(f) for f in files)} fits the networks {', '.join(method.networks)}")
    log.info("init_from: %d tensors taken", taken)
