"""ShaSpec's classification form: its network and losses, training on one and two ranks, evaluation."""

import csv
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from global_batches import global_batch
from mlflow import MlflowClient

from mstkd.batch import Progress, ViewBatch
from mstkd.config import EvaluateConfig, InferenceConfig, OptimizerConfig, RunConfig, ScheduleConfig, load_config
from mstkd.data.availability import Availability
from mstkd.data.training import open_training
from mstkd.engine.schedule import lr_factor
from mstkd.errors import UserError
from mstkd.evaluate.classification import BLOCK_CASES, Decision, accuracies, confusion, decide, summarise_decisions
from mstkd.evaluate.run import evaluate_run
from mstkd.evaluate.source import CaseSource
from mstkd.launch.cluster import load_cluster
from mstkd.launch.submit import prepare
from mstkd.losses.domain import alignment, classification
from mstkd.methods import DataFacts, build
from mstkd.models.shaspec_views import ResidualFusion, SharedSpecificClassifier, stem
from mstkd.plan import plan
from mstkd.predict import predict_folder
from mstkd.shards.digits import write_digits
from mstkd.shards.spec import Classification
from mstkd.shards.views import build_views
from mstkd.subsets import all_subsets
from mstkd.trained_run import open_run

SHAPES = {"image": (12, 10), "colour": (3, 9, 9), "text": (7,)}
ALL_SUBSETS = torch.tensor(all_subsets(list(SHAPES)))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return SharedSpecificClassifier(SHAPES, classes=4, width=16, hidden=8, dropout=0.5).eval()


def views(samples, seed=1):
    draws = torch.Generator().manual_seed(seed)
    return {name: torch.randn(samples, *shape, generator=draws) for name, shape in SHAPES.items()}


# the network


@pytest.mark.parametrize("shape", [(5,), (28, 28), (100, 33), (3, 64, 64), (1, 1)])
def test_a_stem_takes_vectors_and_images_of_any_size(shape):
    assert stem(shape, 16)(torch.randn(2, *shape)).shape == (2, 16)


def test_a_view_of_another_kind_is_refused():
    facts = DataFacts(("a", "b"), None, None, Classification(views={"a": (4, 4, 4, 4), "b": (3,)}, classes=("x", "y")))
    with pytest.raises(UserError, match=r"data.shards: a view of shape \(4, 4, 4, 4\) is neither a vector nor an image"):
        build({"name": "shaspec_classify"}, facts)


def test_what_is_missing_is_the_mean_of_the_available_shared_features():
    fusion, available = ResidualFusion(6), ALL_SUBSETS
    shared, specific = torch.randn(len(available), 3, 6), torch.randn(len(available), 3, 6)
    fused = fusion(shared, specific, available)
    for n, subset in enumerate(available):
        for m, here in enumerate(subset):
            own = shared[n, m] + fusion.projection(torch.cat([shared[n, m], specific[n, m]]))
            assert torch.allclose(fused[n, m], own if here else shared[n, subset].mean(0), atol=1e-6)


def test_with_a_projection_of_zero_a_fused_feature_is_the_shared_one():
    fusion = ResidualFusion(6)
    torch.nn.init.zeros_(fusion.projection.weight), torch.nn.init.zeros_(fusion.projection.bias)
    shared = torch.randn(2, 3, 6)
    assert torch.equal(fusion(shared, torch.randn(2, 3, 6), torch.ones(2, 3, dtype=torch.bool)), shared)


@pytest.mark.parametrize("subset", all_subsets(list(SHAPES))[:-1])
def test_a_view_that_is_not_available_never_changes_the_output(network, subset):
    given, available = views(2), torch.tensor([subset] * 2)
    expected = network(given, available)[0]
    for value in (7.0, math.inf, math.nan):
        changed = {name: view if here else torch.full_like(view, value) for (name, view), here in zip(given.items(), subset, strict=True)}
        assert torch.equal(network(changed, available)[0], expected)


