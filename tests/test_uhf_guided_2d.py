"""UHF-guided segmentation on slices: what is cut and joined, classes without sides, planes fused by how sure they are."""

import json

import pytest
import torch
from small_uhf import CROP, NETWORK, PAIR, START, facts, make_batch

from mstkd.errors import UserError
from mstkd.methods import build
from mstkd.methods.uhf_guided_2d import WEIGHTS, fuse, sliced
from mstkd.models.uhf_planes import AXES, cut, draw_slices, slice_by_slice
from mstkd.shards.spec import LABEL_SCHEMES, MALC27
from mstkd.targets import ExclusiveClasses, SidelessClasses

SMALL = {"network": NETWORK | {"width": 5}, "base": {"arguments": {"width": 5}}, "slices": 3}


def make(**section):
    torch.manual_seed(0)
    return build({"name": "uhf_guided_2d", **SMALL, **section}, facts())


# slices of volumes


@pytest.mark.parametrize("plane", AXES)
def test_slices_are_cut_and_joined_along_the_planes_axis(plane):
    volume = torch.arange(2 * 3 * 4 * 5 * 6.0).reshape(2, 3, 4, 5, 6)
    axis = AXES[plane]
    places = torch.tensor([[2, 0], [1, 1]])
    slices = cut(volume, plane, places)
    for number, (sample, place) in enumerate([(0, 2), (0, 0), (1, 1), (1, 1)]):
        assert torch.equal(slices[number], volume[sample].select(axis - 1, place))
    heard = []

    def network(part):
        heard.append(part.shape[1:])
        return torch.cat([part, 2 * part], 1)

    assert torch.equal(slice_by_slice(network, volume, plane), torch.cat([volume, 2 * volume], 1))
    assert set(heard) == {slices.shape[1:]}


def test_drawn_slices_show_brain():
    brain = torch.zeros(2, 32, 32, 32, dtype=torch.bool)
    brain[0, 3:5, 7, 9], brain[1, 10, 11, 12:14] = True, True
    torch.manual_seed(0)
    found = {plane: [set(row.tolist()) for row in draw_slices(brain, plane, 20)] for plane in AXES}
    assert found == {"sagittal": [{3, 4}, {10}], "coronal": [{7}, {11}], "axial": [{9}, {12, 13}]}
    assert draw_slices(torch.zeros_like(brain), "axial", 5).shape == (2, 5)


def test_a_batch_of_slices_has_the_voxels_of_its_volumes():
    batch, places = make_batch(samples=2), torch.tensor([[3, 9], [0, 31]])
    slices = sliced(batch, "coronal", places)
    assert slices.subject == ["subject-0", "subject-0", "subject-1", "subject-1"] and slices.image.shape == (4, 2, 32, 32)
    assert torch.equal(slices.image[3], batch.image[1, :, :, 31]) and torch.equal(slices.label[1], batch.label[0, :, 9])


# classes


def test_sagittal_classes_are_the_published_ones():
    classes = SidelessClasses(LABEL_SCHEMES["malc27"])
    merges = {1: 3, 2: 4, 5: 18, 6: 19, 7: 20, 8: 21, 9: 22, 10: 23, 11: 24, 15: 25, 16: 26, 17: 27}
    assert classes.kept == (0, 3, 4, 12, 13, 14, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27) and classes.count == 16
    label = torch.arange(28, dtype=torch.uint8)[None]
    assert classes.encode(label)[0].tolist() == [classes.kept.index(merges.get(value, value)) for value in range(28)]
    assert len(MALC27) == 27 and SidelessClasses(LABEL_SCHEMES["tissue3"]).count == 4  # tissues have no sides


def test_a_sagittal_class_feeds_both_sides_and_a_middle_one_itself():
    classes = SidelessClasses(LABEL_SCHEMES["malc27"])
    for kept, fed in ((3, [1, 3]), (12, [12]), (27, [17, 27]), (0, [0])):
        probability = torch.zeros(1, 16, 2, 2, 2)
        probability[:, classes.kept.index(kept)] = 1
        spread = classes.spread(probability)
        assert spread.shape == (1, 28, 2, 2, 2) and spread[0, :, 0, 0, 0].nonzero().flatten().tolist() == fed


# planes together


def test_planes_that_agree_are_followed_and_weights_add_up():
    assert sum(WEIGHTS.values()) == pytest.approx(1)
    scheme = LABEL_SCHEMES["malc27"]
    classes = {plane: (SidelessClasses if plane == "sagittal" else ExclusiveClasses)(scheme) for plane in AXES}
    for value in range(28):
        label = torch.full((1, 2, 2, 2), value, dtype=torch.uint8)
        sure = {plane: torch.nn.functional.one_hot(own.encode(label), own.count).movedim(-1, 1).float() for plane, own in classes.items()}
        fused = fuse(sure, classes)
        assert torch.equal(classes["axial"].decode(fused), label) and float(fused.max()) == pytest.approx(1)


