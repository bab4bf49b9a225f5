#!/usr/bin/env bash
# Text to a checked token store with a report page:  scripts/prepare_data.sh [RECIPE] [STORE]
# Continues where it was interrupted. Relative paths, also those in the recipe, begin where the script is called.
# On a Slurm cluster the tasks of an array share the work, whichever of them run; submit it from the repository:
#   sbatch --array=0-15 --cpus-per-task=8 scripts/prepare_data.sh RECIPE STORE
set -euo pipefail
here=$PWD
environment=$(dirname "$0")/env.sh
if [ ! -e "$environment" ]; then environment=${SLURM_SUBMIT_DIR:-$here}/scripts/env.sh; fi  # Slurm runs a copy of this file
if [ ! -e "$environment" ]; then
  echo "rorqual: $environment is missing; submit scripts/prepare_data.sh from the repository" >&2
  exit 2
fi
# shellcheck source=env.sh
source "$environment"
cd "$here"

recipe=${1:-default}
store=${2:-stores/default}
store=${store%/}
page=$store-report.html
workers=${SLURM_CPUS_PER_TASK:-$(nproc)}
task=${SLURM_ARRAY_TASK_ID:-0}
tasks=$((${SLURM_ARRAY_TASK_MAX:-0} + 1))  # those between that do not run leave their work to the others

rorqual data prepare "$recipe" --out "$store" --workers "$workers" --task "$task" --tasks "$tasks"

exec 8<"$store/manifest.json"  # one task checks the store; the others find its page
if command -v flock >/dev/null; then flock 8 || true; fi
if [ ! "$page" -nt "$store/manifest.json" ]; then
  rorqual data verify "$store"
  rorqual data stats "$store" --html "$page"
fi
