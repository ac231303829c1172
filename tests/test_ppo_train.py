"""The trainer on tiny models: what people got wrong in PPO, one test or more for each report.

PEOPLE_GOT_WRONG names, for each symptom, the tests that would show it.
"""

import ast
import copy
import math
import shutil
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_ppo import EXACT, LORA, NAMES, ROWS, logged, peaked, script, text_of, trainer, vowels

from deepseek_cookbook.guards import Action, Guard, MonitorConfig, make_guards
from deepseek_cookbook.models import load_tokenizer
from deepseek_cookbook.ppo import train as T
from deepseek_cookbook.ppo.checkpoints import checkpoint_folder, checkpoints, refused_steps
from deepseek_cookbook.ppo.policy import make_models
from deepseek_cookbook.ppo.rollout import RolloutConfig, RolloutError, score
from deepseek_cookbook.ppo.train import PPOConfig, PPOError
from deepseek_cookbook.reward.combine import RewardError, RunningNorm, combine
from deepseek_cookbook.settings import read_jsonl, write_json

PEOPLE_GOT_WRONG = {
    "the reward lands on the padding behind the end (trl #3750, #5338; DeepSpeedExamples #672)": [
        "test_ppo_losses::test_the_score_sits_on_the_stop_token_and_not_on_the_padding_behind_it",
        "test_ppo_losses::test_rewards_are_the_loop_and_sum_to_score_minus_kl",
        "test_ppo_batch::test_rewards_of_a_batch_sum_to_score_minus_kl",
    ],
    "the penalty for a missing end never comes (trl #5338, #6805, #2012, #2033)": [
        "test_ppo_losses::test_the_penalty_for_a_missing_end",
        "test_ppo_train::test_the_penalty_for_a_missing_end_reaches_the_reward",
    ],
    "generation never stops (trl #2387, #734, #1623)": [
        "test_rollout::test_a_model_that_can_stop_is_shorter_than_the_limit",
        "test_rollout::test_several_stops_end_a_row_and_one_in_the_prompt_does_not",
    ],
    "KL is negative and stays so (trl #925, #351, #1161, #1857; LLaMA-Factory #664, #3902; MedicalGPT #374)": [
        "test_rollout::test_only_a_plain_draw_gives_the_kl",
        "test_rollout::test_settings_that_change_the_distribution_or_mean_nothing",
        "test_rollout::test_the_first_ratio_is_one_with_dropout_in_the_adapter",
        "test_ppo_losses::test_k3_is_not_negative_in_float32_either",
        "test_ppo_train::test_a_kl_that_stays_negative_is_told",
    ],
    "KL explodes, one answer to everything (trl #204, #41, #615; open-r1 #373; MOSS-RLHF #17)": [
        "test_ppo_train::test_a_hackable_reward_is_stopped_and_the_best_weights_from_before_are_back",
        "test_ppo_train::test_a_stop_keeps_the_checkpoint_that_it_goes_back_to",
        "test_ppo_end::test_a_collapse_in_the_last_steps_is_seen_and_not_kept",
    ],
    "the reward does not move (DeepSpeedExamples #489, #586, #441)": [
        "test_ppo_learns::test_a_bandit_is_learnt",
        "test_ppo_losses::test_a_bandit_is_learnt_with_these_functions",
    ],
    "the averaged model is good because it is the SFT model (DeepSpeedExamples #442)": [
        "test_ppo_policy::test_the_saved_adapter_is_start_and_policy_weight_by_weight",
        "test_ppo_policy::test_a_trained_policy_is_not_its_start",
    ],
    "inf or NaN in the loss (DeepSpeedExamples #444)": [
        "test_ppo_train::test_a_gradient_that_is_not_finite_is_skipped_and_counted",
        "test_ppo_train::test_after_several_in_a_row_the_run_stops_and_leaves_the_batch",
    ],
    "only the value head trains; the reference is none (trl #1558, #2353, #3292, #2718; LLaMA-Factory #6373)": [
        "test_ppo_policy::test_what_is_trained_by_name",
        "test_ppo_policy::test_the_reference_is_the_start",
        "test_ppo_train::test_every_trained_tensor_moves_and_nothing_else",
    ],
    "the reward must be an nn.Module (trl #3093)": [
        "test_ppo_policy::test_a_reward_model_on_the_base_scores_as_it_does_alone",
        "test_ppo_policy::test_rewards_are_functions_folders_or_weighted",
        "test_ppo_batch::test_what_a_faulty_reward_does",
    ],
    "the value model is thrown away (trl #3293, #3308)": [
        "test_ppo_batch::test_a_killed_run_equals_a_straight_one_bit_for_bit",
        "test_ppo_batch::test_a_damaged_newest_checkpoint_is_named_and_the_older_one_gives_the_same_run",
    ],
    "is my reward model good enough? (LLaMA-Factory #3902, #664)": [
        "test_ppo_policy::test_the_gate_comes_before_anything_is_loaded",
    ],
    "entropy rises into gibberish (trl #199; verl #2738)": [
        "test_ppo_losses::test_entropy_is_the_loop_over_the_full_distribution",
        "test_ppo_losses::test_a_step_down_the_loss_raises_entropy",
        "test_ppo_learns::test_the_entropy_bonus_has_the_right_sign",
    ],
    "ratio above 10, batch skipped (trl #1857, #2340)": [
        "test_ppo_train::test_the_first_ratio_of_every_step_is_one",
    ],
    "adaptive KL wanted (trl #4532)": [
        "test_ppo_control::test_adaptive_kl_reaches_its_target",
        "test_ppo_control::test_beta_stays_inside_its_bounds_and_finite",
        "test_ppo_learns::test_adaptive_kl_reaches_its_target_in_training",
    ],
    "constraints wanted (trl #3129, #2156)": [
        "test_ppo_control::test_cost_above_raises_and_below_lowers",
        "test_ppo_learns::test_the_constrained_run_ends_under_the_limit_where_the_plain_one_does_not",
    ],
    "the Lagrangian is hard to tune (safe-rlhf #124, #173, #43, #24)": [
        "test_ppo_control::test_lambda_is_positive_bounded_and_follows_the_cost",
        "test_ppo_control::test_from_its_bound_the_price_comes_back_at_once",
    ],
    "out of memory with four models (OpenRLHF #762, #519, #600)": [
        "test_ppo_policy::test_one_base_in_memory_for_four_models",
    ],
    "padding on the left, position ids (trl #1061)": [
        "test_rollout::test_a_padded_batch_equals_each_row_alone",
        "test_rollout::test_positions_matter",
        "test_ppo_batch::test_a_batch_is_looked_up_row_by_row",
    ],
    "importance weights of replayed rows are forgotten (TRL's replay trainer, removed in #7132)": [
        "test_ppo_control::test_a_replayed_batch_with_weights_gives_the_on_policy_gradient",
        "test_ppo_control::test_and_without_any_one_of_them_it_does_not",
        "test_ppo_batch::test_weights_of_replayed_rows_reach_the_gradient",
        "test_ppo_batch::test_what_is_drawn_is_never_too_old",
    ],
}
HERE = Path(__file__).parent
quick = hypothesis_settings(max_examples=25, deadline=None)


