"""Data: any file is records or a DataError, no row is lost, no question is on both sides of a split."""

import json
import random
from collections import Counter

import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from deepseek_cookbook.augment.rewrite import AugmentError, record_id
from deepseek_cookbook.data.clean import CleanConfig, clean_records
from deepseek_cookbook.data.formats import (
    FIELDS,
    DataError,
    chatterbot_records,
    check_record,
    load_records,
    read_records,
    to_messages,
)
from deepseek_cookbook.data.mix import data_phase
from deepseek_cookbook.data.split import drop_copies, question_of, split_records
from deepseek_cookbook.settings import RunFolder, load_settings, read_jsonl, write_jsonl

in_folder = examples(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=80)


def record(instruction="问？", output="答。", input="", history=()):
    return dict(instruction=instruction, input=input, output=output, history=[list(turn) for turn in history])


def line(**kwargs):
    return json.dumps(record(**kwargs), ensure_ascii=False).encode()


def as_multiset(rows):
    return Counter(json.dumps(row, sort_keys=True) for row in rows)


text = st.text(st.characters(blacklist_categories=["Cs"]), max_size=12)
said = text.filter(str.strip)
sound = st.builds(record, said, said, text, st.lists(st.tuples(text, text), max_size=2))
# Few words, so that copies and repeated questions are frequent.
word = st.sampled_from(["A?", "a?", " a? ", "B?", "你好", "ＡＢ", "ß", "SS", "ſ"])
repeated = st.builds(record, word, word, st.sampled_from(["", "x"]), st.lists(st.tuples(word, word), max_size=1))

# ---------------------------------------------------------------- files


@in_folder
@given(
    st.binary(max_size=200)
    | st.lists(sound.map(lambda r: json.dumps(r).encode()) | st.binary(max_size=8), max_size=4).map(b"\n".join)
    | st.text('{}[]":,\\ndu8ntru\n', max_size=60).map(str.encode)
)
def test_any_bytes_are_records_or_a_data_error(tmp_path, data):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(data)
    try:
        rows = read_records(file)
    except DataError as e:
        assert str(file) in str(e)
    else:
        assert rows and all(check_record(row) == [] for row in rows)


@in_folder
@given(st.lists(sound, min_size=1, max_size=5), st.sampled_from(["\n", "\r\n"]), st.booleans(), st.booleans())
def test_records_survive_a_file_with_bom_and_windows_lines(tmp_path, rows, end, bom, ascii_only):
    file = tmp_path / "rows.jsonl"
    lines = (json.dumps(row, ensure_ascii=ascii_only) + end for row in rows)
    file.write_bytes(("\ufeff" * bom + "".join(lines)).encode())
    assert read_records(file) == rows


BAD_LINES = {
    "half a line": (line()[:20], "line: not valid JSON"),
    "half a character": (line()[:18], "line: byte 18 is no UTF-8"),
    "half of a pair": (line().replace(b'""', b'"\\ud83d"'), "line: half a character"),
    "a number": (b"7", "record: found int"),
    "a list": (b"[1]", "record: found list"),
    "null": (b"null", "record: found NoneType"),
    "not a number": (b"NaN", "line: not valid JSON (NaN is no number of JSON"),
    "a number of 5000 digits": (b"9" * 5000, "line: not valid JSON"),
    "nested too deeply": (b"[" * 50_000, "line: not valid JSON"),
    "two objects": (line() + line(), "line: not valid JSON (Extra data)"),
    "an empty object": (b"{}", "instruction: missing, add it"),
    "a misspelt field": (b'{"histroy": []}', "histroy: unknown field. Did you mean 'history'?"),
    "a blank question": (line(instruction=" \u3000"), "instruction: blank"),
    "an empty answer": (line(output=""), "output: blank"),
    "a turn of one": (line(history=[["a"]]), "history: write a list of [user, assistant] pairs"),
    "a turn of numbers": (line(history=[[1, 2]]), "history: write a list of [user, assistant] pairs"),
    "history as a text": (line().replace(b"[]", b'"[]"'), "history: found str, write list"),
    "an answer as a list": (line().replace(b'"input": ""', b'"input": []'), "input: found list, write str"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_fault_is_told_with_file_line_and_field(tmp_path, name):
    bad, fault = BAD_LINES[name]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(line() + b"\n\n" + bad)
    with pytest.raises(DataError) as found:
        read_records(file)
    assert f"{file}:3:{fault}" in str(found.value)


def test_all_faults_are_counted_and_some_are_shown(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"a": 1}\n' * 30)
    with pytest.raises(DataError) as found:
        read_records(file, show=7)
    head, *shown, rest = str(found.value).splitlines()
    assert head.endswith(": 120 faults") and len(shown) == 7 and rest == "… and 113 more"


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf", b"\r\n  \r\n"])
def test_an_empty_file(tmp_path, content):
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(DataError, match="rows.jsonl: no records"):
        read_records(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("name, why", [("", "Is a directory"), ("none.jsonl", "No such file"), ("a\0b", "null")])
def test_no_file(tmp_path, name, why):
    with pytest.raises(DataError, match=f"{why}.*data.source"):
        load_records(f"{tmp_path}/{name}")


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*FIELDS, "x"]), inner, max_size=5),
)


