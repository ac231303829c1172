"""What is looked up before anything is learnt, the replay of old rows, checkpoints that a killed run goes on from."""

import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_ppo import EXACT, LORA, NAMES, ROWS, logged, peaked, script, shaken, text_of, trainer, vowels

from deepseek_cookbook.models import load_tokenizer
from deepseek_cookbook.ppo import batch as B
from deepseek_cookbook.ppo import checkpoints as K
from deepseek_cookbook.ppo import train as T
from deepseek_cookbook.ppo.batch import Batch, BatchError, look_back, measure, scored, set_advantages
from deepseek_cookbook.ppo.checkpoints import CheckpointError, best_step, checkpoint_folder, checkpoints, forget
from deepseek_cookbook.ppo.control import Replay
from deepseek_cookbook.ppo.policy import make_models, values_of
from deepseek_cookbook.ppo.rollout import RolloutConfig, sample, score
from deepseek_cookbook.ppo.task import train_ppo
from deepseek_cookbook.ppo.train import PPOError
from deepseek_cookbook.reward.combine import Checked, RewardError
from deepseek_cookbook.settings import ReadError, load_settings, read_json, read_jsonl, write_json

quick = hypothesis_settings(max_examples=30, deadline=None)


def looked_up(name="tiny-llama", together=None, **layers):
    "A batch of eight rows after `look_back`, and its models."
    models = shaken(make_models(peaked(name), LORA, None, **layers))
    with models.as_policy():
        rollout = sample(models.policy, load_tokenizer(name), [r["prompt"] for r in ROWS], EXACT, 3, logprobs=False)
    batch = scored(ROWS, rollout, Checked(vowels))
    look_back(batch, models, EXACT, together or [[0, 3, 5], [1, 2], [4, 6, 7]])
    return batch, models


# ---------------------------------------------------------------- looking back


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_looked_up_row_by_row(name):
    "Log-probabilities, reference, values: each row alone, without padding, gives the same."
    batch, models = looked_up(name)
    lengths = batch.rollout.prompt_mask_BP.sum(1)
    assert lengths.min() < lengths.max()
    for i, n in enumerate(batch.rollout.lengths_B.tolist()):
        alone = batch.rollout.select([i])
        with models.as_policy():
            old, entropy = score(models.policy, alone, EXACT)
        with models.as_reference():
            ref, _ = score(models.frozen, alone, EXACT)
        with torch.no_grad():
            values = values_of(models, alone)
        for got, wanted in (
            (batch.old_BC, old),
            (batch.ref_BC, ref),
            (batch.entropy_BC, entropy),
            (batch.values_BCK, values),
        ):
            assert (got[i, :n] - wanted[0]).abs().max() < 1e-4
    assert (batch.old_BC - batch.ref_BC)[batch.mask_BC].abs().max() > 1e-3 and batch.values_BCK.abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layers", [dict(upper_layers=1), dict(value_layers=1), dict(upper_layers=1, value_layers=1)])
def test_kept_lower_states_equal_the_full_pass(name, layers):
    batch, models = looked_up(name, **layers)
    assert (batch.rollout.below, batch.for_value.below) == (models.below, models.value_below) != (0, 0)
    kept = [x.clone() for x in (batch.old_BC, batch.ref_BC, batch.values_BCK)]
    models.below = models.value_below = 0
    batch.rollout = T.Batch(
        B.replace(batch.rollout, lower_BTD=None, below=0), [], batch.score_B, batch.cost_B, 8
    ).rollout
    look_back(batch, models, EXACT, [list(range(8))])
    for a, b in zip(kept, (batch.old_BC, batch.ref_BC, batch.values_BCK)):
        assert (a - b).abs().max() < 1e-5


@pytest.mark.parametrize("beta, estimator", [(0.0, "k1"), (0.3, "k1"), (0.3, "k3")])
def test_rewards_of_a_batch_sum_to_score_minus_kl(beta, estimator, monkeypatch):
    batch, _ = looked_up()
    seen = []
    monkeypatch.setattr(B, "gae", lambda r, *a: seen.append(r) or gae(r, *a))
    gae = T.__dict__.get("gae") or __import__("deepseek_cookbook.ppo.losses", fromlist=["gae"]).gae
    set_advantages(batch, beta, estimator)
    for i, n in enumerate(batch.rollout.lengths_B.tolist()):
        kl = (batch.old_BC - batch.ref_BC)[i, :n]
        kl = kl if estimator == "k1" else torch.exp(-kl) - 1 + kl
        assert seen[0][i].sum().item() == pytest.approx(batch.score_B[i].item() - beta * kl.sum().item(), abs=1e-5)
        assert seen[0][i, n - 1].item() == pytest.approx(batch.score_B[i].item() - beta * kl[-1].item(), abs=1e-5)
        assert (seen[0][i, n:] == 0).all()


