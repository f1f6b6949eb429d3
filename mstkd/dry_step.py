"""One training step that computes nothing: what each role keeps for its backward pass.

The networks and the batch are fake tensors: shapes and types of the real ones, no memory, and seconds for a step of any size.
"""

import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mstkd.batch import Batch, Progress
from mstkd.engine.frozen import frozen
from mstkd.methods import Method, Role
from mstkd.precision import autocast


def fake_tensors() -> FakeTensorMode:
    """A context in which new tensors are fake ones; real weights may be used there, too. Enter one and the same every time."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def empty_batch(samples: int, sequences: int, shape: tuple[int, ...], labelled: bool) -> Batch:
    """A micro-batch of the right shapes; `shape` is that of one volume, (X, Y, Z), or slice, (X, Y)."""
    here = torch.ones(samples, sequences, dtype=torch.bool)
    return Batch(
        image=torch.zeros(samples, sequences, *shape), brain=torch.ones(samples, *shape, dtype=torch.bool), present=here, available=here.clone(),
        subject=["dry"] * samples, label=torch.zeros(samples, *shape, dtype=torch.uint8) if labelled else None,
    )  # fmt: skip


def kept_for_backward(method: Method, roles: dict[str, Role], batch: Batch, precision: str) -> dict[str, int]:
    """Bytes that are alive after the forward pass of each of a stage's `roles` and were not before it: its activations.

    Works on real tensors, too. Raises whatever the method's forward raises.
    """
    kept, carry = {}, {}
    for name, role in roles.items():
        role.step.train()
        rested = [*(t for network in method.networks.values() for t in network.state_dict().values()), *tree_leaves(vars(batch))]
        made = _Made(rested)
        borrowed = [method.networks[network] for network in role.borrows]
        with made, autocast(batch.image.device, precision), frozen(borrowed):
            output = role.step(batch, carry, Progress(step=0, epoch=0, total_steps=1, total_epochs=1))
            kept[name] = made.alive_bytes()
        carry |= output.carry
        del output
    return kept


class _Made(TorchDispatchMode):
    """Remembers the memory behind every tensor that an operation inside returns, but for views of what `rested` there before."""

    def __init__(self, rested: list):
        super().__init__()
        self._rested = {tensor.untyped_storage()._cdata for tensor in rested if isinstance(tensor, Tensor)}
        self._storages: list[weakref.ref] = []

    def __torch_dispatch__(self, operation: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None):
        if operation is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor) and args[0].dtype == torch.bool:
            return True  # a method asks what is available before it computes: in the dry batch everything is
        result = operation(*args, **(kwargs or {}))
        self._storages += [weakref.ref(leaf.untyped_storage()) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        return result

    def alive_bytes(self) -> int:
        alive = {storage._cdata: storage.nbytes() for reference in self._storages if (storage := reference()) is not None}
        return sum(size for storage, size in alive.items() if storage not in self._rested)
