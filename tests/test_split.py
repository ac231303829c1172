"""Splitting: by what is asked, by rows, alike on all sides, near copies together without comparing every pair."""

import hashlib
import json
import random
import statistics
import time
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from deepseek_cookbook.data.duplicates import shingles, signatures
from deepseek_cookbook.data.filters import pieces
from deepseek_cookbook.data.formats import DataError, chatterbot_records
from deepseek_cookbook.data.split import (
    HeldOut,
    _text,
    asked_text,
    compare_sides,
    near_pairs,
    numbers_key,
    question_of,
    script_of,
    split_places,
    split_records,
    split_sides,
    stratum,
)
from deepseek_cookbook.data.spool import Spool, View
from deepseek_cookbook.settings import load_settings, read_jsonl, write_jsonl


def record(instruction="问？", output="答。", history=(), input=""):
    return dict(instruction=instruction, input=input, output=output, history=[list(turn) for turn in history])


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
        split = split_sides(rows, dict(validation=0.3), seed, near=near, max_unit=1)
    except DataError as e:
        assert "at least 2" in str(e) and len({question_of(r) for r in rows}) == 1
        return
    assert as_multiset(split.sides["train"]) + as_multiset(split.sides["validation"]) == as_multiset(rows)
    sides = {_text(r): side for side, rs in split.sides.items() for r in rs}
    crossing = [1 for a, b in linked if sides[a] != sides[b]]
    assert not crossing or split.near_copies_cut == len(rows), "all rows in one chain: exact questions are dealt"


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
    sides = {_text(r): side for side, rs in enumerate((train, held)) for r in rs}
    texts = sorted(sides)
    pairs = near_pairs(texts)
    assert pairs and all(sides[texts[i]] == sides[texts[j]] for i, j in pairs)


def test_links_are_followed_to_the_end():
    rows = [record(q) for q in "abcdefgh"]
    chain = lambda texts: [(i, i + 1) for i in range(len(texts) - 2)]  # noqa: E731
    train, held = split_records(rows, 0.5, near=chain)
    assert {len(train), len(held)} == {7, 1}
    split = split_sides(rows, dict(validation=0.5), near=lambda texts: [(0, i) for i in range(len(texts))])
    assert split.near_copies_cut == 8 and split.facts()["shares"] == dict(train=0.5, validation=0.5)


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


# ---------------------------------------------------------------- what is asked


def fruit(task, answer, rng):
    names = "plum pear fig date lime kiwi nut oat rye corn bean leek".split()
    return record(task, answer, input=" ".join(rng.sample(names, 5)))


def one_and_two_tasks():
    rng = random.Random(5)
    one = [fruit("Is the list long or short?", rng.choice(["long", "short"]), rng) for _ in range(90)]
    return one, one + [fruit("Which fruit is first?", "plum " + rng.choice(["fig", "oat"]), rng) for _ in range(10)]


@pytest.mark.parametrize("rows", one_and_two_tasks(), ids=["one task", "two tasks"])
def test_rows_of_one_instruction_are_different_questions(rows):
    pytest.importorskip("rensa")
    for seed in range(10):
        train, held = split_records(rows, 0.12, seed, near=near_pairs)
        assert abs(len(held) / len(rows) - 0.12) <= 0.01
        assert not {question_of(r) for r in train} & {question_of(r) for r in held}


def test_the_articles_example_in_200_variations(tmp_path, capsys):
    pytest.importorskip("rensa")
    things = ["天气", "早饭", "书", "猫", "城市", "音乐", "工作", "电影", "朋友", "学校"]
    judged = ["很好", "不错", "很差", "奇怪", "漂亮", "安静", "有趣", "重要", "普通", "少见"]
    asked = [f"{when}的{a}{b}" for when in ("今天", "昨天") for a in things for b in judged]
    rows = [dict(instruction="将中文翻译成英文", input=q, output=f"Sentence {i}") for i, q in enumerate(asked)]
    write_jsonl(tmp_path / "trans.jsonl", rows)
    result, _ = run_data(tmp_path, f"data.source={tmp_path / 'trans.jsonl'}", "data.limit=none", "clean.near=0")
    assert len(rows) == 200 == result["train"] + result["validation"] and abs(result["validation"] - 24) <= 1
    assert result["shares"]["validation"] == pytest.approx(0.12, abs=0.01)
    assert f"{result['validation']} validation (12.0%)" in capsys.readouterr().out


