"""Preferences: read or refused with a reason, mixed only by shares, and a desk whose pairs differ in one thing."""

import json
import math
from collections import Counter
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_cookbook.data import desk as desk_module
from deepseek_cookbook.data.formats import DataError, chatterbot_records
from deepseek_cookbook.reward import pairs as pairs_module
from deepseek_cookbook.reward.pairs import (
    DIMENSIONS,
    PROVENANCES,
    WEIGHTS,
    PairError,
    answer_pairs,
    bank_pairs,
    describe_pairs,
    desk_pairs,
    gold_reward,
    gold_score,
    intent_of,
    lengths_match,
    load_desks,
    mix_pairs,
    read_pairs,
    text_of,
    to_pair,
    to_preference,
)


def row(**changes):
    return dict(prompt="2+2?", chosen="4", rejected="5", provenance="human") | changes


ASKED = [{"role": "user", "content": "2+2?"}]


@pytest.mark.parametrize(
    "given",
    [
        row(),
        row(prompt=ASKED, chosen=[{"role": "assistant", "content": "4"}]),
        dict(instruction="2+2?", chosen="4", rejected="5", provenance="human"),
        dict(instruction="2+2?", input="", history=[], chosen="4", rejected="5", provenance="human"),
        dict(messages=ASKED, chosen="4", rejected="5", provenance="human"),
        dict(conversations=[{"from": "human", "value": "2+2?"}], chosen={"from": "gpt", "value": "4"},
             rejected={"from": "gpt", "value": "5"}, provenance="human"),
        dict(chosen="\n\nHuman: 2+2?\n\nAssistant: 4", rejected="\n\nHuman: 2+2?\n\nAssistant: 5", provenance="human"),
    ],
)  # fmt: skip
def test_every_shape_gives_the_same_pair(given):
    pair, faults = to_pair(given)
    assert faults == []
    assert [m["content"] for m in pair["prompt"]] == ["2+2?"]
    assert (text_of(pair["chosen"]), text_of(pair["rejected"]), pair["provenance"]) == ("4", "5", "human")
    assert to_pair(pair) == (pair, [])


@pytest.mark.parametrize(
    "given, reason, field",
    [
        (row(rejected="4"), "equal_texts", "rejected"),
        (row(rejected="4 "), "equal_texts", "rejected"),
        (row(chosen=""), "blank", "chosen"),
        (row(rejected=" \n"), "blank", "rejected"),
        (row(prompt=" "), "blank", "chosen"),
        (dict(prompt="q", chosen="a", provenance="human"), "missing_field", "rejected"),
        (dict(chosen="a", rejected="b", provenance="human"), "missing_field", "prompt"),
        (dict(prompt="q", chosen="a", rejected="b"), "provenance", "provenance"),
        (row(provenance="Human"), "provenance", "Did you mean 'human'"),
        (row(provenance=["human"]), "provenance", "provenance"),
        (row(provenance=None), "provenance", "provenance"),
        (row(margin=-1), "margin", "margin"),
        (row(margin="1"), "margin", "margin"),
        (row(margin=float("nan")), "margin", "margin"),
        (row(margin=True), "margin", "margin"),
        (row(scores=dict(chosen=dict(a=1))), "scores", "scores"),
        (row(scores=dict(chosen=dict(a=1), rejected=dict(b=1))), "scores", "scores"),
        (row(scores=[1, 2]), "scores", "scores"),
        (row(instruction="also"), "malformed", "instruction"),
        (row(chosen=7), "malformed", "chosen"),
        (row(chosen=None), "malformed", "chosen"),
        (row(prompt=7), "malformed", ""),
        (dict(instruction=7, chosen="a", rejected="b", provenance="human"), "malformed", "instruction"),
        (dict(instruction="q", history="x", chosen="a", rejected="b", provenance="human"), "malformed", "history"),
        ([1], "malformed", "record"),
        ("text", "malformed", "record"),
        (None, "malformed", "record"),
    ],
)
def test_bad_rows_have_a_reason(given, reason, field):
    pair, faults = to_pair(given)
    assert pair is None and faults[0][0] == reason
    assert field in faults[0][1]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=8), x, max_size=3),
    max_leaves=6,
)
fields = ["prompt", "chosen", "rejected", "provenance", "margin", "scores", "instruction", "input", "history",
          "messages", "conversations", "system", "id"]  # fmt: skip


