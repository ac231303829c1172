"""The run log, the guards and the callback: synthetic series, hypothesis, and real runs of a tiny seeded Llama."""

import base64
import io
import json
import math
import os
import signal
import subprocess
import sys
import types
from dataclasses import fields, replace
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

from deepseek_cookbook import monitor
from deepseek_cookbook.guards import explodes, growth, outside, smooth
from deepseek_cookbook.monitor import (
    Action,
    Guard,
    MetricsLog,
    MonitorCallback,
    MonitorConfig,
    MonitorError,
    Watch,
    best_checkpoint,
    dashboard_html,
    judge,
    load_weights,
    make_guards,
    make_trackers,
    plot_dashboard,
    read_metrics,
    series,
)
from deepseek_cookbook.settings import parse_value

RNG = np.random.default_rng(7)
STEPS = np.arange(1, 121)
LATE = np.clip(STEPS - 60, 0, None)
SPIKES = np.where(STEPS % 37 == 0, 6.0, 0.0)


def noise(scale):
    return RNG.normal(0, scale, len(STEPS))


def rows_of(metric, values, per_epoch=20):
    return [{"step": i, "epoch": i / per_epoch, metric: float(v)} for i, v in enumerate(values, 1)]


def speak(guard, rows):
    "Steps at which a guard speaks when it is asked after each row, its events going into the history."
    seen = []
    for row in rows:
        seen.append(row)
        if d := judge(guard, seen):
            seen.append({"step": d.step, "event": d.action, "guard": d.guard, "message": d.message})
    return [r["step"] for r in seen if "event" in r]


# guard -> (healthy, sick from step 60 on)
FIT = 0.8 + 2.8 * np.exp(-STEPS / 25)
CASES = {
    "loss": (FIT + noise(0.08) + SPIKES, FIT + noise(0.08) + 0.08 * LATE),
    "entropy": (1.8 + noise(0.1), 1.8 * np.exp(-LATE / 12)),
    "length": (60 + noise(6), 60 - np.minimum(LATE, 55)),
    "grad_norm": (3 + noise(0.4) + SPIKES, 3 + noise(0.4) + (STEPS > 60) * 4),
    "kl": (0.03 * STEPS + noise(0.05), 0.03 * STEPS + 0.1 * LATE),
    "ppo_loss": (1 + noise(0.05) + SPIKES, 1 + noise(0.05) + 0.02 * LATE),
    "reward": (0.025 * STEPS + noise(0.08), 0.025 * np.minimum(STEPS, 60) + noise(0.08)),
    "finite:loss": (FIT, np.where(STEPS == 61, np.nan, FIT)),
    "finite:reward": (FIT, np.where(STEPS == 61, np.inf, FIT)),
}
GUARDS = {g.name: g for g in make_guards()}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_each_guard_is_silent_on_the_healthy_run_and_speaks_on_the_sick_one(name, seed):
    guard, (healthy, sick) = GUARDS[name], CASES[name]
    jitter = np.random.default_rng(seed).normal(0, 0.01, len(STEPS))
    assert speak(guard, rows_of(guard.metric, healthy + jitter)) == []
    first = speak(guard, rows_of(guard.metric, sick + jitter))[0]
    assert 60 < first <= 110


@pytest.mark.parametrize("patience", [1, 2, 3, 5])
def test_patience_counts_sick_points_in_a_row(patience):
    guard = Guard("g", "x", outside(0, 1, window=1), patience=patience)
    sick = [0.5] * 4 + [2.0] * 10
    assert speak(guard, rows_of("x", sick)) == [4 + patience]
    broken = ([2.0] * (patience - 1) + [0.5]) * 5  # never `patience` in a row
    assert speak(guard, rows_of("x", broken)) == []


def test_a_note_is_written_once_a_spell_and_an_action_rests():
    x = [2.0] * 10 + [0.5] * 3 + [2.0] * 10
    note = Guard("g", "x", outside(0, 1, window=1), patience=2)
    assert speak(note, rows_of("x", x)) == [2, 15]
    acts = replace(note, action=Action.LOWER_LR, window=3)
    assert speak(acts, rows_of("x", x)) == [2, 7, 15, 20]


