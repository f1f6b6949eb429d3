"""A user's DeepSpeed configuration (`train.deepspeed`) beside the recipe: "auto" is filled in, what contradicts is refused by name.

DeepSpeed itself ignores a key that it does not know at the top level, and stops at one inside a section.
"""

import copy
import difflib
from dataclasses import dataclass
from typing import Any

from mstkd.errors import UserError

AUTO = "auto"
# The top-level keys of DeepSpeed 0.19 that reach it unchanged, besides those that the recipe fills in.
PASSED_ON = {
    "zero_optimization", "optimizer", "fp16", "bf16", "torch_autocast", "communication_data_type", "data_types", "prescale_gradients",
    "gradient_predivide_factor", "disable_allgather", "disable_python_gc", "dump_state", "steps_per_print", "wall_clock_breakdown",
    "memory_breakdown", "flops_profiler", "comms_logger", "timers", "aio", "log_level",
    "zero_force_ds_cpu_optimizer", "vocabulary_size",
}  # fmt: skip
OTHER_WAYS = "it changes what a step computes, and the same recipe must give the same steps on any number of ranks"
REFUSED = {
    "checkpoint": "mstkd writes, checks and resumes checkpoints itself, see the recipe's checkpoint section",
    "checkpoint_writer": "mstkd writes checkpoints itself, see the recipe's checkpoint section",
    "datastates_ckpt": "mstkd writes checkpoints itself, see the recipe's checkpoint section",
    "activation_checkpointing": "use train.recompute",
    "compile": "use train.compile",
    "managed_gradient_accumulation": "accumulation follows from train.global_batch, train.micro_batch and the ranks",
    "gradient_allreduce_op": OTHER_WAYS,
    "data_efficiency": "the recipe's data section alone decides what a step sees",
    "dataloader_drop_last": "the recipe's data section alone decides what a step sees",
    **dict.fromkeys(("tensorboard", "csv_monitor", "wandb", "comet"), "mstkd tracks runs itself, see the recipe's tracking section"),
    "autotuning": "use mstkd plan, and try what it shows",
    "weight_quantization": OTHER_WAYS,
    "hybrid_engine": "it is for generating text",
    **dict.fromkeys(
        ("pipeline", "tensor_parallel", "expert_parallel", "sequence_parallel_size", "use_data_before_expert_parallelism"),
        "mstkd's ranks share out data only",
    ),
    "zero_optimization.zenflow": OTHER_WAYS,
    "zero_optimization.compute_grad_norm": "mstkd finds non-finite gradients by it",
    "zero_optimization.elastic_checkpoint": "mstkd writes checkpoints itself",
    "zero_optimization.load_from_fp32_weights": "mstkd resumes checkpoints itself",
    "zero_optimization.cpu_offload": "use train.offload.optimizer",
    "zero_optimization.cpu_offload_param": "use train.offload.parameters",
    "zero_optimization.cpu_offload_use_pin_memory": "use zero_optimization.offload_optimizer.pin_memory",
    **dict.fromkeys(
        (f"zero_optimization.zero_quantized_{what}" for what in ("weights", "nontrainable_weights", "gradients")), OTHER_WAYS
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Owned:
    """A value that the recipe decides, and the recipe's key that changes it; None: nothing does."""

    value: Any
    key: str | None


def merge(given: dict, owned: dict[str, Owned], defaults: dict[str, Any]) -> dict:
    """DeepSpeed's configuration of one role from a user's (`given`). Dotted keys: "zero_optimization.stage".

    `owned` fills what is absent or "auto"; the same value there is fine, another is refused. `defaults` give way to `given`.
    Any other "auto" is left to DeepSpeed's own default. Raises UserError naming the key of the JSON and what to change.
    """
    _check_keys(given, {path.partition(".")[0] for path in owned})
    config = _without_auto(copy.deepcopy(given))
    for path, ours in owned.items():
        found = _find(config, path)
        if found is not None and found != ours.value:
            change = f"change {ours.key}, or " if ours.key else ""
            raise UserError(f"train.deepspeed: {path} is {found!r} and the recipe says {ours.value!r}; {change}write \"auto\" in the JSON")
        _put(config, path, ours.value)
    for path, value in defaults.items():
        if _find(config, path) is None:
            _put(config, path, value)
    return config


def _check_keys(given: dict, ours: set[str]) -> None:
    for path, reason in REFUSED.items():
        if _find(given, path) not in (None, AUTO):
            raise UserError(f"train.deepspeed: {path} cannot be set: {reason}; remove it")
    if not _left_open(given.get("scheduler")):
        raise UserError(
            "train.deepspeed: scheduler contradicts the recipe, whose roles have their own schedules (train.roles.<role>.schedule); "
            'remove it, or write "auto" for its params'
        )
    known = PASSED_ON | ours | {path for path in REFUSED if "." not in path} | {"scheduler"}
    if unknown := sorted(set(given) - known):
        close = difflib.get_close_matches(unknown[0], known, n=1)
        advice = f"did you mean {close[0]!r}?" if close else "remove it"
        raise UserError(f"train.deepspeed: DeepSpeed has no key {unknown[0]!r} and would ignore it; {advice}")


def _left_open(scheduler: Any) -> bool:
    """Whether a scheduler section leaves every value to the recipe, as files written for other trainers do."""
    if not isinstance(scheduler, dict):
        return scheduler in (None, AUTO)
    parameters = scheduler.get("params", AUTO)
    return parameters == AUTO or isinstance(parameters, dict) and set(parameters.values()) <= {AUTO}


def _without_auto(values: dict) -> dict:
    values.pop("scheduler", None)
    kept = {}
    for key, value in values.items():
        if value != AUTO:
            kept[key] = _without_auto(value) if isinstance(value, dict) else value
    return kept


def _find(values: dict, path: str) -> Any:
    """The value at a dotted key, None if there is none."""
    for part in path.split("."):
        if values is None or values == AUTO:
            return None
        if not isinstance(values, dict):
            raise UserError(f"train.deepspeed: {path.rpartition('.')[0]} must hold keys, not {values!r}")
        values = values.get(part)
    return values


def _put(values: dict, path: str, value: Any) -> None:
    *sections, last = path.split(".")
    for section in sections:
        values = values.setdefault(section, {})
    values[last] = value