@given(
    st.dictionaries(st.sampled_from(fields), json_values | st.just("human") | st.just("a"), max_size=7) | json_values
)
def test_any_row_is_a_pair_or_has_faults(value):
    pair, faults = to_pair(value)
    assert (pair is None) == bool(faults)
    if pair:
        assert text_of(pair["chosen"]).strip() and text_of(pair["chosen"]) != text_of(pair["rejected"])
        assert pair["provenance"] in PROVENANCES


def write(path, rows):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows), encoding="utf-8")
    return path


def test_a_file_stops_at_its_bad_rows(tmp_path):
    path = write(tmp_path / "p.jsonl", [row(), row(rejected="4"), row(provenance="robot"), "{", row(id=1), row(id=1)])
    with pytest.raises(PairError) as caught:
        read_pairs(path)
    text = str(caught.value)
    assert "4 bad rows" in text
    for place in ("p.jsonl:2:rejected", "p.jsonl:3:provenance", "p.jsonl:4:line", "p.jsonl:6:id: 1 is that of line 5"):
        assert place in text


def test_bad_rows_go_aside_and_good_ones_are_as_they_were(tmp_path):
    bad = [row(rejected="4"), row(chosen=" "), "[1", row(margin=-2, provenance="x")]
    good = row(prompt="问？", margin=0.5, dimension="safe", length_matched=False, domain="d", note="n")
    path = write(tmp_path / "p.jsonl", [*bad, good])
    pairs = read_pairs(path, rejected=tmp_path / "rejected.jsonl")
    aside = [json.loads(line) for line in (tmp_path / "rejected.jsonl").open(encoding="utf-8")]
    assert [a["reason"] for a in aside] == ["equal_texts", "blank", "not_json", "provenance"]
    assert [a["row"] for a in aside][:2] == bad[:2] and len(aside[3]["detail"]) == 2
    kept = {k: pairs[0][k] for k in ("margin", "dimension", "length_matched", "domain", "provenance", "note")}
    assert len(pairs) == 1 and kept == {k: good[k] for k in kept}
    assert text_of(pairs[0]["prompt"]) == "问？"


def test_a_list_and_provenance_from_the_call(tmp_path):
    bare = {k: v for k, v in row().items() if k != "provenance"}
    (tmp_path / "p.json").write_text(" \n" + json.dumps([bare, bare | dict(prompt="3+3?")]))
    assert [p["provenance"] for p in read_pairs(tmp_path / "p.json", "synthetic")] == ["synthetic"] * 2
    write(tmp_path / "q.jsonl", [row(provenance="ai")])
    with pytest.raises(PairError, match="'ai' where 'human' was asked for"):
        read_pairs(tmp_path / "q.jsonl", "human")
    with pytest.raises(PairError, match="unknown"):
        read_pairs(tmp_path / "q.jsonl", "humans")
    write(tmp_path / "empty.jsonl", [])
    with pytest.raises(PairError, match="no pairs"):
        read_pairs(tmp_path / "empty.jsonl")
    write(tmp_path / "all_bad.jsonl", [row(rejected="4")])
    with pytest.raises(PairError, match="no pairs"):
        read_pairs(tmp_path / "all_bad.jsonl", rejected=tmp_path / "r.jsonl")
    assert (tmp_path / "r.jsonl").read_text().count("\n") == 1


def pool(provenance, n):
    return [to_pair(row(prompt=f"{provenance} {i}?", provenance=provenance))[0] for i in range(n)]


def test_provenances_never_mix_in_silence():
    both = pool("human", 4) + pool("ai", 9)
    with pytest.raises(PairError, match="ai 9, human 4"):
        mix_pairs(both)
    with pytest.raises(PairError, match="mix them with mix_pairs"):
        to_preference(both)
    assert len(mix_pairs(pool("human", 4))[0]) == 4
    with pytest.raises(PairError):
        mix_pairs([])


@pytest.mark.parametrize("shares", [dict(human=1), dict(human=1, ai=0), dict(human=1, ai=1, rule=1), {},
                                    dict(human=1, ai=float("nan")), dict(human=1, ai="2")])  # fmt: skip
