"""Rewriting: numbers, code, links, names and negations survive every method; the noise has a cap; nothing is lost."""

import json
import re
import time

import pytest
from hypothesis import example, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from deepseek_cookbook.augment.rewrite import (
    METHODS,
    NEGATIONS,
    WINDOW,
    AugmentError,
    add_noise,
    augment,
    cilin_synonyms,
    edit_words,
    fill_template,
    kept,
    pieces,
    record_id,
    replace_synonyms,
    rewrite,
    table_synonyms,
    wordnet_synonyms,
)
from deepseek_cookbook.data.formats import check_record

pytest.importorskip("jieba")

quick = examples(deadline=None, max_examples=60)
every_method = pytest.mark.parametrize("method", METHODS)

plain = st.sampled_from(
    "how do i buy a note now know the movie problem quickly help 我想 怎样 贷款 购买 电影 知道 的 在 已经 问题".split()
)
fixed = st.sampled_from(
    ["3.5%", "-12", "$3.50", "２０", "2026-11-21", "1,000", "`rm -rf x`", "os.path.join()", "max_len", "https://a.b/c?d=1",
     "me@bank.com", "John", "DeepSeek-V3", "not", "never", "don't", "without", "不能", "没有", "别", "三百", "第二十",
     "《合同法》", "“原话 buy”", "{name}", "<b>", "$x + buy$", "王小明先生", "北京"]
)  # fmt: skip
mixed = st.lists(
    st.tuples(plain | fixed, st.sampled_from([" ", ", ", "，", "？ ", "\n"])), min_size=1, max_size=12
).map(lambda parts: "".join(word + gap for word, gap in parts))
anything = st.text(max_size=60) | mixed


