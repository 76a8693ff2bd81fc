#!/usr/bin/env bash
# The DAPO run with INT8 rollouts: Qwen2.5-32B (base), DAPO-Math-17k, AIME 2024.
#
# S: NovaSky-AI/SkyRL, skyrl-train/examples/flash_rl/run_dapo_repro_flashrl_32b_int8.sh
#    at commit 27380cb7c2a509238d4e0e780723059cfbe917ab. It says that it was tested on 2 x 8 H100.
# D: the defaults of that commit, skyrl-train/skyrl_train/config/ppo_base_config.yaml.
# F: yaof20/verl, branch flash-rl, recipe/flash_rl/dapo_qwen32b_int8.sh
#    at commit f597f56a43ab265e9d2ebf4bf65e24bc708a166a, for 4 x 8 GPUs; the TIS cap is its second argument, 8 in the
#    README of yaof20/Flash-RL.
# V: volcengine/verl, recipe/dapo/run_dapo_qwen2.5_32b.sh
#    at commit 03150d4fa825bcca1ec5c0a3f582cf6449148112: the paper's run (arXiv 2503.14476) in bf16, 16 x 8 GPUs.
# Hardware: one node of 8 GPUs. By the plan, not run: the engines sleep while the policy trains; on 8 x 141 GB 133 of
# 139 GiB of a GPU are in use, 40 of them KV cache; on 8 x 80 GB it is 0.7 GiB short, and fits with --max-response-len
# 19456: master weights and moments are in host memory, 366 GiB in all, 75 of 78 GiB of a GPU in use, 27 of them KV
# cache. This script has not been run.
#
#   --model Qwen/Qwen2.5-32B            S, F, V
#   --data dapo-math                    S, F, V; copies removed as S does
#   --eval-data aime-2024               S, F, V; theirs samples 32 answers a problem or one, here it is one, greedy
#   --eval-size 30                      all of it
#   --tp 2                              own choice, and S's at its commit 08bbcca7: an engine has two GPUs' KV cache
#   --rollout-quant int8                S, F by a calibrated profile; ours has one scale a row
#   --prompts-per-step 128              S (F, V: 512)
#   --updates-per-batch 4               S, train_batch_size 128 / policy_mini_batch_size 32 (F, V: 512 / 32 = 16)
#   --samples-per-prompt 16             S, F, V
#   --max-prompt-len 2048               S, F, V
#   --max-response-len 20480            S, F, V
#   --overlong-filter                   S (F, V: not used)
#   --overlong-buffer 4096              S, F, V, with penalty factor 1
#   --dynamic-sampling                  S, F, V
#   --max-sample-rounds 30              S, max_sample_batches (F, V: 10)
#   --clip-low 0.2 --clip-high 0.28     S, F, V
#   --dual-clip 10                      S, F, clip_ratio_c
#   --tis-cap 8                         S, by token; F
#   --temperature 1                     S, F, V
#   --lr 1e-6 --weight-decay 0.1        S, F, V
#   --warmup-steps 0                    D, num_warmup_steps (F, V: 10)
#   --max-grad-norm 1                   S, F, V
#   --steps 2700                        S has 20 epochs: about 17,400 prompts / 128 = 135 steps each, if no round is
#                                       drawn again
#   --eval-every 5 --save-every 10      S
set -euo pipefail
cd "$(dirname "$0")/../.."
exec torchrun --standalone --nproc-per-node 8 train.py --tp 2 \
  --model Qwen/Qwen2.5-32B --data dapo-math --eval-data aime-2024 --eval-size 30 --rollout-quant int8 \
  --prompts-per-step 128 --updates-per-batch 4 --samples-per-prompt 16 \
  --max-prompt-len 2048 --max-response-len 20480 --overlong-filter --overlong-buffer 4096 \
  --dynamic-sampling --max-sample-rounds 30 \
  --clip-low 0.2 --clip-high 0.28 --dual-clip 10 --tis-cap 8 --temperature 1 \
  --lr 1e-6 --weight-decay 0.1 --warmup-steps 0 --max-grad-norm 1 \
  --steps 2700 --eval-every 5 --save-every 10 "$@"
