"""Linear regression by voxel: what it starts from, what it learns, what it does not look at."""

import numpy as np
import pytest
import torch
from small_m2dn import SEQUENCES, SIZE, START, SUBSETS, make_batch

from mstkd.batch import Batch
from mstkd.config import load_config
from mstkd.errors import UserError
from mstkd.methods import DataFacts, build

MIXED = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.4, 0, 0], [-0.3, 0.2, 0.6, 0], [0, 0.5, -0.2, 0.3]])  # sequences from independent images


def make(sequences=SEQUENCES):
    return build({"name": "voxel_regression"}, DataFacts(sequences, None, None, slice_size=SIZE))


def heads(samples: int, seed: int) -> torch.Tensor:
    """Stacks (B, 4, S, S) of correlated sequences in a square brain, -1 around it."""
    draw = torch.Generator().manual_seed(seed)
    inside = 0.8 + torch.einsum("ts,bsxy->btxy", MIXED, torch.rand(samples, 4, 10, 10, generator=draw) * 0.6 - 0.3)
    image = torch.full((samples, 4, SIZE, SIZE), -1.0)
    image[..., 3:13, 3:13] = inside - 1
    return image


def batch(image: torch.Tensor, subset) -> Batch:
    samples = len(image)
    return Batch(
        image=image, brain=image[:, 0] > -1, present=torch.ones(samples, 4, dtype=torch.bool),
        available=torch.tensor([subset] * samples), subject=["s"] * samples, hidden_value=-1.0,
    )  # fmt: skip


def test_it_starts_as_the_mean_of_what_is_given_and_leaves_background_as_it_is():
    method, image = make(), heads(14, 0)
    available = torch.tensor(SUBSETS)
    made = method.predict(image, available)
    given = available[:, :, None, None]
    mean = (image * given).sum(1, keepdim=True) / given.sum(1, keepdim=True)
    torch.testing.assert_close(made, torch.where(given, image, mean), atol=1e-6, rtol=0)
    assert torch.equal(made[given.expand_as(made)], image[given.expand_as(made)]) and (made[:, :, :3] == -1).all()


def test_what_hides_in_missing_sequences_changes_nothing():
    method, one = make(), make_batch(*SUBSETS)
    gone = ~one.available[:, :, None, None]
    assert torch.equal(method.predict(one.image.masked_fill(gone, float("nan")), one.available), method.predict(one.image, one.available))


@pytest.mark.parametrize("subset", [(True, True, False, False), (False, True, True, True)])
def test_it_learns_the_least_squares_of_its_pattern_and_leaves_the_others(subset):
    method, image = make(), heads(16, 1)
    network, step = method.networks["student"], method.roles("train")["student"].step
    before = network.weight.detach().clone()
    adam = torch.optim.Adam(step.parameters(), 1e-2)
    for _ in range(1500):
        adam.zero_grad()
        step(batch(image, subset), {}, START).loss.backward()
        adam.step()
    given = [m for m, shown in enumerate(subset) if shown]
    voxels = (image + 1).permute(0, 2, 3, 1)[:, 3:13, 3:13].reshape(-1, 4).double().numpy()
    design = np.concatenate([voxels[:, given], np.ones((len(voxels), 1))], axis=1)
    made = (method.predict(image, torch.tensor([subset] * 16)) + 1).permute(0, 2, 3, 1)[:, 3:13, 3:13].reshape(-1, 4).numpy()
    for target in (m for m, shown in enumerate(subset) if not shown):
        best = design @ np.linalg.lstsq(design, voxels[:, target], rcond=None)[0]
        assert np.mean((made[:, target] - voxels[:, target]) ** 2) == pytest.approx(np.mean((best - voxels[:, target]) ** 2), rel=0.01)
    number = sum(2**m for m in given)
    changed = (network.weight.detach() != before).flatten(1).any(1)
    assert changed.nonzero().flatten().tolist() == [number]


def test_it_is_compared_with_m2dn_on_the_same_images_and_patterns():
    method, m2dn = make(), build({"name": "m2dn", "network": {"width": 4, "bottleneck": 4}}, DataFacts(SEQUENCES, None, None, slice_size=SIZE))
    assert (method.intensity, method.subsets, method.availability("train")) == (m2dn.intensity, m2dn.subsets, m2dn.availability("train"))
    assert method.networks["student"].weight.shape == (16, 4, 4) and load_config("voxel_regression_phantom").method == {"name": "voxel_regression"}
    with pytest.raises(UserError, match="data.shards: the set has t1 alone; a completion needs two sequences"):
        make(("t1",))
