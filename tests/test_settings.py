"""From the recipe and a user's DeepSpeed JSON to DeepSpeed's configuration: what passes, what is filled in, what is refused."""

import json

import pytest
from short_runs import TINY

from mstkd.config import AvailabilityConfig, OptimizerConfig, RunConfig, TrainConfig, load_config, resolved
from mstkd.data.availability import Availability
from mstkd.engine.backend import check_role
from mstkd.engine.backend.settings import deepspeed_config, role_settings
from mstkd.errors import UserError
from mstkd.methods import Role, RoleStep

# As the documentation of a widely used trainer has it, for ZeRO-3.
AUTO_FILE = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2, "min_loss_scale": 1},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}},
    "zero_optimization": {
        "stage": 3, "offload_optimizer": {"device": "none", "pin_memory": True}, "offload_param": {"device": "none", "pin_memory": True},
        "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9, "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto", "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9, "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "steps_per_print": 2000, "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto", "wall_clock_breakdown": False,
}  # fmt: skip


def test_an_override_changes_the_role_that_it_names_and_no_other():
    """In the recipe one anchor stands for all of them."""
    before = {name: role.optimizer.lr for name, role in load_config("uhf_phantom").train.roles.items()}
    after = {name: role.optimizer.lr for name, role in load_config("uhf_phantom", ["train.roles.base.optimizer.lr=0.5"]).train.roles.items()}
    assert after == before | {"base": 0.5} != before


def test_a_mistake_below_an_overridden_key_is_the_overrides():
    with pytest.raises(UserError, match=r"override 'checkpoint=\{keep: 0\}': checkpoint.keep"):
        load_config("mst_kdnet_phantom", ["checkpoint={keep: 0}"])


def test_there_is_no_fixed_draw_of_all_subsets():
    with pytest.raises(UserError, match="subset 'all'.*flair, t1, t1ce, t2"):
        Availability(AvailabilityConfig(kind="fixed", subsets="all"), ("flair", "t1", "t1ce", "t2"))


def role(optimizer: str = "adam", **declared) -> Role:
    return Role(RoleStep(), ("student",), optimizer=OptimizerConfig(name=optimizer, lr=1e-3), **declared)


def configured(deepspeed: dict | None = None, optimizer: str = "adam", **train) -> dict:
    config = TrainConfig(**{"global_batch": 4, "steps": 1, "zero_stage": 2, **train}, deepspeed=deepspeed or {})
    given = role(optimizer)
    check_role("networks", given, config, 2)
    return deepspeed_config("networks", role_settings("networks", given, config), config, 2, 1000)


def test_a_file_full_of_auto_is_filled_from_the_recipe():
    got = configured(AUTO_FILE, "adamw", zero_stage=3, gradient_clipping=0.5)
    assert (got["train_batch_size"], got["train_micro_batch_size_per_gpu"], got["gradient_accumulation_steps"]) == (4, 1, 2)
    assert got["optimizer"] == {
        "type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.0, "betas": [0.9, 0.999], "torch_adam": True, "adam_w_mode": True, "fused": True},
    }  # fmt: skip
    assert got["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"} and got["bf16"] == {"enabled": False}
    assert got["gradient_clipping"] == 0.5 and got["zero_optimization"]["reduce_bucket_size"] == 1000
    assert "scheduler" not in got and '"auto"' not in json.dumps(got)
    assert got["zero_optimization"]["sub_group_size"] == 1e9 and got["steps_per_print"] == 2000