def test_a_question_is_what_is_asked():
    same = [record("Ａsk  ME", input="x\n y"), record("ａsk me", input=" X y ")]
    assert question_of(same[0]) == question_of(same[1]) and asked_text(same[0]) == "Ａsk  ME\nx\n y"
    others = [record("a", input="b"), record("a b"), record("b", history=[["a", ""]]), record("b", input="a"),
              record("", history=[["a", "b"]])]  # fmt: skip
    assert len({question_of(r) for r in others}) == len(others)
    bare = dict(instruction="a", output="b")
    assert question_of(bare) == question_of(record("a") | dict(input=None, history=None)) == question_of(record("A"))
    assert asked_text(bare) == "a" and stratum(bare) == stratum(record("a", "b"))


# ---------------------------------------------------------------- the share that comes out


unit_sizes = st.lists(st.integers(1, 40), min_size=3, max_size=40)


@examples(deadline=None)
@given(unit_sizes, st.floats(0.02, 0.6), st.floats(0.02, 0.35), st.integers(0, 20), st.randoms())
def test_the_share_is_of_the_rows(sizes, validation, test, seed, chance):
    """Off by at most half the largest unit and a row, whatever the sizes; and one unit, at least, for each side."""
    rows = [record(f"{n}?", "x" * (n * i % 50 + 1)) for n, size in enumerate(sizes) for i in range(size)]
    shares = dict(validation=validation, test=test)
    split = split_sides(rows, shares, seed)
    assert sum((as_multiset(side) for side in split.sides.values()), Counter()) == as_multiset(rows)
    asked = [{question_of(r) for r in side} for side in split.sides.values()]
    assert all(asked) and not any(a & b for a, b in combinations(asked, 2))
    for name, share in shares.items():
        off = abs(len(split.sides[name]) - share * len(rows))
        one = 1 in (len({question_of(r) for r in split.sides[side]}) for side in (name, "train"))
        assert off <= max(sizes) / 2 + 1 or one, name
    again = split_sides(chance.sample(rows, len(rows)), shares, seed)
    assert {n: as_multiset(s) for n, s in again.sides.items()} == {n: as_multiset(s) for n, s in split.sides.items()}


def test_five_tasks_of_a_hundred_rows():
    tasks = [record(f"Task {t}", "yes", input=f"{t} {i}") for t in "abcde" for i in range(100)]
    assert len(split_records(tasks)[1]) == 60
    answers = [record(f"Question {q}", f"Answer {i}") for q in range(5) for i in range(100)]
    assert len(split_records(answers)[1]) == 100, "a question is not divided: one of five is the nearest to 12 %"
    mixed = answers + [record(f"Single {i}", "yes") for i in range(500)]
    assert all(abs(len(split_records(mixed, seed=seed)[1]) - 120) <= 1 for seed in range(20))


def test_large_units_are_held_out_too():
    rows = [record(f"Question {q}", "Answer") for q in range(12) for i in range(20)]
    rows += [record(f"Single {i}", "Answer") for i in range(760)]
    share = statistics.mean(
        sum("Question" in r["instruction"] for r in split_records(rows, seed=seed)[1]) / 240 for seed in range(40)
    )
    assert 0.06 < share < 0.18


def test_domains_are_strata():
    rows = [
        record(f"{d} {i}", "yes") | dict(extra=dict(domain=d))
        for d, n in dict(law=700, tax=200, art=100).items()
        for i in range(n)
    ]
    split = split_sides(rows, dict(validation=0.12, test=0.1))
    for name, share in dict(validation=0.12, test=0.1).items():
        held = Counter(r["extra"]["domain"] for r in split.sides[name])
        assert all(abs(held[d] - share * n) <= 1 for d, n in dict(law=700, tax=200, art=100).items())


def test_a_test_side_leaves_the_validation_side_alone():
    rows = chatterbot_records("english")[0]
    with_test = split_sides(rows, dict(validation=0.12, test=0.1), near=near_pairs).sides
    assert as_multiset(with_test["validation"]) == as_multiset(split_records(rows, near=near_pairs)[1])
    assert len(with_test["test"]) / len(rows) == pytest.approx(0.1, abs=0.01)


@given(st.integers(40, 300), st.integers(0, 50))
def test_another_row_moves_few(n, seed):
    rows = [record(f"{i}?", "x" * (1 + i % 40)) for i in range(n)]
    before, after = (as_multiset(split_records(r, 0.2, seed)[1]) for r in (rows, rows + [record("new", "xx")]))
    strata = len({stratum(r) for r in rows})
    assert (before - after).total() + (after - before).total() <= 2 * strata + 2


