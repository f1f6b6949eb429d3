"""What the ranks do in test_data_slices.py: train on slices, and say what they had to read to find them."""

import logging

from train_ranks import run


def train(recipe: str) -> dict:
    """The curve, and what was logged while slices were looked for in this rank."""
    said, handler = [], logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    reader = logging.getLogger("mstkd.data.slices")
    reader.addHandler(handler)
    try:
        return {**run(recipe, []), "said": said}
    finally:
        reader.removeHandler(handler)
