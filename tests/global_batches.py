"""The contract that every loader is held to: which items a step takes."""

from mstkd.data.order import Order
from mstkd.data.sample import Item


def global_batch(order: Order, step: int, size: int) -> list[Item]:
    """The items of step `step` at global batch `size`: positions [step * size, (step + 1) * size)."""
    return [order.item(position) for position in range(step * size, (step + 1) * size)]
