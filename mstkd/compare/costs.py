"""What an arm took, as far as its run folders say so."""

import json
import struct
from dataclasses import dataclass
from datetime import datetime
from math import prod
from pathlib import Path

from mstkd import attempts
from mstkd.compare.arms import Arm
from mstkd.track.jsonl import read_records

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # of BatchNorm: saved beside parameters


@dataclass(frozen=True)
class Costs:
    """None where the run folders do not say it. Parameters of one run; hours of one seed, all its runs together."""

    scored_parameters: int | None  # of the network that is scored
    trained_parameters: int | None  # of every network whose best weights the run holds; a teacher from elsewhere is not in it
    hours: float | None  # wall time of training with its validations, mean over seeds
    ranks: tuple[int, ...]  # that it ran on
    seconds_per_case: float | None  # one whole-volume prediction of the scored network from one subset, mean over runs
    devices: tuple[str, ...]  # that these were made on


def costs(arm: Arm) -> Costs:
    """The costs of an arm; parameters as in its first run. What was not trained has none."""
    if not arm.seeds:
        return Costs(None, None, None, (), None, ())
    counts = parameter_counts(arm.runs[0].trained)
    hours = [training_hours(run.trained) for run in arm.runs]
    timed = [cost for run in arm.runs if (cost := prediction_cost(run.evaluation, run.network))]
    ranks = {attempt.world_size for run in arm.runs for attempt in attempts.read(run.trained)}
    return Costs(
        scored_parameters=counts.get(arm.runs[0].network),
        trained_parameters=sum(counts.values()) or None,
        hours=sum(hours) / len(arm.seeds) if None not in hours else None,
        ranks=tuple(sorted(ranks)),
        seconds_per_case=sum(cost["seconds_per_case"] for cost in timed) / len(timed) if len(timed) == len(arm.runs) else None,
        devices=tuple(sorted({cost["device"] for cost in timed})),
    )


def parameter_counts(run_dir: Path) -> dict[str, int]:
    """Parameters by network, from the headers of the best weights; nothing is loaded."""
    counts: dict[str, dict[str, int]] = {}
    for pointer in sorted(Path(run_dir).glob("*/checkpoints/best")):
        for file in sorted((pointer.parent / pointer.read_text().strip()).glob("*.safetensors")):
            for name, shape in _shapes(file).items():
                network, _, parameter = name.partition(".")
                if not parameter.endswith(STATISTICS):
                    counts.setdefault(network, {})[parameter] = prod(shape)  # a later stage holds the same network again
    return {network: sum(sizes.values()) for network, sizes in counts.items()}


def training_hours(run_dir: Path) -> float | None:
    """From the start of each attempt to its last record in metrics.jsonl, summed; None if there is neither."""
    last: dict[int, float] = {}
    for record in read_records(Path(run_dir) / "metrics.jsonl"):
        last[record["attempt"]] = max(record["time"], last.get(record["attempt"], 0.0))
    started = {attempt.number: datetime.fromisoformat(attempt.started).timestamp() for attempt in attempts.read(run_dir)}
    spans = [last[number] - start for number, start in started.items() if number in last]
    return sum(max(span, 0.0) for span in spans) / 3600 if spans else None


def prediction_cost(evaluation: Path, network: str) -> dict | None:
    """What the evaluation noted of this network's predictions; None if it noted nothing."""
    path = Path(evaluation) / "cost.json"
    return json.loads(path.read_text()).get(network) if path.is_file() else None


def _shapes(file: Path) -> dict[str, list[int]]:
    """Tensor name -> shape: a safetensors file begins with the length of its JSON header."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
