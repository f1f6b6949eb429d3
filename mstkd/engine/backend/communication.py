"""The time that DeepSpeed's collectives take."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mstkd.engine.backend.library import deepspeed
from mstkd.engine.clock import Clock

COLLECTIVES = (
    "all_reduce", "all_reduce_coalesced", "reduce", "reduce_scatter", "reduce_scatter_tensor", "broadcast",
    "all_gather", "all_gather_into_tensor", "all_gather_base", "all_gather_coalesced", "all_to_all_single",
)  # fmt: skip


@contextmanager
def timed_collectives(clock: Clock) -> Iterator[None]:
    """Every collective of DeepSpeed inside the block counts as `communication`, also the wait for one that runs beside the compute."""
    group = deepspeed().comm.comm.cdb
    originals = {name: getattr(group, name) for name in COLLECTIVES if hasattr(group, name)}
    for name, collective in originals.items():
        setattr(group, name, _timed(collective, clock))
    try:
        yield
    finally:
        for name in originals:
            delattr(group, name)  # the instance's own attribute: the class has the original


def _timed(collective: Callable, clock: Clock) -> Callable:
    @functools.wraps(collective)
    def call(*args, **kwargs):
        with clock.part("communication"):
            handle = collective(*args, **kwargs)
        return handle if handle is None or not hasattr(handle, "wait") else _TimedHandle(handle, clock)

    return call


class _TimedHandle:
    """A collective under way; all but the wait is the handle's own."""

    def __init__(self, handle, clock: Clock):
        self._handle, self._clock = handle, clock

    def wait(self, *args, **kwargs):
        with self._clock.part("communication"):
            return self._handle.wait(*args, **kwargs)

    def __getattr__(self, name: str):
        return getattr(self._handle, name)