def test_samples_of_a_batch_do_not_see_each_other(network):
    given = views(len(ALL_SUBSETS))
    together = network(given, ALL_SUBSETS)[0]
    for n in range(len(ALL_SUBSETS)):
        alone = network({name: view[n : n + 1] for name, view in given.items()}, ALL_SUBSETS[n : n + 1])[0]
        assert torch.allclose(alone[0], together[n], atol=1e-5)


# the losses


def distribution_alignment(shared, available):
    return alignment(shared[available], available.nonzero().tolist(), available.shape[1])


def domain_classification(domains, available):
    return classification(domains[available], available.nonzero().tolist())


def test_alignment_against_values_by_hand():
    features = torch.zeros(1, 4, 5)
    features[:, 0] = 1
    assert distribution_alignment(features, torch.ones(1, 4, dtype=torch.bool)).item() == pytest.approx(4 / 6 * 3)
    assert distribution_alignment(features, torch.tensor([[True, True, False, False]])).item() == pytest.approx(4)
    assert distribution_alignment(features, torch.tensor([[False, True, True, True]])).item() == 0  # equal ones
    assert distribution_alignment(features, torch.tensor([[True, False, False, False]])).item() == 0  # one alone
    both = distribution_alignment(features.repeat(2, 1, 1), torch.tensor([[True, True, False, False], [True, False, False, False]]))
    assert both.item() == pytest.approx(2)


def test_domain_classification_against_values_by_hand():
    logits = torch.zeros(1, 4, 4)
    assert domain_classification(logits, torch.ones(1, 4, dtype=torch.bool)).item() == pytest.approx(math.log(4))
    logits[0, 3] = 100  # of a view that is not there
    logits[0, 1, 1] = 100
    assert domain_classification(logits, torch.tensor([[True, True, False, False]])).item() == pytest.approx(math.log(4) / 2)


def reached(network, loss):
    network.zero_grad()
    loss.backward()
    return {name.partition(".")[0] for name, p in network.named_parameters() if p.grad is not None and p.grad.any()}


def test_alignment_trains_the_shared_path_alone_and_domains_the_specific_one(network):
    everything = torch.ones(2, 3, dtype=torch.bool)
    _, shared, domains = network(views(2), everything)
    assert reached(network, distribution_alignment(shared, everything)) == {"stems", "shared"}
    _, _, domains = network(views(2), everything)
    assert reached(network, domain_classification(domains, everything)) == {"specific", "domain"}


def test_gradients_of_a_missing_view_are_zero_and_there(network):
    available = torch.tensor([[True, False, True]] * 2)
    logits, shared, domains = network(views(2), available)
    (logits.sum() + distribution_alignment(shared, available) + domain_classification(domains, available)).backward()
    missing = {name: p.grad for name, p in network.named_parameters() if "view_colour" in name}
    assert missing and all(grad is not None and not grad.any() for grad in missing.values())


def test_the_whole_loss_is_the_weighted_sum(digit_facts):
    method = build({"name": "shaspec_classify", "width": 8, "hidden": 8}, digit_facts)
    step = method.roles("train")["student"].step.eval()
    everything, given = torch.ones(3, 2, dtype=torch.bool), {"image": torch.randn(3, 28, 28), "audio": torch.randn(3, 32, 32)}
    batch = ViewBatch(given, torch.tensor([0, 1, 2]), everything, everything, list("abc"))
    output = step(batch, {}, Progress(0, 0, 1, 1))
    terms = output.scalars
    assert output.loss.item() == pytest.approx((terms["cross_entropy"] + 0.1 * terms["dao"] + 0.02 * terms["dco"]).item())
    assert terms["dao"] > 0 and terms["dco"] > 0


def test_the_optimiser_and_its_schedule_are_the_papers(digit_facts):
    role = build({"name": "shaspec_classify"}, digit_facts).roles("train")["student"]
    assert role.optimizer == OptimizerConfig(name="adam", lr=1e-3, weight_decay=1e-2)
    factors = [lr_factor(role.schedule, Progress(step=10 * e, epoch=e, total_steps=1000, total_epochs=100)) for e in (0, 19, 20, 39, 40, 99)]
    assert factors == pytest.approx([1, 1, 0.9, 0.9, 0.81, 0.9**4])
    warm = ScheduleConfig(name="step", gamma=0.5, every_epochs=1, warmup_steps=4)
    assert lr_factor(warm, Progress(step=1, epoch=0, total_steps=10, total_epochs=5)) == 0.5


