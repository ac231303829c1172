"What the tests of PPO share: a tiny policy that is peaked enough to learn, a reward that it can reach, a trainer."

import copy
from functools import lru_cache

import torch

from deepseek_cookbook.models import load_model, load_tokenizer
from deepseek_cookbook.ppo.policy import make_models
from deepseek_cookbook.ppo.rollout import RolloutConfig
from deepseek_cookbook.ppo.train import PPOConfig, PPOTrainer

NAMES = ["tiny-llama", "tiny-qwen2", "tiny-deepseek-v3"]
LORA = dict(r=8, lora_alpha=16, target_modules="all-linear", lora_dropout=0.0)
ROWS = [dict(prompt=f"Say{' so' * (i % 3)} {letter}", letter=letter) for i, letter in enumerate("abcdefgh")]
STEP = dict(batch_size=16, num_mini_batches=1, num_ppo_epochs=1, learning_rate=1e-3, save_steps=100, kl_coef=0.0)
EXACT = RolloutConfig(max_new_tokens=6, autocast="float32")


@lru_cache
def _loaded(name):
    return load_model(name, dtype="float32").eval()


def peaked(name="tiny-llama"):
    "A base of its own; random heads are nearly uniform, so their logits are spread."
    model = copy.deepcopy(_loaded(name))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(5)
    return model


def text_of(completion):
    return completion if isinstance(completion, str) else completion[-1]["content"]


def vowels(prompts, completions, **columns):
    "Share of vowels, 0 to 1."
    return [sum(c in "aeiou" for c in text_of(t)) / max(1, len(text_of(t))) for t in completions]


def shaken(models, size=0.05, seed=0):
    "Models after some training: adapters and head that are not zero."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for n, p in models.frozen.named_parameters():
            if ".policy." in n or ".value." in n:
                p.copy_(size * torch.randn(p.shape, generator=g))
        models.head.weight.copy_(size * torch.randn(models.head.weight.shape, generator=g))
    return models


def trainer(folder, steps, reward=vowels, name="tiny-llama", rows=ROWS, models=None, cost=None, rollout=EXACT, **more):
    "A trainer of so many steps; `more` goes to the settings of PPO, or to the trainer."
    own = {k: more.pop(k) for k in ("guards", "lr_factor", "engine", "seed", "log") if k in more}
    config = STEP | more
    config = PPOConfig(total_episodes=steps * config["batch_size"], **config)
    models = models or make_models(
        peaked(name),
        LORA,
        None,
        config.upper_layers,
        config.value_layers,
        config.full,
        1 if cost is None else 2,
        own.get("seed", 42),
    )
    return PPOTrainer(config, models, load_tokenizer(name), rows, reward, folder, rollout, cost, quiet=True, **own)


def logged(run, key):
    return [r[key] for r in run.log.rows if key in r]


def script(*answers):
    "An engine that says what it is told: `answers[step % n](row)` gives the tokens."
    step = iter(range(10**6))

    def engine(prompts, seed, stops):
        say = answers[next(step) % len(answers)]
        return [(say(i), [-1.0] * len(say(i))) for i in range(len(prompts))]

    return engine