def test_every_row_has_its_tests():
    named = {t for tests in PEOPLE_GOT_WRONG.values() for t in tests}
    assert len(PEOPLE_GOT_WRONG) == 20 and all(PEOPLE_GOT_WRONG.values())
    for file in {t.split("::")[0] for t in named}:
        tree = ast.parse((HERE / f"{file}.py").read_text())
        there = {f"{file}::{n.name}" for n in tree.body if isinstance(n, ast.FunctionDef)}
        assert not {t for t in named if t.startswith(f"{file}::")} - there


# ---------------------------------------------------------------- what moves


@pytest.mark.learning
@pytest.mark.parametrize("name", NAMES)
def test_every_trained_tensor_moves_and_nothing_else(tmp_path, name, seed):
    "Twenty seeds, ten of them in FP32 with AVX2: none stays where it was."
    run = trainer(tmp_path, 4, name=name, seed=seed)
    before = {n: p.clone() for n, p in run.models.frozen.state_dict().items()}
    run.train()
    moved = {n for n, p in run.models.frozen.state_dict().items() if not torch.equal(p, before[n])}
    assert moved and all(".policy." in n or ".value." in n for n in moved)
    wanted = {n for n in before if ".lora_B." in n and (".policy." in n or ".value." in n)}
    idle = {n for n in wanted - moved if ".value." in n}  # the value's gradient begins behind its head, one step later
    assert not {n for n in wanted - moved if ".policy." in n} and len(idle) < len(wanted) / 4
    assert run.models.head.weight.abs().sum() > 0


# ---------------------------------------------------------------- the ratio


def ratios(monkeypatch, run):
    "Log-ratios of the first update of every step, per real token."
    seen, plain = [], T.policy_loss

    def spy(logp, old, advantages, mask, *args, **kwargs):
        seen.append((run.counts["done"], (logp.detach() - old)[mask]))
        return plain(logp, old, advantages, mask, *args, **kwargs)

    monkeypatch.setattr(T, "policy_loss", spy)
    run.train()
    return [next(x for step, x in seen if step == s) for s in range(run.steps)], seen


LAYERS = [{}, dict(upper_layers=1), dict(value_layers=1), dict(value_layers=0), dict(upper_layers=1, value_layers=1)]


