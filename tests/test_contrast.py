"""Pairs are linked, labels are stated, swaps are complete and go back."""

import re

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from deepseek_cookbook.augment.contrast import (
    BANK_FLIPS,
    SWAPS,
    ContrastError,
    Flip,
    counterfactual,
    flip_label,
    linked,
    make_pairs,
    perturb_amounts,
    swap_text,
)


def row(text, label="compliant", id="r"):
    return dict(id=id, text=text, label=label)


@pytest.mark.parametrize(
    "text, label, new, turned",
    [
        ("该笔业务合规。", "compliant", "该笔业务违规。", "violation"),
        ("交易流程违规。", "violation", "交易流程合规。", "compliant"),
        ("这笔交易不合规。", "violation", "这笔交易不违规。", "compliant"),
        ("客户要求转账。", "normal", "客户要求洗钱。", "suspicious"),
        ("Transfer it today.", "normal", "Launder it today.", "suspicious"),
        ("He never laundered cash.", "normal", "He never transferred cash.", "suspicious"),
        ("The file is not compliant.", "violation", "The file is not in breach.", "compliant"),
    ],
)
def test_flip(text, label, new, turned):
    made, why = flip_label(row(text, label))
    assert (made["text"], made["label"], made["of"], why) == (new, turned, "r", None)


@pytest.mark.parametrize(
    "text, label, why",
    [
        ("客户按时还款。", "compliant", "no_trigger"),
        ("合规部门已收到。", "compliant", "no_trigger"),
        ("反洗钱培训。", "normal", "no_trigger"),
        ("He transferable", "normal", "no_trigger"),
        ("前半合规，后半违规。", "violation", "two_triggers"),
        ("合规的转账。", "normal", "two_triggers"),
        ("这笔交易是否合规", "compliant", "question"),
        ("手续合规，但资金来源不明。", "violation", "label_disagrees"),
    ],
)
def test_no_flip_without_a_reason(text, label, why):
    assert flip_label(row(text, label)) == (None, why)


flip_words = ["合规", "违规", "不", "转账", "反洗钱", "。", "客户", "是否", "transfer", " ", "not "]


@examples(deadline=None)
@given(st.lists(st.sampled_from(flip_words)), st.data())
def test_a_flip_goes_back_and_states_the_other_label(words, data):
    text = "".join(words)
    labels = ["compliant", "violation", "normal", "suspicious"]
    first = row(text, data.draw(st.sampled_from(labels)))
    made, why = flip_label(first)
    assert (made is None) != (why is None)
    if made:
        assert made["label"] != first["label"] and made["text"] != text
        again, why = flip_label(made)
        if again:  # a new compound may appear at the border of the words
            assert (again["text"], again["label"]) == (text, first["label"])


texts, labels = st.sampled_from(["合规", "转账", "客户", "他", "3元"]), st.sampled_from(["compliant", "normal"])


@examples(deadline=None)
@given(st.lists(st.tuples(texts, labels)))
def test_made_and_rejected_are_what_was_read(pairs):
    rows = [row(t, label, str(i)) for i, (t, label) in enumerate(pairs)]
    for method in (flip_label, counterfactual("gender")):
        made, rejected = make_pairs(rows, method)
        assert len(made) + len(rejected) == len(rows)
        assert {m["of"] for m in made} | {r["row"]["id"] for r in rejected} == {r["id"] for r in rows}


def test_ids_link_so_they_are_needed_once():
    with pytest.raises(ContrastError, match="'x' stands twice"):
        make_pairs([row("a", id="x"), row("b", id="x")], flip_label)
    with pytest.raises(ContrastError, match="label"):
        linked(dict(id="1", text="t"), "flip", "u", "l")


def test_a_flip_needs_two_words_and_labels():
    with pytest.raises(ContrastError):
        Flip("合规", "合规", "a", "b")
    with pytest.raises(ContrastError):
        Flip("合规", "违规", "a", "a")
    assert len(BANK_FLIPS) >= 4


