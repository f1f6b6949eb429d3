"""`mstkd` as a process of its own that need not import everything again: forked from one that has."""

import multiprocessing
import os
import sys
from pathlib import Path

MODULES = ["mstkd.launch.cli", "mstkd.train", "mstkd.evaluate.run", "mstkd.predict", "mstkd.complete", "mstkd.export", "mstkd.compare.run", "mstkd.report"]


def processes():
    """Start one server, then any number of commands by `call`."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(MODULES)
    return server


def call(server, words: list[str], folder: Path) -> int:
    """The exit code of `mstkd WORDS` in `folder`."""
    process = server.Process(target=_main, args=(words, str(folder)))
    process.start()
    process.join()
    return process.exitcode


def _main(words: list[str], folder: str) -> None:
    from mstkd.launch import cli

    os.chdir(folder)
    sys.path.insert(0, folder)  # PYTHONPATH=.
    sys.argv = ["mstkd", *words]
    cli.main()
