"""What ranks send per step: the figures of the README against the kernel's counters."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("traffic.py")
ROWS = ["0/fp32/1", "1/fp32/2", "2/fp32/2", "3/fp32/2", "2/bf16/1"]  # where the formulas differ; the README has all


def _reason_against() -> str:
    if not (shutil.which("unshare") and shutil.which("ip")):
        return "needs unshare and ip (util-linux, iproute2)"
    allowed = subprocess.run(["unshare", "--net", "--map-root-user", "true"], capture_output=True).returncode == 0
    return "" if allowed else "network namespaces are not allowed here"


@pytest.mark.slow
def test_two_ranks_send_what_the_formulas_say():
    if reason := _reason_against():
        pytest.skip(reason)
    done = subprocess.run([sys.executable, SCRIPT, *ROWS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if len(line.split()) == 6 and line.split()[1] in ("fp32", "bf16")]
    assert ["/".join(row[:3]) for row in rows] == ROWS, done.stdout
    for zero, precision, accumulation, _, _, ratio in rows:
        assert float(ratio) == pytest.approx(1, abs=0.01), (zero, precision, accumulation)  # headers and scalars: 0.2 %
