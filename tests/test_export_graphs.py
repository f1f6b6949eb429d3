"""Every segmentation method as a graph: in ONNX Runtime and in TorchScript, whatever subset it is given, as torch computes it."""

import pytest
import torch
from exported_runs import SEQUENCES, small

from mstkd.errors import UserError
from mstkd.export.onnx import graph_of, runner
from mstkd.export.window import LabelRule, WindowNetwork, example, largest_difference, tried_subsets
from mstkd.methods import available_methods, load
from mstkd.subsets import possible_subsets

NEAR = 1e-3  # of the largest logit, in float32: norms of few voxels magnify rounding, and another computation is off by tenths
TRUNK = {"network": {"width": 8, "decoder_width": 2, "embed_dim": 24, "layers": 4, "heads": 3, "mlp_dim": 32}}
UNET = {"architecture": "UNet", "arguments": {"channels": [4, 8], "strides": [2]}}
DYNUNET = {"kernel_size": [3] * 3, "strides": [1, 2, 2], "upsample_kernel_size": [2] * 2, "filters": [4, 8, 8]}
UHF = {"network": {"width": 2, "keeper_width": 1, "critic_width": 2}, "base": {"arguments": {"width": 5}}}
PAIR = {"sequences": ("t1_3t", "t1_7t"), "scheme": "tissue3"}
SHASPEC = {"width": 4, "blocks": [1, 1, 1, 1]}

METHODS = {
    "mst_kdnet": (TRUNK, (64, 32, 32), {}),
    "student_only": ({"network": TRUNK["network"] | {"bn_eval": "batch", "last_stride": 1}}, (32, 32, 32), {}),
    "teacher_full": ({"network": TRUNK["network"] | {"norm": "instance", "last_stride": 1}}, (32, 32, 32), {}),
    "kd": ({"student": {"arguments": {"init_filters": 8}}, "teacher": UNET}, (32, 32, 32), {}),
    "mean_teacher": ({"network": UNET}, (16, 16, 16), {}),
    "dedicated": ({"network": UNET, "subset": "t1+t2"}, (16, 16, 16), {}),
    "monai_network": ({"network": UNET}, (16, 16, 16), {}),
    "mmformer": ({"network": {"width": 2, "embed_dim": 8, "heads": 2, "mlp_dim": 16}}, (32, 32, 32), {}),
    "shaspec": ({"network": SHASPEC}, (64, 64, 32), {}),
    "uhf_guided": (UHF, (32, 32, 32), PAIR),
    "uhf_guided_2d": (UHF | {"planes": ["axial", "sagittal"]}, (32, 32, 32), PAIR),
}
OTHERS = {
    "released shaspec": ("shaspec", {"network": SHASPEC | {"generated": "first", "skip_fill": "reference", "reference_global": True}}, (64, 32, 16)),
    "DynUNet": (
        "monai_network",
        {"network": {"architecture": "DynUNet", "arguments": DYNUNET}},
        (16, 16, 16),
    ),
    "SwinUNETR": ("monai_network", {"network": {"architecture": "SwinUNETR", "arguments": {"feature_size": 12, "depths": [2, 1, 1, 1]}}}, (64, 32, 32)),  # one block with shifted windows
}


SMALLEST = {"mst_kdnet": (32, 32, 32), "mmformer": (32, 16, 16), "shaspec": (64, 32, 16), "released shaspec": (64, 32, 16)}


def made(name, crop=None):
    method, (section, usual, *named) = (OTHERS[name][0], OTHERS[name][1:]) if name in OTHERS else (name, METHODS[name])
    words = named[0] if named else {}
    return small({"name": method, **section}, crop or usual, **words), crop or usual, words.get("sequences", SEQUENCES)


def test_no_segmentation_method_is_left_out():
    assert {name for name in available_methods() if load(name).task == "segmentation"} == set(METHODS)


@pytest.mark.parametrize("name", SMALLEST)
def test_one_path_for_every_subset_gives_the_same_logits(name):
    """As `predict` gives them, which encodes what is available alone; whatever stands in a hidden sequence. In double precision: norms of
    few voxels magnify rounding."""
    method, crop, sequences = made(name, SMALLEST[name])
    for network in method.networks.values():
        network.double()
    image = example(len(sequences), crop)[0].double()
    graph = WindowNetwork(method, method.scored[0])
    assert largest_difference(method, method.scored[0], image, possible_subsets(sequences, None), graph) < 1e-6  # the logits are float32
    hidden = image.clone()
    hidden[:, 1:] = torch.nan
    alone = torch.tensor([[True, False, False, False]])
    assert torch.equal(graph(image, alone), graph(hidden, alone)) and graph(hidden, alone).isfinite().all()


def bound_to_a_device(graph: torch.jit.ScriptModule) -> set[str]:
    """Operators that were written down with the device on which they ran."""
    whole = graph.inlined_graph  # its nodes live as long as it does
    return {use.user.kind() for node in whole.findAllNodes("prim::Constant") if str(node.output().type()) == "Device" for use in node.output().uses()}


@pytest.mark.parametrize("name", [*METHODS, *(pytest.param(name, marks=pytest.mark.slow if name == "SwinUNETR" else ()) for name in OTHERS)])
def test_graphs_compute_what_torch_computes(name):
    method, crop, sequences = made(name)
    network, subsets = method.scored[0], tried_subsets(method, sequences)
    image, available = example(len(sequences), crop)
    module = WindowNetwork(method, network)
    model = graph_of(module, {"image": image, "available": available}, {"image": {0: "batch"}, "available": {0: "batch"}}, "logits")
    in_onnx, in_script = runner(model.SerializeToString()), torch.jit.trace(module, (image, available), check_trace=False)
    assert bound_to_a_device(in_script) <= {"aten::to", "aten::arange"} or name == "SwinUNETR"  # indices, which may lie in host memory
    found = [largest_difference(method, network, image, subsets, graph) for graph in (in_onnx, in_script)]
    print(f"{name}: ONNX Runtime {found[0]:.1e}, TorchScript {found[1]:.1e} of the largest logit, {len(subsets)} subsets")
    assert max(found) < NEAR
    two, mixed = torch.cat([image, -image]), torch.tensor([subsets[0], subsets[-1]])
    expected = torch.cat([module(image, mixed[:1]), module(-image, mixed[1:])])
    for graph in (in_onnx, in_script):  # another subset in each sample
        assert (graph(two, mixed) - expected).abs().max() < NEAR * expected.abs().max()


@pytest.mark.parametrize("name", ["mst_kdnet", "uhf_guided"])
def test_labels_of_any_size_are_drawn_alike(name):
    method, _, _ = made(name)
    channels = 4
    logits = torch.randn(2, channels, 7, 6, 5, generator=torch.Generator().manual_seed(1))
    model = graph_of(LabelRule(method), {"logits": logits}, {"logits": {0: "batch", 2: "x", 3: "y", 4: "z"}}, "labels")
    drawn = runner(model.SerializeToString())
    for size in ((1, channels, 9, 4, 3), (3, channels, 5, 5, 8)):
        logits = torch.randn(size, generator=torch.Generator().manual_seed(2))
        assert torch.equal(drawn(logits), method.to_labels(logits)) and len(drawn(logits).unique()) == 4


def test_noise_is_no_graph():
    method = small({"name": "mst_kdnet", **TRUNK, "missing_fill": "noise"}, (64, 32, 32))
    with pytest.raises(UserError, match="method.missing_fill noise: a graph holds no noise; export this run with --format safetensors"):
        WindowNetwork(method, "student")(*example(4, (64, 32, 32)))
