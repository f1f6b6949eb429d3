"""slurm/devcluster: a real SLURM cluster of two hosts on this machine."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from devcluster import SCRIPTS, poll

pytestmark = pytest.mark.slurm

WHO = "import json, os, socket; n = socket.gethostname(); print(json.dumps([n, socket.gethostbyname(n), os.environ['SLURM_PROCID']]))"
LOGS_SIGNALS = """
import signal, sys, time
def note(number, frame):
    print(signal.Signals(number).name, flush=True)
    sys.exit(0)
signal.signal(signal.SIGUSR2, note)
print("ready", flush=True)
time.sleep(300)
"""


@pytest.fixture
def jobs(devcluster):
    """Submits batch scripts and cancels them afterwards."""
    numbers = []

    def submit(*words: str, cwd: Path | None = None) -> str:
        numbers.append(devcluster.run("sbatch", "--parsable", *words, cwd=cwd).strip())
        return numbers[-1]

    yield submit
    for number in numbers:
        subprocess.run(["scancel", number], env=devcluster.env, capture_output=True)


@pytest.fixture
def own_cluster(devcluster):
    """The cluster, if these tests may take jobs off it or take it down."""
    if not devcluster.started_here:
        pytest.skip("the cluster was up before the tests and may have jobs of others")
    return devcluster


def text_appears(path: Path, text: str, timeout_s: float = 120) -> None:
    found = poll(lambda: path.exists() and text in path.read_text(), timeout_s)
    assert found, f"no {text!r} in {path}: {path.read_text() if path.exists() else 'no file'}"


def processes(devcluster) -> dict[str, str]:
    return dict(re.findall(r"^(\S+) +running, process (\d+)$", devcluster.script("status").stdout, flags=re.MULTILINE))


def test_all_daemons_run_and_both_nodes_are_in_service(devcluster):
    status = devcluster.script("status")
    assert status.returncode == 0, status.stdout
    assert str(devcluster.folder / "slurm.conf") in status.stdout
    assert set(processes(devcluster)) == {"munged", "mariadbd", "slurmdbd", "slurmctld", "slurmd-n1", "slurmd-n2"}
    assert devcluster.run("sinfo", "-h", "-N", "-p", "debug", "-o", "%N %c").split() == ["n1", "4", "n2", "4"]


def test_ranks_run_on_two_hosts_with_own_addresses(devcluster):
    lines = devcluster.run("srun", "--nodes=2", "--ntasks-per-node=1", sys.executable, "-c", WHO).splitlines()
    ranks = sorted((json.loads(line) for line in lines), key=lambda rank: rank[2])
    assert [name for name, _, _ in ranks] == ["n1", "n2"]
    assert len({address for _, address, _ in ranks}) == 2 and not any(address.startswith("127.") for _, address, _ in ranks)


def test_a_command_inside_a_node_sees_its_host_name_and_the_other_node(devcluster):
    assert devcluster.on("n2", ["hostname"]).strip() == "n2"
    address = devcluster.on("n1", ["getent", "hosts", "n2"]).split()[0]
    assert address in devcluster.on("n2", ["ip", "-4", "-o", "address", "show", "dev", "eth0"])
    assert devcluster.on("n1", ["srun", "--nodelist=n2", "hostname"]).strip() == "n2"


def test_accounting_knows_a_job(devcluster, jobs):
    job = jobs("--output=/dev/null", "--wrap=exit 3")
    assert devcluster.wait(job, "FAILED") == "FAILED"
    # accounting learns of it later than the controller
    assert poll(lambda: "FAILED|3:0" in devcluster.run("sacct", "-nXP", "-j", job, "-o", "state,exitcode"), timeout_s=60)


def test_another_user_than_root_can_submit(devcluster):
    words = ["runuser", "-u", "nobody", "--", "srun", "--nodes=2", "--chdir=/", "id", "-un"]
    assert devcluster.run(*words, cwd="/").split() == ["nobody", "nobody"]


def test_a_requeued_job_starts_again(devcluster, jobs, tmp_path):
    job = jobs("--requeue", "--open-mode=append", "--output=out", "--wrap=echo attempt ${SLURM_RESTART_COUNT:-0}; sleep 300", cwd=tmp_path)
    text_appears(tmp_path / "out", "attempt 0")
    devcluster.run("scontrol", "requeue", job)
    text_appears(tmp_path / "out", "attempt 1")


def test_a_job_of_the_high_partition_preempts_and_the_user_signal_comes_first(own_cluster, jobs, tmp_path):
    (tmp_path / "rank.py").write_text(LOGS_SIGNALS)
    size = ("--nodes=2", "--cpus-per-task=4")
    jobs(*size, "--signal=USR2@30", "--output=out", f"--wrap=srun --cpus-per-task=4 {sys.executable} rank.py", cwd=tmp_path)
    text_appears(tmp_path / "out", "ready\nready")
    urgent = jobs(*size, "--partition=high", "--output=/dev/null", "--wrap=true")
    text_appears(tmp_path / "out", "SIGUSR2\nSIGUSR2")
    own_cluster.wait(urgent, "COMPLETED", timeout_s=180)


def test_up_again_leaves_what_runs(devcluster):
    before = processes(devcluster)
    up = devcluster.script("up")
    assert up.returncode == 0, up.stderr
    assert up.stdout.splitlines()[-1] == f"export SLURM_CONF={devcluster.folder}/slurm.conf"
    assert processes(devcluster) == before


def test_a_stopped_slurmd_loses_no_job_and_up_starts_it(devcluster, jobs, tmp_path):
    job = jobs("--nodelist=n1", "--output=out", "--wrap=echo ready; while [ ! -e end ]; do sleep 0.1; done", cwd=tmp_path)
    text_appears(tmp_path / "out", "ready")
    devcluster.node("n1", "stop")
    assert re.search(r"^slurmd-n1 +not running$", devcluster.script("status").stdout, flags=re.MULTILINE)
    assert devcluster.script("up").returncode == 0
    (tmp_path / "end").touch()
    assert devcluster.wait(job, "COMPLETED") == "COMPLETED"


@pytest.mark.slow
@pytest.mark.parametrize(("ends", "returns"), [("cut", "join"), ("kill", "start")])
def test_a_lost_node_goes_down_and_comes_back(own_cluster, ends, returns):
    own_cluster.node("n2", ends)
    try:
        own_cluster.wait_for_node("n2", "down")
        assert own_cluster.script("status").returncode == 1
        assert own_cluster.run("srun", "--nodelist=n1", "hostname").strip() == "n1"
    finally:
        own_cluster.node("n2", returns)
    own_cluster.wait_for_node("n2", "idle")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("up", "--nodes", "3"), "a cluster of 2 nodes with 4 CPUs each runs already; run"),
        (("up", "--nodes", "none"), "--nodes none: give a number from 1 to 16"),
        (("up", "--cpus"), "give a number after --nodes and --cpus"),
        (("down", "--now"), "unknown word --now"),
        (("node", "n9", "cut"), "no node n9; the nodes are: n1 n2"),
        (("node", "n1", "explode"), "unknown action explode; use cut, join, stop, start or kill"),
        (("on", "n1"), "give a node and a command"),
    ],
)
def test_wrong_words_end_with_one_line(devcluster, words, says):
    done = devcluster.script(*words)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and says in done.stderr


@pytest.mark.parametrize(
    ("folder", "says"),
    [
        ("clusters/mine", "give an absolute path"),
        ("/etc", "/etc holds other files"),
        ("/var/tmp/my cluster", "use at most 80 letters"),
        ("/var/tmp/mstkd-second-devcluster", "is up; end it with MSTKD_DEVCLUSTER="),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused(devcluster, folder, says):
    up = subprocess.run([SCRIPTS / "up"], env={**devcluster.env, "MSTKD_DEVCLUSTER": folder}, capture_output=True, text=True)
    assert up.returncode == 2 and up.stderr.count("\n") == 1 and says in up.stderr
    assert folder == "/etc" or not Path(folder).exists()


def test_down_takes_everything_back_and_up_continues(own_cluster, jobs):
    job = jobs("--output=/dev/null", "--wrap=sleep 300")
    own_cluster.wait(job, "RUNNING")
    assert own_cluster.script("down").returncode == 0
    assert own_cluster.script("status").returncode == 1
    assert "mstkd" not in Path("/etc/hosts").read_text()
    assert "mstkd" not in subprocess.run(["ip", "link"], capture_output=True, text=True, check=True).stdout
    assert own_cluster.script("down").returncode == 0

    assert own_cluster.script("up").returncode == 0
    assert own_cluster.wait(job, "CANCELLED") == "CANCELLED"
    again = jobs("--output=/dev/null", "--wrap=true")
    assert int(again) > int(job)
    own_cluster.wait(again, "COMPLETED")


def test_up_recovers_from_a_crash_of_everything(own_cluster):
    for name, number in processes(own_cluster).items():
        subprocess.run(["kill", "-9", number], check=name == "slurmctld")
    subprocess.run(["ip", "link", "delete", "mstkd-n1"], check=True)
    subprocess.run(["ip", "link", "delete", "mstkd0"], check=True)
    up = own_cluster.script("up")
    assert up.returncode == 0, up.stderr
    assert own_cluster.script("status").returncode == 0
    assert own_cluster.on("n1", ["srun", "--nodelist=n2", "hostname"]).strip() == "n2"


@pytest.mark.parametrize("boot", ["this", "another"])
def test_a_process_number_used_again_is_left_alone(own_cluster, boot):
    """What a reboot leaves: a record whose number belongs to somebody else's process."""
    record = own_cluster.folder / "run" / "slurmd-n2.process"
    own_cluster.node("n2", "stop")
    stranger = subprocess.Popen(["sleep", "600"])
    try:
        start = Path(f"/proc/{stranger.pid}/stat").read_text().rpartition(") ")[2].split()[19]
        this_boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        line = f"{stranger.pid} {int(start) - 1} {this_boot}" if boot == "this" else f"{stranger.pid} {start} {'0' * 36}"
        record.write_text(line + "\n")
        own_cluster.node("n2", "stop")
        assert stranger.poll() is None
        record.write_text(line + "\n")
        assert own_cluster.script("up").returncode == 0
        assert processes(own_cluster)["slurmd-n2"] != str(stranger.pid)
        assert stranger.poll() is None
    finally:
        stranger.terminate()
        stranger.wait()
