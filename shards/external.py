"""Running other people's programs: no shell, a time limit, all output in files, none left behind."""

import os
import shlex
import signal
import subprocess
import threading
from pathlib import Path

from mstkd.errors import UserError


class Programs:
    """Starts programs, each in a process group of its own, and can stop all that run. Usable from many threads."""

    def __init__(self):
        self._lock, self._running, self._stopped = threading.Lock(), set(), False

    def run(self, words: list[str], log: Path, limit_min: float) -> None:
        """Run a program to its end. stdout goes to `log`, stderr to the file beside it that ends in .err.

        Raises UserError without a subject: exit code and last line of stderr, the time limit, or that it cannot start.
        """
        errors = log.with_suffix(".err")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as stdout, errors.open("wb") as stderr:
            stdout.write(f"$ {shlex.join(words)}\n".encode())
            stdout.flush()
            process = self._start(words, stdout, stderr)
            try:
                code = process.wait(limit_min * 60)
            except subprocess.TimeoutExpired:
                raise UserError(f"stopped after {limit_min:g} min; see {log}, or raise its timeout_min") from None
            finally:
                self._end(process)
        if code:
            last = (errors.read_text(errors="replace").strip() or "nothing on stderr").splitlines()[-1].strip()
            raise UserError(f"{_code(code)}: {last} (all of it: {errors})")

    def stop(self) -> None:
        """End every running program and start no other."""
        with self._lock:
            self._stopped = True
            running = list(self._running)
        for process in running:
            _kill(process)

    def _start(self, words: list[str], stdout, stderr) -> subprocess.Popen:
        with self._lock:
            if self._stopped:
                raise UserError("not started, because the others were stopped; run it again")
            try:
                process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, start_new_session=True)
            except OSError as error:
                raise UserError(f"{words[0]} cannot be started: {error.strerror}") from None
            self._running.add(process)
            return process

    def _end(self, process: subprocess.Popen) -> None:
        _kill(process)
        process.wait()
        with self._lock:
            self._running.discard(process)


def _kill(process: subprocess.Popen) -> None:
    """The whole group: a script that is stopped must not leave its own children at work."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # gone already
        pass


def _code(code: int) -> str:
    return f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
