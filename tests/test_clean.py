# ruff: noqa: E501
"""Cleaning: kept + rejected = read for any bytes, no half output under its final name, planted faults found."""

import base64
import importlib.util
import json
import random
import subprocess
import sys
import tracemalloc
from collections import Counter
from datetime import date

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, example, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from typer.testing import CliRunner

from deepseek_cookbook import settings as settings_module
from deepseek_cookbook.cli import app
from deepseek_cookbook.data import clean as clean_module
from deepseek_cookbook.data import filters
from deepseek_cookbook.data.benchmark import Benchmark, evaluation_texts
from deepseek_cookbook.data.clean import CleanConfig, clean, clean_records
from deepseek_cookbook.data.duplicates import (
    KeyTable,
    NearIndex,
    SignatureStore,
    Tokens,
    exact_key,
    jaccard,
    minhash,
    shingles,
    signatures,
)
from deepseek_cookbook.data.filters import (
    clean_characters,
    is_chinese_id,
    language,
    mask_pii,
    normalize,
    pieces,
    tag_english,
)
from deepseek_cookbook.data.formats import DataError, chatterbot_records, check_record, read_records
from deepseek_cookbook.settings import WriteError, read_jsonl

pytest.importorskip("rensa")
in_folder = examples(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=80)
quiet = CleanConfig(quiet=True)


def record(instruction="问？", output="答。", input="", history=(), **more):
    return dict(instruction=instruction, input=input, output=output, history=[list(turn) for turn in history]) | more


def line(*args, **kwargs):
    return json.dumps(record(*args, **kwargs), ensure_ascii=False).encode()


def run(folder, lines, config=quiet, **kwargs):
    source = folder / "in.jsonl"
    source.write_bytes(lines if isinstance(lines, bytes) else b"\n".join(lines))
    report = clean(source, folder / "out.jsonl", config, **kwargs)
    return report, read_jsonl(folder / "out.jsonl"), read_jsonl(folder / "rejected.jsonl")


def reasons(rows):
    return [row["reason"] for row in rows]


# ---------------------------------------------------------------- no row is lost

text = st.text(st.characters(blacklist_categories=["Cs"]), max_size=12)
few = st.sampled_from(
    ["A?", "a?", "你好", "退货 3 天", "退货 30 天", "x\u200b", "\u200b", "锟斤拷", "a@b.com", "1" * 11]
)
ident = st.none() | st.integers(0, 3) | st.sampled_from(["1", "a", ""])
garbage = (
    st.binary(max_size=60)
    | st.text('{}[]":,\\ndu8ntru\n\r\x00', max_size=60).map(str.encode)
    | st.builds(lambda a, b, c: line(a, b, c), few | text, few | text, text)
    | st.builds(lambda a, b, i: line(a, b, **({} if i is None else {"id": i})), few, few, ident)
    | st.builds(lambda a: line(a).replace(b'""', b'"\\ud83d"'), text)
    | st.builds(lambda a, cut: line(a)[:cut], text, st.integers(0, 60))
)
configs = st.builds(
    CleanConfig,
    quiet=st.just(True),
    min_answer=st.integers(0, 3),
    near=st.sampled_from([0, 0.5, 0.75, 1]),
    normalize=st.sampled_from(["none", "width", "nfkc"]),
    low_information=st.sampled_from([0.0, 0.0, 0.2]),
    content=st.sampled_from([0.0, 0.25]),
    max_line=st.sampled_from([100, 2**24]),
    mask=st.sampled_from(["none", "question", "all"]),
)


@in_folder
@given(st.lists(garbage, max_size=8), st.sampled_from([b"\n", b"\r\n"]), st.booleans(), configs)
@example([b"\x80["], b"\n", False, CleanConfig(quiet=True, max_line=100))
@example([b"\x00" * 200, b"{", b"\xff\xfe"], b"\n", True, CleanConfig(quiet=True, max_line=100))
def test_kept_and_rejected_are_what_was_read(tmp_path, lines, end, bom, config):
    data = b"\xef\xbb\xbf" * bom + end.join(lines)
    for file in tmp_path.glob("*.jsonl"):
        file.unlink()
    try:
        report, kept, rejected = run(tmp_path, data, config)
    except DataError as e:
        assert "in.jsonl" in str(e)
        assert not (tmp_path / "out.jsonl").exists() and not (tmp_path / "rejected.jsonl").exists()
        return
    found = [row for row in data.removeprefix(b"\xef\xbb\xbf").split(b"\n") if row.strip()]
    assert report.read == len(found) == report.kept + sum(report.rejected.values())
    assert (report.kept, report.rejected) == (len(kept), Counter(reasons(rejected)))
    assert all(check_record(row) == [] for row in kept)
    assert len({exact_key(row) for row in kept}) == len(kept)
    for row in rejected:
        raw = row["line"].encode() if "line" in row else base64.b64decode(row["line_base64"])
        original = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")[row["number"] - 1]
        assert row["reason"] and original.startswith(raw)
        assert row["reason"] == "too_long" or original.rstrip(b"\r\n") == raw.rstrip(b"\r")


@in_folder
@given(st.lists(st.builds(lambda a, b: line(a, b), few | text, few | text), min_size=1, max_size=8), configs)
def test_a_second_pass_changes_nothing(tmp_path, lines, config):
    assume(not config.low_information)  # a quantile takes its share again
    assume(config.max_line > 100)
    try:
        _, kept, _ = run(tmp_path, lines, config)
    except DataError as e:
        assert "no row is kept" in str(e)
        kept = []
    if kept:
        once = (tmp_path / "out.jsonl").read_bytes()
        (tmp_path / "again").mkdir(exist_ok=True)
        report = clean(tmp_path / "out.jsonl", tmp_path / "again" / "out.jsonl", config)
        assert (tmp_path / "again" / "out.jsonl").read_bytes() == once and not report.rejected