@pytest.mark.learning
@pytest.mark.parametrize("autocast", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_the_first_ratio_of_every_step_is_one(tmp_path, monkeypatch, name, autocast, seed, spread):
    "Seven seeds: later log-ratios reach 0.75 or more."
    for layers in LAYERS if name == "tiny-llama" else LAYERS[-1:]:
        with monkeypatch.context() as patch:
            run = trainer(
                tmp_path / "-".join(f"{k}{v}" for k, v in layers.items()),
                2,
                name=name,
                rollout=RolloutConfig(max_new_tokens=6, autocast=autocast),
                batch_size=8,
                per_device_train_batch_size=3,
                num_mini_batches=2,
                num_ppo_epochs=2,
                learning_rate=1e-2,
                seed=seed,
                **layers,
            )
            first, seen = ratios(patch, run)
        for x in first:
            assert x.abs().max() < 1e-5 if autocast == "float32" else (x == 0).all()
        assert spread("moved", max(x.abs().max() for _, x in seen)) > 1e-3  # and it moves afterwards
        assert all(abs(r - 1) < 1e-5 for r in logged(run, "ratio_first"))


@pytest.mark.learning
@pytest.mark.parametrize("parts", [1, 2])
def test_old_log_probabilities_are_those_before_the_first_update(tmp_path, parts, seed, spread):
    """Looked up in front of the updates, or read from the first one: KL, entropy and penalty are the same.

    Twenty seeds, ten of them in FP32 with AVX2: a KL of 0.011 or more.
    """
    run = trainer(tmp_path, 3, num_mini_batches=parts, num_ppo_epochs=2, learning_rate=1e-2, kl_coef=0.1, seed=seed)
    plain, states = run.update, []

    def update(batch):
        with run.models.as_policy():
            states.append(score(run.models.policy, batch.rollout, EXACT))
        return plain(batch)

    run.update = update
    run.train()
    mask, (old, entropy) = run.last.mask_BC, states[-1]
    assert (run.last.old_BC - old)[mask].abs().max() < 1e-5
    assert logged(run, "entropy")[-1] == pytest.approx(float(entropy[mask].mean()), abs=1e-5)
    assert logged(run, "kl")[-1] == pytest.approx(float((old - run.last.ref_BC)[mask].mean()), abs=1e-5)
    assert spread("kl", logged(run, "kl_k3")[-1]) > 1e-3  # never negative: k1 may be near 0 by chance


# ---------------------------------------------------------------- KL


def test_a_kl_that_stays_negative_is_told(tmp_path):
    "Answers that the policy itself would hardly give: what it was trained away from."

    def short(prompts, completions, **columns):
        return [-float(len(text_of(t))) for t in completions]

    guards = make_guards(MonitorConfig(window=3, patience=2, reward_slope_min=None, grad_norm_band=None))
    rare = script(lambda i: [200 + i] * 6)
    # Every answer has the same score and no value is known: only the sign of the whitened advantages moves it.
    run = trainer(tmp_path, 8, short, engine=rare, guards=guards, learning_rate=0.0)
    models = run.models
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():  # a policy that has moved, answering by another rule than its own
        for n, p in models.policy.named_parameters():
            if ".policy." in n and "lora_B" in n:
                p.copy_(0.3 * torch.randn(p.shape, generator=g))
    run.train()
    signs = np.sign(logged(run, "kl"))
    assert (signs == signs[0]).all()
    spoken = [r["guard"] for r in run.log.rows if "event" in r]
    assert ("kl_min" in spoken) == (signs[0] < 0) and min(logged(run, "kl_k3")) >= 0
    assert signs[0] < 0


# ---------------------------------------------------------------- guards act


def weights(folder, step):
    return load_file(checkpoint_folder(folder, step) / "weights.safetensors")


def hacked(folder, seed, **more):
    "A reward with a hole: repeating one word pays, and nothing holds the policy back."
    guards = make_guards(MonitorConfig(window=3, patience=2, kl_max=0.9, reward_slope_min=None, grad_norm_band=None))
    return trainer(folder, 40, guards=guards, full=True, learning_rate=5e-3, num_ppo_epochs=2, seed=seed, **more)


@pytest.mark.learning
def test_a_hackable_reward_is_stopped_and_the_best_weights_from_before_are_back(tmp_path, seed, spread):
    "Twenty seeds, ten of them in FP32 with AVX2: stopped after 8 to 18 steps, back to 6 to 16."
    run = hacked(tmp_path, seed, save_steps=2, save_total_limit=20)
    figures = run.train()
    stopped, back = figures["stopped"], figures["restored_to"]
    spread("steps", figures["steps"]), spread("restored", back)
    assert stopped["guard"] == "kl_max" and figures["steps"] < 40
    assert 0 < back <= stopped["since"] < stopped["step"] == figures["steps"]
    kept = checkpoints(tmp_path)
    refused = refused_steps(run.watch.guards, run.log.rows)
    sound = {s: c for s, c in kept.items() if s <= stopped["since"] and s not in refused}
    fit = {s: c["objective"] for s, c in sound.items() if c["objective"] is not None}
    assert fit[back] == max(fit.values())
    assert max(kept, key=lambda s: kept[s]["objective"] or 0) > stopped["since"]  # what is sick is paid best
    now = {n: p.detach() for n, p in run.trained.items()}
    for n, p in weights(tmp_path, back).items():
        assert torch.equal(now[n], p), n
    last = weights(tmp_path, figures["steps"])
    assert any(not torch.equal(now[n], p) for n, p in last.items())
    events = [(r["event"], r["guard"]) for r in run.log.rows if "event" in r and r["event"] != "note"]
    assert events == [("stop_restore", "kl_max"), ("restored", "kl_max")]
    again = hacked(tmp_path, seed, save_steps=2, save_total_limit=20)  # run once more: it is over, and stays so
    assert again.train()["steps"] == figures["steps"] and again.restored == back
    assert all(torch.equal(p.detach(), now[n]) for n, p in again.trained.items())


def test_a_stop_keeps_the_checkpoint_that_it_goes_back_to(tmp_path):
    "With two checkpoints kept, the healthy one would be the third when the stop is written."
    sick = Guard("late", "reward", lambda s: s.steps > 6, Action.STOP, patience=5)
    figures = trainer(tmp_path, 30, guards=[sick], full=True, learning_rate=5e-3, save_steps=5).train()
    assert figures["steps"] == 11 and figures["stopped"]["since"] == 6 and figures["restored_to"] == 5


def test_guards_raise_beta_and_lower_the_rate_for_the_rest_of_the_run(tmp_path):
    def at(step, action):
        return Guard(f"{action}", "reward", lambda s: s.steps == step, action, patience=1)

    guards = [at(2, Action.RAISE_BETA), at(3, Action.LOWER_LR)]
    more = dict(guards=guards, kl_coef=0.1, save_steps=1, lr_scheduler_type="linear", save_total_limit=9)
    run = trainer(tmp_path, 6, **more)
    run.train()
    assert logged(run, "kl_coef") == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.2, 0.2])
    plan = [1e-3 * (1 - i / 6) for i in range(6)]
    assert logged(run, "learning_rate") == pytest.approx(plan[:3] + [x / 2 for x in plan[3:]])
    for step in (5, 6):  # and a run that was cut off remembers both
        shutil.rmtree(checkpoint_folder(tmp_path, step))
    again = trainer(tmp_path, 6, **more)
    assert again.train()["resumed_from"] == 4
    assert logged(again, "learning_rate") == pytest.approx(logged(run, "learning_rate"))
    assert logged(again, "kl_coef") == pytest.approx(logged(run, "kl_coef"))


