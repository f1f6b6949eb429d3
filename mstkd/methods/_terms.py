"""Loss terms, put together by their weights."""

from torch import Tensor

from mstkd.batch import StepOutput
from mstkd.config import Section


def weighted(terms: dict[str, Tensor], weights: Section, carry: dict[str, Tensor] | None = None, **factors: float) -> StepOutput:
    """The sum of terms, each times the weight of its name and its factor, if it has one; the terms are logged as they are."""
    loss = sum(getattr(weights, name) * factors.get(name, 1.0) * term for name, term in terms.items())
    return StepOutput(loss, {name: term.detach() for name, term in terms.items()}, carry or {})
