"""Meta data that cannot be true is refused, by `verify` and for tars of others."""

import json
import math

import pytest
from tiny_shards import TARS, members_of, write_set

from mstkd.errors import UserError
from mstkd.shards.meta_check import check_meta
from mstkd.shards.spec import SubjectMeta
from mstkd.shards.verify import verify

KEY = TARS[0][0]
META = json.loads(members_of(KEY)["meta.json"])
STATS = META["stats"]["t1"]


def stats(**changes):
    return {"stats": {**META["stats"], "t1": {**STATS, **changes}}}


WRONG = [
    (stats(std=0), "stats.t1: std must be above 0"),
    (stats(std=-1), "stats.t1: std must be above 0"),
    (stats(p0_1=STATS["p99_9"] + 1), "stats.t1: .* must rise"),
    (stats(mean=math.inf), "not finite"),
    ({"spacing_mm": [1, 0, 1]}, "spacing_mm .* is not above 0"),
    ({"original_affine": [[0.0] * 4] * 4}, "original_affine is no"),
    ({"orientation": "XYZ"}, "orientation XYZ is not that of original_affine"),
    ({"original_shape": [2, 2, 2]}, "crop_box .* leaves the grid"),
]


def test_sound_meta_data_pass():
    check_meta(SubjectMeta.model_validate(META))


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_each_contradiction_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        check_meta(SubjectMeta.model_validate({**META, **changes}))


def test_verify_names_the_subject(tmp_path):
    folder = write_set(tmp_path / "set", TARS, replace={(KEY, "meta.json"): json.dumps({**META, **stats(std=-1)}).encode()})
    first, *others = [key for tar in TARS for key in tar]
    (folder / "splits.json").write_text(json.dumps({"folds": [{"train": others, "val": [first]}]}))
    with pytest.raises(UserError, match=f"subject {KEY}: meta.json: stats.t1: std must be above 0"):
        verify(folder)
