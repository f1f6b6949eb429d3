"""`mstkd bench predict` at a tiny size: equal logits in the same box, and figures of every contender."""

import json
import subprocess
import sys

import pytest
import torch
from small_mst_kdnet import NETWORK

from mstkd.bench.evaluation import Settings, bench_cases
from mstkd.bench.prediction import BOX, OURS, TOLERANCE, WHOLE, Meter, _difference, _on_file, _turn, prediction_figures, targets
from mstkd.errors import UserError
from mstkd.evaluate.inference import evaluation_mode

COMMAND = [sys.executable, "-c", "from mstkd.launch.cli import main; main()", "bench", "predict"]
TINY = Settings(cases=2, size=48, overrides=("data.crop=[32,32,32]", f"method.network={json.dumps(NETWORK)}"))


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return bench_cases(TINY, tmp_path_factory.mktemp("bench"), lambda line: None)


@pytest.fixture(scope="module")
def measured(given):
    meter = Meter(given.predictor.device)
    with evaluation_mode(*given.predictor.methods):
        turns = [_turn(given, key, meter, first) for first, key in enumerate(given.subjects)]
    return meter, turns


def test_logits_are_monais_in_the_same_box_and_labels_nearly_on_the_whole_file(measured):
    _, turns = measured
    assert all(turn.difference <= TOLERANCE and 0 < turn.box_share < 1 and turn.other_labels < 0.05 for turn in turns)


def test_the_report_has_time_and_memory_of_every_contender(measured):
    figures = prediction_figures(*measured)
    named = {entry.name: entry for entry in figures}
    for name in (OURS, BOX, WHOLE):
        assert named[f"{name}: inference"].median > 0 and named[f"{name}: processor time"].median > 0
        assert named[f"{name}: peak memory"].median > 1e-3  # its maps alone
    reached = {target.name: target for target in targets(figures)}
    assert reached["logits, largest difference in the same box"].verdict == "pass"
    times = [named[f"{name}: inference"].median for name in (WHOLE, OURS)]
    assert reached["throughput, mstkd / MONAI on the whole file"].reached == pytest.approx(times[0] / times[1])
    assert reached["peak memory, mstkd / MONAI on the whole file"].at_most == 1


def test_the_whole_file_holds_the_box_where_it_lay_and_background_around(given):
    predictor, sample = given.predictor, given.source.subject(given.subjects[0])
    volume = predictor.volume(sample.image, sample.brain, sample.meta)
    whole, place = _on_file(volume, predictor.intensity.apply)
    assert whole.shape == (1, 4, 48, 48, 48) and torch.equal(whole[(..., *place)], volume.image[(..., *volume.inner)])
    whole[(..., *place)] = 0
    assert not whole.any()


def test_logits_that_differ_end_it_and_bad_input_is_one_line(tmp_path):
    assert _difference(torch.tensor([100.0, 0.5]), torch.tensor([100.0005, 0.5])) == pytest.approx(5e-6, rel=0.1)
    with pytest.raises(UserError, match="logits differ from MONAI's by 0.1; report this"):
        _difference(torch.tensor([0.6]), torch.tensor([0.5]))
    done = subprocess.run([*COMMAND, "--json", tmp_path / "no" / "a.json"], capture_output=True, text=True)
    assert done.returncode == 2 and "not a file in a folder that exists" in done.stderr and "Traceback" not in done.stderr
