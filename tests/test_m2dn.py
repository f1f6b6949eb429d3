"""M2DN: loss, prediction, ablations, its moving average on several ranks and through a resume."""

import json

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file
from small_m2dn import DIFFUSION, SEQUENCES, SIZE, START, SUBSETS, awake, make, make_batch, section
from torch import nn

from mstkd.batch import Progress
from mstkd.config import load_config
from mstkd.dry_step import empty_batch, fake_tensors, kept_for_backward
from mstkd.engine.seeding import reseed
from mstkd.errors import UserError
from mstkd.evaluate.run import evaluate_run
from mstkd.losses.completion import completion_errors
from mstkd.methods import DataFacts, build, read_config
from mstkd.methods.m2dn import missing_of
from mstkd.subsets import subset_name

COMPLETING = ("m2dn", "one_shot")
EVERY = torch.tensor(SUBSETS)  # (14, 4) bool: every pattern


def furthest(one: dict, other: dict, networks=("student", "network")) -> float:
    return max(float(np.abs(one[name][key] - other[name][key]).max()) for name in networks for key in one[name])

# mask, loss and step


def test_the_mask_is_1_where_a_sequence_is_missing():
    missing = missing_of(EVERY)
    assert missing.dtype == torch.float32 and torch.equal(missing, 1 - EVERY.float())


@pytest.mark.parametrize(("row", "said"), [([True] * 4, "every sequence, and nothing is to be completed"), ([False] * 4, "no sequence to complete from")])
@pytest.mark.parametrize("name", COMPLETING)
def test_all_or_nothing_missing_is_refused(name, row, said):
    method, rows = make(name), (SUBSETS[0], tuple(row))
    for act in (lambda: method.predict(torch.zeros(2, 4, SIZE, SIZE), torch.tensor(rows)), lambda: method.check_available(torch.tensor(rows))):
        with pytest.raises(UserError, match=f"data.availability: a sample has {said}") as caught:
            act()
        assert "\n" not in str(caught.value)


def test_the_loss():
    missing, truth = missing_of(EVERY), torch.ones(14, 4, 5, 5) * torch.tensor([1.0, -1, 1, -1])[:, None, None]
    made = truth.clone().requires_grad_()
    errors = {joint: completion_errors(made, truth, missing, joint=joint) for joint in (True, False)}
    assert all(float(error.loss.detach()) == float(error.missing) == float(error.observed) == 0 for error in errors.values())
    zero = torch.zeros_like(truth)
    assert all(float(completion_errors(zero, truth, missing, joint=joint).loss) == 1 for joint in (True, False))
    for n, row in enumerate(missing):
        for m, gone in enumerate(row):
            other = truth.clone()
            other[n, m] += 0.5
            with_all, alone = (completion_errors(other, truth, missing, joint=joint) for joint in (True, False))
            assert float(with_all.loss) == pytest.approx(0.25 / 4 / 14) and (float(alone.loss) > 0) == bool(gone)
            assert (float(alone.missing) > 0) == bool(gone) and (float(alone.observed) > 0) != bool(gone)


def test_the_losses_weights_and_a_batch_in_parts():
    missing, truth = missing_of(EVERY), torch.randn(14, 4, 5, 5)
    made = torch.randn(14, 4, 5, 5)
    squares, share = (made - truth).square().mean((2, 3)), torch.where(missing.bool(), 3.0, 0.5)
    assert float(completion_errors(made, truth, missing, 3.0, 0.5).loss) == pytest.approx(float((squares * share).mean()), rel=1e-5)
    for joint in (True, False):
        whole, *parts = (float(completion_errors(made[p], truth[p], missing[p], joint=joint).loss) for p in (slice(None), slice(0, 7), slice(7, 14)))
        assert whole == pytest.approx(sum(parts) / 2, rel=1e-5)


def test_a_step_noises_what_is_missing_at_one_time_per_sample():
    method, seen = make(), []
    method.networks["network"].register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    step, batch = method.roles("train")["network"].step, make_batch(*SUBSETS)
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(step(batch, {}, START))
    (x, t, missing), again, other = seen
    assert torch.equal(missing, missing_of(batch.available)) and t.shape == (14,) and 1 <= t.min() and t.max() <= 20 and len(t.unique()) > 5
    for n, row in enumerate(batch.available):
        for m, given in enumerate(row):
            assert torch.equal(x[n, m], batch.image[n, m]) == bool(given)
    assert torch.equal(again[0], x) and torch.equal(again[1], t) and not torch.equal(other[1], t)
    squares = batch.image.square().mean((2, 3))  # a fresh network returns 0
    assert float(outputs[0].loss.detach()) == pytest.approx(float(squares.mean()), rel=1e-5)
    assert float(outputs[0].scalars["missing"]) == pytest.approx(float(((squares * missing).sum(1) / missing.sum(1)).mean()), rel=1e-5)
    assert not any(value.requires_grad for value in outputs[0].scalars.values())


