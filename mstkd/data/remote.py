"""Where the bytes of a shard set come from: a folder, a web server or an S3 bucket (by fsspec).

Credentials come from where users of such servers keep them (~/.netrc, the AWS_* variables and profiles, fsspec's own
configuration) or, for http, from the URL; `shown` cuts them out of whatever is said or recorded.
"""

import hashlib
import io
import logging
import os
import random
import re
import time
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from mstkd.data.location import REMOTE_SCHEMES
from mstkd.errors import UserError

log = logging.getLogger(__name__)

TRIES = 5  # in a row without a new byte
LONGEST_PAUSE_S = 30.0
CONNECT_S, SILENCE_S = 30.0, 60.0
PIECE_BYTES = 16 * 2**20  # of one request to S3, and of one read of a disk
CHUNK_BYTES = 2**18  # about as much of an interrupted answer is lost
TRANSIENT_STATUS = {408, 425, 429, 500, 502, 503, 504}
URL = re.compile(r"(\w+://)(?:[^/\s]*@)?([^\s?'\"]*)(?:\?[^\s'\"]*)?")


def is_remote(location: str | Path) -> bool:
    """Whether a shard set lies on a server: http://, https:// or s3://."""
    scheme, separator, _ = str(location).partition("://")
    return bool(separator) and scheme.lower() in REMOTE_SCHEMES


def shown(text: str | Path) -> str:
    """`text` as it may be printed and recorded: URLs in it lose user, password and query."""
    return URL.sub(r"\1\2", str(text))


class Receiver:
    """Bytes on their way into `file`: counted, hashed, and begun anew when the sender can only do that."""

    def __init__(self, file: BinaryIO, expected_bytes: int | None, limit_bytes: int | None = None):
        self.file, self.expected_bytes = file, expected_bytes
        self.limit_bytes = limit_bytes if expected_bytes is None else expected_bytes
        self.restart()

    def restart(self) -> None:
        self.file.seek(0)
        self.received_bytes, self._digest = 0, hashlib.sha256()

    def write(self, data: bytes) -> int:
        """Raises UserError if the disk does not take them, or if there are more than expected."""
        if self.received_bytes + len(data) > self.limit_bytes:
            raise UserError(f"more than the {self.limit_bytes} bytes it may have")
        try:
            self.file.write(data)
        except OSError as error:
            raise UserError(f"cannot be written to {getattr(self.file, 'name', 'memory')} ({error.strerror})") from None
        self._digest.update(data)
        self.received_bytes += len(data)
        return len(data)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


