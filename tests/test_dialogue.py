"""Dialogue trees and tags: every node is in a thread or rejected with its line; impossible tags and spans are told."""

import json
import random
import re
from collections import Counter

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from deepseek_cookbook.data.dialogue import (
    grow,
    iob_faults,
    label_faults,
    read_iob,
    read_nodes,
    span_faults,
    spans_to_tags,
    surface_tags,
    tags_to_spans,
    threads,
    tree_records,
)
from deepseek_cookbook.data.formats import DataError, check_record, to_messages

in_folder = examples(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=80)


def message(id, parent, role="user", content=None):
    return dict(id=id, parent_id=parent, role=role, content=content or f"says {id}")


def write(folder, *rows):
    file = folder / "tree.jsonl"
    file.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return file


# ---------------------------------------------------------------- trees


ids = st.integers(0, 9)
nodes = st.builds(message, ids, st.none() | ids, st.sampled_from(["user", "assistant", "system"]))


@in_folder
@given(st.lists(nodes, max_size=14) | st.lists(nodes | st.integers() | st.just({"id": 1}), max_size=8))
def test_every_node_is_in_a_thread_or_rejected(tmp_path, rows):
    file = write(tmp_path, *rows)
    read, rejected = read_nodes(file)
    assert len(read) + len(rejected) == len(rows)
    tree, lost = grow(read, file)
    ways, unanswered = threads(tree, file)
    rejected += lost + unanswered
    used = {n["line"] for way in ways for n in way}
    assert Counter(used) + Counter(r["line"] for r in rejected) == Counter(range(1, len(rows) + 1))
    for r in rejected:
        assert r["row"] == rows[r["line"] - 1] and all(d.startswith(f"{file}:{r['line']}:") for d in r["detail"])
    for way in ways:
        assert way[0]["parent_id"] is None and way[-1]["role"] == "assistant"
        assert all(child["parent_id"] == parent["id"] for parent, child in zip(way, way[1:], strict=False))
    assert len({way[-1]["id"] for way in ways}) == len(ways)


@in_folder
@given(st.lists(nodes, max_size=14))
def test_threads_are_sound_records_with_their_words(tmp_path, rows):
    records, rejected = tree_records(write(tmp_path, *rows))
    for record in records:
        assert check_record(record) == []
        said = [m["content"] for m in to_messages(record)]
        assert said[-1] == f"says {record['id']}" and len(set(said)) == len(said)
    assert {r["reason"] for r in rejected} <= {"duplicate_id", "orphan", "cycle", "role_order", "no_answer"}


@in_folder
@given(st.randoms(), st.integers(2, 30))
def test_the_order_of_the_lines_does_not_matter(tmp_path, chance, n):
    rows = [message(0, None)] + [message(i, chance.randrange(i), "user") for i in range(1, n)]
    depth = [0]
    for i in range(1, n):
        depth.append(depth[rows[i]["parent_id"]] + 1)
        rows[i]["role"] = ("user", "assistant")[depth[i] % 2]
    as_set = lambda found: sorted(map(str, found[0]))  # noqa: E731
    first = as_set(tree_records(write(tmp_path, *rows)))
    assert as_set(tree_records(write(tmp_path, *chance.sample(rows, n)))) == first


def reasons(folder, *rows):
    return {(r["line"], r["reason"]): r["detail"][0].split(":", 2)[2] for r in tree_records(write(folder, *rows))[1]}


def test_each_kind_of_fault_has_its_reason_and_line(tmp_path):
    found = reasons(
        tmp_path, message("q", None), message("a", "q", "assistant"), message("a", "q", "assistant"),
        message("b", "q"), message("c", "gone"), message("d", "c", "assistant"), message("e", "f"),
        message("f", "e", "assistant"), message("g", "g"), message("h", "e", "assistant"), message("i", "a"),
        message("j", None, "assistant"), {"id": 1.5}, message("k", "b", "assistant"),
    )  # fmt: skip
    assert {k: v.split(",")[0] for k, v in found.items()} == {
        (3, "duplicate_id"): "id: 'a' is that of line 2",
        (4, "role_order"): "role: found user after user",
        (5, "orphan"): "parent_id: 'gone': no message with this id leads to a root",
        (6, "orphan"): "parent_id: 'c': no message with this id leads to a root",
        (7, "cycle"): "parent_id: 'f': leads back to itself",
        (8, "cycle"): "parent_id: 'e': leads back to itself",
        (9, "cycle"): "parent_id: 'g': leads back to itself",
        (10, "cycle"): "parent_id: 'e': leads back to itself",
        (11, "no_answer"): "content: nobody answers it",
        (12, "role_order"): "role: found assistant at a root",
        (13, "malformed"): "id: write text or a whole number",
        (14, "orphan"): "parent_id: 'b': no message with this id leads to a root",
    }


