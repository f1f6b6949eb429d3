"""The batch script of a job: what submitit is told, and the shell lines around its srun."""

import shlex
from pathlib import Path

from mstkd.launch.cluster import Cluster

# Every node reads the job's own file first: a run folder that only some nodes see ends with a sentence instead of a silence.
TOKEN_CHECK = (
    'test -r "$0" || { echo "error: $(hostname) does not see $0: the run folder must lie on a file system that all nodes share" >&2; exit 2; }'
)


def sbatch_parameters(cluster: Cluster, name: str, folder: Path, dependency: str | None = None) -> dict:
    """Keyword arguments of `submitit.SlurmExecutor.update_parameters`."""
    optional = {
        "partition": cluster.partition, "account": cluster.account, "qos": cluster.qos, "constraint": cluster.constraint,
        "gpus_per_node": cluster.gpus_per_node, "mem": cluster.memory, "dependency": dependency,
    }  # fmt: skip
    additional = {"requeue": True, **({"kill-on-invalid-dep": "yes"} if dependency else {}), **cluster.additional}
    return {
        **{key: value for key, value in optional.items() if value is not None},
        "job_name": name,
        "nodes": cluster.nodes,
        "ntasks_per_node": cluster.tasks_per_node,
        "cpus_per_task": cluster.cpus_per_task,
        "time": cluster.timeout_min,
        "signal_delay_s": cluster.signal_delay_s,
        "array_parallelism": cluster.array_parallelism,
        "wckey": "mstkd",
        "setup": setup_lines(cluster, folder),
        "teardown": teardown_lines(cluster, folder),
        # srun does not inherit --cpus-per-task on every SLURM version; a rank that dies takes the others down
        "srun_args": [f"--cpus-per-task={cluster.cpus_per_task}", "--kill-on-bad-exit=1", *cluster.container_options],
        "additional_parameters": additional,
    }


def setup_lines(cluster: Cluster, folder: Path) -> list[str]:
    """Shell lines before the ranks start; $run is the run folder of this member of the array."""
    runs, token = shlex.quote(str(folder / "runs.txt")), shlex.quote(str(folder / "tasks.json"))
    return [
        *(f"module load {shlex.quote(module)}" for module in cluster.modules),
        *(f"export {key}={shlex.quote(value)}" for key, value in cluster.environment.items()),
        *cluster.setup,
        f'srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 bash -c {shlex.quote(TOKEN_CHECK)} {token} || {{ [ $? -eq 2 ] && exit 2; echo "warning: the check of the shared folder could not run" >&2; }}',
        f'run=$(sed -n "$((${{SLURM_ARRAY_TASK_ID:-0}} + 1))p" {runs})',
        'export PYTHONPATH="$run/code${PYTHONPATH:+:$PYTHONPATH}"  # the snapshot comes before whatever else is installed',
        "export PYTHONSAFEPATH=1  # else python -m looks first into the folder that the job was submitted from",
        "before=$(find \"$run/attempts\" -name '????.json' 2>/dev/null | wc -l)",
    ]


def teardown_lines(cluster: Cluster, folder: Path) -> list[str]:
    """Shell lines after the ranks have left: start again if the run is not done and the budget allows."""
    outside = cluster.container is not None and cluster.container.runtime == "pyxis"  # the batch script is not in the container
    python = "python3" if outside else cluster.python_command
    ask = f"{python} -m mstkd.launch.verdict {shlex.quote(str(folder))}"
    return [
        "code=$?",
        f'verdict=$({ask} "$code" "$before")',
        'if [ "$verdict" = requeue ]; then',
        # incomplete: a job that was cancelled meanwhile stays cancelled
        '  scontrol requeue incomplete "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}" && exit 0',
        '  echo "error: this cluster refuses to requeue; submit again to go on" >&2',
        "  verdict=$((code ? code : 140))",
        "fi",
        'exit "${verdict:-$((code ? code : 1))}"  # never 0 for want of a verdict: other jobs wait for it',
    ]