def test_since_is_the_last_healthy_step():
    guard = Guard("g", "x", outside(0, 1, window=1), patience=2)
    decision = judge(guard, rows_of("x", [0.5, 0.5, 2.0, 2.0]))
    assert (decision.since, decision.step, decision.value) == (2, 4, 2.0)
    assert judge(guard, rows_of("x", [2.0, 2.0])).since == 0
    assert judge(guard, []) is None and judge(guard, rows_of("y", [2.0] * 9)) is None


def test_small_losses_do_not_explode():
    assert not explodes(2.0, 0.25)(series(rows_of("x", [0.01] * 9 + [0.4] * 9), "x")).any()


def test_growth_against_the_naive_loop():
    x, y = np.sort(RNG.choice(400, 80, replace=False)).astype(float), RNG.normal(size=80)
    fast, smoothed = growth(y, x, span=20, window=3), smooth(y, 3)
    for i in range(80):
        back = [j for j in range(80) if x[j] <= x[i] - 20]
        slow = (smoothed[i] - smoothed[back[-1]]) / (x[i] - x[back[-1]]) if back else math.nan
        assert np.isclose(fast[i], slow, equal_nan=True)


def test_growth_needs_epochs():
    no_epochs = [{"step": i, "reward": 0.0} for i in range(200)]
    assert judge(GUARDS["reward"], no_epochs) is None


numbers = st.floats(allow_nan=True, allow_infinity=True) | st.integers(-(2**53), 2**53)
runs = st.lists(st.tuples(st.integers(0, 30), numbers), max_size=30).map(lambda r: sorted(r, key=lambda p: p[0]))


def same(a, b):
    return a == b or (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b))


@given(numbers)
def test_floats_round_trip_as_strict_json(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("log") / "m.jsonl"
    MetricsLog(path).log(1, x=value)

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    json.loads(path.read_text(), parse_constant=refuse)
    back = read_metrics(path)[0]["x"]
    assert same(back, value) and type(back) is type(value)


@hypothesis_settings(max_examples=50, deadline=None)
@given(runs, st.integers(-1, 31))
def test_rewind_is_idempotent_and_the_file_equals_the_memory(tmp_path_factory, run, step):
    log = MetricsLog(tmp_path_factory.mktemp("log") / "m.jsonl")
    for at, value in run:
        log.log(at, x=value)
    before = len([1 for at, _ in run if at > step])
    assert log.rewind(step) == before
    once = log.path.read_bytes() if log.path.exists() else b""
    assert log.rewind(step) == 0
    assert once == (log.path.read_bytes() if log.path.exists() else b"")
    assert [r["step"] for r in log.rows if "event" not in r] == [at for at, _ in run if at <= step]
    if run:
        again = MetricsLog(log.path).rows
        assert all(same(a[k], b[k]) for a, b in zip(again, log.rows, strict=True) for k in b)


@hypothesis_settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000))
def test_any_cut_of_the_file_opens_again(tmp_path_factory, per_mille):
    log = MetricsLog(tmp_path_factory.mktemp("log") / "m.jsonl")
    for i in range(5):
        log.log(i, loss=float(i), note_é=1)
    whole = log.path.read_bytes()
    cut = len(whole) * per_mille // 1000
    log.path.write_bytes(whole[:cut])
    kept = whole[:cut].count(b"\n")
    assert len(read_metrics(log.path)) == kept and log.path.read_bytes() == whole[:cut]
    log = MetricsLog(log.path)
    log.log(9, loss=9.0)
    rows = read_metrics(log.path)
    assert [r["step"] for r in rows if "event" not in r] == [*range(kept), 9]
    assert bool([r for r in rows if "event" in r]) == (not whole[:cut].endswith(b"\n") and cut > 0)


@pytest.mark.parametrize("bad", [b"garbage\n", b"[1]\n", b'{"loss": 1}\n', b"\xff\xfe\n", b"\n"])
def test_a_broken_line_in_the_middle_names_file_and_line(tmp_path, bad):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1, "x": 1}\n' + bad + b'{"step": 2, "x": 1}\n')
    with pytest.raises(MonitorError, match=r"m\.jsonl, line 2"):
        MetricsLog(path)