@given(anything)
def test_check_record_takes_anything(row):
    faults = check_record(row)
    assert all(isinstance(f, str) and ": " in f for f in faults)
    if not faults:
        assert to_messages(row)[-1] == {"role": "assistant", "content": row["output"]}


@given(sound, st.none() | said)
def test_messages_alternate_and_end_with_the_answer(row, system):
    messages = to_messages(row, system)
    roles = [m["role"] for m in messages]
    assert roles == ["system"] * bool(system) + ["user", "assistant"] * (len(row["history"]) + 1)
    assert messages[-2]["content"] == row["instruction"] + ("\n\n" + row["input"] if row["input"] else "")


# ---------------------------------------------------------------- the corpus


def test_ten_different_rows_in_a_thousand():
    support, rejected = chatterbot_records("english", "tech_support")
    assert len(support) == 1050 and rejected == []
    assert len(drop_copies(support)[0]) == len({r["instruction"] for r in support}) == 10


@pytest.mark.parametrize("language", ["english", "chinese"])
def test_the_corpus_is_sound_and_what_is_not_has_a_reason(language):
    records, rejected = load_records(f"chatterbot:{language}")
    assert len(records) > 400 and all(check_record(r) == [] for r in records)
    assert all(r["reason"] == "malformed" and r["detail"] and r["file"] == f"chatterbot:{language}" for r in rejected)


@pytest.mark.parametrize(
    "source, hint",
    [("chatterbot:englsh", "'english'"), ("chatterbot:", "english"), ("chatterbot:english/foods", "'food'"),
     ("chatterbot:../english", "no language '..'"), ("chatterbot:english/a/b", "no topic 'a/b'")],
)  # fmt: skip
def test_a_corpus_that_is_not_there(source, hint):
    with pytest.raises(DataError, match=hint):
        load_records(source)


# ---------------------------------------------------------------- copies and splits


@given(st.lists(repeated, max_size=20))
def test_no_row_is_lost_and_no_copy_is_kept(rows):
    kept, rejected = drop_copies(rows)
    assert as_multiset(kept) + as_multiset(r["row"] for r in rejected) == as_multiset(rows)
    assert drop_copies(kept) == (kept, []) and {r["reason"] for r in rejected} <= {"exact_copy"}
    left = iter(rows)
    assert all(any(r is k for r in left) for k in kept), "the order of the file"


def fold(text):
    return " ".join(text.casefold().split())


@examples(deadline=None)
@given(st.lists(repeated | sound, max_size=25), st.floats(0.01, 0.99), st.integers(0, 5), st.randoms())
def test_a_split_is_by_question_complete_and_independent_of_the_order(rows, validation, seed, chance):
    questions = Counter(map(question_of, rows))
    if len(questions) < 2:
        with pytest.raises(DataError, match="at least 2"):
            split_records(rows, validation, seed)
        return
    train, held = split_records(rows, validation, seed)
    assert train and held and as_multiset(train) + as_multiset(held) == as_multiset(rows)
    sides = [Counter(map(question_of, side)) for side in (train, held)]
    assert not sides[0].keys() & sides[1].keys()
    assert abs(len(held) - validation * len(rows)) <= max(questions.values()) / 2 + 1 or 1 in map(len, sides)
    assert split_records(rows, validation, seed) == (train, held)
    mixed_train, mixed_held = split_records(chance.sample(rows, len(rows)), validation, seed)
    assert (as_multiset(mixed_train), as_multiset(mixed_held)) == (as_multiset(train), as_multiset(held))


@pytest.mark.parametrize("validation", [0, 1, -0.1, 1.5, float("nan")])
def test_a_share_is_between_0_and_1(validation):
    with pytest.raises(DataError, match="data.validation"):
        split_records([record("a"), record("b")], validation)