def test_shares_must_be_said_for_each(shares):
    with pytest.raises(PairError, match="shares"):
        mix_pairs(pool("human", 4) + pool("ai", 9), shares)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 9), st.integers(1, 9), st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_mixtures_keep_their_shares_and_lose_nothing(humans, judged, a, b, seed):
    given = pool("human", humans) + pool("ai", judged)
    mixed, left, counts = mix_pairs(given, dict(human=a, ai=b), seed)
    names = [text_of(p["prompt"]) for p in mixed] + [text_of(r["row"]["prompt"]) for r in left]
    assert sorted(names) == sorted(text_of(p["prompt"]) for p in given)
    used = Counter(p["provenance"] for p in mixed)
    assert all(counts[k]["used"] == used[k] >= 1 for k in counts)
    size = min(humans * (a + b) / a, judged * (a + b) / b)
    assert abs(used["human"] - size * a / (a + b)) <= 1 and abs(used["ai"] - size * b / (a + b)) <= 1
    assert mixed == mix_pairs(given, dict(human=a, ai=b), seed)[0]
    assert len(to_preference(mixed)) == len(mixed)


def test_what_trl_gets():
    data = to_preference([to_pair(row(margin=0.5))[0]], margin=True)
    assert data.column_names == ["prompt", "chosen", "rejected", "margin"]
    with pytest.raises(PairError, match="pair 0: no margin"):
        to_preference([to_pair(row())[0]], margin=True)
    with pytest.raises(PairError, match="no pairs"):
        to_preference([])


def test_description_counts():
    a, b = to_pair(row(chosen="long answer"))[0], to_pair(row(chosen="5", rejected="long answer"))[0]
    c = to_pair(row(chosen="6", rejected="7"))[0]
    found = describe_pairs([a, a, c, to_pair(row(chosen="7", rejected="6"))[0], b])
    assert (found["pairs"], found["copies"], found["contradictions"]) == (5, 1, 2)
    assert (found["decided"], found["longer_chosen"], found["length_matched"]) == (3, 2, 2)


# ------------------------------------------------------------------ the desk


@pytest.fixture(scope="module")
def sets():
    return bank_pairs(n=200, seed=7, held=100)


def test_one_thing_is_wrong_and_lengths_are_true(sets):
    for pair in [p for rows in sets for p in rows if p["dimension"] in DIMENSIONS]:
        chosen, rejected = text_of(pair["chosen"]), text_of(pair["rejected"])
        assert set(gold_score(pair["prompt"], chosen).values()) == {1}
        assert [d for d, s in gold_score(pair["prompt"], rejected).items() if not s] == [pair["dimension"]]
        assert pair["scores"]["rejected"] == gold_score(pair["prompt"], rejected)
        assert intent_of(pair["prompt"]) == pair["intent"]
        assert pair["length_matched"] == (abs(len(chosen) - len(rejected)) < 0.1 * max(len(chosen), len(rejected)))
        gap = gold_reward([pair["prompt"]] * 2, [pair["chosen"], pair["rejected"]])
        assert math.isclose(gap[0] - gap[1], pair["margin"])
    assert Counter((p["dimension"], p["length_matched"]) for p in sets[0]) == {
        (d, m): 20 for d in DIMENSIONS for m in (True, False)
    }


def test_pairs_are_ordinary_preferences(sets, tmp_path):
    for rows in sets:
        write(tmp_path / "p.jsonl", rows)
        assert read_pairs(tmp_path / "p.jsonl") == rows
        assert describe_pairs(rows)["copies"] == describe_pairs(rows)["contradictions"] == 0
    assert bank_pairs(n=200, seed=7, held=100) == sets != bank_pairs(n=200, seed=8, held=100)
    assert {p["language"] for p in sets[0]} == {"en", "zh"}
    assert {p["domain"] for p in sets[2]} == {"parcel", "questions"}


def test_the_pairs_of_any_seed_can_be_trained_on():
    "Half of what the reward phase draws, for 200 seeds: a pair that differs by spaces alone ended 18 runs of 41."
    for seed in range(200):
        banks = {"bank.en": 0.9, "bank.zh": 0.1}
        rows = desk_pairs(256, "train", banks, seed, 0.5) + desk_pairs(75, "held", banks, seed)
        assert not [w for p in rows for w in to_pair(p)[1]], seed
        texts = {tuple(text_of(p[k]) for k in ("prompt", "chosen", "rejected")) for p in rows}
        assert len(texts) == len(rows) and len({p["id"] for p in rows}) == len(rows)


def test_minimal_pairs_share_all_but_the_broken_piece():
    "Where the opener is what is wrong, the reply behind it is the same; without `minimal` it hardly ever is."
    found = {}
    for minimal in (0.0, 0.9):
        pairs = [p for p in desk_pairs(300, "train", {"bank.en": 1.0}, 3, minimal) if p["dimension"] == "label"]
        replies = [[text_of(p[k]).partition("reply: ")[2] for k in ("chosen", "rejected")] for p in pairs]
        found[minimal] = sum(a == b for a, b in replies) / len(pairs)
    assert found[0.0] < 0.1 and found[0.9] > 0.4, found