def levenshtein(a, b):
    "Edit distance, the textbook form."
    d = [[i + j if i * j == 0 else 0 for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            d[i][j] = min(d[i - 1][j] + 1, d[i][j - 1] + 1, d[i - 1][j - 1] + (a[i - 1] != b[j - 1]))
    return d[-1][-1]


# ---------------------------------------------------------------- what is kept


@examples(deadline=None, max_examples=200)
@given(anything)
@example("㐀㐁 汉字\u200b㐀")
def test_the_pieces_are_the_text(text):
    cut = pieces(text)
    assert "".join(piece for piece, _ in cut) == text
    assert {kind for _, kind in cut} <= {"word", "kept", "gap"} and all(piece for piece, _ in cut)
    assert not any(re.search(r"\d", piece) for piece, kind in cut if kind != "kept")


@pytest.mark.parametrize(
    "text, held",
    [
        ("pay 3.5% of $1,000.50 by 2026-11-21", ["3.5%", "$1,000.50", "2026-11-21"]),
        ("温度是-3.5℃，涨了１２％", ["-3.5℃", "１２"]),
        ("call os.path.join() or `x = 1` or max_len", ["os.path.join()", "`x = 1`", "max_len"]),
        ("看https://a.b/c?d=1，好", ["https://a.b/c?d=1"]),
        ("write to me@bank.com now", ["me@bank.com"]),
        ("ask John Smith at IBM", ["John", "Smith", "IBM"]),
        ("he isn’t here, don't go, cannot", ["isn’t", "don't", "cannot"]),
        ("never without two", ["never", "without", "two"]),
        ("我用GPU跑三百次", ["GPU", "三百"]),
        ("```\nbuy = 1\n``` buy", ["```\nbuy = 1\n```"]),
        ("```\nhalf a fence", ["```\nhalf a fence"]),
        ("he said “buy it” and 《买房》", ["“buy it”", "《买房》"]),
        ("{{ buy }} {% if x %} {name} <b>", ["{{ buy }}", "{% if x %}", "{name}", "<b>"]),
    ],
)
def test_what_is_kept(text, held):
    found = kept(text)
    assert all(any(h in f for f in found) for h in held), found


@pytest.mark.parametrize(
    "text", ["我不想去", "没有钱", "别买", "无法办理", "并非如此", "未成年", "请勿触摸", "能否办理"]
)
def test_chinese_negations_are_kept(text):
    assert any(re.search("[不没无非未别勿否]", k) for k in kept(text))


def test_names_of_ones_own_are_kept_in_any_case():
    assert kept("ask chatterbot", names=("ChatterBot",)) == ["chatterbot"]
    assert "小芳芳" in kept("请小芳芳来", names=("小芳芳", ""))
    assert replace_synonyms("buy a movie", names=("buy a movie",)) == "buy a movie"


@every_method
@quick
@given(text=anything, seed=st.integers(0, 50))
def test_what_is_kept_survives_every_method(method, text, seed):
    new = METHODS[method](text, seed)
    assert kept(new) == kept(text) and new == METHODS[method](text, seed)
    # the same with rules that know nothing of the module's
    assert re.findall(r"\d", new) == re.findall(r"\d", text)
    for rule in (r"https?://[!-~]+", r"`[^`\n]+`", r"[A-Z][A-Za-z]*", r"[不没无非未别勿莫否]", r"\w+n't\b"):
        assert re.findall(rule, new, re.ASCII) == re.findall(rule, text, re.ASCII)
    words = lambda t: [w for w in re.findall(r"[a-z']+", t) if w in NEGATIONS]  # noqa: E731
    assert words(new) == words(text)
    new.encode("utf-8", "surrogatepass")


@quick
@given(
    st.lists(st.sampled_from(["now", "note", "knot", "nor", "cannon", "i", "on"]), min_size=3, max_size=9),
    st.integers(),
)
def test_a_typo_makes_no_negation(words, seed):
    text = " ".join(words)
    edits = [lambda cut, chance: [(chance.choice(["not", "no", "x"]), "word"), *cut[1:]]]
    new = rewrite(text, edits[0], 3, seed)
    assert kept(new) == kept(text)
    assert kept(rewrite(text * 4, edits[0], 3, seed)) == kept(text * 4)


@pytest.mark.parametrize("text", ["a" * 60_000, "{" * 60_000, "“" * 60_000, "-" * 60_000, "a.b" * 20_000, "1" * 60_000,
                                  "a_" * 30_000, "$a " * 20_000, "`" * 60_000, "你" * 3_000])  # fmt: skip
def test_a_long_hostile_text_is_cut_in_time(text):
    began = time.process_time()
    assert "".join(piece for piece, _ in pieces(text)) == text
    assert time.process_time() - began < 5


# ---------------------------------------------------------------- the methods


@quick
@given(anything, anything)
def test_the_oracle_of_edit_distance(a, b):
    assert levenshtein(a[:12], b[:12]) == levenshtein(b[:12], a[:12]) <= max(len(a[:12]), len(b[:12]))


@quick
@given(st.lists(mixed, min_size=1, max_size=5).map(" ".join), st.integers(0, 50), st.floats(0, 0.03))
def test_noise_is_never_above_its_cap(text, seed, rate):
    assert levenshtein(text, add_noise(text, seed, rate)) <= rate * len(text) + 1e-6
    assert levenshtein(text, add_noise(text, seed)) <= 0.03 * len(text)


@pytest.mark.parametrize("rate", [0.031, 1, -0.01, float("nan")])
def test_more_noise_is_refused(rate):
    with pytest.raises(AugmentError, match="0.03"):
        add_noise("a text", rate=rate)


def test_noise_works_where_it_may():
    text = "what is the difference between a savings account and a checking account"
    steps = [levenshtein(text, add_noise(text, seed)) for seed in range(20)]  # 0 where the second undoes the first
    assert set(steps) <= {0, 1, 2} and sum(steps) > 20
    assert add_noise("short one") == "short one"


def test_synonyms_replace_whole_words_only():
    assert {replace_synonyms("buy it", seed) for seed in range(5)} == {"purchase it"}
    assert replace_synonyms("buyer beware") == "buyer beware"
    assert replace_synonyms("他在银行") == "他在银行"
    assert all(table_synonyms(other) and word in table_synonyms(other) for word in ("buy", "怎样", "movie")
               for other in table_synonyms(word))  # fmt: skip


def test_no_word_of_the_table_is_a_synonym_that_is_kept():
    from deepseek_cookbook.augment.rewrite import SYNONYMS

    words = re.findall(r"[^\s|]+", SYNONYMS)
    assert [w for w in words if kept(w)] == [] and len(words) > 100


def test_insert_delete_swap():
    text = "tell me how to buy a computer"
    assert sorted(edit_words(text, method="swap").split()) == sorted(text.split())
    shorter = edit_words(text, method="delete")
    assert len(shorter.split()) == 6 and shorter == " ".join(shorter.split())
    assert len(edit_words(text, method="insert").split()) == 8
    assert edit_words("word", method="delete") == edit_words("word", method="swap") == "word"
    with pytest.raises(AugmentError, match="Did you mean 'delete'"):
        edit_words(text, method="delet")


def test_wordnet_is_read_by_its_most_frequent_sense(tmp_path):
    for part in ("noun", "verb", "adj", "adv"):
        (tmp_path / f"index.{part}").write_text("  1 licence\n")
        (tmp_path / f"data.{part}").write_text("  1 licence\n")
    (tmp_path / "index.verb").write_text("  1 licence\nbuy v 2 1 @ 2 1 00000010 00000020  \n")
    (tmp_path / "index.noun").write_text("buy n 1 1 @ 1 0 00000030  \n")
    (tmp_path / "data.verb").write_text("00000010 40 v 03 buy 0 purchase 0 pick_up 0 000 | get\n"
                                        "00000020 41 v 02 bribe 0 buy 1 000 | corrupt\n")  # fmt: skip
    (tmp_path / "data.noun").write_text("00000030 21 n 02 bargain 0 buy 0 000 | cheap\n")
    source = wordnet_synonyms(tmp_path)
    assert source("buy") == ["purchase"] and source("bribe") == [] and source("a") == []
    assert replace_synonyms("buy it", source=source) == "purchase it"
    with pytest.raises(AugmentError, match="index.noun.*wordnet-base"):
        wordnet_synonyms(tmp_path / "nowhere")


def test_cilin_uses_equal_words_with_one_meaning(tmp_path):
    file = tmp_path / "cilin.txt"
    file.write_text("Aa01A01= 人 士\nAa01A02# 甲 乙\nAa01A03@ 丙\nAa01A04= 丁 戊\nAa01A05= 戊 己\n", encoding="utf-8")
    source = cilin_synonyms(file)
    assert [source(w) for w in "人甲丙丁戊"] == [["士"], [], [], ["戊"], []]
    with pytest.raises(AugmentError, match="No such file"):
        cilin_synonyms(tmp_path / "none.txt")


# ---------------------------------------------------------------- templates


@quick
@given(st.text(max_size=30))
def test_a_value_is_never_a_template(value):
    assert fill_template("a {{ x }} 问", x=value) == f"a {value} 问"


@quick
@given(st.text("{}%# x'\"()[].|*0a", max_size=30))
def test_any_template_is_a_text_or_an_augment_error(template):
    try:
        assert isinstance(fill_template(template, x="1"), str)
    except AugmentError as e:
        assert "template" in str(e)


@pytest.mark.parametrize(
    "template",
    ["{{ missing }}", "{{ x.__class__ }}", "{{ ''.__class__.__mro__[1] }}", "{% include 'x' %}", "{{ x",
     "{% for i in range(10**9) %}{% endfor %}", "{{ x.append(1) }}", "{{ 1 / 0 }}", "{% import 'os' as os %}",
     "{{ cycler.__init__.__globals__ }}"],
)  # fmt: skip
def test_a_template_stays_in_its_sandbox(template):
    with pytest.raises(AugmentError, match="Correct the template"):
        fill_template(template, x=[1])


# ---------------------------------------------------------------- provenance


rows = st.builds(
    lambda q, a: dict(instruction=q, input="", output=a, history=[]),
    mixed.filter(str.strip),
    st.sampled_from(["A.", "答。"]),
)


@examples(deadline=None, max_examples=30)
@given(st.lists(rows, max_size=5), st.lists(st.sampled_from(sorted(METHODS)), unique=True), st.integers(0, 9))
def test_every_sample_has_a_source_or_a_reason(records, methods, seed):
    made, rejected = augment(records, methods, seed)
    assert len(made) + len(rejected) == len(records) * len(methods)
    sources = {record_id(r): r for r in records}
    for m in made:
        source = sources[m["of"]]
        assert check_record(m["record"]) == [] and m["record"]["output"] == source["output"]
        assert METHODS[m["method"]](source["instruction"], m["seed"]) == m["record"]["instruction"]
    assert {r["reason"] for r in rejected} <= {"unchanged", "exact_copy"}
    texts = [json.dumps(r, sort_keys=True) for r in [*(m["record"] for m in made)]]
    assert len(set(texts)) == len(texts) and not set(texts) & {json.dumps(r, sort_keys=True) for r in records}


def test_the_order_of_the_records_changes_nothing():
    records = [
        dict(instruction=f"how do i buy {w}", input="", output="A.", history=[]) for w in ("shoes", "bread", "milk")
    ]
    by_id = lambda made: sorted(json.dumps(m, sort_keys=True) for m in made)  # noqa: E731
    assert by_id(augment(records)[0]) == by_id(augment(records[::-1])[0])
    with pytest.raises(AugmentError, match="Did you mean 'noise'"):
        augment(records, ["nois"])


def test_a_long_text_is_changed_in_windows_and_keeps_its_numbers_and_code():
    "Each change looks at some pieces around it, so that the work grows with the text and not with its square."
    line = "please transfer 250 dollars from the account before noon, then run `pay --now` and tell Martha about it. "
    text = line * 60
    noisy = add_noise(text, seed=1)
    assert noisy != text and noisy.count("250") == noisy.count("`pay --now`") == noisy.count("Martha") == 60
    changed = [i // len(line) for i, (a, b) in enumerate(zip(text, noisy, strict=False)) if a != b]
    assert changed and min(changed) < 20
    counted = []

    def edit(cut, chance):
        counted.append(len(cut))
        return [*cut[:1], ("x", "word"), *cut[1:]]

    rewrite(text, edit, 20)
    assert max(counted) == WINDOW
