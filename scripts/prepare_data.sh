#!/usr/bin/env bash
# Text to a checked token store with a report page:  scripts/prepare_data.sh [RECIPE] [STORE]
# Continues where it was interrupted. On a Slurm cluster the tasks of an array share the work; every task starts the same line:
#   sbatch --array=0-15 --cpus-per-task=8 scripts/prepare_data.sh RECIPE STORE
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"  # Slurm runs a copy of this file from elsewhere
source scripts/env.sh

recipe=${1:-default}
store=${2:-stores/default}
task=${SLURM_ARRAY_TASK_ID:-0}
tasks=${SLURM_ARRAY_TASK_COUNT:-1}
workers=${SLURM_CPUS_PER_TASK:-$(nproc)}

rorqual data prepare "$recipe" --out "$store" --workers "$workers" --task $((task - ${SLURM_ARRAY_TASK_MIN:-0})) --tasks "$tasks"
if [ "$task" = "${SLURM_ARRAY_TASK_MIN:-0}" ]; then
  rorqual data verify "$store"
  rorqual data stats "$store" --html "$store-report.html"
fi
