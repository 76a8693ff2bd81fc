#!/usr/bin/env bash
# From a fresh clone to a trained model: install into .venv, run the main job, print accuracy before and after.
#   bash scripts/quickstart.sh                     # the built-in tiny model; any machine, no GPU, no download of weights
#   bash scripts/quickstart.sh --steps 20          # flags go to train.py
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/install.sh
RUN=quickstart-$(date +%Y%m%d-%H%M%S)
.venv/bin/python train.py --run-name "$RUN" "$@"
.venv/bin/python scripts/plot_run.py "runs/$RUN"