def test_advantages_are_those_of_the_values_in_front_of_each_token():
    "With lambda = 0 and gamma = 1: reward + next value - value, whitened; a shift by one would show."
    batch, _ = looked_up()
    set_advantages(batch, 0.0, lam=0.0, whitened=lambda x, mask: x)
    values = batch.values_BCK[..., 0]
    for i, n in enumerate(batch.rollout.lengths_B.tolist()):
        for t in range(n):
            after = values[i, t + 1].item() if t + 1 < n else batch.score_B[i].item()
            assert batch.advantages_BC[i, t].item() == pytest.approx(after - values[i, t].item(), abs=1e-5)
            assert batch.returns_BCK[i, t, 0].item() == pytest.approx(after, abs=1e-5)


def test_values_are_read_before_their_token():
    "What the value model says of a token depends on no later token, and not on the token itself."
    batch, models = looked_up()
    ids = batch.rollout.completion_ids_BC.clone()
    ids[:, 3:] = (ids[:, 3:] + 7) % 300 + 5
    other = B.replace(batch.rollout, completion_ids_BC=ids)
    with torch.no_grad():
        now = values_of(models, other)
    assert (now - batch.values_BCK)[:, :4].abs().max() < 1e-5 < (now - batch.values_BCK)[:, 4:].abs().max()


def test_what_is_measured_is_of_fresh_rows():
    batch, _ = looked_up()
    set_advantages(batch, 0.1)
    found = measure(batch)
    assert found["reward"] == pytest.approx(batch.score_B.mean().item(), abs=1e-6)
    k1 = (batch.old_BC - batch.ref_BC)[batch.mask_BC]
    assert found["kl"] == pytest.approx(k1.mean().item(), abs=1e-5)
    assert found["kl_k3"] == pytest.approx((torch.exp(-k1) - 1 + k1).mean().item(), abs=1e-5) and found["kl_k3"] > 0
    mask = batch.mask_BC
    k3_BC = torch.where(mask, torch.exp(batch.ref_BC - batch.old_BC) - 1 + batch.old_BC - batch.ref_BC, 0.0)
    assert found["kl_per_completion"] == pytest.approx(k3_BC.sum(1).mean().item(), abs=1e-5)
    assert found["completion_tokens"] == int(mask.sum()) and found["replayed"] == 0


# ---------------------------------------------------------------- rewards that fail


def spoilt(kind):
    "A reward that fails on the third row of eight."

    def reward(prompts, completions, **columns):
        scores = vowels(prompts, completions)
        bad = [i for i, letter in enumerate(columns["letter"]) if letter == "c"]
        if kind == "exception" and bad:
            raise KeyError("no such word")
        if kind == "count":
            return scores[:-1]
        for i in bad:
            scores[i] = dict(nan=float("nan"), none=None, inf=float("inf"), text="high").get(kind, scores[i])
        return scores

    return reward


FAULTS = dict(exception="exception", nan="not finite", inf="not finite", text="type", none="none")


@pytest.mark.parametrize("kind", [*FAULTS, "count"])
def test_what_a_faulty_reward_does(kind):
    tokenizer, model = load_tokenizer("tiny-llama"), peaked()
    rollout = sample(model, tokenizer, [r["prompt"] for r in ROWS], EXACT, 3, logprobs=False)
    with pytest.raises((RewardError, BatchError), match="reward 'reward'"):
        scored(ROWS, rollout, Checked(spoilt(kind)))
    lenient = Checked(spoilt(kind), on_error="skip")
    if kind == "count":  # nobody knows which row is missing
        with pytest.raises(BatchError, match="no completion got a score"):
            scored(ROWS, rollout, lenient)
        return
    batch = scored(ROWS, rollout, lenient)
    kept = [0, 1, 3, 4, 5, 6, 7]
    assert batch.fresh == len(batch.rollout) == 7 and [r["letter"] for r in batch.rows] == list("abdefgh")
    assert batch.rollout.texts == [rollout.texts[i] for i in kept]
    assert batch.score_B.tolist() == pytest.approx([vowels(None, rollout.texts)[i] for i in kept], abs=1e-6)
    assert lenient.counts == {FAULTS[kind]: 1}


