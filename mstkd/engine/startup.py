"""Where the time from the command to the first update goes."""

import logging
import time

import psutil

log = logging.getLogger(__name__)


class Startup:
    """Seconds of the stretches between the process's start and the first update; said once."""

    def __init__(self):
        self._last = psutil.Process().create_time()
        self.seconds: dict[str, float] = {}
        self._said = False

    def reached(self, stretch: str) -> None:
        """The stretch that ends here, since the one before."""
        now = time.time()
        self.seconds[stretch] = self.seconds.get(stretch, 0.0) + now - self._last
        self._last = now

    def first_update(self) -> dict[str, float]:
        """Figures of the start, once; after the first call nothing."""
        if self._said:
            return {}
        self._said = True
        self.reached("first_update")
        total = sum(self.seconds.values())
        log.info("first update after %.1f s: %s", total, ", ".join(f"{name.replace('_', ' ')} {s:.1f}" for name, s in self.seconds.items()))
        return {"startup/total_s": total, **{f"startup/{name}_s": s for name, s in self.seconds.items()}}
