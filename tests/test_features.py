"""The figure of features of single sequences, the classifier beside it, and what recipes cost."""

import json

import numpy as np
import pytest
import torch
from small_shaspec import NETWORK, make
from trained_run import make_run, write_run

from mstkd.bench.cost import bench_cost
from mstkd.errors import UserError
from mstkd.evaluate.features import FeatureSet, collect, draw
from mstkd.evaluate.run import evaluate_run
from mstkd.trained_run import open_run

SEQUENCES = ("flair", "t1", "t1ce", "t2")


def feature_set(centres: float, by_subject: float = 0.0) -> FeatureSet:
    """12 subjects x 4 sequences x 2 windows in 6 dimensions: noise, `centres` apart by sequence and `by_subject` apart by subject."""
    rng = np.random.default_rng(0)
    subject, sequence = (axis.ravel() for axis in np.meshgrid(np.arange(12), np.repeat(np.arange(4), 2), indexing="ij"))
    vectors = rng.normal(size=(len(subject), 6)) + centres * rng.normal(size=(4, 6))[sequence] + by_subject * rng.normal(size=(12, 6))[subject]
    return FeatureSet(vectors.astype(np.float32), sequence, subject)


def test_a_classifier_names_what_can_be_told_apart_in_subjects_it_has_not_seen():
    assert feature_set(20).accuracy() == 1 and feature_set(20).chance() == 0.25
    assert feature_set(0).accuracy() < 0.45
    # every subject's sequences are perfectly apart, but each subject's in its own way: nothing to learn for another subject
    rng, own = np.random.default_rng(1), feature_set(0)
    apart = FeatureSet(own.vectors + 20 * rng.normal(size=(12, 4, 6))[own.subject, own.sequence], own.sequence, own.subject)
    assert apart.accuracy() < 0.45


def test_the_figure_and_its_figures(tmp_path):
    found = draw({"shared": feature_set(0), "specific": feature_set(20)}, SEQUENCES, tmp_path / "features.png")
    assert found["specific"] == {"accuracy": 1.0, "chance": 0.25, "n": 96} and found["shared"]["accuracy"] < 0.45
    assert (tmp_path / "features.png").read_bytes().startswith(b"\x89PNG")


def test_an_evaluation_draws_them_where_the_method_has_some(tmp_path):
    toy = make_run(tmp_path)
    network = {**NETWORK, "blocks": [1, 1, 1, 1]}
    run = write_run(tmp_path, "small", {"name": "shaspec", "network": network}, (64, 32, 32))
    evaluate_run(run)
    found = json.loads((run / "evaluation" / "features.json").read_text())
    assert set(found) == {"shared", "specific"} and found["shared"]["n"] == found["specific"]["n"] == 2 * 4
    assert "Features of single sequences" in (run / "evaluation" / "report.html").read_text()
    opened = open_run(run)
    assert collect(opened.predictor(), opened.source, opened.source.subjects("all")[:1]) == {}  # one subject: no other to test on
    plain = open_run(toy)
    assert collect(plain.predictor(), plain.source, plain.source.subjects("all")) == {}


def test_features_are_of_the_sequences_that_are_there():
    method, image = make(), torch.randn(1, 4, 64, 32, 16)
    vectors, sequences = method.features(image, torch.tensor([[False, True, False, True]]))["shared"]
    assert vectors.shape == (2, 16) and sequences == [1, 3]


def test_what_recipes_cost():
    words = ["data.crop=[64,32,32]", "train.precision=fp32"]
    report = bench_cost(["shaspec_phantom"], words, "flair+t2", 1, lambda line: None)
    figures = {entry.name.partition(": ")[2]: entry for entry in report.figures}
    assert list(figures) == ["training iteration", "test iteration", "peak memory", "parameters"]
    assert figures["parameters"].median == pytest.approx(1.340736) and figures["peak memory"].median > 0
    assert all(entry.versus == {"first": 1.0} for entry in figures.values()) and report.settings["given"] == "flair+t2"
    with pytest.raises(UserError, match="bench cost: shaspec_phantom ended early .*needs multiples of"):
        bench_cost(["shaspec_phantom"], ["data.crop=[60,32,32]"], "flair", 1, lambda line: None)
