# shellcheck shell=bash
# Sourced by the launch scripts: the site's values, and the one way in which a run is started, stopped and started again.
#
# Launchers hide how a training process ended. So `train --status FILE` says it, for LOCAL_RANK 0: `pid=N` once it listens to
# signals, and `exit=CODE` if it ends by its own decision: 0 finished or saved, 2 a mistake, 3 diverged, 4 disturbed.
set -euo pipefail

scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=site.env
source "$scripts/site.env"

exec {errors}>&2
say() { echo "rorqual: $*" >&"$errors"; }
refuse() { say "$*"; exit 2; }

# check NAME REGEX RULE: end unless the site's value NAME is as the rule says.
check() { [[ ${!1} =~ ^($2)$ ]] || refuse "$1=${!1}: must be $3; set it in scripts/site.env or in the environment"; }

# The arguments of a launch script, and the site's values that all of them use.
prepare() {
  [ "$#" -gt 0 ] || refuse "$0: needs a recipe; write $0 RECIPE key=value …"
  local change
  for change in "${@:2}"; do
    [[ $change = *=* ]] || refuse "$change: must be key=value; what else rorqual can do needs no launcher"
  done
  [ -n "$PROCESSES" ] || PROCESSES=$({ nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU' || true)
  [ "$PROCESSES" != 0 ] || PROCESSES=1  # no GPU
  # One number: torchrun takes MIN:MAX too, but tells the run that a node has come by SIGTERM, which asks it to end.
  check NNODES '[1-9][0-9]*' "a number of nodes"
  check PROCESSES '[1-9][0-9]*' "a number of processes, 1 or more"
  check NODE_RANK '[0-9]+' "a number of a node, from 0"
  check MASTER_PORT '[1-9][0-9]{0,4}' "a port"
  check RESTARTS '[0-9]+' "a number of restarts"
  check LASTED '[0-9]+' "seconds"
  check PAUSE '[0-9]+' "seconds"
  check ABSENCE '[0-9]+' "seconds"
  if [ -n "$INTERFACE" ]; then
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME-$INTERFACE} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME-$INTERFACE}
  fi
  [[ $VENV = /* ]] || VENV=$scripts/../$VENV
  [ -x "$VENV/bin/python" ] || refuse "VENV=$VENV: no Python environment is there; source scripts/env.sh makes one; or set VENV"
  PATH=$(cd "$VENV/bin" && pwd):$PATH
}

# Whether there are several nodes, which must know how to reach node 0.
has_nodes() {
  [ "$NNODES" != 1 ] || return 1
  check MASTER_ADDR '.+' "the address of node 0 where NNODES=$NNODES"
}

# The variables that matter to a run, as NAME=value.
variables() {
  local name
  for name in $(compgen -e | grep -E '^(NCCL|GLOO|TORCH|CUDA|OMP)_'); do echo "$name=${!name}"; done
}

# A command as a shell takes it, behind those variables.
show() {
  local line words
  mapfile -t words < <(variables)
  line=$(printf '%q ' "${words[@]}" "$@")
  echo "${line% }"
}

# keep_running COMMAND …: run a launcher's command that ends with train's arguments, until the run is over. Never returns.
# USR1, TERM, INT or HUP: the run saves and ends, with 0. A second one: it is killed.
keep_running() {
  if [ -n "${DRY_RUN:-}" ]; then
    show "$@" --status FILE
    exit 0
  fi
  status=$(mktemp /tmp/rorqual-XXXXXXXX)  # TMPDIR may be one for all nodes, each of which writes a file of this name
  export DS_ENV_FILE=$status.env          # deepspeed hands on to other nodes what stands there, and little by itself
  variables >"$DS_ENV_FILE"
  launcher='' asked=0
  trap 'rm -f "$status" "$DS_ENV_FILE"' EXIT
  trap stop USR1 TERM INT HUP
  local restarts=0 alone='' began code why which i
  while true; do
    began=$SECONDS
    start "$@" --status "$status"
    ((asked == 0)) || hand_on  # the request came while it started
    code=0
    wait_for "$launcher" || code=$?
    clear_away
    case $(said exit) in
      0) exit 0 ;;
      2) exit 2 ;;
      3) exit 3 ;;
      4) why="the run was disturbed" code=4 ;;
      *) why="the run ended without a word, its launcher with exit code $code" code=$((code ? code : 1)) ;;
    esac
    ((asked == 0)) || { say "$why"; exit "$code"; }
    if [ "$NNODES" != 1 ] && [ -z "$(said pid)" ]; then  # the nodes have not met: one may be booting
      alone=${alone:-$began}
      ((SECONDS - alone < ABSENCE)) || { say "$why; gives up after $((SECONDS - alone)) s without a run (ABSENCE)"; exit "$code"; }
      which="without a run for $((SECONDS - alone)) s of $ABSENCE s"
    else
      alone=''
      ((SECONDS - began < LASTED)) || restarts=0
      ((restarts < RESTARTS)) || { say "$why; gives up after $restarts restarts in a row (RESTARTS)"; exit "$code"; }
      restarts=$((restarts + 1))
      which="restart $restarts of $RESTARTS"
    fi
    say "$why after $((SECONDS - began)) s; starts again in $PAUSE s ($which)"
    for ((i = 0; i < PAUSE && !asked; i++)); do sleep 1; done
    ((asked == 0)) || exit 0  # nothing runs: what there is to save is saved
  done
}

# The launcher gets a process group of its own, so that no signal reaches it past this script; USR1 it ignores, and with it all
# that it starts, until the run listens.
start() {
  : >"$status"
  exec {words}> >(relay)
  relay=$!
  set -m
  (trap '' USR1; exec "$@") 2>&"$words" {words}>&- {errors}>&- &
  launcher=$!
  set +m
  exec {words}>&-
  (hurry) >/dev/null 2>&1 {errors}>&- &
}

# A launcher that has lost other nodes may wait for them for minutes after its run has ended with 4.
hurry() {
  grep -qm 1 '^exit=4' < <(exec tail -f -n +1 --pid="$launcher" "$status") && sleep 10 && kill -KILL -- "-$launcher"
}

# Errors of the run and of its launcher. How a run ended that has said so itself is not told again by its launcher.
relay() {
  trap '' USR1 TERM INT HUP
  local line
  while IFS= read -r line || [ -n "$line" ]; do
    if [[ $line =~ $LAUNCHERS_WORDS && -n $(said exit) ]]; then break; fi
    printf '%s\n' "$line"
  done >&2
  cat >/dev/null
}
# How those of torch, of its store and of deepspeed begin.
LAUNCHERS_WORDS='^[IWE][0-9]{4} .* torch/distributed/|^\[[WE][0-9]{4} .*\.cpp:|\[launch\.py:|^Traceback '

# said pid|exit: the value in the status file; of an exit code only if nothing has started since.
said() {
  if [ "$1" = exit ]; then sed -n '$s/^exit=//p' "$status"; else sed -n 's/^pid=//p' "$status" | tail -n 1; fi
}

# Like `wait`, which returns early when a signal is handled; and bash itself does not tell that a job was killed.
wait_for() {
  while kill -0 "$1"; do wait "$1" || true; done
  wait "$1"
} 2>/dev/null

stop() {
  asked=$((asked + 1))
  if ((asked > 1)); then
    say "asked again: the run is killed"
    clear_away
  else
    say "asked to stop: the run saves and ends"
    hand_on
  fi
}

# Ask the run to save and end, as soon as it listens.
hand_on() {
  while [ -n "$launcher" ] && kill -0 "$launcher" 2>/dev/null; do
    if [ -n "$(said pid)" ]; then
      kill -USR1 "$(said pid)" 2>/dev/null || true  # it may have ended
      break
    fi
    sleep 0.2
  done
}

# Nothing of a launch stays: what is in its group is killed, and what is not dies with its launcher. What deepspeed has started by
# ssh does neither: there a run that has not ended itself is killed here, and its other processes end because they miss it.
clear_away() {
  [ -n "$launcher" ] || return 0
  [ -n "$(said exit)" ] || kill -KILL "$(said pid)" 2>/dev/null || true
  kill -KILL -- "-$launcher" 2>/dev/null || true
  wait_for "$launcher" || true
  timeout 10 tail --pid="$relay" -f /dev/null || true
}
