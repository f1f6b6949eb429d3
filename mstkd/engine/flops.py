"""Counting what a training step computes, without changing it."""

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class FlopCount(TorchDispatchMode):
    """A context that counts the floating-point operations of matrix products, convolutions and attention in it, backward passes included.

    By the formulas of torch's FlopCounterMode, which also computes some other operators, SiLU's gradient for one, in another way than
    an uncounted step: their last bits differ, and with them a resumed run, whose first step is counted, from one that was not cut.
    """

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, operation: Callable, types: tuple, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        if (formula := flop_registry.get(getattr(operation, "_overloadpacket", operation))) is not None:
            self.total += formula(*args, **kwargs, out_val=result)
        return result
