"""The forgetting kit: the front against its definition, no leak from held-out text, runs that start from one base."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek_cookbook.data.mix import python_texts
from deepseek_cookbook.models import load_model, load_tokenizer
from deepseek_cookbook.settings import load_settings, read_jsonl
from deepseek_cookbook.sft.forgetting import (
    ForgettingError,
    General,
    Variant,
    changed,
    licence_texts,
    loss_change,
    measure,
    over_seeds,
    pareto,
    plot_pareto,
    run_variant,
    split_general,
    text_nll,
    variant_settings,
    variants,
    with_knowledge,
)
from deepseek_cookbook.sft.train import TrainConfig, general_texts, with_replay

RECORDS = [dict(instruction=f"What is {i} + 1?", input="", output=f"It is {i + 1}.", history=[]) for i in range(40)]
SETTINGS = ["sft.max_steps=3", "sft.per_device_train_batch_size=4"]


def row(name: str, target: float, old: float, seed: int = 0, **more) -> dict:
    loss = lambda x: dict(before=1.0, after=1 + x, rise=x, low=x - 0.1, high=x + 0.2)  # noqa: E731
    return dict(variant=name, seed=seed, losses=dict(target=loss(target), old=loss(old)), grad_norm=[1.0, 2.0, 3.0],
                seconds=1.0, cpu_seconds=1.0, trainable_share=1.0) | more  # fmt: skip


# ---------------------------------------------------------------- the front


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=1, max_size=12))
def test_the_front_is_what_nothing_dominates(points):
    front = pareto([row(str(i), x, y) for i, (x, y) in enumerate(points)], "old")
    kept = [(r["losses"]["target"]["rise"], r["losses"]["old"]["rise"]) for r in front]
    alone = {(x, y) for x, y in points if not any(p <= x and q <= y and (p, q) != (x, y) for p, q in points)}
    assert sorted(alone) == kept  # each once, the largest gain first


def test_the_plot_has_a_point_with_both_intervals_for_each_row():
    rows = [row("full", -0.3, 0.2), row("LoRA", -0.2, 0.1)]
    figure = plot_pareto(rows)
    (axis,) = figure.axes
    for container, r in zip(axis.containers, rows, strict=True):
        x, y = 100 * r["losses"]["old"]["rise"], -100 * r["losses"]["target"]["rise"]
        assert container.lines[0].get_xydata().tolist() == [[x, y]]
        wide, high = (bars.get_segments()[0] for bars in container.lines[2])
        np.testing.assert_allclose(wide, [[x - 10, y], [x + 20, y]])
        np.testing.assert_allclose(high, [[x, y - 20], [x, y + 10]])  # low rise is high fall


# ---------------------------------------------------------------- text


def test_held_out_passages_are_nowhere_else_not_even_as_near_copies():
    copy = "The quick brown fox jumps over the lazy dog and runs {} the dark wood to the far river."
    texts = [copy.format(w) for w in ("through", "into", "out of")]
    texts += [f"Passage {i} is about {i * i}." for i in range(9)]
    general = split_general({"a": texts, "b": python_texts()[:40]}, held=5, seed=3)
    assert len(general.held["a"]) == len(general.held["b"]) == 5
    assert not {t for h in general.held.values() for t in h} & set(general.known)
    assert set(general.old) < set(general.known) and set(general.old) <= set(texts)
    assert sum(t in texts[:3] for t in general.held["a"] + general.old) == 1
    assert split_general({"a": texts}, 5, seed=4).held != split_general({"a": texts}, 5, seed=5).held


def test_too_little_text_or_a_missing_package_is_said():
    with pytest.raises(ForgettingError, match="mine: 1 different passages, and 1"):
        split_general({"mine": ["One."]}, held=1)
    with pytest.raises(ForgettingError, match="no-such-package"):
        licence_texts(("torch", "no-such-package"))


def test_the_two_kinds_are_prose_and_share_no_passage():
    licences = licence_texts()
    assert len(licences) > 60 and licences == sorted(set(licences))
    assert all(120 <= len(t) <= 600 and "\n" not in t for t in licences)
    assert not set(licences) & set(python_texts())


def test_replay_and_ewc_read_old_passages_only(tmp_path):
    general = split_general({"python": python_texts()}, held=100)
    (tmp_path / "old.txt").write_text("\n\n".join(general.old))
    config = TrainConfig(replay=0.3, general=str(tmp_path / "old.txt"))
    assert general_texts(config) == general.old
    replayed = [r["input"] + r["output"] for r in with_replay(RECORDS, config, 0)[len(RECORDS) :]]
    assert replayed and set(replayed) <= set(general.old)


# ---------------------------------------------------------------- measuring


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-deepseek-v3"])
def test_nats_of_plain_text_in_batches_are_those_of_each_alone(name):
    model, tokenizer = load_model(name).eval(), load_tokenizer(name)
    texts = ["One.", *python_texts()[:4], "Three words here."]
    nats, tokens = text_nll(model, tokenizer, texts, batch_tokens=300)
    for text, nat, n in zip(texts, nats, tokens, strict=True):
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.inference_mode():
            logp = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        assert n == ids.shape[1] - 1
        assert nat == pytest.approx(-float(logp[range(n), ids[0, 1:]].sum()), rel=1e-4)


def test_a_rise_has_the_sign_of_the_rise_and_divergence_is_an_error():
    nats, tokens = np.array([2.0, 4.0, 6.0]), np.array([1, 2, 3])
    worse = loss_change(nats, tokens, nats * [1.1, 1.2, 1.3])
    assert (worse["before"], worse["after"]) == pytest.approx((2.0, (2.2 + 4.8 + 7.8) / 6))
    assert worse["rise"] == pytest.approx(worse["after"] / 2 - 1)
    assert 0 < worse["low"] < worse["rise"] < worse["high"]
    with pytest.raises(ForgettingError, match="learning_rate"):
        loss_change(nats, tokens, nats * [1, float("nan"), 1])


def test_means_over_seeds_have_students_interval():
    rows = [row("full", x, 2 * x, seed) for seed, x in enumerate((0.1, 0.2, 0.6))] + [row("LoRA", 0.5, 0.5)]
    mean, single = over_seeds(rows)
    assert single == rows[-1] and mean["seed"] == [0, 1, 2]
    assert mean["losses"]["target"]["rise"] == pytest.approx(0.3)
    half = 4.302653 * math.sqrt((0.2**2 + 0.1**2 + 0.3**2) / 2) / math.sqrt(3)
    assert mean["losses"]["old"]["high"] - mean["losses"]["old"]["rise"] == pytest.approx(2 * half, rel=1e-3)


# ---------------------------------------------------------------- variants and runs


def test_a_variant_changes_its_own_keys_and_no_run_stops_early():
    settings = load_settings("tiny", SETTINGS)
    kit = variants(ewc=(1e2, 1e4))
    assert len({v.name for v in kit}) == len(kit) == 10
    plain = variant_settings(settings, kit[0], "old.txt", 7)
    for variant in kit:
        own = variant_settings(settings, variant, "old.txt", 7)
        assert own["train"]["full"] == variant.full == variant.name.startswith("full")
        assert own["sft"]["learning_rate"] == pytest.approx(settings["sft"]["learning_rate"] * variant.rate)
        assert own["sft"]["max_steps"] == 3 and not own["sft"]["load_best_model_at_end"]
        assert own["run"]["seed"] == 7 and own["train"]["general"] == "old.txt"
        different = {s for s in own.values if own[s] != plain[s]} - {"model", "train", "sft"}
        assert different == set(variant.changes) - {"train"}
        for section in ("train", "loss", "optim", "monitor", "model"):
            own.build(section)
    assert settings["train"].get("full") is None and changed(settings) == settings


def test_a_model_with_real_weights_is_not_taught(tmp_path):
    settings = load_settings("laptop")
    assert with_knowledge(settings, ["text"], 5, tmp_path) is settings
    assert not list(tmp_path.iterdir())


@pytest.mark.learning
def test_a_toy_learns_first_and_is_the_base_of_all_runs(tmp_path, seed, spread):
    "Ten seeds, five of them in FP32 with AVX2: 0.69 to 0.70 of the loss is left."
    settings = load_settings("tiny", [*SETTINGS, f"run.seed={seed}"])
    general = split_general({"python": python_texts()}, held=6)
    tokenizer, raw = load_tokenizer("tiny-llama"), load_model("tiny-llama")
    ready = with_knowledge(settings, general.known, 20, tmp_path / "base")
    taught = load_model(**ready["model"])
    before, empty = (measure(m, tokenizer, RECORDS[:8], general, settings) for m in (taught, raw))
    left = before["python"][0].sum() / empty["python"][0].sum()  # of the loss of passages that it has not seen
    assert spread("loss left", left) < 0.95
    kit = {v.name: v for v in variants(ewc=(10.0,))}
    rows = {}
    for name in ("full", "full, EWC 1e1", "LoRA, KL 0.2"):
        rows[name] = run_variant(ready, kit[name], RECORDS[8:], RECORDS[:8], general, before, tmp_path / "run", seed)
        assert not (tmp_path / "run" / "model").exists()
        assert all(x["before"] == pytest.approx(before[k][0].sum() / before[k][1].sum())
                   for k, x in rows[name]["losses"].items())  # fmt: skip
    full, ewc, lora = rows.values()
    assert full["trainable_share"] == 1 and 0 < lora["trainable_share"] < 0.2
    spread("rise", full["losses"]["target"]["rise"])  # of either sign after three steps
    assert full["losses"] != ewc["losses"]
    assert full["steps"] == 3 and full["grad_norm"] == sorted(full["grad_norm"]) and full["grad_norm"][0] > 0
    assert len([r for r in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "grad_norm" in r]) == 3
    again = run_variant(ready, kit["full"], RECORDS[8:], RECORDS[:8], general, before, tmp_path / "again", seed)
    assert again["losses"] == full["losses"]  # one base, one seed, one result


def test_a_run_that_learns_nothing_changes_nothing(tmp_path):
    settings = load_settings("tiny", [*SETTINGS, "model.name=tiny-qwen2"])
    general = General(["Old text that nobody reads."], [], {"python": python_texts()[:4]})
    model, tokenizer = load_model("tiny-qwen2"), load_tokenizer("tiny-qwen2")
    before = measure(model, tokenizer, RECORDS[:8], general, settings)
    still = replace(Variant("still"), rate=0.0)
    losses = run_variant(settings, still, RECORDS[8:], RECORDS[:8], general, before, tmp_path / "run")["losses"]
    assert all(abs(x["rise"]) < 1e-6 for x in losses.values())