def test_openassistant_names_and_a_system_root(tmp_path):
    rows = [
        dict(message_id="s", parent_id=None, role="system", text="S", lang="zh"),
        dict(message_id="q", parent_id="s", role="prompter", text="问？"),
        dict(message_id="a", parent_id="q", role="assistant", text="答。"),
    ]
    records, rejected = tree_records(write(tmp_path, *rows))
    assert rejected == []
    assert records == [dict(instruction="问？", input="", output="答。", history=[], system="S", id="a")]


def test_a_chain_of_fifty_thousand_messages(tmp_path):
    n = 50_000
    rows = [message(i, i - 1 if i else None, ("user", "assistant")[i % 2]) for i in range(n)]
    random.Random(0).shuffle(rows)
    records, rejected = tree_records(write(tmp_path, *rows))
    assert rejected == [] and len(records) == 1 and len(records[0]["history"]) == n // 2 - 1
    rows = [message(i, (i + 1) % n) for i in range(n)]  # one cycle
    assert Counter(r["reason"] for r in tree_records(write(tmp_path, *rows))[1]) == {"cycle": n}


def test_a_broken_line_is_a_rejected_row(tmp_path):
    file = tmp_path / "tree.jsonl"
    file.write_bytes(b'{"id": 1, "role": "user", "content": "a"}\n{"id"\n\xff\n')
    told = [(r["line"], r["reason"]) for r in tree_records(file)[1]]
    assert told == [(2, "not_json"), (3, "not_utf8"), (1, "no_answer")]


# ---------------------------------------------------------------- tags


TAGS = st.lists(st.sampled_from(["O", "B-ORG", "I-ORG", "B-PER", "I-PER"]), max_size=8)


def is_sound(tags, scheme):
    "The definition, by a regular expression over the whole sentence."
    letters = "".join({"O": "o", "B-ORG": "A", "I-ORG": "a", "B-PER": "P", "I-PER": "p"}[t] for t in tags)
    if scheme == "IOB2":
        return re.fullmatch("(o|Aa*|Pp*)*", letters) is not None
    return not re.search("(^|[^aA])A|(^|[^pP])P", letters)


@given(TAGS, st.sampled_from(["IOB1", "IOB2"]))
def test_faults_are_those_of_the_definition(tags, scheme):
    assert (iob_faults(tags, scheme) == []) == is_sound(tags, scheme)


@given(TAGS)
def test_sound_tags_and_spans_say_the_same(tags):
    spans = tags_to_spans(tags)
    again = spans_to_tags(len(tags), spans)
    assert iob_faults(again) == [] and tags_to_spans(again) == spans
    assert span_faults("x" * len(tags), [dict(start=a, end=b, label=c) for a, b, c in spans]) == []
    if not iob_faults(tags):
        assert again == tags


@pytest.mark.parametrize("tag", ["", "B", "I-", "X-ORG", "b-ORG", "B ORG", "E-ORG", "o"])
def test_what_is_no_tag(tag):
    assert iob_faults([tag])[0][0] == 0


def test_a_tagged_file_has_all_its_faults_with_their_lines(tmp_path):
    file = tmp_path / "ner.txt"
    lines = ["-DOCSTART- O", "", "招\tB-ORG", "商 _ I-ORG", "\u3000 O", "", "Acme I-ORG", "Inc", ""]
    file.write_bytes("\r\n".join(lines).encode() + b"\xff O\n")
    with pytest.raises(DataError) as found:
        read_iob(file)
    head, *told = str(found.value).splitlines()
    assert head.endswith("3 faults in IOB2 tags")
    assert [t.split("ner.txt:")[1].split(",")[0] for t in told] == [
        "7:tag: I-ORG after O: in IOB2 write B-ORG",
        "8:line: found one column",
        "9:line: byte 1 is no UTF-8",
    ]


