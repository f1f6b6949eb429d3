"""One clock and one finish for every contender; also imported by the program that runs in a peer's own environment.

Only NumPy and PyTorch are imported, and those inside functions: this file must load beside any peer's pins.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from itertools import chain, repeat
from typing import Any


def to_tensor(array: Any) -> Any:
    """`array` as a contiguous, writable tensor of its own dtype: itself where it is that already, else one copy."""
    import numpy as np
    import torch

    if isinstance(array, torch.Tensor):
        array = array.numpy()
    if not (array.flags.writeable and array.flags.c_contiguous):
        array = np.array(array, order="C", copy=True)
    return torch.from_numpy(array)


def check(tensor: Any) -> None:
    """RuntimeError unless `tensor` is contiguous and its memory may be written to."""
    if not (tensor.is_contiguous() and tensor.numpy().flags.writeable):
        raise RuntimeError("a contender delivered a tensor that is not contiguous and writable")


def digests(sample: dict) -> dict[str, str]:
    """Name -> sha256 of a sample's tensors; RuntimeError as `check`."""
    for tensor in sample.values():
        check(tensor)
    return {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in sample.items()}


def dtype_of(sample: dict) -> str:
    """The type of a sample's first tensor, e.g. "float16"."""
    return str(next(iter(sample.values())).dtype).removeprefix("torch.")


class Stopwatch:
    """Measures how fast samples come out of an endless stream made of epochs."""

    def __init__(self, epoch: Callable[[], Iterator[dict]]):
        """`epoch()` yields each sample once: name -> tensor."""
        self._stream = chain.from_iterable(call() for call in repeat(epoch))

    def rate(self, seconds: float) -> float:
        """Samples per second over at least `seconds` and at least one sample."""
        count, start = 0, time.perf_counter()
        while True:
            sample = next(self._stream)
            count, spent = count + 1, time.perf_counter() - start
            del sample  # at most one sample is alive, as in a loop that has used it up
            if spent >= seconds:
                return count / spent