def test_log_takes_scalars_and_refuses_the_rest(tmp_path):
    log = MetricsLog(tmp_path / "deep" / "m.jsonl")
    row = log.log(np.int64(3), a=torch.tensor(2.0), b=np.float32(0.5), c=4)
    assert {k: row[k] for k in "abc"} == {"a": 2.0, "b": 0.5, "c": 4} and type(row["step"]) is int
    with pytest.raises(MonitorError, match="'a'.*numbers only"):
        log.log(4, a="high")
    with pytest.raises(MonitorError, match="no metrics log"):
        read_metrics(tmp_path / "nothing.jsonl")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_a_clear_error(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl")
    log.log(1, x=1)
    log.path = Path("/dev/full")
    with pytest.raises((MonitorError, OSError), match="No space left"):
        log.log(2, x=1)
    assert len(log.rows) == 1


def test_other_ranks_keep_rows_in_memory_only(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    log = MetricsLog(tmp_path / "m.jsonl")
    log.log(1, x=1)
    log.log(2, x=1)
    assert log.rewind(1) == 1 and not log.path.exists() and log.rows[0]["x"] == 1


def test_kill_9_leaves_a_log_that_opens(tmp_path):
    code = (
        "from deepseek_cookbook.runlog import MetricsLog\n"
        f"log = MetricsLog({str(tmp_path / 'm.jsonl')!r})\n"
        "for i in range(10**9):\n    log.log(i, loss=1.0)\n    if i == 50: print('ready', flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    rows = [r["step"] for r in MetricsLog(tmp_path / "m.jsonl").rows if "event" not in r]
    assert rows == list(range(len(rows))) and len(rows) > 50


def test_watch_writes_its_decisions_down_and_acts(tmp_path):
    guard = replace(GUARDS["kl"], action=Action.RAISE_BETA)
    raised = []
    watch = Watch(MetricsLog(tmp_path / "m.jsonl"), [guard], {"raise_beta": raised.append})
    for row in rows_of("kl", CASES["kl"][1]):
        watch.step(row["step"], kl=row["kl"], other=1.0)
    events = [r for r in read_metrics(tmp_path / "m.jsonl") if "event" in r]
    assert [e["step"] for e in events] == [d.step for d in raised] and len(raised) > 1
    assert events[0]["event"] == "raise_beta" and events[0]["metric"] == "kl" and events[0]["value"] == raised[0].value


def test_resume_decides_as_a_straight_run_does(tmp_path):
    "Killed at step 100 and resumed from step 80: the same events at the same steps."

    def go(log, upto, rows):
        watch = Watch(log, [replace(GUARDS["kl"], action=Action.RAISE_BETA)], {"raise_beta": lambda d: None})
        done = max((r["step"] for r in log.rows), default=0)
        for row in rows[done:upto]:
            watch.step(row["step"], kl=row["kl"])

    rows = rows_of("kl", CASES["kl"][1])
    straight, broken = MetricsLog(tmp_path / "a.jsonl"), MetricsLog(tmp_path / "b.jsonl")
    go(straight, 120, rows)
    go(broken, 100, rows)
    again = MetricsLog(tmp_path / "b.jsonl")
    again.rewind(80)
    go(again, 120, rows)
    events = [[r["step"] for r in log.rows if r.get("guard") == "kl"] for log in (straight, again)]
    assert events[0] == events[1] and any(s <= 80 for s in events[0]) and any(s > 100 for s in events[0])


def test_an_action_that_the_loop_lacks_is_an_error_at_the_start(tmp_path):
    guard = replace(GUARDS["kl"], action=Action.RAISE_BETA)
    with pytest.raises(MonitorError, match="'kl' asks for 'raise_beta'.*offers"):
        MonitorCallback(MetricsLog(tmp_path / "m.jsonl"), [guard])
    MonitorCallback(MetricsLog(tmp_path / "m.jsonl"), [guard], {"raise_beta": lambda d: None})


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("grad_norm_band", "[2.0, 5.0]", (2.0, 5.0)),
        ("grad_norm_band", "none", None),
        ("kl_growth_max", "0.1", 0.1),
        ("kl_growth_max", "none", None),
        ("kl_growth_action", "raise_beta", Action.RAISE_BETA),
        ("trackers", '["tensorboard"]', ("tensorboard",)),
        ("finite_metrics", "[]", ()),
        ("patience", "4", 4),
    ],
)
def test_settings_are_parsed_from_text(key, text, value):
    assert parse_value(text, get_type_hints(MonitorConfig)[key]) == value


def test_none_switches_a_guard_off_and_defaults_note():
    limits = {f.name: None for f in fields(MonitorConfig) if "None" in str(f.type)}
    assert make_guards(MonitorConfig(**limits, finite_metrics=())) == []
    bands = {g.name: g.action for g in make_guards()}
    assert all(bands[n] == Action.NOTE for n in ("grad_norm", "kl", "ppo_loss", "reward"))
    assert {g.name: g for g in make_guards()}["grad_norm"].band == (2.0, 5.0)
    assert make_guards(MonitorConfig(kl_growth_action="raise_beta"))[-3].action is Action.RAISE_BETA


def test_training_on_given_texts_has_no_guard_that_only_answers_feed():
    "Else the stop of `kl_max` would demand checkpoints from a run that never logs a KL."
    calm = MonitorConfig(finite_action="note", loss_action="note")
    assert Action.STOP in {g.action for g in make_guards(calm)}
    assert {g.action for g in make_guards(calm, rollouts=False)} == {Action.NOTE}


# ---- real trainer runs ------------------------------------------------------------------------------------------


def tiny(**more):
    set_seed(0)
    shape = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(**{**shape, **more}))


