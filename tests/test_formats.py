"""Formats: whatever a file holds, it becomes records or one report; every format goes there and back; memory stays."""

import gzip
import json
import os
import tracemalloc

import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from deepseek_cookbook.data import turns
from deepseek_cookbook.data.convert import FORMATS, detect, from_chat, preference_row, to_chat
from deepseek_cookbook.data.formats import (
    WRITTEN,
    DataError,
    check_record,
    from_messages,
    iter_array,
    iter_lines,
    iter_raw,
    iter_records,
    load_records,
    read_preferences,
    read_records,
    to_messages,
    to_record,
    write_records,
)

in_folder = examples(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
text = st.text(st.characters(blacklist_categories=["Cs"]), max_size=12)
said = text.filter(str.strip)


def record(instruction="问？", output="答。", input="", history=(), **more):
    return dict(instruction=instruction, input=input, output=output, history=[list(t) for t in history], **more)


def with_system(row, system, id):
    return row | ({"system": system} if system else {}) | ({} if id is None else {"id": id})


records = st.builds(
    with_system,
    st.builds(record, said, said, text, st.lists(st.tuples(text, text), max_size=2)),
    st.just("") | said,
    st.none(),
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | text,
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from("messages conversations role content from value prompt completion chosen rejected".split()
                        + "instruction input output history system id tools weight x".split()),
        inner,
        max_size=5,
    ),
    max_leaves=12,
)  # fmt: skip

# ---------------------------------------------------------------- lines


@in_folder
@given(st.binary(max_size=120) | st.lists(st.sampled_from([b'{"a": 1}', b"7", b"{", b"\xff", b""])).map(b"\n".join))
def test_every_line_comes_once_with_its_number(tmp_path, data):
    file = tmp_path / "x.jsonl"
    file.write_bytes(b"{}\n" + data)
    lines = (b"{}\n" + data).split(b"\n")
    read = list(iter_lines(file))
    assert [n for n, _, _ in read] == [i for i, line in enumerate(lines, 1) if line.strip()]
    assert all((row is None) or faults == [] for _, row, faults in read)


@pytest.mark.parametrize("size, fits", [(98, True), (99, True), (100, False), (5000, False)])
@pytest.mark.parametrize("end", [b"\n", b""])
def test_a_line_above_the_limit_is_a_fault_and_the_next_one_is_read(tmp_path, size, fits, end):
    file = tmp_path / "x.jsonl"
    file.write_bytes(b"1\n" + b"2" * size + b"\n3" + end)
    (_, first, _), (number, line, faults), (last, third, _) = iter_raw(file, limit=100)
    assert (first, number, last, third) == (b"1", 2, 3, b"3")
    assert (line == b"2" * size and not faults) if fits else f"{size + 1:,} bytes" in faults[0] and len(line) <= 100


def test_memory_does_not_grow_with_the_file_or_a_line(tmp_path):
    file = tmp_path / "x.jsonl"
    row = json.dumps(record(output="答" * 200)).encode() + b"\n"
    file.write_bytes(row * 20_000 + b"x" * 50_000_000 + b"\n" + row)  # 27 MB of rows, then a line of 50 MB
    tracemalloc.start()
    kept = [n for n, r, faults in iter_records(file, limit=2**20) if faults]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert kept == [20_001] and peak < 6e6


def test_memory_does_not_grow_with_a_list(tmp_path):
    file = tmp_path / "x.json"
    file.write_text(json.dumps([record(output="答" * 200)] * 10_000), encoding="utf-8")
    tracemalloc.start()
    assert sum(not faults for _, _, faults in iter_records(file)) == 10_000
    assert tracemalloc.get_traced_memory()[1] < 2e6
    tracemalloc.stop()


@pytest.mark.parametrize(
    "content, hint",
    [(gzip.compress(b"{}" * 999, mtime=0)[:-9], "broken"), (b"PK\x03\x04rest", "Excel"), (b"PAR1rest", "Parquet"),
     ('{"a": "招"}'.encode("utf-16"), "UTF-16"), (b"\xfe\xff\x00{", "UTF-16")],
)  # fmt: skip
@pytest.mark.parametrize("read", [read_records, load_records, read_preferences, lambda p: list(iter_lines(p))])
def test_a_file_of_another_kind_is_named(tmp_path, content, hint, read):
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=f"x.jsonl: .*{hint}"):
        read(str(tmp_path / "x.jsonl"))


