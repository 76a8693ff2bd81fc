#!/usr/bin/env bash
# What is each part of DAPO worth? All of it, then without one part at a time.
#   varied   no-clip-higher: --clip-high 0.2 for 0.28. no-dynamic-sampling: groups with equal rewards stay.
#            no-overlong: --overlong-buffer 0 for a quarter of the longest response (BUFFER=512 bash ... for another).
#            no-token-mean: --loss-reduction sequence-mean. Each against all of DAPO
#   fixed    the model, the data, FP8 rollouts with TIS, all other flags. --updates-per-batch 4: with one the policy
#            ratio is 1, and no clip acts
#   cost     15 runs (5 variants, 3 seeds). --tiny: 70 s each on 2 CPU cores, 18 minutes in all; responses of at most 6
#            tokens, punished above 4: nearly none is so long, and no-overlong shows little there. A GPU: 100 steps of
#            64 x 8 samples of up to 1024 tokens each
# bash scripts/ablations/dapo_parts.sh --tiny        # the built-in model, any machine
# bash scripts/ablations/dapo_parts.sh               # Qwen2.5-0.5B-Instruct on GSM8K; other flags go to train.py
# Environment, --dry-run, resuming, results: as in tis_cap.sh.
. "$(dirname "$0")/common.sh"
TINY_SIZES+=(--updates-per-batch 4 --max-response-len 6)
REAL_SIZES+=(--updates-per-batch 4 --max-response-len 1024)
if [ "$TINY" ]; then BUFFER=${BUFFER:-2}; else BUFFER=${BUFFER:-256}; fi
DAPO="--clip-high 0.28 --dynamic-sampling --overlong-buffer $BUFFER --loss-reduction token-mean"
ablate dapo_parts \
  --variant "dapo: $DAPO" \
  --variant "no-clip-higher: $DAPO --clip-high 0.2" \
  --variant "no-dynamic-sampling: $DAPO --no-dynamic-sampling" \
  --variant "no-overlong: $DAPO --overlong-buffer 0" \
  --variant "no-token-mean: $DAPO --loss-reduction sequence-mean"