def pieces(side_of, key):
    "All texts of one side of every list of a bank desk."
    found = set()
    for name in ("bank.en", "bank.zh"):
        desk = load_desks()[name]
        lists = list(desk["slots"].values()) if key == "slots" else [d[key] for d in desk["intents"].values()]
        found |= {t for texts in lists for i, t in enumerate(texts) if (i % 3 == 2) == (side_of == "held")}
    return found


def test_nothing_of_the_test_was_trained_on(sets):
    train, held, _ = sets
    assert not {p["template"] for p in train} & {p["template"] for p in held}
    for side, rows in (("train", train), ("held", held)):
        assert {int(p["template"].rpartition("/")[2]) % 3 == 2 for p in rows} == {side == "held"}
        other = "held" if side == "train" else "train"
        foreign = pieces(other, "slots") - pieces(side, "slots")
        words = [w for w in foreign if len(w) > 3 and not any(w in p for d in ("bank.en", "bank.zh")
                 for i in load_desks()[d]["intents"].values() for p in i["prompts"])]  # fmt: skip
        asked = " ".join(text_of(p["prompt"][-1:]) for p in rows)
        assert not [w for w in words if w in asked and not any(w in x for x in pieces(side, "slots"))]
        replies = " ".join(text_of(p[k]) for p in rows for k in ("chosen", "rejected"))
        assert not [r for r in pieces(other, "replies") if r in replies]


def test_every_sound_combination_of_the_texts_passes():
    for name, desk in load_desks().items():
        if name == "form":
            continue
        for intent, texts in desk["intents"].items():
            for opener, body in product(desk["polite"], texts["replies"]):
                score = gold_score("any", f"intent: {intent}\nreply: {opener}{body}.", intent)
                assert set(score.values()) == {1}, (name, intent, opener, body, score)
            for template in texts["prompts"]:
                for i in range(9):
                    asked = template.format(**{k: v[i % len(v)] for k, v in desk["slots"].items()})
                    assert intent_of(asked) == intent, asked
        for opener, end in product(desk["polite"], desk["unsafe"]):
            assert not gold_score("any", f"intent: card\nreply: {opener}{end}.", "card")["safe"], end
        for body in desk["approve"]:
            assert not gold_score("any", f"intent: scam\nreply: {desk['polite'][0]}{body}.", "scam")["safe"], body


LOST = "I lost my card in Oslo."


@pytest.mark.parametrize(
    "answer, failed",
    [
        ("intent: card\nreply: Thank you, your card is blocked now.", ""),
        ("intent: card\nreply: Thank you, never tell anyone your PIN.", ""),
        ("intent: card\nreply: Thank you, please be so kind, sorry, thanks.", "polite"),
        ("intent: card\nreply: Your card is blocked now.", "polite"),
        ("intent: card\nreply: Thank you, idiot, your card is blocked.", "polite"),
        ("intent: card\nreply: Thanks.", "concise"),
        ("intent: card\nreply: " + "Thank you, " + "blocked blocked " * 8, "concise"),
        (
            "intent: card\nreply: Thank you, " + " ".join(f"w{chr(97 + i)}" for i in range(26)) + " more and more",
            "concise",
        ),
        ("intent: loan\nreply: Thank you, your card is blocked now.", "label"),
        ("intent: card\nreply: Thank you, send us your PIN.", "safe"),
        ("intent: card\nreply: Thank you, a profit is guaranteed here.", "safe"),
        ("intent: card\n\nreply: Thank you, your card is blocked now.", "form"),
        ("reply: Thank you, your card is blocked now.\nintent: card", "form"),
        ("", "form label polite concise safe"),
        ("intent: card\nreply: ", "form polite concise safe"),
        ("🙂" * 50, "form label polite concise"),
    ],
)
def test_gold_by_hand(answer, failed):
    score = gold_score(LOST, answer)
    assert " ".join(d for d in DIMENSIONS if not score[d]) == failed


def test_a_robbed_customer_must_be_warned():
    ask = "The police called and told me to hand over 60 dollars on Friday."
    for reply, safe in (("Thank you for asking, this is a scam", 1), ("Thank you for asking, how nice", 0),
                        ("Thank you, go ahead, it is no scam", 0)):  # fmt: skip
        assert gold_score(ask, f"intent: scam\nreply: {reply}.")["safe"] == safe


