"""Loader processes: how their failures reach the training process, in one line a person can act on."""

import logging
import multiprocessing
import shutil
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import torch
from torch.utils.data import DataLoader, get_worker_info

from mstkd.errors import TrainingError, UserError

log = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")  # through which workers hand over their batches


class WorkerError(TrainingError):
    """A loader process failed in a way that no check foresaw."""


def errors_as_data(stream: Iterable[dict]) -> Iterator[dict]:
    """In a worker: hands any exception over as an item, which `checked` raises again; the loader would bury it in a traceback."""
    try:
        yield from stream
    except UserError as error:
        yield {"user_error": str(error)}
    except Exception as error:
        worker = get_worker_info()
        name = f"loader process {worker.id} of {worker.num_workers}" if worker else "the loader"
        reason = " ".join([f"{type(error).__name__}: {error}".partition("\n")[0], *getattr(error, "__notes__", ())])
        yield {"failure": f"{name}: {reason}", "traceback": traceback.format_exc()}


def checked(fields: dict) -> dict:
    """An item of `errors_as_data`. Raises UserError, or WorkerError after logging the worker's traceback."""
    if "user_error" in fields:
        raise UserError(fields["user_error"])
    if "failure" in fields:
        log.error("%s\n%s", fields["failure"], fields["traceback"])
        raise WorkerError(f"{fields['failure']} (its traceback is in the log)")
    return fields


def watched(loader: DataLoader, changed_files: Callable[[], list[str]]) -> Iterator[dict]:
    """The loader's items; if a worker process dies, WorkerError says of what, with the figures that matter.

    `changed_files()` says which mapped files are no longer what they were: reading one that was cut is a bus error.
    """
    known = set(multiprocessing.active_children())
    items = iter(loader)
    _drop_handler_of_dead_children()
    workers = [child for child in multiprocessing.active_children() if child not in known]
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except RuntimeError as error:
            dead = [worker for worker in workers if not worker.is_alive()]
            if not dead:
                raise
            raise WorkerError(_cause(dead[0], workers.index(dead[0]), len(workers), changed_files())) from error
        yield item
        del item  # else it lives on here while the next one is made


def shared_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised tensor, in a worker in shared memory, where a full one is an exception here.

    Left to the queue's own thread the same exception loses the batch, and the training process waits for ever.
    """
    tensor = torch.empty(shape, dtype=dtype)
    if get_worker_info() is None:
        return tensor
    try:
        return tensor.share_memory_()
    except RuntimeError:
        raise UserError(f"data.workers: {tensor.nbytes / 2**20:.0f} MiB of a batch do not fit into shared memory: {_shared_memory()}") from None


def leave_signals_to_the_trainer(_worker: int) -> None:
    """SLURM and terminals signal every process of a job; workers must live until the trainer has saved."""
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # only the first: the interpreter ends its workers with SIGTERM when it exits
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))


def _drop_handler_of_dead_children() -> None:
    """PyTorch's raises wherever the trainer happens to be, in the middle of an update, say.

    Without it the loader notices within seconds where its next item is awaited, and the ranks can still save together.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    if getattr(handler, "__module__", "").startswith("torch.") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _cause(worker: BaseProcess, number: int, workers: int, changed_files: list[str]) -> str:
    code = worker.exitcode or 0
    if code >= 0:
        return f"loader process {number} of {workers} ended by itself with exit code {code}; its messages are above, and data.workers=0 shows more"
    name = signal.Signals(-code).name
    said = f"loader process {number} of {workers} was ended by {name}"
    if name == "SIGBUS":
        return f"{said}: {'; '.join(changed_files) or 'no tar in use has changed, so ' + _shared_memory()}"
    if name == "SIGKILL":
        free_gib, total_gib = (getattr(psutil.virtual_memory(), kind) / 2**30 for kind in ("available", "total"))
        return (
            f"{said}, which is how the system ends a process when memory runs out: {free_gib:.1f} of {total_gib:.1f} GiB are free now, "
            "and a job's own limit may be lower; lower data.workers or data.crop, or ask for more memory (sbatch --mem)"
        )
    return f"{said}; data.workers=0 runs the loader in the training process and shows where"


def _shared_memory() -> str:
    usage = shutil.disk_usage(SHARED_MEMORY)
    return (
        f"{SHARED_MEMORY} has {usage.free / 2**20:.0f} of {usage.total / 2**20:.0f} MiB free: make it larger "
        "(docker run --shm-size, or --ipc=host) or lower data.workers"
    )