# accuracy and AUC


def decision(truth, probabilities, subset="image"):
    return Decision("student", f"s{truth}", subset, truth, int(np.argmax(probabilities)), tuple(probabilities))


def test_accuracy_and_auc_against_values_by_hand():
    made = [
        decision(0, (0.6, 0.3, 0.1)), decision(0, (0.2, 0.7, 0.1)), decision(1, (0.2, 0.5, 0.3)), decision(1, (0.3, 0.4, 0.3)),
        decision(0, (0.8, 0.1, 0.1), "image+audio"),
    ]  # fmt: skip
    summary = summarise_decisions(made, ("image", "audio"), ("a", "b", "c"), "m", "test", 0, {})
    cells = summary["subsets"]["image"]
    # a against the rest: 0.6 beats both, 0.2 ties with 0.2 and loses to 0.3; b: 0.5 and 0.4 each beat 0.3 and lose to 0.7
    assert cells["a"] == {"accuracy": 0.5, "auc": pytest.approx(2.5 / 4), "n": 2}
    assert cells["b"] == {"accuracy": 1.0, "auc": pytest.approx(0.5), "n": 2}
    assert cells["c"] == {"accuracy": None, "auc": None, "n": 0}
    assert cells["all"] == {"accuracy": 0.75, "auc": pytest.approx((0.625 + 0.5) / 2), "n": 4}
    assert summary["subsets"]["image+audio"]["a"] == {"accuracy": 1.0, "auc": None, "n": 1}
    assert summary["mean"]["all"] == {"accuracy": 0.875, "auc": pytest.approx(0.5625), "n": 5}
    assert list(summary["subsets"]) == ["image", "image+audio"]
    assert accuracies(made) == {"image": 0.75, "image+audio": 1.0}
    assert confusion(made[:4], 3).tolist() == [[1, 1, 0], [0, 2, 0], [0, 0, 0]]


# training and evaluation


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder / "raw", subjects=800, seed=1)
    build_views(folder / "raw", folder / "shards", name="digits", subjects_per_shard=50)
    return folder / "shards"


@pytest.fixture(scope="module")
def digit_facts():
    return DataFacts(("image", "audio"), None, None, Classification(views={"image": (28, 28), "audio": (32, 32)}, classes=tuple("0123456789")))


def words(digits, runs, *more):
    return [
        f"data.shards={digits}", f"runs_dir={runs}", "method.width=32", "method.hidden=32", "train.global_batch=32", "train.micro_batch=16",
        "train.log_every=1", "checkpoint.every_steps=1000", "validate.every_steps=1000", *more,
    ]  # fmt: skip


def train(ranks, digits, runs, *more, stop_at=None):
    return ranks.run("train_ranks.py", "run", recipe="shaspec_digits_phantom", overrides=words(digits, runs, *more), stop_at=stop_at)[0]


def same_curve(one, other, tolerance=1e-4):
    assert [step for step, _ in one] == [step for step, _ in other] and one
    for (_, ours), (_, theirs) in zip(one, other, strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance, abs=tolerance)


SHORT = ("train.epochs=null", "train.steps=6", "train.global_batch=4", "train.micro_batch=1", "method.dropout=0.3")
DISJOINT = (*SHORT, "data.availability={kind: fixed, subsets: [image, audio]}")


def test_the_ranks_of_the_next_test_do_see_disjoint_views(digits, tmp_path):
    config = load_config("shaspec_digits_phantom", words(digits, tmp_path, *DISJOINT))
    training = open_training(config.data, config.seed, complete_only=False)
    draw = Availability(config.data.availability, training.sequences).draw
    steps = [[draw(config.seed, item, (True, True)) for item in global_batch(training.order, step, 4)] for step in range(6)]
    # of two ranks with micro-batches of one, rank 0 takes 0 and 2, rank 1 takes 1 and 3
    assert any(a != b for step in steps for a, b in (step[:2], step[2:]))
    assert {subset for step in steps for subset in step} == {(True, False), (False, True)}


