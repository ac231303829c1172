"""`deepseek-cookbook data`: each command on files as people send them, exit codes, nothing left after an error."""

import csv
import gzip
import json
import random
import tracemalloc

import pytest
from typer.testing import CliRunner

from deepseek_cookbook.cli import app
from deepseek_cookbook.data.formats import DataError, read_records
from deepseek_cookbook.data.mix import data_phase
from deepseek_cookbook.data_commands import read_ratios
from deepseek_cookbook.settings import RunFolder, load_settings, write_jsonl

TREES = [
    dict(instruction="Name a tree.", input="", output="An ash."),
    dict(instruction="Name a fish.", input="", output="A pike."),
]


def record(instruction, output):
    return dict(instruction=instruction, input="", output=output, history=[])


def run(*words):
    result = CliRunner().invoke(app, ["data", *map(str, words)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def rejected(folder):
    return [json.loads(line) for line in (folder / "rejected.jsonl").read_text(encoding="utf-8").splitlines()]


def many(n):
    names = "甲乙丙丁戊己庚辛"
    return [dict(question=f"第{i}个问题是什么？", answer=f"答案是{names[i % 8]}{i}。", page=i) for i in range(n)]


def in_shape(folder, kind, rows):
    "The same rows in another container."
    path = folder / f"rows.{kind}"
    if kind == "json":
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    elif kind == "csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "parquet":
        from datasets import Dataset

        Dataset.from_list(rows).to_parquet(path)
    else:
        text = "\n".join(json.dumps(r, ensure_ascii=False) for r in rows)
        path.write_bytes(gzip.compress(text.encode()) if kind.endswith("gz") else text.encode())
    return path


@pytest.mark.parametrize("kind", ["json", "jsonl", "jsonl.gz", "csv", "parquet"])
def test_every_container_goes_through_every_command(tmp_path, kind):
    path, out = in_shape(tmp_path, kind, many(40)), tmp_path / "out"
    assert run("check", path, "-q").exit_code == 0
    assert run("clean", path, out / "clean.jsonl", "-q").exit_code == 0
    cleaned = read_records(out / "clean.jsonl")
    assert len(cleaned) + len(rejected(out)) == 40 and len(cleaned) >= 39
    assert all(int(r["extra"]["page"]) == i for i, r in enumerate(cleaned)) or len(cleaned) < 40
    assert run("convert", path, out / "chat.json", "--to", "sharegpt", "-q").exit_code == 0
    assert [r["output"] for r in read_records(out / "chat.json", format="auto")] == [r["answer"] for r in many(40)]
    assert run("split", path, out / "sides", "--validation", "0.2", "--test", "0.1", "-q").exit_code == 0
    sides = {s: read_records(out / "sides" / f"{s}.jsonl") for s in ("train", "validation", "test")}
    assert sum(map(len, sides.values())) == 40 and len(sides["validation"]) == 8 and len(sides["test"]) == 4
    assert run("show", path, out / "rows.html", "-q").exit_code == 0 and "第39个" in (out / "rows.html").read_text()
    assert run("card", out / "sides", "--name", "n", "--licence", "MIT", "--source", "s").exit_code == 0
    assert json.loads((out / "sides" / "card.json").read_text())


def test_an_alpaca_list_is_cleaned_and_not_emptied(tmp_path):
    (tmp_path / "trees.json").write_text(json.dumps(TREES, indent=2))
    assert run("clean", tmp_path / "trees.json", tmp_path / "clean.jsonl", "-q").exit_code == 0
    assert [r["output"] for r in read_records(tmp_path / "clean.jsonl")] == ["An ash.", "A pike."]
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, TREES)))
    assert run("clean", tmp_path / "lines.jsonl", tmp_path / "two.jsonl", "-q").exit_code == 0
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "clean.jsonl").read_bytes()


@pytest.mark.parametrize("command", ["clean", "convert", "split", "augment"])
def test_nothing_kept_is_an_error_and_leaves_nothing(tmp_path, command):
    (tmp_path / "bad.jsonl").write_text('{"title": "a"}\n{"title": "b"}\n')
    result = run(command, tmp_path / "bad.jsonl", tmp_path / "out" / "x.jsonl", "-q")
    assert result.exit_code == 1 and "bad.jsonl:1" in result.stderr and "Traceback" not in result.stderr
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file()]


