"""Outputs of a frozen network kept on a disk: found again, never another network's, within a limit."""

import pytest
import torch
from torch import nn

from mstkd.engine.output_cache import CachedForward, OutputCache
from mstkd.errors import UserError


def cached(tmp_path, limit_gib=1.0, weights="w"):
    calls = []

    class Teacher(nn.Module):
        def forward(self, image):
            calls.append(len(image))
            return {"logits": image * 2, "maps": (image.mean(1), image.bfloat16())}

    teacher = Teacher().eval()
    cache = OutputCache(tmp_path, limit_gib)
    CachedForward(teacher, cache, weights)
    return teacher, cache, calls


def test_samples_are_found_one_by_one_whatever_their_batch(tmp_path):
    images = torch.randn(4, 2, 3, 3, 3)
    teacher, cache, calls = cached(tmp_path)
    teacher(images[:2])
    output = teacher(images[1:])  # one of the three is known
    assert calls == [2, 2] and (cache.hits, cache.misses) == (1, 4)
    assert torch.equal(output["logits"], images[1:] * 2) and torch.equal(output["maps"][0], images[1:].mean(1))
    assert output["maps"][1].dtype == torch.bfloat16
    other, _, others = cached(tmp_path, weights="v")
    other(images[:1])
    assert others == [1]  # other weights, other names
    with torch.autocast("cpu", torch.bfloat16):
        teacher(images[:1])
    assert calls == [2, 2, 1]  # another precision as well
    wanted = images[:1].clone().requires_grad_()
    teacher(wanted)["logits"].sum().backward()
    assert torch.equal(wanted.grad, torch.full_like(wanted, 2))


def test_a_network_of_two_inputs_is_known_by_both(tmp_path):
    calls = []

    class Guided(nn.Module):
        def forward(self, image, code):
            calls.append(len(image))
            return image + code[:, :, None]

    teacher, image, code = Guided(), torch.randn(2, 3, 4), torch.randn(2, 3)
    CachedForward(teacher, OutputCache(tmp_path, 1.0))
    for codes in (code, code, torch.stack([code[0], code[0]])):
        assert torch.equal(teacher(image, codes), image + codes[:, :, None])
    assert calls == [2, 1]


def test_a_damaged_file_is_computed_again_with_a_warning(tmp_path, caplog):
    image = torch.randn(1, 2, 3, 3, 3)
    teacher, _, _ = cached(tmp_path)
    teacher(image)
    [file] = tmp_path.glob("*.safetensors")
    sound = file.read_bytes()
    for data in (sound[:-1], sound[:-1] + bytes([sound[-1] ^ 1]), b""):
        file.write_bytes(data)
        assert torch.equal(teacher(image)["logits"], image * 2)
        assert f"{file} is damaged; its value is computed again" in caplog.text and file.read_bytes() == sound
        caplog.clear()


def test_the_least_recently_used_leaves_first_and_the_limit_holds(tmp_path):
    a, b, c = (torch.full((1, 1, 16, 16, 16), value) for value in (1.0, 2.0, 3.0))
    teacher, _, _ = cached(tmp_path)
    teacher(a)
    size = next(tmp_path.glob("*.safetensors")).stat().st_size
    teacher, cache, _ = cached(tmp_path, limit_gib=2.5 * size / 2**30)
    for image in (b, a, c):  # a is used again before c needs room
        teacher(image)
    assert sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) == 2 * size
    cache.hits = 0
    teacher(a), teacher(c)
    assert cache.hits == 2
    tight, _, _ = cached(tmp_path / "tight", limit_gib=size / 2**31)
    with pytest.raises(UserError, match="teacher.cache_gib .*: one output takes .* GiB; raise it"):
        tight(a)


def test_a_cache_that_cannot_be_written_to_is_done_without(tmp_path, caplog):
    teacher, _, calls = cached(tmp_path / "cache")
    (tmp_path / "cache/lock").mkdir()  # root may write anywhere; a folder for a file stands for a full disk
    for _ in range(2):
        image = torch.randn(1, 2, 3, 3, 3)
        assert torch.equal(teacher(image)["logits"], image * 2)
    assert calls == [1, 1] and caplog.text.count("cannot be written to (Is a directory); outputs are kept no more") == 1


def test_an_output_that_is_not_per_sample_is_refused(tmp_path):
    class Teacher(nn.Module):
        def forward(self, image):
            return image, image.mean()

    teacher = Teacher()
    CachedForward(teacher, OutputCache(tmp_path, 1.0), "w")
    with pytest.raises(UserError, match="teacher.cache_dir: .* leave it out"):
        teacher(torch.ones(2, 1))


def test_networks_of_one_method_do_not_share_what_they_keep(tmp_path):
    """Also where one file held both: the weights themselves are in the name."""
    networks, image = [nn.Conv3d(1, 1, 1), nn.Conv3d(1, 1, 1)], torch.randn(1, 1, 2, 2, 2)
    with torch.no_grad():
        expected = [network(image) for network in networks]
        for network in networks:
            CachedForward(network, OutputCache(tmp_path, 1.0), "method")
        assert all(torch.equal(network(image), output) for network, output in zip(networks, expected, strict=True))
