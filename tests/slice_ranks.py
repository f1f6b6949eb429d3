"""What the ranks do in test_data_slices.py: train on slices, and say what they had to read to find them."""

import logging

from train_ranks import run

from mstkd.errors import FailedElsewhereError, UserError


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


def refused(recipe: str) -> str:
    """How a run that cannot begin ends here."""
    try:
        run(recipe, ["name=refused", "data.slices.min_brain=0.9"])
    except (UserError, FailedElsewhereError) as error:
        return f"{type(error).__name__}: {error}"