# ---------------------------------------------------------------- gradients that are not finite


def poisoned(run, when):
    "Gradients of the policy become NaN while `when(updates so far)`."
    count = [0]
    clean = run.clip

    def clip(group):
        if group is run.groups[0]:
            count[0] += 1
            if when(count[0]):
                group[0].grad[0] = math.nan
        return clean(group)

    run.clip = clip
    return run


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(tmp_path):
    run = poisoned(trainer(tmp_path, 4, save_steps=1, save_total_limit=9), lambda n: n == 3)
    figures = run.train()
    assert figures["steps"] == 4 and figures["skipped_updates"] == 1
    states = [weights(tmp_path, s) for s in range(5)]
    same = [all(torch.equal(a[n], b[n]) for n in a) for a, b in zip(states, states[1:])]
    assert same == [False, False, True, False]
    assert all(x.isfinite().all() for x in states[-1].values())
    assert logged(run, "skipped_updates") == [0, 0, 1, 1] and math.isnan(logged(run, "grad_norm")[2])


def test_after_several_in_a_row_the_run_stops_and_leaves_the_batch(tmp_path):
    run = poisoned(trainer(tmp_path, 9, save_steps=1, max_skipped=3), lambda n: n != 3)
    before = {n: p.detach().clone() for n, p in run.trained.items()}
    with pytest.raises(PPOError, match=r"not finite in 3 updates in a row.*sick_batch\.jsonl.*last checkpoint"):
        run.train()
    assert run.counts["done"] == 5 and run.counts["skipped"] == 5  # two, one that was sound, three
    assert all(p.isfinite().all() for p in run.trained.values())
    assert any(not torch.equal(p, before[n]) for n, p in run.trained.items())
    rows = read_jsonl(tmp_path / "sick_batch.jsonl")
    assert len(rows) == 16 and all(r["step"] == 5 and r["prompt"].startswith("Say") for r in rows)
    assert [float(r["score"]) for r in rows] == pytest.approx(vowels(None, [r["completion"] for r in rows]), abs=1e-6)
    fresh = trainer(tmp_path, 9, save_steps=1, max_skipped=3)
    assert fresh.train()["resumed_from"] == 5


# ---------------------------------------------------------------- ends of answers


