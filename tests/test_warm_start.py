"""Starting from another run's weights: its sequences must be those of this set, in this order."""

import json

import pytest
import torch
from safetensors.torch import save_file
from small_m2dn import SEQUENCES, make

from mstkd.engine.warm_start import check_order, warm_start
from mstkd.errors import UserError
from mstkd.methods import load


def run(folder, sequences):
    folder.mkdir()
    (folder / "record.json").write_text(json.dumps({"data": {"sequences": sequences}}))
    return folder


@pytest.mark.parametrize(("theirs", "message"), [
    (["t1", "flair", "t1ce", "t2"], "was trained on t1, flair, t1ce, t2, in that order, and this set has flair, t1, t1ce, t2: its channels would be taken for"),
    (["t1", "t2"], "was trained on t1, t2, in that order"),
    (["flair", "t1", "pd", "t2"], "was trained on flair, t1, pd, t2, in that order"),
])  # fmt: skip
def test_another_order_is_refused_with_one_line(theirs, message, tmp_path):
    with pytest.raises(UserError) as caught:
        check_order(run(tmp_path / "run", theirs), make(), SEQUENCES)
    assert message in str(caught.value) and str(caught.value).startswith("init_from ") and "\n" not in str(caught.value)


def test_the_same_order_passes_and_so_do_a_file_more_sequences_and_networks_that_know_names(tmp_path):
    check_order(run(tmp_path / "same", [*SEQUENCES]), make(), SEQUENCES)
    check_order(run(tmp_path / "fewer", ["flair", "t1"]), make(), SEQUENCES)
    check_order(tmp_path / "weights.safetensors", make(), SEQUENCES)
    check_order(run(tmp_path / "other", ["t1", "flair", "t1ce", "t2"]), load("mmformer"), SEQUENCES)


def test_weights_and_their_average_are_taken_alike(tmp_path):
    source, target = make(), make()
    with torch.no_grad():
        for network in source.networks.values():
            for parameter in network.parameters():
                parameter.add_(1)
    save_file({f"{name}.{key}": value.clone() for name, network in source.networks.items() for key, value in network.state_dict().items()}, tmp_path / "w.safetensors")
    warm_start(target, [tmp_path / "w.safetensors"])
    for name, network in target.networks.items():
        assert all(torch.equal(value, source.networks[name].state_dict()[key]) for key, value in network.state_dict().items())
