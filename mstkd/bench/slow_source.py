"""A web server on loopback that sends a folder's files at a limited rate, in a process of its own."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import BinaryIO

CHUNK_BYTES = 1 << 16
LATE_S = 0.02  # sleeps end late; what they lose up to this is caught up with, else the rate were a fifth lower than said


class Pace:
    """Spreads the bytes of all connections evenly over time."""

    def __init__(self, bytes_per_second: float):
        self._seconds_per_byte = 1 / bytes_per_second
        self._lock, self._free_at = Lock(), 0.0

    def wait(self, count: int) -> None:
        """Returns when `count` further bytes may leave."""
        with self._lock:
            start = max(self._free_at, time.monotonic() - LATE_S)
            self._free_at = start + count * self._seconds_per_byte
            due = self._free_at
        time.sleep(max(due - time.monotonic(), 0))


class _PacedFiles(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, pace: Pace, *request: object, **options: object):
        self._pace = pace
        super().__init__(*request, **options)

    def copyfile(self, source: BinaryIO, outputfile: BinaryIO) -> None:
        while chunk := source.read(CHUNK_BYTES):
            self._pace.wait(len(chunk))
            outputfile.write(chunk)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def slow_source(folder: Path, megabytes_per_second: float) -> Iterator[str]:
    """The URL at which `folder` is served meanwhile; all connections together get `megabytes_per_second`."""
    command = [sys.executable, __file__, str(folder), str(megabytes_per_second)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.terminate()


def _serve(folder: str, megabytes_per_second: str) -> None:
    handler = partial(_PacedFiles, Pace(float(megabytes_per_second) * 1e6), directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever()


if __name__ == "__main__":
    _serve(*sys.argv[1:])
