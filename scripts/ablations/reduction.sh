#!/usr/bin/env bash
# What should count the same in the loss: a token, a response, a prompt?
#   varied   --loss-reduction: token-mean (DAPO), sequence-mean (GRPO), prompt-mean, dr-grpo (a constant); each against
#            token-mean
#   fixed    the model, the data, FP8 rollouts with TIS, all other flags; the advantage too (--advantage is another
#            variable). The learning rate is the same, and dr-grpo's gradient smaller: it divides by the longest
#            length possible. AdamW takes most of that out
#   cost     12 runs (4 reductions, 3 seeds). --tiny: 50 s each on 2 CPU cores, 10 minutes in all; its responses have 2
#            to 5 tokens, so that little can differ. A GPU: 100 steps of 64 x 8 samples of up to 1024 tokens each
# bash scripts/ablations/reduction.sh --tiny         # the built-in model, any machine
# bash scripts/ablations/reduction.sh                # Qwen2.5-0.5B-Instruct on GSM8K; other flags go to train.py
# Environment, --dry-run, resuming, results: as in tis_cap.sh.
. "$(dirname "$0")/common.sh"
ablate reduction \
  --variant "token-mean: --loss-reduction token-mean" \
  --variant "sequence-mean: --loss-reduction sequence-mean" \
  --variant "prompt-mean: --loss-reduction prompt-mean" \
  --variant "dr-grpo: --loss-reduction dr-grpo"
