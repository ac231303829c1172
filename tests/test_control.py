"""Scenes whose answers code can judge: nothing of the test is trained, and the checks can say yes and no."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_cookbook.data.formats import check_record, to_messages
from deepseek_cookbook.settings import load_settings
from deepseek_cookbook.sft.control import (
    CITIES,
    KEYS,
    NAMES,
    SCENES,
    SceneError,
    answer_cases,
    find_json,
    history_score,
    is_held_out,
    json_fields,
    json_score,
    make_scene,
    score_case,
    score_table,
    tone_of,
    tone_score,
)


@pytest.fixture(scope="module")
def sides():
    return {name: make_scene(name, 160, seed=7, held=48) for name in SCENES}


def prompt(case):
    return "\n".join(m["content"] for m in to_messages(case.record)[:-1])


def skeleton(case):
    "A prompt with its values taken out: what two rows of one template share."
    text = re.sub(r"\d+", "0", prompt(case))
    for table in (*NAMES.values(), CITIES):
        for value in (v for lines in table.values() for line in lines for v in line):
            text = text.replace(value, "X")
    return text


@pytest.mark.parametrize("name", SCENES)
def test_no_template_of_the_test_is_trained(sides, name):
    train, held = sides[name]
    assert not {w for c in train for w in c.wordings} & {w for c in held for w in c.wordings}
    assert not {skeleton(c) for c in train} & {skeleton(c) for c in held}
    asked = [{c.record["input"] or c.record["instruction"].split(" — ")[0] for c in side} for side in (train, held)]
    assert not asked[0] & asked[1]


@pytest.mark.parametrize("name", SCENES)
def test_no_value_of_the_test_is_trained(sides, name):
    numbers = [{int(n) for c in side for n in re.findall(r"\d+", prompt(c))} for side in sides[name]]
    assert not numbers[0] & numbers[1]
    assert not any(map(is_held_out, numbers[0])) and all(map(is_held_out, numbers[1]))
    names = [v for table in (*NAMES.values(), CITIES) for line in table[True] for v in line]
    assert not any(n in prompt(c) + c.record["output"] for c in sides[name][0] for n in names)


def test_the_article_s_number_and_words_are_not_trained(sides):
    text = " ".join(prompt(c) for train, _ in sides.values() for c in train)
    assert is_held_out(650) and "650" not in text.split() and "信用评分" not in text


@pytest.mark.parametrize("name", SCENES)
def test_records_are_sound_and_different_and_references_pass(sides, name):
    for side in sides[name]:
        assert not [check_record(c.record) for c in side if check_record(c.record)]
        assert len({prompt(c) for c in side}) == len(side)
        for case in side:
            reached = score_case(case, case.record["output"])
            assert all(ok for level, ok in reached.items() if level != "other") and not reached.get("other")
            assert "{" not in prompt(case) and "}" not in prompt(case)


@pytest.mark.parametrize("name", SCENES)
def test_a_seed_gives_the_same_cases_and_another_seed_others(sides, name):
    assert make_scene(name, 160, seed=7, held=48) == sides[name]
    assert make_scene(name, 160, seed=8, held=48) != sides[name]


@pytest.mark.parametrize("name", ["tone", "history"])
def test_pairs_stay_together(sides, name):
    for side in sides[name]:
        for a, b in zip(side[::2], side[1::2]):
            assert a.wordings == b.wordings and a.record["instruction"] == b.record["instruction"]
            assert a.record["output"] != b.record["output"]


def test_the_control_lacks_just_the_turn_that_told(sides):
    for told, missing in zip(sides["history"][1][::2], sides["history"][1][1::2]):
        assert [t for t in told.record["history"] if told.want["value"] not in t[0]] == missing.record["history"]
        assert told.want["value"] in prompt(told) and told.want["value"] not in prompt(missing)
        assert told.want["other"] in prompt(told) and told.want["other"] in prompt(missing)


def test_the_answer_of_a_json_case_stands_in_its_message(sides):
    for case in (c for side in sides["json"] for c in side):
        assert set(case.want) <= set(KEYS) and any(v is not None for v in case.want.values())
        for key in ("amount", "credit_score"):
            if case.want.get(key) is not None:
                assert str(case.want[key]) in case.record["input"]
        if "credit_score" in case.want:
            assert (case.want["credit_score"] is None) == (case.want.get("intent", "loan") != "loan" or not re.search(
                "score|rating|评分|信用分|得分", case.record["input"]))


def test_chinese_share():
    for share, n in ((0, 0), (0.25, 8), (0.5, 16), (1, 32)):
        assert sum(c.group == "zh" for c in make_scene("json", 32, 0, held=2, chinese=share)[0]) == n


def test_refusals():
    with pytest.raises(SceneError, match="Did you mean 'json'"):
        make_scene("jason", 4, 0)
    with pytest.raises(SceneError, match="held-out cases asked for"):
        make_scene("tone", 4, 0, held=100_000)
    with pytest.raises(SceneError, match="1 answers to 2"):
        score_table(make_scene("json", 2, 0)[0], {"before": ["{}"]})


@pytest.mark.parametrize(
    "text, tone",
    [
        ("We apologise for the inconvenience and would kindly ask for patience.", "formal"),
        ("Sincerely yours", "formal"),
        ("尊敬的客户，感谢您的来信。", "formal"),
        ("Oh no, that's annoying! Don't worry.", "friendly"),
        ("你好，放心啦！", "friendly"),
        ("The branch opens at nine.", "neither"),
        ("", "neither"),
        ("Dear Sam, hey", "neither"),
        ("The bank's fee", "neither"),
    ],
)
def test_tone_of(text, tone):
    assert tone_of(text) == tone


def test_tone_score_says_no(sides):
    formal, friendly = sides["tone"][1][:2]
    assert tone_score(friendly.record["output"], formal)["tone"] is False
    assert tone_score("Dear Sir, we regret this.", formal) == dict(tone=True, name=False, topic=False)


RECORD = dict(output='{"credit_score": 650, "intent": "loan", "account": null}')


@pytest.mark.parametrize(
    "text, levels",
    [
        (RECORD["output"], "found only keys values"),
        ('\n {"account": null, "intent": "loan", "credit_score": 650}\n', "found only keys values"),
        ('{"credit_score": 651, "intent": "loan", "account": null}', "found only keys"),
        ('{"credit_score": "650", "intent": "loan", "account": null}', "found only keys"),
        ('{"credit_score": 650.0, "intent": "loan", "account": null}', "found only keys"),
        ('{"credit_score": 650, "intent": "loan", "account": ""}', "found only keys"),
        ('{"credit_score": 650, "intent": "loan"}', "found only"),
        ('{"credit_score": 650, "intent": "loan", "account": null, "age": 1}', "found only"),
        ('```json\n' + RECORD["output"] + "\n```", "found"),
        (RECORD["output"] + "{}", "found"),
        ('{"credit_score": 650, "credit_score": 650, "intent": "loan", "account": null}', ""),
        ('{"credit_score": NaN, "intent": "loan", "account": null}', ""),
        ("{'credit_score': 650}", ""),
        ("[650]", ""),
        ("650", ""),
        ("", ""),
        ("{" * 5000, ""),
    ],
)
def test_json_levels(text, levels):
    assert " ".join(level for level, ok in json_score(text, RECORD).items() if ok) == levels


def test_a_truth_value_is_no_number():
    record = dict(output='{"amount": 1}')
    assert json_fields('{"amount": true}', record) == {"amount": False}
    assert json_fields('Sure! {"amount": 1}', record) == {"amount": True}


@settings(deadline=None)
@given(st.text(max_size=60) | st.text('{}[]":,0 \\n', max_size=60))
def test_any_text_has_a_score_and_levels_imply_each_other(text):
    levels = list(json_score(text, RECORD).values())
    assert levels == sorted(levels, reverse=True)
    found, only = find_json(text)
    assert not only or json.loads(text) == found


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=5), st.none() | st.integers() | st.text(max_size=5), max_size=4))
def test_what_json_writes_is_read(value):
    text = json.dumps(value)
    assert find_json(text) == (value, True)
    assert json_score(text, dict(output=text)) == dict(found=True, only=True, keys=True, values=True)


def test_history_score_says_no(sides):
    told, missing = sides["history"][1][:2]
    value, other = told.want["value"], told.want["other"]
    assert history_score(f"It is {value}.", told) == dict(recall=True, other=False)
    assert history_score(f"It is {other}.", told) == dict(recall=False, other=True)
    assert history_score("I don't have that, could you tell me?", told)["recall"] is False
    assert history_score("I don't have that.", missing)["recall"] is True
    assert history_score(f"It is {other}. Could you confirm?", missing)["recall"] is False
    assert history_score("It is BK-12345.", missing)["recall"] is False


def test_score_table_counts(sides):
    cases = [c for _, held in sides.values() for c in held]
    table = score_table(cases, dict(none=[""] * len(cases), all=[c.record["output"] for c in cases]))
    for row in table:
        assert row["none"][0] == 0 and row["all"][0] == (0 if row["level"] == "other" else row["n"])
    tones = sum(r["n"] for r in table if (r["scene"], r["level"]) == ("tone", "tone"))
    assert tones == len(sides["tone"][1])


def test_answers_come_back_in_order(sides):
    """Batches are made by scene and group; the answer to a prompt does not depend on what stands beside it."""
    from deepseek_cookbook.models import load_model, load_tokenizer

    model, tokenizer = load_model("tiny-llama"), load_tokenizer("tiny-llama")
    config = load_settings("tiny", ["evaluate.max_new_tokens=4", "evaluate.quiet=true"]).build("evaluate")
    cases = [sides[name][1][i] for i in range(2) for name in SCENES]
    alone = [answer_cases(model, tokenizer, [c], config)[0] for c in cases]
    assert answer_cases(model, tokenizer, cases, config) == alone