def test_too_many_bad_rows_stop_and_a_higher_share_lets_them_pass(tmp_path):
    rows = [*map(json.dumps, many(8)), '{"question": "?"}', '{"questi']
    (tmp_path / "in.jsonl").write_text("\n".join(rows))
    for command in ("clean", "convert"):
        stopped = run(command, tmp_path / "in.jsonl", tmp_path / "out.jsonl", "-q")
        assert stopped.exit_code == 1 and not (tmp_path / "out.jsonl").exists()
        assert run(command, tmp_path / "in.jsonl", tmp_path / "out.jsonl", "-q", "--max-rejected", "0.3").exit_code == 0
        assert len(read_records(tmp_path / "out.jsonl", format="auto")) == 8 and len(rejected(tmp_path)) == 2
        (tmp_path / "out.jsonl").unlink()


def test_check_tells_place_and_counts(tmp_path):
    (tmp_path / "in.jsonl").write_text("\n".join([*map(json.dumps, many(3)), '{"question": "Why?", "answer": " "}']))
    result = run("check", tmp_path / "in.jsonl", "--json")
    facts = json.loads(result.stdout)
    assert result.exit_code == 1 and (facts["read"], facts["kept"], facts["extra_columns"]) == (4, 3, {"page": 3})
    assert "in.jsonl:4:" in facts["faults"][0]
    told = run("check", tmp_path / "in.jsonl")
    assert "in.jsonl:4:" in told.stdout and "page" in told.stdout


