"""Networks that a role uses and does not train."""

from contextlib import contextmanager

from torch import nn

from mstkd.methods import Role


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


def freeze(network: nn.Module, name: str, roles: dict[str, Role]) -> None:
    """Evaluation mode and no gradient, for good. Raises RuntimeError if a role would train it all the same."""
    network.requires_grad_(False).eval()
    for role_name, role in roles.items():
        if any(module is network for module in role.step.modules()):
            raise RuntimeError(f"role {role_name} registers the frozen network {name}: keep it in a tuple, so that the engine does not train it")