def test_another_seed_is_another_split():
    rows = [record(f"{i}?") for i in range(50)]
    assert split_records(rows, seed=1) != split_records(rows, seed=2)


# ---------------------------------------------------------------- the phase


def phase(folder, rows=None, *overrides):
    "Run the data phase on rows, or on the profile's corpus."
    if rows is not None:
        write_jsonl(folder / "rows.jsonl", rows)
        overrides = (f"data.source={folder / 'rows.jsonl'}", *overrides)
    run = RunFolder(folder / "run")
    return data_phase(load_settings("tiny", overrides), run), run.phase("data")


@in_folder
@example([record(f"{i}?") for i in range(9)], 4)
@given(st.lists(repeated | sound, min_size=4, max_size=20), st.none() | st.integers(2, 8))
def test_every_row_that_was_read_is_in_one_file(tmp_path, rows, limit):
    try:
        result, folder = phase(tmp_path, rows, f"data.limit={limit}".lower())
    except DataError as e:
        assert "data" in str(e)
        return
    files = {name: read_jsonl(folder / f"{name}.jsonl") for name in ("train", "validation", "rejected")}
    assert result["read"] == len(rows) == sum(map(len, files.values()))
    assert result["train"] == len(files["train"]) and result["validation"] == len(files["validation"])
    assert result["rejected"] == dict(Counter(r["reason"] for r in files["rejected"]))
    mended = [row for r in rows for row in clean_records([r], CleanConfig(near=0, quiet=True))[0]]
    over = [r["row"] for r in files["rejected"] if r["reason"] == "over_limit"]
    assert as_multiset([*files["train"], *files["validation"], *over]) <= as_multiset(mended)
    assert as_multiset([r["row"] for r in files["rejected"] if r["reason"] != "over_limit"]) <= as_multiset(rows)
    assert limit is None or result["train"] + result["validation"] <= limit


def test_the_phase_is_repeatable_and_its_limit_is_drawn_not_cut(tmp_path):
    first, folder = phase(tmp_path / "a")
    second, other = phase(tmp_path / "b")
    assert first == second and (folder / "train.jsonl").read_bytes() == (other / "train.jsonl").read_bytes()
    corpus = drop_copies(load_records("chatterbot:english")[0])[0]
    kept = read_jsonl(folder / "train.jsonl") + read_jsonl(folder / "validation.jsonl")
    assert len(kept) == 96 and as_multiset(kept) != as_multiset(corpus[:96])


@pytest.mark.parametrize("limit", [0, -3])
def test_a_limit_below_one(tmp_path, limit):
    with pytest.raises(DataError, match="data.limit"):
        phase(tmp_path, None, f"data.limit={limit}")


def test_copies_alone_cannot_be_split(tmp_path):
    with pytest.raises(DataError, match="1 different questions.*data.source"):
        phase(tmp_path, [record("同一个问题")] * 9)


def test_chinese_is_kept_as_it_is(tmp_path):
    rows = [record(f"第{i}题，３．５元？", "七天内可退。🙂\u2028好") for i in range(10)]
    random.Random(0).shuffle(rows)
    _, folder = phase(tmp_path, rows)
    kept = read_jsonl(folder / "train.jsonl") + read_jsonl(folder / "validation.jsonl")
    assert {r["output"] for r in kept} == {"七天内可退。🙂\n好"}  # a line separator is a line end; the rest stays
    assert {r["instruction"] for r in kept} == {r["instruction"] for r in rows}
    assert "七天内可退。🙂" in (folder / "train.jsonl").read_text(encoding="utf-8")


# ---------------------------------------------------------------- augmentation


def questions(n):
    verbs = "cancel close open buy get change begin end".split()
    nouns = "card account loan ticket order parcel contract bill".split()
    asked = [f"How do I {v} my {noun} without paying a {adj} fee?" for adj in ("big", "small", "new", "good")
             for noun in nouns for v in verbs]  # fmt: skip
    return [record(q, f"Answer {i}.") for i, q in enumerate(random.Random(1).sample(asked, n))]


SIDES = ("data.limit=none", "data.test=0.2", "clean.near=0")
AUGMENT = ("data.augment=true", 'augment.methods=["synonym", "noise"]', *SIDES)