@pytest.mark.parametrize(
    "text, swapped",
    [
        ("王志强先生说，他的儿子和其他同学在等王志强。", "王秀兰女士说，她的女儿和其他同学在等王秀兰。"),
        ("他们有子女，会弹吉他。", "他们有子女，会弹吉他。"),
        ("Tom said he lost his card; call him.", "Anna said she lost her card; call her."),
        ("She gave her book to her.", "He gave his book to him."),
        ("The theme is theirs.", "The theme is theirs."),
        ("Mary's card is hers.", "John's card is his."),
    ],
)
def test_gender(text, swapped):
    assert swap_text(text, "gender") == swapped


@pytest.mark.parametrize(
    "text, swapped",
    [
        ("25岁，月入2500元", "65岁，月入2500元"),
        ("a 30-year-old clerk", "a 70-year-old clerk"),
        ("3岁的孩子和95岁的老人", "3岁的孩子和95岁的老人"),
        ("有效期25年", "有效期25年"),
        ("125岁", "125岁"),
    ],
)
def test_age(text, swapped):
    assert swap_text(text, "age") == swapped


zh_words = ["他", "她", "先生", "女士", "志强", "秀兰", "，", "其他", "25岁", "60岁", "北京", "兰州", "子女", "。"]


@examples(deadline=None)
@given(st.lists(st.sampled_from(zh_words)), st.sampled_from(sorted(SWAPS)))
def test_swapping_twice_gives_the_text_back(words, kind):
    text = "，".join(words)
    assert swap_text(swap_text(text, kind), kind) == text


@examples(deadline=None)
@given(st.text(max_size=40), st.sampled_from(sorted(SWAPS)))
def test_any_text_can_be_swapped(text, kind):
    assert isinstance(swap_text(text, kind), str)


def test_a_swap_is_complete():
    text = "Alice told her husband that she met Bob, and he thanked Alice herself."
    new = set(re.findall(r"\w+", swap_text(text, "gender").lower()))
    assert new >= {"bob", "he", "wife", "alice", "she", "himself", "his"} and not new & {"husband", "herself"}


def test_unknown_kind():
    for call in (lambda: swap_text("x", "colour"), lambda: counterfactual("colour")):
        with pytest.raises(ContrastError, match="gender, region, age"):
            call()


def test_counterfactuals_keep_the_label():
    made, why = counterfactual("age")(row("年轻的客户，20岁", "approve"))
    assert made["label"] == "approve" and made["text"] == "年老的客户，60岁" and "digits" in made["changes"]
    assert counterfactual("age")(row("客户")) == (None, "no_trigger")


@examples(deadline=None)
@given(st.integers(0, 10**9), st.integers(0, 10**9), st.integers(0, 50))
def test_amounts_stay_consistent(a, b, seed):
    question = f"把{a:,}元和{b}.50元转给李雷，确认{a:,}元，编号77。"
    made = perturb_amounts(question, f"已转{a:,}元。", seed)
    new_question, new_answer = made
    found = re.findall(r"([\d,.]+)元", new_question)
    assert found[0] == found[2] == re.findall(r"([\d,.]+)元", new_answer)[0]
    assert len(found[0]) == len(f"{a:,}") and found[1].count(".") == 1 and "编号77" in new_question
    assert (found[0] == found[1]) == (f"{a:,}" == f"{b}.50")


def test_a_computed_amount_is_refused():
    assert perturb_amounts("I have 500 dollars.", "You keep 380 dollars.") is None
    assert perturb_amounts("No amount 500.", "") is None
    question, answer = perturb_amounts("Pay $1,200.50 now", "Paid $1,200.50")
    assert question != "Pay $1,200.50 now" and question[4:] == answer[5:] + " now"


# ---------------------------------------------------------------- a table of one's own

CARDS = (("储蓄卡", "信用卡"), ("debit card", "credit card"))


@pytest.mark.parametrize(
    "text, keep, swapped",
    [
        ("储蓄卡和信用卡", (), "信用卡和储蓄卡"),
        ("信用卡中心的储蓄卡", ("信用卡中心",), "信用卡中心的信用卡"),
        ("My Debit card, not a credit card.", (), "My Credit card, not a debit card."),
        ("他的吉他", (), "他的吉他"),  # the built-in tables are not read
        ("discredit cards", (), "discredit cards"),
    ],
)
def test_own_pairs(text, keep, swapped):
    assert swap_text(text, "card", CARDS, keep) == swapped
    assert swap_text(swapped, "card", CARDS, keep) == text


