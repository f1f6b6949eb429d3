"""A folder of predictions: case by case, in parts, after an interruption, with bad cases, from lists, with warnings and overlays."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from trained_run import make_run

from mstkd.errors import CasesFailedError, UserError
from mstkd.launch.cli import main
from mstkd.predict import Beside, predict_folder
from mstkd.predict.output import Output
from mstkd.predict.overlay import draw_overlay
from mstkd.shards.dataset import SPEC_FOLDER
from mstkd.shards.spec import LABEL_SCHEMES

NAMES = ("flair", "t1", "t1ce", "t2")
SUBJECTS = [f"Phantom_{number:04d}" for number in range(6)]
COMMAND = [sys.executable, "-c", "from mstkd.launch.cli import main; main()", "predict"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}  # for the toy method


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("folder"))


@pytest.fixture
def cases(run, tmp_path):
    """A copy of six subjects' folders."""
    for subject in SUBJECTS:
        shutil.copytree(run.parents[1] / "nifti" / subject, tmp_path / "input" / subject)
    return tmp_path / "input"


def scan(cases, subject, name):
    return cases / subject / f"{subject}_{name}.nii.gz"


def voxels(path):
    return np.asanyarray(nib.load(path).dataobj)


def read(folder):
    """predictions.json without what differs from run to run."""
    noted = json.loads((folder / "predictions.json").read_text())
    for case in noted["cases"].values():
        assert case.pop("seconds") > case.pop("inference_seconds") > 0
    return noted