def test_two_workers_do_what_one_does(tmp_path):
    rng = random.Random(1)
    lines = [line(rng.choice("ABCD"), " ".join(rng.choices("red green blue 白 黑".split(), k=8))) for _ in range(4500)]
    once = run(tmp_path, lines)
    twice = run(tmp_path, lines, CleanConfig(quiet=True, workers=2))
    assert once[1:] == twice[1:] and once[0].rejected == twice[0].rejected


def test_records_in_memory_go_the_same_way(tmp_path):
    rows = [
        record("A?", "好的"),
        record("A?", "好的"),
        record("B?", "x\u200by"),
        record("C?", "锟斤拷"),
        {"instruction": 7},
    ]
    kept, gone = clean_records(rows, quiet)
    _, from_file, rejected = run(tmp_path, [json.dumps(row).encode() for row in rows])
    assert kept == from_file and reasons(gone) == reasons(rejected)
    assert [row["row"] for row in gone] == [rows[1], rows[3], rows[4]]
    assert clean_records([], quiet) == ([], [])


# ---------------------------------------------------------------- bad input

BROKEN = {
    "half a line": (line()[:20], "not_json"),
    "GBK": (line().decode().encode("gbk"), "not_utf8"),
    "half of a pair": (line().replace(b'""', b'"\\ud83d"'), "half_character"),
    "a list": (b"[1]", "malformed"),
    "a missing field": (b'{"instruction": "x"}', "malformed"),
    "a wrong type": (line(output=["x"]), "malformed"),
    "blank once cleaned": (line(output="\u200b\u200b"), "malformed"),
    "mojibake": (line(output="caf\u00c3\u00a9"), "garbled"),
    "no piece": (line(output="……"), "short_answer"),
    "deep": (b"[" * 100_000, "not_json"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_line_is_a_rejected_row(tmp_path, name):
    raw, reason = BROKEN[name]
    report, kept, rejected = run(tmp_path, [line("A?", "好的"), raw, line("B?", "不行")])
    assert (report.kept, reasons(rejected), rejected[0]["number"]) == (2, [reason], 2)
    assert rejected[0]["detail"]


def test_a_line_of_50_mb_is_rejected_by_its_beginning(tmp_path):
    source = tmp_path / "in.jsonl"
    with open(source, "wb") as f:
        f.write(line("A?", "好的") + b'\n{"instruction": "')
        for _ in range(50):
            f.write(b"x" * 2**20)
        f.write(b'"}\n' + line("B?", "不行"))
    tracemalloc.start()
    report = clean(source, tmp_path / "out.jsonl", quiet)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    row = read_jsonl(tmp_path / "rejected.jsonl")[0]
    assert (report.kept, row["reason"], row["number"]) == (2, "too_long", 2)
    assert "52,428," in row["detail"] and len(row["line"]) <= 4096 and peak < 45 * 2**20


def test_memory_does_not_grow_with_the_file(tmp_path):
    def peak(n):
        source = tmp_path / "in.jsonl"
        source.write_bytes(b"\n".join(line("A?", "x" * 500) for _ in range(n)))  # copies: the index stays small
        tracemalloc.start()
        clean(source, tmp_path / "out.jsonl", quiet)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(100)
    assert peak(20_000) < 1.2 * peak(4_000)


@pytest.mark.parametrize("name", ["missing.jsonl", "folder", "empty.jsonl", "blank.jsonl", "rows.jsonl.gz", "nul\0"])
def test_what_is_no_file_of_rows_is_one_clear_error(tmp_path, name):
    import gzip

    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "blank.jsonl").write_bytes(b"\n \r\n\n")
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(line())[:-4])
    with pytest.raises(DataError):
        clean(str(tmp_path / name), tmp_path / "out.jsonl", quiet)
    assert not list(tmp_path.glob("*out*")) and not (tmp_path / "rejected.jsonl").exists()


@pytest.mark.parametrize("target, report, says", [
    ("in.jsonl", None, "input and output"),
    ("rejected.jsonl", None, "output and rejected"),
    ("folder", None, "a folder"),
    ("out.jsonl.gz", None, "uncompressed"),
    ("out.jsonl", "out.jsonl", "output and report"),
    ("out.jsonl", "in.jsonl", "input and report"),
])  # fmt: skip
def test_no_file_overwrites_another(tmp_path, target, report, says):
    (tmp_path / "folder").mkdir()
    (tmp_path / "in.jsonl").write_bytes(line())
    with pytest.raises(DataError, match=says):
        clean(tmp_path / "in.jsonl", tmp_path / target, quiet, report=report and tmp_path / report)
    assert (tmp_path / "in.jsonl").read_bytes() == line()


def test_a_full_disk_leaves_the_old_output(tmp_path, monkeypatch):
    (tmp_path / "out.jsonl").write_text("old")
    real = settings_module.os.fsync

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(settings_module.os, "fsync", full)
    (tmp_path / "in.jsonl").write_bytes(line())
    with pytest.raises(WriteError, match="No space left"):
        clean(tmp_path / "in.jsonl", tmp_path / "out.jsonl", quiet)
    monkeypatch.setattr(settings_module.os, "fsync", real)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
    assert (tmp_path / "out.jsonl").read_text() == "old"


