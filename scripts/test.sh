#!/usr/bin/env bash
# Sets everything up and runs all checks and tests. --thorough adds what takes longer; other arguments go to pytest.
source "$(dirname "$0")/env.sh"

tests=(python -m pytest --durations=15)
if [ "${1:-}" = --thorough ]; then shift; else tests+=(-m "not slow"); fi

export OMP_NUM_THREADS=1  # the tests' processes share two cores
ruff check .
ruff format --check --quiet .
(mypy && lint-imports --no-logo) & checks=$!  # beside the tests, whose processes often wait for each other
if [ $# -gt 0 ]; then
    "${tests[@]}" "$@" || failed=$?
else  # two halves, beside each other for the same reason
    said=$(mktemp)
    "${tests[@]}" -o testpaths=tests/train >"$said" 2>&1 & half=$!
    "${tests[@]}" --ignore=tests/train || failed=$?
    wait $half || failed=$?
    cat "$said"
    rm "$said"
fi
wait $checks
exit "${failed:-0}"