@pytest.fixture(scope="module")
def one_rank_curve(one_rank, digits, tmp_path_factory):
    return train(one_rank, digits, tmp_path_factory.mktemp("one"), *DISJOINT)["curve"]


@pytest.mark.parametrize("zero", [1, 3])
def test_two_ranks_with_disjoint_views_give_the_curve_of_one_rank(two_ranks, digits, tmp_path, one_rank_curve, zero):
    result = train(two_ranks, digits, tmp_path, *DISJOINT, f"train.zero_stage={zero}")
    same_curve(result["curve"], one_rank_curve)
    assert json.loads((tmp_path / "shaspec_digits_phantom/metrics.jsonl").read_text().splitlines()[-1])["val/score"] >= 0


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(one_rank, digits, tmp_path, one_rank_curve):
    first = train(one_rank, digits, tmp_path, *DISJOINT, stop_at=2)
    assert first["stopped_by"] == "SIGTERM" and 2 <= first["curve"][-1][0] < 6
    same_curve(train(one_rank, digits, tmp_path, *DISJOINT, "resume=required")["curve"], one_rank_curve)


@pytest.fixture(scope="module")
def trained(one_rank, digits, tmp_path_factory):
    """A run of 320 updates, evaluated."""
    runs = tmp_path_factory.mktemp("trained")
    quick = "train.roles={student: {optimizer: {name: adam, lr: 1.0e-3, weight_decay: 1.0e-4}}}"  # the paper's decay needs longer than a test has
    train(one_rank, digits, runs, "train.epochs=20", "method.dropout=0.2", quick)
    folder = runs / "shaspec_digits_phantom"
    return SimpleNamespace(folder=folder, summary=evaluate_run(folder))


def test_every_subset_is_far_better_than_chance_and_both_views_are_best(trained):
    subsets = trained.summary["subsets"]
    assert list(subsets) == ["image", "audio", "image+audio"]
    accuracy = {name: cells["all"]["accuracy"] for name, cells in subsets.items()}
    assert min(accuracy.values()) > 0.4 and accuracy["image+audio"] >= max(accuracy["image"], accuracy["audio"]) - 0.02  # chance is 0.1
    assert all(cells["all"]["auc"] > 0.8 and cells["all"]["n"] == 160 for cells in subsets.values())


def test_the_evaluation_folder_holds_tables_report_and_figures(trained):
    folder = trained.folder / "evaluation"
    assert {path.name for path in folder.iterdir()} == {"per_case.csv", "summary.json", "weights.json", "report.html", "heat_map_student.png", "confusion_student.png"}
    assert json.loads((folder / "summary.json").read_text()) == trained.summary
    assert set(trained.summary["mean"]) == {"all", *"0123456789"}
    rows = list(csv.DictReader((folder / "per_case.csv").open()))
    assert len(rows) == 3 * 160 and sum(float(rows[0][f"p_{digit}"]) for digit in range(10)) == pytest.approx(1)
    of_audio = [row["truth"] == row["predicted"] for row in rows if row["subset"] == "audio"]
    assert np.mean(of_audio) == pytest.approx(trained.summary["subsets"]["audio"]["all"]["accuracy"])
    report = (folder / "report.html").read_text()
    assert "image+audio" in report and "AUC" in report and report.count("data:image/png;base64") == 2


def test_mlflow_gets_accuracy_per_subset_and_no_subject(trained):
    client = MlflowClient(f"sqlite:///{trained.folder.parent}/mlflow.db")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    evaluation = next(run for run in runs if "student/accuracy/all/image" in run.data.metrics)
    assert evaluation.data.metrics["student/accuracy/all/image"] == pytest.approx(trained.summary["subsets"]["image"]["all"]["accuracy"])
    assert "per_case.csv" not in {file.path.rpartition("/")[2] for file in client.list_artifacts(evaluation.info.run_id, "evaluation")}
    trained_stage = next(run for run in runs if "val/accuracy_image+audio" in run.data.metrics or "val/accuracy_image_audio" in run.data.metrics)
    assert trained_stage.data.metrics["val/score"] > 0.4


