#!/usr/bin/env bash
# Make .venv and install what this machine needs: requirements.txt with a GPU, requirements-cpu.txt without.
# Idempotent: does nothing when the environment already matches the requirement files; mends one that was interrupted.
#   ROLLOUT8_DEVICE=cpu|gpu overrides the choice; PYTHON names the interpreter (3.11 to 3.13).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
DEVICE=${ROLLOUT8_DEVICE:-}
if [ -z "$DEVICE" ]; then
  if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then DEVICE=gpu; else DEVICE=cpu; fi
fi
case "$DEVICE" in
  gpu) REQUIREMENTS=requirements.txt ;;
  cpu) REQUIREMENTS=requirements-cpu.txt ;;
  *) echo "error: ROLLOUT8_DEVICE is '$DEVICE'; use cpu or gpu" >&2; exit 2 ;;
esac

STAMP=.venv/.installed
WANTED="$DEVICE $(cat "$REQUIREMENTS" requirements-dev.txt scripts/install.sh | sha256sum | cut -d' ' -f1)"
if [ -x .venv/bin/python ] && [ "$(cat "$STAMP" 2>/dev/null)" = "$WANTED" ]; then
  exit 0
fi

if [ "$(uname -s)" != Linux ]; then
  echo "error: vLLM needs Linux, this is $(uname -s)" >&2
  exit 2
fi
if ! "$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
  echo "error: $PYTHON is not Python 3.11, 3.12 or 3.13; set PYTHON to one" >&2
  exit 2
fi
if [ "$DEVICE" = cpu ] && [ "$(uname -m)" != x86_64 ]; then
  echo "note: the CPU build was tested on x86-64 only, this is $(uname -m)" >&2
fi
echo "installing for $DEVICE into .venv (first time: a few minutes)"
rm -f "$STAMP"
# A new environment if there is none, if an interrupted one lacks pip, or if the other device's vLLM is in it: both
# builds own the same package folder.
if ! .venv/bin/python -m pip --version >/dev/null 2>&1 || [ "$(cat .venv/.device 2>/dev/null)" != "$DEVICE" ]; then
  "$PYTHON" -m venv --clear .venv || {
    echo "error: $PYTHON cannot make a virtual environment (on Debian and Ubuntu: apt install python3-venv)" >&2
    exit 2
  }
  echo "$DEVICE" >.venv/.device
fi
PIP=(.venv/bin/python -m pip install --quiet --disable-pip-version-check)
if [ "$DEVICE" = gpu ]; then
  "${PIP[@]}" -r requirements.txt
else
  TORCH=2.13.0
  # A package source that already offers the CPU build gives it as it is; elsewhere it is on PyTorch's own index.
  # What must not come is the default build with gigabytes of CUDA: so the local version is asked for by name.
  "${PIP[@]}" "torch==$TORCH+cpu" --no-deps 2>/dev/null ||
    "${PIP[@]}" "torch==$TORCH+cpu" --no-deps --index-url https://download.pytorch.org/whl/cpu
  "${PIP[@]}" --no-deps -r requirements-cpu.txt
  .venv/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec 2>/dev/null  # were they put there by hand
fi
"${PIP[@]}" --no-deps -r requirements-dev.txt
echo "$WANTED" >"$STAMP"