def test_a_sound_tagged_file(tmp_path):
    (tmp_path / "ner.txt").write_text("\n招 I-ORG\n商 I-ORG\n\u3000 O\n\n\n行 B-ORG\n", encoding="utf-8")
    with pytest.raises(DataError, match="ner.txt:2:tag"):
        read_iob(tmp_path / "ner.txt")
    (tmp_path / "ner.txt").write_text("\n招 I-ORG\n商 I-ORG\n\u3000 O\n\n\n行 I-ORG", encoding="utf-8")
    assert read_iob(tmp_path / "ner.txt", "IOB1") == [
        dict(line=2, tokens=["招", "商", "\u3000"], tags=["I-ORG", "I-ORG", "O"]),
        dict(line=7, tokens=["行"], tags=["I-ORG"]),
    ]


@pytest.mark.parametrize("scheme", ["IOB3", "BIO"])
def test_an_unknown_scheme(tmp_path, scheme):
    with pytest.raises(DataError, match="write IOB2 or IOB1"):
        read_iob(tmp_path, scheme)


@in_folder
@given(st.binary(max_size=80))
def test_any_bytes_are_sentences_or_a_data_error(tmp_path, data):
    (tmp_path / "x").write_bytes(data)
    try:
        sentences = read_iob(tmp_path / "x")
    except DataError:
        return
    assert sentences and all(len(s["tokens"]) == len(s["tags"]) for s in sentences)


# ---------------------------------------------------------------- spans


text = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12) | st.text("招商a😀é", min_size=1, max_size=12)


