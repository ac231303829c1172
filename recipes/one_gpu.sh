#!/usr/bin/env bash
# deepseek-llm-7b-base with LoRA on one GPU: 4-bit weights below 40 GB of memory, bf16 from there on.
#   recipes/one_gpu.sh                             # the profile gpu
#   recipes/one_gpu.sh data.source=my.jsonl        # any setting can be overridden
#   MEMORY_MIB=24000 recipes/one_gpu.sh            # plan for less memory than the card has
#   recipes/one_gpu.sh data.source=my.jsonl reward_model.source=pairs.jsonl   # your data and preferences, to the end
#   PROMPTS=my.jsonl REWARD=my_reward:score recipes/one_gpu.sh   # then PPO on prompts and a reward of your own
# Run again to go on: what is finished is skipped, what was cut off is continued.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/.venv/bin:$PATH"

memory="${MEMORY_MIB:-$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits | head -n 1)}"
if (( memory < 40000 )); then
  config=one_24g_nf4
  settings=(model.quantization=nf4 sft.per_device_train_batch_size=2 sft.gradient_accumulation_steps=8)
else
  config=one_80g
  settings=()
fi
settings+=("$@")

deepseek-cookbook doctor
deepseek-cookbook cook --profile gpu --only data "${settings[@]}"
accelerate launch --config_file "recipes/accelerate/$config.yaml" \
  -m deepseek_cookbook.cli sft --profile gpu "${settings[@]}"

# The rest: reward model, PPO, principles, evaluation and report. The same settings, so that the training above is found finished.
deepseek-cookbook cook --profile gpu "${settings[@]}"

# PPO on prompts and a reward of your own, from the adapter of SFT.
if [[ -n "${PROMPTS:-}" ]]; then
  python -m deepseek_cookbook.train_rl --profile gpu \
    --dataset_path "$PROMPTS" --reward_model "${REWARD:-rules}" --output_dir "${OUT:-runs/gpu/train_rl}" \
    --adapter "${ADAPTER:-runs/gpu/sft/adapter}" "${settings[@]}"
fi