def test_the_penalty_for_a_missing_end_reaches_the_reward(tmp_path):
    stop = load_tokenizer("tiny-llama").eos_token_id
    half = script(lambda i: [65, 66, stop] if i % 2 else [65, 66, 67, 68, 69, 70])

    def one(prompts, completions, **columns):
        return [1.0] * len(completions)

    run = trainer(tmp_path / "a", 1, one, engine=half, missing_eos_penalty=0.5)
    run.train()
    ended = run.last.rollout.ended_B
    assert ended.tolist() == [bool(i % 2) for i in range(16)]
    assert run.last.score_B.tolist() == [1.0 if e else 0.5 for e in ended]  # subtracted, not put in its place
    assert logged(run, "reward") == [0.75] and logged(run, "ended") == [0.5]
    stops = RolloutConfig(max_new_tokens=6, autocast="float32", stop_ids=[70])  # another end: no penalty at all
    run = trainer(tmp_path / "b", 1, one, engine=half, missing_eos_penalty=0.5, rollout=stops)
    run.train()
    assert logged(run, "reward") == [1.0] and logged(run, "ended") == [1.0]


# ---------------------------------------------------------------- who is learnt from together


@pytest.fixture(scope="module")
def idle(tmp_path_factory):
    "A trainer with a batch to look at."
    run = trainer(tmp_path_factory.mktemp("idle"), 1)
    run.last = run.ask()
    return run


@quick
@given(st.integers(1, 16), st.integers(1, 8), st.integers(1, 9), st.integers(0, 3), st.integers(0, 99))
def test_minibatches_partition_the_rows(idle, rows, parts, size, epoch, step):
    batch, kept = copy.copy(idle.last), (idle.config, idle.counts)
    batch.rollout = batch.rollout.select(list(range(rows)))
    try:
        idle.config = T.PPOConfig(batch_size=parts * 16, num_mini_batches=parts, per_device_train_batch_size=size)
        idle.counts = dict(idle.counts, done=step)
        found = idle.minibatches(batch, epoch)
        assert found == idle.minibatches(batch, epoch)
    finally:
        idle.config, idle.counts = kept
    assert sorted(i for update in found for part in update for i in part) == list(range(rows))
    assert len(found) == min(parts, rows) and all(1 <= len(part) <= size for update in found for part in update)
    sizes = [sum(map(len, update)) for update in found]
    assert max(sizes) - min(sizes) <= 1


def test_every_prompt_has_its_turn(tmp_path):
    run = trainer(tmp_path, 9, rows=ROWS[:7], batch_size=5)
    asked = [r["letter"] for step in range(7) for r in run.step_rows(step)]
    for i in range(0, 35, 7):
        assert sorted(asked[i : i + 7]) == sorted(r["letter"] for r in ROWS[:7])
    assert asked[:7] != asked[7:14]


# ---------------------------------------------------------------- input that can't be used


LONG = [dict(prompt="word " * 5000)]


@pytest.mark.parametrize(
    "rows, found",
    [
        ([], "no prompts"),
        ([dict(prompt="")], "prompt 0: empty"),
        ([*ROWS, dict(prompt="  ")], "prompt 8: empty"),
        (LONG, "prompt 0: .*window leaves room for"),
    ],
)
def test_prompts_that_are_refused_before_anything_is_done(tmp_path, rows, found):
    with pytest.raises((PPOError, RolloutError), match=found):
        trainer(tmp_path / "run", 1, rows=rows)
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_without_padding_is_refused(tmp_path):
    tokenizer = copy.deepcopy(load_tokenizer("tiny-llama"))
    tokenizer.pad_token = None
    with pytest.raises(RolloutError, match="no padding token"):
        T.PPOTrainer(PPOConfig(), make_models(peaked(), LORA), tokenizer, ROWS, vowels, tmp_path, EXACT)


@pytest.mark.parametrize(
    "wrong, found",
    [
        (dict(batch_size=10, num_mini_batches=4), "10 completions .* multiple of 4"),
        (dict(cliprange=0), "cliprange"),
        (dict(lam=1.5), "lam = 1.5"),
        (dict(on_reward_error="ignore"), "raise or skip"),
        (dict(kl_estimator="k2"), "k1 or k3"),
        (dict(learning_rate=math.nan), "learning_rate"),
        (dict(replay=-0.5), "replay"),
        (dict(missing_eos_penalty=-1.0), "missing_eos_penalty"),
        (dict(entropy_coef=-0.1), "entropy_coef"),
    ],
)
def test_settings_that_cannot_be_meant(wrong, found):
    with pytest.raises(PPOError, match=found):
        PPOConfig(**wrong)


def test_a_cost_and_its_limit_belong_together(tmp_path):
    for more in (dict(cost=vowels), dict(cost_limit=0.1)):
        with pytest.raises(PPOError, match="belong together"):
            trainer(tmp_path, 1, **more)


@pytest.mark.parametrize(
    "change", [dict(kl_coef=0.7), dict(seed=7), dict(rows=ROWS[:3]), dict(rollout=RolloutConfig(max_new_tokens=3))]
)
def test_a_folder_of_another_run_is_not_continued(tmp_path, change):
    trainer(tmp_path, 1).train()
    with pytest.raises(PPOError, match="of other settings.*resume=False"):
        trainer(tmp_path, 3, **change).train()


