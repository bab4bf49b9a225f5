#!/usr/bin/env bash
# A run by torchrun; on several nodes, start it on each:  scripts/launch_torchrun.sh RECIPE key=value …
# DRY_RUN=1 prints the command. Values of the site are in site.env, restarts and signals in launch.sh.
# shellcheck source=launch.sh
source "$(dirname "$0")/launch.sh"
prepare "$@"

nodes=(--standalone)
if has_nodes; then
  host=$((NODE_RANK == 0))
  if ((host)); then LOCAL_ADDR=${LOCAL_ADDR:-$MASTER_ADDR}; fi
  # Said and not guessed who hosts the store: names often resolve to an address that the other nodes do not reach.
  nodes=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-id "$JOB_ID")
  nodes+=(--rdzv-conf "is_host=$host")
  if [ -n "$LOCAL_ADDR" ]; then nodes+=(--local-addr "$LOCAL_ADDR"); fi
fi
keep_running torchrun "${nodes[@]}" --nproc-per-node "$PROCESSES" --max-restarts 0 -m train "$@"