@given(text, st.integers(0, 11), st.integers(1, 12))
def test_quoted_spans_are_checked_in_characters(body, start, length):
    body = body.replace(" ", "_")
    end = min(start + length, len(body))
    quoted = body[start:end]
    if start >= end or quoted != quoted.strip():
        return
    assert span_faults(body, [dict(start=start, end=end, label="X", text=quoted)]) == []
    for code, width, name in (("utf-8", 1, "UTF-8 bytes"), ("utf-16-le", 2, "UTF-16 units")):
        at, to = (len(body[:n].encode(code)) // width for n in (start, end))
        if body[at:to] != quoted:
            told = span_faults(body, [dict(start=at, end=to, label="X", text=quoted)])
            assert len(told) == 1 and "count characters" in told[0]
            assert name in told[0] or "UTF-8" in told[0]


SPANS = {
    "a text": ("x", "whole numbers"),
    "nothing": ({}, "whole numbers"),
    "an empty span": ({"start": 2, "end": 2}, "whole numbers"),
    "a negative start": ({"start": -1, "end": 2}, "whole numbers"),
    "yes": ({"start": True, "end": 2}, "whole numbers"),
    "beyond the end": ({"start": 4, "end": 99}, "the text has 10 characters"),
    "blanks": ({"start": 0, "end": 3}, "cut off the blanks around '招商 '"),
    "somewhere else": ({"start": 0, "end": 2, "text": "行"}, "'行' is at 5"),
    "nowhere": ({"start": 0, "end": 2, "text": "x"}, "'x' is nowhere"),
}


@pytest.mark.parametrize("name", SPANS)
def test_a_span_that_cannot_be(name):
    span, fault = SPANS[name]
    (told,) = span_faults("招商 a 行 bcde"[:10], [span])
    assert told.startswith("spans[0].start") and fault in told


def test_spans_that_overlap():
    told = span_faults("0123456789", [dict(start=4, end=6), dict(start=0, end=5), dict(start=6, end=7)])
    assert len(told) == 1 and told[0].startswith("spans[0]") and "ends at 5" in told[0]


# ---------------------------------------------------------------- the same words, another tag


def tagged(text, *names, line=1, split=list):
    tokens = split(text)
    tags = ["O"] * len(tokens)
    for name, label in names:
        own = split(name)
        at = next(i for i in range(len(tokens)) if tokens[i : i + len(own)] == own)
        tags[at : at + len(own)] = [f"B-{label}"] + [f"I-{label}"] * (len(own) - 1)
    return dict(line=line, tokens=tokens, tags=tags)


@pytest.mark.parametrize(
    "split, name, frame, other",
    [(list, "招商银行", "我在{}开户", "LOC"), (str.split, "Acme Bank", "i went to {} today", "PER")],
)
def test_a_slip_against_the_majority_is_a_fault_with_its_line(split, name, frame, other):
    rows = [tagged(frame.format(name), (name, "ORG"), line=100 * i, split=split) for i in range(1, 9)]
    rows.append(tagged(frame.format(name), line=900, split=split))
    rows.append(tagged(frame.format(name), (name, other), line=1000, split=split))
    at = len(split(frame.split("{}")[0]))
    faults, warnings = label_faults(rows)
    assert [(f["surface"], f["label"], f["line"]) for f in faults] == [(name, "O", 900 + at), (name, other, 1000 + at)]
    assert faults[0]["counts"] == {"ORG": 8, "O": 1, other: 1} and warnings == []
    assert faults[0]["detail"].startswith(f"{900 + at}:tag: ") and "ORG in 8 of 10 places" in faults[0]["detail"]
    assert label_faults(rows, majority=0.9)[0] == [] and len(label_faults(rows, majority=0.9)[1]) == 1
    assert label_faults(rows, least=11)[0] == []
    assert label_faults(rows[:8]) == ([], [])


def test_a_name_tagged_once_among_plain_words_is_the_slip():
    rows = [tagged("please may i go", line=10 * i, split=str.split) for i in range(9)]
    rows.append(tagged("ask may now", ("may", "PER"), line=500, split=str.split))
    faults, _ = label_faults(rows)
    assert [(f["label"], f["line"]) for f in faults] == [("PER", 501)]


def test_places_that_are_no_contradiction():
    pytest.importorskip("jieba")
    rows = [tagged("我爱中国", ("中国", "LOC")) for _ in range(5)]
    rows += [tagged("中国银行好", ("中国银行", "ORG"))]  # inside a longer entity
    assert label_faults(rows) == ([], [])
    bank = [tagged("这行很好", ("行", "ORG")) for _ in range(5)]
    assert label_faults(bank + [tagged("发行债券"), tagged("银行开门")]) == ([], [])  # inside a word
    ann = [tagged("call Ann", ("Ann", "PER")) for _ in range(5)]
    assert label_faults(ann + [tagged("an Annual day")]) == ([], [])  # character by character
    assert len(label_faults(ann + [tagged("an Ann day")])[0]) == 1


def test_an_ambiguous_surface_is_one_warning():
    labels = enumerate(["PER", "LOC"] * 4, 1)
    rows = [tagged("jordan won", ("jordan", label), line=i * 10, split=str.split) for i, label in labels]
    faults, [warning] = label_faults(rows)
    assert faults == [] and warning["counts"] == {"PER": 4, "LOC": 4}
    assert "PER 4 times (line 10, 30, 50)" in warning["detail"] and "LOC 4 times (line 20, 40, 60)" in warning["detail"]
    with pytest.raises(DataError, match="majority"):
        label_faults(rows, majority=0.5)


@examples(deadline=None)
@given(st.lists(st.lists(st.sampled_from(["a", "bb", "cc"]).flatmap(
    lambda w: st.tuples(st.just(w), st.sampled_from(["O", "B-X", "B-Y", "I"]))), max_size=8), max_size=5))  # fmt: skip
def test_every_place_is_counted_once(drawn):
    "Against an oracle that looks at each window of each sentence."
    rows = []
    for cells in drawn:
        tags, before = [], "O"
        for _, tag in cells:
            tag = (f"I-{before[2:]}" if before != "O" else "O") if tag == "I" else tag
            tags.append(tag)
            before = tag
        rows.append(dict(line=1, tokens=[w * 2 for w, _ in cells], tags=tags))
    spans = [tags_to_spans(r["tags"]) for r in rows]
    surfaces = {tuple(r["tokens"][a:b]) for r, own in zip(rows, spans, strict=True) for a, b, _ in own}
    expected = {s: Counter() for s in surfaces}
    for r, own in zip(rows, spans, strict=True):
        for a in range(len(r["tokens"])):
            for b in range(a + 1, len(r["tokens"]) + 1):
                window = tuple(r["tokens"][a:b])
                if window not in surfaces: continue
                label = next((x for i, j, x in own if (i, j) == (a, b)), None)
                if label or all(t == "O" for t in r["tags"][a:b]): expected[window][label or "O"] += 1
    found = {s: Counter(label for label, _ in tags) for s, tags in surface_tags(rows).items()}
    assert found == expected
