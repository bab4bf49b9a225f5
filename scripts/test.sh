#!/usr/bin/env bash
# Sets everything up and runs all checks and tests. --thorough adds what takes longer; other arguments go to pytest.
source "$(dirname "$0")/env.sh"

selection=(-m "not slow")
if [ "${1:-}" = --thorough ]; then selection=(); shift; fi

export OMP_NUM_THREADS=1  # the tests' processes share two cores
ruff check .
ruff format --check --quiet .
(mypy && lint-imports --no-logo) & checks=$!  # beside the tests, whose processes often wait for each other
python -m pytest "${selection[@]}" --durations=15 "$@" || failed=$?
wait $checks
exit "${failed:-0}"