DATA = [
    {"input_ids": row, "labels": row}
    for row in torch.randint(8, (32, 12), generator=torch.Generator().manual_seed(0)).tolist()
]


class Poison(TrainerCallback):
    "Makes a weight NaN before one step, so that its loss is NaN; or raises the learning rate out of reach."

    def __init__(self, at, what="nan"):
        self.at, self.what = at, what

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step + 1 != self.at:
            return
        if self.what == "nan":
            with torch.no_grad():
                next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))
        else:
            for group in optimizer.param_groups:
                group["lr"] *= 1000


def trainer_for(model, folder, callbacks=(), guards=None, **more):
    options = dict(
        max_steps=20, learning_rate=0.01, lr_scheduler_type="linear", use_cpu=True, logging_steps=1, save_steps=4,
        eval_strategy="steps", eval_steps=4, report_to="none", per_device_train_batch_size=4, disable_tqdm=True, seed=0,
    )  # fmt: skip
    log = MetricsLog(folder / "metrics.jsonl")
    watch = MonitorCallback(log, make_guards() if guards is None else guards)
    args = TrainingArguments(str(folder), **{**options, **more})
    return Trainer(model, args, train_dataset=DATA, eval_dataset=DATA, callbacks=[watch, *callbacks]), log


def weights(model):
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def saved(folder):
    file = folder / "adapter_model.safetensors"
    from safetensors.torch import load_file

    return load_file(file if file.exists() else folder / "model.safetensors")


ALWAYS = Guard("always", "loss", lambda s: s.steps >= 6, Action.LOWER_LR, patience=1, window=10**6)


def test_rows_of_a_real_run(tmp_path):
    trainer, log = trainer_for(tiny(), tmp_path, include_num_input_tokens_seen="all")
    trainer.train()
    rows = read_metrics(log.path)
    train = [r for r in rows if "loss" in r]
    assert [r["step"] for r in train] == list(range(1, 21))
    keys = {"loss", "grad_norm", "learning_rate", "epoch", "samples_per_second", "tokens_per_second", "memory_gib"}
    assert all(keys <= set(r) for r in train) and all(r["tokens_per_second"] > 0 for r in train)
    assert [r["step"] for r in rows if "eval_loss" in r] == [4, 8, 12, 16, 20]
    logged = [h["loss"] for h in trainer.state.log_history if "loss" in h]
    assert [r["loss"] for r in train] == logged
    assert trainer.args.logging_nan_inf_filter is True  # given back as it was


def test_lower_lr_takes_effect_and_the_scheduler_does_not_undo_it(tmp_path):
    trainer, log = trainer_for(tiny(), tmp_path, guards=[ALWAYS])
    trainer.train()
    s = series(log.rows, "learning_rate")
    expected = 0.01 * (1 - (s.steps - 1) / 20) * np.where(s.steps > 6, 0.5, 1.0)
    np.testing.assert_allclose(s.values, expected, rtol=1e-6)
    assert [r["event"] for r in log.rows if r.get("guard") == "always"] == ["lower_lr"]


