"""Augmented records: the part that varies is rewritten, answers stay, and everything is accounted for."""

import json
import string

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from deepseek_cookbook.augment.records import RecordsConfig, augment_records, quoted, varying_parts
from deepseek_cookbook.augment.rewrite import METHODS, AugmentError, record_id
from deepseek_cookbook.data.filters import content_fault
from deepseek_cookbook.data.formats import check_record

pytest.importorskip("jieba")
pytest.importorskip("py3langid")


def row(instruction, input="", output="答。", history=(), **more):
    return dict(instruction=instruction, input=input, output=output, history=[list(t) for t in history], **more)


TASK = "将中文翻译成英文"
TRANSLATE = [
    row(TASK, "今天的天气很好", "The weather is nice today"),
    row(TASK, "我喜欢看电影", "I like movies"),
    row(TASK, "怎样查询账户？", "How do I check my account?"),
]
LOUD = {"loud": lambda texts, seed: [f"{t} 好吗" if "\u4e00" <= t[:1] <= "\u9fff" else f"{t} okay" for t in texts]}


@pytest.mark.parametrize("method", METHODS)
def test_a_constant_instruction_is_never_rewritten(method):
    "Row 22: the article's record, alone and in 200 variations."
    for rows in (TRANSLATE[:1], TRANSLATE, [row(TASK, f"今天的天气很好，我想买{i}本书") for i in range(200)]):
        made, rejected = augment_records(rows, RecordsConfig(methods=[method]))
        assert {r["instruction"] for r in made} <= {TASK} and len(made) + len(rejected) == len(rows)
        assert all(r["row"]["instruction"] == TASK for r in rejected)


@pytest.mark.parametrize(
    "rows, parts",
    [
        (TRANSLATE, ["input"] * 3),
        ([row("Who?", "a page"), row("Where?", "a page")], ["instruction"] * 2),
        ([row("hello there"), row("good bye")], ["instruction"] * 2),
        ([row("go on", history=[(q, "a")]) for q in ("x y", "u v")], ["history"] * 2),
        ([row(t, x) for t in ("sort", "count") for x in ("a b", "c d", "e f")], ["input"] * 6),  # two tasks, many texts
        ([row("go on", output=a) for a in "ab"], ["instruction"] * 2),  # one question, two answers
        ([row("go on"), row("go on", "now")], [None, "input"]),
        ([row("go on"), row("go on", history=[("x", "y")])], [None, "history"]),
        ([], []),
    ],
)
def test_the_part_that_varies(rows, parts):
    assert varying_parts(rows) == parts


def test_fields_choose_the_parts():
    record = row("tell me", "a long text", history=[("who is it", "Me."), ("why is it", "So.")], id="r1")
    asked = ("who is it", "why is it")
    for fields in (["instruction"], ["input"], ["history"], ["input", "history"]):
        [new], _ = augment_records([record], RecordsConfig(methods=["loud"], fields=fields), extra=LOUD)
        assert new["instruction"] == "tell me" + " okay" * ("instruction" in fields)
        assert new["input"] == "a long text" + " okay" * ("input" in fields)
        assert [u for u, _ in new["history"]] == [q + " okay" * ("history" in fields) for q in asked]
        assert [a for _, a in new["history"]] == ["Me.", "So."] and new["output"] == "答。" and new["id"] == "r1/loud"
    _, [rejected] = augment_records([row("a b")], RecordsConfig(methods=["loud"], fields=["input"]), extra=LOUD)
    assert rejected["reason"] == "constant"
    assert record["history"][0][0] == "who is it"  # the source is as it was


@pytest.mark.parametrize(
    "fields, methods, said",
    [
        (["output"], ["noise"], "Answers are never rewritten"),
        (["auto", "input"], ["noise"], "write auto alone"),
        ([], ["noise"], "fields: empty"),
        (["auto"], ["nois"], "Did you mean 'noise'"),
    ],
)
def test_names_that_nobody_knows(fields, methods, said):
    with pytest.raises(AugmentError, match=said):
        augment_records(TRANSLATE, RecordsConfig(methods=methods, fields=fields))


def test_an_answer_that_quotes_is_not_contradicted():
    ner = [row("找出名词", "他在银行申请贷款", "银行，贷款"), row("Name the verb.", "they buy a house", "buy")]
    made, rejected = augment_records(ner, RecordsConfig(methods=["synonym"], fields=["input"]))
    assert made == [] and [r["reason"] for r in rejected] == ["quoted", "quoted"]
    assert quoted("I buy it", "I purchase it", "He buys it") is None  # another word
    assert quoted("a b", "b", "a") is None  # too short to tell
    assert quoted("问题和贷款", "疑问和借款", "没有这个问题") == "问题"
    # in an instruction the same is harmless: a question is answered in its words
    made, _ = augment_records([row("how do i buy it", output="You buy it here.")], RecordsConfig(methods=["synonym"]))
    assert made[0]["instruction"] == "how do i purchase it"