def files(folder):
    """What was written, hidden records left out."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file() and ".cases" not in path.parts and path.name != "predictions.json"}


def mstkd(monkeypatch, capsys, *words):
    """Exit code, stdout and stderr of `mstkd predict`, in this process."""
    monkeypatch.setattr(sys, "argv", ["mstkd", "predict", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code or 0, *capsys.readouterr()


def test_predictions_say_by_what_and_of_what(run, cases, tmp_path, capsys):
    written = predict_folder(run, cases, tmp_path / "out")
    assert written == [tmp_path / "out" / f"{subject}.nii.gz" for subject in SUBJECTS]
    noted = read(tmp_path / "out")
    assert list(noted["cases"]) == SUBJECTS and noted["failed"] == {} and noted["unchecked"] == []
    labels = voxels(written[1])
    voxel_ml = abs(np.linalg.det(nib.load(written[1]).affine[:3, :3])) / 1000
    for region, values in LABEL_SCHEMES["brats2018"].regions.items():
        assert noted["cases"][SUBJECTS[1]]["volumes_ml"][region] == pytest.approx(np.isin(labels, values).sum() * voxel_ml, abs=1e-3)
    assert noted["cases"][SUBJECTS[1]]["volumes_ml"]["WT"] > 0 and noted["cases"][SUBJECTS[1]]["warnings"] == []
    (weights,) = noted["runs"][0]["weights_sha256"]["distill"]
    assert len(weights) == 64 and noted["runs"][0] | {"weights_sha256": 0} == {"name": "toy", "method": "toys.linear", "fold": 0, "seed": 0, "weights_sha256": 0}
    text = (tmp_path / "out" / "predictions.json").read_text()
    assert str(tmp_path) not in text and str(run) not in text and os.uname().nodename not in text
    assert "6 cases in" in capsys.readouterr().err


def test_a_killed_run_goes_on_and_ends_with_the_same_files(run, cases, tmp_path):
    words = ["inference.overlap=0.8", "--overlay", "--uncertainty"]
    beside, overrides = Beside(uncertainty=True, overlay=True), words[:1]
    predict_folder(run, cases, tmp_path / "whole", beside=beside, overrides=overrides)
    command = [*COMMAND, run, *words, "--input", cases, "--output", tmp_path / "out"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        assert process.stdout.readline().startswith(SUBJECTS[0])  # is done
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "out" / "predictions.json").exists()
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.nii.gz")}
    assert 0 < len(done) < len(SUBJECTS)
    predict_folder(run, cases, tmp_path / "out", beside=beside, overrides=overrides)
    first = min(done)
    assert first.stat().st_mtime_ns == done[first]  # not made again
    assert files(tmp_path / "out") == files(tmp_path / "whole") and len(files(tmp_path / "out")) == 3 * len(SUBJECTS)
    assert read(tmp_path / "out") == read(tmp_path / "whole")


def test_what_changed_is_predicted_again_and_other_settings_are_refused(run, cases, tmp_path, capsys):
    out = tmp_path / "out"
    predict_folder(run, cases, out)
    before = read(out)
    scan(cases, SUBJECTS[2], "t1").unlink()
    (out / f"{SUBJECTS[3]}.nii.gz").unlink()
    capsys.readouterr()
    predict_folder(run, cases, out)
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == SUBJECTS[2:4]
    after = read(out)
    assert after["cases"][SUBJECTS[2]]["subset"] == "flair+t1ce+t2" and {**after["cases"], SUBJECTS[2]: 0} == {**before["cases"], SUBJECTS[2]: 0}
    scan(cases, SUBJECTS[2], "t2").write_bytes(b"no longer an image")
    with pytest.raises(CasesFailedError, match=f"1 of 6 cases failed: {SUBJECTS[2]}"):
        predict_folder(run, cases, out)
    assert not (out / f"{SUBJECTS[2]}.nii.gz").exists()  # it was of other files
    after = read(out)
    assert list(after["failed"]) == [SUBJECTS[2]] and len(after["cases"]) == 5 and "5 of 6 cases lie there already" in capsys.readouterr().err
    for words, named in (
        ({"overrides": ["inference.overlap=0.25"]}, r"settings.inference.overlap 0.5, and now it is 0.25"),
        ({"beside": Beside(overlay=True)}, "settings.overlay False, and now it is True"),
    ):
        with pytest.raises(UserError, match=f"out: was begun with {named}; put it back, or choose another --output"):
            predict_folder(run, cases, out, **words)
    other = shutil.copytree(run, tmp_path / "other")
    (weights,) = other.rglob("both.safetensors")
    save_file({key: 2 * value for key, value in load_file(weights).items()}, weights)
    with pytest.raises(UserError, match="was begun with runs.0.weights_sha256.distill"):
        predict_folder(other, cases, out)
    assert read(out) == after


def test_parts_share_a_folder_in_any_order_and_at_once(run, cases, tmp_path):
    predict_folder(run, cases, tmp_path / "whole")
    (bad := scan(cases, SUBJECTS[1], "t2")).write_bytes(bad.read_bytes()[:1000])
    with pytest.raises(CasesFailedError):
        predict_folder(run, cases, tmp_path / "bad")
    out = tmp_path / "out"
    assert [path.name for path in predict_folder(run, cases, out, part=(3, 3))] == [f"{SUBJECTS[2]}.nii.gz", f"{SUBJECTS[5]}.nii.gz"]
    assert list(read(out)["cases"]) == [SUBJECTS[2], SUBJECTS[5]]
    commands = [[*COMMAND, run, "--input", cases, "--output", out, "--part", f"{number}/3"] for number in (1, 2)]
    processes = [subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) for command in commands]
    assert [process.communicate()[1].count(f"1 of 2 cases failed: {SUBJECTS[1]}") for process in processes] == [0, 1]
    assert [process.returncode for process in processes] == [0, 1]
    assert read(out) == read(tmp_path / "bad") and files(out) == files(tmp_path / "bad")
    assert {**files(tmp_path / "whole")}.items() > files(out).items()


def _fill(folder, number):
    output = Output(Path(folder))
    with output.claimed(f"s{number}") as record:
        record.write({"case": {"number": number}})
    output.summarise({}, [])


def test_of_many_processes_that_end_at_once_none_is_forgotten(tmp_path):
    output = Output(tmp_path / "out")
    with output.opened():
        output.settle({"a": 1})
    context = multiprocessing.get_context("fork")
    for start in range(0, 60, 12):
        processes = [context.Process(target=_fill, args=(str(tmp_path / "out"), number)) for number in range(start, start + 12)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())["cases"]) == start + 12


def test_a_case_that_another_process_holds_is_left_to_it(run, cases, tmp_path, capsys):
    out = tmp_path / "out"
    predict_folder(run, cases, out, part=(1, 6))
    with Output(out).claimed(SUBJECTS[1]) as record:
        assert record.read() is None
        written = predict_folder(run, cases, out)
    assert [path.stem.removesuffix(".nii") for path in written] == [SUBJECTS[0], *SUBJECTS[2:]]
    assert f"{SUBJECTS[1]}: another process predicts it" in capsys.readouterr().err and SUBJECTS[1] not in read(out)["cases"]


def spoil(cases):
    """One good case, and one for every way to be bad; subject -> what must be said."""
    path = scan(cases, SUBJECTS[1], "t2")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    image = nib.load(scan(cases, SUBJECTS[2], "t1"))
    nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj)[:-1], image.affine), scan(cases, SUBJECTS[2], "t1"))
    data = voxels(scan(cases, SUBJECTS[3], "flair")).astype(np.float32)
    data[5, 5, 5] = np.nan
    nib.save(nib.Nifti1Image(data, image.affine), scan(cases, SUBJECTS[3], "flair"))
    nib.save(nib.Nifti1Image(data[:, :, 5], image.affine), scan(cases, SUBJECTS[4], "flair"))
    for name in NAMES:
        scan(cases, SUBJECTS[5], name).unlink()
    (cases / "Others").mkdir()
    shutil.copy(scan(cases, SUBJECTS[0], "t1"), cases / "Others" / "DWI.nii.gz")
    return {
        SUBJECTS[1]: f"{SUBJECTS[1]}_t2.nii.gz: truncated or not a NIfTI; copy or download it again",
        SUBJECTS[2]: f"{SUBJECTS[2]}_t1.nii.gz: shape", SUBJECTS[3]: f"{SUBJECTS[3]}_flair.nii.gz: holds NaN or infinite values",
        SUBJECTS[4]: f"{SUBJECTS[4]}_flair.nii.gz: expected a volume with 3 axes, found shape (32, 32)",
        SUBJECTS[5]: f"subject {SUBJECTS[5]}: no flair", "Others": "Others: holds NIfTI files, but none that data set phantom names",
    }  # fmt: skip


def test_bad_cases_are_named_the_others_go_on_and_the_exit_code_tells(run, cases, tmp_path, monkeypatch, capsys):
    sound, said = {name: scan(cases, SUBJECTS[1], name).read_bytes() for name in NAMES}, spoil(cases)
    words = (run, "--input", cases, "--output", tmp_path / "out")
    code, out, err = mstkd(monkeypatch, capsys, *words)
    assert code == 1 and out.splitlines() == [f"{SUBJECTS[0]}: flair+t1+t1ce+t2"]
    lines = [line for line in err.splitlines() if ": failed: " in line]
    assert len(lines) == 6 and all(any(line.startswith(f"{subject}: failed: ") for line in lines) for subject in said)
    assert err.splitlines()[-1].startswith("error: 6 of 7 cases failed: Others, Phantom_0001, Phantom_0002, Phantom_0003, Phantom_0004, ...; the others are in")
    noted = read(tmp_path / "out")
    assert list(noted["cases"]) == SUBJECTS[:1] and noted["failed"].keys() == said.keys()
    for subject, text in said.items():
        assert noted["failed"][subject].startswith(text)
    assert str(tmp_path) not in json.dumps(noted)
    for name, content in sound.items():
        scan(cases, SUBJECTS[1], name).write_bytes(content)
    shutil.rmtree(cases / "Others")
    code, out, err = mstkd(monkeypatch, capsys, *words)
    assert code == 1 and out.splitlines() == [f"{SUBJECTS[1]}: flair+t1+t1ce+t2"] and "4 of 6 cases failed" in err
    assert list(read(tmp_path / "out")["cases"]) == SUBJECTS[:2] and "Others" not in read(tmp_path / "out")["failed"]


def test_what_no_case_can_help_ends_with_one_line_and_code_2(run, cases, tmp_path, monkeypatch, capsys):
    def fails(message, *words, output=tmp_path / "out", input=cases):
        code, out, err = mstkd(monkeypatch, capsys, *words, "--input", input, "--output", output)
        assert code == 2 and out == "" and len(err.splitlines()) == 1 and message in err, err
        assert not (tmp_path / "out").exists()

    (tmp_path / "file").write_text("")
    (tmp_path / "strange").mkdir()
    nib.save(nib.load(scan(cases, SUBJECTS[0], "t1")), tmp_path / "strange" / "DWI.nii.gz")
    (tmp_path / "empty").mkdir()
    fails("no case can be predicted: ", run, input=tmp_path / "strange")
    fails("no case of data set phantom; expected {subject}/{subject}_flair.nii.gz", run, input=tmp_path / "empty")
    fails("no such folder", run, input=tmp_path / "absent")
    fails("Not a directory", run, output=tmp_path / "file" / "out")
    fails("exists already, and not from mstkd predict", run, output=cases)
    fails("--part 3/2: give I/N", run, "--part", "3/2")
    fails("no RUN given", "inference.overlap=0.5")
    fails("is not a run folder", run, tmp_path / "empty")
    (tmp_path / "lr=3").symlink_to(run)
    fails("overlop", tmp_path / "lr=3", "inference.overlop=0.5")


# lists


def test_a_list_names_the_cases_and_any_of_their_sequences(run, cases, tmp_path):
    predict_folder(run, cases, tmp_path / "folder")
    rows = ["subject,flair,t1,t1ce,t2"]
    for number, subject in enumerate(SUBJECTS[:3]):
        given = [name for name in NAMES if (number, name) not in ((1, "t1"), (2, "flair"), (2, "t2"))]
        rows.append(",".join([subject, *(f"input/{scan(cases, subject, name).relative_to(cases)}" if name in given else "" for name in NAMES)]))
    (tmp_path / "cases.csv").write_text("\n".join([*rows, f"{SUBJECTS[3]},,,,"]))
    with pytest.raises(CasesFailedError):
        predict_folder(run, tmp_path / "cases.csv", tmp_path / "csv")
    noted = read(tmp_path / "csv")
    assert [case["subset"] for case in noted["cases"].values()] == ["flair+t1+t1ce+t2", "flair+t1ce+t2", "t1+t1ce"]
    assert noted["failed"] == {SUBJECTS[3]: f"subject {SUBJECTS[3]}: no file of flair, t1, t1ce, t2 in the list"}
    assert (tmp_path / "csv" / f"{SUBJECTS[0]}.nii.gz").read_bytes() == (tmp_path / "folder" / f"{SUBJECTS[0]}.nii.gz").read_bytes()
    # as MONAI's datalists are: paths in the order of sequences, or a 4D file; the subject as file names tell it
    stack = np.stack([voxels(scan(cases, SUBJECTS[0], name)) for name in NAMES], -1)
    nib.save(nib.Nifti1Image(stack, nib.load(scan(cases, SUBJECTS[0], "t1")).affine), tmp_path / "stack.nii.gz")
    items = [
        {"image": [None if name == "t1" else str(scan(cases, SUBJECTS[1], name)) for name in NAMES], "label": "seg.nii.gz"},
        {"subject": "stack", "image": "stack.nii.gz"}, {"subject": "gone", "t1": "gone.nii.gz"},
    ]  # fmt: skip
    (tmp_path / "cases.json").write_text(json.dumps({"training": [{}], "testing": items}))
    with pytest.raises(CasesFailedError, match="1 of 3 cases failed: gone"):
        predict_folder(run, tmp_path / "cases.json", tmp_path / "json")
    assert read(tmp_path / "json")["failed"] == {"gone": "gone.nii.gz: no such file any more"}
    assert (tmp_path / "json" / f"{SUBJECTS[1]}.nii.gz").read_bytes() == (tmp_path / "csv" / f"{SUBJECTS[1]}.nii.gz").read_bytes()
    np.testing.assert_array_equal(voxels(tmp_path / "json" / "stack.nii.gz"), voxels(tmp_path / "folder" / f"{SUBJECTS[0]}.nii.gz"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "subject,flare\na,b.nii.gz", "case 1: 'flare' is no sequence; known are subject, image, flair, t1, t1ce, t2, brain_mask"),
        ("a.csv", "subject,t1\na,b.nii.gz\na,c.nii.gz", "case 2: subject a is there twice"),
        ("a.csv", "subject,t1\na/b,b.nii.gz", "case 1: subject 'a/b' cannot be a key"),
        ("a.csv", "t1\nb.nii.gz", "case 1: no subject; give one"),
        ("a.csv", "subject,t1\n", "lists no case"),
        ("a.json", "{", "not valid JSON at line 1"),
        ("a.json", '{"training": []}', "one under testing or test"),
        ("a.json", '[{"subject": "a", "image": ["b.nii.gz"]}]', "image has to be the path of a 4D file, or a list of 4"),
        ("a.json", '[{"subject": "a", "t1": 3}]', "3 is not the path of a file"),
        ("a.txt", "a", "neither a folder nor a list; name a list .csv or .json"),
    ],
)
def test_a_list_that_says_something_else_is_refused(run, tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as caught:
        predict_folder(run, tmp_path / name, tmp_path / "out")
    assert message in str(caught.value) and "\n" not in str(caught.value) and not (tmp_path / "out").exists()


# warnings


def test_a_case_unlike_those_of_training_is_warned_of(run, cases, tmp_path, capsys):
    for name in NAMES:  # thicker slices
        path = scan(cases, SUBJECTS[1], name)
        image = nib.load(path)
        nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj), image.affine @ np.diag([1, 1, 1.4, 1])), path)
    data = voxels(scan(cases, SUBJECTS[2], "flair")).astype(np.float32)
    affine = nib.load(scan(cases, SUBJECTS[2], "flair")).affine
    data[tuple(np.argwhere(data > 0)[500])] = 100 * data.max()
    nib.save(nib.Nifti1Image(data, affine), scan(cases, SUBJECTS[2], "flair"))
    for name in NAMES:  # noise where there was nothing
        data = voxels(scan(cases, SUBJECTS[3], name)).astype(np.float32)
        data[data == 0] = np.random.default_rng(0).uniform(1, 5, (data == 0).sum())
        nib.save(nib.Nifti1Image(data, affine), scan(cases, SUBJECTS[3], name))
    nib.save(nib.Nifti1Image(np.full(data.shape, 7, np.int16), affine), scan(cases, SUBJECTS[4], "t2"))
    spec = yaml.safe_load((SPEC_FOLDER / "phantom.yaml").read_text())
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**spec, "name": "mine", "allow_missing": True}))
    predict_folder(run, cases, tmp_path / "out", spec=str(tmp_path / "mine.yaml"))
    warned = {subject: case["warnings"] for subject, case in read(tmp_path / "out")["cases"].items()}
    assert warned[SUBJECTS[0]] == warned[SUBJECTS[5]] == []
    assert any(text.startswith("spacing ") and "is far from training's" in text for text in warned[SUBJECTS[1]])
    assert any(text.startswith("flair: intensities out of training's range: the farthest voxel lies") for text in warned[SUBJECTS[2]])
    assert any(text.startswith("skull probably not stripped: what is not background has") and "100 % of the image" in text for text in warned[SUBJECTS[3]])
    assert warned[SUBJECTS[4]] == ["t2: carries one value throughout and counts as missing"]
    assert f"{SUBJECTS[4]}: warning: t2: carries one value" in capsys.readouterr().err


def test_a_subset_that_training_never_showed_is_warned_of_and_what_is_not_known_is_said(run, cases, tmp_path):
    def changed(name, availability, forget=False):
        other = shutil.copytree(run, tmp_path / name)
        config, record = yaml.safe_load((other / "config.yaml").read_text()), json.loads((other / "record.json").read_text())
        config["data"]["availability"] = availability
        if forget:
            record["data"].pop("ranges")
            config["data"]["shards"][0]["path"] = str(tmp_path / "gone")
        (other / "config.yaml").write_text(yaml.safe_dump(config))
        (other / "record.json").write_text(json.dumps(record))
        predict_folder(other, cases, tmp_path / f"out-{name}")
        return read(tmp_path / f"out-{name}")

    for subject in SUBJECTS[2:]:
        shutil.rmtree(cases / subject)
    scan(cases, SUBJECTS[1], "t1").unlink()
    never = ["subset flair+t1ce+t2: training never showed it to the network"]
    noted = changed("natural", {"kind": "natural"})
    assert [case["warnings"] for case in noted["cases"].values()] == [[], never] and noted["unchecked"] == []
    noted = changed("fixed", {"kind": "fixed", "subsets": ["t1", "flair+t1ce+t2"]}, forget=True)
    assert [case["warnings"] for case in noted["cases"].values()] == [["subset flair+t1+t1ce+t2: training never showed it to the network"], []]
    assert noted["unchecked"] == ["intensities", "spacing"]


# overlays


def pixels(path, colour):
    """Where a picture has a colour, as rows and columns."""
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return np.argwhere(np.abs(picture - wanted).max(-1) < 30), picture.shape


def test_an_overlay_has_each_case_and_says_not_whose_it_is(run, cases, tmp_path):
    predict_folder(run, cases, tmp_path / "out", beside=Beside(overlay=True), part=(2, 6))
    path = tmp_path / "out" / "overlays" / f"{SUBJECTS[1]}.png"
    found, shape = pixels(path, "#2ca02c")
    assert len(found) > 50 and shape == (460, 1200, 3)
    assert SUBJECTS[1].encode() not in path.read_bytes()


def test_outlines_lie_where_the_labels_are(tmp_path):
    """On the patient's left, in front and above: right in the axial and the coronal slice, where right is left; left in the sagittal one."""
    image, labels = np.zeros((40, 40, 40)), np.zeros((40, 40, 40), np.uint8)
    image[5:35, 5:35, 5:35] = 100
    labels[8:14, 26:32, 26:32] = 2
    draw_overlay(image, labels, LABEL_SCHEMES["brats2018"], (1.0, 1.0, 1.0), "given t1", tmp_path / "a.png")
    found, (height, width, _) = pixels(tmp_path / "a.png", "#2ca02c")
    inside = found[found[:, 0] < 0.8 * height]  # not the legend
    panels = [inside[(inside[:, 1] >= number * width / 3) & (inside[:, 1] < (number + 1) * width / 3)] for number in range(3)]
    assert all(len(panel) > 20 for panel in panels)
    columns = [panel[:, 1].mean() - (number + 0.5) * width / 3 for number, panel in enumerate(panels)]
    assert columns[0] > 20 and columns[1] > 20 and columns[2] < -20
    assert all(panel[:, 0].mean() < 0.45 * height for panel in panels)
    draw_overlay(image, 0 * labels, LABEL_SCHEMES["brats2018"], (1.0, 1.0, 3.0), "given t1", tmp_path / "none.png")
    assert not len(pixels(tmp_path / "none.png", "#2ca02c")[0])