def test_own_pairs_as_a_method():
    rows = [row("我的储蓄卡丢了", "lost", "a"), row("你好", "hi", "b")]
    made, rejected = make_pairs(rows, counterfactual("card", CARDS))
    assert made == [dict(id="a/card", text="我的信用卡丢了", label="lost", of="a", method="card", changes=["meaning"])]
    assert [r["reason"] for r in rejected] == ["no_trigger"]
    changed, _ = counterfactual("plan", (("5G", "4G"),))(row("5G套餐"))
    assert changed["text"] == "4G套餐" and changed["changes"] == ["digits", "meaning"]


@pytest.mark.parametrize(
    "pairs, said",
    [
        ((("卡", "折"), ("卡", "单")), "'卡' stands in two pairs"),
        ((("a", "b"), ("b", "c")), "'b' stands in two pairs"),
        ((("a", "A"),), "two different words"),
        ((("a",),), "two different words"),
        ((("a", ""),), "two different words"),
        (("ab", "cd"), "two different words"),
        ((), "give `pairs` of your own"),
    ],
)
def test_a_table_that_says_nothing_clear(pairs, said):
    with pytest.raises(ContrastError, match=said):
        swap_text("a", "own", pairs)
    with pytest.raises(ContrastError, match=said):
        counterfactual("own", pairs)


own_words = st.lists(st.sampled_from(["甲乙", "丙", "丁", "x", "yy", "，", " "]))


@examples(deadline=None)
@given(own_words)
def test_own_pairs_go_back(words):
    text, pairs = " ".join(words), (("甲乙", "丙"), ("x", "yy"))
    new = swap_text(text, "own", pairs)
    assert swap_text(new, "own", pairs) == text
    assert (new == text) == (not {"甲乙", "丙", "x", "yy"} & set(words))


# ---------------------------------------------------------------- the article's function, as it behaves


class Coins:
    "A generator whose coins are known."

    def __init__(self, *coins):
        self.coins = list(coins)

    def random(self):
        return self.coins.pop(0)

    def choice(self, values):
        return values[0]


def articles(batch, rng):
    "One row for a row; synonyms with 0.3, and a positive label turned with 0.2, whatever the text holds."
    rows = []
    for text, label in zip(batch["text"], batch["label"], strict=True):
        if rng.random() > 0.7:
            for word, others in {"贷款": ["借款", "信贷"], "风险": ["隐患", "危机"]}.items():
                text = text.replace(word, rng.choice(others))
        if label == "positive" and rng.random() > 0.8:
            text, label = text.replace("合规", "违规"), "negative"
        rows.append(dict(text=text, label=label))
    return rows


def test_what_the_articles_function_does_and_what_flip_label_does():
    batch = dict(text=["客户按时还款。", "这笔交易不合规。", "贷款合规。"], label=["positive", "negative", "positive"])
    made = articles(batch, Coins(0.1, 0.9, 0.1, 0.9, 0.9))
    assert made == [
        dict(text="客户按时还款。", label="negative"),  # nothing was exchanged, and the label turned
        dict(text="这笔交易不合规。", label="negative"),  # a negative note is never touched
        dict(text="借款违规。", label="negative"),  # right
    ]
    flips = (Flip("合规", "违规", "positive", "negative"),)
    notes = [row(t, label) for t, label in zip(batch["text"], batch["label"], strict=True)]
    ours = [flip_label(r, flips) for r in notes]
    assert [why for _, why in ours] == ["no_trigger", None, None]
    flipped = [(m["text"], m["label"]) for m, _ in ours if m]
    assert flipped == [("这笔交易不违规。", "positive"), ("贷款违规。", "negative")]


def test_dataset_map_refuses_the_articles_function():
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict(dict(text=["合规"], label=["positive"]))
    with pytest.raises(TypeError, match="list"):
        data.map(lambda b: articles(b, Coins(0.1, 0.9)), batched=True)
