"""Jobs in worker processes: a bounded queue, and no worker that outlives its parent."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.connection import Connection
from typing import Any

from mstkd.errors import UserError

QUEUED_PER_WORKER = 2  # running and waiting jobs; the rest stay where they come from
REPORT_EVERY_S = 0.5
STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM}

Tally = Callable[[int, int], None]  # (subjects, bytes) done since the last call

_counts: Any = None  # in a worker: what it has done, shared with the parent


def run_jobs(function: Callable, jobs: Sequence[tuple], workers: int, tally: Tally) -> Iterator[Any]:
    """The result of `function(*job, tally)` for every job, as each gets ready; with one worker in this process.

    `function` is a module's own; it calls its tally after each subject. Raises what a job raises, and UserError if a
    worker is killed; the other workers are ended at once, in the middle of their jobs.
    """
    if workers == 1 or len(jobs) == 1:
        yield from (function(*job, tally) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")  # a forked child would inherit locks held by threads of the parent
    lifeline, held = context.Pipe(duplex=False)
    counts = context.Array("q", 2)
    pool = ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context, initializer=_start_worker, initargs=(lifeline, counts))
    try:
        yield from _results(pool, function, jobs, workers, _CountReader(counts, tally))
        pool.shutdown()
    except BrokenProcessPool:
        raise UserError(f"a worker process was killed (often: out of memory); use fewer --workers than {workers}") from None
    finally:
        held.close()  # ends workers that are in the middle of something
        pool.shutdown(cancel_futures=True)
        lifeline.close()


def _results(pool: ProcessPoolExecutor, function: Callable, jobs: Sequence[tuple], workers: int, counts: "_CountReader") -> Iterator[Any]:
    queue, waiting = iter(jobs), set()
    while True:
        for job in islice(queue, workers * QUEUED_PER_WORKER - len(waiting)):
            waiting.add(_submit(pool, function, job))
        if not waiting:
            return
        done, waiting = wait(waiting, timeout=REPORT_EVERY_S, return_when=FIRST_COMPLETED)
        counts.report()
        for future in done:
            yield future.result()


def _submit(pool: ProcessPoolExecutor, function: Callable, job: tuple) -> Future:
    # workers inherit the blocked signals: Ctrl-C reaches a whole process group, and the parent alone decides what follows
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        return pool.submit(_run_in_worker, function, job)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _CountReader:
    """Passes on what the workers have counted since the last report."""

    def __init__(self, counts: Any, tally: Tally):
        self._counts, self._tally, self._told = counts, tally, (0, 0)

    def report(self) -> None:
        now = tuple(self._counts.get_obj())  # without the lock, which a killed worker may hold for ever
        self._tally(*(new - old for new, old in zip(now, self._told)))
        self._told = now


def _start_worker(lifeline: Connection, counts: Any) -> None:
    global _counts
    _counts = counts
    threading.Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()


def _end_with_parent(lifeline: Connection) -> None:
    lifeline.poll(None)  # nothing is ever sent: this returns when the other end is closed, also by the parent's death
    os._exit(1)


def _run_in_worker(function: Callable, job: tuple) -> Any:
    return function(*job, _count)


def _count(subjects: int, size_bytes: int) -> None:
    with _counts.get_lock():
        _counts[0] += subjects
        _counts[1] += size_bytes
