"""A web server on loopback that serves a folder, with ranges, and fails as it is told to."""

import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit


class FaultyServer:
    """`faults[name]` lists what becomes of the coming requests for a file: a status, ("drop", bytes sent before the
    connection closes) or "wrong" (bytes inverted); after that all is well. `ranges=False`: it ignores Range."""

    def __init__(self, folder: Path, ranges: bool = True):
        self.folder, self.ranges = folder, ranges
        self.faults: dict[str, list] = {}
        self.requests: Counter[str] = Counter()
        self.sent_bytes: Counter[str] = Counter()
        self.headers: list[dict] = []
        self.gate: threading.Event | None = None  # if set, bodies wait for it
        self.gates: dict[str, threading.Event] = {}  # the same for single files
        self._arrived = threading.Condition()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/set"

    def await_request(self, name: str, times: int = 1) -> None:
        """Returns once `name` has been asked for that often."""
        with self._arrived:
            assert self._arrived.wait_for(lambda: self.requests[name] >= times, 30), f"{name}: {self.requests[name]} of {times} requests"

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        name = urlsplit(handler.path).path.removeprefix("/set/")
        with self._arrived:
            self.requests[name] += 1
            self._arrived.notify_all()
        self.headers.append({**handler.headers, "path": handler.path})
        fault = self.faults[name].pop(0) if self.faults.get(name) else None
        path = self.folder / name
        if isinstance(fault, int) or not path.is_file():
            handler.send_error(fault or 404)
            return
        data = path.read_bytes()
        start = int(handler.headers["Range"].removeprefix("bytes=").split("-")[0]) if self.ranges and "Range" in handler.headers else 0
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(data) - start))
        handler.end_headers()
        data = data[start:]
        if gate := self.gates.get(name, self.gate):
            gate.wait(60)
        if fault == "wrong":
            data = bytes(255 - byte for byte in data)
        elif fault:
            data = data[: fault[1]]
            handler.close_connection = True
        handler.wfile.write(data)
        self.sent_bytes[name] += len(data)


@contextmanager
def serving(folder: Path, **options):
    """A FaultyServer for `folder`, until the block ends."""
    faulty = FaultyServer(folder, **options)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            faulty.answer(self)

        def log_message(self, *words):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        faulty.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield faulty
        finally:
            server.shutdown()
            thread.join()