def test_the_lower_rate_and_the_decisions_survive_a_resume(tmp_path):
    straight, log_a = trainer_for(tiny(), tmp_path / "a", guards=[ALWAYS])
    straight.train()

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 11:
                raise KeyboardInterrupt

    broken, _ = trainer_for(tiny(), tmp_path / "b", [Kill()], guards=[ALWAYS])
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed, log_b = trainer_for(tiny(), tmp_path / "b", guards=[ALWAYS])
    assert max(r["step"] for r in log_b.rows) == 10
    resumed.train(resume_from_checkpoint=True)
    a, b = (series(log.rows, "learning_rate") for log in (log_a, log_b))
    np.testing.assert_allclose(a.values, b.values)
    assert len([r for r in log_b.rows if r.get("event") == "lower_lr"]) == 1
    assert any("resumed from step 8" in r.get("message", "") for r in log_b.rows)
    for x, y in zip(weights(straight.model).values(), weights(resumed.model).values(), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.learning
@pytest.mark.parametrize("kind", ["full", "tied", "adapter"])
@pytest.mark.parametrize("what", ["nan", "lr"])
def test_stop_gives_back_the_best_checkpoint(tmp_path, kind, what, seed, spread):
    "Twenty seeds, ten of them in FP32 with AVX2: stopped at step 14 or 15 by NaN, at 16 by the rate."
    model = tiny(tie_word_embeddings=kind == "tied")
    if kind == "adapter":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    guards = make_guards(MonitorConfig(loss_factor=1.2, window=1, patience=2))
    if what == "lr" and kind == "adapter":  # an adapter this small can't explode
        guards = [Guard("g", "loss", lambda s: s.steps >= 15, Action.STOP, patience=2)]
    trainer, log = trainer_for(model, tmp_path, [Poison(14, what)], guards, max_steps=40, seed=seed)
    trainer.train()
    event = next(r for r in log.rows if r.get("event") == "stop_restore")
    assert 14 <= spread("stopped at", event["step"]) <= 20 and trainer.state.global_step == event["step"]
    evals = series(log.rows, "eval_loss")
    best = int(evals.steps[np.nanargmin(evals.values)])
    file = saved(tmp_path / f"checkpoint-{best}")
    now = weights(trainer.model)
    if kind == "adapter":
        from peft import get_peft_model_state_dict

        now = get_peft_model_state_dict(trainer.model)
    assert all(torch.equal(now[k], v) for k, v in file.items()) and file
    if kind == "tied":
        assert trainer.model.lm_head.weight.data_ptr() == trainer.model.model.embed_tokens.weight.data_ptr()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(np.nanmin(evals.values), rel=1e-5)
    assert log.rows[-2]["event"] == "restored"
    assert not (tmp_path / f"checkpoint-{event['step']}").exists() or event["step"] == best


@pytest.mark.parametrize("last", [14, 15])
def test_what_begins_in_the_last_steps_is_seen_at_the_end(tmp_path, last):
    "Sick from step 14 on, with a patience of three: too short for the guard, and still no run to be kept."
    guards = [Guard("g", "loss", lambda s: s.steps >= 14, Action.STOP, patience=3)]
    trainer, log = trainer_for(tiny(), tmp_path, guards=guards, max_steps=last, eval_strategy="no")
    trainer.train()
    assert [r["event"] for r in log.rows if "event" in r] == ["stop_restore", "restored"]
    assert all(torch.equal(weights(trainer.model)[k], v) for k, v in saved(tmp_path / "checkpoint-12").items())
    healthy, log = trainer_for(tiny(), tmp_path / "healthy", guards=guards, max_steps=13, eval_strategy="no")
    healthy.train()
    assert not [r for r in log.rows if "event" in r]


def test_nan_is_hidden_without_the_callback_and_seen_with_it(tmp_path):
    plain = Trainer(tiny(), TrainingArguments(str(tmp_path / "plain"), max_steps=8, use_cpu=True, logging_steps=1,
                    report_to="none", disable_tqdm=True), train_dataset=DATA, callbacks=[Poison(4)])  # fmt: skip
    plain.train()
    assert all(math.isfinite(h["loss"]) for h in plain.state.log_history if "loss" in h)  # the trap
    trainer, log = trainer_for(tiny(), tmp_path / "ours", [Poison(6)])
    trainer.train()
    assert trainer.state.global_step == 6
    assert math.isnan(series(log.rows, "loss").values[-1])
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_a_stop_without_evaluations_goes_back_to_before_the_trouble(tmp_path):
    options = dict(eval_strategy="no", save_steps=2, logging_steps=4)
    trainer, log = trainer_for(tiny(), tmp_path, [Poison(10)], **options)
    trainer.train()
    assert trainer.state.global_step == 12 and (tmp_path / "checkpoint-10").exists()  # saved before it was seen
    assert "checkpoint-8" in log.rows[-1]["message"]
    assert all(torch.equal(weights(trainer.model)[k], v) for k, v in saved(tmp_path / "checkpoint-8").items())


def test_nothing_to_restore_is_an_error(tmp_path):
    trainer, _ = trainer_for(tiny(), tmp_path, [Poison(2)])
    with pytest.raises(MonitorError, match="stopped the run at step 2.*nothing to restore"):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (dict(save_strategy="no"), "save_strategy"),
        (dict(save_total_limit=2), "metric_for_best_model"),
    ],
)
def test_a_stop_that_could_not_restore_is_an_error_at_the_start(tmp_path, options, word):
    trainer, _ = trainer_for(tiny(), tmp_path, **options)
    with pytest.raises(MonitorError, match=word):
        trainer.train()
    assert trainer.state.global_step == 0
    calm = make_guards(MonitorConfig(finite_action="note", loss_action="note", kl_max_action="note"))
    trainer_for(tiny(), tmp_path, guards=calm, max_steps=2, **options)[0].train()


