"""Starting from weights of another run: what fits is taken, what does not is listed layer by layer."""

import logging
from pathlib import Path

from safetensors.torch import load_file

from mstkd.errors import UserError
from mstkd.methods import Method
from mstkd.run_folder import read_record

log = logging.getLogger(__name__)


def check_order(source: Path, method: Method, sequences: tuple[str, ...]) -> None:
    """Raise UserError if networks of the run `source` know one of their first channels as another sequence than these.

    What a file of weights was trained on is not known; it passes, as methods do whose networks know sequences by name.
    """
    if not source.is_dir() or method.any_order:
        return
    theirs = tuple(read_record(source)["data"]["sequences"])
    if any(one != other for one, other in zip(theirs, sequences, strict=False)):
        raise UserError(
            f"init_from {source}: was trained on {', '.join(theirs)}, in that order, and this set has {', '.join(sequences)}: its channels would be taken for "
            "others; build the set in that order, or give the run's .safetensors file to take the weights as they are"
        )


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
