"""The SLURM jobs of a run folder, as `mstkd submit` noted them in jobs.json."""

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from mstkd.files import write_json


class SubmittedJob(BaseModel):
    model_config = ConfigDict(extra="forbid")

    id: str  # "123", "123_4" in an array
    kind: Literal["train", "evaluate"]
    stages: list[str]  # of a train job
    cluster: str
    submitted: str  # local time with offset
    after: str | None = None  # the job whose success it waits for
    folder: str  # of its logs and its pickled call, relative to the folder of the runs

    def log(self, runs_dir: Path, rank: int = 0, stream: Literal["out", "err"] = "out") -> Path:
        """What a rank printed, all attempts appended."""
        return Path(runs_dir) / self.folder / f"{self.id}_{rank}_log.{stream}"


def read_jobs(run_dir: Path) -> list[SubmittedJob]:
    """In the order of submission; [] for a run that was never submitted."""
    path = Path(run_dir) / "jobs.json"
    return [SubmittedJob(**job) for job in json.loads(path.read_text())] if path.is_file() else []


def note_jobs(run_dir: Path, jobs: list[SubmittedJob]) -> None:
    """Add `jobs` to jobs.json."""
    path = Path(run_dir) / "jobs.json"
    write_json(path, [job.model_dump() for job in [*read_jobs(run_dir), *jobs]])
