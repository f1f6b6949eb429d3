"""Peers with pins of their own: read by a program in an interpreter that has them, on the same data and clock."""

import json
import subprocess
from pathlib import Path
from types import TracebackType

from mstkd.bench import peer_program
from mstkd.bench.contenders import compare
from mstkd.bench.volumes import Truth
from mstkd.errors import UserError

NAMES = {"mds": "MosaicML Streaming (MDS)", "litdata": "litdata"}


class Peer:
    """A contender in a process of its own. A context manager; it ends its process."""

    dtype = ""

    def __init__(self, kind: str, python: Path):
        """Starts it with the interpreter `python`. `absent` is said if that lacks the package. Raises UserError."""
        self.kind, self.name = kind, NAMES[kind]
        try:
            self._process = subprocess.Popen(
                [str(python), peer_program.__file__, kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        except OSError as error:
            raise UserError(f"--peer-python {python}: cannot be started ({error.strerror}); give the path of a Python interpreter") from None
        self._about = self._answer()
        distribution = peer_program.PEERS[kind].distribution
        self.absent = f"absent: pip install {distribution} ({self._about['absent']})" if "absent" in self._about else None

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.communicate()  # end of input: the program leaves

    def write(self, shards: Path, folder: Path) -> None:
        """Writes the subjects of the shard set `shards` in the peer's own format."""
        if self.absent is None:
            self._ask(do="write", tars=[str(path) for path in sorted(shards.glob("*.tar"))], folder=str(folder))

    def check(self, truths: list[Truth]) -> None:
        if self.absent is None:
            found = self._ask(do="digests")
            self.dtype = found["dtype"]
            compare(self.name, found["digests"], truths)

    def rate(self, seconds: float) -> float:
        return self._ask(do="rate", seconds=seconds)["rate"]

    def versions(self) -> dict[str, str]:
        if self.absent:
            return {}
        return {peer_program.PEERS[self.kind].distribution: f"{self._about['version']} (numpy {self._about['numpy']}, torch {self._about['torch']})"}

    def _ask(self, **command: object) -> dict:
        print(json.dumps(command), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            said = self._process.communicate()[1].strip().splitlines()
            raise UserError(f"{self.name}: its program ended ({said[-1] if said else 'no message'}); check the interpreter given by --peer-python")
        return json.loads(line)
