#!/usr/bin/env bash
# A run by accelerate; on several nodes, start it on each:  scripts/launch_accelerate.sh RECIPE key=value …
# DRY_RUN=1 prints the command. Values of the site are in site.env, restarts and signals in launch.sh.
# shellcheck source=launch.sh
source "$(dirname "$0")/launch.sh"
prepare "$@"

total=$((NNODES * PROCESSES))
nodes=(--num_machines "$NNODES" --num_processes "$total")
# Said, since accelerate guesses and warns where it is not; the recipe decides on precision and compilation.
nodes+=(--mixed_precision no --dynamo_backend no --num_cpu_threads_per_process "$OMP_NUM_THREADS")
if ((total > 1)); then nodes+=(--multi_gpu); fi  # accelerate's word for several processes; without a GPU they are on the CPU
if has_nodes; then
  nodes+=(--machine_rank "$NODE_RANK" --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT")
else
  nodes+=(--main_process_port 0)
fi
keep_running accelerate launch "${nodes[@]}" -m train "$@"
