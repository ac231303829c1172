"""Training from a function, a reward model or both; runs that are cut off; which checkpoint a run ends with."""

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from deepseek_cookbook.guards import Action, Guard
from deepseek_cookbook.models import load_model, load_tokenizer
from deepseek_cookbook.ppo import task
from deepseek_cookbook.ppo.checkpoints import (
    CheckpointError,
    best_step,
    checkpoint_folder,
    checkpoints,
    forget,
    load_checkpoint,
    save_checkpoint,
)
from deepseek_cookbook.ppo.policy import make_models, save_policy
from deepseek_cookbook.ppo.task import (
    TaskConfig,
    before_and_after,
    check_reward,
    make_reward,
    ppo_phase,
    task_rows,
    train_ppo,
)
from deepseek_cookbook.ppo.train import PPOError
from deepseek_cookbook.reward.gate import GateConfig, GateError, gate, save_gate
from deepseek_cookbook.reward.model import load_reward, train_reward
from deepseek_cookbook.reward.pairs import bank_pairs, gold_reward
from deepseek_cookbook.settings import RunFolder, load_settings, read_jsonl, write_json

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


def test_a_stopped_run_goes_back_to_the_best_sound_checkpoint_and_stays_stopped(tmp_path, monkeypatch):
    """The best by objective is a sick one, the newest are sick or late: the sound one stays all the same.

    The guard looks at the number of the step and the reward rises with it, so that no trajectory decides.
    """
    late = Guard("late", "reward", lambda s: s.steps > 5, Action.STOP, patience=2)
    monkeypatch.setattr(task, "make_guards", lambda config: [late])
    more = ["ppo.total_episodes=80", "ppo.save_steps=2", "ppo.save_total_limit=2", "ppo.kl_coef=0"]
    calls = []

    def rising(prompts, completions, **columns):
        calls.append(1)
        return [len(calls) + x / 10 for x in letters(prompts, completions)]

    sick = load_settings("tiny", more)
    figures = train_ppo(sick, ROWS, rising, tmp_path, quiet=True)[1]
    found = checkpoints(tmp_path)
    assert figures["stopped"] == dict(guard="late", step=7, since=5) and figures["steps"] == 7
    assert best_step(found) > 5 and figures["restored_to"] == best_step(found, until=5) == 4
    again = train_ppo(sick, ROWS, rising, tmp_path, quiet=True)[1]
    assert (again["steps"], again["restored_to"], len(calls)) == (7, 4, 7)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.floats(-1, 1), st.booleans()), min_size=1, max_size=9), st.integers(1, 4))
def test_what_a_run_may_end_with_is_never_forgotten(tmp_path_factory, states, keep):
    folder = tmp_path_factory.mktemp("run")
    for step, (objective, within) in enumerate(states):
        path = checkpoint_folder(folder, step)
        path.mkdir(parents=True)
        write_json(path / "state.json", dict(objective=objective, within_limit=within))
    before = checkpoints(folder)
    gone = forget(folder, keep)
    left = checkpoints(folder)
    assert {*gone} | {*left} == {*before} and not {*gone} & {*left}
    assert best_step(left) == best_step(before)
    assert 0 in left and {*list(before)[-keep:]} <= {*left} and len(left) <= keep + 2


def test_the_limit_comes_before_the_objective():
    assert best_step({1: dict(objective=0.1, within_limit=True), 2: dict(objective=9, within_limit=False)}) == 1
    assert best_step({1: dict(objective=0.1, within_limit=False), 2: dict(objective=0.2, within_limit=False)}) == 2
    assert best_step({1: dict(objective=None), 2: dict(objective=float("inf")), 3: dict(objective=-9.0)}) == 3
    assert best_step({5: {}}, until=4) is None


def test_a_checkpoint_is_whole_or_not_there(tmp_path):
    tensor = torch.ones(2, requires_grad=True)
    optimizer = torch.optim.AdamW([tensor])
    save_checkpoint(tmp_path, 1, dict(a=tensor), optimizer, dict(objective=1))
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path, 2, dict(a=tensor), optimizer, {("no", "key"): 1})
    (tmp_path / "checkpoint-9.part").mkdir()
    (tmp_path / "checkpoint-8").mkdir()
    assert list(checkpoints(tmp_path)) == [1]
    for other in (dict(b=tensor), dict(a=torch.ones(3)), dict(a=tensor, b=tensor)):
        with pytest.raises(CheckpointError, match="differs"):
            load_checkpoint(tmp_path, 1, other)
    for file in ("optimizer.pt", "weights.safetensors"):
        (tmp_path / "checkpoint-1" / file).write_bytes(b"half")
        with pytest.raises(CheckpointError, match="Delete this folder"):
            load_checkpoint(tmp_path, 1, dict(a=tensor), optimizer)


# ---------------------------------------------------------------- rewards


