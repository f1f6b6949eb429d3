"""A cluster as a YAML file: what `mstkd submit` asks SLURM for."""

import os
import shlex
import sys
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from mstkd.config import Section
from mstkd.errors import UserError
from mstkd.recipe import nearest, read_yaml, validate_section


OWN_OPTIONS = frozenset(
    ("array", "cpus-per-task", "dependency", "error", "job-name", "kill-on-invalid-dep", "nodes", "ntasks", "ntasks-per-node")
    + ("open-mode", "output", "requeue", "signal", "time")
)


class Container(Section):
    runtime: Literal["apptainer", "pyxis"]
    image: str
    mounts: list[str] = []  # "host:container"


class Cluster(Section):
    """Resources of one job and how it starts. Ranks = nodes x (gpus_per_node or ranks_per_node)."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    nodes: int = Field(1, ge=1)
    gpus_per_node: int | None = Field(None, ge=1)  # one rank per GPU
    ranks_per_node: int | None = Field(None, ge=1)  # CPU clusters, or where GPUs are asked for in `additional` (gres)
    cpus_per_task: int = Field(ge=1)  # for each rank and its loader workers
    mem_gb: float | None = Field(None, ge=0)  # per node; 0: all of it; default: the cluster's
    timeout_min: int = Field(ge=1)
    signal_delay_s: int = Field(120, ge=10)  # USR2 comes so long before the time limit; one step and a save must fit
    requeues: int = Field(20, ge=0)  # how often a job may be started again, after the time limit or a crash
    array_parallelism: int = Field(8, ge=1)  # members of a sweep that run at once
    modules: list[str] = []
    setup: list[str] = []  # shell lines before the ranks start
    environment: dict[str, str] = {}
    container: Container | None = None
    python: str | None = None  # the interpreter on the nodes; default: the one that submits
    additional: dict[str, str | int | bool] = {}  # other sbatch options, e.g. {"gres": "gpu:a100:4", "reservation": "x"}

    @field_validator("additional")
    @classmethod
    def _words_of_sbatch(cls, given: dict[str, str | int | bool]) -> dict[str, str | int | bool]:
        """As sbatch has them: with dashes, and what is false is not said."""
        words = {key.replace("_", "-"): value for key, value in given.items()}
        if taken := sorted(OWN_OPTIONS & words.keys()):
            raise ValueError(f"mstkd sets {taken[0]} itself; leave it out")
        return {key: value for key, value in words.items() if value is not False}

    @model_validator(mode="after")
    def _one_kind_of_rank(self) -> "Cluster":
        if (self.gpus_per_node is None) == (self.ranks_per_node is None):
            raise ValueError("give exactly one of gpus_per_node and ranks_per_node")
        return self

    @model_validator(mode="after")
    def _signal_comes_before_the_end(self) -> "Cluster":
        if self.signal_delay_s >= 60 * self.timeout_min:
            raise ValueError(f"signal_delay_s {self.signal_delay_s} does not fit into timeout_min {self.timeout_min}: jobs would be stopped at once")
        return self

    @property
    def tasks_per_node(self) -> int:
        return self.gpus_per_node or self.ranks_per_node

    @property
    def world(self) -> int:
        return self.nodes * self.tasks_per_node

    @property
    def memory(self) -> str | None:
        """Per node, as SLURM's --mem has it."""
        return None if self.mem_gb is None else f"{round(1024 * self.mem_gb)}M" if self.mem_gb else "0"

    @property
    def container_options(self) -> list[str]:
        """The words of srun that put ranks into the container."""
        if self.container is None or self.container.runtime != "pyxis":  # apptainer is part of `python_command`
            return []
        mounts = [f"--container-mounts={','.join(self.container.mounts)}"] if self.container.mounts else []
        return [f"--container-image={self.container.image}", *mounts]

    @property
    def python_command(self) -> str:
        """The shell words that start a rank's Python on a node."""
        if self.container is None:
            return shlex.quote(self.python or sys.executable)
        if self.container.runtime == "pyxis":  # srun puts the ranks into the container
            return shlex.quote(self.python or "python")
        binds = [f"--bind={mount}" for mount in self.container.mounts]
        return shlex.join(["apptainer", "exec", *(["--nv"] if self.gpus_per_node else []), *binds, self.container.image, self.python or "python"])


def cluster_folders() -> list[Path]:
    """Where cluster files lie: the user's own folder first, then the packaged presets."""
    own = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "mstkd" / "clusters"
    return [own, packaged_slurm() / "clusters"]


def packaged_slurm() -> Path:
    """The folder `slurm/`, in the package or, in an editable install, beside it: presets, batch script, devcluster."""
    import mstkd

    package = Path(mstkd.__file__).parent
    return package / "slurm" if (package / "slurm").is_dir() else package.parent / "slurm"


def load_cluster(cluster: str, changes: dict[str, Any] | None = None) -> Cluster:
    """The cluster called `cluster`, or in the file `cluster` (ending in .yaml); `changes` win. Raises UserError."""
    path = _find(cluster)
    values, lines = read_yaml(path)
    origin = {key: f"{path.name}:{line}" for key, line in lines.items()}
    return validate_section(Cluster, {**values, **(changes or {})}, "", path.name, origin)


def _find(cluster: str) -> Path:
    if Path(cluster).suffix in (".yaml", ".yml"):
        if not Path(cluster).is_file():
            raise UserError(f"--cluster {cluster}: no such file")
        return Path(cluster)
    for folder in cluster_folders():
        if (folder / f"{cluster}.yaml").is_file():
            return folder / f"{cluster}.yaml"
    known = sorted({path.stem for folder in cluster_folders() for path in folder.glob("*.yaml")})
    raise UserError(f"--cluster {cluster}: no such cluster{nearest(cluster, known)}; your own lie in {cluster_folders()[0]}")
