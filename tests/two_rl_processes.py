"""Started by torchrun from test_train_rl.py: rewards to name on the command line, and PPO on known completions.

    torchrun --standalone --nproc_per_node=2 tests/two_rl_processes.py FOLDER
"""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch

from deepseek_cookbook import cli
from deepseek_cookbook.models import load_model, load_tokenizer
from deepseek_cookbook.ppo.policy import make_models
from deepseek_cookbook.ppo.train import PPOConfig, PPOTrainer
from deepseek_cookbook.settings import load_settings, read_jsonl
from deepseek_cookbook.sft.distributed import join, leave, rank
from deepseek_cookbook.train_rl import make_parser, train_rl

ROWS = [dict(prompt=[dict(role="user", content=f"Tell me about number {i}" + "!" * (i % 5))]) for i in range(16)]
ARGUMENTS = ["--profile", "tiny", "--total_episodes", "48", "--save_steps", "2", "--quiet", "ppo.replay=0.25",
             "ppo.kl_target=0.5", "rollout.max_new_tokens=6"]
OWN = {"seconds_generate", "seconds_reward", "seconds_look_back", "seconds_update", "samples_per_second", "memory_gib",
       "time"}
calls = 0


def letters(prompts, completions, **columns):
    "The share of e, over all letters."
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [t.count("e") / max(1, len(t)) for t in texts]


def deadly(prompts, completions, **columns):
    "The same; the process KILL_RANK is killed in the step KILL_STEP."
    global calls
    calls += 1
    if (str(rank()), str(calls - 1)) == (os.environ.get("KILL_RANK"), os.environ.get("KILL_STEP")):
        os.kill(os.getpid(), signal.SIGKILL)
    return letters(prompts, completions)


def faulty(prompts, completions, **columns):
    "Process 1 has no score in its second step."
    global calls
    calls += 1
    if rank() == 1 and calls > 1:
        raise ZeroDivisionError("nothing to divide by")
    return letters(prompts, completions)


def words(folder, reward="letters"):
    "A command line."
    paths = ["--dataset_path", Path(folder).parent / "prompts.jsonl", "--output_dir", folder]
    return [str(w) for w in [*paths, "--reward_model", f"two_rl_processes:{reward}", *ARGUMENTS]]


def known(prompts, seed, stops):
    "An engine whose answer depends on the prompt alone, whoever asks."
    def answer(ids):
        rng = np.random.default_rng(ids)
        n = int(rng.integers(2, 9))
        return [int(i) for i in rng.integers(20, 200, n)], [0.0] * n
    return [answer(ids) for ids in prompts]


def on_known(folder):
    "Three steps on known completions: the first update's gradients, weights at the end, metrics."
    settings = load_settings("tiny", ["rollout.autocast=float32"])
    models = make_models(load_model("tiny-llama"), settings["lora"])
    config = PPOConfig(total_episodes=24, batch_size=8, num_mini_batches=1, num_ppo_epochs=2, learning_rate=1e-2,
                       per_device_train_batch_size=3, max_grad_norm=1e6, whiten_rewards=True, missing_eos_penalty=0.5)
    trainer = PPOTrainer(config, models, load_tokenizer("tiny-llama"), ROWS, letters, folder,
                         settings.build("rollout"), engine=known, quiet=True)
    found, clip = [], trainer.clip

    def kept(group):
        norm = clip(group)
        found.append(torch.cat([p.grad.flatten() for p in group]))
        return norm

    trainer.clip = kept
    trainer.train()
    weights = torch.cat([p.detach().flatten() for p in trainer.trained.values()])
    return dict(policy=found[0], value=found[1], weights=weights)


def metrics(folder):
    "What a run logged, but for times and memory."
    return [{k: v for k, v in r.items() if k not in OWN} for r in read_jsonl(Path(folder) / "metrics.jsonl")]


if __name__ == "__main__":
    home = Path(sys.argv[1])
    join()
    torch.save(on_known(home / "known"), home / f"known-{rank()}.pt")
    phase = load_settings("tiny", [f"run.folder={home}", "ppo.total_episodes=16", "task.heldout=4"])
    told = []
    done = [cli.phase_together("ppo", phase, tell=told.append) for _ in range(2)]  # finished the second time
    (home / f"phase-{rank()}.json").write_text(json.dumps(dict(done=done, told=told)))
    for name, reward in (("straight", "letters"), ("killed", "deadly")):  # the last one ends here
        train_rl(make_parser().parse_intermixed_args(words(home / name, reward)), tell=lambda line: None)
    leave()