def test_private_data_is_counted_and_masked_on_demand(tmp_path):
    row = dict(instruction="Your mail?", output="Write to li@example.com, please.")
    (tmp_path / "in.jsonl").write_text(json.dumps(row))
    shown = run("clean", tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert "li@example.com" in (tmp_path / "out.jsonl").read_text() and "left: EMAIL" in shown.stdout
    run("clean", tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--mask", "all", "-q")
    assert "[EMAIL]" in (tmp_path / "out.jsonl").read_text()


def test_mix_keeps_its_ratio(tmp_path):
    for name, n in dict(a=70, b=20).items():
        asked = [f"{name} asks {i * 7919 % 997} {'xyzuvw'[i % 6]}?" for i in range(n)]
        rows = [dict(prompt=q, completion=f"{name} {i}") for i, q in enumerate(asked)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = [f"{tmp_path}/a.jsonl=3", f"{tmp_path}/b.jsonl=1"]
    assert run("mix", tmp_path / "mix.jsonl", *words, "-q").exit_code == 0
    mixed = [r["extra"]["domain"] for r in read_records(tmp_path / "mix.jsonl")]
    assert len(mixed) % 4 == 0 and mixed.count(f"{tmp_path}/a.jsonl") == 3 * len(mixed) // 4 >= 45


@pytest.mark.parametrize("words", [["a.jsonl"], ["a.jsonl=x"], ["=3"], ["a=1", "a=2"]])
def test_ratios_that_mean_nothing(words):
    with pytest.raises(DataError):
        read_ratios(words)
    assert read_ratios(["a=b.jsonl=7", "c=0.5"]) == {"a=b.jsonl": 7.0, "c": 0.5}


def test_augment_adds_rows_and_keeps_the_old_ones(tmp_path):
    rows = [dict(instruction="Translate.", input=f"How do I {w} my credit card without paying a fee?", output=str(i))
            for i, w in enumerate("cancel close open buy get change begin end".split())]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert run("augment", tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--method", "synonym", "-q").exit_code == 0
    made = read_records(tmp_path / "out.jsonl")
    assert [r["output"] for r in made[:8]] == [r["output"] for r in rows] and len(made) > 8
    assert {r["instruction"] for r in made} == {"Translate."}


def test_a_page_with_what_was_rejected(tmp_path):
    trees = "An ash, an elm, an oak, a lime, a beech, a birch, a poplar, a willow, a maple, a pine and a fir."
    same = dict(instruction="Which trees grow in the park by the old mill?", input="", history=[], output=trees)
    rows = [same, same | dict(output=same["output"].replace("and a fir", "and a  fir!"))]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run("clean", tmp_path / "in.jsonl", tmp_path / "out.jsonl", "-q")
    words = ["show", tmp_path / "in.jsonl", tmp_path / "rows.html", "--rejected", tmp_path / "rejected.jsonl", "-q"]
    assert run(*words).exit_code == 0 and '"pair"' in (tmp_path / "rows.html").read_text()


@pytest.mark.parametrize("words", [
    ["clean", "train.jsonl", "train.jsonl"], ["convert", "train.jsonl", "train.jsonl"], ["split", "train.jsonl", "."],
    ["augment", "train.jsonl", "./train.jsonl"], ["mix", "train.jsonl", "train.jsonl=1"],
    ["convert", "t*.jsonl", "train.jsonl"], ["convert", "train.jsonl", "rejected.jsonl"],
])  # fmt: skip
def test_no_command_writes_over_what_it_reads(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, many(12))))
    before = (tmp_path / "train.jsonl").read_bytes()
    result = run(*words, "-q")
    assert result.exit_code == 1 and "Choose another name" in result.stderr
    assert (tmp_path / "train.jsonl").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["train.jsonl"]


def test_the_target_has_the_name_that_was_given(tmp_path):
    rows = [dict(instruction=f"How do I {w} my card today?", output=w) for w in "cancel close open buy get".split()]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert run("augment", tmp_path / "in.jsonl", tmp_path / "more.json", "--method", "noise", "-q").exit_code == 0
    assert [r["output"] for r in json.loads((tmp_path / "more.json").read_text())][:5] == [r["output"] for r in rows]
    assert run("mix", tmp_path / "all.data", f"{tmp_path}/in.jsonl=1", "-q").exit_code == 0
    assert len((tmp_path / "all.data").read_text().splitlines()) == 5


def test_the_rows_are_not_held_in_memory(tmp_path):
    "Rows of some kilobytes, with few words."
    chance, source = random.Random(0), tmp_path / "in.jsonl"
    word = lambda: "".join(chance.choices("abcdefgh", k=900))  # noqa: E731
    write_jsonl(source, [record(f"{word()}?", "A.") for _ in range(9)])
    assert run("split", source, tmp_path / "out", "-q").exit_code == 0  # what is imported is there now
    write_jsonl(source, (record(f"{word()} {word()}?", " ".join(word() for _ in range(18))) for _ in range(1000)))
    tracemalloc.start()
    try:
        assert run("split", source, tmp_path / "out", "-q").exit_code == 0
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < source.stat().st_size / 2, "all of them as dictionaries are more than the file"


@pytest.mark.parametrize("command", ["split", "augment", "mix", "phase"])
@pytest.mark.parametrize("at", [5, 45, 95])
def test_nothing_is_left_after_ctrl_c(tmp_path, monkeypatch, command, at):
    "While rows are read, and while they are written."
    source, out, calls = tmp_path / "in.jsonl", tmp_path / "out", []
    source.write_text("\n".join(map(json.dumps, many(40))))
    whole = json.dumps

    def stopped(*args, **kwargs):
        calls.append(args)
        if len(calls) == at:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    monkeypatch.setattr(json, "dumps", stopped)
    words = dict(split=[source, out], augment=[source, out / "x.jsonl"], mix=[out / "x.jsonl", f"{source}=1"])
    with pytest.raises((KeyboardInterrupt, AssertionError)):
        if command == "phase":
            data_phase(load_settings("tiny", [f"data.source={source}", "data.limit=none"]), RunFolder(out))
        else:
            assert run(command, *words[command], "-q").exit_code == 0
    assert len(calls) >= at and not [p for p in out.rglob("*") if p.is_file()]


def test_a_question_that_most_rows_ask_is_told(tmp_path):
    rows = [record("Again?", f"answer {i}") for i in range(30)] + [record(f"{i}?", f"{i}") for i in range(20)]
    write_jsonl(tmp_path / "in.jsonl", rows)
    said = run("split", tmp_path / "in.jsonl", tmp_path / "out").stdout.replace("\n", " ")
    assert "one question alone has 30 of 50 rows (60%, above data.max_unit = 10%)" in said
    write_jsonl(tmp_path / "in.jsonl", rows[28:])
    assert "one question" not in run("split", tmp_path / "in.jsonl", tmp_path / "out").stdout


def test_the_source_is_read_once(tmp_path, monkeypatch):
    "A file that changes in between can't make two halves that don't fit."
    from deepseek_cookbook.data import formats

    opened, once = [], formats.iter_rows
    monkeypatch.setattr(formats, "iter_rows", lambda *args: opened.append(args) or once(*args))
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, many(40))))
    for words in (["split", tmp_path / "in.jsonl", tmp_path], ["augment", tmp_path / "in.jsonl", tmp_path / "a.jsonl"],
                  ["mix", tmp_path / "m.jsonl", f"{tmp_path}/in.jsonl=1"]):  # fmt: skip
        assert run(*words, "-q").exit_code == 0
        assert len(opened) == 1
        opened.clear()