def test_a_cost_without_a_number_takes_its_row_along(tmp_path):
    def cost(prompts, completions, letter, **columns):
        return [None if x == "a" else 0.25 for x in letter]

    run = trainer(tmp_path, 2, cost=cost, cost_limit=0.5, on_reward_error="skip")
    run.train()
    assert run.last.fresh == 14 and logged(run, "cost") == [0.25, 0.25]


def test_faults_are_counted_through_a_resume(tmp_path):
    run = trainer(tmp_path, 2, spoilt("nan"), on_reward_error="skip")
    assert run.train()["reward_faults"] == {"not finite": 4}
    run = trainer(tmp_path, 4, spoilt("nan"), on_reward_error="skip")
    assert run.train()["reward_faults"] == {"not finite": 8}


# ---------------------------------------------------------------- replay


def test_what_is_drawn_is_never_too_old(tmp_path, monkeypatch):
    born = []
    plain = T.with_replayed

    def spy(batch, replay, count, step, *rest):
        out = plain(batch, replay, count, step, *rest)
        born.append((step, [replay.steps[i] for i in out.drawn]))
        return out

    monkeypatch.setattr(T, "with_replayed", spy)
    more = dict(replay=1.0, replay_max_age=2, replay_capacity=999, save_steps=4)
    run = trainer(tmp_path, 5, **more)
    run.train()
    again = trainer(tmp_path, 10, **more)
    assert again.train()["resumed_from"] == 5 and len(again.replay) == 3 * 16
    assert [step for step, _ in born] == list(range(10)) and all(steps for step, steps in born[1:])
    for step, steps in born:
        assert all(1 <= step - b <= 2 for b in steps)
    assert {step - b for step, steps in born for b in steps} == {1, 2}
    assert logged(again, "replayed") == [0] + [16] * 9


def replayed(seed=0):
    "A trainer with a batch of fresh and replayed rows, looked up."
    run = trainer(Path(tempfile.mkdtemp()), 3, replay=0.5, seed=seed, learning_rate=1e-2, num_ppo_epochs=2, kl_coef=0.1)
    seen, plain = [], run.update
    run.update = lambda batch: seen.append(batch) or plain(batch)
    run.train()
    return run, seen


@pytest.mark.learning
def test_weights_are_the_buffers_times_the_ratio(seed, spread):
    "Twenty seeds, ten of them in FP32 with AVX2: a ratio at its cap of 2, weights down to 0.05 or less."
    run, seen = replayed(seed)
    batch = seen[-1]
    old = slice(batch.fresh, None)
    assert len(batch.rollout) - batch.fresh == 8 and (batch.weight_BC[: batch.fresh] == 1).all()
    then, mask = batch.rollout.drawn_logprobs_BC[old], batch.mask_BC[old]
    ratio = torch.exp(((batch.old_BC[old] - then) * mask).sum(1)).clamp(max=2.0)
    shares = batch.weight_BC[old][:, 0] / ratio
    assert (batch.weight_BC[old] == batch.weight_BC[old][:, :1]).all() and ((0 < shares) & (shares <= 1 + 1e-5)).all()
    assert spread("moved", (ratio - 1).abs().max()) > 1e-3 and spread("smallest", shares.min()) < 1 - 1e-4
    first = seen[1].rollout.drawn_logprobs_BC[16:]  # the log-probabilities of the step that sampled them
    source = {
        tuple(r[m].tolist()): x[m]
        for r, x, m in zip(seen[0].rollout.completion_ids_BC, seen[0].old_BC, seen[0].mask_BC)
    }
    for ids, m, x in zip(seen[1].rollout.completion_ids_BC[16:], seen[1].mask_BC[16:], first):
        assert torch.allclose(source[tuple(ids[m].tolist())], x[m], atol=1e-6)


