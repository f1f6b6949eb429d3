"""How a DeepSpeed engine writes: through the checkpoint's `NewFiles`. Imported late, as DeepSpeed is."""

from pathlib import Path

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

from mstkd.engine.new_files import NewFiles


class Writer(TorchCheckpointEngine):
    """DeepSpeed's own writer but for errors, hashes and fsync: save_checkpoint waits for all ranks after each rank has written."""

    files: NewFiles

    def makedirs(self, path, exist_ok=False):
        with self.files.guarded(Path(path)):
            super().makedirs(path, exist_ok)

    def save(self, state_dict, path: str):
        self.files.write(str(Path(path).relative_to(self.files.folder)), lambda stream: torch.save(state_dict, stream))
