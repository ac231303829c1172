"""One reader: every container, every format, every bad row accounted for; what goes out comes back."""

import gzip
import json
import os

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from deepseek_cookbook.data.dialogue import tree_records
from deepseek_cookbook.data.formats import (
    WRITTEN,
    DataError,
    check_record,
    extra_columns,
    iter_rows,
    load_records,
    read_records,
    to_messages,
    to_record,
    write_records,
)
from deepseek_cookbook.data.sources import iter_values
from deepseek_cookbook.reward.pairs import PairError, read_pairs
from deepseek_cookbook.train_rl import read_prompts

in_folder = examples(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
ASK, SAY = {"role": "user", "content": "Name a river."}, {"role": "assistant", "content": "The Elbe."}
QA = [dict(question=f"{i}+1?", answer=str(i + 1)) for i in range(3)]


def write(folder, name, rows):
    file = folder / name
    file.write_text("\n".join(r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in rows), "utf-8")
    return str(file)


# ---------------------------------------------------------------- containers


def contain(folder, kind):
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = "".join(json.dumps(r) + "\n" for r in QA)
    table = "question,answer\r\n" + "".join(f"{r['question']},{r['answer']}\r\n" for r in QA)
    made = {
        "a.jsonl": lines.encode(), "comma.jsonl": lines.replace("\n", ",\n").encode(),
        "a.json": json.dumps(QA).encode(),
        "bom.jsonl": ("\ufeff" + lines).encode(), "data.json": json.dumps(dict(version="1", data=QA, by="x")).encode(),
        "many.json": "\n".join(json.dumps(r, indent=1) for r in QA).encode(), "a.csv": table.encode(),
        "a.tsv": table.replace(",", "\t").encode(), "semicolon.csv": b"\xef\xbb\xbf" + table.replace(",", ";").encode(),
        "a.jsonl.gz": gzip.compress(lines.encode()), "a.csv.gz": gzip.compress(table.encode()),
        "no_suffix": gzip.compress(json.dumps(QA).encode()),
        "a.json.zst": pa.compress(json.dumps(QA).encode(), codec="zstd", asbytes=True),
    }  # fmt: skip
    if kind == "a.parquet":
        pq.write_table(pa.Table.from_pylist(QA), folder / kind)
    else:
        (folder / kind).write_bytes(made[kind])
    return folder / kind


KINDS = ["a.jsonl", "comma.jsonl", "a.json", "bom.jsonl", "data.json", "many.json", "a.csv", "a.tsv", "semicolon.csv",
         "a.jsonl.gz", "a.csv.gz", "no_suffix", "a.json.zst", "a.parquet"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_container_gives_the_same_rows_to_every_command(tmp_path, kind):
    file = contain(tmp_path, kind)
    assert [v for *_, v, _ in iter_values(file)] == QA
    records, rejected = load_records(str(file))
    assert [(r["instruction"], r["output"]) for r in records] == [("0+1?", "1"), ("1+1?", "2"), ("2+1?", "3")]
    assert rejected == []
    assert [r["prompt"][0]["content"] for r in read_prompts(file)] == ["0+1?", "1+1?", "2+1?"]


def test_several_files_patterns_and_what_matches_nothing(tmp_path):
    for name in ("p1.jsonl", "p2.jsonl"):
        write(tmp_path, name, [dict(QA[0], id=name)])
    for source in (f"{tmp_path}/*.jsonl", [tmp_path / "p1.jsonl", tmp_path / "p2.jsonl"],
                   f"{tmp_path}/p1.jsonl, {tmp_path}/p2.jsonl"):  # fmt: skip
        assert [r["id"] for r in read_records(source, format="auto")] == ["p1.jsonl", "p2.jsonl"]
    write(tmp_path, "p2.jsonl", [dict(QA[0], id="p1.jsonl")])
    with pytest.raises(DataError, match="p2.jsonl:1:id: 'p1.jsonl' is that of line 1 of .*p1.jsonl"):
        read_records(f"{tmp_path}/*.jsonl", format="auto")
    with pytest.raises(DataError, match="no file matches"):
        load_records(f"{tmp_path}/*.csv")


def test_a_hub_set_without_a_network_is_one_clear_error():
    with pytest.raises(DataError, match="hub:no-one/nothing:train: not read .*download"):
        load_records("hub:no-one/nothing:train")


def test_one_object_over_many_lines(tmp_path):  # B15
    rows = dict(conversations=[{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}])
    (tmp_path / "one.json").write_text(json.dumps(rows, indent=1))
    (record,) = read_records(tmp_path / "one.json", format="auto")
    assert (record["instruction"], record["output"]) == ("Hi", "Hello")


def test_a_second_list_and_a_broken_list_are_no_whole_file(tmp_path):
    file = tmp_path / "x.json"
    for text in (json.dumps(dict(train=QA, test=QA)), json.dumps(QA * 50)[:-9]):
        file.write_text(text)
        with pytest.raises(DataError, match="the rest was not read"):
            load_records(str(file), max_rejected=1.0)


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.csv.gz"])
def test_a_compressed_file_cut_short_is_an_error(tmp_path, name):
    text = "question,answer\n" + "".join(f"{i},{i * 7919}\n" for i in range(5000))
    (tmp_path / name).write_bytes(gzip.compress(text.encode())[:-500])
    with pytest.raises(DataError, match="compressed file that is broken"):
        list(iter_values(tmp_path / name))


def test_a_file_that_grows_is_read_to_its_size_at_the_start(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text("".join(json.dumps(dict(QA[0], note="n" * 900)) + "\n" for _ in range(1000)))
    size, n = os.path.getsize(file), 0
    with open(file, "a") as more:
        for _ in iter_values(file):
            n += 1
            more.write(json.dumps(QA[1]) + "\n")
            more.flush()
    assert n == 1000 and os.path.getsize(file) > size


def test_bad_rows_of_a_table(tmp_path):
    file = tmp_path / "x.csv"
    file.write_bytes(b'question,answer\n"a, b",1\nx\n' + b"\xff,2\n" + b"c,3\n")
    assert [(line, faults == []) for _, line, _, faults in iter_values(file)] == [
        (2, True),
        (3, False),
        (4, False),
        (5, True),
    ]
    file.write_text('question,answer\na,1\n"open,2\nb,3\n')
    with pytest.raises(DataError, match="x.csv:3:line: no row of a table"):
        load_records(str(file), max_rejected=1.0)
    file.write_text("a,a\n1,2\n")
    with pytest.raises(DataError, match="a column comes twice"):
        load_records(str(file))


BAD = {
    '{"question": "a", "question": "b", "answer": "c"}': "key_twice",  # B24
    '{"question": "a", "answer": "b", "x": {"k": 1, "k": 2}}': "key_twice",
    '{"question": "a", "answer": NaN}': "not_json",
    '{"question": "a", "answer": 1e999}': "not_json",
    '{"question": "a", "ans': "not_json",
    '{"question": "\\ud83d", "answer": "b"}': "half_character",
    '{"messages": [1]}': "missing_field",
    '{"question": "a", "answer": 3}': "malformed",
    '{"question": ["a"], "answer": "b"}': "malformed",
    '{"question": "a", "answer": "b", "id": [1]}': "malformed",
    '{"question": "a", "answer": " "}': "blank",
    '{"question": "a", "answer": "b", "label": false}': "bad_label",
    '{"question": "a", "answer": "b", "id": 0}': "id_twice",
    "[1]": "malformed",
    "null": "malformed",
}


@pytest.mark.parametrize("line", BAD)
def test_a_bad_row_is_a_rejected_row_with_its_place(tmp_path, line):
    good = [dict(QA[0], id=i) for i in range(40)]
    file = write(tmp_path, "x.jsonl", [*good[:20], line, *good[20:]])
    records, (bad,) = load_records(file)
    assert len(records) == 40 and (bad["line"], bad["file"], bad["reason"]) == (21, file, BAD[line])
    assert bad["field"] and bad["detail"]
    json.dumps(bad, ensure_ascii=False).encode()


def test_too_many_bad_rows_stop_the_reading(tmp_path):
    file = write(tmp_path, "x.jsonl", [*QA * 6, "{", "{"])
    with pytest.raises(DataError, match=r"2 of 20 rows rejected \(not_json 2\): above data.max_rejected = 0.05"):
        load_records(file)
    assert len(load_records(file, max_rejected=0.1)[1]) == 2
    with pytest.raises(DataError, match="nothing is kept"):
        load_records(write(tmp_path, "y.jsonl", ["{"]), max_rejected=1.0)
    with pytest.raises(DataError, match="from 0 to 1"):
        load_records(file, max_rejected=5)


@in_folder
@given(st.lists(st.sampled_from([*BAD, *map(json.dumps, QA), '{"title": 1}', "", "7"]), min_size=1, max_size=12))
def test_kept_and_rejected_are_what_was_read(tmp_path, lines):
    file = write(tmp_path, "x.jsonl", lines)
    rows = list(iter_rows(file))
    assert [r.line for r in rows] == [i for i, line in enumerate(lines, 1) if line.strip()]
    assert all((r.record is None) == bool(r.faults) for r in rows)


# ---------------------------------------------------------------- labels, extras, nulls


def test_an_answer_that_a_label_calls_bad_is_never_learnt(tmp_path):  # B4
    rows = [dict(prompt="When?", completion="Find out yourself.", label=False),
            dict(prompt="When?", completion="At six.", label=True),
            dict(messages=[ASK, SAY], label=0), dict(conversations=[ASK, SAY], kto_tag=False)]  # fmt: skip
    records, rejected = load_records(write(tmp_path, "kto.jsonl", rows[:2]))
    assert [r["output"] for r in records] == ["At six."] and [r["reason"] for r in rejected] == ["bad_label"]
    for row, name in zip(rows[2:], ("messages", "sharegpt"), strict=True):
        assert "the answer is bad" in to_record(row, name)[1][0]
    dolly = dict(instruction="Who painted it?", context="The sisters Ahn.", response="The sisters Ahn.", category="qa")
    (record,) = read_records(write(tmp_path, "dolly.jsonl", [dolly]), format="auto")
    assert record["input"] == "The sisters Ahn." and record["extra"] == dict(category="qa")
    assert extra_columns([record, record]) == {"category": 2}


M = lambda a: [ASK, dict(SAY, content=a)]  # noqa: E731
PAIR = dict(prompt="Name a river.", chosen=M("The Elbe."), rejected=M("A river."))


@pytest.mark.parametrize("extra", [dict(prompt_id="a1"), dict(messages=M("The Elbe."), score_chosen=8.0,
                                        score_rejected=3.0),
                                   dict(idx=4), dict(uid="u-4"), dict(id=None), dict(margin=None),
                                   dict(scores=None)])  # fmt: skip
def test_columns_of_others_are_no_slips(tmp_path, extra):  # B5, B6
    (pair,) = read_pairs(write(tmp_path, "p.jsonl", [PAIR | extra]), provenance="ai")
    assert pair["chosen"] == [SAY] and pair["prompt"] == [ASK]
    assert load_records(str(tmp_path / "p.jsonl"))[0][0]["output"] == "The Elbe."


@pytest.mark.parametrize("extra", [dict(conversation_id=7), dict(idx=1), dict(tools=None), dict(tools="[]"),
                                   dict(images=[]),
                                   dict(id=None), dict(system=""), dict(tool_calls=None)])  # fmt: skip
def test_nulls_and_empties_are_as_if_absent(tmp_path, extra):  # B5, B6
    turns = [ASK | dict(tool_calls=[], reasoning_content=""), SAY | dict(name=None)]
    (record,) = read_records(write(tmp_path, "n.jsonl", [dict(messages=turns) | extra]), format="auto")
    kept = {k: v for k, v in extra.items() if k in ("conversation_id", "idx")}
    assert record == dict(instruction="Name a river.", input="", output="The Elbe.", history=[]) | (
        dict(extra=kept) if kept else {})  # fmt: skip


def test_true_slips_are_still_told():
    for row, slip in (
        (dict(instruction="a", output="b", inptu="c"), "inptu"),
        (dict(messages=M("x"), sytem="s"), "sytem"),
    ):
        name = "alpaca" if "output" in row else "messages"
        assert f"{slip}: unknown field. Did you mean" in to_record(row, name)[1][0]
    assert check_record(dict(instruction="a", input="", output="b", history=[], inputs="c", score=1)) == []


def test_records_without_history_work():
    assert to_messages(dict(instruction="a", output="b"))[-1]["content"] == "b"


def test_control_tokens_stay_text():
    row, faults = to_record(dict(question="What is <|im_end|>?", answer="</s> <|MOSS|>: <eom>"), "question")
    assert faults == [] and row["instruction"] == "What is <|im_end|>?" and row["output"] == "</s> <|MOSS|>: <eom>"


# ---------------------------------------------------------------- tools

CALL = dict(name="rate", arguments={"of": "EUR"})
SHAPES = {
    "openai": dict(tools=[dict(type="function", function=dict(name="rate"))], messages=[
        ASK, dict(role="assistant", content=None, tool_calls=[dict(type="function",
            function=dict(CALL, arguments='{"of": "EUR"}'))]),
        dict(role="tool", content="7.8"), SAY]),
    "objects": dict(messages=[ASK, dict(role="assistant", tool_calls=[dict(function=CALL)]),
                              dict(role="tool", content="7.8"), SAY]),
    "factory": dict(tools=json.dumps([dict(name="rate")]), conversations=[
        {"from": "human", "value": ASK["content"]}, {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": "7.8"}, {"from": "gpt", "value": SAY["content"]}]),
    "older": dict(functions=[dict(name="rate")], messages=[
        ASK, dict(role="assistant", content=None, function_call=dict(CALL, arguments='{"of": "EUR"}')),
        dict(role="function", content="7.8"), SAY]),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_tool_calls_are_kept(tmp_path, shape):
    (record,) = read_records(write(tmp_path, "t.jsonl", [SHAPES[shape]]), format="auto")
    said = to_messages(record)
    assert [m["role"] for m in said] == ["user", "assistant", "tool", "assistant"]
    assert said[1]["tool_calls"] == [dict(type="function", function=CALL)]
    assert (record["instruction"], record["output"]) == (ASK["content"], SAY["content"])
    assert "tools" in record or shape == "objects"
    for name in WRITTEN:
        write_records(tmp_path / "out.jsonl", [record], name)
        assert read_records(tmp_path / "out.jsonl", format="auto") == [record], name


@pytest.mark.parametrize("turns", [[ASK, dict(role="assistant", function_call=dict(name="f", arguments="EUR"))],
                                   [ASK, dict(role="assistant", tool_calls=[dict(function=CALL)]), SAY],
                                   [ASK, dict(role="tool", content="7.8"), SAY]])  # fmt: skip
def test_tools_out_of_order_are_faults(turns):
    assert to_record(dict(messages=turns), "messages")[1]


# ---------------------------------------------------------------- other projects' files, rebuilt in shape

DEMOS = {
    "factory alpaca_zh": [dict(instruction="列出三种颜色", input="", output="红、黄、蓝")],
    "factory identity": [dict(instruction="hi", input="", output="Hello, I am {{name}}.")],
    "factory kto": [dict(messages=M("Yes."), label=True), dict(messages=M("No."), label=False)],
    "factory dpo": [dict(conversations=[{"from": "human", "value": "Hi"}], chosen={"from": "gpt", "value": "Hello"},
                         rejected={"from": "gpt", "value": "What"})],
    "factory glaive": [SHAPES["factory"]],
    "factory c4": [dict(text="Mills grind corn. Rivers turn their wheels all year long.")],
    "fastchat dummy": [dict(id="identity_0", conversations=[{"from": "human", "value": "Who are you?"},
                                                            {"from": "gpt", "value": "I am Vicuna."}])],
    "fastchat items": [dict(id="q", items=[{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}])],
    "firefly": [dict(kind="NLI", input="前提：下雨了。", target="中立")],
    "firefly turns": [dict(conversation_id=1, category="Brainstorming",
                           conversation=[dict(human="你好", assistant="您好"), dict(human="再见", assistant="再会")])],
    "medicalgpt sft": [dict(conversations=[{"from": "human", "value": "头痛？"}, {"from": "gpt", "value": "休息。"}])],
    "medicalgpt reward": [dict(system="", history=[], question="头痛？", response_chosen="休息。",
                               response_rejected="不知。",
                               chosen="休息。", rejected="不知。")],
    "medicalgpt pretrain": ["第一段说的是医院里的事情。", "", "第二段说的是药房里的事情。"],
    "axolotl chat": [dict(messages=M("Yes.")), dict(conversations=[{"from": "system", "value": "s"},
                     {"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 0}])],
    "axolotl completion": [dict(text="### Instruction: Say hi.\n\n### Response: Hi!")],
    "belle": [dict(instruction="Human:你好\nAssistant:您好\nHuman:再见\nAssistant:", input="", output="再会")],
    "openorca": [dict(id="niv.1", system_prompt="Be brief.", question="1+1?", response="2")],
    "ultrachat": [dict(id="0", data=["Hi", "Hello", "Bye", "Goodbye"])],
    "moss": [dict(conversation_id="1", meta_instruction="MOSS is kind.", num_turns=1, chat=dict(turn_1={
        "Human": "<|Human|>: 你好<eoh>\n", "Inner Thoughts": "<|Inner Thoughts|>: None<eot>\n",
        "Commands": "<|Commands|>: None<eoc>\n", "MOSS": "<|MOSS|>: 您好<eom>\n"}))],
}  # fmt: skip
LEFT = {"factory kto": ["bad_label"], "axolotl chat": ["missing_field"]}


@pytest.mark.parametrize("name", DEMOS)
def test_demo_files_of_other_projects_are_accounted_for(tmp_path, name):
    rows = DEMOS[name]
    file = write(tmp_path, "x.txt" if isinstance(rows[0], str) else "x.jsonl", rows)
    records, rejected = load_records(file, max_rejected=0.5)
    assert len(records) + len(rejected) == len([r for r in rows if r]) and [r["reason"] for r in rejected] == LEFT.get(
        name, []
    )
    assert all(check_record(r) == [] for r in records)


def test_what_the_odd_shapes_become():
    read = lambda name, format: to_record(DEMOS[name][0], format)[0]  # noqa: E731
    assert read("belle", "alpaca")["history"] == [["你好", "您好"]] and read("belle", "alpaca")["output"] == "再会"
    assert read("moss", "moss")["system"] == "MOSS is kind." and read("moss", "moss")["output"] == "您好"
    assert read("firefly turns", "sharegpt")["history"] == [["你好", "您好"]]
    assert read("openorca", "question")["system"] == "Be brief." and read("openorca", "question")["id"] == "niv.1"
    assert read("axolotl completion", "text")["output"] == "Hi!"
    assert read("ultrachat", "sharegpt")["output"] == "Goodbye"


def test_trees_of_either_shape_and_deleted_messages(tmp_path):  # B26
    node = lambda i, p, role, **more: dict(message_id=i, parent_id=p, role=role, text=f"says {i}", **more)  # noqa: E731
    flat = [node("q", None, "prompter"), node("a", "q", "assistant", lang="en"),
            node("b", "q", "assistant", deleted=True),
            node("c", "b", "prompter"), node("d", "q", "assistant", review_result=False)]  # fmt: skip
    records, rejected = load_records(write(tmp_path, "flat.jsonl", flat))
    assert [(r["id"], r["output"], r["extra"]) for r in records] == [("a", "says a", {"lang": "en"})]
    assert sorted(r["reason"] for r in rejected) == ["deleted"] * 3
    bare = lambda n: {k: v for k, v in n.items() if k != "parent_id"}  # noqa: E731
    tree = dict(message_tree_id="q", tree_state="ready_for_export", prompt=bare(flat[0]) | dict(
        replies=[bare(flat[1]) | dict(replies=[]), bare(flat[2]) | dict(replies=[bare(flat[3])]),
                 bare(flat[4])]))  # fmt: skip
    again, others = load_records(write(tmp_path, "tree.jsonl", [tree]))
    assert again == records and len(others) == 3
    assert tree_records(tmp_path / "tree.jsonl")[0] == records


# ---------------------------------------------------------------- preferences


def test_provenance_is_said_once_for_files_that_do_not_say_it(tmp_path):
    file = write(
        tmp_path,
        "hh.jsonl",
        [dict(chosen="\n\nHuman: Hi\n\nAssistant: Hello!", rejected="\n\nHuman: Hi\n\nAssistant: No.")],
    )
    with pytest.raises(PairError, match="no row says who chose.*provenance='human'"):
        read_pairs(file)
    assert read_pairs(file, provenance="human")[0]["provenance"] == "human"
    (tmp_path / "p.csv").write_text("prompt,chosen,rejected,provenance\nHi,Hello,No,ai\nBye,Goodbye,No,\n")
    with pytest.raises(PairError, match="p.csv:2:provenance: found 'ai' where 'human'"):
        read_pairs(tmp_path / "p.csv", provenance="human")
    assert [p["provenance"] for p in read_pairs(tmp_path / "p.csv", provenance="ai")] == ["ai", "ai"]


# ---------------------------------------------------------------- there and back

text = st.text(st.characters(blacklist_categories=["Cs"]), max_size=10)
said = text.filter(str.strip)
value = st.recursive(st.booleans() | st.integers() | said, lambda x: st.lists(x, min_size=1, max_size=2), max_leaves=3)


@in_folder
@given(st.data(), st.sampled_from(WRITTEN), st.sampled_from([".json", ".jsonl"]), st.booleans())
def test_every_format_gives_back_what_went_out(tmp_path, data, name, suffix, zipped):
    plain = name in ("records", "alpaca")
    rows = data.draw(st.lists(st.fixed_dictionaries(
        dict(instruction=said, input=text if plain else st.just(""), output=said,
             history=st.lists(st.lists(text, min_size=2, max_size=2), max_size=2)),
        optional=dict(system=said, extra=st.dictionaries(said, value, min_size=1, max_size=2),
                      tools=st.just([dict(name="f")]))),
        min_size=1, max_size=4))  # fmt: skip
    rows = [row | dict(id=i) for i, row in enumerate(rows)]
    write_records(tmp_path / f"x{suffix}", rows, name)
    file = tmp_path / f"x{suffix}"
    if zipped:
        file = tmp_path / "y.gz"
        file.write_bytes(gzip.compress((tmp_path / f"x{suffix}").read_bytes()))
    assert load_records(str(file)) == (rows, [])
