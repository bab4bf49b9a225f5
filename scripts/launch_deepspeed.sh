#!/usr/bin/env bash
# A run by deepspeed's launcher:  scripts/launch_deepspeed.sh RECIPE key=value …
# Several nodes are those of HOSTFILE: it starts them from one, by pdsh and ssh; with NO_SSH=1 start it on each.
# DRY_RUN=1 prints the command. Values of the site are in site.env, restarts and signals in launch.sh.
# shellcheck source=launch.sh
source "$(dirname "$0")/launch.sh"
prepare "$@"
if [ "$NNODES" != 1 ] && [ ! -r "$HOSTFILE" ]; then
  refuse "HOSTFILE=$HOSTFILE: must be a file of lines \"host slots=N\" where NNODES=$NNODES; write one and name it"
fi

nodes=(--num_gpus "$PROCESSES")
if [ -n "$HOSTFILE" ]; then nodes=(--hostfile "$HOSTFILE" --log_level warning); fi
if [ -n "$NO_SSH" ]; then nodes+=(--no_ssh --node_rank "$NODE_RANK"); fi
if [ -n "$MASTER_ADDR" ]; then nodes+=(--master_addr "$MASTER_ADDR"); fi
keep_running deepspeed "${nodes[@]}" --master_port "$MASTER_PORT" --module train "$@"
