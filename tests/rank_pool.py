"""Persistent ranks for tests: starting DeepSpeed ranks costs many seconds, so tests share them.

`RankPool(world).run("file.py", "function", **arguments)` calls the function of that file (in this folder)
on every rank at once and returns the ranks' results in order.
"""

import importlib.util
import os
import secrets
import subprocess
import sys
import tempfile
import traceback
from multiprocessing.connection import Client, Listener, wait
from pathlib import Path

import torch

HERE = Path(__file__).parent
OTHERS_S = 60.0  # how long the other ranks may take once one has failed


class RankPool:
    def __init__(self, world: int):
        self.world = world
        self._start()

    def _start(self) -> None:
        world, key = self.world, secrets.token_bytes(16)
        listener = Listener(("127.0.0.1", 0), backlog=world, authkey=key)
        self._folder = tempfile.TemporaryDirectory()
        environment = {**os.environ, "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1", "POOL_KEY": key.hex(),
                       "POOL_PORT": str(listener.address[1]), "POOL_FOLDER": self._folder.name}  # fmt: skip
        self.processes = [
            subprocess.Popen([sys.executable, __file__], env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(world)
        ]
        pairs = []
        for _ in range(world):
            connection = listener.accept()
            pairs.append((connection.recv(), connection))
        self.connections = [connection for _, connection in sorted(pairs, key=lambda pair: pair[0])]

    def run(self, file: str, function: str, **arguments) -> list:
        for connection in self.connections:
            connection.send((file, function, arguments))
        replies = {}
        while len(replies) < self.world:
            failed = any(not ok for ok, _ in replies.values())
            ready = wait([one for rank, one in enumerate(self.connections) if rank not in replies], OTHERS_S if failed else None)
            if not ready:  # they wait for the one that failed
                self._end()
                self._start()
                break
            replies |= {self.connections.index(one): one.recv() for one in ready}
        for rank, (ok, value) in sorted(replies.items()):
            if not ok:
                raise AssertionError(f"rank {rank} failed:\n{value}")
        return [value for _, (_, value) in sorted(replies.items())]

    def _end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        self._folder.cleanup()

    def close(self) -> None:
        for connection in self.connections:
            connection.send(None)
        for process in self.processes:
            process.wait(timeout=60)
        self._folder.cleanup()


def _serve() -> None:
    sys.path.insert(0, str(HERE))  # toys.* are importable as methods "outside this project"
    connection = Client(("127.0.0.1", int(os.environ["POOL_PORT"])), authkey=bytes.fromhex(os.environ["POOL_KEY"]))
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    connection.send(rank)
    if world > 1:  # a file, because a free port may be taken before the ranks meet there
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "unused"}
        store = torch.distributed.FileStore(os.environ["POOL_FOLDER"] + "/ranks", world)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    modules = {}
    while (task := connection.recv()) is not None:
        file, function, arguments = task
        try:
            if file not in modules:
                spec = importlib.util.spec_from_file_location(Path(file).stem, HERE / file)
                modules[file] = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(modules[file])
            connection.send((True, getattr(modules[file], function)(**arguments)))
        except Exception:
            connection.send((False, traceback.format_exc()))


if __name__ == "__main__":
    _serve()
