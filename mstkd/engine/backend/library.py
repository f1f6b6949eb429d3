"""Where DeepSpeed is imported: late, because it takes several seconds."""

import io
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import torch


def deepspeed():
    """The module, quiet below warnings."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # it would look for others, and say so
    import deepspeed as library

    library.utils.logger.setLevel(logging.WARNING)
    return library


@contextmanager
def silenced() -> Iterator[None]:
    """Without what DeepSpeed says on the way: progress bars, reports, warnings. What fails still raises."""
    logger = deepspeed().utils.logger
    try:
        logger.setLevel(logging.ERROR)
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(logging.WARNING)
