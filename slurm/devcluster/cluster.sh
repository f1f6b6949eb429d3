# Sourced by the commands of this folder: where the cluster lives, how it is named, and how processes are recorded.

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
folder="${MSTKD_DEVCLUSTER:-/var/tmp/mstkd-devcluster}"
PATH="$PATH:/usr/sbin:/sbin" # where Debian keeps daemons and ip; not on every user's path

network=10.213.77
bridge=mstkd0
controller_address="$network.1"
slurmctld_port=17017
slurmd_port=17018
slurmdbd_port=17019

say() { printf '%s\n' "$*"; }
fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

node_names() { for ((i = 1; i <= nodes; i++)); do echo "n$i"; done; }
node_address() { echo "$network.$((10 + ${1#n}))"; }
namespace_of() { echo "mstkd-$1"; }
link_of() { echo "mstkd-$1"; }

# A socket's path has room for 107 characters, and SLURM's configuration none for blanks.
check_folder() {
  [[ "$folder" == /* && "$folder" != */../* ]] || fail "MSTKD_DEVCLUSTER=$folder: give an absolute path"
  [[ "$folder" =~ ^[A-Za-z0-9._/-]{2,80}$ ]] || fail "MSTKD_DEVCLUSTER=$folder: use at most 80 letters, digits and ._-/"
  if [ -d "$folder" ] && [ ! -e "$folder/mstkd-devcluster" ] && [ -n "$(ls -A "$folder")" ]; then
    fail "$folder holds other files; set MSTKD_DEVCLUSTER to an empty or new folder"
  fi
}

need_root() { [ "$(id -u)" -eq 0 ] || fail "$(basename "$0") makes network namespaces: run it as root (sudo)"; }

# One command at a time; daemons must not inherit the lock, see start_daemon.
take_lock() {
  exec 9>"$folder/lock"
  flock -w 300 9 || fail "another command holds $folder/lock; wait for it to end"
}

# Sets $nodes and $cpus to those of the cluster in $folder; false if there is none.
read_settings() {
  [ -e "$folder/settings" ] || return 1
  read -r nodes cpus <"$folder/settings"
}

# The folder of the cluster that has this machine's bridge and names; nothing if there is none.
owner_of_machine() { sed -n 's/^# >>> mstkd devcluster in //p' /etc/hosts | head -n 1; }

check_node() {
  read_settings || fail "no cluster in $folder; start one with $here/up"
  node_names | grep -qx -- "$1" || fail "no node $1; the nodes are: $(node_names | tr '\n' ' ')"
}

# start_time PID: ticks since boot; nothing for a process that is gone or waits to be reaped
start_time() {
  local stat
  stat="$(cat "/proc/$1/stat" 2>/dev/null)" || return 0
  read -r -a stat <<<"${stat##*) }"
  [ "${stat[0]}" = Z ] || echo "${stat[19]}"
}

# A process is known by its number, its start and the boot: numbers are used again.
record() { echo "$2 $(start_time "$2") $(cat /proc/sys/kernel/random/boot_id)" >"$folder/run/$1.process"; }

# process_of NAME: its number; nothing when it does not run (any more)
process_of() {
  local pid start boot
  read -r pid start boot <"$folder/run/$1.process" || return 0
  if [ "$boot" = "$(cat /proc/sys/kernel/random/boot_id)" ] && [ -n "$start" ] && [ "$(start_time "$pid")" = "$start" ]; then
    echo "$pid"
  fi
} 2>/dev/null

daemon_names() {
  printf '%s\n' munged mariadbd slurmdbd slurmctld
  node_names | sed 's/^/slurmd-/'
}

any_daemon_runs() {
  local name
  for name in $(daemon_names); do [ -z "$(process_of "$name")" ] || return 0; done
  return 1
}

# start_daemon NAME SECONDS CHECK COMMAND...: starts it unless it runs, and waits until CHECK (one word) is true
start_daemon() {
  local name="$1" end=$((SECONDS + $2)) check="$3"
  shift 3
  if [ -z "$(process_of "$name")" ]; then
    env -i PATH="$PATH" HOME=/root LANG=C.UTF-8 SLURM_CONF="$folder/slurm.conf" MYSQL_UNIX_PORT="$folder/run/mariadb.socket" \
      setsid "$@" >>"$folder/logs/$name.out" 2>&1 </dev/null 9>&- &
    record "$name" $!
  fi
  until "$check" "$name" >/dev/null 2>&1; do
    [ -n "$(process_of "$name")" ] || fail "$name ended at its start; see $folder/logs/$name.out"
    ((SECONDS < end)) || fail "$name runs but does not answer; see $folder/logs/$name.out"
    sleep 0.1
  done
}

# stop_daemon NAME SECONDS: asks it to end, and ends it after that time
stop_daemon() {
  local pid end=$((SECONDS + $2))
  pid="$(process_of "$1")"
  if [ -n "$pid" ]; then
    kill "$pid" 2>/dev/null || true
    while [ -n "$(process_of "$1")" ]; do
      if ((SECONDS >= end)); then kill -9 "$pid" 2>/dev/null || true; fi
      sleep 0.1
    done
  fi
  rm -f "$folder/run/$1.process"
}

# end_processes_of NODE: all that runs in the node's network, at once, as when its power goes
end_processes_of() {
  local pids
  pids="$(ip netns pids "$(namespace_of "$1")" 2>/dev/null)" || return 0
  [ -z "$pids" ] || kill -9 $pids 2>/dev/null || true
}

# in_node NODE COMMAND...: with the node's network and host name. Not `ip netns exec`: that mounts /sys anew, without cgroups.
in_node() {
  local node="$1"
  shift
  nsenter --net="/var/run/netns/$(namespace_of "$node")" unshare --uts sh -c 'hostname "$1"; shift; exec "$@"' sh "$node" "$@"
}

slurmd_listens() { in_node "${1#slurmd-}" timeout 2 bash -c "</dev/tcp/127.0.0.1/$slurmd_port"; }

# a mount namespace of its own, too: what is mounted inside a node (to hide a folder from it, say) stays there
start_slurmd() {
  start_daemon "slurmd-$1" 30 slurmd_listens nsenter --net="/var/run/netns/$(namespace_of "$1")" \
    unshare --uts --mount --propagation slave sh -c 'hostname "$1"; exec slurmd -D -N "$1" -f "$2"' sh "$1" "$folder/slurm.conf"
}

all_nodes_ready() { ! sinfo -h -N -o '%N %T' | grep -vqE ' (idle|mixed|allocated|completing|planned)[-+]?$'; }

hosts_without_ours() { sed '/^# >>> mstkd devcluster/,/^# <<< mstkd devcluster/d' /etc/hosts; }
