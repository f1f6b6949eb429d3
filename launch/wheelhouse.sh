#!/usr/bin/env bash
# mstkd for a cluster without internet: a folder of wheels made here, installed there.
#
#   bash launch/wheelhouse.sh OUT_DIR [words for pip ...]       on a machine with network, from a checkout
#   bash wheelhouse.sh --install WHEELHOUSE VENV                on the cluster; needs nothing but WHEELHOUSE and Python
#
# Both machines need the same Python version and architecture, and the cluster a glibc that is not older.
# PYTHON=... names the interpreter, else python3. Further words go to `pip wheel`: other packages (pytest onnx) or options.
# torch is what pip finds for the version in launch/constraints.txt; for another build of it (CPU only, another CUDA)
# give pip a folder with that wheel: --find-links DIR.
set -euo pipefail

say() { printf '\n==> %s\n' "$*"; }
fail() { echo "error: $*" >&2; exit 2; }
# pip looks nowhere but into the wheelhouse, whatever the user's or the machine's configuration says
offline_pip() { env -u PIP_FIND_LINKS -u PIP_EXTRA_INDEX_URL -u PIP_INDEX_URL PIP_CONFIG_FILE=/dev/null "$@"; }
platform_of() {
  "$1" -c 'import platform, sys; print(sys.implementation.name, "%d.%d" % sys.version_info[:2], sys.platform, platform.machine())'
}

check_python() {
  command -v "$1" >/dev/null || fail "no program $1: load a Python module, or name the interpreter with PYTHON=/path/to/python3"
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$1 is $("$1" --version 2>&1): mstkd needs Python 3.11 or newer; name another with PYTHON=/path/to/python3"
  "$1" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$1 cannot make virtual environments: install python3-venv, or name another interpreter with PYTHON=/path/to/python3"
}

make_wheelhouse() {
  local out="$1" python="$2" root work
  shift 2
  root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
  [ -f "$root/pyproject.toml" ] || fail "no pyproject.toml in $root: a wheelhouse is made from a checkout (to install one: --install)"
  [ -z "$(ls -A "$out" 2>/dev/null)" ] || fail "$out is not empty: remove it, or name another folder"
  mkdir -p "$out"
  out="$(cd "$out" && pwd)"
  work="$(mktemp -d)"
  # expanded now: $work is gone when the trap runs
  trap "rm -rf '$work'" EXIT

  say "Copying the checkout (a build inside it would leave, and reuse, old files)"
  mkdir "$work/source"
  cp -R "$root"/{launch,mstkd,shards,slurm,pyproject.toml,README.md,LICENSE} "$work/source/"
  "$python" -m venv "$work/venv"
  "$work/venv/bin/python" -m pip install -q --upgrade pip

  say "Collecting mstkd and all it needs; what has no wheel (DeepSpeed) is built here, so that no node has to"
  # folders of package data (recipes, specs) make setuptools print a page of warnings each
  (cd "$work" && PYTHONWARNINGS=ignore DS_BUILD_OPS=0 "$work/venv/bin/python" -m pip wheel -q -c "$root/launch/constraints.txt" -w "$out" \
    "$work/source" pip "setuptools>=77" wheel "$@")
  cp "$root/launch/constraints.txt" "$root/launch/wheelhouse.sh" "$out/"
  platform_of "$python" >"$out/platform.txt"
  (cd "$out" && sha256sum -- *.whl constraints.txt wheelhouse.sh platform.txt >SHA256SUMS)

  say "$(find "$out" -name '*.whl' | wc -l) wheels, $(du -sh "$out" | cut -f1), for $(cat "$out/platform.txt")"
  cat <<TEXT
Copy the folder to the cluster (rsync -a $out CLUSTER:) and run there:

  bash $(basename "$out")/wheelhouse.sh --install $(basename "$out") mstkd-env
  source mstkd-env/bin/activate

or, by hand:

  python3 -m venv mstkd-env
  source mstkd-env/bin/activate
  pip install --no-index --find-links $(basename "$out") -c $(basename "$out")/constraints.txt --upgrade pip setuptools wheel
  pip install --no-index --find-links $(basename "$out") -c $(basename "$out")/constraints.txt mstkd

The environment must lie where all nodes see it. Ranks on CPUs also need g++ and the Python headers on the nodes:
DeepSpeed compiles its collectives once per node.
TEXT
}

install_wheelhouse() {
  local house="$1" venv="$2" python="$3" wanted found from
  [ -f "$house/SHA256SUMS" ] ||
    fail "$house is no wheelhouse (no SHA256SUMS): make one with launch/wheelhouse.sh OUT_DIR and copy all of it"
  house="$(cd "$house" && pwd)"
  wanted="$(cat "$house/platform.txt")" found="$(platform_of "$python")"
  [ "$found" = "$wanted" ] ||
    fail "$house is for $wanted, $python is $found: name a fitting interpreter with PYTHON=..., or make another wheelhouse"
  (cd "$house" && sha256sum --quiet --check SHA256SUMS) || fail "$house: the files named above are missing or damaged; copy it again"
  from=(--no-index --find-links "$house" -c "$house/constraints.txt")

  say "Installing from $house into $venv, without network"
  "$python" -m venv "$venv"
  offline_pip "$venv/bin/python" -m pip install -q "${from[@]}" --upgrade pip setuptools wheel &&
    offline_pip "$venv/bin/python" -m pip install -q "${from[@]}" mstkd ||
    fail "pip could not install from $house (its message is above); if it finds no fitting wheel, this system's glibc is older" \
      "than where the wheelhouse was made: make it on a system like this one, or use the container, slurm/mstkd.def"
  "$venv/bin/mstkd" --help >/dev/null
  say "Done: source $venv/bin/activate && mstkd doctor"
}

main() {
  local python="${PYTHON:-python3}"
  case "${1:-}" in
    --install)
      [ $# -eq 3 ] || fail "usage: bash wheelhouse.sh --install WHEELHOUSE VENV"
      check_python "$python"
      install_wheelhouse "$2" "$3" "$python"
      ;;
    "" | -*) fail "usage: bash launch/wheelhouse.sh OUT_DIR [words for pip ...] | --install WHEELHOUSE VENV" ;;
    *)
      check_python "$python"
      make_wheelhouse "$1" "$python" "${@:2}"
      ;;
  esac
}

main "$@"