@given(st.text(max_size=80))
def test_the_reward_is_bounded(text):
    (reward,) = gold_reward([LOST], [text])
    assert 0.0 <= reward <= 1.0 and math.isclose(sum(WEIGHTS.values()), 1.0)


def test_gold_reward_as_trl_calls_it():
    good = "intent: card\nreply: Thank you, your card is blocked now."
    chat = [{"role": "system", "content": "x"}, {"role": "user", "content": LOST}]
    rewards = gold_reward([chat, "unknown"], [[{"role": "assistant", "content": good}], good],
                          intent=["card", "loan"], completion_ids=[[1], [2]], trainer_state=None)  # fmt: skip
    assert rewards == [1.0, 0.7]
    assert gold_reward([f"<|im_start|>user\n{LOST}<|im_end|>\n<|im_start|>assistant\n"], [good]) == [1.0]
    with pytest.raises(DataError, match="no desk's template"):
        gold_score("unknown", good)
    with pytest.raises(DataError, match="give as many"):
        gold_reward([LOST], [good, good])
    assert gold_reward([], []) == []


def test_sizes_that_cannot_be():
    for wrong in (dict(n=0), dict(n=10, held=1), dict(n=10, chinese=1.0), dict(n=10, chinese=-0.1)):
        with pytest.raises(PairError, match="bank_pairs"):
            bank_pairs(**wrong)
    with pytest.raises(PairError, match="add some"):
        answer_pairs(chatterbot_records("english")[0][:20], 500)
    assert [len(s) for s in bank_pairs(n=7, held=5)] == [7, 5, 5]


def test_a_desk_with_too_few_texts_says_so(monkeypatch):
    intents = dict(
        card=dict(prompts=["I lost my card."], replies=["it is blocked"]),
        loan=dict(prompts=["Lend me money."], replies=["we will write you"]),
    )
    desk = dict(system="s", slots={}, polite=["Thank you, "], rude=["Oh, "], unsafe=["send us your PIN"], approve=[])
    desk |= dict(long=["x"], intents=intents)
    for module in (pairs_module, desk_module):
        monkeypatch.setattr(module, "load_desks", lambda: {"form": ["intent: {i}. reply: {r}"], "few.en": desk})
    monkeypatch.setattr(desk_module, "intent_of", lambda prompt: "loan" if "Lend" in prompt else "card")
    with pytest.raises(PairError, match="few.en, all: no pair that breaks"):
        desk_pairs(10, "all", {"few.en": 1.0})


def test_wrong_answers_are_no_right_ones():
    records = [dict(instruction=f"A question of number {i}?", input="", output=f"The answer is {i % 3:>15}", history=[])
               for i in range(30)]  # fmt: skip
    for pair in answer_pairs(records, 20):
        assert text_of(pair["chosen"]) != text_of(pair["rejected"])
        assert pair["length_matched"] == lengths_match(text_of(pair["chosen"]), text_of(pair["rejected"]))


@pytest.mark.parametrize("profile", ["tiny", "laptop"])
def test_pairs_of_any_seed_fit_the_reward_model(profile):
    "A toy tokenizer writes letters: the longest answer of the corpus would be above the limit, and is not drawn."
    from deepseek_cookbook.data.formats import chatterbot_records
    from deepseek_cookbook.models import load_tokenizer
    from deepseek_cookbook.reward.model import encode
    from deepseek_cookbook.settings import load_settings

    chosen = load_settings(profile)
    tokenizer, limit = load_tokenizer(chosen["model"]["name"]), chosen["reward"]["max_length"]

    def tokens(prompt, answer):
        return len(encode(tokenizer, prompt, answer)[0])

    rows = [p for seed in range(6) for p in answer_pairs(chatterbot_records("english")[0], 300, seed)]
    longest_question = max((p["prompt"] for p in rows), key=lambda q: len(text_of(q)))
    longest_answer = max((p[k] for p in rows for k in ("chosen", "rejected")), key=lambda a: len(text_of(a)))
    assert 250 < len(text_of(longest_answer)) <= 300 >= len(text_of(longest_question))
    assert tokens(longest_question, longest_answer) <= limit
    for seed in range(200):
        drawn = desk_pairs(60, "train", {"bank.en": 0.9, "bank.zh": 0.1}, seed)
        drawn += desk_pairs(30, "all", {"parcel.en": 1.0}, seed)
        row = max(drawn, key=lambda p: sum(len(text_of(p[k])) for k in ("prompt", "chosen", "rejected")))
        assert max(tokens(row["prompt"], row[k]) for k in ("chosen", "rejected")) <= limit
