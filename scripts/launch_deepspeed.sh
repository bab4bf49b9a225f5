#!/usr/bin/env bash
# A run by deepspeed's launcher:  scripts/launch_deepspeed.sh RECIPE key=value …
# Several nodes are those of HOSTFILE: it starts them from one of them, by pdsh and ssh; with NO_SSH=1 start it on each.
# DRY_RUN=1 prints the command. Values of the site are in site.env, restarts and signals in launch.sh.
# shellcheck source=launch.sh
source "$(dirname "$0")/launch.sh"
prepare "$@"
if [ "$NNODES$HOSTFILE" != 1 ] && [ ! -r "$HOSTFILE" ]; then
  refuse "HOSTFILE=$HOSTFILE: must be a file of lines \"host slots=N\" where NNODES=$NNODES; write one and name it"
fi
if [ -n "$HOSTFILE" ]; then NNODES=$(grep -c '^[^#]*slots=' "$HOSTFILE" || true); fi

# Whether HOSTFILE has this node: by a name or address of its own, or by a name that resolves to one.
is_of_hostfile() {
  local name own
  own=" localhost $(hostname) $(hostname -s) $(hostname -f) $(hostname -I) 127.0.0.1 127.0.1.1 ::1 "
  while read -r name _; do
    for name in "$name" $(getent ahosts "$name" | cut -d ' ' -f 1); do
      [[ $own != *" $name "* ]] || return 0
    done
  done < <(grep '^[^#]*slots=' "$HOSTFILE")
  return 1
} 2>/dev/null

if [ -n "$HOSTFILE" ] && [ -z "$NO_SSH" ]; then
  # What the run says to this script is a file of the node it runs on.
  is_of_hostfile || refuse "HOSTFILE=$HOSTFILE: must name this node, $(hostname); start the script on one that it names, or add it"
fi

nodes=(--num_gpus "$PROCESSES")
if [ -n "$HOSTFILE" ]; then nodes=(--hostfile "$HOSTFILE" --log_level warning); fi
if [ -n "$NO_SSH" ]; then nodes+=(--no_ssh --node_rank "$NODE_RANK"); fi
if [ -n "$MASTER_ADDR" ]; then nodes+=(--master_addr "$MASTER_ADDR"); fi
keep_running deepspeed "${nodes[@]}" --master_port "$MASTER_PORT" --module train "$@"
