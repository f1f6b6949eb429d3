"""How far a build is, how fast, and how long it still takes: a bar on a terminal, else a line every so often."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from mstkd.shards.pool import Tally

LINE_EVERY_S = 30.0


def say(text: str) -> None:
    """Print lines about a build, on stderr: stdout is for results."""
    Console(stderr=True, soft_wrap=True).print(text, markup=False, highlight=False)


@contextmanager
def subject_progress(what: str, total: int, done: int = 0) -> Iterator[Tally]:
    """A tally to call with (subjects, bytes) as they get done; `done` subjects of `total` were so before."""
    console = Console(stderr=True)
    if console.is_terminal:
        yield from _bar(console, what, total, done)
    else:
        yield from _lines(what, total, done)


def rate_text(subjects: int, size_bytes: int, seconds: float, left: int) -> str:
    """E.g. "2.50 subjects/s, 41.0 MB/s, 0:06:40 left"; empty before there is a rate."""
    if subjects == 0 or seconds <= 0:
        return ""
    rate = subjects / seconds
    minutes, remaining_s = divmod(round(left / rate), 60)
    return f"{rate:.2f} subjects/s, {size_bytes / seconds / 1e6:.1f} MB/s, {minutes // 60}:{minutes % 60:02d}:{remaining_s:02d} left"


class _Pace:
    """What was done since the start."""

    def __init__(self, total: int, done: int):
        self.total, self.before = total, done
        self.subjects = self.bytes = 0
        self.start_s = time.monotonic()

    def add(self, subjects: int, size_bytes: int) -> None:
        self.subjects += subjects
        self.bytes += size_bytes

    @property
    def done(self) -> int:
        return self.before + self.subjects

    def text(self) -> str:
        return rate_text(self.subjects, self.bytes, time.monotonic() - self.start_s, self.total - self.done)


def _bar(console: Console, what: str, total: int, done: int) -> Iterator[Tally]:
    pace = _Pace(total, done)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(f"{what}: subjects", total=total, completed=done, rate="")

        def tally(subjects: int, size_bytes: int) -> None:
            pace.add(subjects, size_bytes)
            progress.update(bar, completed=pace.done, rate=pace.text())

        yield tally


def _lines(what: str, total: int, done: int) -> Iterator[Tally]:
    pace, told_s = _Pace(total, done), time.monotonic()

    def tally(subjects: int, size_bytes: int) -> None:
        nonlocal told_s
        pace.add(subjects, size_bytes)
        finished = subjects and pace.done >= total
        if finished or time.monotonic() - told_s >= LINE_EVERY_S:
            told_s = time.monotonic()
            rate = pace.text()
            say(f"{what}: {pace.done} of {total} subjects{', ' + rate if rate else ''}")

    yield tally