def test_rows_that_lose_their_score_leave_no_empty_update(tmp_path):
    def moody(prompts, completions, **columns):
        return [1.0, 0.0] + [None] * (len(completions) - 2)

    run = trainer(tmp_path, 2, moody, num_mini_batches=8, on_reward_error="skip")
    figures = run.train()
    assert figures["steps"] == 2 and logged(run, "updates") == [2, 2] and figures["reward_faults"] == {"none": 28}


def test_a_batch_without_any_score_ends_the_run(tmp_path):
    def broken(prompts, completions, **columns):
        raise KeyError("model is down")

    with pytest.raises(ValueError, match="no completion got a score.*'exception': 16"):
        trainer(tmp_path / "a", 2, broken, on_reward_error="skip").train()
    with pytest.raises(RewardError, match="KeyError.*model is down"):
        trainer(tmp_path / "b", 2, broken).train()


@pytest.mark.learning
def test_the_policy_is_scored_by_its_reference_and_not_by_itself(tmp_path, seed, spread):
    """After some steps KL is what a copy of the base says, and it is not zero.

    Twenty seeds, ten of them in FP32 with AVX2: log-probabilities are 1.1 apart or more.
    """
    run = trainer(tmp_path, 6, full=False, learning_rate=1e-2, num_ppo_epochs=2, seed=seed)
    run.train(resume=False)
    batch = run.last
    base, _ = score(peaked(), batch.rollout, EXACT)
    mask = batch.mask_BC
    assert (batch.ref_BC - base)[mask].abs().max() < 1e-4
    assert spread("moved", (batch.old_BC - batch.ref_BC)[mask].abs().max()) > 1e-2
    assert logged(run, "kl")[-1] == pytest.approx(float((batch.old_BC - base)[mask].mean()), abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("more", [{}, dict(upper_layers=1, value_layers=0), dict(full=True)])
def test_holding_frozen_matrices_in_16_bits_changes_no_number(tmp_path, monkeypatch, name, more):
    """In BF16 arithmetic they are rounded for every product anyway; afterwards the 32 bits are back, bit for bit.

    One step: in the next one adapters are added into rounded matrices for sampling, whose sums may round differently.
    """
    low = RolloutConfig(max_new_tokens=6, autocast="bfloat16")
    more = more | dict(num_mini_batches=2, num_ppo_epochs=2)
    held, plain = [], T.narrowed

    def watched(models, autocast):
        with plain(models, autocast) as matrices:
            held.append(matrices)
            yield

    monkeypatch.setattr(T, "narrowed", contextmanager(watched))
    runs = [trainer(tmp_path / "held", 1, name=name, rollout=low, **more)]
    runs[0].train()
    assert held[0] > 0
    monkeypatch.setattr(T, "narrowed", lambda *args: nullcontext())
    runs += [trainer(tmp_path / "plain", 1, name=name, rollout=low, **more)]
    runs[1].train()
    a, b = ({**r.trained, **dict(r.models.frozen.named_parameters())} for r in runs)
    assert a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)
    assert logged(runs[0], "kl") == logged(runs[1], "kl")


def test_the_32_bits_come_back_when_a_run_breaks_off(tmp_path):
    def broken(prompts, completions, **columns):
        raise KeyboardInterrupt

    run = trainer(tmp_path, 2, broken, rollout=RolloutConfig(max_new_tokens=6, autocast="bfloat16"))
    before = {n: p.clone() for n, p in run.models.frozen.named_parameters()}
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert all(p.dtype == torch.float32 and torch.equal(p, before[n]) for n, p in run.models.frozen.named_parameters())


def test_a_price_of_zero_cannot_be_raised(tmp_path):
    guards = make_guards(MonitorConfig(kl_growth_action="raise_beta"))
    with pytest.raises(PPOError, match="'kl' would raise the price of KL, and ppo.kl_coef = 0"):
        trainer(tmp_path, 2, guards=guards)
    assert trainer(tmp_path, 2, guards=guards, kl_coef=0.1).kl.beta == 0.1


def test_lower_lr_takes_the_factor_of_the_settings(tmp_path):
    never = Guard("rate", "reward", lambda x: np.ones(len(x), bool), Action.LOWER_LR, 1, 0)
    run = trainer(tmp_path, 2, guards=[never], lr_factor=0.1)
    run.train()
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * 0.1**2)


def test_a_normalised_reward_goes_on_with_what_it_has_seen(tmp_path):
    def reward():
        return combine(dict(vowels=vowels), dict(vowels=1.0), dict(vowels=RunningNorm()))

    runs = [trainer(tmp_path / "straight", 4, reward())]
    runs[0].train()
    trainer(tmp_path / "cut", 2, reward()).train()
    runs += [trainer(tmp_path / "cut", 4, reward())]
    runs[1].train()
    seen = [r.reward.fn.norms["vowels"] for r in runs]
    assert seen[0] == seen[1] and seen[0].count == 4 * 16
    assert logged(runs[0], "reward") == logged(runs[1], "reward")


