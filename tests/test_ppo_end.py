"""How a run of PPO ends: what its last rows say, which checkpoint it goes back to, and what is kept for that.

The story behind it: on a user's own reward a policy collapsed in the last three of fourteen steps, 47 tokens to 9 and
KL 2.0 at a limit of 1.0. The median of five with a patience of three said nothing, and step 14 was kept as the best.
"""

import shutil
import tempfile
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_ppo import logged, trainer

from deepseek_cookbook.guards import Action, Guard, MonitorConfig, Watch, at_the_end, judge, last_healthy, make_guards
from deepseek_cookbook.guards import sick_steps as sick_of
from deepseek_cookbook.ppo import train as T
from deepseek_cookbook.ppo.checkpoints import best_step, checkpoint_folder, checkpoints, forget, refused_steps
from deepseek_cookbook.reward.combine import RunningNorm, combine
from deepseek_cookbook.runlog import MetricsLog
from deepseek_cookbook.settings import write_json

OURS = MonitorConfig(kl_growth_max=None, ppo_loss_band=None, grad_norm_band=None, reward_slope_min=None)


def scripted(monkeypatch, **series):
    "The steps of a run have these numbers; the reward rises, so that each checkpoint is better than the one before."
    plain, step = T.measure, iter(range(10**6))

    def measure(batch):
        i = next(step)
        told = {k: float(v[i]) for k, v in series.items() if i < len(v)}
        return plain(batch) | dict(reward=i / 10, kl=0.1, completion_length=47.0, distinct=1.0, entropy=2.0) | told

    monkeypatch.setattr(T, "measure", measure)


def story(sick, steps=14):
    "KL and lengths of a run whose last steps collapse."
    well = steps - sick
    return dict(kl=[0.1] * well + [1.3, 1.6, 2.0][-sick:], completion_length=[47.0] * well + [13.0, 9.0, 9.0][-sick:])


def events(run):
    return [(r["event"], r["guard"], r["step"]) for r in run.log.rows if "event" in r]


# ---------------------------------------------------------------- the trainer


@pytest.mark.parametrize("sick", [1, 2, 3])
def test_a_collapse_in_the_last_steps_is_seen_and_not_kept(tmp_path, monkeypatch, sick):
    "Row 12 is the first sick one of three; it was measured on the weights of checkpoint 11."
    scripted(monkeypatch, **story(sick))
    run = trainer(tmp_path, 14, guards=make_guards(OURS), save_steps=1)
    figures = run.train()
    assert figures["stopped"] == dict(guard="kl_max", step=14, since=14 - sick) and figures["steps"] == 14
    assert figures["sick_at_end"] == ["length", "kl_max"]
    assert figures["restored_to"] == 14 - sick - 1
    assert events(run) == [("note", "length", 14), ("stop_restore", "kl_max", 14), ("restored", "kl_max", 14)]
    assert best_step(checkpoints(tmp_path)) == 14  # what the run went back to before: the objective alone


def test_a_finished_run_gets_the_same_verdict_again(tmp_path, monkeypatch):
    scripted(monkeypatch, **story(3))
    first = trainer(tmp_path, 14, guards=make_guards(OURS), save_steps=1)
    figures = first.train()
    again = trainer(tmp_path, 14, guards=make_guards(OURS), save_steps=1)
    same = ("stopped", "restored_to", "sick_at_end", "steps", "events")
    assert {k: again.train()[k] for k in same} == {k: figures[k] for k in same}
    assert again.log.rows == first.log.rows  # nothing is written twice


def test_a_run_that_is_made_longer_goes_on(tmp_path, monkeypatch):
    "Its end was a spike, and lies in its middle now: the checkpoint of the spike is refused, and nothing else."
    scripted(monkeypatch, kl=[0.1] * 7 + [1.4] + [0.1] * 20)
    figures = trainer(tmp_path, 8, guards=make_guards(OURS), save_steps=1).train()
    assert figures["stopped"]["guard"] == "kl_max" and figures["restored_to"] == 6
    longer = trainer(tmp_path, 12, guards=make_guards(OURS), save_steps=1).train()
    assert (longer["steps"], longer["stopped"], longer["sick_at_end"], longer["restored_to"]) == (12, None, [], 12)


