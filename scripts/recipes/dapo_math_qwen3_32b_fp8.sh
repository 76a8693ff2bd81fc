#!/usr/bin/env bash
# DAPO-Math, Qwen3-32B, FP8 rollouts: the sizes of FlashRL's recipe in SkyRL.
#
# S: NovaSky-AI/SkyRL, skyrl-train/examples/flash_rl/run_dapo_flashrl_32b.sh
#    at commit 825f2e82e289d6011d80957c48132618fed3d460. It trains on GSM8K, and says that it was tested on
#    2 x 8 H100.
# D: the defaults of that commit, skyrl-train/skyrl_train/config/ppo_base_config.yaml.
# Hardware: one node of 8 GPUs (for one GPU there is dapo_math_qwen3_32b_lora_fp8.sh). By the plan, not run: on 8 x 141
# GB nothing sleeps, 128 of 139 GiB of a GPU in use; on 8 x 80 GB the engines sleep while the policy trains, and master
# weights and moments are in host memory, 366 GiB in all, 70 of 78 GiB of a GPU in use. This script has not been run.
#
#   --model Qwen/Qwen3-32B              S
#   --data dapo-math                    own choice (S: GSM8K)
#   --eval-data aime-2024               own choice
#   --eval-size 30                      own choice: all of AIME 2024
#   --chat-template-kwargs              own choice: with thinking most answers would be cut at 1024 tokens
#   --rollout-quant fp8                 S, FP8, one scale a matrix
#   --tp 2                              own choice: with 1 the engines would sleep on 8 x 141 GB too
#   --prompts-per-step 16               S, train_batch_size
#   --updates-per-batch 1               S, train_batch_size 16 / policy_mini_batch_size 16
#   --samples-per-prompt 4              S, n_samples_per_prompt
#   --max-prompt-len 512                S
#   --max-response-len 1024             S
#   --overlong-filter                   S, apply_overlong_filtering
#   --overlong-buffer 512               S, with penalty factor 1
#   --dynamic-sampling                  S
#   --max-sample-rounds 30              S, max_sample_batches
#   --clip-low 0.2 --clip-high 0.28     S
#   --dual-clip 10                      S, clip_ratio_c
#   --tis-cap 2                         S, by token
#   --temperature 1                     S
#   --lr 1e-6 --weight-decay 0.1        S
#   --warmup-steps 0                    D, num_warmup_steps
#   --max-grad-norm 1                   S
#   --steps 1000                        own choice: about one epoch (S: 20 epochs of GSM8K)
#   --eval-every 5 --save-every 10      S
set -euo pipefail
cd "$(dirname "$0")/../.."
exec torchrun --standalone --nproc-per-node 8 train.py --tp 2 \
  --model Qwen/Qwen3-32B --data dapo-math --eval-data aime-2024 --eval-size 30 --rollout-quant fp8 \
  --chat-template-kwargs '{"enable_thinking": false}' \
  --prompts-per-step 16 --updates-per-batch 1 --samples-per-prompt 4 \
  --max-prompt-len 512 --max-response-len 1024 --overlong-filter --overlong-buffer 512 \
  --dynamic-sampling --max-sample-rounds 30 \
  --clip-low 0.2 --clip-high 0.28 --dual-clip 10 --tis-cap 2 --temperature 1 \
  --lr 1e-6 --weight-decay 0.1 --warmup-steps 0 --max-grad-norm 1 \
  --steps 1000 --eval-every 5 --save-every 10 "$@"
