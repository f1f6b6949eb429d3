"""What one rank writes into a checkpoint: on the disk before it counts, and hashed on the way there."""

import hashlib
import io
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


class NewFiles:
    """The files that this rank adds to `folder`.

    An error is kept in `problem` and not raised: the other ranks wait in the collectives that come between two files,
    and all ask for it once everyone is through. After an error nothing more is written.
    """

    def __init__(self, folder: Path, background: bool = False):
        """`background`: `write` only copies into host memory, and a thread brings that to the disk; see `done` and `wait`."""
        self.folder = Path(folder)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if background else None
        self._tasks: list[Future] = []
        self.problem: str | None = None  # the first error: what and where
        self.sha256: dict[str, str] = {}  # by name below `folder`

    def write(self, name: str, put: Callable[[BinaryIO], object]) -> None:
        """Write `folder`/`name`; `put(stream)` says what, and must not be collective: it is not called after an error."""
        if self.problem is not None:
            return
        if self._thread is None:
            self._write(name, put)
        else:
            memory = io.BytesIO()
            with self.guarded(self.folder / name):
                put(memory)
            self._tasks.append(self._thread.submit(self._write, name, lambda stream: stream.write(memory.getbuffer())))

    @property
    def done(self) -> bool:
        """Whether nothing is left for `wait` to wait for."""
        return all(task.done() for task in self._tasks)

    def wait(self) -> None:
        """Return when all is on the disk, or failed."""
        while self._tasks:
            self._tasks.pop(0).result()  # with it goes the memory
        if self._thread is not None:
            self._thread.shutdown()

    def _write(self, name: str, put: Callable[["HashedStream"], object]) -> None:
        path = self.folder / name
        with self.guarded(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                stream = HashedStream(file)
                put(stream)
                if stream.error is not None:
                    raise stream.error
                file.flush()
                os.fsync(file.fileno())
            self.sha256[name] = stream.digest.hexdigest()

    @contextmanager
    def guarded(self, path: Path | None = None) -> Iterator[None]:
        """Keep an error from inside the context, which concerns `path`, as the problem: of the system, or of a file that was there."""
        try:
            yield
        except (OSError, MemoryError, ValueError, KeyError) as error:
            if self.problem is None:
                place, said = getattr(error, "filename", None), getattr(error, "strerror", None)
                self.problem = f"{path or place or self.folder}: {said or error or type(error).__name__}"


class HashedStream:
    """A file that can only be written to. It never fails: an exception would have to pass through torch's C++ writer."""

    def __init__(self, file: BinaryIO):
        self.file, self.digest = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data) -> int:
        data = memoryview(data)
        if self.error is None:
            try:
                self.file.write(data)
                self.digest.update(data)
            except OSError as error:
                self.error = error
        return data.nbytes

    def flush(self) -> None:
        """What torch.save asks for; `NewFiles.write` does it."""


def write_durably(path: Path, text: str) -> None:
    """For what counts only once something else is renamed."""
    with path.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
