"""What M2DN is compared with: the same network in one pass, and pix2pix for one pattern."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_m2dn import SEQUENCES, SIZE, START, SUBSETS, awake, make, make_batch

from mstkd.config import load_config
from mstkd.dry_step import empty_batch, fake_tensors, kept_for_backward
from mstkd.errors import UserError
from mstkd.losses.adversarial import realness_error
from mstkd.losses.completion import completion_errors
from mstkd.methods import DataFacts, build
from mstkd.methods.m2dn import missing_of
from mstkd.models.critics import Critic, PatchCritic

GIVEN = (True, False, True, False)


# one_shot


def test_one_shot_has_the_networks_of_m2dn():
    one, many = make("one_shot"), make()
    for name, network in one.networks.items():
        expected = many.networks[name].state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in network.state_dict().items())
    assert (one.subsets, one.availability("train"), one.scored) == (many.subsets, many.availability("train"), many.scored)
    ours, theirs = one.roles("train")["network"], many.roles("train")["network"]
    assert (ours.optimizer, ours.schedule, ours.averages, ours.decay, ours.ramp) == (theirs.optimizer, theirs.schedule, theirs.averages, theirs.decay, theirs.ramp)


def test_its_loss_and_its_prediction_by_hand():
    method, batch = awake(awake(make("one_shot")), "network"), make_batch(*SUBSETS)
    gone, missing = ~batch.available[:, :, None, None], missing_of(batch.available)
    with torch.no_grad():
        made = method.networks["student"](batch.image.masked_fill(gone, -1.0), torch.ones(14), missing)
        torch.testing.assert_close(method.predict(batch.image.masked_fill(gone, float("nan")), batch.available), torch.where(gone, made, batch.image), atol=0, rtol=0)
        made = method.networks["network"](batch.image.masked_fill(gone, -1.0), torch.ones(14), missing)
        output = method.roles("train")["network"].step(batch, {}, START)
    assert float(output.loss) == pytest.approx(float((made - batch.image).square().mean()), rel=1e-5)
    assert float(output.scalars["missing"]) == pytest.approx(float(completion_errors(made, batch.image, missing).missing), rel=1e-5)


# pix2pix


def test_pix2pix_has_the_channels_of_its_pattern():
    method = make("pix2pix", subset="t1ce+flair")
    assert method.subsets == ("flair+t1ce",) and method.availability("train").subsets == ["flair+t1ce"] and (method.given, method.missing) == ([0, 2], [1, 3])
    assert method.networks["student"].encoder.levels[0][0][0].in_channels == 2 and method.networks["student"].decoder.out.out_channels == 2
    assert method.networks["critic"].body[0].in_channels == 4 and make("pix2pix").subsets == ("flair+t1+t1ce",)
    critic, generator = method.roles("train").items()
    assert (critic[0], generator[0], critic[1].borrows, generator[1].borrows) == ("critic", "generator", ("student",), ("critic",))
    assert all((role.optimizer.lr, role.optimizer.betas, role.schedule.constant_share) == (2e-4, (0.5, 0.999), 0.5) for role in (critic[1], generator[1]))


def test_the_losses_of_pix2pix_by_hand():
    method, batch = make("pix2pix", subset="flair+t1ce"), make_batch(GIVEN, GIVEN)
    roles = method.roles("train")
    generator, critic = method.networks["student"], method.networks["critic"]
    given, truth = batch.image[:, [0, 2]], batch.image[:, [1, 3]]
    found = {name: role.step(batch, {}, START) for name, role in roles.items()}
    with torch.no_grad():
        made = generator(given)
        real, fake = critic(torch.cat([given, truth], 1)), critic(torch.cat([given, made], 1))
    assert real.shape == (2, 1, 4, 4) and made.shape == truth.shape
    assert float(found["critic"].loss.detach()) == pytest.approx(float((F.softplus(-real).mean() + F.softplus(fake).mean()) / 2), rel=1e-5)
    assert float(found["generator"].loss.detach()) == pytest.approx(float(100 * (made - truth).abs().mean() + F.softplus(-fake).mean()), rel=1e-5)
    for name, network in (("critic", critic), ("generator", generator)):
        for other in (critic, generator):
            other.zero_grad()
        found[name].loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
        assert name == "generator" or all(p.grad is None for p in generator.parameters())


def test_cross_entropy_of_what_is_real():
    logits = torch.tensor([[0.0, 2.0]])
    assert float(realness_error(logits, True)) == pytest.approx((np.log(2) + np.log1p(np.exp(-2.0))) / 2)
    assert float(realness_error(logits, False)) == pytest.approx((np.log(2) + 2 + np.log1p(np.exp(-2.0))) / 2)


def test_it_completes_its_pattern_alone():
    method, batch = make("pix2pix", subset="flair+t1ce"), make_batch(GIVEN, GIVEN)
    with torch.no_grad():
        made = method.networks["student"](batch.image[:, [0, 2]])
    hidden = batch.image.clone()
    hidden[:, [1, 3]] = float("nan")
    completed = method.predict(hidden, batch.available)
    assert torch.equal(completed[:, [0, 2]], batch.image[:, [0, 2]]) and torch.equal(completed[:, [1, 3]], made)
    with pytest.raises(UserError, match=r"method\.subset: this network completes flair\+t1ce alone"):
        method.predict(hidden, torch.tensor([GIVEN, SUBSETS[0]]))


@pytest.mark.parametrize(("change", "said"), [
    ({"subset": "flair+t1+t1ce+t2"}, "method.subset flair+t1+t1ce+t2: leaves nothing to complete"),
    ({"subset": "pd"}, "method.subset 'pd': join different ones"),
    ({"critic": {"layers": 5}}, "method.critic.layers 5: data.slices.size 16 cannot be halved so often"),
    ({"network": {"levels": 4}}, "data.slices.size 16: method.network.levels 4 needs a multiple of 16, 32 at least"),
    ({"weights": {"l2": 1}}, "unknown key method.weights.l2"),
])  # fmt: skip
def test_bad_settings_are_one_line(change, said):
    with pytest.raises(UserError) as caught:
        make("pix2pix", **change)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_step_asks_no_tensor_for_its_value():
    with fake_tensors():
        method = make("pix2pix")
        kept = kept_for_backward(method, method.roles("train"), empty_batch(2, 4, (SIZE, SIZE), False), "bf16")
    assert kept.keys() == {"critic", "generator"} and all(size > 0 for size in kept.values())


def test_two_critics_share_their_body():
    torch.manual_seed(0)
    one, other = Critic(4, 16, 4, 2), PatchCritic(3, 4, 2)
    assert [layer.weight.shape[0] for layer in one.body[::2]] == [layer.weight.shape[0] for layer in other.body[::2]] == [4, 8]
    assert other(torch.zeros(2, 3, 16, 16)).shape == one(torch.zeros(2, 1, 16, 16)).realness.shape == (2, 1, 4, 4)


def test_its_recipe_builds():
    config = load_config("pix2pix_phantom")
    with torch.device("meta"):
        method = build(config.method, DataFacts(SEQUENCES, None, None, slice_size=config.data.slices.size))
    assert method.subsets == ("flair+t1+t2",)


def test_both_roles_are_trained_on_two_ranks(one_rank, two_ranks):
    alone = one_rank.run("m2dn_ranks.py", "train", name="pix2pix", train={"zero_stage": 0})[0]
    first, second = two_ranks.run("m2dn_ranks.py", "train", name="pix2pix", train={"zero_stage": 2})
    for network in ("student", "critic"):
        for key, value in first["after"][network].items():
            assert np.array_equal(value, second["after"][network][key])
            if value.ndim > 1:  # biases before an instance norm have no gradient but rounding, which Adam makes steps of
                assert np.abs(value - alone["after"][network][key]).max() < 2e-6
    assert not np.array_equal(first["before"]["student"]["decoder.out.weight"], first["after"]["student"]["decoder.out.weight"])
    assert first["skipped"] == 0 and {"train/l1", "train/adversarial", "train/critic"} <= first["figures"].keys()
