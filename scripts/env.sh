# Sourced by the other scripts: makes and enters .venv with everything the project needs. A second call takes a second.
# The build of torch follows the machine: with an NVIDIA GPU the default (CUDA) wheel, without one the CPU wheel.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-}
for candidate in $python python3.13 python3.12 python3.11 python3; do
  if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$candidate; break; fi
  python=
done
if [ -z "$python" ]; then
  echo "rorqual: Python 3.11 or newer is needed and was not found; install it, or name it: PYTHON=/path/to/python $0" >&2
  exit 2
fi

stamp=.venv/.installed
wanted=$(cat pyproject.toml constraints.txt | sha256sum)
if [ "$(cat $stamp 2>/dev/null)" != "$wanted" ]; then
  started=$SECONDS
  echo "setting up .venv ($("$python" --version))"
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  pip=(.venv/bin/python -m pip --disable-pip-version-check --quiet --retries 1)
  if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    "${pip[@]}" install -c constraints.txt torch
  else
    "${pip[@]}" install -c constraints.txt torch --extra-index-url https://download.pytorch.org/whl/cpu 2> >(grep -v WARNING >&2)
  fi
  "${pip[@]}" install -c constraints.txt -e '.[dev]' 2> >(grep -v WARNING >&2)
  echo "$wanted" >$stamp
  echo "ready after $((SECONDS - started)) s"
fi
source .venv/bin/activate