def test_rules_of_the_gate_and_copies():
    extra = {
        "digits": lambda ts, s: [t.replace("3", "4") for t in ts],
        "not": lambda ts, s: [t + " and never again" for t in ts],
        "none": lambda ts, s: [None for _ in ts],
        "same": lambda ts, s: list(ts),
        "copy": lambda ts, s: ["pay 5 dollars to the shop" for _ in ts],
        "gone": lambda ts, s: [" " for _ in ts],
    }
    rows = [row("pay 3 dollars to the bank"), row("pay 5 dollars to the shop")]
    _, rejected = augment_records(rows[:1], RecordsConfig(methods=list(extra)), extra=extra)
    assert [r["reason"] for r in rejected] == ["digits", "negation", "no_engine", "unchanged", "digits", "blank"]
    rows[0] = row("pay 5 euros to the bank")
    _, rejected = augment_records(rows, RecordsConfig(methods=["copy"]), extra=extra)
    assert [r["reason"] for r in rejected] == ["exact_copy", "unchanged"]
    with pytest.raises(AugmentError, match="returned 1 texts for 2"):
        augment_records(rows, RecordsConfig(methods=["bad"]), extra={"bad": lambda ts, s: ts[:1]})


def test_back_translation_sends_no_chinese_through_the_english_engine(monkeypatch):
    from deepseek_cookbook.augment import translate

    seen = []
    engine = (lambda ts: seen.extend(ts) or ts), (lambda ts: [f"please {t}" for t in ts])
    monkeypatch.setattr(translate, "fast_engine", lambda: engine)
    rows = [row("怎样重置密码？"), row("How can I reset my password?")]
    made, rejected = augment_records(rows, RecordsConfig(methods=["back_translation"]))
    assert seen == ["How can I reset my password?"] and made[0]["instruction"].startswith("please How")
    assert [(r["reason"], r["of"]) for r in rejected] == [("no_engine", record_id(rows[0]))]


def test_an_embedder_compares_the_meaning():
    import numpy as np

    def embed(texts):  # the share of each letter
        v = np.array([[t.lower().count(c) + 1e-6 for c in string.ascii_lowercase] for t in texts], dtype=float)
        return v / np.linalg.norm(v, axis=1, keepdims=True)

    rows = [row(f"{a} {b}") for a in ("open", "close") for b in ("the window", "my account", "this jar")]
    extra = {"near": lambda ts, s: [f"{t} {t[-1]}" for t in ts], "far": lambda ts, s: ["quick fox" for _ in ts]}
    config = RecordsConfig(methods=["near", "far"], quantile=0.9)
    made, rejected = augment_records(rows, config, extra=extra, embed=embed)
    assert {m["id"].split("/")[1] for m in made} == {"near"} and len(made) + len(rejected) == 12
    assert {r["reason"] for r in rejected if r["method"] == "far"} == {"meaning", "exact_copy"}


word = st.sampled_from("how do i buy a computer 3.5 not 我想 怎样 贷款 电影 没有 问题".split())
said = st.lists(word, min_size=1, max_size=6).map(" ".join)
turns = st.lists(st.tuples(said, said), max_size=2)
records = st.builds(row, said, st.just("") | said, st.sampled_from(["A.", "答。"]), turns)


@examples(deadline=None, max_examples=40)
@given(st.lists(records, max_size=6), st.sets(st.sampled_from(sorted(METHODS)), min_size=1), st.integers(0, 5),
       st.sampled_from([["auto"], ["input", "history"], ["instruction"]]))  # fmt: skip
def test_made_and_rejected_are_what_was_asked(rows, methods, seed, fields):
    config = RecordsConfig(methods=sorted(methods), fields=fields)
    made, rejected = augment_records(rows, config, seed)
    assert len(made) + len(rejected) == len(rows) * len(methods)
    assert all(check_record(m) == [] for m in made)
    sources = {record_id(r): r for r in rows}
    for m in made:
        source = sources[m["id"].rsplit("/", 1)[0]]
        assert m["output"] == source["output"] and [a for _, a in m["history"]] == [a for _, a in source["history"]]
        changed = [k for k in ("instruction", "input", "history") if m[k] != source[k]]
        assert changed and (len(changed) == 1 if fields == ["auto"] else set(changed) <= set(fields))
    plain = [json.dumps({k: v for k, v in m.items() if k != "id"}, sort_keys=True) for m in made]
    assert len(set(plain)) == len(plain)
    assert augment_records(rows, config, seed) == (made, rejected)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("it depends on what you mean by that, and so on", "low_content"),
        ("嗯嗯这个那个就是这样的呀对吧", "low_content"),
        ("Press the red button for five seconds.", ""),
        ("请按住红色按钮五秒钟，然后重新启动电脑。", ""),
        ("Yes, I do.", ""),
        ("", ""),
    ],
)
def test_a_text_without_content_has_a_reason(text, reason):
    found, detail = content_fault(row("q", output=text))
    assert found == reason and bool(detail) == bool(reason)
    assert content_fault(row("q", output=text), least=0)[0] == ""
    assert content_fault(row(text or "q", output="a"), field="instruction")[0] == reason