def test_a_whole_policy_is_not_continued_from_another_start(tmp_path):
    trainer(tmp_path, 1, full=True).train()
    other = peaked()
    with torch.no_grad():
        next(other.parameters()).add_(0.01)
    with pytest.raises(PPOError, match="another model, start or seed"):
        trainer(tmp_path, 2, full=True, models=make_models(other, LORA, full=True)).train()


# ---------------------------------------------------------------- settings that say "not at all"


@pytest.mark.parametrize("full", [False, True])
def test_a_gradient_norm_of_zero_means_no_clipping(tmp_path, full):
    "As in transformers, TRL and this project's SFT; the norm is logged, and the step is that of a very large norm."
    for norm in (0.0, 1e9):
        run = trainer(tmp_path / str(norm), 2, max_grad_norm=norm, learning_rate=1e-2, full=full)
        run.train()
        assert min(logged(run, "grad_norm")) > 0
    free, large = (weights(tmp_path / str(norm), 2) for norm in (0.0, 1e9))
    begin = weights(tmp_path / "0.0", 0)
    assert all(torch.equal(free[n], large[n]) for n in free)
    assert any(not torch.equal(free[n], begin[n]) for n in free if n.startswith("policy."))


# ---------------------------------------------------------------- whose run is it


def ten(prompts, completions, **columns):
    return [10.0] * len(completions)


def minus(prompts, completions, **columns):
    return [-1.0] * len(completions)


def test_starting_over_leaves_nothing_to_go_back_to(tmp_path):
    "The old run was longer and its reward ten times as high: its last checkpoint was the best of all."
    trainer(tmp_path, 6, ten, save_steps=2, seed=1, learning_rate=1e-2).train()
    figures = trainer(tmp_path, 4, save_steps=2, seed=2, learning_rate=1e-2).train(resume=False)
    assert figures["resumed_from"] is None and figures["steps"] == 4 and figures["restored_to"] <= 4
    alone = trainer(tmp_path / "alone", 4, save_steps=2, seed=2, learning_rate=1e-2)
    assert alone.train()["restored_to"] == figures["restored_to"]
    assert max(checkpoints(tmp_path)) == 4
    for step in checkpoints(tmp_path):
        ours, theirs = weights(tmp_path, step), weights(tmp_path / "alone", step)
        assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    rows = [r for r in read_jsonl(tmp_path / "metrics.jsonl") if "event" not in r]
    assert [r["step"] for r in rows] == [1, 2, 3, 4]
    assert {r["step"] for r in read_jsonl(tmp_path / "samples.jsonl")} == {2, 4}


def test_a_log_without_its_checkpoints_is_not_added_to(tmp_path):
    trainer(tmp_path, 3).train()
    for step in checkpoints(tmp_path):
        shutil.rmtree(checkpoint_folder(tmp_path, step))
    run = trainer(tmp_path, 2)
    run.train()
    assert [r["step"] for r in run.log.rows if "event" not in r] == [1, 2]


def test_a_trainer_that_has_trained_does_not_start_over(tmp_path):
    run = trainer(tmp_path, 1)
    run.train()
    with pytest.raises(PPOError, match="has trained already"):
        run.train(resume=False)
    assert checkpoints(tmp_path)


def summed(a=1.0, b=1.0, clip=None, norms=None):
    norms = {k: RunningNorm(clip=c) for k, c in (norms or {}).items()}
    return combine(dict(a=ten, b=vowels), dict(a=a, b=b), norms, clip)


def scaled(alpha):
    return make_models(peaked(), LORA | dict(lora_alpha=alpha))


@pytest.mark.parametrize(
    "before, after, found",
    [
        ({}, dict(rows=[r | dict(letter="z") for r in ROWS]), "another columns of the prompts"),
        ({}, dict(rows=[r | dict(more=1) for r in ROWS]), "another columns of the prompts"),
        (dict(reward=summed()), dict(reward=summed(a=2.0)), "another reward"),
        (dict(reward=summed()), dict(reward=vowels), "another reward"),
        (dict(reward=summed()), dict(reward=summed(clip=(-1.0, 1.0))), "another reward"),
        (dict(reward=summed()), dict(reward=summed(norms=dict(a=5.0))), "another reward"),
        (dict(reward=summed(a=5.0)), dict(reward=combine(dict(b=vowels), dict(b=1.0))), "another reward"),
        (dict(cost=summed(), cost_limit=0.1), dict(cost=summed(b=3.0), cost_limit=0.1), "another cost"),
        (dict(models=16), dict(models=160), "another lora_alpha"),
    ],
)
def test_a_run_of_something_else_is_not_continued(tmp_path, before, after, found):
    "Finished or not: what is written beside it would be false."
    before, after = ({k: scaled(v) if k == "models" else v for k, v in more.items()} for more in (before, after))
    trainer(tmp_path, 1, **before).train()
    for steps in (1, 3):
        with pytest.raises(PPOError, match=f"{found}.*resume=False"):
            trainer(tmp_path, steps, **after).train()


