#!/usr/bin/env bash
# Does the cap C of truncated importance sampling matter? Weights min(pi_old / mu, C) on every token.
#   varied   --tis-cap: None (no weights), 1, 2, 4, 8, inf (never cut); each against None
#   fixed    the model, the data, FP8 rollouts, all other flags
#   cost     18 runs (6 caps, 3 seeds). --tiny: 50 s each on 2 CPU cores, 15 minutes in all. A GPU: 100 steps of 64 x 8
#            samples of up to 1024 tokens each
# bash scripts/ablations/tis_cap.sh --tiny           # the built-in model, any machine
# bash scripts/ablations/tis_cap.sh                  # Qwen2.5-0.5B-Instruct on GSM8K; other flags go to train.py
# SEEDS="0 1 2 3 4" FOLDER=runs/ablations/mine bash scripts/ablations/tis_cap.sh --model Qwen/Qwen2.5-1.5B-Instruct
# --dry-run shows what would be run; the same command goes on where it was ended; table.md, curves.png in FOLDER.
. "$(dirname "$0")/common.sh"
ablate tis_cap \
  --variant "none: --tis-cap None" \
  --variant "cap-1: --tis-cap 1" \
  --variant "cap-2: --tis-cap 2" \
  --variant "cap-4: --tis-cap 4" \
  --variant "cap-8: --tis-cap 8" \
  --variant "cap-inf: --tis-cap inf"