@pytest.fixture(scope="module")
def reward_folders(tmp_path_factory):
    "Two reward models of opposite opinion on the policy's base, neither of which has seen a gate."
    home, pairs = tmp_path_factory.mktemp("rewards"), bank_pairs(48, 1, 8)[0]
    swapped = [
        {k: v for k, v in p.items() if k != "scores"} | dict(chosen=p["rejected"], rejected=p["chosen"]) for p in pairs
    ]
    short = [f"reward.{k}=10" for k in ("max_steps", "eval_steps", "save_steps")]
    for name, side in dict(a=pairs, b=swapped).items():
        train_reward(load_settings("tiny", [*short, "reward.disable_tqdm=true"]), side[16:], side[:16], home / name)
    return home


def test_several_reward_models_share_a_base_without_touching_each_other(reward_folders):
    models = make_models(load_model("tiny-llama"), load_settings("tiny")["lora"])
    held = bank_pairs(48, 1, 8)[1]
    columns = dict(prompts=[p["prompt"] for p in held], completions=[p["chosen"] for p in held])
    columns |= dict(intent=[p["intent"] for p in held])
    parts = dict(a=(0.6, reward_folders / "a"), b=(0.4, str(reward_folders / "b")), rules=(1, gold_reward))
    found = make_reward(parts, models)(**columns)
    alone = [load_reward(reward_folders / n)(columns["prompts"], columns["completions"]) for n in "ab"]
    expected = [0.6 * a + 0.4 * b + g for a, b, g in zip(*alone, gold_reward(**columns))]
    assert found == pytest.approx(expected, abs=1e-5)
    assert max(abs(a - b) for a, b in zip(*alone)) > 1e-3
    models = make_models(load_model("tiny-qwen2"), load_settings("tiny")["lora"])  # another base: loaded by itself
    assert make_reward(reward_folders / "a", models)(**columns) == pytest.approx(alone[0], abs=1e-5)


def test_a_reward_below_its_gate_is_refused_before_anything_is_loaded(reward_folders, monkeypatch, tmp_path):
    monkeypatch.setattr("deepseek_cookbook.ppo.task.load_model", lambda **_: pytest.fail("a model was loaded"))
    toy = load_settings("tiny", SMALL)
    for reward in (reward_folders / "a", dict(rules=(1, gold_reward), model=(1, str(reward_folders / "a")))):
        with pytest.raises(GateError, match=r"no gate\.json"):
            train_ppo(toy, ROWS, reward, tmp_path)
    report = gate(load_reward(reward_folders / "b"), *bank_pairs(48, 1, 8)[1:], GateConfig(accuracy=1.0))
    save_gate(report, reward_folders / "b")
    with pytest.raises(GateError, match="did not pass the gate"):
        train_ppo(toy, ROWS, reward_folders / "b", tmp_path)
    check_reward(reward_folders / "b", force=True)
    for reward, text in ((3, "found int"), (dict(rules=gold_reward), "weight, reward"), (dict(a=(1, 2)), "found int")):
        with pytest.raises(PPOError, match=text):
            train_ppo(toy, ROWS, reward, tmp_path)


# ---------------------------------------------------------------- the desk


def test_no_template_and_no_filling_of_the_test_is_trained_on():
    rows, held = task_rows(TaskConfig(prompts=100, heldout=40), 7)
    asked, unseen = ({r["prompt"][-1]["content"] for r in side} for side in (rows, held))
    assert not asked & unseen and all(set(r) == {"prompt", "intent"} for r in rows + held)
    templates = [{p["template"] for p in side} for side in bank_pairs(100, 7, 40, 0.0)[:2]]
    assert not templates[0] & templates[1]
    with pytest.raises(PPOError, match="heldout"):
        TaskConfig(heldout=1)


def test_a_policy_that_learnt_nothing_gains_exactly_nothing():
    toy, held = load_settings("tiny"), task_rows(TaskConfig(prompts=4, heldout=8), 42)[1]
    models = make_models(load_model("tiny-llama"), toy["lora"])
    found = before_and_after(models, load_tokenizer("tiny-llama"), held, toy.build("rollout"), 42, 3)
    assert (found["gain"], found["gain_error"], found["after"]["kl"]) == (0, 0, 0)
    assert found["before"] == found["after"] and len(found["answers"]) == 3
    assert all(a["before"] == a["after"] for a in found["answers"])


def test_the_phase_trains_on_what_the_settings_name(tmp_path):
    toy, run = load_settings("tiny", [*SMALL, "ppo.total_episodes=16"]), RunFolder(tmp_path)
    models = make_models(load_model("tiny-llama"), toy["lora"])
    save_policy(models, run.phase("sft") / "adapter")
    figures = ppo_phase(toy, run)
    assert figures["task"] == "rules" and figures["steps"] == 2 and figures["prompts"] == 16
    assert set(figures["heldout"]) == {"before", "after", "answers", "gain", "gain_error"}
    assert figures["heldout"]["before"]["kl"] == 0 and (tmp_path / "ppo" / "adapter").is_dir()
