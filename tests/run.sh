#!/usr/bin/env bash
# Does all the set-up and runs all tests. --fast leaves out those marked slow; other words go to pytest.
# With CI=true nothing may be skipped for want of a browser or a tool: such a test fails instead.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/setup_env.sh
if ! command -v chromium >/dev/null || ! command -v chromedriver >/dev/null; then
  if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
    install_packages chromium chromium-driver
  else
    echo "note: no chromium and chromium-driver on this machine: tests marked browser are skipped (with CI=true they fail)"
  fi
fi
setup_environment "[test]"

selection=()
words=()
for word in "$@"; do
  if [ "$word" = "--fast" ]; then selection=(-m "not slow"); else words+=("$word"); fi
done
# One thread each: two test processes with ranks and loaders of their own fill two cores, and more threads only wait.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
say "Running the tests"
exec python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "${selection[@]}" "${words[@]}"