def test_answers_without_content_words_go_where_it_is_asked(tmp_path):
    answers = "it depends on what you mean by that, and so on", "嗯嗯这个那个就是这样的呀对吧", "Press the red button."
    lines = [line(f"{i}?", said) for i, said in enumerate(answers)]
    assert run(tmp_path, lines)[0].kept == 3
    _, kept, rejected = run(tmp_path, lines, CleanConfig(quiet=True, content=0.25))
    assert [row["output"] for row in kept] == [answers[2]]
    assert reasons(rejected) == ["low_content"] * 2 and all("words carry content" in r["detail"] for r in rejected)


def test_an_interruption_leaves_no_output(tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(clean_module.Rows, "compare", stop)
    (tmp_path / "in.jsonl").write_bytes(line())
    with pytest.raises(KeyboardInterrupt):
        clean(tmp_path / "in.jsonl", tmp_path / "out.jsonl", quiet)
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize("wrong", [
    dict(near=1.5), dict(near=float("nan")), dict(low_information=1), dict(workers=0), dict(normalize="nfc"),
    dict(ngram=1), dict(seed=-1), dict(min_answer=-1), dict(max_line=0), dict(content=1.5),
])  # fmt: skip
def test_a_setting_out_of_range_is_named(wrong):
    with pytest.raises(DataError, match=next(iter(wrong))):
        CleanConfig(**wrong)


# ---------------------------------------------------------------- rows beside each other


def test_ids_and_copies_name_the_first_line(tmp_path):
    lines = [
        line("A?", "好的", id=1),
        line("B?", "不行", id=1),
        line("a?", " 好的 "),
        line("B?", "不行", id=2),
        line("C?", "行"),
    ]
    report, kept, rejected = run(tmp_path, lines)
    assert [(r["reason"], r["number"], r["detail"]) for r in rejected] == [
        ("duplicate_id", 2, "line 1"),
        ("exact_copy", 3, "line 1"),
    ]
    assert [row["output"] for row in kept] == ["好的", "不行", "行"]  # the text of line 2 comes back with another id


def test_turns_of_one_dialogue_are_no_near_copies(tmp_path):
    turns = [(f"question {w} about the order", f"answer {w} about the order") for w in "abcdefgh"]
    lines = [line(*turns[i], history=turns[:i]) for i in range(8)]
    assert run(tmp_path, lines)[0].kept == 8


def test_same_numbers(tmp_path):
    lines = [
        line("多久退款？", f"自收到退货之日起，我们会在{n}天之内把全部款项退还到您原来的支付账户。") for n in (3, 30)
    ]
    assert run(tmp_path, lines)[0].kept == 2
    assert run(tmp_path, lines, CleanConfig(quiet=True, same_numbers=False))[0].rejected == {"near_copy": 1}


def test_a_text_after_a_copy_of_a_rejected_row_is_compared_with_a_kept_one():
    "No chains: the fourth differs from the first, and must stay."
    words = [f"w{chr(97 + i)}{chr(97 + j)}" for i in range(10) for j in range(6)]
    texts = [words[10 * i :] + [f"v{w}" for w in words[: 10 * i]] for i in range(5)]
    sets = [shingles(t) for t in texts]
    index = NearIndex(0.6)
    like = [int(index.first_like(signatures([s]), np.zeros(1, np.uint64))[0]) for s in sets]
    kept = [s for s, n in zip(sets, like, strict=True) if n < 0]
    for s, n in zip(sets, like, strict=True):
        if n >= 0:
            assert jaccard(s, kept[n]) > 0.4


@examples(deadline=None, max_examples=25)
@given(st.integers(0, 2**32), st.integers(1, 60))
def test_the_index_finds_the_same_however_the_rows_are_cut_into_batches(seed, size):
    rng = random.Random(seed)
    base = [[rng.choice("abcdefghijklmnop") * 3 + rng.choice("xyz") for _ in range(30)] for _ in range(20)]
    sets = [shingles([w if rng.random() > 0.05 else "new" for w in rng.choice(base)]) for _ in range(60)]
    signed, salts = signatures(sets), np.zeros(60, np.uint64)
    whole = NearIndex().first_like(signed, salts)
    index = NearIndex()
    parts = [index.first_like(signed[i : i + size], salts[i : i + size]) for i in range(0, 60, size)]
    assert ((whole < 0) == (np.concatenate(parts) < 0)).mean() > 0.9  # a bucket's owner can differ
    numbers = np.cumsum(whole < 0)
    assert all(n < numbers[i] for i, n in enumerate(whole.tolist()))


@examples(deadline=None, max_examples=50)
@given(st.lists(st.sets(st.integers(1, 2**64 - 1), max_size=40), max_size=6))
def test_the_table_is_a_dictionary(portions):
    table, truth = KeyTable(slots=4), {}
    for portion in portions:
        new = [k for k in portion if k not in truth]
        rows = list(range(len(truth), len(truth) + len(new)))
        table.add(np.array(new, np.uint64), np.array(rows, np.int32))
        truth.update(zip(new, rows, strict=True))
        asked = np.array([*truth, 5, 6, 7], np.uint64)
        assert table.find(asked).tolist() == [truth.get(k, -1) for k in asked.tolist()]


def test_numpy_and_rensa_estimate_the_jaccard_similarity():
    rng = random.Random(0)
    for similarity in (0.2, 0.5, 0.8):
        errors = []
        for trial in range(20):
            common = [f"c{trial}-{i}" for i in range(int(200 * similarity))]
            rest = 200 - len(common)
            a = common + [f"a{rng.random()}" for _ in range(rest // 2)]
            b = common + [f"b{rng.random()}" for _ in range(rest - rest // 2)]
            true = jaccard(a, b)
            errors.append([(make([a, b])[0] == make([a, b])[1]).mean() - true for make in (minhash, signatures)])
        assert np.abs(np.mean(errors, axis=0)).max() < 0.03 and np.abs(errors).max() < 0.17


def facts(*texts, **kwargs):
    return Tokens(list(texts), **kwargs).facts.tolist()


def test_facts_are_numbers_signs_number_words_and_negations():
    three, day, thirty, apart, none, minus, square, word = facts("3天", "day 3", "30", "3 0", "days", "-3", "3²", "three")
    assert three == day and len({three, thirty, apart, none, minus, square, word}) == 7
    assert len(set(facts("50 %", "50%", "50 %.", "(50 %)"))) == 1 != len(set(facts("50 %", "50 €", "50")))
    assert len(set(facts("It is on.", "It is not on.", "It isn't on."))) == 3 and len(set(facts("可以退", "不可以退"))) == 2
    assert len(set(facts("3 days", "30 days", "days", numbers=False))) == 1


@examples(deadline=None, max_examples=200)
@given(st.lists(st.text(st.characters(blacklist_categories=["Mn", "Mc", "Me"]), max_size=30), min_size=1, max_size=6))
def test_a_batch_of_texts_has_the_pieces_of_each(values):
    "The arrays against the regex; combining characters are left out: alone they are a piece for the arrays only."
    values = [v.replace("\0", " ") for v in values]
    tokens, alone = Tokens(values), [pieces(v) for v in values]
    assert tokens.count.tolist() == [len(parts) for parts in alone]
    for i, a in enumerate(alone):
        assert [tokens.words[i] == tokens.words[j] for j in range(len(alone))] == [a == b for b in alone]
        assert Tokens([values[i]]).words[0] == tokens.words[i] and Tokens([values[i]]).facts[0] == tokens.facts[i]


# ---------------------------------------------------------------- what is a near copy, what must stay

RULES = (
    "You sort letters of a library's readers. Read the letter below and name the desk that should answer it. The desks "
    "are loans, rooms, events and complaints. Write the name of one desk, in small letters, and nothing else: no reason, "
    "no greeting, no full stop. Where a letter touches two desks, take the one that its last sentence is about. Letter: "
)
REGELN = (
    "你负责给图书馆读者的来信分类。请阅读下面的来信，写出应当回复它的部门名称。可选的部门有借阅、场馆、活动、投诉。"
    "只写一个部门的名称，不写理由，不写问候，也不写句号。来信涉及两个部门时，以最后一句为准。来信："
)
LETTERS = [("My book is overdue.", "loans"), ("Is the reading room open on Sunday?", "rooms"),
           ("When is the poetry evening?", "events"), ("Your staff was rude.", "complaints")]  # fmt: skip
NAMES = [s.split() for s in (
    "wheel roof door floor wall bridge stair tower gate well", "oak slate iron stone brick rope copper glass tin clay",
    "smith miller mason farmer sailor weaver baker tanner cooper potter")]  # fmt: skip
PAGE = " ".join(
    f"The {a} of the old mill is made of {b} and was repaired by the {c}." for a, b, c in zip(*NAMES, strict=True)
)
LONG = "Take the lift to the second floor, turn left behind the glass door, and ask at the desk for the key of the room."
OPEN = " It is open from the early morning to the evening on most days, and on the last one of every week until noon."
LANG = "请先乘电梯到达二楼，出来以后向左转，穿过玻璃门，在服务台前排队领取阅览室的钥匙，并在离开之前把钥匙还给值班的同事。"
REPLY = "Dear {0}, thank you for your order of a {1}. It has left our house and should reach you within a few days."
LIST = "Please read the list of all the tools that we keep in the shed behind the house, and say what each is for: {}."
STAY = {
    "one rubric, four labels": [record(RULES + q, a) for q, a in LETTERS],
    "one rubric, one label": [record(RULES + q, "loans") for q, _ in LETTERS],
    "a Chinese rubric": [record(REGELN + q, a) for q, a in (("书过期了怎么办？", "借阅"), ("周日开门吗？", "场馆"), ("书弄丢了。", "借阅"))],
    "one page, three questions": [
        record(q, a, PAGE) for q, a in (("Who repaired the roof?", "The miller."), ("Who repaired the tower?", "The tanner."),
                                        ("What is the door made of?", "Iron."), ("Who repaired the stair?", "The miller."))],
    "one page, long answers": [record(q, LONG, PAGE) for q in ("Where is the roof?", "Where is the tower?")],
    "a template, short question": [record(f"Where do I get {w}?", LONG) for w in ("a key", "a card", "help")],
    "a template, long question and answer": [
        record(f"Write a short and friendly reply to {n} who ordered a {t} last week and asks when the parcel will arrive.",
               REPLY.format(n, t)) for n, t in (("Anna", "kettle"), ("Boris", "kettle"), ("Anna", "mirror"))],
    "a page with another word": [record("Sum up.", "iron", PAGE), record("Sum up.", "iron", PAGE.replace("slate", "straw"))],
    "numbers": [record("When do I get my money?", LONG + f" It takes {n} days.") for n in (3, 30)],
    "number words": [record("When do I get my money?", LONG + f" It takes {n} days.") for n in ("three", "thirty")],
    "Chinese number words": [record("多久能借？", LANG + f"可以借{n}天。") for n in ("三", "三十")],
    "negation": [record("May I stay?", LONG), record("May I stay?", LONG.replace("ask", "do not ask"))],
    "negation in Chinese": [record("能进吗？", LANG), record("能进吗？", LANG.replace("排队", "不排队"))],
    "a sign": [record("Is it warm?", LONG + f" It is {n} °C.") for n in ("5", "-5")],
    "currency": [record("What is the fee?", LONG + f" It costs 5 {n}.") for n in ("€", "$")],
    "operators": [record(f"What is a {op} b called?", "an operation") for op in "+-*/%"],
    "code, one sign": [record("What does it print?", "yes", f"if x {op} y:\n    print('yes')") for op in ("<", "<=", "!=")],
    "code, indentation": [record("Right?", "It depends.", f"for x in y:\n    f(x)\n{gap}g(x)") for gap in ("", "    ")],
    "code, case": [record("What is wrong here?", "It depends.", f"{n} = 1\nprint(n)") for n in "nN"],
    "code, a long answer": [record("Write it.", f"def f(a, b):\n    return sorted(a)[b] {op} sum(a) * len(b) + max(a) - min(b)")
                            for op in "+-"],
    "formulas": [record("Differentiate.", "no", f"$x^{{2}} {op} y$") for op in "+-"],
    "case, short answers": [record("Say it after me.", a) for a in ("Rome", "ROME", "rome")],
    "case, a task": [record("Write in lower case.", "the old mill", t) for t in ("THE OLD MILL", "The old Mill")],
    "punctuation, a task": [record("Is the punctuation right?", "no", t) for t in ("No come here", "No, come, here")],
    "大小写": [record("改成小写。", "old mill", t) for t in ("OLD MILL", "Old Mill")],
    "translation": [record(f"Translate into {t}.", a, "The mill is old.") for t, a in (("French", "Le moulin est vieux."),
                                                                                    ("Spanish", "El molino es viejo."))],
    "other direction": [record("Translate.", b, a) for a, b in (("good", "gut"), ("gut", "good"))],
    "exponents": [record("How many?", LONG + f" There are 10{n}.") for n in "²³"],
    "vowel signs": [record("हिन्दी?", w) for w in ("कि", "की", "का")],
    "history": [record("And then?", LONG, history=[["Hello", w]]) for w in ("Hi", "Good day")],
    "system": [record("And then?", LONG, system=w) for w in ("Be brief.", "Be kind.")],
    "a list of slots": [record(LIST.format(w), LONG) for w in ("rake", "a saw, an axe and a file", "hoe")][:2],
}  # fmt: skip


@pytest.mark.parametrize("name", STAY)
def test_rows_that_ask_for_something_else_stay(name):
    kept, out = clean_records(STAY[name], quiet)
    assert len(kept) == len(STAY[name]), [(r["reason"], r["detail"]) for r in out]


COPY = {
    "punctuation": (record("Where is the key, please?", LONG), record("Where is the key please", LONG.replace(",", ";"))),
    "case": (record("Where is the Key?", LONG), record("WHERE IS THE KEY?", LONG.lower())),
    "case, short answer": (record("Where is the Key?", "Here."), record("where is the key?", "Here.")),
    "white space": (record("Where is the key?", LONG), record(" Where  is the key?\n", LONG.replace(" ", "  "))),
    "a word": (record("Where is the key?", LONG), record("Where is the key?", LONG.replace("lift", "stairs"))),
    "a word in Chinese": (record("钥匙在哪里？", LANG), record("钥匙在哪里？", LANG.replace("排队", "依次"))),
    "punctuation in Chinese": (record("钥匙在哪里？", "在二楼，左边。"), record("钥匙在哪里", "在二楼。左边！")),
    "two words of a page": (record("Sum up the page.", LONG, PAGE),
                            record("Sum up the page.", LONG, PAGE.replace("slate", "straw").replace("potter", "monk"))),
    "words of page and answer": (record("Sum up the page.", LONG + OPEN, PAGE),
                                 record("Sum up the page.", LONG.replace("lift", "train") + OPEN, PAGE.replace("slate", "straw"))),
    "a label": (record(RULES + "My book is overdue.", "loans"), record(RULES + "My book is overdue", "loans.")),
    "the page's case": (record("Who repaired the roof?", "The miller.", PAGE), record("Who repaired the roof?", "The miller.", PAGE.upper())),
    "code": (record("Write it.", "def f(x):\n    return x\n"), record("Write it. ", "def f(x):\n    return x")),
}  # fmt: skip


@pytest.mark.parametrize("name", COPY)
@pytest.mark.parametrize("turn", [1, -1])
def test_copies_are_found(name, turn):
    kept, out = clean_records(list(COPY[name])[::turn], quiet)
    assert len(kept) == 1 and reasons(out) in (["near_copy"], ["exact_copy"])


@examples(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from([r for rows in (*STAY.values(), *COPY.values()) for r in rows]), max_size=25), st.randoms())
def test_the_order_of_the_rows_changes_only_the_order(rows, chance):
    "Which rows of a group stay may differ; how many, and which groups there are, may not."

    first = clean_records(rows, quiet)
    mixed = list(rows)
    chance.shuffle(mixed)
    second = clean_records(mixed, quiet)
    assert len(first[0]) == len(second[0]) and len(first[0]) + len(first[1]) == len(rows)
    both = clean_records(first[0] + second[0], quiet)  # every row that stayed has its copy on the other side
    assert len(both[0]) == len(first[0]) and clean_records(first[0], quiet) == (first[0], [])


def test_templated_rows_are_not_compared_pair_by_pair(monkeypatch):
    compared, real = [], SignatureStore.near
    monkeypatch.setattr(SignatureStore, "near", lambda self, a, b, long: compared.append(len(a)) or real(self, a, b, long))
    words = [a + b + c for a in "bdfg" for b in "aeiou" for c in "lmnrst"]
    rows = [record(f"Write a friendly reply to {a} who ordered a {b} last week and asks when the parcel will arrive here.",
                   REPLY.format(a, b)) for a in words for b in words[:40] if a != b]  # fmt: skip
    kept, _ = clean_records(rows, quiet)
    assert len(kept) > 0.97 * len(rows) and 0 < sum(compared) < 12 * len(rows)


def test_near_of_one_takes_equal_words_only():
    rows = [record("Where is it?", LONG), record("Where is it", LONG + "!"), record("Where is it?", LONG.replace("lift", "stairs"))]
    assert [len(clean_records(rows, CleanConfig(quiet=True, near=n))[0]) for n in (0, 0.75, 1)] == [3, 1, 2]


# ---------------------------------------------------------------- benchmarks


def test_contamination_from_files(tmp_path):
    (tmp_path / "eval.jsonl").write_text(json.dumps(dict(q=["How many apples are left in the old basket now?"], a="7")))
    (tmp_path / "eval.txt").write_text("请问地球到月球的平均距离是多少公里\n\n好\n")
    lines = [
        line("Q: how many apples are LEFT in the old basket, now", "Seven"),
        line("地球到月球的平均距离是多少公里？", "约38万公里"),
        line("How many pears are left?", "Two"),
    ]
    config = CleanConfig(quiet=True, evaluation=(str(tmp_path / "eval.jsonl"), str(tmp_path / "eval.txt")))
    report, kept, rejected = run(tmp_path, lines, config)
    assert (report.kept, reasons(rejected)) == (1, ["contaminated"] * 2)


def test_a_bad_evaluation_file_is_named(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"q": 1}\n{')
    for name, says in (("bad.jsonl", "bad.jsonl:2"), ("none.txt", "none.txt")):
        with pytest.raises(DataError, match=says):
            evaluation_texts(tmp_path / name)


def test_short_evaluation_texts_must_be_the_whole_question():
    bench = Benchmark(["Yes", "B", "What is 7 * 8?", "首都？"])
    assert (bench.ignored, bench.texts, bench.overlap("Yes", "Yes")) == (2, 2, "")
    assert bench.overlap("what is 7*8 = 56", "what is 7*8") and bench.overlap("首都 北京", "首都")
    for other in ("What is 7 + 8?", "What is 78?", "What is 7 * 8 and why?", "首都机场"):
        assert bench.overlap(other, other) == ""


@pytest.mark.parametrize("name, text", [
    ("e.json", '{"data": [{"qa": [{"question": "Who was the first person on the moon?"}], "n": 3}]}'),
    ("e.json", '[["Who was the first person on the moon?", null]]'),
    ("e.json", '{"q": 1}\n{"q": "Who was the first person on the moon?"}\n'),
    ("e.jsonl", '"Who was the first person on the moon?"\n'),
    ("e.csv", 'id,question\n1,"Who was the first person\non the moon?"\n'),
    ("e.tsv", "id\tquestion\n1\tWho was the first person on the moon?\n"),
    ("e.txt", "\ufeffWho was the first person on the moon?"),
])  # fmt: skip
def test_evaluation_texts_of_any_shape(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    rows = [record("Who was the first person on the MOON", "Armstrong."), record("Who was the last one?", "Cernan.")]
    kept, out = clean_records(rows, CleanConfig(quiet=True, evaluation=(str(tmp_path / name),)))
    assert kept == rows[1:] and reasons(out) == ["contaminated"]


# ---------------------------------------------------------------- one text


@given(st.text(max_size=60))
def test_characters_are_cleaned_once(value):
    once = clean_characters(value)
    assert clean_characters(once) == once
    assert set(once) <= set(value) | {"\n"}


@given(st.text(st.characters(whitelist_categories=["L", "N", "P", "S"]), max_size=40))
def test_what_can_be_seen_stays(value):
    assert clean_characters(value) == value


def test_what_the_articles_would_lose_stays():
    for value in ("运费3.5元", "-5 °C", "x >= 0 && y[i] != -1", "他说：“好的。”", "👩\u200d💻", "می\u200cخواهم"):
        assert clean_characters(value) == value


def valid_id(region, born, serial):
    body = f"{region:06d}{born:%Y%m%d}{serial:03d}"
    return body + "10X98765432"[sum(w * int(d) for w, d in zip(filters.ID_WEIGHTS, body, strict=True)) % 11]


@given(st.integers(100000, 999999), st.dates(date(1900, 1, 1), date(2099, 12, 31)), st.integers(0, 999), st.data())
def test_identity_numbers_are_told_by_their_check_digit(region, born, serial, data):
    number = valid_id(region, born, serial)
    assert is_chinese_id(number) and mask_pii(f"号码{number}，")[0] == "号码[ID]，"
    place = data.draw(st.integers(0, 16))
    digit = data.draw(st.sampled_from([d for d in "0123456789" if d != number[place]]))
    changed = number[:place] + digit + number[place + 1 :]
    assert not is_chinese_id(changed)  # MOD 11-2 finds every single wrong digit


PRIVATE = ["13800138000", "138 0013 8000", "+86 138-0013-8000", "010-62345678", "+44 20 7946 0958", "(212) 555-0123",
           "212-555-0123", "+1 (212) 555-0123"]  # fmt: skip
INNOCENT = ["3.14159265358979", "2026-11-21 10:30", "订单202611210000000001", "1+12345678901", "192.168.100.200",
            "v1.2.3", "1,234,567,890", "@mention", "a@b", "12345678901234567", "0.13800138000"]  # fmt: skip


@pytest.mark.parametrize("value", PRIVATE)
def test_telephone_numbers_are_masked(value):
    for around in ("电话{}。", "call {} now", "{}"):
        masked, found = mask_pii(around.format(value))
        assert (masked, found) == (around.format("[PHONE]"), {"PHONE": 1})


@pytest.mark.parametrize("value", INNOCENT)
def test_other_numbers_are_not(value):
    assert mask_pii(f"见 {value} 。") == (f"见 {value} 。", {})


@given(st.text(max_size=80))
def test_masking_is_done_once(value):
    once, _ = mask_pii(value)
    assert mask_pii(once)[0] == once


def test_patterns_do_not_hang():
    for value in (
        "a." * 50_000 + "@",
        "a@" + "b." * 50_000,
        "@" * 50_000,
        *(s * 50_000 for s in ("1", "1-", "+1", " 1")),
    ):
        mask_pii(value)


CODE = ["z = q@self.weights", "p = a@np.linalg.pinv(b)", "git clone git@gitlab.com:lab/tool.git", "revenue +25000000 this year",
        "The slope is +0.5, the limit +2.71828183.", "+2024-06-30 release", "lines 220-230-4400", "h = q@k.mT", "W@x.view(2)",
        "x @ y.sum()", "第220-230-4400行", "总额13800138000元", "订单号13800138000", "$13800138000", "+1000000000", "deploy@host:/srv",
        "r = +3.1415926535"]  # fmt: skip


@pytest.mark.parametrize("value", CODE)
def test_code_sums_and_dates_are_no_private_data(value):
    assert mask_pii(value) == (value, {})


@pytest.mark.parametrize("value", ["a.b@mail.co.uk", "ZHANG@EXAMPLE.COM.CN", "li_wei+x@qq.com", "me@site.de"])
def test_addresses_are_masked(value):
    for around in ("邮箱{}。", "write to {}, please", "{}.", "<{}>"):
        assert mask_pii(around.format(value)) == (around.format("[EMAIL]"), {"EMAIL": 1})


@pytest.mark.parametrize("mask, ask, said, masked", [
    ("none", "Call 13800138000", "010-62345678", 0), (False, "Call 13800138000", "010-62345678", 0),
    ("question", "Call [PHONE]", "010-62345678", 3), ("all", "Call [PHONE]", "[PHONE]", 5), (True, "Call [PHONE]", "[PHONE]", 5),
])  # fmt: skip
def test_what_is_masked_is_what_was_asked_for_and_all_is_counted(mask, ask, said, masked):
    row = record("Call 13800138000", "010-62345678", "13900139000", [["13700137000", "13600136000"]])
    report = clean_module.CleanReport()
    kept, _ = clean_records([row], CleanConfig(quiet=True, mask=mask), report)
    assert (kept[0]["instruction"], kept[0]["output"]) == (ask, said)
    assert (report.changed["PHONE"], report.private["PHONE"]) == (masked, 5 - masked)
    assert report.counts()["private_left"] == ({"PHONE": 5 - masked} if masked < 5 else {})
    assert "<h2>Private data that was left" in report.html() if masked < 5 else "was left" not in report.html()


@pytest.mark.parametrize("value", [
    "shaking \U0001fae8", "rare \U0002ebf0", "\U0001fae8\u200d\U0001f4bb", "new \U0001fadf",
    "\U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f",
])  # fmt: skip
def test_characters_that_this_python_does_not_know_stay(value):
    assert clean_characters(value) == value


def test_what_no_table_will_ever_hold_goes():
    for gone in ("\ufdd0", "\uffff", "\U0001ffff", "\ue000", "\U000e0041\U000e0042", "\U0001f3f4\u200b"[1:], "\u2066", "\x9b"):
        assert clean_characters(f"a{gone}b") == "ab"
    assert filters.INVISIBLE.pattern.count("\\p") == 0 and not hasattr(filters, "script")


@given(st.text(st.sampled_from("ab\u200d\u200c\u200bبک👩💻🏴\U000e0067\U000e007f\ufe0f 好1"), max_size=12))
def test_joiners_and_tags_are_cleaned_once(value):
    assert clean_characters(clean_characters(value)) == clean_characters(value)


def test_nfkc_keeps_what_it_would_change_the_meaning_of():
    assert normalize("１０⁶，3½，①②，x₁，ﬁ", "nfkc") == "10⁶,3½,①②,x₁,fi"
    kept, _ = clean_records([record("How many?", "10⁶")], CleanConfig(quiet=True, normalize="nfkc"))
    assert kept[0]["output"] == "10⁶"


@given(st.text(max_size=30))
def test_nfkc_is_done_once(value):
    assert normalize(normalize(value, "nfkc"), "nfkc") == normalize(value, "nfkc")


PROSELESS = ["def f(x):\n    return [i for i in range(10) if i % 2 == 0]\nprint(f(3), max(f(4)), sum(f(5)), min(f(7)))",
             "$\\int_0^1 x^2 dx = \\frac13$, a + b = c, x_1 + x_2 = n, f(g(h(x))) = y, $\\sin x$", "x = 3y + 2, z = 5a - b, k = m n p q",
             "SELECT name, age FROM users WHERE age > 30 ORDER BY name LIMIT 10 OFFSET 5",
             "```\nthe words in a block of code are not the prose of this answer at all\n```"]  # fmt: skip


@pytest.mark.parametrize("value", PROSELESS)
def test_code_and_formulas_have_no_language_and_stay(value):
    pytest.importorskip("py3langid")
    assert language(value) == ""
    for keep in ("zh", "en"):
        assert len(clean_records([record("?1", value)], CleanConfig(quiet=True, languages=(keep,)))[0]) == 1
    french = record("Quand arrive le colis ?", "Le colis arrive chez vous dans les trois jours ouvrables, `print(x)`.")
    assert reasons(clean_records([french], CleanConfig(quiet=True, languages=("en",)))[1]) == ["language"]


def test_width_keeps_chinese_punctuation():
    assert normalize("ＡＰＰ，１００（元）", "width") == "APP，100（元）"


def test_pieces_count_han_and_words():
    assert pieces("Café 退货3.5元 snake_case") == ["café", "退", "货", "3", "5", "元", "snake", "case"]


def test_languages():
    pytest.importorskip("py3langid")
    assert language("The parcel arrives at your house within three working days.") == "en"
    assert language("包裹会在三个工作日之内送到您家。") == "zh" and language("OK") == ""


def test_the_tagger_never_fails_and_tags_every_word():
    for value in ("", "…", "I'd've", "3.5 apples", "A"):
        assert [w for w, _ in tag_english(value)] == filters.WORD.findall(value)


# ---------------------------------------------------------------- the real corpora, the benchmark's rows


@pytest.mark.parametrize("name, read, distinct", [("english", 2257, 1129), ("chinese", 512, 510)])
def test_the_real_corpora(tmp_path, name, read, distinct):
    rows, _ = chatterbot_records(name)
    config = CleanConfig(quiet=True, near=0, min_answer=0)
    report, kept, _ = run(tmp_path, [json.dumps(row).encode() for row in rows], config)
    assert report.read == read and set(report.rejected) == {"exact_copy"}
    assert distinct - 5 <= report.kept <= distinct + 20  # histories differ, case does not


def test_planted_faults_are_found(tmp_path, root):
    spec = importlib.util.spec_from_file_location("make_rows", root / "scripts" / "bench" / "make_rows.py")
    make_rows = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_rows)
    source = tmp_path / "in.jsonl"
    planted = make_rows.write(str(source), 3000, seed=7)
    assert planted == make_rows.write(str(tmp_path / "again.jsonl"), 3000, seed=7)
    assert source.read_bytes() == (tmp_path / "again.jsonl").read_bytes()
    report = clean(source, tmp_path / "out.jsonl", CleanConfig(quiet=True, min_answer=3))
    found = report.rejected
    assert found["not_json"] == planted["broken"] and found["garbled"] == planted["garbled"]
    assert found["short_answer"] == planted["short"] and report.changed["characters"] == planted["invisible"]
    assert planted["exact_copy"] <= found["exact_copy"] <= planted["exact_copy"] + 3
    assert 0.95 * planted["near_copy"] <= found["near_copy"] <= planted["near_copy"]
    assert sum(report.private.values()) == planted["private"] and not set(report.changed) & {"EMAIL", "PHONE", "ID"}


# ---------------------------------------------------------------- the command, the page


def test_the_command_writes_three_files_and_a_page(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(
        b"\n".join([line("A?", "好的"), line("A?", "好的"), line("<b>", "锟斤拷 <script>")])
    )
    words = [
        "data",
        "clean",
        str(tmp_path / "in.jsonl"),
        str(tmp_path / "out.jsonl"),
        "--report",
        str(tmp_path / "r.html"),
    ]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0 and "exact_copy" in result.stdout
    page = (tmp_path / "r.html").read_text()
    assert "exact_copy" in page and "&lt;script&gt;" in page and "<script" not in page and "http" not in page
    assert len(read_records(tmp_path / "out.jsonl")) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "r.html", "rejected.jsonl"]


@pytest.mark.parametrize("words, says", [
    (["missing.jsonl", "out.jsonl"], "missing.jsonl"),
    (["in.jsonl", "in.jsonl"], "input and output"),
    (["in.jsonl", "out.jsonl", "--near", "2"], "near = 2"),
    (["in.jsonl", "out.jsonl", "--normalize", "nfd"], "nfd"),
    (["in.jsonl", "out.jsonl", "--evaluation", "none.jsonl"], "none.jsonl"),
])  # fmt: skip
def test_a_mistake_is_one_message(tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_bytes(line())
    result = CliRunner().invoke(app, ["data", "clean", *words])
    assert result.exit_code == 1 and result.stderr.startswith("Error: ") and says in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_missing_package_names_the_extra(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(line())
    code = (
        "import sys; sys.modules['rensa'] = None\n"
        "from deepseek_cookbook.data.clean import CleanConfig, clean\n"
        f"clean({str(tmp_path / 'in.jsonl')!r}, {str(tmp_path / 'out.jsonl')!r}, CleanConfig(quiet=True, near=0))\n"
        f"clean({str(tmp_path / 'in.jsonl')!r}, {str(tmp_path / 'out.jsonl')!r}, CleanConfig(quiet=True))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "DataError" in done.stderr and "deepseek-cookbook[data]" in done.stderr
    assert (tmp_path / "out.jsonl").exists()


def test_a_copy_in_memory_names_its_record():
    "Counted from one; no line of a file is meant, since rows were put aside before they came here."
    rows = [record("Name a fish.", "A pike lives here."), record("Name a tree.", "An ash."), record("Name a fish.", "A pike lives here.")]
    _, gone = clean_records(rows, CleanConfig(quiet=True))
    assert [(r["reason"], r["detail"], r["row"]) for r in gone] == [("exact_copy", "record 1", rows[2])]
