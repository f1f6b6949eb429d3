"""What ranks say to each other besides gradients.

On GPUs it goes through a gloo group of its own, from host to host: a vote between two updates must not wait for the
kernels that are still queued.
"""

from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from mstkd.engine.environment import Ranks
from mstkd.errors import FailedElsewhereError, UserError

_hosts: dist.ProcessGroup | None = None  # None: the default group, which is gloo on CPUs


def open_host_group(timeout: timedelta) -> None:
    """Make the group for what follows. Collective; once per process group. Raises UserError where hosts do not reach each other."""
    global _hosts
    if dist.get_backend() == "gloo" or dist.get_world_size() == 1 or _hosts is not None:
        return
    try:
        _hosts = dist.new_group(backend="gloo", timeout=timeout)
    except RuntimeError as error:
        raise UserError(
            f"the nodes do not reach each other through gloo ({str(error).splitlines()[0][:200]}); "
            "set GLOO_SOCKET_IFNAME to the interface between them, see mstkd doctor"
        ) from error


def close_host_group() -> None:
    global _hosts
    _hosts = None


def sums(counts: list[int], ranks: Ranks) -> list[int]:
    """Each count (or flag) summed over the ranks. Collective."""
    if ranks.world == 1:
        return [int(count) for count in counts]
    votes = torch.tensor([int(count) for count in counts])
    dist.all_reduce(votes, group=_hosts)
    return votes.tolist()


def any_rank(flags: list[bool], ranks: Ranks) -> list[bool]:
    """For each flag, on every rank: is it true on any? Collective."""
    return [count > 0 for count in sums(flags, ranks)]


def from_all(value, ranks: Ranks) -> list:
    """Every rank's `value`, in rank order. Collective."""
    if ranks.world == 1:
        return [value]
    values = [None] * ranks.world
    dist.all_gather_object(values, value, group=_hosts)
    return values


def from_main(value, ranks: Ranks):
    """Rank 0's `value` on every rank. Collective."""
    if ranks.world == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_hosts)
    return box[0]


def on_main(action, ranks: Ranks):
    """Run `action()` on rank 0 only and return its result on every rank; if it fails, every rank fails. Collective."""
    with agreed(ranks):
        result = action() if ranks.main else None
    return from_main(result, ranks)


@contextmanager
def agreed(ranks: Ranks):
    """What fails on one rank inside the context ends all of them, instead of leaving the others waiting. Collective."""
    problem = None
    try:
        yield
    except Exception as error:
        problem = error
    raise_together(problem, ranks)


def raise_together(problem: Exception | None, ranks: Ranks) -> None:
    """Raise if any rank has a problem: the first such rank its own, the others FailedElsewhereError. Collective.

    One that failed elsewhere is a problem of the rank that says why, also when it is agreed on a second time further out.
    """
    if ranks.world == 1:
        if problem is not None:
            raise problem
        return
    code, own = getattr(problem, "exit_code", 1), problem is not None and not isinstance(problem, FailedElsewhereError)
    vote = torch.tensor(ranks.rank * 256 + code if own else ranks.world * 256)
    dist.all_reduce(vote, op=dist.ReduceOp.MIN, group=_hosts)
    rank, code = divmod(int(vote), 256)
    if rank == ranks.rank:
        raise problem
    if rank < ranks.world:
        raise FailedElsewhereError(rank, code)
    if problem is not None:
        raise problem


def barrier(ranks: Ranks) -> None:
    if ranks.world > 1:
        dist.barrier(group=_hosts)


def average_buffers(networks: dict[str, nn.Module], ranks: Ranks) -> None:
    """Replace floating-point buffers (BatchNorm running statistics) by their mean over ranks. Collective.

    Each rank sees other samples; without this, evaluation would depend on the rank that runs it.
    """
    if ranks.world == 1:
        return
    buffers = [b for name in sorted(networks) for b in networks[name].buffers() if b.is_floating_point()]
    if not buffers:
        return
    flat = torch.cat([b.detach().flatten().float() for b in buffers]).to(ranks.device)
    dist.all_reduce(flat)
    flat /= ranks.world
    offset = 0
    for buffer in buffers:
        buffer.copy_(flat[offset : offset + buffer.numel()].view_as(buffer))
        offset += buffer.numel()