def test_a_sure_plane_outweighs_an_unsure_one():
    classes = dict.fromkeys(AXES, ExclusiveClasses(LABEL_SCHEMES["tissue3"]))
    said = {"axial": [0.45, 0.55, 0, 0], "coronal": [0.95, 0.05, 0, 0], "sagittal": [0.4, 0.6, 0, 0]}  # by votes it would be class 1
    fused = fuse({plane: torch.tensor(values)[None, :, None, None, None] for plane, values in said.items()}, classes)
    assert fused.flatten().tolist() == pytest.approx([0.64, 0.36, 0, 0])
    two = fuse({plane: torch.tensor(said[plane])[None, :] for plane in ("axial", "sagittal")}, classes)
    assert two.flatten().tolist() == pytest.approx([0.45 * 2 / 3 + 0.4 / 3, 0.55 * 2 / 3 + 0.6 / 3, 0, 0])


def test_the_student_says_what_its_planes_say_slice_by_slice():
    method, image = make(), torch.rand(1, 2, 34, 33, 32)
    for network in method.networks.values():
        network.eval()
    logits = method.predict(image, torch.tensor([[True, False]]))
    assert logits.shape == (1, 4, 34, 33, 32)
    coronal = image[:, :1, :, 7]
    with torch.no_grad():
        alone = make(planes=["coronal"])
        alone.networks["student"].planes["coronal"].load_state_dict(method.networks["student"].planes["coronal"].state_dict())
        alone.networks["keeper"].planes["coronal"].load_state_dict(method.networks["keeper"].planes["coronal"].state_dict())
        student, keeper = (alone.networks[name].planes["coronal"].eval() for name in ("student", "keeper"))
        expected = student(coronal, keeper(coronal)).softmax(1)
    torch.testing.assert_close(alone.predict(image, torch.tensor([[True, False]]))[:, :, :, 7].exp(), expected, atol=1e-6, rtol=1e-4)
    assert method.predict(image, None, "keeper").shape == method.predict(image, None, "teacher").shape == (1, 1, 34, 33, 32)
    image[:, 1] = float("nan")
    assert torch.equal(method.predict(image, None), logits)


def test_each_stage_trains_all_planes_and_only_what_it_should():
    method = make()
    for stage, trained in {"base": {"base"}, "teacher": {"teacher"}, "keeper": {"critic", "keeper"}, "fusion": {"student"}}.items():
        carry = {}
        for name, role in method.roles(stage).items():
            assert set(dict(role.step.named_children())) == {"trained"} and role.networks == (name,)
            assert sum(p.numel() for p in role.step.parameters()) == sum(p.numel() for p in method.networks[name].parameters())
            for network in method.networks.values():
                network.zero_grad(), network.requires_grad_(network is method.networks[name])
            output = role.step.train()(make_batch(), carry, START)
            output.loss.backward()
            seen = {key: value for key, value in carry.items()}
            carry |= output.carry
            assert not seen or all(torch.equal(seen[key], carry[key]) for key in seen)  # critic and keeper see the same slices
            for plane in AXES:
                gradients = [p.grad for p in method.networks[name].planes[plane].parameters() if p.ndim > 1]
                assert all(g is not None for g in gradients) and any(g.any() for g in gradients)
                assert any(key.endswith(f"_{plane}") for key in output.scalars)
        assert set(method.roles(stage)) == trained


def test_fusion_begins_with_every_planes_base():
    method = make()
    method.begin("fusion")
    for plane in AXES:
        base, student = method.networks["base"].planes[plane].state_dict(), method.networks["student"].planes[plane].segmenter.state_dict()
        assert all(torch.equal(value, student[key]) for key, value in base.items())


def test_one_plane_may_be_named_alone():
    method = make(planes="sagittal")
    assert method.config.planes == ["sagittal"] and all(list(network.planes) == ["sagittal"] for network in method.networks.values())


@pytest.mark.parametrize(("change", "expected"), [
    ({"planes": []}, "name one or more different ones"), ({"planes": ["axial", "axial"]}, "name one or more different ones"),
    ({"planes": ["oblique"]}, "method.planes"), ({"slices": 0}, "method.slices"),
])  # fmt: skip
def test_bad_settings_are_one_line(change, expected):
    with pytest.raises(UserError) as caught:
        build({"name": "uhf_guided_2d", **change}, facts())
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_a_run_on_slices_is_scored_as_a_whole(one_rank, tmp_path):
    from mstkd.evaluate.run import evaluate_run
    from mstkd.shards.build import build as build_set
    from mstkd.shards.phantom import write_phantom

    write_phantom(tmp_path / "nifti", subjects=4, size=32, seed=3, paired_7t=True)
    build_set("phantom_7t", tmp_path / "nifti", tmp_path / "shards")
    section = SMALL | {"planes": ["axial", "sagittal"]}
    words = [f"data.shards={tmp_path / 'shards'}", f"runs_dir={tmp_path}", "name=slices", f"data.crop={list(CROP)}", "train.steps=2", "train.log_every=1",
             "validate.every_steps=2", "validate.max_cases=1", *(f"method.{key}={json.dumps(value)}" for key, value in section.items())]  # fmt: skip
    rows = one_rank.run("teacher_ranks.py", "run", recipe="uhf_2d_phantom", overrides=words)[0]
    assert list(rows) == ["base", "teacher", "keeper", "fusion"] and "train/dice_sagittal" in rows["fusion"][2] and rows["keeper"][2]["val/psnr"] > 0
    summary = evaluate_run(tmp_path / "slices")
    assert list(summary["subsets"]) == [PAIR[0]] and list(summary["mean"]) == ["CSF", "GM", "WM"]