def test_a_gbk_file_is_a_fault_of_its_line(tmp_path):
    (tmp_path / "x.jsonl").write_bytes('{"instruction": "余额"}\n'.encode("gbk"))
    with pytest.raises(DataError, match=r"x.jsonl:1:line: byte 18 is no UTF-8.*gb18030"):
        load_records(str(tmp_path / "x.jsonl"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path):
    (tmp_path / "x.jsonl").touch(mode=0)
    with pytest.raises(DataError, match="Permission denied"):
        load_records(str(tmp_path / "x.jsonl"))


# ---------------------------------------------------------------- a JSON list


@in_folder
@given(st.lists(records, max_size=6), st.sampled_from([None, 1, 3]), st.booleans(), st.booleans(), st.integers(1, 40))
def test_a_list_is_read_value_by_value_with_its_lines(tmp_path, rows, indent, bom, ascii_only, before):
    file, written = tmp_path / "x.json", "\n" * before + json.dumps(rows, indent=indent, ensure_ascii=ascii_only) + "\n"
    file.write_bytes(("\ufeff" * bom + written).encode())
    read = list(iter_array(file))
    assert [row for _, row, _ in read] == rows and all(faults == [] for _, _, faults in read)
    for number, _, _ in read:
        assert written.split("\n")[number - 1].lstrip().startswith(("{", "["))
    if indent is not None:
        assert len({number for number, _, _ in read}) == len(rows)


@in_folder
@example("[")
@example("[1, 2")
@example("[{}] x")
@example('["\\ud800"]')
@example("[" * 60_000)
@given(st.text('[]{}",:1 \n\\ud8', max_size=40))
def test_any_text_as_a_list_ends(tmp_path, content):
    file = tmp_path / "x.json"
    file.write_text(content, encoding="utf-8")
    read = list(iter_array(file))
    try:
        whole = json.loads(content)
    except (ValueError, RecursionError):
        return
    if isinstance(whole, list):
        assert len(read) == len(whole)
        assert all(faults or row == due for due, (_, row, faults) in zip(whole, read, strict=True))
    else:
        assert read[-1][2]


def test_values_longer_than_a_chunk(tmp_path):
    rows = [{"a": "x" * n} for n in (10, 70_000, 65_536, 200_000, 3)]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    assert [row for _, row, _ in iter_array(tmp_path / "x.json")] == rows
    *_, (_, row, faults) = iter_array(tmp_path / "x.json", limit=100_000)
    assert isinstance(row, str) and "the rest was not read" in faults[0]


def test_a_broken_list_tells_what_was_read_before(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps([record()] * 2, ensure_ascii=False)[:-1] + ', {"instru')
    with pytest.raises(DataError, match="1 of 3 rows .*read to its end\n.*x.json:1:list: .*mend it"):
        load_records(str(tmp_path / "x.json"))


# ---------------------------------------------------------------- there and back


@in_folder
@given(st.lists(records, min_size=1, max_size=4), st.sampled_from(WRITTEN), st.sampled_from([".json", ".jsonl"]))
def test_every_format_goes_there_and_back(tmp_path, rows, name, suffix):
    rows = [row | {"id": i} for i, row in enumerate(rows)]
    file = tmp_path / f"x{suffix}"
    assert write_records(file, rows, name) == len(rows)
    back, rejected = load_records(str(file))
    assert rejected == [] and [to_messages(r) for r in back] == [to_messages(r) for r in rows]
    assert [r["id"] for r in back] == list(range(len(rows)))
    if name in ("records", "alpaca"):
        assert back == rows


@given(records, st.sampled_from(["messages", "sharegpt", "prompt"]))
def test_messages_are_the_same_to_the_letter(row, name):
    chat = to_messages(row)
    assert to_chat(from_chat(chat, name), name) == (chat, [])
    assert to_messages(from_messages(chat)) == chat and check_record(from_messages(chat)) == []
    assert detect(from_chat(chat, name)) == [name]


@given(anything, st.sampled_from([*FORMATS]))
def test_any_row_is_a_sound_record_or_faults(row, name):
    found, faults = to_record(row, name)
    assert faults and all(": " in f for f in faults) or check_record(found) == []


@given(anything)
def test_detect_takes_any_object(row):
    if isinstance(row, dict):
        assert set(detect(row)) <= set(FORMATS)


CHAT = [{"role": "user", "content": "问？"}, {"role": "assistant", "content": "答。"}]
SYSTEM = {"from": "system", "value": "y"}
FAULTS = {
    "no list": ("messages", {"messages": "hi"}, "messages: found str"),
    "an empty list": ("messages", {"messages": []}, "messages: no answer at the end"),
    "a question at the end": ("messages", {"messages": CHAT[:1]}, "messages: no answer at the end"),
    "an answer first": ("sharegpt", {"conversations": CHAT[1:]}, "conversations[0]: found assistant where user is due"),
    "two questions": ("messages", {"messages": CHAT[:1] * 2}, "messages[1]: found user where assistant is due"),
    "system in between": ("messages", {"messages": [*CHAT, {"role": "system", "content": "x"}]}, "[2]: found system"),
    "a tool": ("messages", {"messages": [{"role": "tool", "content": "x"}]}, "messages[0]: found tool where user is"),
    "a tool call": ("messages", {"messages": [*CHAT[:1], CHAT[1] | {"tool_calls": [1]}]}, "messages[1].tool_calls"),
    "a weight": ("messages", {"messages": [*CHAT[:1], CHAT[1] | {"weight": 0}]}, "messages[1].weight"),
    "a picture": ("messages", {"messages": CHAT, "images": ["a.png"]}, "images: no record can hold it"),
    "a slip": ("alpaca", {"instruction": "a", "output": "b", "inptu": "c"}, "inptu: unknown field. Did you mean"),
    "no text": ("messages", {"messages": [{"role": "user", "content": None}]}, "messages[0].content: found NoneType"),
    "a blank answer": ("prompt", {"prompt": "a", "completion": " "}, "prompt+completion[1]: blank"),
    "a number": ("prompt", {"prompt": "a", "completion": 7}, "completion: found int"),
    "two systems": ("sharegpt", {"system": "x", "conversations": [SYSTEM, *CHAT]}, "given twice"),
    "equal answers": ("preference", {"prompt": "a", "chosen": "b", "rejected": "b"}, "rejected: equal"),
    "other questions": ("preference", {"chosen": CHAT, "rejected": [SYSTEM, *CHAT]}, "differ"),
    "a missing half": ("preference", {"prompt": "a", "chosen": "b"}, "rejected: missing"),
    "a number for an id": ("records", record() | {"id": 1.5}, "id: found float"),
    "yes for an id": ("records", record() | {"id": True}, "id: found bool"),
    "a system of numbers": ("records", record() | {"system": 7}, "system: found int"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_what_cannot_be_kept_is_named(name):
    format, row, fault = FAULTS[name]
    assert fault in "\n".join(to_record(row, format)[1])


def test_notes_beside_the_data_may_stay():
    row, faults = to_record({"messages": CHAT, "source": "forum", "score": 3}, "messages")
    assert faults == [] and row == record(extra={"source": "forum", "score": 3})


def test_all_are_read_without_a_name(tmp_path):
    rows = dict(
        records=record(), alpaca={"instruction": "问？", "output": "答。", "input": None}, messages={"messages": CHAT},
        sharegpt={"conversations": [{"from": "human", "value": "问？"}, {"from": "gpt", "value": "答。"}]},
        prompt={"prompt": "问？", "completion": "答。"},
        preference={"prompt": "问？", "chosen": "答。", "rejected": "不。"},
        question={"query": "问？", "response": "答。"}, firefly={"input": "问？", "target": "答。"},
        moss={"plain_text": "[Human]: 问？<eoh> [MOSS]: 答。<eoa>"},
        text={"text": "### Human: 问？### Assistant: 答。"},
    )  # fmt: skip
    assert {*rows} == {*FORMATS} - {"tree"}
    for name, row in rows.items():
        (tmp_path / name).write_text(json.dumps(row), encoding="utf-8")
        assert load_records(str(tmp_path / name)) == ([record()], []), name


BOTH = {"messages": [], "prompt": "", "completion": ""}


@pytest.mark.parametrize("row, hint", [({"title": 1}, "no format has them"), (BOTH, "messages or prompt, set data")])
def test_an_unclear_format_is_not_guessed(tmp_path, row, hint):
    (tmp_path / "x.jsonl").write_text("7\n" + json.dumps(row))
    with pytest.raises(DataError, match=f"x.jsonl:2:record: format unclear.*{hint}"):
        load_records(str(tmp_path / "x.jsonl"))


def test_a_format_may_be_named_and_a_wrong_name_is_an_error(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": CHAT, "prompt": "问？", "completion": "别。"}))
    assert load_records(str(tmp_path / "x.jsonl"), "prompt")[0][0]["output"] == "别。"
    for call in (lambda: load_records(str(tmp_path / "x.jsonl"), "mesages"), lambda: write_records("y", [], "mesages")):
        with pytest.raises(DataError, match="Did you mean 'messages'"):
            call()


def test_a_mixed_file_has_faults_on_the_lines_that_differ(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n" + json.dumps(record()))
    with pytest.raises(DataError, match="x.jsonl:2:messages: missing"):
        load_records(str(tmp_path / "x.jsonl"))


def test_ids_that_come_twice_are_told_with_both_lines(tmp_path):
    ids = [1, "1", "a", None, "a", 1]
    rows = [record() | ({} if i is None else {"id": i}) for i in ids]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError) as found:
        read_records(tmp_path / "x.jsonl")
    told = [line.split("x.jsonl:")[1].split(",")[0] for line in str(found.value).splitlines()[1:]]
    assert told == ["5:id: 'a' is that of line 3", "6:id: 1 is that of line 1"]


# ---------------------------------------------------------------- preferences


PAIR = dict(prompt=CHAT[:1], chosen=CHAT[1:], rejected=[{"role": "assistant", "content": "不。"}])
SHAPES = {
    "texts": dict(prompt="问？", chosen="答。", rejected="不。"),
    "messages": PAIR,
    "implicit": dict(chosen=PAIR["prompt"] + PAIR["chosen"], rejected=PAIR["prompt"] + PAIR["rejected"]),
    "repeated": dict(prompt="问？", chosen=PAIR["prompt"] + PAIR["chosen"], rejected=PAIR["prompt"] + PAIR["rejected"]),
    "hh": dict(chosen="\n\nHuman: 问？\n\nAssistant: 答。", rejected="\n\nHuman: 问？\n\nAssistant: 不。"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_preference_keeps_both_answers(tmp_path, name):
    assert preference_row(SHAPES[name]) == (PAIR, [])
    (tmp_path / "x.jsonl").write_text(json.dumps(SHAPES[name]))
    assert read_preferences(tmp_path / "x.jsonl") == [PAIR]
    assert load_records(str(tmp_path / "x.jsonl"))[0] == [record()]


def test_a_preference_keeps_id_and_system():
    row, faults = preference_row(SHAPES["texts"] | dict(id=3, system="S"))
    assert faults == [] and row["id"] == 3 and row["prompt"][0] == {"role": "system", "content": "S"}


# ---------------------------------------------------------------- system prompts, writing


def test_the_system_prompt_of_a_record_wins():
    assert to_messages(record(system="own"), "run")[0]["content"] == "own"
    assert to_messages(record(), "run")[0]["content"] == "run"


def test_nothing_unsound_is_written(tmp_path):
    with pytest.raises(DataError, match="record 2:output: blank"):
        write_records(tmp_path / "x.jsonl", [record(), record(output=" ")])
    assert list(tmp_path.iterdir()) == []


def test_roles_have_one_meaning():
    assert set(turns.ROLES.values()) == {"system", "user", "assistant", "tool"}
