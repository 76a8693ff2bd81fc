#!/usr/bin/env bash
# Which correction of the gap between sampler and trainer is best? What each one does is in corrections.py.
#   varied   --correction: none, token-tis, sequence-tis, token-is, token-mask, sequence-mask, geometric-mask, ppo-is;
#            each against none. The two with a cap have --tis-cap 2 (TIS_CAP=4 bash ... for another one), the masks
#            their usual bands
#   fixed    the model, the data, FP8 rollouts, all other flags. With one update per batch (the default) the policy is
#            pi_old, so only in ppo-is does PPO's clip act: on the gap itself
#   cost     24 runs (8 corrections, 3 seeds). --tiny: 50 s each on 2 CPU cores, 20 minutes in all. A GPU: 100 steps of
#            64 x 8 samples of up to 1024 tokens each
# bash scripts/ablations/correction.sh --tiny        # the built-in model, any machine
# bash scripts/ablations/correction.sh               # Qwen2.5-0.5B-Instruct on GSM8K; other flags go to train.py
# Environment, --dry-run, resuming, results: as in tis_cap.sh.
. "$(dirname "$0")/common.sh"
ablate correction \
  --variant "none: --correction none" \
  --variant "token-tis: --correction token-tis --tis-cap ${TIS_CAP:-2}" \
  --variant "sequence-tis: --correction sequence-tis --tis-cap ${TIS_CAP:-2}" \
  --variant "token-is: --correction token-is" \
  --variant "token-mask: --correction token-mask" \
  --variant "sequence-mask: --correction sequence-mask" \
  --variant "geometric-mask: --correction geometric-mask" \
  --variant "ppo-is: --correction ppo-is"
