"""One computation for every subset: what a network does while it is written down as a graph.

A graph has no branch that depends on its input, and no operator of one processor alone. A network that otherwise encodes only what is
available then encodes everything, and what is hidden is left out afterwards by a mask: more work, the same logits. Tensors are made on the
device of others (`type_as`), for one that is named here would be written down, too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_SYMMETRIC = ContextVar("symmetric", default=False)


def symmetric() -> bool:
    """Whether this holds at present."""
    return _SYMMETRIC.get()


@contextmanager
def symmetric_form() -> Iterator[None]:
    """It holds inside the block."""
    token = _SYMMETRIC.set(True)
    try:
        yield
    finally:
        _SYMMETRIC.reset(token)
