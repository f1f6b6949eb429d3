"""`metrics.jsonl`: the run folder's own record of its figures, always written, readable without any tracker."""

import json
import math
import time
from pathlib import Path

from mstkd.files import write_text
from mstkd.track.protocol import Tracker

_RESERVED = {"stage", "step", "time", "attempt"}


class JsonlTracker(Tracker):
    """One line per call: {"stage", "step", "time" (seconds since 1970), "attempt", and the metrics by name}.

    A value that is not finite is null. Settings, tags and artifacts lie in the run folder anyway.
    """

    def __init__(self, path: Path, attempt: int):
        self.path = Path(path)
        self.attempt = attempt
        self._rewrite(read_records(self.path))  # a killed attempt may have left half a line

    def log_metrics(self, values: dict[str, float], step: int, stage: str) -> None:
        if taken := _RESERVED & values.keys():
            raise ValueError(f"metric names {sorted(taken)} belong to the record itself")
        finite = {name: float(value) if math.isfinite(value) else None for name, value in values.items()}
        record = {"stage": stage, "step": step, "time": round(time.time(), 3), "attempt": self.attempt, **finite}
        with self.path.open("a") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")

    def child(self, name: str, tags: dict[str, object] | None = None, *, start_step: int | None = None) -> Tracker:
        if start_step is not None:
            last = start_step or -1  # a fresh start writes the record of the untrained state, step 0, again
            self._rewrite([r for r in read_records(self.path) if r["stage"] != name or r["step"] <= last])
        return self

    def _rewrite(self, records: list[dict]) -> None:
        """Replace the file by `records` in one move."""
        write_text(self.path, "".join(json.dumps(record, allow_nan=False) + "\n" for record in records))


def read_records(path: Path) -> list[dict]:
    """The records of a `metrics.jsonl`, [] if there is none; a last line cut short by a kill is left out."""
    path = Path(path)
    if not path.exists():
        return []
    *complete, _ = path.read_text().split("\n")
    return [json.loads(line) for line in complete]
