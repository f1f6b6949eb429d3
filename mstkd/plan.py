"""`mstkd plan`: what a recipe takes on a number of ranks, before anyone queues for it. Needs no GPU and starts no rank."""

import logging
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mstkd import methods
from mstkd.config import RunConfig
from mstkd.data.training import TrainingSet, open_training
from mstkd.dry_step import empty_batch, fake_tensors, kept_for_backward
from mstkd.engine import backend
from mstkd.engine.backend.settings import deepspeed_config
from mstkd.errors import UserError
from mstkd.files import existing_folder
from mstkd.footprint import Memory, checkpoint_bytes, role_memory, weight_bytes
from mstkd.methods import Method, Role
from mstkd.precision import AUTOCAST
from mstkd.teacher_source import given_networks
from mstkd.train import build_method, stage_roles, total_steps
from mstkd.traffic import PERSISTENT, bytes_per_step, count_elements

log = logging.getLogger(__name__)
LOG_LINE = 4_000  # bytes of metrics.jsonl, MLflow's data base and rank 0's log per log line, some 20 figures


@dataclass(frozen=True)
class RolePlan:
    """One role of one stage; bytes per rank."""

    name: str
    networks: dict[str, int]  # parameters by name
    optimizer: str
    zero_stage: int
    memory: Memory
    activations: int | None  # kept for the backward pass of one micro-batch; None: not known
    sent: float  # per optimiser step, under nccl
    sent_gloo: float
    checkpoint: float  # all ranks together

    @property
    def parameters(self) -> int:
        return sum(self.networks.values())


@dataclass(frozen=True)
class StagePlan:
    name: str
    steps: int
    roles: list[RolePlan]
    frozen: dict[str, int]  # parameters of networks that this stage does not train
    frozen_bytes: float  # of them and of moving averages, on the device
    frozen_host_bytes: float  # of them, in host memory
    batch: int  # bytes of a micro-batch
    checkpoint: float  # bytes of one
    best: float  # bytes that the best one has more
    disk: float  # bytes of all that are kept at once, and logs

    @property
    def device_bytes(self) -> float | None:
        """Per rank; roles run one after another, so the largest activations count. None: activations are not known."""
        if any(role.activations is None for role in self.roles):
            return None
        state = sum(role.memory.state for role in self.roles)
        return state + self.frozen_bytes + self.batch + max((role.activations for role in self.roles), default=0)

    @property
    def host_bytes(self) -> float:
        return self.frozen_host_bytes + sum(role.memory.host for role in self.roles)

    @property
    def sent(self) -> float:
        return sum(role.sent for role in self.roles)


@dataclass(frozen=True)
class Plan:
    """Everything that `mstkd plan` shows."""

    recipe: str
    world: int
    accumulation: int
    rank_counts: list[int]  # that the global batch allows
    precision: str
    device: str  # that the dry step was for
    items: int  # training items per epoch
    dropped: int  # training subjects left out
    tars: int
    data_bytes: int
    steps_per_epoch: float
    stages: list[StagePlan]
    free_bytes: int  # on the disk of runs_dir
    note: str | None  # why activations are not known

    def to_json(self) -> dict:
        """As plain data, with the sums."""
        values = asdict(self)
        for stage, shown in zip(self.stages, values["stages"], strict=True):
            shown |= {"device_bytes": stage.device_bytes, "host_bytes": stage.host_bytes, "sent": stage.sent}
            for role, of_role in zip(stage.roles, shown["roles"], strict=True):
                of_role |= {"parameters": role.parameters}
        return values


def plan(config: RunConfig, world: int) -> Plan:
    """Plan a run on `world` ranks. Raises UserError for whatever in the configuration cannot work on them."""
    accumulation = config.train.accumulation(world)
    methods.read_config(config.method, config.origin)
    if methods.load(config.method["name"]).task == "classification":
        raise UserError(f"method.name: {config.method['name']} is for classification, and plans are made for volumes and slices; train it without one")
    methods.check_input(config.method, config.data)
    training = open_training(config.data, config.seed, complete_only=methods.load(config.method["name"]).complete_only)
    fake = fake_tensors()
    method, config, device = _build(config, training, fake)
    with fake, device:
        planner = _Planner(config, method, training, world, accumulation)
        stages = [planner.stage(name, roles) for name, roles in stage_roles(config, method, given_networks(config, method, training.sequences)).items()]
    micro_batches = config.train.global_batch // config.train.micro_batch
    shards = [shard for store in training.stores for shard in store.index.shards]
    return Plan(
        recipe=config.name, world=world, accumulation=accumulation, rank_counts=[n for n in range(1, micro_batches + 1) if micro_batches % n == 0],
        precision=config.train.precision, device=device.type, items=training.order.items_per_epoch, dropped=len(training.dropped),
        tars=len(shards), data_bytes=sum(shard.bytes for shard in shards),
        steps_per_epoch=training.order.items_per_epoch / config.train.global_batch, stages=stages,
        free_bytes=shutil.disk_usage(existing_folder(Path(config.runs_dir))).free, note=planner.note,
    )  # fmt: skip


