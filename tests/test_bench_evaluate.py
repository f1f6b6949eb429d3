"""`mstkd bench evaluate` at a tiny size: both contenders give equal figures, and the report says where the time goes."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from nibabel.affines import voxel_sizes
from scipy import ndimage
from small_mst_kdnet import NETWORK
from trained_run import make_run

from mstkd.bench import evaluation as bench
from mstkd.bench import straightforward
from mstkd.errors import UserError
from mstkd.evaluate.cases import Row, diagonal_mm
from mstkd.evaluate.inference import evaluation_mode
from mstkd.evaluate.metrics import Reference
from mstkd.evaluate.scoring import Score

COMMAND = [sys.executable, "-c", "from mstkd.launch.cli import main; main()", "bench", "evaluate"]
TINY = bench.Settings(cases=2, size=32, overrides=("data.crop=[32,32,32]", f"method.network={json.dumps(NETWORK)}"))


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    return bench._generated(TINY, tmp_path_factory.mktemp("bench"), lambda line: None)


@pytest.fixture(scope="module")
def turns(generated):
    return [bench._turn(generated, key) for key in generated.subjects]


def test_both_give_the_same_figures_in_every_cell(generated, turns):
    assert len(generated.subsets) == 15 and len(turns) == 2
    assert all(0 <= turn.difference <= bench.TOLERANCE for turn in turns)


def test_the_report_says_where_the_time_goes(turns):
    figures = {entry.name: entry for entry in bench.evaluation_figures(turns)}
    for name in ("straightforward loop", "mstkd"):
        whole, rest, inference = (figures[f"{name}, {part}"] for part in ("whole", "all but inference", "inference"))
        assert [rest.low > 0, inference.low > 0, whole.low >= inference.low] == [True] * 3
    assert figures["mstkd, metrics"].versus.keys() == {"loop"} and "versus" not in figures["straightforward loop, metrics"].versus
    reached = {target.name: target for target in bench.targets(list(figures.values()))}
    assert [target.at_least for target in reached.values()] == [None, 5, 5]
    assert reached["whole, straightforward / mstkd"].reached == pytest.approx(1 / figures["mstkd, whole"].versus["loop"])


def test_what_is_scored_is_like_what_networks_predict(generated, turns):
    assert all(0.1 < turn.dice < 0.95 for turn in turns)
    sample = generated.source.subject(generated.subjects[0])
    volume = generated.predictor.volume(sample.image, sample.brain, sample.meta)
    with evaluation_mode(generated.predictor.method):
        maps = [generated.predictor.labels("student", volume, subset) for subset in generated.subsets[:4]]
    assert all(not np.array_equal(one, other) for one, other in zip(maps, maps[1:]))


def test_the_network_is_really_run(generated):
    method, image = generated.predictor.method, torch.zeros(1, 4, 32, 32, 32)
    calls = []
    handle = method.networks["student"].register_forward_hook(lambda *_: calls.append(1))
    with evaluation_mode(method):
        method.predict(image, torch.ones(1, 4, dtype=torch.bool))
    handle.remove()
    assert calls == [1]


def test_figures_that_differ_end_it():
    row, subset = Row("student", "a", "flair", "WT", Score(0.5, 9, 9, 4.0)), (True, False)

    def difference(dice, hd95_mm, in_double=9.0):
        return bench.largest_difference({(subset, "WT"): (dice, hd95_mm)}, [row], ("flair", "t1"), lambda *_: in_double)

    assert difference(0.5, 4.0) == 0 and difference(0.5, 4 + 2e-6) == pytest.approx(5e-7)
    assert difference(0.5, 4.0001, in_double=4.0) == 0  # single precision was at fault
    with pytest.raises(UserError, match="HD95 of WT given flair is 4 here and 4.1 by MONAI"):
        difference(0.5, 4.1, in_double=4.1)
    with pytest.raises(UserError, match="Dice of WT given flair is 0.5 here and 0.50001 by MONAI"):
        difference(0.50001, 4.0)


def test_monais_distances_in_double_precision_are_ours(generated):
    sample, rng = generated.source.subject(generated.subjects[0]), np.random.default_rng(0)
    truth, prediction = (ndimage.gaussian_filter(rng.random(sample.meta.original_shape), 2) > 0.5 for _ in range(2))
    exact = straightforward.hd95_in_double_mm(prediction, truth, sample.meta)
    assert Reference(truth, tuple(voxel_sizes(np.array(sample.meta.original_affine))), 1.0).hd95_mm(prediction) == pytest.approx(exact, rel=1e-7)


def test_a_trained_run_is_measured_on_its_test_split(tmp_path):
    run, lines = make_run(tmp_path), []
    report = bench.bench_evaluate(bench.Settings(cases=1, run=run), lines.append)
    assert lines == ["case 1 of 1, 15 subsets"] and report.settings["data"] == "a run's test split"
    values = json.loads(report.to_json())
    assert [target["verdict"] for target in values["targets"]][0] == "pass" and {"monai", "scipy"} < values["versions"].keys()
    assert str(tmp_path) not in report.to_json()


def test_the_loop_knows_the_conventions_of_empty_masks(generated):
    meta = generated.source.subject(generated.subjects[0]).meta
    nothing, something = np.zeros((2, *meta.original_shape), bool)
    something[3:6, 3:6, 3:6] = True
    assert straightforward._figures(nothing, nothing, meta) == (1, 0) and straightforward._figures(something, something, meta) == (1, 0)
    assert straightforward._figures(nothing, something, meta) == straightforward._figures(something, nothing, meta) == (0, diagonal_mm(meta))


def test_bad_input_is_one_line(tmp_path):
    done = subprocess.run([*COMMAND, "--json", tmp_path / "no" / "a.json"], capture_output=True, text=True)
    assert done.returncode == 2 and "not a file in a folder that exists" in done.stderr and "Traceback" not in done.stderr
    with pytest.raises(UserError, match="is not a run folder"):
        bench.bench_evaluate(bench.Settings(run=tmp_path), lambda line: None)