def test_every_time_is_drawn():
    method, times = make(), []
    method.networks["network"].register_forward_pre_hook(lambda module, inputs: times.extend(inputs[1].tolist()))
    step = method.roles("train")["network"].step
    for seed in range(30):
        torch.manual_seed(seed)
        step(make_batch(*SUBSETS), {}, START)
    counts = np.bincount(times, minlength=21)
    assert counts[0] == 0 and (counts[1:] > 5).all() and len(counts) == 21  # 21 expected


@pytest.mark.parametrize("name", COMPLETING)
def test_a_step_asks_no_tensor_for_its_value(name):
    with fake_tensors():
        method = make(name)
        kept = kept_for_backward(method, method.roles("train"), empty_batch(2, 4, (SIZE, SIZE), False), "bf16")
    assert kept["network"] > 0


@pytest.mark.parametrize("name", COMPLETING)
def test_bf16_computes_its_loss_in_float32(name):
    losses = []
    for enabled in (False, True):
        method = awake(make(name), "network")
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            losses.append(method.roles("train")["network"].step(make_batch(*SUBSETS), {}, START).loss)
    losses[1].backward()
    assert losses[1].dtype == torch.float32 and losses[1].item() == pytest.approx(losses[0].item(), rel=0.02)
    assert all(p.grad.isfinite().all() for p in method.networks["network"].parameters())


# prediction


@pytest.mark.parametrize("sampler", [{}, {"kind": "ancestral"}, {"eta": 0.5, "samples": 2}, {"noise": "shared"}], ids=str)
def test_a_prediction_completes_every_pattern_and_can_be_repeated(sampler):
    method, batch, made = awake(make(sampler=sampler)), make_batch(*SUBSETS), []
    gone = ~batch.available[:, :, None, None]
    for seed, hidden in ((3, -1.0), (3, float("nan")), (4, -1.0)):
        torch.manual_seed(seed)
        made.append(method.predict(torch.where(gone, hidden, batch.image), batch.available))
    assert torch.equal(made[0][batch.available], batch.image[batch.available]) and made[0].abs().max() <= 1
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2]) == ("noise" in sampler)


def test_shared_noise_is_that_of_other_batches_too():
    method = awake(make(sampler={"kind": "ancestral", "noise": "shared"}))
    image, available = make_batch(*[SUBSETS[5]] * 5).image, EVERY[5:6].expand(5, -1)
    whole = method.predict(image, available)
    torch.manual_seed(99)
    parts = [method.predict(image[part], available[part]) for part in (slice(0, 2), slice(2, 5))]
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-5, rtol=0)


def test_half_precision_predicts_the_same_to_its_accuracy():
    method, batch = awake(make(sampler={"noise": "shared"})), make_batch(*SUBSETS)
    exact = method.predict(batch.image, batch.available)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = method.predict(batch.image, batch.available)
    assert rough.dtype == torch.float32 and not torch.equal(rough, exact) and (rough - exact).abs().mean() < 0.02
    assert torch.equal(rough[batch.available], batch.image[batch.available])


def test_samplers_are_those_of_the_recipe():
    assert len(make(sampler={"kind": "ancestral", "steps": 50}).moves()) == 20 and make(sampler={"kind": "ancestral"}).moves()[5].std > 0
    assert [move.t for move in make().moves()] == [20, 13, 7] and not any(move.std for move in make().moves())
    assert make(sampler={"kind": "ancestral"}, diffusion={"variance": "beta_tilde"}).moves()[5].std < make(sampler={"kind": "ancestral"}).moves()[5].std
    usual = read_config({"name": "m2dn"})
    assert (usual.sampler.kind, usual.sampler.steps, usual.sampler.eta, usual.diffusion.steps, usual.decay) == ("ddim", 50, 0.0, 1000, 0.9999)


# ablations and bad input


def test_the_method_and_its_optimiser():
    method = make()
    role = method.roles("train")["network"]
    assert (method.task, method.dimensions, method.complete_only, method.scored) == ("synthesis", 2, True, ("student",))
    assert method.subsets == tuple(subset_name(SEQUENCES, subset) for subset in SUBSETS) and method.availability("train").kind == "proper"
    assert (role.optimizer.name, role.optimizer.lr, role.optimizer.betas) == ("adam", 1e-4, (0.9, 0.999))
    assert (role.averages, role.decay, role.ramp, role.networks) == ({"student": "network"}, 0.9999, (1, 10), ("network",))
    assert (method.intensity.interval, method.intensity.percentile, method.intensity.hidden_value) == ((-1, 1), "0.1", -1)


