#!/usr/bin/env bash
# GSM8K, Qwen/Qwen2.5-1.5B-Instruct, FP8 rollouts: FlashRL's recipe in SkyRL, on every GPU of a node.
#
# S: NovaSky-AI/SkyRL, skyrl-train/examples/flash_rl/run_dapo_flashrl.sh
#    at commit 825f2e82e289d6011d80957c48132618fed3d460. It says that it was tested on 2 H100.
# D: the defaults of that commit, skyrl-train/skyrl_train/config/ppo_base_config.yaml.
# Hardware: one node of GPUs; gsm8k_qwen2.5_1.5b_fp8.sh is the same on one. Each GPU has an engine of its own and trains
# on its share of the samples. By the plan, not run: on 8 x 80 GB nothing sleeps, 73 of 78 GiB of a GPU in use. This
# script has not been run.
#
#   --model Qwen/Qwen2.5-1.5B-Instruct  S
#   --data gsm8k                        S, by its title and docs; its data lines name aime-2024.parquet, a slip
#   --tp 1                              own choice: an engine fits on a GPU
#   --rollout-quant fp8                 S, FP8, one scale a matrix
#   --prompts-per-step 1024             S, train_batch_size
#   --updates-per-batch 4               S, train_batch_size 1024 / policy_mini_batch_size 256
#   --samples-per-prompt 5              S, n_samples_per_prompt
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
#   --steps 140                         S has 20 epochs: 7473 // 1024 = 7 steps each, if no round is drawn again
#   --eval-every 5 --save-every 10      S
#   --eval-size 1319                    the whole test split, as in S
#
# Not the same: SkyRL wants "####", here \boxed{} is asked for and both count; SkyRL begins its overlong buffer where
# prompt and response together come near their limits, here the response alone counts.
set -euo pipefail
cd "$(dirname "$0")/../.."
exec torchrun --standalone --nproc-per-node gpu train.py --tp 1 \
  --model Qwen/Qwen2.5-1.5B-Instruct --data gsm8k --rollout-quant fp8 \
  --prompts-per-step 1024 --updates-per-batch 4 --samples-per-prompt 5 \
  --max-prompt-len 512 --max-response-len 1024 --overlong-filter --overlong-buffer 512 \
  --dynamic-sampling --max-sample-rounds 30 \
  --clip-low 0.2 --clip-high 0.28 --dual-clip 10 --tis-cap 2 --temperature 1 \
  --lr 1e-6 --weight-decay 0.1 --warmup-steps 0 --max-grad-norm 1 \
  --steps 140 --eval-every 5 --save-every 10 --eval-size 1319 "$@"
