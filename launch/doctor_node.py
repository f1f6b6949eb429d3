"""What `mstkd doctor --nodes` runs on each node, by its text alone: nothing of mstkd has to be there yet.

    python -c TEXT FOLDER PORT      prints one line: MARK and facts as JSON
"""

import json
import os
import socket
import subprocess
import sys
import time

MARK = "mstkd-node "
MEET_S = 20  # nodes do not start at the same moment


def main(folder: str, port: int) -> None:
    sys.path = [place for place in sys.path if place]  # not from the folder where the command was typed
    node, rank = os.environ.get("SLURMD_NODENAME") or socket.gethostname(), int(os.environ["SLURM_PROCID"])
    facts = {"node": node, "rank": rank, "nodes": nodes(), "own_address": address(socket.gethostname())}
    facts |= share(folder, node) | package()
    if len(facts["nodes"]) > 1:
        facts |= meet(facts["nodes"][0], port, rank == 0, len(facts["nodes"]) - 1)
    print(MARK + json.dumps(facts | {"time": time.time()}), flush=True)


def nodes() -> list[str]:
    """The nodes of this step, the first is rank 0's."""
    names = os.environ["SLURM_STEP_NODELIST"]
    try:
        done = subprocess.run(["scontrol", "show", "hostnames", names], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return [names]
    return done.stdout.split() or [names]


def address(name: str) -> str | None:
    try:
        return socket.getaddrinfo(name, None, socket.AF_INET)[0][4][0]
    except OSError:
        return None


def share(folder: str, node: str) -> dict:
    """Read the token, and write it back under the node's name."""
    try:
        with open(os.path.join(folder, "token")) as file:
            token = file.read()
    except OSError as error:
        return {"token": None, "share_error": error.strerror}
    try:
        with open(os.path.join(folder, node), "w") as file:
            file.write(token)
    except OSError as error:
        return {"token": token, "share_error": error.strerror}
    return {"token": token, "share_error": None}


def package() -> dict:
    try:
        import mstkd
        import mstkd.launch
        import mstkd.shards
    except Exception as error:  # whatever is broken there
        return {"version": None, "import_error": f"{type(error).__name__}: {error}".splitlines()[0]}
    return {"version": mstkd.__version__, "import_error": None}


def meet(first: str, port: int, listen: bool, others: int) -> dict:
    """As ranks do: all connect to the first node by its name. `meet_error` says what went wrong."""
    known = {"first": first, "first_address": address(first), "meet_error": None}
    if known["first_address"] is None:
        return known | {"meet_error": "its name does not resolve"}
    deadline = time.monotonic() + MEET_S
    if not listen:
        return known | {"meet_error": connect(first, port, deadline)}
    try:
        with socket.create_server(("", port)) as server:
            for _ in range(others):
                server.settimeout(max(0.01, deadline - time.monotonic()))
                server.accept()[0].close()
    except TimeoutError:
        pass  # who does not come says so itself
    except OSError as error:
        known["meet_error"] = f"port {port} cannot be bound there: {error.strerror}"
    return known


def connect(first: str, port: int, deadline: float) -> str | None:
    """None, or why not."""
    while True:
        try:
            socket.create_connection((first, port), timeout=max(0.01, deadline - time.monotonic())).close()
            return None
        except OSError as error:
            if time.monotonic() > deadline:
                return f"port {port} there cannot be reached: {error.strerror or error}"
            time.sleep(0.1)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
