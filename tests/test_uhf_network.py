"""The networks of UHF-guided segmentation: sizes as published, and what each part does by hand."""

import math

import pytest
import torch
from monai.networks.nets import SegResNet, SwinUNETR

from mstkd.dry_step import fake_tensors
from mstkd.models.uhf_backbones import UNet, build_backbone, multiple_of
from mstkd.models.uhf_fusion import Fusion, GuidedSegmenter
from mstkd.models.uhf_keeper import Keeper, PixelRelation
from mstkd.models.uhf_layers import PatchCritic, channels_of
from mstkd.models.uhf_teacher import Teacher

CHANNELS = (16, 32, 64, 128, 256)


def parameters(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def sizes(maps: list[torch.Tensor]) -> list[tuple[int, ...]]:
    return [tuple(x.shape[1:]) for x in maps]


# sizes


def test_the_published_numbers_of_parameters():
    with torch.device("meta"):
        teacher, unet, fusions = Teacher(), UNet(outputs=4), [Fusion(3, CHANNELS, o) for o in CHANNELS]
        assert [parameters(part) for part in (teacher.encoder, teacher.decoder, teacher.head)] == [1_175_472, 2_988_048, 631_040]
        assert [parameters(part) for part in (unet.encoder, unet.decoder)] == [7_074_416, 4_549_344]
        assert parameters(Keeper()) == 34_960_348 and parameters(PatchCritic(3)) == 697_344
        assert [parameters(fusion) for fusion in fusions] == [29_264, 113_984, 449_792, 1_804_656, 7_228_112]
        assert sum(map(parameters, fusions)) == 9_625_808 and parameters(PixelRelation(3)) == 8


@pytest.mark.parametrize(("shape", "levels"), [
    ((64, 64, 64), [(64, 64, 64), (32, 32, 32), (16, 16, 16), (8, 8, 8), (4, 4, 4)]),
    ((65, 50, 37), [(65, 50, 37), (32, 25, 18), (16, 12, 9), (8, 6, 4), (4, 3, 2)]),
])  # fmt: skip
def test_teacher_and_keeper_give_maps_of_the_same_sizes(shape, levels):
    with fake_tensors():
        teacher, keeper, image = Teacher(), Keeper(), torch.zeros(1, 1, *shape)
        expected = [(channels, *size) for channels, size in zip(CHANNELS, levels, strict=True)]
        guide = keeper(image)
        assert sizes(teacher.encoder(image)) == sizes(guide) == expected
        seen = teacher(image)
        assert seen.image.shape == teacher.decoder(guide).shape == image.shape and sizes(seen.predicted) == expected[:4]
        assert GuidedSegmenter(UNet(outputs=4), CHANNELS)(image, guide).shape == (1, 4, *shape)


def test_slices_have_as_many_channels_at_every_level():
    with fake_tensors():
        teacher, keeper, image = Teacher(2), Keeper(2), torch.zeros(1, 1, 65, 50)
        guide = keeper(image)
        assert sizes(teacher.encoder(image)) == sizes(guide) == [(16, 65, 50), (16, 32, 25), (16, 16, 12), (16, 8, 6), (16, 4, 3)]
        student = GuidedSegmenter(UNet(outputs=28, dimensions=2), channels_of(16, 2), dimensions=2)
        assert student(image, guide).shape == (1, 28, 65, 50) and teacher(image).image.shape == PatchCritic(2)(torch.zeros(1, 1, 64, 64)).shape[:2] + (65, 50)
        assert len(student.segmenter.encoder) == 5  # no bottleneck


def test_the_critic_scores_patches():
    with fake_tensors():
        assert PatchCritic(3)(torch.zeros(1, 1, 64, 64, 64)).shape == (1, 1, 3, 3, 3)
        assert PatchCritic(3)(torch.zeros(1, 1, 32, 32, 32)).shape == (1, 1, 1, 1, 1)


# the teacher


def test_a_trained_teacher_says_the_same_twice_and_one_in_training_does_not():
    teacher, image = Teacher(3, 1), torch.rand(1, 1, 32, 32, 32)
    assert not torch.equal(teacher(image).image, teacher(image).image)
    teacher.eval()
    assert torch.equal(teacher(image).image, teacher(image).image)


def test_the_noise_is_gaussian_and_the_released_codes_is_uniform():
    torch.manual_seed(0)
    maps = [torch.zeros(1, 1, 100, 100, 100)] * 5
    noise = Teacher(3, 1).disturbed(maps)
    assert all(abs(float(x.mean())) < 0.01 and abs(float(x.std()) - 1) < 0.01 for x in noise)
    uniform = Teacher(3, 1, "uniform", noise_levels=(2,)).disturbed(maps)
    assert float(uniform[1].min()) >= 0 and float(uniform[1].mean()) == pytest.approx(0.5, abs=0.01) and not uniform[0].any()


# the gate


@pytest.mark.parametrize("shape", [(5, 4, 3), (6, 5)])
def test_at_first_the_gate_multiplies_every_voxel_by_sigmoid_1(shape):
    x = torch.rand(2, 3, *shape)
    torch.testing.assert_close(PixelRelation(len(shape))(x), x * 0.731059, rtol=1e-5, atol=0)


def test_the_gate_by_hand_with_the_strongest_voxel_off_the_first_axis():
    torch.manual_seed(0)
    gate, x, peak = PixelRelation(3), torch.rand(1, 2, 4, 5, 6), (2, 3, 1)
    x[0, :, *peak] = 2
    with torch.no_grad():
        gate.one.fill_(0.5), gate.zero.fill_(2.0), gate.scale.fill_(1.5), gate.weight.fill_(1.0)
        scores = torch.empty(4, 5, 6)
        for place in torch.cartesian_prod(*map(torch.arange, scores.shape)).tolist():
            voxel = x[0, :, *place]
            density = [math.exp(-((float(t) * abs(p - q)) ** 2) / (2 * 1.5**2)) / (1.5 * math.sqrt(2 * math.pi)) for t, p, q in zip(gate.theta, place, peak)]
            scores[*place] = 0.5 * voxel @ x[0].mean((1, 2, 3)) + 2 * voxel @ x[0, :, *peak] * sum(density) / 3
        standard = (scores - scores.mean()) / (scores.var(correction=0) + 1e-5).sqrt()
        torch.testing.assert_close(gate(x), x * torch.sigmoid(standard + 1), rtol=1e-4, atol=1e-5)


# fusion


@pytest.fixture
def fusion():
    torch.manual_seed(0)
    return Fusion(3, (2, 4, 8, 16, 32), 10), torch.rand(1, 10, 6, 5, 4), [torch.rand(1, c, 3, 3, 3) for c in (2, 4, 8, 16, 32)]


def test_closed_gates_leave_the_encoders_map_as_it_is(fusion):
    module, encoded, guide = fusion
    for part in (module.positive, module.negative):
        torch.nn.init.zeros_(part.excite.weight), torch.nn.init.zeros_(part.excite.bias)
    assert torch.equal(module(encoded, guide), encoded)


def test_open_gates_add_the_combined_features(fusion):
    module, encoded, guide = fusion
    heard = []
    module.combine.register_forward_hook(lambda _, inputs, output: heard.append(output))
    for part in (module.positive, module.negative):
        torch.nn.init.zeros_(part.excite.weight), torch.nn.init.ones_(part.excite.bias)
    refined = module(encoded, guide)
    assert torch.equal(refined, encoded + heard[0]) and (heard[0] < 0).any() and (heard[0] > 0).any()


def test_gates_are_never_negative_and_differ_by_sign(fusion):
    module, encoded, guide = fusion
    z = torch.rand(1, 10, 4, 4, 4)
    assert (module.positive(z) >= 0).all() and (module.negative(-z) <= 0).all() and not torch.equal(module.positive(z), -module.negative(-z))


def test_without_the_keepers_features_fusion_still_runs():
    segmenter, image = UNet(4, width=5), torch.rand(1, 1, 33, 32, 35)
    guide = [torch.zeros_like(x) for x in Keeper(3, 2, 1)(image)]
    assert GuidedSegmenter(segmenter, channels_of(2, 3))(image, guide).shape == segmenter(image).shape == (1, 4, 33, 32, 35)


def test_fusion_needs_five_channels():
    with pytest.raises(ValueError, match="has 4 channels, and adaptive fusion needs 5"):
        GuidedSegmenter(UNet(4, width=4), CHANNELS)


# backbones by name


@pytest.mark.parametrize(("name", "arguments", "monai", "size"), [
    ("SegResNet", {"init_filters": 8, "blocks_down": (1, 1, 1), "blocks_up": (1, 1)}, SegResNet, 16),
    ("SwinUNETR", {"feature_size": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "window_size": 2}, SwinUNETR, 64),
])  # fmt: skip
def test_monais_networks_say_in_two_halves_what_they_say_as_a_whole(name, arguments, monai, size):
    torch.manual_seed(0)
    backbone, image = build_backbone(name, 3, 3, arguments).eval(), torch.rand(1, 1, size, size, size)
    whole = monai(in_channels=1, out_channels=3, **arguments, **({"spatial_dims": 3} if name == "SegResNet" else {})).eval()
    whole.load_state_dict(backbone.net.state_dict())
    with torch.no_grad():
        maps = backbone.encode(image)
        assert torch.equal(backbone.decode(maps), whole(image)) and torch.equal(backbone(image), whole(image))
        assert tuple(x.shape[1] for x in maps) == backbone.channels and size % multiple_of(name, arguments) == 0
        student = GuidedSegmenter(backbone, channels_of(2, 3))
        assert student(image, Keeper(3, 2, 1)(torch.rand(1, 1, 32, 32, 32))).shape == (1, 3, size, size, size)


def test_arguments_that_do_not_fit_are_one_line():
    with pytest.raises(ValueError, match="SegResNet: got an unexpected keyword argument 'depth'"):
        build_backbone("SegResNet", 3, 3, {"depth": 2})