@pytest.mark.parametrize(
    "shares, why",
    [
        (dict(validation=0), "data.validation = 0"),
        (dict(validation=0.1, test=1), "data.test = 1"),
        (dict(validation=0.6, test=0.4), r"validation \+ test is 1"),
    ],
)
def test_shares_that_cannot_be(shares, why):
    with pytest.raises(DataError, match=why):
        split_sides([record(str(i)) for i in range(9)], shares)
    with pytest.raises(DataError, match="2 different questions.*at least 3"):
        split_sides([record("a"), record("b")], dict(validation=0.1, test=0.1))


# ---------------------------------------------------------------- near copies


def components(pairs, n):
    "The groups of size 2 or more."
    root = list(range(n))
    for i, j in pairs:
        a, b = root[i], root[j]
        root = [a if r == b else r for r in root]
    groups = {}
    for i, r in enumerate(root):
        groups.setdefault(r, set()).add(i)
    return {frozenset(g) for g in groups.values() if len(g) > 1}


def test_links_are_those_of_all_pairs_on_the_corpora():
    pytest.importorskip("rensa")
    for language in ("english", "chinese"):
        texts = sorted({_text(r) for r in chatterbot_records(language)[0]})
        signed = signatures([shingles(pieces(t)) for t in texts])
        numbers = np.array([numbers_key(t) for t in texts], np.uint64)
        alike = [
            (i, i + 1 + int(j))
            for i in range(len(texts))
            for j in np.flatnonzero((signed[i] == signed[i + 1 :]).mean(1) >= 0.8)
            if numbers[i] == numbers[i + 1 + int(j)]
        ]
        found = components(near_pairs(texts), len(texts))
        assert alike and all(any({i, j} <= group for group in found) for i, j in alike)


def test_templated_rows_stay_apart_and_cost_is_linear():
    pytest.importorskip("rensa")
    rng = random.Random(0)
    names = ["Ada", "Bo", "Chen", "Dara", "Emil"]
    rubric = " ".join(f"Rule {a} says that {b} comes before everything else." for a, b in combinations("abcdefg", 2))
    for front in ("", rubric):
        seconds = {}
        for n in (1000, 4000):
            rows = [record(f"{front}Please transfer {i} yuan to {rng.choice(names)}.", "Done.") for i in range(n)]
            began = time.process_time()
            split = split_sides(rows, dict(validation=0.12), near=near_pairs)
            seconds[n] = time.process_time() - began
            assert split.units == n and abs(len(split.sides["validation"]) - 0.12 * n) <= 1
        assert seconds[4000] < 8 * seconds[1000] + 0.5, "four times the rows; all pairs would be sixteen times"


@pytest.mark.parametrize("n", [500, 4000])
def test_one_bucket_is_compared_a_few_times_a_row(n):
    pytest.importorskip("rensa")
    page = "the quick brown fox jumps over the lazy dog and runs away from every hunter in the wood today "
    texts = sorted(f"{page * 2} {i % 7} {i}" for i in range(n))
    pairs = near_pairs(texts, same_numbers=False)
    assert n / 2 < len(pairs) < 4 * n, "all pairs are n (n - 1) / 2"
    assert near_pairs(texts) == [], "numbers differ"


def test_a_chain_of_near_copies_is_cut_and_counted():
    pytest.importorskip("rensa")
    page = " ".join(f"word{chr(97 + i)}" for i in range(26))
    rows = [record(f"{page} {chr(0x4E00 + i)}", "Done.") for i in range(60)]
    rows += [record(f"Q{i}", "A") for i in range(240)]
    split = split_sides(rows, dict(validation=0.12), near=near_pairs)
    assert (split.near_copies_cut, split.units, split.largest_unit, split.near_copies) == (60, 300, 1, 0)
    whole = split_sides(rows, dict(validation=0.12), near=near_pairs, max_unit=0.2)
    assert (whole.near_copies_cut, whole.units, whole.largest_unit, whole.near_copies) == (0, 241, 60, 60)
    assert len(split.sides["validation"]) == len(whole.sides["validation"]) == 36


def test_rubric_and_note_are_not_near_copies_but_one_note_twice_is():
    pytest.importorskip("rensa")
    rubric = "Grade the note from one to five. " * 20
    notes = ["the parcel came late and wet", "great service and kind words", "my refund is still missing today"]
    rows = [record(rubric, "three", input=note) for note in notes]
    assert split_sides(rows, dict(validation=0.3), near=near_pairs).units == 3
    page = "a page about the old harbour and its ships " * 8
    more = [record(q, "A harbour.", input=page) for q in ("What is it about?", "Name the subject.")]
    assert split_sides(rows + more, dict(validation=0.3), near=near_pairs).near_copies == 2


# ---------------------------------------------------------------- the phase


