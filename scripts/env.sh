# shellcheck shell=bash
# Sourced by the other scripts: makes and enters .venv with everything the project needs. A second call takes a second.
# The build of torch follows the machine: with an NVIDIA GPU the default (CUDA) wheel, without one the CPU wheel.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fits() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
for python in ${PYTHON:-python3 python3.11 python3.12 python3.13}; do
  if fits "$python"; then break; fi
  python=
done
if [ -z "$python" ]; then
  echo "rorqual: ${PYTHON:-python3} is not Python 3.11 or newer; install one, or name it: PYTHON=/path/to/python $0" >&2
  exit 2
fi

build=cpu
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then build=cuda; fi

stamp=.venv/.installed
wanted="$build $(cat pyproject.toml constraints.txt | sha256sum)"
exec 9<pyproject.toml  # one at a time, where several tasks of a cluster start together
if command -v flock >/dev/null; then flock 9; fi
if [ "$(cat $stamp 2>/dev/null)" != "$wanted" ]; then
  started=$SECONDS
  echo "setting up .venv ($("$python" --version), $build)"
  if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    rm -rf .venv
    "$python" -m venv .venv || { echo "rorqual: $python cannot make a virtual environment; on Debian install python3-venv" >&2; exit 2; }
  fi
  install() { PYTHONWARNINGS=ignore .venv/bin/python -m pip --disable-pip-version-check --quiet --retries 1 install -c constraints.txt "$@" 2> >(grep -v WARNING >&2); }
  if [ $build = cpu ]; then
    install torch --extra-index-url https://download.pytorch.org/whl/cpu
  else
    install torch
  fi
  install -e '.[dev]'
  if [ $build = cpu ]; then install --no-deps triton; fi  # its interpreter tests the kernels
  echo "$wanted" >$stamp
  echo "ready after $((SECONDS - started)) s"
fi
exec 9<&-
# shellcheck source=/dev/null
source .venv/bin/activate
