"""Draws inside a step (dropout, noise fills, penalty mixing) as a function of (seed, step, role, j) alone.

Never by rank, and nothing to save: a resume, also on another rank count, draws the same.
"""

import hashlib

import torch


def reseed(seed: int, step: int, role: str, micro_batch: int) -> None:
    """Seed torch's generators on all devices; `micro_batch` is the index j in the global batch."""
    digest = hashlib.sha256(f"{seed}/{step}/{role}/{micro_batch}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
