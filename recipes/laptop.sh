#!/usr/bin/env bash
# The whole path on a laptop: two CPU cores, no GPU, no network after the first time.
#   recipes/laptop.sh                              # SmolLM2-135M, real data, a few minutes
#   PROFILE=tiny recipes/laptop.sh                 # random weights, to see that everything works
#   recipes/laptop.sh sft.learning_rate=2e-4       # any setting can be overridden
#   recipes/laptop.sh data.source=my.jsonl reward_model.source=pairs.jsonl   # your data and preferences, to the end
#   PROMPTS=my.jsonl REWARD=my_reward:score recipes/laptop.sh    # then PPO on prompts and a reward of your own
# Run again to go on: what is finished is skipped, what was cut off is continued.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/.venv/bin:$PATH"
profile="${PROFILE:-laptop}"

if [[ "$profile" == laptop ]]; then deepseek-cookbook fetch; fi

# data -> SFT -> reward -> PPO -> principles -> evaluation -> report
deepseek-cookbook cook --profile "$profile" "$@"

# PPO on prompts and a reward of your own, from the adapter of SFT.
if [[ -n "${PROMPTS:-}" ]]; then
  python -m deepseek_cookbook.train_rl --profile "$profile" \
    --dataset_path "$PROMPTS" --reward_model "${REWARD:-rules}" --output_dir "${OUT:-runs/$profile/train_rl}" \
    --adapter "${ADAPTER:-runs/$profile/sft/adapter}" "$@"
fi
