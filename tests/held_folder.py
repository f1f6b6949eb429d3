"""A shard folder whose files come only when a test says so."""

import threading

from mstkd.data.remote import LocalFolder
from mstkd.errors import UserError


class HeldFolder(LocalFolder):
    """Begins to bring a file, then waits until it may go on."""

    def __init__(self, folder):
        super().__init__(folder)
        self.begun, self.may_end = threading.Event(), threading.Event()

    def download(self, name, receiver):
        self.begun.set()
        assert self.may_end.wait(60)
        self.bring(name, receiver)

    def bring(self, name, receiver):
        super().download(name, receiver)


class FailingFolder(HeldFolder):
    """Fails once it may go on."""

    def bring(self, name, receiver):
        raise UserError("out of reach")
