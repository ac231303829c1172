#!/usr/bin/env bash
# The whole path on a laptop: two CPU cores, no GPU, no network after the first time.
#   recipes/laptop.sh                              # SmolLM2-135M, real data, a few minutes
#   PROFILE=tiny recipes/laptop.sh                 # random weights, to see that everything works
#   recipes/laptop.sh sft.learning_rate=2e-4       # any setting can be overridden
# Run again to go on: what is finished is skipped, what was cut off is continued.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/.venv/bin:$PATH"
profile="${PROFILE:-laptop}"

# OpenMP threads that spin on a busy core collapse: 15.6 -> 2 tokens/s. Let them sleep.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-0}"

if [[ "$profile" == laptop ]]; then deepseek-cookbook fetch; fi

# data -> SFT -> evaluation -> report
deepseek-cookbook cook --profile "$profile" "$@"
