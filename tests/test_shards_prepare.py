"""`shards prepare` with real executables: order, checks, what a second run repeats, and every way to fail."""

import os
import signal
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import nibabel as nib
import numpy as np
import psutil
import pytest
import yaml
from nifti_trees import head, write_nifti

from mstkd.errors import UserError
from mstkd.shards.dataset import DatasetSpec
from mstkd.shards.prepare import prepare
from mstkd.shards.prepare_config import load_prepare_config

SEQUENCES = {"t1": "{subject}/T1_*", "t2": "{subject}/T2_*"}
CONVERT = {"name": "convert", "command": "convert {input} {output}", "timeout_min": 2}
MASK = {"name": "brain", "per": "subject", "command": "strip {input_t1} {output}", "mask": True, "same_grid": True}
APPLY = {"name": "apply", "command": "copy {input} {brain} {output}", "same_grid": True}


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """A folder on PATH; tools(name, script) makes an executable that first notes its arguments in <name>.calls."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def make(name, script):
        calls = folder / f"{name}.calls"
        (folder / name).write_text(f'#!/bin/sh\necho "$@" >> "{calls}"\n{script}\n')
        (folder / name).chmod(0o755)
        return lambda: calls.read_text().splitlines() if calls.exists() else []

    return make


@pytest.fixture
def raw(tmp_path):
    """Two subjects, each with a folder per sequence; the file system has a blank and a semicolon in it."""
    src = tmp_path / "raw; data"
    for number, subject in enumerate(("A1", "B-2")):
        for channel, name in enumerate(("T1", "T2")):
            write_nifti(src / subject / f"{name}_series" / "image.nii.gz", head(10 * number + channel))
    mask = (head(0) != 0).astype(np.uint8)
    write_nifti(tmp_path / "mask.nii.gz", mask)
    return src


@pytest.fixture
def run(tmp_path, raw, tools):
    """run(*steps, **top-level keys) with the usual tools; its .calls tells how often each was called."""
    calls = {
        "convert": tools("convert", 'cp "$1"/image.nii.gz "$2"; echo converted; echo careful >&2'),
        "strip": tools("strip", f'test -f "$1" && cp "{tmp_path}/mask.nii.gz" "$2"'),
        "copy": tools("copy", 'test -f "$2" && cp "$1" "$3"'),
    }

    def go(*steps, workers=2, **top):
        path = tmp_path / "prepare.yaml"
        path.write_text(yaml.safe_dump({"sequences": SEQUENCES, "steps": list(steps), **top}))
        return prepare(path, raw, tmp_path / "out", workers)

    go.calls = lambda: {name: len(read()) for name, read in calls.items()}
    go.out, go.raw = tmp_path / "out", raw
    return go


def fails(run, match, *steps, **more):
    with pytest.raises(UserError, match=match) as error:
        run(*steps, **more)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_steps_run_in_order_and_a_spec_reads_the_result(run):
    assert run(CONVERT, MASK, APPLY) == ["A1", "B-2"]
    assert run.calls() == {"convert": 4, "strip": 2, "copy": 4}
    np.testing.assert_array_equal(nib.load(run.out / "B-2" / "B-2_t2.nii.gz").get_fdata(), head(11))
    assert (run.out / "logs" / "A1" / "convert_t1.log").read_text().endswith("converted\n")
    assert (run.out / "logs" / "A1" / "convert_t1.err").read_text() == "careful\n"
    spec = DatasetSpec(
        name="own", description="", layout="folders", labels="none", brain_mask="{subject}_brain.nii.gz",
        sequences={name: f"{{subject}}_{name}.nii.gz" for name in SEQUENCES},
    )  # fmt: skip
    cases = spec.find_cases(run.out)
    assert [(case.subject, list(case.files), case.brain is not None) for case in cases] == [("A1", ["t1", "t2"], True), ("B-2", ["t1", "t2"], True)]


def test_a_second_run_repeats_only_what_changed(run):
    run(CONVERT, MASK, APPLY)
    final = run.out / "A1" / "A1_t2.nii.gz"
    before = final.stat().st_mtime_ns
    run(CONVERT, MASK, APPLY)
    assert run.calls() == {"convert": 4, "strip": 2, "copy": 4} and final.stat().st_mtime_ns == before
    # another scan: its own chain only
    write_nifti(run.raw / "A1" / "T2_series" / "image.nii.gz", head(77))
    run(CONVERT, MASK, APPLY)
    assert run.calls() == {"convert": 5, "strip": 2, "copy": 5}
    np.testing.assert_array_equal(nib.load(final).get_fdata(), head(77))
    # a result that was lost, and what depends on it: the mask is an input of both sequences
    next((run.out / ".work" / "brain").glob("B-2.nii.gz")).unlink()
    run(CONVERT, MASK, APPLY)
    assert run.calls() == {"convert": 5, "strip": 3, "copy": 7}
    # another command
    run(CONVERT, MASK, {**APPLY, "command": APPLY["command"] + " --again"})
    assert run.calls() == {"convert": 5, "strip": 3, "copy": 11}


def test_a_failure_names_subject_step_code_and_reason_and_costs_the_others_nothing(run, tools):
    broken = tools("copy", 'case "$1" in *A1_t2*) echo starting >&2; echo "no memory left" >&2; exit 3;; esac; cp "$1" "$3"')
    message = fails(run, r"^subject A1: step apply \(t2\): exit code 3: no memory left \(all of it: .*/logs/A1/apply_t2\.err\)$", CONVERT, MASK, APPLY)
    assert "more failed" not in message
    assert (run.out / "B-2" / "B-2_t2.nii.gz").is_file() and not (run.out / "A1" / "A1_t2.nii.gz").exists()
    assert len(broken()) == 4
    tools("copy", 'cp "$1" "$3"')
    run(CONVERT, MASK, APPLY)
    assert run.calls()["convert"] == 4 and len(broken()) == 5  # the one that failed
    assert (run.out / "A1" / "A1_t2.nii.gz").is_file()
    tools("copy", "exit 1")
    changed = {**APPLY, "command": APPLY["command"] + " --new"}
    assert fails(run, r"subject A1: step apply \(t1\): exit code 1: nothing on stderr", CONVERT, MASK, changed).endswith("1 more failed: B-2")
    assert not list(run.out.glob("*/*.nii.gz"))  # no result of the old command is left to be taken for the new one's


def test_absent_programs_are_named_before_anything_starts(run):
    message = fails(run, "not on PATH", CONVERT, {**MASK, "command": "no-such-strip {input_t1} {output}"}, {**APPLY, "command": "nor-this {input} {output}"})
    assert "no-such-strip (step brain), nor-this (step apply)" in message
    assert run.calls()["convert"] == 0 and not run.out.exists()


def test_nothing_goes_through_a_shell(run, tools, tmp_path):
    show = tools("show", 'for word in "$@"; do echo "<$word>" >> "' + str(tmp_path / "words") + '"; done; cp "$1"/image.nii.gz "$2"')
    run({"name": "convert", "command": "show {input} {output} '$(touch hacked)' ';' touch hacked `id` $HOME * {subject}:{sequence} '{{x}}'"}, workers=1)
    words = (tmp_path / "words").read_text().splitlines()[:11]
    assert words[0] == f"<{run.raw}/A1/T1_series>" and words[2:] == ["<$(touch hacked)>", "<;>", "<touch>", "<hacked>", "<`id`>", "<$HOME>", "<*>", "<A1:t1>", "<{x}>"]
    assert len(show()) == 4 and not Path("hacked").exists()


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_a_step_that_takes_too_long_is_stopped_with_its_children(run, tools, tmp_path):
    tools("convert", f'sleep 600 & echo $! > "{tmp_path}/pid"; wait')
    fails(run, r"subject A1: step convert \(t1\): stopped after 0\.02 min; .*timeout_min", {**CONVERT, "timeout_min": 0.02}, workers=1)
    assert not alive(int((tmp_path / "pid").read_text()))


def test_sigterm_ends_the_programs_too(run, tools, tmp_path):
    run(CONVERT)  # writes the configuration and the results of convert
    os.mkfifo(tmp_path / "started")
    tools("strip", f'echo $$ > "{tmp_path}/started"; exec sleep 600')
    (tmp_path / "prepare.yaml").write_text(yaml.safe_dump({"sequences": SEQUENCES, "steps": [CONVERT, MASK]}))
    code = "import sys; from mstkd.shards.prepare import prepare; prepare(*sys.argv[1:])"
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path / "prepare.yaml", run.raw, run.out], stderr=subprocess.PIPE)
    tool = int((tmp_path / "started").read_text())  # blocks until the tool runs
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    assert process.returncode != 0 and b"KeyboardInterrupt" in error and not alive(tool)
    tools("strip", f'cp "{tmp_path}/mask.nii.gz" "$2"')
    run(CONVERT, MASK)
    assert run.calls()["convert"] == 4


BAD_RESULTS = {
    "nothing": ("true", r"step brain: ended well but left no .*/\.work/brain/A1\.nii\.gz; correct the command's output"),
    "garbage": ('echo hello > "$2"', r"step brain: .*A1\.nii\.gz: truncated or not a NIfTI"),
    "not finite": ('cp "{folder}/nan.nii.gz" "$2"', r"step brain: .*A1\.nii\.gz: holds NaN or infinite"),
    "soft mask": ('cp "$1" "$2"', r"step brain: .*A1\.nii\.gz: a brain mask holds 0 and one positive value"),
    "empty mask": ('cp "{folder}/empty.nii.gz" "$2"', r"step brain: .*A1\.nii\.gz: the brain mask is empty"),
    "other grid": ('cp "{folder}/small.nii.gz" "$2"', r"step brain promises same_grid, but .*A1\.nii\.gz: shape \(23, 22, 20\) differs from \(24, 22, 20\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_RESULTS)
def test_every_result_is_checked(run, tools, tmp_path, name):
    script, message = BAD_RESULTS[name]
    mask = (head(0) != 0).astype(np.uint8)
    write_nifti(tmp_path / "nan.nii.gz", np.where(mask, np.nan, 0).astype(np.float32))
    write_nifti(tmp_path / "empty.nii.gz", mask * 0)
    write_nifti(tmp_path / "small.nii.gz", mask[1:])
    tools("strip", script.replace("{folder}", str(tmp_path)))
    for _ in range(2):  # a bad result is not taken for a finished one
        assert fails(run, message, CONVERT, MASK, workers=1).startswith("subject A1: ")
    assert not list(run.out.glob("*/*.nii.gz"))


def test_images_that_do_not_meet_on_one_grid_break_the_promise(run):
    write_nifti(run.raw / "B-2" / "T2_series" / "image.nii.gz", head(1)[:, 1:])
    fails(run, r"subject B-2: step convert promises same_grid, but .*B-2_t2\.nii\.gz: shape .* differs from .*B-2_t1\.nii\.gz", {**CONVERT, "same_grid": True})


def test_only_some_sequences_and_missing_ones(run):
    (run.raw / "A1" / "T1_series" / "image.nii.gz").unlink()
    (run.raw / "A1" / "T1_series").rmdir()
    fails(run, r"^subject A1: no t1; expected .*/A1/T1_\*, or say allow_missing: true", CONVERT)
    assert run(CONVERT, {"name": "twice", "only": ["t2"], "command": "copy {input} {input} {output}"}, allow_missing=True) == ["A1", "B-2"]
    assert run.calls() == {"convert": 3, "strip": 0, "copy": 2}
    assert sorted(path.name for path in run.out.glob("*/*.nii.gz")) == ["A1_t2.nii.gz", "B-2_t1.nii.gz", "B-2_t2.nii.gz"]
    fails(run, r"subject A1: step brain: its command needs \{input_t1\}, which this subject lacks", CONVERT, MASK, allow_missing=True)


def test_subjects_are_found_or_the_reason_is_said(run, tmp_path):
    (run.raw / "A1" / "T1_second").mkdir()
    fails(run, r"subject A1: two scans for t1, .*T1_second and .*T1_series; narrow", CONVERT)
    fails(run, r"raw; data: no scan fits \{subject\}/CT; correct sequences", CONVERT, sequences={"ct": "{subject}/CT"})
    (run.raw / "-rf" / "T1_x").mkdir(parents=True)
    (run.raw / "A1" / "T1_second").rmdir()
    assert run(CONVERT) == ["A1", "B-2"]  # -rf is no subject: a program would take it for an option
    with pytest.raises(UserError, match="no such folder; give the one that holds the raw scans"):
        prepare(tmp_path / "prepare.yaml", tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(UserError, match=r"none\.yaml: no such file"):
        prepare(tmp_path / "none.yaml", run.raw, tmp_path / "out")


BAD_CONFIGS = {
    "step key": ({"steps": [{**CONVERT, "timeout": 3}]}, r"prepare\.yaml:\d+: unknown key steps\.0\.timeout.*timeout_min"),
    "placeholder": ({"steps": [{**CONVERT, "command": "convert {inptu} {output}"}]}, r"step convert: nothing is called \{inptu\} there; known: input, input_t1"),
    "attribute": ({"steps": [{**CONVERT, "command": "convert {input.__class__} {output}"}]}, r"nothing is called \{input\.__class__\}"),
    "later step": ({"steps": [APPLY, MASK]}, r"step apply: nothing is called \{brain\}"),
    "sequence input per subject": ({"steps": [{**MASK, "command": "strip {input} {output}"}]}, r"step brain: nothing is called \{input\}"),
    "no output": ({"steps": [{**CONVERT, "command": "convert {input}"}]}, r"command names no \{output\}"),
    "program": ({"steps": [{**CONVERT, "command": "{input} {output}"}]}, "the program cannot be a placeholder"),
    "quotes": ({"steps": [{**CONVERT, "command": "convert '{input} {output}"}]}, "cannot be split into words: No closing quotation"),
    "brace": ({"steps": [{**CONVERT, "command": "convert {input {output}"}]}, "steps.0"),
    "empty": ({"steps": [{**CONVERT, "command": " "}]}, "names no program"),
    "same name": ({"steps": [CONVERT, CONVERT]}, "step convert: two steps have that name"),
    "name taken": ({"steps": [{**CONVERT, "name": "t1"}]}, "step t1: that name is taken"),
    "only": ({"steps": [{**CONVERT, "only": ["t3"]}]}, "step convert: only names t3, which is no sequence; known: t1, t2"),
    "mask": ({"steps": [{**CONVERT, "mask": True}]}, "mask: goes with per: subject"),
    "limit": ({"steps": [{**CONVERT, "timeout_min": 0}]}, "timeout_min: Input should be greater than 0"),
    "no steps": ({"steps": []}, "steps: Tuple should have at least 1 item"),
    "outside": ({"sequences": {"t1": "../{subject}/T1"}}, "give a path below --src with {subject} in it"),
    "no subject": ({"sequences": {"t1": "T1"}}, "give a path below --src with {subject} in it"),
    "sequence": ({"sequences": {"t 1": "{subject}/T1"}}, "sequence name 't 1': use letters, digits and _"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_a_wrong_configuration_is_one_line(tmp_path, name):
    change, message = BAD_CONFIGS[name]
    path = tmp_path / "prepare.yaml"
    path.write_text(yaml.safe_dump({"sequences": SEQUENCES, "steps": [CONVERT], **change}))
    with pytest.raises(UserError, match=message) as error:
        load_prepare_config(path)
    assert str(error.value).startswith("prepare.yaml") and "\n" not in str(error.value)


def test_the_packaged_example_is_a_configuration():
    plan = load_prepare_config(Path(str(files("mstkd.shards") / "prepare_example.yaml")))
    assert [step.name for step in plan.steps] == ["convert", "register", "brain"] and set(plan.sequences) == {"flair", "t1", "t1ce", "t2"}


def test_raw_scans_and_files_of_others_stay(run, tmp_path, raw):
    """Results are replaced by name; what a person has put beside them is not theirs to remove."""
    assert run(CONVERT)
    own = write_nifti(tmp_path / "out" / "A1" / "A1_seg.nii.gz", head(1))
    run({**CONVERT, "command": "convert {input} {output} again"})
    assert own.is_file()
    plan = tmp_path / "inside.yaml"
    plan.write_text(yaml.safe_dump({"sequences": {"t1": "{subject}/{subject}_t1.nii.gz"}, "steps": [CONVERT]}))
    scan = write_nifti(tmp_path / "both" / "A1" / "A1_t1.nii.gz", head(0))
    with pytest.raises(UserError, match="holds the raw scan .* give another folder"):
        prepare(plan, tmp_path / "both", tmp_path / "both")
    assert scan.is_file()