def run_data(tmp_path, *changes):
    from deepseek_cookbook.data.mix import data_phase
    from deepseek_cookbook.settings import RunFolder

    run = RunFolder(tmp_path / "run")
    return data_phase(load_settings("tiny", changes), run), run.phase("data")


def test_the_phase_writes_a_test_side_and_removes_an_old_one(tmp_path):
    result, folder = run_data(tmp_path, "data.test=0.1")
    sides = {name: read_jsonl(folder / f"{name}.jsonl") for name in ("train", "validation", "test")}
    assert {name: len(rows) for name, rows in sides.items()} == {name: result[name] for name in sides}
    assert result["shares"] == pytest.approx({n: len(rows) / 96 for n, rows in sides.items()}, abs=1e-4)
    assert result["shares"]["test"] == pytest.approx(0.1, abs=0.02)
    result, folder = run_data(tmp_path)
    assert "test" not in result and not (folder / "test.jsonl").exists()


def test_the_phase_mixes_by_ratio(tmp_path):
    for name, n in dict(a=70, b=20, c=40).items():
        rows = [record(f"{name}: {chr(0x4E00 + 7 * i)}{chr(0x5E00 + i)}?", f"{chr(0x4E00 + i)}") for i in range(n)]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    a, b, c = (str(tmp_path / f"{name}.jsonl") for name in "abc")
    mix = json.dumps({a: 7, b: 2, c: 1})
    result, folder = run_data(tmp_path, f"data.mix={mix}", "data.limit=none", "clean.near=0", "data.test=0.1")
    rows = [r for side in ("train", "validation", "test") for r in read_jsonl(folder / f"{side}.jsonl")]
    assert Counter(r["extra"]["domain"] for r in rows) == {a: 70, b: 20, c: 10}
    assert result["rejected"] == {"over_ratio": 30} and result["read"] == 130
    held = Counter(r["extra"]["domain"] for r in read_jsonl(folder / "validation.jsonl"))
    assert abs(held[a] - 8.4) <= 1 and abs(held[b] - 2.4) <= 1 and abs(held[c] - 1.2) <= 1
    result, _ = run_data(tmp_path, f"data.mix={mix}", "data.limit=50", "clean.near=0")
    assert result["train"] + result["validation"] == 50 and result["rejected"] == {"over_ratio": 80}


def test_the_phase_tells_what_cleaning_changed(tmp_path):
    rows = [record(f"问题{chr(0x4E00 + 9 * i)}？", f"好{chr(0x5E00 + i)}") for i in range(9)]
    rows.append(record("哪里？", "a​b"))  # a character without width
    write_jsonl(tmp_path / "rows.jsonl", rows)
    result, _ = run_data(tmp_path, f"data.source={tmp_path / 'rows.jsonl'}", "clean.near=0")
    assert result["changed"] == {"characters": 1} and result["private_left"] == {}
    rows[-1]["output"] = "Call 010-62345678"
    write_jsonl(tmp_path / "rows.jsonl", rows)
    result, _ = run_data(tmp_path, f"data.source={tmp_path / 'rows.jsonl'}", "clean.near=0")
    assert result["changed"] == {} and result["private_left"] == {"PHONE": 1}


# ---------------------------------------------------------------- rows on disk


def by_hand(rows, shares, seed, near, max_unit):
    "The split with lists and dictionaries, slow and easy to read: places, and the rows in chains that were cut."
    digest = lambda text, key="": hashlib.blake2b(text.encode(), digest_size=16, key=key.encode()).digest()  # noqa: E731
    asked = {}
    for i, r in enumerate(rows):
        asked.setdefault(digest(question_of(r)), []).append(i)
    group = {key: {key} for key in asked}
    texts = sorted({(_text(r), digest(question_of(r))) for r in rows}, key=lambda t: (t[0], t[1]))
    for i, j in near([text for text, _ in texts]):
        joined = group[texts[i][1]] | group[texts[j][1]]
        group |= {key: joined for key in joined}
    chains = {min(keys): sorted(keys) for keys in group.values()}
    units, cut = [], 0
    for keys in chains.values():
        n = sum(len(asked[key]) for key in keys)
        fits = len(keys) == 1 or n <= max(10, max_unit * len(rows)) and len(chains) > len(shares)
        units += [keys] if fits else [[key] for key in keys]
        cut += 0 if fits else n
    units = sorted(units, key=lambda keys: digest(keys[0].hex(), str(seed)))
    places = [[i for key in keys for i in asked[key]] for keys in units]
    strata, chance, side = [min(stratum(rows[i]) for i in at) for at in places], random.Random(seed), [0] * len(units)
    for number, share in enumerate(shares.values(), 1):
        owed, taken, spare = chance.random() - 0.5, 0, len(shares) + 1 - number
        free = lambda: [u for u in range(len(units)) if side[u] == 0]  # noqa: E731
        for name in [*sorted(set(strata)), None]:
            of = [u for u in range(len(units)) if name in (None, strata[u])]
            owed += 0 if name is None else share * sum(len(places[u]) for u in of)
            for u in of:
                if owed < 0.5 or len(free()) <= spare:
                    break
                if side[u] == 0 and len(places[u]) <= owed + 0.5:
                    side[u], owed, taken = number, owed - len(places[u]), taken + 1
        last = min(free(), key=lambda u: abs(len(places[u]) - owed))
        if not taken or len(free()) > spare and abs(len(places[last]) - owed) < abs(owed):
            side[last] = number
    named = enumerate(["train", *shares])
    return {name: [i for u, at in enumerate(places) if side[u] == n for i in at] for n, name in named}, cut


