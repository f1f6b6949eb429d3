"""Where DeepSpeed is imported: late, because it takes several seconds."""

import logging


def deepspeed():
    """The module, quiet below warnings."""
    import deepspeed as library

    library.utils.logger.setLevel(logging.WARNING)
    return library
