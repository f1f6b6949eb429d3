"""What the cases of training were like, in a few figures: kept in the run folder, so that new cases can be compared where the data is not."""

import json
from collections.abc import Sequence
from typing import Any

from mstkd.data.remote import open_folder
from mstkd.errors import UserError
from mstkd.shards.layout import FINGERPRINT


def training_ranges(places: Sequence[str]) -> dict[str, Any] | None:
    """Over the shard sets at `places`, from their fingerprints; None where one has none, or cannot be read.

    `spacing_mm`: smallest and largest along X, Y, Z of the files; `z_score`: by sequence, the smallest and the largest of the subjects'
    farthest voxels, in standard deviations from the brain's mean; `subsets`: the sequences that subjects have, joined by +.
    """
    try:
        found = [json.loads(open_folder(place).read_bytes(FINGERPRINT)) for place in places]
        return _joined(found)
    except (UserError, OSError, ValueError, KeyError, TypeError):  # no fingerprint, or one of another version: nothing to compare with
        return None


def _joined(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    spacings = [prints["file_spacing_mm"] for prints in found]
    farthest: dict[str, list[float]] = {}
    for prints in found:
        for name, sequence in prints["sequences"].items():
            if spread := sequence["z_score"]:
                farthest.setdefault(name, []).extend((spread["min"], spread["max"]))
    return {
        "spacing_mm": [[pick(axis) for axis in zip(*(each[key] for each in spacings))] for key, pick in (("min", min), ("max", max))],
        "z_score": {name: [min(values), max(values)] for name, values in farthest.items()},
        "subsets": sorted({name for prints in found for name in prints["subsets"]}),
    }
