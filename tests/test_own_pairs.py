"""Preferences of a user's own: every shape, every bad row on record, a split that leaks nothing, a fair gate."""

import json

import own_files
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from deepseek_cookbook.evaluate.metrics import wilson
from deepseek_cookbook.pipeline import PHASES, phase_key
from deepseek_cookbook.reward.gate import GateConfig, check_gate, gate, load_gate, reward_phase
from deepseek_cookbook.reward.model import RewardModelConfig
from deepseek_cookbook.reward.pairs import PairError, text_of
from deepseek_cookbook.reward.source import load_preferences, reward_sides, split_pairs, whose
from deepseek_cookbook.settings import RunFolder, load_settings, read_jsonl

ASK, YES, NO = "Why is grass green?", "It holds chlorophyll.", "No idea at all, sorry."


def turn(role, text):
    return dict(role=role, content=text)


SHAPES = {
    "trl": dict(prompt=ASK, chosen=YES, rejected=NO),
    "trl messages": dict(prompt=[turn("user", ASK)], chosen=[turn("assistant", YES)], rejected=[turn("assistant", NO)]),
    "trl implicit": dict(chosen=[turn("user", ASK), turn("assistant", YES)],
                         rejected=[turn("user", ASK), turn("assistant", NO)]),
    "ultrafeedback": dict(prompt=ASK, prompt_id="p1", chosen=[turn("user", ASK), turn("assistant", YES)],
                          rejected=[turn("user", ASK), turn("assistant", NO)], score_chosen=8.0, score_rejected=2.0,
                          messages=[turn("user", ASK), turn("assistant", YES)]),
    "hh": dict(chosen=f"\n\nHuman: {ASK}\n\nAssistant: {YES}", rejected=f"\n\nHuman: {ASK}\n\nAssistant: {NO}"),
    "alpaca": dict(instruction="Answer.", input=ASK, chosen=YES, rejected=NO),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_read(tmp_path, shape):
    file = own_files.write(tmp_path / "pairs.jsonl", [SHAPES[shape]])
    (pair,), rejected = load_preferences(file)
    assert not rejected and pair["provenance"] == "unstated"
    assert text_of(pair["prompt"]).endswith(ASK)
    assert (text_of(pair["chosen"]), text_of(pair["rejected"])) == (YES, NO)


def test_several_files_by_list_and_by_pattern(tmp_path):
    files = [own_files.write(tmp_path / f"{n}.jsonl", [SHAPES[n]]) for n in ("trl", "hh")]
    for source in (files, tuple(map(str, files)), str(tmp_path / "*.jsonl"), ",".join(map(str, files))):
        assert len(load_preferences(source)[0]) == 2


def test_bad_rows_are_put_aside_with_place_field_and_reason(tmp_path):
    rows = [*own_files.pairs(40), dict(prompt="a", chosen="b"), dict(prompt="a", chosen="b", rejected="b")]
    file = own_files.write(tmp_path / "pairs.jsonl", rows)
    pairs, rejected = load_preferences(file)
    assert len(pairs) == 40
    assert [(r["file"], r["line"], r["field"]) for r in rejected] == [(str(file), 41, "rejected"),
                                                                     (str(file), 42, "rejected")]
    assert all(r["reason"] and r["detail"] and r["row"] for r in rejected)
    with pytest.raises(PairError, match=r"above reward_model.max_rejected = 0.01"):
        load_preferences(file, 0.01)


def test_a_missing_file_is_told_by_its_setting(tmp_path):
    with pytest.raises(PairError, match="reward_model.source"):
        load_preferences(tmp_path / "none*.jsonl")
    with pytest.raises(PairError, match="No such file"):
        load_preferences(tmp_path / "none.jsonl")


answers = st.lists(st.tuples(st.sampled_from("abc"), st.booleans(), st.integers(0, 10**6)), min_size=1, max_size=30,
                   unique_by=lambda x: x[2])  # fmt: skip


@examples(deadline=None, max_examples=60)
@given(answers)
def test_labelled_answers_are_paired_once_each_and_none_is_lost(tmp_path_factory, rows):
    file = own_files.write(tmp_path_factory.mktemp("kto") / "kto.jsonl",
                           [dict(prompt=q, completion=f"answer {n}", label=good) for q, good, n in rows])
    counts = {q: [sum(1 for a, good, _ in rows if a == q and good is side) for side in (True, False)] for q in "abc"}
    want = sum(min(c) for c in counts.values())
    if not want:
        with pytest.raises(PairError, match="no question has a good and a bad one"):
            load_preferences(file)
        return
    pairs, rejected = load_preferences(file)
    assert len(pairs) == want and 2 * len(pairs) + len(rejected) == len(rows)
    label = {f"answer {n}": (q, good) for q, good, n in rows}
    for p in pairs:
        asked = text_of(p["prompt"])
        assert label[text_of(p["chosen"])] == (asked, True) and label[text_of(p["rejected"])] == (asked, False)
    used = [text_of(p[k]) for p in pairs for k in ("chosen", "rejected")]
    assert len(set(used)) == len(used)
    assert all(r["reason"] == "unpaired" and r["field"] == "label" for r in rejected)


def test_a_label_that_says_nothing_is_a_fault(tmp_path):
    file = own_files.write(tmp_path / "kto.jsonl", [dict(prompt="q", completion="a", label="maybe")])
    with pytest.raises(PairError, match="label: found 'maybe', write true or false"):
        load_preferences(file)


@examples(deadline=None, max_examples=30)
@given(st.integers(12, 60), st.integers(1, 3), st.integers(0, 99))
def test_no_question_is_on_two_sides(n, copies, seed):
    pairs = [p | dict(rejected=f"{p['rejected']} {k}") for p in own_files.pairs(n) for k in range(copies)]
    sides = split_pairs(pairs, 200, 32, seed)
    asked = {name: {p["prompt"] for p in side} for name, side in sides.items()}
    assert sum(map(len, sides.values())) == len(pairs) and all(sides.values())
    assert not (asked["train"] & asked["heldout"] or asked["train"] & asked["validation"]
                or asked["heldout"] & asked["validation"])
    assert split_pairs(pairs, 200, 32, seed) == sides


def test_heldout_and_validation_are_upper_limits(tmp_path):
    sides = split_pairs(own_files.pairs(60), heldout=6, validation=2)
    assert {k: len(v) for k, v in sides.items()} == dict(train=52, validation=2, heldout=6)


def test_provenances_of_one_file_stay_as_they_come(tmp_path):
    from deepseek_cookbook.reward.pairs import to_preference

    rows = [p | dict(provenance="human" if i % 3 else "ai") for i, p in enumerate(own_files.pairs())]
    file = own_files.write(tmp_path / "pairs.jsonl", rows)
    sides, rejected, facts = reward_sides(RewardModelConfig(source=str(file)))
    assert not rejected and facts["described"]["provenance"] == dict(ai=20, human=40)
    assert len(to_preference(sides["train"])) == len(sides["train"])


def test_without_a_source_all_is_as_before():
    from deepseek_cookbook.reward.pairs import bank_pairs

    config = RewardModelConfig(pairs=20, heldout=10, validation=4)
    sides, rejected, facts = reward_sides(config, 7)
    train, heldout, ood = bank_pairs(24, 7, 10, config.chinese)
    assert sides == dict(train=train[4:], validation=train[:4], heldout=heldout, ood=ood)
    assert rejected == [] and facts["whose"] == whose("", "pairs") == "the built-in bank desk"


# ---------------------------------------------------------------- the gate on few pairs


def truth(prompts, completions, **columns):
    return [float("zzz" not in text_of(c).lower() and "哼" not in text_of(c)) for c in completions]


@pytest.mark.parametrize("n", [3, 7])
def test_too_few_held_out_pairs_are_told_in_numbers(n):
    report = gate(truth, own_files.pairs(n))
    low = next(r for r in report.rows if r["name"] == "lower end of its interval")
    assert low["passed"] is False and f"{wilson(n, n)[0]:.3f}" in low["limit"] and "hold out 8 pairs" in low["limit"]
    with pytest.raises(RuntimeError, match=f"{n} pairs, all right, give"):
        check_gate(report)
    assert gate(truth, own_files.pairs(8)).passed


def test_a_part_of_few_pairs_is_reported_and_no_failure():
    "Right in 22 of 24 pairs; the two wrong ones are all of a dimension, one of them one of two length-matched pairs."
    pairs = [p | dict(dimension="rare" if i < 2 else "usual") for i, p in enumerate(own_files.pairs(24))]
    pairs = [p | dict(chosen="good " * (6 + 8 * (i % 2)), rejected="zzz " * 10) if i > 2 else p
             for i, p in enumerate(pairs)]
    wrong = {p["prompt"] for p in pairs[:2]}

    def reward(prompts, completions, **columns):
        return [-s if p in wrong else s for p, s in zip(prompts, truth(prompts, completions), strict=True)]

    report = gate(reward, pairs)
    rows = {r["name"]: r for r in report.rows}
    assert rows["accuracy: rare"]["value"] == 0 and rows["accuracy: rare"]["passed"] is None
    assert "2 pairs" in rows["accuracy: rare"]["limit"]
    assert rows["drop on length-matched"]["n"] == 2 and rows["drop on length-matched"]["passed"] is None
    assert report.passed
    none = gate(reward, pairs[3:])
    assert next(r for r in none.rows if r["name"] == "drop on length-matched")["limit"] == "not measurable: no pairs"


def test_a_limit_of_one_is_told_too():
    assert "more than any number" in str(gate(truth, own_files.pairs(20), config=GateConfig(accuracy_low=1.0)).rows)


# ---------------------------------------------------------------- the phase


def test_the_phase_trains_on_own_pairs_and_passes(tmp_path):
    file = own_files.write(tmp_path / "my_pairs.jsonl", [*own_files.pairs(), dict(prompt="?")])
    chosen = load_settings("tiny", [f"reward_model.source={file}", "reward.disable_tqdm=true", "reward.max_steps=20",
                                    "reward.eval_steps=10", "reward.save_steps=10"])
    result = reward_phase(chosen, RunFolder(tmp_path / "run"))
    folder = tmp_path / "run/reward"
    counts = {n: len(read_jsonl(folder / f"{n}.jsonl")) for n in ("train", "validation", "heldout", "ood")}
    assert counts == result["pairs"] and sum(counts.values()) == 60 and counts["heldout"] == 12 and counts["ood"] == 0
    assert result["whose"] == "your pairs: my_pairs.jsonl" and result["passed"] and check_gate(load_gate(folder))
    assert [r["line"] for r in read_jsonl(folder / "rejected.jsonl")] == [61]
    assert not {"intent", "reply"} & set(json.dumps(read_jsonl(folder / "train.jsonl")).split('"'))


@pytest.mark.parametrize("setting", ["reward_model.source={0}", 'reward_model.source=["{0}"]',
                                     "reward_model.source={1}", "reward_model.source={0},{0}"])
def test_the_key_changes_with_the_files(tmp_path, setting):
    file, keys = tmp_path / "rows.jsonl", set()
    phase = next(p for p in PHASES if p.name == "reward")
    for text in ("one", "two"):
        file.write_text(text)
        settings = load_settings("tiny", [setting.format(file, tmp_path / "*.jsonl")])
        keys.add(phase_key(phase, settings, RunFolder(tmp_path / "nowhere")))
    assert len(keys) == 2
