"""Asking a run to stop: a signal sets a flag, the ranks agree at the next step boundary.

Never save inside a handler: DeepSpeed's save is collective and a handler runs on one rank at an arbitrary line.
"""

import signal
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class Stopped(Exception):
    """All ranks agreed to stop, at a point where everything is saved."""


def weightier(reason: str | None, other: str | None) -> str | None:
    """Of two signal names the one that decides: a wish to end (SIGTERM, SIGINT) outweighs a wish to go on later (SIGUSR2)."""
    order = [None, "SIGUSR2", "SIGINT", "SIGTERM"]
    return max(reason, other, key=order.index)


class StopFlag:
    """`reason` names the weightiest signal received, or is None."""

    def __init__(self):
        self.reason: str | None = None
        self._interrupted = False

    def __bool__(self) -> bool:
        return self.reason is not None

    def set(self, number: int, _frame=None) -> None:
        if self._interrupted and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C is impatience, not a request
        self._interrupted |= number == signal.SIGINT
        self.reason = weightier(self.reason, signal.Signals(number).name)


@contextmanager
def stop_signals():
    """Yields a StopFlag that SIGTERM, SIGINT and SIGUSR2 set; restores the previous handlers afterwards."""
    flag = StopFlag()
    previous = {number: signal.signal(number, flag.set) for number in SIGNALS}
    try:
        yield flag
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
