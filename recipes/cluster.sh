#!/usr/bin/env bash
# The profile cluster on one machine with several GPUs: DDP, or FSDP2 for a model that one GPU does not hold.
#   recipes/cluster.sh                             # DDP on all GPUs that nvidia-smi shows
#   GPUS=4 recipes/cluster.sh                      # on four of them
#   SHARD=1 recipes/cluster.sh                     # FSDP2: every GPU holds a part of every weight
#   recipes/cluster.sh data.source=my.jsonl        # any setting can be overridden
#   recipes/cluster.sh data.source=my.jsonl reward_model.source=pairs.jsonl   # your data and preferences, to the end
#   PROMPTS=my.jsonl REWARD=my_reward:score recipes/cluster.sh   # then PPO on prompts and a reward of your own
# Run again to go on, with the same number of GPUs: a checkpoint is continued by as many processes as wrote it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/.venv/bin:$PATH"
gpus="${GPUS:-$(nvidia-smi --list-gpus | wc -l)}"

deepseek-cookbook doctor

# Data by one process, before any GPU waits for it.
deepseek-cookbook cook --profile cluster --only data "$@"

if [[ "${SHARD:-0}" == 1 ]]; then
  accelerate launch --config_file recipes/accelerate/eight_80g_fsdp2.yaml --num_processes "$gpus" \
    -m deepseek_cookbook.cli sft --profile cluster "$@"
else
  torchrun --standalone --nproc_per_node="$gpus" -m deepseek_cookbook.cli sft --profile cluster "$@"
fi

# The reward model by one process, then PPO by all: each GPU holds the whole base.
deepseek-cookbook cook --profile cluster --only reward "$@"
torchrun --standalone --nproc_per_node="$gpus" -m deepseek_cookbook.cli ppo --profile cluster "$@"

# The rest: principles, evaluation and report. The same settings, so that the trainings above are found finished.
deepseek-cookbook cook --profile cluster "$@"

# PPO on prompts and a reward of your own, from the adapter of SFT.
if [[ -n "${PROMPTS:-}" ]]; then
  torchrun --standalone --nproc_per_node="$gpus" -m deepseek_cookbook.train_rl --profile cluster \
    --dataset_path "$PROMPTS" --reward_model "${REWARD:-rules}" --output_dir "${OUT:-runs/cluster/train_rl}" \
    --adapter "${ADAPTER:-runs/cluster/sft/adapter}" "$@"
fi
