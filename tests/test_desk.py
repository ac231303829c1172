"""The bank desk: demonstrations of mixed quality whose flaw is known, and sides that share no text."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_cookbook.data import desk as desk_module
from deepseek_cookbook.data.desk import DIMENSIONS, desk_records, gold_score, load_desks, of_side
from deepseek_cookbook.data.formats import DataError, check_record
from deepseek_cookbook.data.split import question_of


@given(st.sampled_from(["english", "chinese"]), st.sampled_from(["train", "held"]), st.floats(0, 1), st.integers(0, 99))
def test_the_flaw_is_what_the_rule_finds(language, side, flawed, seed):
    for r in desk_records(language, 20, side, flawed, seed):
        score = gold_score(r["instruction"], r["output"], r["extra"]["intent"])
        assert check_record(r) == []
        assert [d for d in DIMENSIONS if not score[d]] == [r["extra"]["flaw"]] * (r["extra"]["flaw"] != "none")


def test_flawed_is_a_share_and_the_form_is_rarely_broken():
    flaws = Counter(r["extra"]["flaw"] for r in desk_records(n=480))
    assert 0.4 < flaws["none"] / 480 < 0.6 and flaws["form"] < 0.08 * 480
    assert all(flaws[d] > 20 for d in ("label", "polite", "concise", "safe"))
    assert {r["extra"]["flaw"] for r in desk_records(n=60, flawed=0)} == {"none"}


def test_no_template_and_no_slot_is_on_both_sides():
    asked = {side: {question_of(r) for r in desk_records(n=200, side=side)} for side in ("train", "held")}
    assert not asked["train"] & asked["held"]
    texts = list("abcdefghij")
    assert sorted(of_side(texts, "train") + of_side(texts, "held")) == texts == of_side(texts, "all")


def test_the_same_seed_draws_the_same_records():
    assert desk_records(n=50) == desk_records(n=50) != desk_records(n=50, seed=1)
    assert desk_records(n=30) == desk_records(n=50)[:30]


@pytest.mark.parametrize("wrong", [dict(language="french"), dict(n=0), dict(flawed=1.5)])
def test_what_cannot_be_drawn_is_refused(wrong):
    with pytest.raises(DataError, match="desk"):
        desk_records(**wrong)


def test_every_layout_but_the_right_one_breaks_the_form():
    for layout in load_desks()["form"]:
        answer = layout.replace("{i}", "card").replace("{r}", "Thank you, we block the card at once.")
        assert gold_score("I lost my card in Oslo.", answer)["form"] == 0


def test_a_desk_with_too_few_texts_says_so(monkeypatch):
    few = {name: [texts[2]] for name, texts in load_desks()["bank.en"]["intents"]["card"].items()}
    desk = load_desks()["bank.en"] | dict(intents=dict(card=few), slots=dict(city=["Rome"]), polite=["Thank you, "])
    monkeypatch.setattr(desk_module, "load_desks", lambda: {"form": ["{r}"], "bank.en": desk})
    with pytest.raises(DataError, match="only 1 of 5"):
        desk_records(n=5, side="all", flawed=0)
