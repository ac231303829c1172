"""Each switch of the PPO trainer alone, at equal sampled tokens, several seeds, on a toy that learns in seconds.

    .venv/bin/python scripts/bench/ppo_ablation.py              (three seeds, about 3 minutes on one core)

The policy is tiny-llama with random weights and an output layer made five times louder, so that it has opinions; all
its weights are trained. The reward of an answer is its share of vowels plus its share of the letter e; the cost is its
share of e. So the reward has a short cut (only e), and the constraint closes it.
"""

import argparse
import json
import tempfile
import time

import numpy as np

from deepseek_cookbook.models import load_model, load_tokenizer
from deepseek_cookbook.ppo.config import PPOConfig
from deepseek_cookbook.ppo.policy import make_models
from deepseek_cookbook.ppo.rollout import RolloutConfig
from deepseek_cookbook.ppo.train import PPOTrainer

COMMON = dict(batch_size=32, learning_rate=2e-3, num_ppo_epochs=2, full=True, per_device_train_batch_size=32,
              kl_coef=0.15, save_steps=1000)
VARIANTS = {
    "plain": {},
    "+ adaptive KL": dict(kl_target=5.0, kl_horizon=32),
    "+ adaptive KL, slow": dict(kl_target=5.0, kl_horizon=320),
    "+ replay": dict(replay=0.5),
    "+ constraint": dict(cost_limit=0.1, cost_lr=0.3),
    "entropy_coef 0.01": dict(entropy_coef=0.01),
    "entropy_coef 0.1": dict(entropy_coef=0.1),
    "max_grad_norm 0.5": dict(max_grad_norm=0.5),
    "max_grad_norm 100": dict(max_grad_norm=100.0),
    "5 epochs": dict(num_ppo_epochs=5),
    "all three": dict(kl_target=5.0, kl_horizon=32, replay=0.5, cost_limit=0.1, cost_lr=0.3),
}
ROWS = [{"prompt": f"say {word}"} for word in "one two three four five six".split()]
LORA = dict(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
NAMES = ("reward", "kl_per_completion", "cost", "entropy", "distinct")


def share(completions, letters) -> list[float]:
    return [sum(ch in letters for ch in text.lower()) / max(1, len(text)) for text in completions]


def reward(prompts, completions, **columns) -> list[float]:
    return [a + b for a, b in zip(share(completions, "aeiou"), share(completions, "e"), strict=True)]


def cost(prompts, completions, **columns) -> list[float]:
    return share(completions, "e")


def run(seed: int, steps: int, **switches) -> dict:
    "Means over the last quarter of a run; without a constraint the cost is only measured."
    base, tokenizer = load_model("tiny-llama"), load_tokenizer("tiny-llama")
    base.get_output_embeddings().weight.data *= 5
    limited = "cost_limit" in switches
    config = PPOConfig(total_episodes=COMMON["batch_size"] * steps, **COMMON | switches)
    models = make_models(base, LORA, full=True, values=2 if limited else 1, seed=seed)
    seen = []

    def watched(prompts, completions, **columns):
        seen.append(float(np.mean(share(completions, "e"))))
        return reward(prompts, completions)

    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        trainer = PPOTrainer(config, models, tokenizer, ROWS, watched, folder, RolloutConfig(max_new_tokens=8),
                             cost=cost if limited else None, seed=seed, quiet=True)
        figures = trainer.train()
        last = [r for r in trainer.log.rows if "objective" in r][-max(1, steps // 4):]
    means = {name: float(np.mean([r[name] for r in last])) for name in NAMES if name != "cost"}
    return means | dict(cost=float(np.mean(seen[-len(last):])), tokens=figures["completion_tokens"],
                        cpu_seconds=time.process_time() - began)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--json", help="write the runs here")
    args = parser.parse_args()
    found = {name: [run(seed, args.steps, **switches) for seed in args.seeds] for name, switches in VARIANTS.items()}
    columns = (*NAMES, "tokens", "cpu_seconds")
    print("| variant |", " | ".join(columns), "|\n|---|" + "---|" * len(columns))
    for name, runs in found.items():
        cells = [" ".join(f"{r[c]:.0f}" if r[c] > 100 else f"{r[c]:.2f}" for r in runs) for c in columns]
        print("|", name, "|", " | ".join(cells), "|", flush=True)
    if args.json:
        with open(args.json, "w") as f:
            json.dump(found, f, indent=1)


if __name__ == "__main__":
    main()
