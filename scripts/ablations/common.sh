# Sourced by the ablations, which then call `ablate NAME --variant ...`: reads the command line, finds a Python with
# vLLM, runs scripts/ablation.py. TINY_SIZES may be set in between; FLAGS of the user come last and win.
set -euo pipefail
ABLATION=$(realpath "$0")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
SEEDS=${SEEDS:-0 1 2}
TINY=
DRIVER=()
FLAGS=()
for arg in "$@"; do
  case "$arg" in
    -h | --help) awk 'NR > 1 && !/^#/ { exit } NR > 1' "$ABLATION" | cut -c3-; exit 0 ;;
    --tiny) TINY=1 ;;
    --dry-run | --rerun-changed | --keep-checkpoints) DRIVER+=("$arg") ;;
    *) FLAGS+=("$arg") ;;
  esac
done
TINY_SIZES=(--steps 20 --prompts-per-step 16 --samples-per-prompt 8 --eval-every 5)
REAL_SIZES=()

ablate() {
  local name=$1 python=python common
  shift
  if [ "$TINY" ]; then
    common=("${TINY_SIZES[@]}")
    name=$name-tiny
  else
    common=(--model Qwen/Qwen2.5-0.5B-Instruct --data gsm8k "${REAL_SIZES[@]}")
  fi
  # The active environment if vLLM is in it, otherwise .venv, made if need be.
  if ! python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("vllm") is None)' 2>/dev/null; then
    bash scripts/install.sh
    python=.venv/bin/python
  fi
  # shellcheck disable=SC2086
  exec "$python" scripts/ablation.py "$name" --folder "${FOLDER:-runs/ablations/$name}" --seeds $SEEDS \
    ${DRIVER[@]+"${DRIVER[@]}"} "$@" -- "${common[@]}" ${FLAGS[@]+"${FLAGS[@]}"}
}