def _build(config: RunConfig, training: TrainingSet, fake: FakeTensorMode) -> tuple[Method, RunConfig, torch.device]:
    """The method, of fake tensors if it can be; the configuration with its `method:` section resolved; the device of the dry step."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with fake, device:
            return *build_method(config, training), device
    except UserError:
        raise
    except Exception:  # a constructor that looks at numbers, e.g. turns a linspace into a list
        return *build_method(config, training), torch.device("cpu")


class _Planner:
    """Plans stage by stage."""

    def __init__(self, config: RunConfig, method: Method, training: TrainingSet, world: int, accumulation: int):
        self.config, self.method, self.training, self.world, self.accumulation = config, method, training, world, accumulation
        self.note: str | None = None
        slices = config.data.slices
        shape = tuple(config.data.crop) if slices is None else (slices.size, slices.size)
        self.batch = empty_batch(config.train.micro_batch, len(training.sequences), shape, training.labelled)

    def stage(self, name: str, given: dict[str, Role]) -> StagePlan:
        config, networks = self.config, self.method.networks
        activations = self._activations(name, given)
        roles = {role: self._role(role, declared, activations.get(role)) for role, declared in given.items()}
        trained = {network for role in given.values() for network in role.results}
        averages = weight_bytes([networks[average] for role in given.values() for average in role.averages])  # whole in every checkpoint
        resting = {network: networks[network] for network in networks if network not in trained}
        steps = total_steps(config, name, self.training.order.items_per_epoch)
        checkpoint, best = sum(role.checkpoint for role in roles.values()) + averages, weight_bytes([networks[network] for network in trained])
        return StagePlan(
            name, steps, list(roles.values()), frozen={network: _count(module) for network, module in resting.items()},
            frozen_bytes=sum(self._resting_bytes(name, network) for network in resting) + averages,
            frozen_host_bytes=sum(self._host_bytes(name, network) for network in resting),
            batch=sum(t.untyped_storage().nbytes() for t in vars(self.batch).values() if isinstance(t, torch.Tensor)),
            checkpoint=checkpoint, best=best, disk=config.checkpoint.most_copies(steps) * checkpoint + best + steps / config.train.log_every * LOG_LINE,
        )  # fmt: skip

    def _role(self, name: str, role: Role, activations: int | None) -> RolePlan:
        train = self.config.train
        settings = backend.role_settings(name, role, train)
        given = deepspeed_config(name, settings, train, self.accumulation, _count(role.step))
        if train.deepspeed:
            if not torch.cuda.is_available():
                os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it says on stdout that it chose so
            backend.check_role(name, role, train, self.accumulation)
        persistent = int(given["zero_optimization"].get("stage3_param_persistence_threshold", PERSISTENT))
        elements = count_elements(role.step, train.precision in AUTOCAST, persistent)
        sent = [bytes_per_step(settings.zero_stage, self.accumulation, self.world, elements, gloo) / role.every for gloo in (False, True)]
        return RolePlan(
            name, {network: _count(self.method.networks[network]) for network in role.networks}, settings.optimizer.name, settings.zero_stage,
            role_memory(settings, given, elements, self.world), activations, *sent, checkpoint=checkpoint_bytes(settings, elements),
        )  # fmt: skip

    def _activations(self, stage: str, roles: dict[str, Role]) -> dict[str, int]:
        """By role; {} and a note where the method's forward cannot run without numbers."""
        try:
            return kept_for_backward(self.method, roles, self.batch, self.config.train.precision)
        except UserError:
            raise
        except Exception as error:  # whatever a method does with the values of a tensor
            self.note = f"stage {stage}: activations are not known, the dry step stops at {type(error).__name__}: {str(error).splitlines()[0][:200]}"
            return {}

    def _host_bytes(self, stage: str, network: str) -> float:
        """In host memory, of a network that the stage does not train: this rank's part under `teacher.placement: cpu`."""
        streamed = network in self.method.needs(stage) and self.config.teacher.placement == "cpu"
        return weight_bytes([self.method.networks[network]]) / self.world if streamed else 0.0

    def _resting_bytes(self, stage: str, network: str) -> float:
        """On the device, of a network that the stage does not train."""
        size = weight_bytes([self.method.networks[network]])
        if network not in self.method.needs(stage) or self.config.teacher.placement == "replicate":
            return size
        return size / self.world if self.config.teacher.placement == "zero3" else 0.0


def _count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