@pytest.mark.parametrize("name", COMPLETING)
def test_a_model_of_one_pattern(name):
    method = make(name, unified=False, subset="t2+flair")
    assert method.subsets == ("flair+t2",) and method.availability("train").subsets == ["flair+t2"]


@pytest.mark.parametrize("name", COMPLETING)
def test_without_joint_synthesis_observed_sequences_are_not_learnt(name):
    batch = make_batch(SUBSETS[7], SUBSETS[7])
    gradients = {}
    for joint in (True, False):
        step = make(name, joint=joint).roles("train")["network"].step
        step(batch, {}, START).loss.backward()
        gradients[joint] = [bool(decoder.body[-1].weight.grad.abs().sum() > 0) for decoder in step.network.decoders]
    assert gradients == {True: [True] * 4, False: [not given for given in SUBSETS[7]]}


@pytest.mark.parametrize(("change", "said"), [
    ({"unified": False}, "give method.subset, e.g. t1+t2, together with unified: false, and only then"),
    ({"subset": "t1"}, "give method.subset, e.g. t1+t2, together with unified: false, and only then"),
    ({"unified": False, "subset": "t1+pd"}, "method.subset 't1+pd': join different ones of flair, t1, t1ce, t2 by '+'"),
    ({"unified": False, "subset": "t2+t1ce+t1+flair"}, "method.subset t2+t1ce+t1+flair: leaves nothing to complete"),
    ({"sampler": {"steps": 21}}, "sampler.steps 21: the diffusion has only 20"),
    ({"diffusion": {"beta": [0.0001, 0.02]}}, "method.diffusion: after 20 steps 0.90 of the image is left, 0.1 at most may be"),
    ({"diffusion": {"beta": [0.5, 0.2]}}, "beta [0.5, 0.2]: give two values above 0 and below 1"),
    ({"size": 48}, "data.slices.size 48: the network halves slices down to 4 pixels and needs a power of two from 16 on; use 32"),
    ({"size": 32, "network": {"bottleneck": 16}}, "data.slices.size 32: the network halves slices down to 16 pixels and needs a power of two from 64 on; use 64"),
    ({"sequences": ("t1",)}, "data.shards: the set has t1 alone"),
    ({"intensity": {"kind": "zscore"}}, "method.intensity.kind"),
    ({"network": {"widths": 4}}, "unknown key method.network.widths"),
])  # fmt: skip
def test_bad_settings_are_one_line(change, said):
    with pytest.raises(UserError) as caught:
        make(**change)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("recipe", ["m2dn_phantom", "m2dn_ixi", "m2dn_brats2019", "one_shot_phantom"])
def test_recipes_build(recipe):
    config = load_config(recipe)
    facts = DataFacts(("t1", "t2", "pd") if "ixi" in recipe else SEQUENCES, None, None, slice_size=config.data.slices.size)
    with torch.device("meta"):
        method = build(config.method, facts)
    assert config.train.gradient_clipping == 1.0 and config.data.augment.flip_axes == "x" and set(config.train.roles) <= set(method.roles("train"))
    assert set(config.validation.subsets or ()) <= set(method.subsets)


# training


@pytest.fixture(scope="module")
def alone(one_rank):
    return one_rank.run("m2dn_ranks.py", "train", train={"zero_stage": 0})[0]


def test_updates_are_those_of_plain_adam_and_the_average_follows_its_ramp(alone):
    """The mean gradient of both micro-batches is that of one joint batch, see the loss in parts; clipped to a norm of 1."""
    method = make()
    network, average = method.networks["network"], {key: value.numpy() for key, value in method.networks["network"].state_dict().items()}
    step, adam = method.roles("train")["network"].step, torch.optim.Adam(network.parameters(), 1e-4)
    for update in range(4):
        adam.zero_grad()
        for j in range(2):
            reseed(0, update, "network", j)
            (step(make_batch(seed=10 * update + j), {}, Progress(update, 0, 4, 1)).loss / 2).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        adam.step()
        decay = (1 + update) / (10 + update)
        average = {key: decay * value + (1 - decay) * network.state_dict()[key].numpy() for key, value in average.items()}
    weights = {"network": {key: value.numpy() for key, value in network.state_dict().items()}, "student": average}
    assert alone["skipped"] == 0 and furthest(weights, alone["after"]) < 2e-6 and furthest(alone["before"], alone["after"], ["network"]) > 1e-4


@pytest.mark.parametrize("zero", [1, 2])
def test_two_ranks_have_the_same_average_which_is_that_of_one(zero, alone, two_ranks):
    first, second = two_ranks.run("m2dn_ranks.py", "train", train={"zero_stage": zero})
    assert furthest(first["after"], second["after"]) == 0 and furthest(first["after"], alone["after"]) < 2e-6
    assert furthest({"student": first["after"]["network"]}, first["after"], ["student"]) > 1e-5  # the average is behind
    for term in ("train/missing", "train/observed", "train/loss_network"):
        assert first["figures"][term] == pytest.approx(alone["figures"][term], rel=1e-5)