def test_a_guard_that_only_notes_still_has_a_say_in_what_is_best(tmp_path, monkeypatch):
    scripted(monkeypatch, **story(3))
    run = trainer(tmp_path, 14, guards=make_guards(replace(OURS, kl_max=None)), save_steps=1)
    figures = run.train()
    assert (figures["stopped"], figures["sick_at_end"], figures["restored_to"]) == (None, ["length"], 10)
    told = [r["message"] for r in run.log.rows if r.get("event") == "restored"]
    assert told == ["weights of step 10: the best one, refused ones last; by objective alone: 14"]


def test_bands_of_the_articles_have_no_say(tmp_path, monkeypatch):
    "All four speak in every run; a wild last step is noise for them, and the last checkpoint is the best."
    scripted(monkeypatch, kl=[0.06 * i for i in range(14)], reward=[0.01 * i for i in range(14)])
    run = trainer(tmp_path, 14, guards=make_guards(MonitorConfig(finite_metrics=())), save_steps=1)
    figures = run.train()
    assert {"grad_norm", "ppo_loss"} <= {guard for _, guard, _ in events(run)}
    assert (figures["stopped"], figures["sick_at_end"], figures["restored_to"]) == (None, [], 14)


@pytest.mark.parametrize("spike", [2, 7, 13])
def test_one_wild_step_in_the_middle_costs_one_checkpoint(tmp_path, monkeypatch, spike):
    scripted(monkeypatch, kl=[9.0 if step == spike else 0.1 for step in range(1, 15)])
    run = trainer(tmp_path, 14, guards=make_guards(OURS), save_steps=1, save_total_limit=20)
    figures = run.train()
    assert (figures["stopped"], figures["restored_to"], events(run)) == (None, 14, [])
    assert refused_steps(run.watch.guards, run.log.rows) == {spike - 1}


@pytest.mark.parametrize("save_steps, keep, back", [(1, 1, 10), (2, 1, 10), (5, 1, 10), (1, 2, 10), (3, 1, 9)])
def test_what_the_end_goes_back_to_is_still_there(tmp_path, monkeypatch, save_steps, keep, back):
    scripted(monkeypatch, **story(3))
    run = trainer(tmp_path, 14, guards=make_guards(OURS), save_steps=save_steps, save_total_limit=keep)
    assert run.train()["restored_to"] == back


@pytest.mark.parametrize("save_steps, back", [(1, 12), (2, 12), (5, 10)])
def test_a_guard_that_waits_keeps_what_it_would_go_back_to(tmp_path, monkeypatch, save_steps, back):
    "The reward rises in every step and the guard waits for five: two newest and a best one were all sick, and 0."
    scripted(monkeypatch)
    late = Guard("late", "reward", lambda s: s.steps > 12, Action.STOP, patience=5)
    figures = trainer(tmp_path, 30, guards=[late], save_steps=save_steps, save_total_limit=2).train()
    assert figures["stopped"] == dict(guard="late", step=17, since=12) and figures["restored_to"] == back


def test_a_guard_that_would_stop_and_knows_no_single_points_is_judged_by_its_rule(tmp_path, monkeypatch):
    scripted(monkeypatch)
    late = Guard("late", "reward", lambda s: s.steps > 12, Action.STOP, patience=5)
    figures = trainer(tmp_path, 14, guards=[late], save_steps=1).train()
    assert (figures["sick_at_end"], figures["stopped"]["since"], figures["restored_to"]) == (["late"], 12, 12)


def slowing(step):
    "The raw reward of the case: 0 to 1 in ten steps, then a hundredth a step."
    return min(step / 10, 1.0) + 0.01 * max(0, step - 10)


def normalised():
    "That reward, with a running normalisation inside."
    step = iter(range(10**6))

    def rising(prompts, completions, **columns):
        now = next(step)
        return [slowing(now) + 0.01 * i for i in range(len(completions))]

    return combine(dict(a=rising), dict(a=1.0), dict(a=RunningNorm()))


def test_the_best_checkpoint_is_not_an_early_one_because_the_norm_has_moved(tmp_path):
    run = trainer(tmp_path, 40, normalised(), save_steps=5, save_total_limit=20)
    assert run.train()["restored_to"] == 40
    assert np.argmax(logged(run, "reward")) < 15  # what is learnt from falls, although the raw reward never does
    assert (np.diff(logged(run, "objective")) > 0).all()


