"""One line of `mstkd doctor`, and how its checks ask other programs."""

import subprocess
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """FAIL stops training or submitting; WARN works until something happens, or works with less."""

    state: Literal["OK", "WARN", "FAIL"]
    thing: str
    what: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.state:5}{self.thing:15} {self.what}" + (f"; {self.fix}" if self.fix else "")


def ok(thing: str, what: str) -> Finding:
    return Finding("OK", thing, what)


def warn(thing: str, what: str, fix: str) -> Finding:
    return Finding("WARN", thing, what, fix)


def fail(thing: str, what: str, fix: str) -> Finding:
    return Finding("FAIL", thing, what, fix)


@dataclass(frozen=True)
class Answer:
    code: int | None  # None: no such program, or no end within the limit
    out: str
    message: str  # one line: the last that the program said on stderr, else on stdout

    @property
    def ok(self) -> bool:
        return self.code == 0


def ask(*command: str, limit_s: float = 15) -> Answer:
    """Run a program and return what it says, whatever it says."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return Answer(None, "", f"{command[0]} gives no answer within {limit_s:g} s")
    except OSError as error:
        return Answer(None, "", f"{command[0]}: {error.strerror}")
    said = [line.strip() for text in (done.stderr, done.stdout) for line in reversed(text.splitlines()) if line.strip()]
    return Answer(done.returncode, done.stdout, said[0] if said else f"{command[0]} ends with code {done.returncode}")


def listed(names: list[str], most: int = 8) -> str:
    """The first names of a list that may be long."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