row_of_any_kind = st.builds(
    record,
    st.sampled_from(["Why?", "why ?", "why?", "Sum it up.", "写一句。"]),
    st.sampled_from(["Because.", "Because of it.", "因为。", "ok " * 9]),
    st.sampled_from([(), (("Hi", "Hello"),)]),
    st.sampled_from(["", "", "a note", "a note that is longer", "一段话"]) | st.text("ab", max_size=3),
)


@examples(deadline=None, max_examples=150)
@given(st.lists(row_of_any_kind, min_size=5, max_size=40), st.integers(0, 99), st.integers(0, 9),
       st.sampled_from([(0.12,), (0.3, 0.2), (0.05, 0.05, 0.4)]), st.sampled_from([0.1, 0.5, 1]))  # fmt: skip
def test_a_split_on_disk_is_the_one_by_hand(tmp_path_factory, rows, seed, links, shares, max_unit):
    shares = dict(zip(("validation", "test", "third"), shares, strict=False))

    def near(texts):
        assert list(texts) == sorted(texts)
        chance = random.Random(links)
        return [(chance.randrange(len(texts)), chance.randrange(len(texts))) for _ in range(links)]

    try:
        listed = split_sides(rows, shares, seed, near=near, max_unit=max_unit)
    except DataError:
        assert len({question_of(r) for r in rows}) <= len(shares)
        return
    places, cut = by_hand(rows, shares, seed, near, max_unit)
    assert listed.sides == {name: [rows[i] for i in at] for name, at in places.items()}
    assert listed.near_copies_cut == cut
    with Spool(tmp_path_factory.getbasetemp()) as spool:
        for row in rows:
            spool.add(row)
        stored = split_places(spool, shares, seed, near=near, max_unit=max_unit)
        assert {name: at.tolist() for name, at in stored.sides.items()} == places
        assert {name: list(View(spool, at)) for name, at in stored.sides.items()} == listed.sides
        assert stored.facts() == listed.facts()


def test_near_copies_on_disk_are_those_in_memory(tmp_path):
    pytest.importorskip("rensa")
    rows = [r for language in ("english", "chinese") for r in chatterbot_records(language)[0]][::2]
    with Spool(tmp_path) as spool:
        for row in rows:
            spool.add(row)
        stored = split_places(spool, dict(validation=0.12, test=0.1), near=near_pairs)
        listed = split_sides(rows, dict(validation=0.12, test=0.1), near=near_pairs)
        assert {name: list(View(spool, at)) for name, at in stored.sides.items()} == listed.sides
        assert stored.facts() == listed.facts() and listed.near_copies > 10


@pytest.mark.parametrize("often, held", [(60, 12), (90, 10), (97, 3)])
def test_a_question_that_most_rows_ask_leaves_the_shares_alone(often, held):
    "It stays whole; the other rows make up the share as far as they go."
    rows = [record("again?", f"{i}") for i in range(often)] + [record(f"{i}?", f"{i}") for i in range(100 - often)]
    split = split_sides(rows, dict(validation=0.12), near=near_pairs)
    assert (split.largest_question, len(split.sides["validation"])) == (often, min(held, 12))
    assert split.facts()["largest_question"] == often


def test_held_out_rows_are_found_again():
    pytest.importorskip("rensa")
    words = " ".join(f"word{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(60))
    held = HeldOut([record(words, "yes"), record("短短的问题", "好"), record("Why?", "Because")])
    asked = [record(words + " more", "yes"), record("WHY? ", "No."), record("短短的问题", "不"), record("Who?", "Me")]
    assert held.like(asked).tolist() == [True, True, True, False]
    assert held.like([]).tolist() == [] and HeldOut([]).like(asked).tolist() == [False] * 4
