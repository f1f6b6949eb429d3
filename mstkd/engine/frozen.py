"""Networks that a role uses and does not train."""

from contextlib import contextmanager

from torch import nn


@contextmanager
def frozen(networks: list[nn.Module]):
    """No gradient for `networks` inside the context; each parameter's `requires_grad` is restored afterwards."""
    parameters = [(p, p.requires_grad) for network in networks for p in network.parameters()]
    for parameter, _ in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in parameters:
            parameter.requires_grad_(flag)
