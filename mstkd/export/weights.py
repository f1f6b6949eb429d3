"""Weights as safetensors, with mstkd.json beside them: what `mstkd.load` opens."""

from pathlib import Path

from safetensors.torch import load_file, save

from mstkd.errors import UserError
from mstkd.export.facts import StudentFacts, write_facts
from mstkd.methods import Method
from mstkd.trained_run import TrainedRun


def write_weights(run: TrainedRun, facts: StudentFacts, folder: Path) -> None:
    """<network>.safetensors, keys are parameter and buffer names, for the network and those that it cannot do without; mstkd.json."""
    for name, file in facts.weights.items():
        state = run.method.networks[name].state_dict()
        tensors = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
        (folder / file).write_bytes(save(tensors))  # its own save_file makes files for the owner alone
    write_facts(facts, folder)


def load_exported(method: Method, facts: StudentFacts, folder: Path) -> None:
    """Fill the method's networks. Raises UserError if a file is not there or does not fit."""
    for name, file in facts.weights.items():
        path = folder / file
        if not path.is_file():
            raise UserError(f"{path}: no such file; copy the whole exported folder")
        try:
            method.networks[name].load_state_dict(load_file(path))
        except Exception as error:  # safetensors' own, or parameters that differ
            raise UserError(f"{path}: does not fit {facts.method['name']}: {' '.join(str(error).split())[:300]}; export the run again") from None