def test_decisions_do_not_depend_on_the_rank_count(two_ranks, trained):
    ours = two_ranks.run("class_ranks.py", "decisions", run=str(trained.folder))
    run = open_run(trained.folder, tasks=("classification",))
    subjects = run.source.subjects("all")
    assert len(subjects) > 2 * BLOCK_CASES
    alone = decide(run.method, run.networks, run.source, subjects, all_subsets(run.source.sequences), run.config.inference, torch.device("cpu"))
    expected = [vars(made) for made in alone]
    assert ours[0] == ours[1] == expected


def test_a_subset_is_left_out_for_a_case_that_lacks_it(trained):
    run = open_run(trained.folder, tasks=("classification",))

    class Lacking(CaseSource):
        def subject(self, key):
            sample = super().subject(key)
            return sample if key != keys[0] else type(sample)({"audio": sample.views["audio"]}, sample.label, sample.meta)

    keys = run.source.subjects("test")[:2]
    source, subsets = Lacking(run.source.stores), all_subsets(run.source.sequences)
    made = decide(run.method, run.networks, source, keys, subsets, InferenceConfig(precision="fp32"), torch.device("cpu"))
    assert [(d.subject, d.subset) for d in made] == [(keys[1], "image"), (keys[0], "audio"), (keys[1], "audio"), (keys[1], "image+audio")]


# what goes wrong


def test_another_set_of_classes_is_refused(trained, tmp_path):
    write_digits(tmp_path / "raw", subjects=40, seed=9)
    for view in ("images", "audio"):
        (tmp_path / "raw" / view / "9").rename(tmp_path / "raw" / view / "nine")
    build_views(tmp_path / "raw", tmp_path / "other")
    with pytest.raises(UserError, match="has other classes, or views of another shape, than the run was trained on"):
        evaluate_run(trained.folder, data=tmp_path / "other")


def test_commands_for_volumes_refuse_a_classification_by_name(trained, digits, tmp_path):
    with pytest.raises(UserError, match="shaspec_classify is for classification; this command takes runs of segmentation"):
        predict_folder(trained.folder, tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="shaspec_classify is for classification, and plans are made for volumes"):
        plan(load_config("shaspec_digits_phantom", words(digits, tmp_path)), world=1)


def test_method_and_data_must_be_of_one_kind(one_rank, digits, phantom_shards, tmp_path):
    for recipe, shards, expected in (
        ("shaspec_digits_phantom", phantom_shards, "data.crop: missing, and .* holds volumes"),
        ("kd_phantom", digits, "data.crop: is for volumes, and .* holds views of image and audio"),
    ):
        with pytest.raises(AssertionError, match=expected):
            one_rank.run("train_ranks.py", "run", recipe=recipe, overrides=[f"data.shards={shards}", f"runs_dir={tmp_path}"])
    facts = DataFacts(("image", "audio"), None, None, Classification(views={"image": (28, 28), "audio": (32, 32)}, classes=("a", "b")))
    with pytest.raises(UserError, match="method.name: kd is for segmentation, and the shard set holds views of image and audio, not volumes"):
        build({"name": "kd"}, facts)
    with pytest.raises(UserError, match="method.name: shaspec_classify is for classification, and the shard set holds volumes"):
        build({"name": "shaspec_classify"}, DataFacts(("t1",), None, (8, 8, 8)))


def test_submit_evaluates_a_classification_and_asks_volumes_for_a_crop(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    cluster = load_cluster("devcluster")
    submission = prepare("shaspec_digits_phantom", "devcluster", cluster, None, [], [])
    assert [link.kind for link in submission.links] == ["train", "evaluate"]
    with pytest.raises(UserError, match="data.crop: missing, and kd takes volumes"):
        prepare("kd_phantom", "devcluster", cluster, None, ["data.crop=null"], [])


def test_the_recipe_can_be_read_and_is_complete():
    config = load_config("shaspec_digits_phantom", [])
    assert isinstance(config, RunConfig) and config.evaluate == EvaluateConfig() and config.data.crop is None