class LocalFolder:
    """A folder on a (perhaps slow) disk."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)

    def __str__(self) -> str:
        return str(self.folder)

    def read_bytes(self, name: str, limit_bytes: int = 2**30) -> bytes:
        """A small file as a whole. Raises UserError naming it; FileNotFoundError if there is none."""
        path = self.folder / name
        if path.stat().st_size > limit_bytes:
            raise UserError(f"{path}: more than the {limit_bytes} bytes it may have")
        return path.read_bytes()

    def download(self, name: str, receiver: Receiver) -> None:
        """Copy the file `name`. Raises UserError naming it."""
        path = self.folder / name
        try:
            with open(path, "rb") as source:
                while piece := source.read(PIECE_BYTES):
                    receiver.write(piece)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        except UserError as error:
            raise UserError(f"{path}: {error}") from None


class RemoteFolder:
    """A folder of files on a web server or in a bucket. Cheap to send to a worker process: it connects on first use."""

    def __init__(self, location: str, pause_s: float = 0.5):
        """`pause_s`: before the first repetition of a failed request; it doubles with each. Raises UserError on a wrong URL."""
        parts = urlsplit(location)
        self._protocol, self._base, self._query = parts.scheme.lower(), location.partition("?")[0].rstrip("/"), parts.query
        if not parts.netloc:
            raise UserError(f"{shown(location)}: names no {'bucket' if self._protocol == 's3' else 'server'}; write {self._protocol}://NAME/folder")
        if self._protocol == "s3" and (parts.query or "@" in parts.netloc):
            raise UserError(f"{shown(location)}: credentials of S3 belong in the AWS_* variables or ~/.aws, not in the URL")
        self._pause_s = pause_s
        self._opened: tuple[int, Any] | None = None  # process, file system: its connections do not survive a fork

    def __str__(self) -> str:
        return shown(self._base)

    def __truediv__(self, name: str) -> str:
        """What to call the file `name` in messages."""
        return f"{self}/{name}"

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_opened": None}

    def read_bytes(self, name: str, limit_bytes: int = 2**30) -> bytes:
        """A small file as a whole. Raises UserError naming its URL; FileNotFoundError if the server has none."""
        received = io.BytesIO()
        self._fetch(name, Receiver(received, None, limit_bytes))
        return received.getvalue()

    def download(self, name: str, receiver: Receiver) -> None:
        """Bring the file `name`; after an interruption goes on where it stopped, where the server can. Raises UserError."""
        try:
            self._fetch(name, receiver)
        except FileNotFoundError:
            raise UserError(f"{self / name}: named in index.json, but not there (404)") from None

    def _fetch(self, name: str, receiver: Receiver) -> None:
        most, failures = 0, 0
        while True:
            try:
                self._receive(self._url(name), receiver)
                if receiver.expected_bytes in (None, receiver.received_bytes):
                    return
                raise EOFError(f"ended after {receiver.received_bytes} of {receiver.expected_bytes} bytes")
            except UserError as error:
                raise UserError(f"{self / name}: {error}") from None
            except FileNotFoundError:
                raise
            except Exception as error:
                if not _of_the_network(error):
                    raise
                failures = 1 if receiver.received_bytes > most else failures + 1
                most = max(most, receiver.received_bytes)
                if failures >= TRIES or not _transient(error):
                    raise UserError(f"{self / name}: {_reason(error)}{f'; tried {failures} times' if failures > 1 else ''}") from None
                pause_s = min(self._pause_s * 2 ** (failures - 1), LONGEST_PAUSE_S)
                log.info("%s: %s; trying again in %.1f s", self / name, _reason(error), pause_s)
                time.sleep(pause_s * random.uniform(0.5, 1.0))  # processes that failed together do not return together

    def _url(self, name: str) -> str:
        return f"{self._base}/{name}" + (f"?{self._query}" if self._query else "")

    def _receive(self, url: str, receiver: Receiver) -> None:
        """One request, or for S3 one per piece, from where `receiver` stands."""
        if receiver.expected_bytes is None:
            receiver.restart()
        if self._protocol == "s3":
            self._receive_pieces(url, receiver)
            return
        headers = {"Accept-Encoding": "identity"}
        if receiver.received_bytes:
            headers["Range"] = f"bytes={receiver.received_bytes}-"
        answer = _answer(receiver)
        self._filesystem().get_file(url, answer, chunk_size=CHUNK_BYTES, callback=answer, headers=headers)

    def _receive_pieces(self, url: str, receiver: Receiver) -> None:
        system, size = self._filesystem(), receiver.expected_bytes
        size = system.info(url, refresh=True)["size"] if size is None else size
        while receiver.received_bytes < size:
            start = receiver.received_bytes
            piece = system.cat_file(url, start=start, end=min(start + PIECE_BYTES, size))
            if not piece:
                raise EOFError(f"ended after {start} of {size} bytes")
            receiver.write(piece)

    def _filesystem(self) -> Any:
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), _connect(self._protocol, str(self)))
        return self._opened[1]


def open_folder(location: str | Path) -> LocalFolder | RemoteFolder:
    """The folder at a path or URL; nothing is read yet."""
    return RemoteFolder(str(location)) if is_remote(location) else LocalFolder(location)


def _connect(protocol: str, named: str) -> Any:
    import fsspec
    from fsspec.config import conf

    options: dict[str, Any] = {"skip_instance_cache": True}
    try:
        if protocol == "s3":
            return fsspec.filesystem("s3", **options)
        from aiohttp import ClientTimeout

        # a total limit would cut large tars; proxies and ~/.netrc as other tools have them
        client = {"trust_env": True, "timeout": ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=SILENCE_S)}
        given = conf.get(protocol, {}).get("client_kwargs", {})
        return fsspec.filesystem(protocol, encoded=True, client_kwargs={**client, **given}, **options)
    except ImportError:
        package = "s3fs" if protocol == "s3" else "aiohttp"
        raise UserError(f"{named}: reading {protocol}:// needs the package {package}; pip install {package}") from None


def _answer(receiver: Receiver) -> Any:
    """What fsspec tells the length of an answer and then gives its bytes, both passed on to `receiver`."""
    from fsspec.callbacks import Callback

    class Answer(Callback, io.RawIOBase):
        length: int | None = None

        def set_size(self, size: int | None) -> None:
            self.length = size

        def write(self, data: bytes) -> int:
            asked = None if receiver.expected_bytes is None else receiver.expected_bytes - receiver.received_bytes
            if not self.begun and receiver.received_bytes and self.length != asked:
                receiver.restart()  # the server ignores the range and sends everything
            self.begun = True
            return receiver.write(data)

        begun = False

    return Answer()


def _of_the_network(error: Exception) -> bool:
    return isinstance(error, OSError | EOFError) or type(error).__module__.startswith(("aiohttp.", "botocore."))


def _transient(error: Exception) -> bool:
    """Whether the same request may succeed later."""
    if (status := getattr(error, "status", None)) is not None:
        return status in TRANSIENT_STATUS
    # ValueError: a URL that makes no sense
    return not isinstance(error, PermissionError | ValueError) and type(error).__name__ != "NoCredentialsError"


def _reason(error: Exception) -> str:
    """What went wrong, in half a line, without URL or credentials."""
    status = getattr(error, "status", None)
    if status in (401, 403) or isinstance(error, PermissionError) or type(error).__name__ == "NoCredentialsError":
        code = f"HTTP {status}" if status else type(error).__name__
        return f"access denied ({code}); credentials belong in ~/.netrc (http) or the AWS_* variables and ~/.aws (s3)"
    if status is not None:
        return f"the server answers HTTP {status} {getattr(error, 'message', '')}".rstrip()
    said = shown((str(error).splitlines() or [""])[0])
    return f"{type(error).__name__}{f': {said}' if said else ''}"