def gradient(run, batch, rows, items):
    run.optimizer.zero_grad(set_to_none=True)
    run.learn_from(batch, rows, torch.tensor(float(items)))
    return {n: p.grad.clone() for n, p in run.trained.items() if p.grad is not None}


@pytest.mark.learning
def test_weights_of_replayed_rows_reach_the_gradient(seed, spread):
    """Linear in the weights: 0 is as if the rows were not there, 2 counts them twice; policy and value alike.

    Twenty seeds, ten of them in FP32 with AVX2: they move the policy's gradient by 0.02 or more, the head's by 0.005.
    """
    run, seen = replayed(seed)
    batch = seen[-1]
    rows, new, n = list(range(len(batch.rollout))), list(range(batch.fresh)), 50
    at = {}
    for w in (0.0, 1.0, 2.0):
        batch.weight_BC[batch.fresh :] = w
        at[w] = gradient(run, batch, rows, n)
    fresh = gradient(run, batch, new, n)
    for name, g in fresh.items():
        assert torch.allclose(at[0.0][name], g, atol=2e-6), name
        assert torch.allclose(at[2.0][name] - at[1.0][name], at[1.0][name] - g, atol=5e-6), name
    for part in ("policy.", "head."):
        moved = max((at[1.0][k] - g).abs().max().item() for k, g in fresh.items() if k.startswith(part))
        assert spread(f"moved {part}", moved) > 1e-4


def test_short_fresh_rows_beside_long_replayed_ones(tmp_path):
    say = script(lambda i: [100 + i] * 6, lambda i: [100 + i] * 2)
    run = trainer(tmp_path, 3, engine=say, replay=0.5)
    run.train()
    assert {len(r["completion_ids"]) for r in run.replay.rows} == {6, 2}
    assert all(len(r["completion_ids"]) == len(r["logprobs"]) for r in run.replay.rows)


# ---------------------------------------------------------------- checkpoints


EVERYTHING = dict(
    save_steps=2,
    save_total_limit=9,
    learning_rate=5e-3,
    num_ppo_epochs=2,
    num_mini_batches=2,
    kl_coef=0.1,
    kl_target=0.4,
    kl_horizon=32,
    cost_limit=0.3,
    cost_lr=0.5,
    replay=0.5,
    lr_scheduler_type="linear",
    warmup_steps=2,
    missing_eos_penalty=0.1,
)


def has_e(prompts, completions, **columns):
    return [float("e" in text_of(t)) for t in completions]


class Killed(BaseException):
    pass


def deadly(step):
    calls = [0]

    def reward(prompts, completions, **columns):
        calls[0] += 1
        if calls[0] > step:
            raise Killed
        return vowels(prompts, completions)

    return reward


def everything(folder):
    "All that a checkpoint at step 6 holds."
    path = checkpoint_folder(folder, 6)
    optimizer = torch.load(path / "optimizer.pt", weights_only=True)
    return (
        load_file(path / "weights.safetensors"),
        optimizer["state"],
        optimizer["param_groups"],
        read_json(path / "state.json"),
    )


