#!/usr/bin/env bash
# What does the sampler's format cost, and what does importance sampling (TIS, cap 2) give back?
#   varied   --rollout-quant: none (bf16), fp8, fp8-channel, fp8-block, int8; each without and with --tis-cap 2.
#            A format without TIS is compared with bf16 without TIS, a format with TIS with the same one without
#   fixed    the model, the data, all other flags. Held-out answers come from the sampler too, so a format's own loss
#            of accuracy is in them
#   cost     30 runs (10 variants, 3 seeds). --tiny: 50 s each on 2 CPU cores, 25 minutes in all; the built-in model has
#            all five formats. A GPU: 100 steps of 64 x 8 samples of up to 1024 tokens each; a format that the GPU or
#            the model cannot have is shown as failed
# bash scripts/ablations/quant_format.sh --tiny      # the built-in model, any machine
# bash scripts/ablations/quant_format.sh             # Qwen2.5-0.5B-Instruct on GSM8K; other flags go to train.py
# Environment, --dry-run, resuming, results: as in tis_cap.sh.
. "$(dirname "$0")/common.sh"
VARIANTS=(--variant "none: --rollout-quant none --tis-cap None")
for format in fp8 fp8-channel fp8-block int8; do
  VARIANTS+=(--variant "$format: --rollout-quant $format --tis-cap None")
done
for format in none fp8 fp8-channel fp8-block int8; do
  VARIANTS+=(--variant "$format+tis vs $format: --rollout-quant $format --tis-cap 2")
done
ablate quant_format "${VARIANTS[@]}"