def test_the_first_scale_is_in_the_checkpoint(tmp_path):
    "A run that was cut off measures its objective as the straight one does."
    straight = trainer(tmp_path / "straight", 6, normalised(), save_steps=3, save_total_limit=9)
    straight.train()
    shutil.copytree(tmp_path / "straight", tmp_path / "cut")
    shutil.rmtree(checkpoint_folder(tmp_path / "cut", 6))
    reward = normalised()
    for _ in range(3):
        reward.rewards["a"].fn([], [])  # its clock goes on, too
    cut = trainer(tmp_path / "cut", 6, reward, save_steps=3, save_total_limit=9)
    assert cut.train()["resumed_from"] == 3
    assert logged(cut, "objective") == logged(straight, "objective")


# ---------------------------------------------------------------- any history

numbers = st.lists(st.tuples(st.floats(0, 2), st.floats(1, 60), st.floats(-1, 1)), min_size=1, max_size=14)


def replayed(rows, guards, folder=None, keep=1, save_steps=1):
    "The log of a run with these numbers, its checkpoints (forgotten in a folder, or all), and its stop."
    log, stopped, found = MetricsLog("nowhere", write=False), [], {0: dict(objective=None)}
    watch = Watch(log, guards, {Action.STOP: stopped.append})
    for step, (kl, length, objective) in enumerate(rows, 1):
        watch.step(step, kl=kl, completion_length=length)
        if step % save_steps == 0 or step == len(rows) or stopped:
            found[step] = dict(objective=objective)
        if folder and step in found:
            write_json(checkpoint_folder(folder, step) / "state.json", found[step])
            if not stopped:
                forget(folder, keep, refused_steps(guards, log.rows), last_healthy(guards, log.rows))
        if stopped:
            break
    else:
        watch.end()
    return log.rows, found, min((d.since for d in stopped), default=None)


@settings(max_examples=80, deadline=None)
@given(numbers, st.integers(1, 3))
def test_the_best_one_is_never_refused_where_another_is_there(rows, save_steps):
    guards = make_guards(replace(OURS, window=3, patience=2))
    log, found, until = replayed(rows, guards, save_steps=save_steps)
    best = best_step(found, until, refused_steps(guards, log))
    fit = [step for step in found if until is None or step <= until]

    def gone(step):  # by a loop: the row after it is sick, or it is the newest and the last row is
        kl, length, _ = rows[min(step + 1, max(r["step"] for r in log)) - 1]
        begin = np.median([r[1] for r in rows[:3]])
        late = min(step + 1, max(r["step"] for r in log)) > 3
        return kl > 1.0 or late and length < 0.3 * begin

    assert gone(best) == all(gone(step) for step in fit)
    assert gone(best) == (best in refused_steps(guards, log))


@settings(max_examples=60, deadline=None)
@given(numbers, st.integers(1, 3), st.integers(1, 3))
def test_nothing_that_a_run_would_go_back_to_is_forgotten(rows, keep, save_steps):
    guards = make_guards(replace(OURS, window=3, patience=2))
    with tempfile.TemporaryDirectory() as folder:
        write_json(checkpoint_folder(folder, 0) / "state.json", dict(objective=None))
        log, found, until = replayed(rows, guards, folder, keep, save_steps)
        refused = refused_steps(guards, log)
        assert best_step(checkpoints(folder), until, refused) == best_step(found, until, refused)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 2), min_size=1, max_size=14), st.sampled_from(["kl_max", "length", "finite:kl"]))
def test_a_run_ends_sick_where_its_last_row_is(values, name):
    guard = next(g for g in make_guards() if g.name == name)
    rows = [{"step": i, guard.metric: v} for i, v in enumerate(values, 1)]
    decision = judge(at_the_end(guard), rows)
    assert (decision is not None) == (len(values) in sick_of([guard], rows))
    if decision:
        healthy = {r["step"] for r in rows} - sick_of([guard], rows)
        assert decision.since == max(healthy, default=0) and decision.step == len(values)


def test_the_end_is_no_word_that_a_guard_has_said():
    "What was told of an end does not silence a guard in the longer run, nor make it rest."
    guard = Guard("g", "x", lambda s: s.values > 1, Action.STOP, patience=3, window=5)
    rows = [dict(step=i, x=2.0 if i > 2 else 0.0) for i in range(1, 6)]
    event = dict(step=4, event="stop_restore", guard="g", message="")
    assert judge(guard, [*rows, event | dict(final=True)]).step == 5
    assert judge(guard, [*rows, event]) is None