@pytest.mark.parametrize(("given", "parts"), [
    ({"train_batch_size": 8}, ["train_batch_size is 8 and the recipe says 4", "train.global_batch"]),
    ({"train_micro_batch_size_per_gpu": 2}, ["train_micro_batch_size_per_gpu is 2", "train.micro_batch"]),
    ({"gradient_accumulation_steps": 4}, ["gradient_accumulation_steps is 4 and the recipe says 2", "number of ranks"]),
    ({"gradient_clipping": 1.0}, ["gradient_clipping is 1.0 and the recipe says 0.0", "train.gradient_clipping"]),
    ({"zero_optimization": {"stage": 3}}, ["zero_optimization.stage is 3 and the recipe says 2", "train.zero_stage"]),
    ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, ["offload_optimizer.device is 'cpu'", "train.offload.optimizer"]),
    ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, ["offload_param.device is 'nvme'", "train.offload.parameters"]),
    ({"zero_optimization": {"cpu_offload": True}}, ["zero_optimization.cpu_offload", "train.offload.optimizer"]),
    ({"optimizer": {"type": "Lion"}}, ["optimizer.type is 'Lion' and the recipe says 'Adam'", "train.roles.networks.optimizer.name"]),
    ({"optimizer": {"params": {"lr": 1e-2}}}, ["optimizer.params.lr is 0.01", "train.roles.networks.optimizer.lr"]),
    ({"bf16": {"enabled": True}}, ["bf16.enabled is True", "train.precision, which computes over fp32 weights"]),
    ({"fp16": {"enabled": True}}, ["fp16.enabled is True", "train.precision"]),
    ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, ["torch_autocast.dtype is 'float16'", "train.precision"]),
    ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 100}}}, ["scheduler", "train.roles.<role>.schedule"]),
    ({"checkpoint": {"load_universal": True}}, ["checkpoint cannot be set", "remove it"]),
    ({"activation_checkpointing": {"partition_activations": True}}, ["activation_checkpointing", "train.recompute"]),
    ({"zero_optimization": {"compute_grad_norm": False}}, ["compute_grad_norm", "non-finite"]),
    ({"tensor_parallel": {"autotp_size": 2}}, ["tensor_parallel"]),
    ({"comunication_data_type": "fp32"}, ["no key 'comunication_data_type'", "did you mean 'communication_data_type'?"]),
    ({"zero_optimization": {"overlap_com": True}}, ["DeepSpeedZeroConfig overlap_com", "correct the JSON"]),
    ({"zero_optimization": {"reduce_bucket_size": -1}}, ["reduce_bucket_size", "greater than 0"]),
    ({"zero_optimization": 2}, ["zero_optimization must hold keys, not 2"]),
], ids=lambda value: json.dumps(value) if isinstance(value, dict) else "")  # fmt: skip
def test_what_contradicts_the_recipe_is_one_line(given, parts):
    with pytest.raises(UserError) as caught:
        configured(given)
    message = str(caught.value)
    assert message.startswith("train.deepspeed: ") and "\n" not in message and all(part in message for part in parts), message


def test_the_same_value_as_the_recipe_s_is_no_contradiction():
    got = configured({"train_batch_size": 4, "zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam", "params": {"betas": [0.9, 0.999]}}})
    assert got["optimizer"]["params"]["adam_w_mode"] is False


def test_a_contradiction_names_the_role_s_own_key():
    with pytest.raises(UserError, match=r"change train\.roles\.networks\.zero_stage"):
        configured({"zero_optimization": {"stage": 3}}, roles={"networks": {"zero_stage": 1}})


@pytest.mark.parametrize(("train", "declared", "expected"), [
    ({"zero_stage": 3}, {"double_backward": True}, "train.roles.networks.zero_stage: networks differentiates twice, which ZeRO-3 cannot"),
    ({"zero_stage": 3, "compile": True}, {}, "train.compile: networks runs under ZeRO-3"),
    ({"zero_stage": 0, "offload": {"optimizer": True}}, {}, "train.offload.optimizer: networks runs under ZeRO-0"),
    ({"zero_stage": 2, "offload": {"parameters": True}}, {}, "train.offload.parameters: networks runs under ZeRO-2"),
    ({"zero_stage": 0, "roles": {"networks": {"offload": {"optimizer": True}}}}, {}, "train.roles.networks.offload.optimizer: networks runs under ZeRO-0"),
])  # fmt: skip
def test_what_a_stage_cannot_do_is_refused_by_name(train, declared, expected):
    with pytest.raises(UserError, match=expected.replace(".", r"\.")):
        role_settings("networks", role(**declared), TrainConfig(global_batch=4, steps=1, **train))


def test_what_the_recipe_does_not_decide_reaches_deepspeed(two_ranks):
    given = {
        "zero_optimization": {"overlap_comm": True, "reduce_bucket_size": 777, "stage3_param_persistence_threshold": 55},
        "communication_data_type": "fp32", "optimizer": {"params": {"eps": 1e-5}}, "wall_clock_breakdown": True, "fp16": {"loss_scale_window": 33},
    }  # fmt: skip
    for facts in two_ranks.run("settings_ranks.py", "engine_facts", train={"precision": "fp32", "zero_stage": 3, "deepspeed": given}):
        expected = {"stage": 3, "overlap_comm": True, "bucket": 777, "persistence": 55, "communication": "torch.float32", "eps": 1e-5, "breakdown": True,
                    "window": 33, "clipping": 0.0, "accumulation": 2, "optimizer": "Adam"}  # fmt: skip
        assert facts | expected == facts


