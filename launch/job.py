"""What a SLURM task runs: a call that holds plain data, so that its pickle names this module and nothing else.

submitit unpickles it on every rank. It never requeues: ranks end with a note in the run folder (mstkd/attempts.py),
and the batch script asks `verdict` when all have left.
"""

import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mstkd.errors import UserError
from mstkd.launch.snapshot import check_snapshot


@dataclass
class Job:
    run_dir: str
    code: str  # the snapshot's folder
    kind: Literal["train", "evaluate"] = "train"
    stages: tuple[str, ...] = ()  # of a train job

    def __call__(self) -> None:
        """Exits with the command's code; 0 also after a stop, so that srun lets the other ranks leave in peace."""
        for number in (signal.SIGUSR2, signal.SIGTERM):  # until training listens there is nothing to save; submitit's own would requeue
            signal.signal(number, lambda number, _frame: os._exit(128 + number))
        try:
            check_snapshot(Path(self.code))
            code = self._train() if self.kind == "train" else self._evaluate()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            code = error.exit_code
        if code:
            sys.exit(code)

    def _train(self) -> int:
        from mstkd.run_folder import read_run_config
        from mstkd.train import run_config

        def load():
            return read_run_config(Path(self.run_dir)).model_copy(update={"stages": list(self.stages), "resume": "auto"})  # `submit` has insisted on the other words

        code = run_config(load)
        return 0 if code > 128 else code

    def _evaluate(self) -> int:
        from mstkd.evaluate.run import evaluate_on_ranks

        evaluate_on_ranks(Path(self.run_dir))
        return 0