def test_bf16_trains_the_comparator_too(two_ranks):
    first, second = two_ranks.run("m2dn_ranks.py", "train", name="one_shot", train={"zero_stage": 2, "precision": "bf16"})
    assert first["skipped"] == 0 and furthest(first["after"], second["after"]) == 0 and np.isfinite(first["figures"]["train/loss_network"])


WORDS = [
    f"method={json.dumps(section(network={'width': 16}))}", f"data.slices={{size: {SIZE}, min_brain: 0.1}}", "data.augment.flip_axes=x", "data.workers=0",
    "train.precision=fp32", "train.deterministic=true", "train.global_batch=4", "train.micro_batch=2", "train.steps=6", "train.log_every=1", "checkpoint.every_steps=100",
    "validate={every_steps: 100, max_cases: 1, subsets: [t1]}", "inference.batch=32",
]  # fmt: skip


def averaged(run) -> dict[str, np.ndarray]:
    """The moving average in the newest checkpoint of a run."""
    folder = run / "train" / "checkpoints"
    return load_file(folder / (folder / "latest").read_text().strip() / "network" / "averages.safetensors")


@pytest.fixture(scope="module")
def whole(two_ranks, phantom_shards, tmp_path_factory):
    runs = tmp_path_factory.mktemp("whole")
    return runs, two_ranks.run("train_ranks.py", "run", recipe="m2dn_phantom", overrides=[*WORDS, f"data.shards={phantom_shards}", f"runs_dir={runs}"])[0]


@pytest.mark.parametrize("ranks", ["two_ranks", "one_rank"])
def test_a_resume_goes_on_with_weights_and_average(ranks, whole, two_ranks, phantom_shards, request, tmp_path):
    words = [*WORDS, f"data.shards={phantom_shards}", f"runs_dir={tmp_path}"]
    stopped = two_ranks.run("train_ranks.py", "run", recipe="m2dn_phantom", overrides=words, stop_at=2)[0]
    assert stopped["stopped_by"] == "SIGTERM" and len(stopped["curve"]) < 6
    rest = request.getfixturevalue(ranks).run("train_ranks.py", "run", recipe="m2dn_phantom", overrides=words)[0]
    expected, got = averaged(whole[0] / "m2dn_phantom"), averaged(tmp_path / "m2dn_phantom")
    assert [step for step, _ in rest["curve"]] == [1, 2, 3, 4, 5, 6] and expected.keys() == got.keys()
    apart = max(float(np.abs(got[key] - value).max()) for key, value in expected.items())
    assert apart == 0 if ranks == "two_ranks" else apart < 2e-6


def test_another_order_of_sequences_is_refused(whole, phantom_shards, tmp_path):
    run = whole[0] / "m2dn_phantom"
    assert {key.split(".")[0] for key in load_file(next((run / "train/checkpoints").glob("step-*/*.safetensors")))} == {"network", "student"}
    other = tmp_path / "other"
    other.mkdir()
    for file in phantom_shards.iterdir():
        (other / file.name).symlink_to(file)
    index = json.loads((phantom_shards / "index.json").read_text())
    (other / "index.json").unlink()
    (other / "index.json").write_text(json.dumps({**index, "sequences": index["sequences"][::-1]}))
    with pytest.raises(UserError, match="has sequences t2, t1ce, t1, flair; the run was trained on flair, t1, t1ce, t2, in that order"):
        evaluate_run(run, data=other, split="test", allow_overlap=True)
    assert yaml.safe_load((run / "config.yaml").read_text())["method"]["diffusion"]["beta"] == DIFFUSION["beta"]  # the schedule is the run's


@pytest.mark.slow
def test_eight_slices_are_learnt_by_heart():
    """S = 64, T = 100 with beta from 1e-3 to 0.2: the loss falls to a tenth within 2000 updates."""
    torch.manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.randn(8, 4, 8, 8), 64, mode="bilinear", align_corners=False).clamp(-1, 1)
    method = make(size=64, network={"width": 8, "bottleneck": 16}, diffusion={"steps": 100, "beta": [1e-3, 0.2]})
    step = method.roles("train")["network"].step
    adam, losses, choose = torch.optim.Adam(step.parameters(), 2e-3), [], np.random.default_rng(0)
    while len(losses) < 2000 and (len(losses) < 50 or np.mean(losses[-50:]) > losses[0] / 10):
        batch = make_batch(*[SUBSETS[n] for n in choose.integers(14, size=8)], size=64)
        batch.image = smooth
        loss = step(batch, {}, START).loss
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-50:]) < losses[0] / 10