def test_a_stopped_run_stays_stopped(tmp_path):
    "Killed between the stop and the restore: the next start goes straight to the restore."
    guards = [Guard("g", "loss", lambda s: s.steps >= 9, Action.STOP, patience=1)]
    trainer, log = trainer_for(tiny(), tmp_path, guards=guards)
    trainer.train()
    lines = [r for r in log.rows if r.get("event") != "restored" and "train_loss" not in r]
    checkpoint = max(tmp_path.glob("checkpoint-*"), key=lambda p: int(p.name[11:]))
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    (checkpoint / "trainer_state.json").write_text(json.dumps({**state, "global_step": 9}))
    log.path.write_text("".join(json.dumps(r) + "\n" for r in lines))
    again, log = trainer_for(tiny(), tmp_path, guards=guards)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert log.rows[-1]["event"] == "restored" and again.state.global_step <= 10


def test_load_best_model_at_end_and_early_epoch_saves(tmp_path):
    options = dict(save_strategy="epoch", eval_strategy="epoch", load_best_model_at_end=True, save_total_limit=2)
    options |= dict(metric_for_best_model="eval_loss", max_steps=40)
    trainer, log = trainer_for(tiny(), tmp_path, [Poison(20)], **options)
    trainer.train()
    assert trainer.state.global_step == 20 and not (tmp_path / "checkpoint-20").exists()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_load_weights_from_shards_and_of_another_model(tmp_path):
    model = tiny(num_hidden_layers=2)
    model.save_pretrained(tmp_path / "checkpoint-1", max_shard_size="4KB")
    assert (tmp_path / "checkpoint-1" / "model.safetensors.index.json").exists()
    before = weights(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    load_weights(model, tmp_path / "checkpoint-1")
    assert all(torch.equal(before[k], v) for k, v in weights(model).items())
    tiny().save_pretrained(tmp_path / "checkpoint-2")
    with pytest.raises(MonitorError, match="not a checkpoint of this model"):
        load_weights(model, tmp_path / "checkpoint-2")
    rows = [{"step": 1, "eval_loss": math.nan}, {"step": 2, "eval_loss": 3.0}, {"step": 3, "eval_loss": 1.0}]
    assert best_checkpoint(rows, tmp_path).name == "checkpoint-2"  # 1 is NaN, 3 has no folder
    assert best_checkpoint([], tmp_path, since=1).name == "checkpoint-1" and best_checkpoint([], tmp_path) is None


# ---- dashboard and trackers -------------------------------------------------------------------------------------


def full_rows():
    rows = []
    for i in STEPS.tolist():
        names = {"loss": "loss", "entropy": "entropy", "length": "completion_length", "kl": "kl", "reward": "reward",
                 "grad_norm": "grad_norm", "ppo_loss": "ppo_loss"}  # fmt: skip
        rows.append({"step": i, "epoch": i / 20, "learning_rate": 1e-3 * (1 - i / 120),
                     **{metric: float(CASES[g][0][i - 1]) for g, metric in names.items()}})  # fmt: skip
        if i % 24 == 0:
            rows.append({"step": i, "eval_loss": float(FIT[i - 1])})
    return rows


def test_dashboard_has_a_panel_for_each_metric_that_exists(tmp_path):
    rows = full_rows()
    shown = [a for a in plot_dashboard(rows, make_guards()).axes if a.get_visible()]
    assert len(shown) == 9
    assert [a.get_title(loc="left") for a in plot_dashboard(rows_of("kl", [1, 2, 3])).axes if a.get_visible()] == [
        "KL to the reference (nats)"
    ]
    figure = plot_dashboard([])
    figure.savefig(tmp_path / "empty.png")
    plot_dashboard(rows_of("loss", [math.nan, math.inf])).savefig(tmp_path / "nan.png")
    plot_dashboard([*rows_of("loss", [1.0, math.nan, 2.0])]).savefig(tmp_path / "some.png")
    assert (tmp_path / "some.png").stat().st_size > 1000


@pytest.mark.filterwarnings("error")
def test_dashboard_html_is_one_small_safe_section():
    rows = [*full_rows(), {"step": 60, "event": "note", "guard": "kl", "message": "<b>1 & 2</b>", "metric": "kl"}]
    page = dashboard_html(rows, make_guards(), "A <title>")
    picture = page.split("base64,")[1].split('"')[0]
    assert len(picture) <= 150_000 and page.count("<section>") == page.count("</section>") == 1
    assert "A &lt;title&gt;" in page and "&lt;b&gt;1 &amp; 2" in page and "http" not in page.replace(picture, "")
    assert "No guard spoke" in dashboard_html(rows_of("loss", [math.nan, 1.0]))
    dashboard_html([])
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")).astype(int)
    assert pixels.shape[1] >= 800 and (pixels[..., 0] > pixels[..., 1] + 60).sum() > 50  # the red line of the event


def test_tensorboard_writes_and_purges(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLog(tmp_path / "m.jsonl", make_trackers(["tensorboard"], tmp_path, "sft")) as log:
        for i in range(1, 6):
            log.log(i, loss=1.0 / i)
        log.rewind(3)
        log.log(4, loss=0.0)
    accumulator = EventAccumulator(str(tmp_path / "tensorboard" / "sft"))
    accumulator.Reload()
    assert [(e.step, round(e.value, 3)) for e in accumulator.Scalars("loss")] == [(1, 1), (2, 0.5), (3, 0.333), (4, 0)]


def test_trackio_writes_offline(tmp_path):
    code = (
        "from deepseek_cookbook.runlog import *\n"
        f"trackers = make_trackers(['trackio'], {str(tmp_path / 'run')!r}, 'sft')\n"
        f"with MetricsLog({str(tmp_path / 'm.jsonl')!r}, trackers) as log:\n"
        "    [log.log(i, loss=1.0) for i in range(3)]\n"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("TRACKIO")}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, timeout=120)
    assert (tmp_path / "run" / "trackio" / "run.db").stat().st_size > 0


def test_trackers_are_imported_only_when_asked_for():
    names = "('tensorboard', 'trackio', 'wandb')"
    code = f"import sys, deepseek_cookbook.monitor; print([m for m in {names} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_a_tracker_that_is_missing_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MonitorError, match="pip install wandb"):
        make_trackers(["wandb"], tmp_path, "sft")
    with pytest.raises(MonitorError, match="unknown tracker 'tb'"):
        make_trackers(["tb"], tmp_path, "sft")


def test_wandb_is_offline_by_default(tmp_path, monkeypatch):
    seen = {}
    run = types.SimpleNamespace(log=lambda m, step: seen.setdefault("rows", []).append((step, m)), finish=lambda: None)
    fake = types.SimpleNamespace(init=lambda **options: seen.update(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with MetricsLog(tmp_path / "m.jsonl", make_trackers(["wandb"], tmp_path, "sft")) as log:
        log.log(1, loss=2.0)
    assert seen["mode"] == "offline" and seen["rows"] == [(1, {"loss": 2.0})]


def test_peak_memory_is_a_plausible_number():
    assert 0.05 < monitor.peak_memory_gib() < 1024
