"""What the ranks do in test_settings.py and test_offload.py: build engines and look inside."""

from dataclasses import replace

import torch
from engine_ranks import SEQUENCES, micro_batch, toy_config

from mstkd import methods
from mstkd.batch import Progress, StepOutput
from mstkd.engine import backend
from mstkd.engine.backend import RoleEngine
from mstkd.engine.determinism import set_determinism
from mstkd.engine.environment import resolve_environment
from mstkd.errors import UserError
from mstkd.methods import Role, RoleStep
from mstkd.shards.spec import LABEL_SCHEMES


def engine_facts(train: dict, **declared) -> dict:
    """What DeepSpeed's engine of the toy's role `networks`, which is `declared` so, has made of the configuration."""
    ranks = resolve_environment()
    backend.start(ranks)
    config = toy_config(None, None, {}, {"steps": 1, **train})
    torch.manual_seed(0)
    toy = methods.build(config.method, methods.DataFacts(SEQUENCES, LABEL_SCHEMES["brats2018"], (8, 8, 8)))
    accumulation = config.train.accumulation(ranks.world)
    for name, role in toy.roles("distill").items():
        backend.check_role(name, role, config.train, accumulation)
    engine = RoleEngine("networks", replace(toy.roles("distill")["networks"], **declared), config.train, accumulation, ranks.device)
    inner = engine._engine
    facts = {
        "stage": inner.zero_optimization_stage(), "overlap_comm": inner.zero_overlap_comm(), "bucket": inner.zero_reduce_bucket_size(),
        "persistence": inner.zero_param_persistence_threshold(), "communication": str(inner.communication_data_type),
        "clipping": inner.gradient_clipping(), "accumulation": inner.gradient_accumulation_steps(), "optimizer": type(inner.basic_optimizer).__name__,
        "eps": inner.basic_optimizer.defaults["eps"], "breakdown": inner.wall_clock_breakdown(), "window": inner._config.float16_config.loss_scale_window,
        "compiled": [child._compiled_call_impl is not None for child in inner.module.children()],
        "pin_memory": bool(inner.zero_offload_optimizer() and inner.zero_offload_optimizer().pin_memory),
    }  # fmt: skip
    engine.destroy()
    return facts


class Scattering(RoleStep):
    """A step with an operation whose result depends on the order of its writes."""

    def __init__(self):
        super().__init__()
        self.network = torch.nn.Linear(4, 4)

    def forward(self, batch, carry, progress):
        places = torch.zeros(4, dtype=torch.long)
        return StepOutput(self.network(torch.zeros(4).put_(places, torch.ones(4))).sum())


def undetermined(deterministic: bool) -> str:
    """What the engine says of such a step."""
    ranks = resolve_environment()
    backend.start(ranks)
    set_determinism(deterministic)
    train = toy_config(None, None, {}, {"steps": 1, "precision": "fp32", "global_batch": ranks.world}).train
    engine = RoleEngine("student", Role(Scattering(), ("network",)), train, 1, ranks.device)
    try:
        engine.backward(engine.forward(micro_batch(0, 0), {}, Progress(0, 0, 1, 1)).loss)
        engine.step()
        return "done"
    except UserError as error:
        return str(error)
    finally:
        set_determinism(False)
        engine.destroy()