def assert_same_run(a, b):
    (wa, oa, ga, sa), (wb, ob, gb, sb) = everything(a), everything(b)
    assert {n.split(".")[0] for n in wa} == {"policy", "value", "head"}
    assert wa.keys() == wb.keys() and all(torch.equal(x, wb[n]) for n, x in wa.items())
    assert oa.keys() == ob.keys() and len(oa) == len(wa)
    for i, s in oa.items():
        assert all(torch.equal(x, ob[i][k]) for k, x in s.items())
    assert ga == gb and sa == sb
    assert sa["price"]["seen"] == 6 and sa["kl"]["beta"] != 0.1 and len(sa["replay"][0]["rows"]) > 50
    own = ("seconds", "samples_per", "memory", "time")
    rows = [
        [
            {k: v for k, v in r.items() if not k.startswith(own)}
            for r in read_jsonl(f / "metrics.jsonl")
            if "reward" in r
        ]
        for f in (a, b)
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 6
    assert read_jsonl(a / "samples.jsonl") == read_jsonl(b / "samples.jsonl")
    saved = [load_file(f / "adapter" / "adapter_model.safetensors") for f in (a, b)]
    assert all(torch.equal(x, saved[1][n]) for n, x in saved[0].items())


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight") / "run"
    trainer(folder, 6, cost=has_e, **EVERYTHING).train()
    return folder


@pytest.mark.parametrize("done", [2, 3, 5])
def test_a_killed_run_equals_a_straight_one_bit_for_bit(straight, tmp_path, done):
    "Killed right after a checkpoint (2), and between two of them, in the middle of a step (3, 5)."
    with pytest.raises(Killed):
        trainer(tmp_path, 6, deadly(done), cost=has_e, **EVERYTHING).train()
    assert list(checkpoints(tmp_path))[-1] == done // 2 * 2
    run = trainer(tmp_path, 6, cost=has_e, **EVERYTHING)
    assert run.train()["resumed_from"] == done // 2 * 2
    assert_same_run(straight, tmp_path)


@pytest.mark.parametrize(
    "name, damage",
    [
        ("weights.safetensors", "half"),
        ("weights.safetensors", "empty"),
        ("weights.safetensors", "gone"),
        ("optimizer.pt", "half"),
        ("optimizer.pt", "empty"),
        ("optimizer.pt", "gone"),
        ("state.json", "half"),
        ("state.json", "empty"),
    ],
)
def test_a_damaged_newest_checkpoint_is_named_and_the_older_one_gives_the_same_run(straight, tmp_path, name, damage):
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    file = checkpoint_folder(folder, 6) / name
    data = file.read_bytes()
    file.unlink() if damage == "gone" else file.write_bytes(data[: len(data) // 2] if damage == "half" else b"")
    with pytest.raises((CheckpointError, ReadError), match="checkpoint-6"):
        trainer(folder, 6, cost=has_e, **EVERYTHING).train()
    if (name, damage) not in (("weights.safetensors", "half"), ("optimizer.pt", "half")):
        return
    shutil.rmtree(checkpoint_folder(folder, 6))
    assert trainer(folder, 6, cost=has_e, **EVERYTHING).train()["resumed_from"] == 4
    assert_same_run(straight, folder)


def test_a_checkpoint_that_was_not_finished_does_not_count(straight, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    checkpoint_folder(folder, 6).rename(folder / "checkpoint-6.part")
    (folder / "checkpoint-8").mkdir()
    (folder / "checkpoint-8" / "weights.safetensors").write_bytes(b"half")
    assert list(checkpoints(folder))[-1] == 4
    trainer(folder, 6, cost=has_e, **EVERYTHING).train()
    assert_same_run(straight, folder)


def test_other_adapters_or_models_are_refused(straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    for more in (dict(upper_layers=1), dict(full=True)):
        with pytest.raises((CheckpointError, PPOError), match="Choose another folder"):
            trainer(tmp_path / "run", 6, cost=has_e, **EVERYTHING | more).train()
    with pytest.raises(PPOError, match="another model, start.*Choose another folder"):  # all shapes are the same
        trainer(tmp_path / "run", 6, cost=has_e, name="tiny-qwen2", **EVERYTHING).train()


@pytest.mark.parametrize(
    "writer, error",
    [
        ("save_file", OSError(28, "No space left on device")),
        ("torch.save", RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")),
        ("write_json", OSError(28, "No space left on device")),
    ],
)
def test_a_full_disk_at_a_checkpoint_is_told_and_the_older_one_stays(tmp_path, monkeypatch, writer, error):
    small = ["ppo.total_episodes=32", "ppo.save_steps=1", "rollout.max_new_tokens=4"]
    toy, count = load_settings("tiny", small), [0]
    home = torch if writer == "torch.save" else K
    name = writer.split(".")[-1]
    plain = getattr(home, name)

    def full(*args, **kwargs):
        count[0] += 1
        if count[0] == 3:
            if writer == "save_file":
                Path(args[1]).write_bytes(b"half")
            raise error
        return plain(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(home, name, full)
        with pytest.raises(
            PPOError, match=r"the disk is full: .* MiB free in .*goes on from the last complete checkpoint"
        ):
            train_ppo(toy, ROWS, vowels, tmp_path, quiet=True)
    assert list(checkpoints(tmp_path)) == [0, 1]
    assert not [p.name for p in tmp_path.iterdir() if p.name.endswith((".part", ".old"))]
    figures = train_ppo(toy, ROWS, vowels, tmp_path, quiet=True)[1]
    assert figures["resumed_from"] == 1 and figures["steps"] == 4


# ---------------------------------------------------------------- which checkpoints stay


objectives = st.one_of(st.none(), st.just(float("nan")), st.floats(-5, 5))
histories = st.dictionaries(st.integers(0, 40), st.tuples(objectives, st.booleans()), min_size=1, max_size=9)


def found_in(history):
    return {s: dict(objective=o, within_limit=w) for s, (o, w) in sorted(history.items())}


@quick
@given(histories, st.one_of(st.none(), st.integers(0, 40)))
def test_best_step_is_the_best_by_a_loop(history, until):
    best = None
    for step, (objective, within) in sorted(history.items()):
        if until is not None and step > until:
            continue
        worth = objective if objective is not None and objective == objective else -float("inf")
        if best is None or (within, worth) >= best[0]:
            best = ((within, worth), step)
    assert best_step(found_in(history), until) == (best and best[1])


@quick
@given(histories, st.integers(1, 4))
def test_the_first_the_best_and_the_newest_stay(history, keep):
    with tempfile.TemporaryDirectory() as folder:
        for step, state in found_in({s: (None if o != o else o, w) for s, (o, w) in history.items()}).items():
            checkpoint_folder(folder, step).mkdir()
            write_json(checkpoint_folder(folder, step) / "state.json", state)
        before = checkpoints(folder)
        gone, after = forget(folder, keep), checkpoints(folder)
        assert sorted([*gone, *after]) == list(before)
        measured = {step: before[step] for step in list(before)[:-1]}  # the row after it may refuse the newest
        assert {min(before), best_step(measured), *list(before)[-keep:]} - {None} == set(after)
        assert forget(folder, keep) == []
        assert best_step(after) == best_step(before)


def test_a_number_that_is_not_finite_does_not_break_the_checkpoint(tmp_path, monkeypatch):
    "A policy so far away that its KL overflows: the step is written, is never the best, and the run goes on."
    plain = T.measure

    def overflowing(batch):
        found = plain(batch)
        return found | dict(kl=float("inf")) if calls.pop() else found

    calls = [False] * 9 + [True] + [False]
    monkeypatch.setattr(T, "measure", overflowing)
    run = trainer(tmp_path, 4, save_steps=1, save_total_limit=9, kl_coef=0.1)
    figures = run.train()
    assert figures["steps"] == 4 and figures["restored_to"] == 1
    assert [c["objective"] is None for c in checkpoints(tmp_path).values()] == [True, False, True, True, True]


def test_a_finished_run_ends_with_its_best_weights(tmp_path):
    "The reward is bad after the third step: later weights are not the ones that are kept."
    calls = [0]

    def falling(prompts, completions, **columns):
        calls[0] += 1
        return [1.0 if calls[0] <= 3 else -1.0] * len(completions)

    run = trainer(tmp_path, 8, falling, save_steps=1, learning_rate=1e-2, entropy_coef=0.1)
    assert run.train()["restored_to"] == 3
    now = {n: p.detach() for n, p in run.trained.items()}
    saved = load_file(checkpoint_folder(tmp_path, 3) / "weights.safetensors")
    last = load_file(checkpoint_folder(tmp_path, 8) / "weights.safetensors")
    assert all(torch.equal(now[n], p) for n, p in saved.items())
    assert any(not torch.equal(now[n], p) for n, p in last.items())


def test_a_replay_buffer_is_json_and_comes_back(tmp_path):
    run = trainer(tmp_path, 2, replay=0.25)
    run.train()
    state = checkpoints(tmp_path)[2]["replay"][0]
    other = Replay()
    other.load_state_dict(state)
    assert (
        other.rows == run.replay.rows and other.priorities == run.replay.priorities and other.steps == run.replay.steps
    )
    assert isinstance(run.last, Batch) and RolloutConfig().on_policy


def test_when_the_cost_leaves_nothing_the_cost_is_named():
    rollout = sample(peaked(), load_tokenizer("tiny-llama"), [r["prompt"] for r in ROWS], EXACT, 3, logprobs=False)
    silent = Checked(lambda prompts, completions, **columns: [None] * len(prompts), on_error="skip")
    with pytest.raises(BatchError, match=r"of the reward \{\}, of the cost \{'none': 8\}"):
        scored(ROWS, rollout, Checked(vowels), silent)
