"""Training from a function, a reward model or both; runs that are cut off; which checkpoint a run ends with."""

import shutil

import pytest
import torch
from deepseek_cookbook.ppo.checkpoints import (
    CheckpointError,
    best_step,
    checkpoint_folder,
    checkpoints,
    forget,
    load_checkpoint,
    save_checkpoint,
)
from deepseek_cookbook.ppo.task import TaskConfig, task_rows, train_ppo
from deepseek_cookbook.ppo.train import PPOError
from deepseek_cookbook.settings import load_settings, read_jsonl, write_json
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

ROWS = [dict(prompt=[dict(role="user", content=q)]) for q in ("a", "bb", "ccc", "d e")]
SMALL = ["ppo.total_episodes=32", "ppo.save_steps=1", "ppo.save_total_limit=9", "rollout.max_new_tokens=6"]


def letters(prompts, completions, **columns) -> list[float]:
    "Pays for the letter e."
    return [float(c[0]["content"].count("e")) for c in completions]


def weights(folder, step) -> dict:
    return load_file(checkpoint_folder(folder, step) / "weights.safetensors")


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["ppo.kl_target=0.5", "ppo.kl_horizon=32", "ppo.replay=0.5", "ppo.lr_scheduler_type=linear"],
        ["ppo.lr_scheduler_type=cosine", "ppo.warmup_steps=2", "ppo.upper_layers=1"],
        ["ppo.full=true", "model.dtype=float32"],
    ],
)
def test_an_interrupted_run_equals_a_straight_one(tmp_path, more):
    toy = load_settings("tiny", SMALL + more)
    train_ppo(toy, ROWS, letters, tmp_path / "straight", quiet=True)
    shutil.copytree(tmp_path / "straight", tmp_path / "cut")
    for step in (3, 4):
        shutil.rmtree(checkpoint_folder(tmp_path / "cut", step))
    figures = train_ppo(toy, ROWS, letters, tmp_path / "cut", quiet=True)[1]
    assert figures["resumed_from"] == 2
    assert equal(weights(tmp_path / "straight", 4), weights(tmp_path / "cut", 4))
    assert not equal(weights(tmp_path / "straight", 4), weights(tmp_path / "straight", 2))
    same = ("reward", "kl", "kl_coef", "learning_rate", "replayed", "num_tokens")
    logs = [
        [[r[k] for k in same] for r in read_jsonl(tmp_path / side / "metrics.jsonl") if "reward" in r]
        for side in ("straight", "cut")
    ]
    assert logs[0] == logs[1] and len(logs[0]) == 4


def test_a_replay_buffer_is_filled_and_drawn_from(tmp_path):
    train_ppo(load_settings("tiny", [*SMALL, "ppo.replay=0.5"]), ROWS, letters, tmp_path, quiet=True)
    replayed = [r["replayed"] for r in read_jsonl(tmp_path / "metrics.jsonl") if "reward" in r]
    assert replayed == [0, 4, 4, 4]
    assert len(checkpoints(tmp_path)[4]["replay"][0]["rows"]) == 32