# train.deepspeed as a path


def run_config(deepspeed) -> RunConfig:
    return load_config("mst_kdnet_phantom", [f"train.deepspeed={deepspeed}"])


def test_a_path_is_read_once_and_kept_as_keys(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"overlap_comm": True}}))
    config = run_config("ds.json")
    (tmp_path / "ds.json").unlink()
    assert resolved(config)["train"]["deepspeed"] == {"zero_optimization": {"overlap_comm": True}}
    assert RunConfig.model_validate(resolved(config)).train == config.train


@pytest.mark.parametrize(("content", "part"), [
    (None, "cannot be read (No such file or directory)"), ("{\n 'a': 1}", "not valid JSON at line 2"), ("[]", "holds no JSON object"),
    (b"\xff\xfe", "not a text file"),
])  # fmt: skip
def test_a_file_that_is_no_json_is_one_line(tmp_path, content, part):
    path = tmp_path / "ds.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        run_config(path)
    assert "train.deepspeed: " in str(caught.value) and part in str(caught.value) and str(path) in str(caught.value)


def test_a_contradiction_ends_a_run_before_it_begins(one_rank, phantom_shards, tmp_path):
    words = [f"data.shards={phantom_shards}", f"runs_dir={tmp_path}", "train.deepspeed={zero_optimization: {stage: 3}}"]
    with pytest.raises(AssertionError, match=r"UserError: train\.deepspeed: zero_optimization\.stage is 3"):
        one_rank.run("train_ranks.py", "run", recipe="mst_kdnet_phantom", overrides=words)
    assert not list(tmp_path.iterdir())


# train.deterministic and train.compile


@pytest.mark.parametrize("pool", ["one_rank", "two_ranks"])
def test_two_deterministic_runs_are_the_same_to_the_last_bit(pool, phantom_shards, tmp_path, request):
    curves, weights = [], []
    for runs in (tmp_path / "first", tmp_path / "second"):
        words = [*TINY, f"data.shards={phantom_shards}", f"runs_dir={runs}", "train.deterministic=true", "train.steps=2", "data.crop=[32, 32, 32]"]
        curves.append(request.getfixturevalue(pool).run("train_ranks.py", "run", recipe="mst_kdnet_phantom", overrides=words)[0]["curve"])
        weights.append([path.read_bytes() for path in sorted(runs.glob("*/distill/checkpoints/*/*.safetensors"))])
    assert curves[0] == curves[1] and len(curves[0]) == 2
    assert weights[0] == weights[1] and len(weights[0]) == 2


def test_an_operation_that_cannot_be_deterministic_is_one_line(two_ranks):
    assert two_ranks.run("settings_ranks.py", "undetermined", deterministic=False) == ["done", "done"]
    for line in two_ranks.run("settings_ranks.py", "undetermined", deterministic=True):
        assert line.startswith("train.deterministic: put_, which role student uses, has no deterministic implementation on cpu; set"), line


def test_compiled_training_gives_the_eager_curve(two_ranks, tmp_path):
    def train(**more):
        result = two_ranks.run("engine_ranks.py", "train", folder=str(tmp_path / str(more)), zero=2, more=more)[0]
        return [row["train/loss_networks"] for _, row in result["rows"] if "train/loss_networks" in row], result["weights"]["student"].keys()

    (eager, names), (compiled, same_names) = train(), train(compile=True)
    assert names == same_names
    assert max(abs(a - b) for a, b in zip(eager, compiled, strict=True)) < 1e-4  # fused kernels round otherwise
    for compile in (False, True):
        assert two_ranks.run("settings_ranks.py", "engine_facts", train={"compile": compile, "zero_stage": 2})[0]["compiled"] == [compile] * 2


def test_what_is_differentiated_twice_is_not_compiled(one_rank):
    assert one_rank.run("settings_ranks.py", "engine_facts", train={"compile": True, "zero_stage": 0}, double_backward=True)[0]["compiled"] == [False] * 2