def test_augmented_rows_are_of_the_training_side_and_nothing_leaks(tmp_path, capsys):
    pytest.importorskip("jieba")
    rows = questions(120)
    result, folder = phase(tmp_path / "a", rows, *AUGMENT)
    again, other = phase(tmp_path / "b", rows, *AUGMENT)
    plain, without = phase(tmp_path / "c", rows, *SIDES)
    names = ("train", "validation", "test", "rejected")
    assert all((folder / f"{n}.jsonl").read_bytes() == (other / f"{n}.jsonl").read_bytes() for n in names)
    assert all((folder / f"{n}.jsonl").read_bytes() == (without / f"{n}.jsonl").read_bytes() for n in names[1:3])
    train, validation, test, rejected = (read_jsonl(folder / f"{n}.jsonl") for n in names)
    old, new = train[: plain["train"]], train[plain["train"] :]
    assert old == read_jsonl(without / "train.jsonl") and new, "the new rows stand behind the old ones"
    by_id = {record_id(r): r for r in old}
    for r in new:
        made = r["extra"]["augmented"]
        source = by_id[made["of"]]
        assert r["id"] == f"{made['of']}/{made['method']}" and made["seed"] == 42
        assert r["output"] == source["output"] and r["instruction"] != source["instruction"]
        assert check_record(r) == []
    held = {question_of(r) for r in validation + test}
    assert not held & {question_of(r) for r in train}
    assert not any("augmented" in (r.get("extra") or {}) for r in validation + test + old)
    assert result["augmented"] == dict(Counter(r["extra"]["augmented"]["method"] for r in new))
    refused = [r for r in rejected if "method" in r]
    assert result["augment_refused"] == dict(Counter(r["reason"] for r in refused))
    assert len(new) + len(refused) == 2 * len(old), "every row and method gives a row or a reason"
    assert result["train"] == len(train)
    assert result["read"] == len(old + validation + test) + len(rejected) - len(refused) == 120
    assert "new by augmentation: " in capsys.readouterr().out
    assert not {"augmented", "augment_refused"} & plain.keys() and not any("augmented" in str(r) for r in old)


def test_a_rewritten_question_that_is_held_out_is_refused(tmp_path):
    "The synonym of `begin` is `start`: some training rows come out as what a held-out row asks."
    pytest.importorskip("jieba")
    rows = [record(f"How do I {v} the {c}{chr(97 + i)} machine in the hall?", f"By lever {c}{i}.")
            for c in "bcdfgh" for i in range(8) for v in ("buy", "purchase", "get")]  # fmt: skip
    rows = [r | dict(output=f"{r['output']} {i}") for i, r in enumerate(rows)]
    result, folder = phase(tmp_path, rows, *AUGMENT)
    held = [r for side in ("validation", "test") for r in read_jsonl(folder / f"{side}.jsonl")]
    assert result["augment_refused"].get("held_out", 0) > 0
    assert not {question_of(r) for r in held} & {question_of(r) for r in read_jsonl(folder / "train.jsonl")}


@pytest.mark.parametrize(
    "setting, why", [('augment.methods=["synonim"]', "synonym"), ('augment.fields=["output"]', "Answers are never")]
)
def test_a_method_that_nobody_knows_stops_before_anything_is_read(tmp_path, setting, why):
    with pytest.raises(AugmentError, match=why):
        phase(tmp_path, None, "data.source=nowhere.jsonl", "data.augment=true", setting)


def test_the_key_of_the_phase_depends_on_augmentation(tmp_path):
    from deepseek_cookbook.pipeline import phase_key, select

    run, changes = RunFolder(tmp_path), [[], ["data.augment=true"], ["data.augment=true", 'augment.methods=["swap"]']]
    assert len({phase_key(select(["data"])[0], load_settings("tiny", c), run) for c in changes}) == 3


def test_sources_of_the_package_stand_beside_files(tmp_path):
    from deepseek_cookbook.data.desk import desk_records

    file = tmp_path / "mine.jsonl"
    file.write_text('{"instruction": "Why?", "input": "", "output": "So.", "history": []}\n')
    records, rejected = load_records(f"{file}, desk:english/12, chatterbot:english/trivia")
    assert records[0]["output"] == "So." and records[1:13] == desk_records("english", 12)
    assert [r["file"] for r in rejected] == ["chatterbot:english/trivia"]
    assert len(load_records("desk:chinese")[0]) == 480
    for wrong in ("desk:french", "desk:english/many", "desk:english/0", "desk:"):
        with pytest.raises(DataError, match="desk"):
            load_records(wrong)
