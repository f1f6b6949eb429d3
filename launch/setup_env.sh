# Sourced by launch/demo.sh and tests/run.sh: makes sure that a Python environment holds the project.
# Uses the active virtual environment, else makes ./.venv. Can be run any number of times.

say() { printf '\n==> %s\n' "$*"; }

# install_packages PACKAGE... : Debian/Ubuntu packages, as root; otherwise say what to install and stop
install_packages() {
  if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    echo "error: missing on this machine: $*; install them (Debian/Ubuntu: sudo apt-get install $*) and run this again" >&2
    exit 2
  fi
  say "Installing system packages: $*"
  DEBIAN_FRONTEND=noninteractive apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

find_python() {
  for candidate in python3 python3.13 python3.12 python3.11; do
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  echo "error: Python 3.11 or newer is needed and was not found; install it and run this again" >&2
  exit 2
}

# setup_environment EXTRAS : e.g. setup_environment "[test]", or "" for none
setup_environment() {
  local extras="$1"
  if [ -z "${VIRTUAL_ENV:-}" ]; then
    if [ ! -f .venv/bin/activate ]; then
      say "Making a virtual environment in .venv"
      local python
      python="$(find_python)"
      rm -rf .venv # what an interrupted start may have left
      "$python" -m venv .venv || { rm -rf .venv; install_packages python3-venv; "$python" -m venv .venv; }
    fi
    # shellcheck disable=SC1091
    . .venv/bin/activate
  fi
  # DeepSpeed compiles its shared-memory collectives once
  command -v g++ >/dev/null || install_packages g++
  python -c 'import pathlib, sys, sysconfig; sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").is_file())' ||
    install_packages "$(python -c 'import sys; print("python%d.%d-dev" % sys.version_info[:2])')"
  local wanted
  wanted="$(cat pyproject.toml launch/constraints.txt | sha256sum | cut -d' ' -f1) $extras $PWD"
  if [ "$(cat "$VIRTUAL_ENV/.mstkd-installed" 2>/dev/null)" != "$wanted" ]; then
    say "Installing mstkd and what it needs (versions: launch/constraints.txt)"
    python -m pip install -q --upgrade pip "setuptools>=77" wheel
    # CPU machines: torch first and alone, so that a CPU build already at hand is taken
    DS_BUILD_OPS=0 python -m pip install -q -c launch/constraints.txt torch
    DS_BUILD_OPS=0 python -m pip install -q -c launch/constraints.txt --no-build-isolation -e ".$extras"
    echo "$wanted" >"$VIRTUAL_ENV/.mstkd-installed"
  fi
}