def test_the_same_run_written_anew_goes_on(tmp_path):
    rows = [dict(reversed([*r.items()])) | dict(seen=np.float32(0.5)) for r in ROWS]
    trainer(tmp_path, 1, summed(a=2.0), rows=rows).train()
    again = [r | dict(seen=np.float32(0.5)) for r in ROWS]
    assert trainer(tmp_path, 2, summed(a=2.0), rows=again).train()["resumed_from"] == 1


def test_a_function_of_another_name_goes_on_and_is_noted(tmp_path):
    "It may have been moved or mended; what is called by name from a command line is refused."
    trainer(tmp_path, 1, ten).train()
    run = trainer(tmp_path, 2, minus)
    assert run.train()["resumed_from"] == 1
    told = [r["message"] for r in run.log.rows if r.get("event") == "note" and r["guard"] == "reward"]
    assert len(told) == 1 and "minus" in told[0] and "ten" in told[0]
    named = [trainer(tmp_path / "named", steps, ten) for steps in (1, 2, 2)]
    for run, name in zip(named, ("mine:ten", "mine:ten", "mine:other")):
        run.named = name
    assert named[0].train()["steps"] == 1 and named[1].train()["resumed_from"] == 1
    with pytest.raises(PPOError, match="another reward .mine:ten there, mine:other here"):
        named[2].train()


def test_a_run_from_before_the_facts_were_kept_goes_on(tmp_path):
    trainer(tmp_path, 1).train()
    for step in checkpoints(tmp_path):
        file = checkpoint_folder(tmp_path, step) / "state.json"
        write_json(file, {k: v for k, v in checkpoints(tmp_path)[step].items() if k != "facts"})
    assert trainer(tmp_path, 2).train()["resumed_from"] == 1


def test_copies_of_checkpoints_are_none(tmp_path):
    trainer(tmp_path, 2).train()
    for name in ("checkpoint-old-6", "checkpoint-9-bak", "checkpoint-best"):
        shutil.copytree(checkpoint_folder(tmp_path, 2), tmp_path / name)
    assert list(checkpoints(tmp_path)) == [0, 2]
    assert trainer(tmp_path, 3).train()["resumed_from"] == 2
    assert (tmp_path / "checkpoint-old-6").is_dir()


# ---------------------------------------------------------------- the plan of learning rates, and columns


@pytest.mark.parametrize("kind", ["constant_with_warmup", "linear", "cosine"])
@pytest.mark.parametrize("warmup, begin", [(0, 1.0), (1, 1.0), (2, 0.5), (4, 0.25)])
def test_no_step_is_spent_on_a_rate_of_zero(tmp_path, kind, warmup, begin):
    run = trainer(tmp_path, 6, lr_scheduler_type=kind, warmup_steps=warmup, save_steps=3)
    run.train()
    rates = np.array(logged(run, "learning_rate")) / 1e-3
    assert rates[0] == pytest.approx(begin) and (rates > 0).all()
    assert rates[: warmup or 1] == pytest.approx(np.arange(1, (warmup or 1) + 1) / (warmup or 1))
    assert (np.diff(rates[max(0, warmup - 1) :]) <= 1e-9).all()
    shutil.rmtree(checkpoint_folder(tmp_path, 6))
    again = trainer(tmp_path, 6, lr_scheduler_type=kind, warmup_steps=warmup, save_steps=3)
    assert again.train()["resumed_from"] == 3 and logged(again, "learning_rate") == logged(run, "learning_rate")


@pytest.mark.parametrize("warmup", [3, 50])
def test_a_warm_up_that_never_ends_is_refused(warmup):
    with pytest.raises(PPOError, match=f"warmup_steps = {warmup}: the run has 3 steps"):
        PPOConfig(total_episodes=40, batch_size=16, num_mini_batches=1, warmup_steps=warmup)


@pytest.mark.parametrize("column", ["completions", "prompts"])
def test_columns_whose_names_are_taken_are_refused_at_the_start(tmp_path, column):
    with pytest.raises(PPOError, match=f"column '{column}'.*another name"):
        trainer(tmp_path, 1, rows=[*ROWS, dict(prompt="Say z") | {column: "?"}])


def test_noise_of_the_sampler_is_not_priced_as_distance(tmp_path):
    "k3 of rounding is above 0; with one minibatch it was reckoned from what the sampler reports."
    run = trainer(tmp_path, 1, kl_coef=5.0, kl_estimator="k3")
    plain = run.ask

    def noisy():
        batch = plain()
        batch.rollout.drawn_logprobs_BC += 0.1 * torch.randn(batch.rollout.drawn_logprobs_BC.shape)
        return batch

    run.ask = noisy
    run.one_step()
    last = run.last.mask_BC.cumsum(1) == run.last.mask_BC.sum(1, keepdim=True)
    values, returns = run.last.values_BCK[..., 0], run.last.returns_BCK[..., 0]
    found = (returns - values)[last & run.last.mask_BC]  # at the last token: score less the price of its KL
    assert values.abs().max() < 1e-6 and found == pytest.approx(run.last.score_B, abs=1e-5)
