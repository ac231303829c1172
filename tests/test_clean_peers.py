"""The bench beside other pipelines: row texts, families, the judge and the table, without any peer installed."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "scripts" / "bench"


@pytest.fixture(scope="module")
def bench():
    "The script as a module; it imports its neighbours by their plain names."
    sys.path.insert(0, str(BENCH))
    try:
        spec = importlib.util.spec_from_file_location("clean_peers", BENCH / "clean_peers.py")
        sys.modules["clean_peers"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(BENCH))


def row(instruction, output, page=""):
    return dict(instruction=instruction, input=page, output=output, history=[])


def test_a_row_becomes_one_text(bench):
    assert bench.row_text(row("Ask", "Say")) == "Ask\nSay"
    assert bench.row_text(row("Ask", "Say", "Page")) == "Ask\nPage\nSay"


def test_han_characters_are_set_apart_by_one_blank_each(bench):
    assert bench.row_text(row("退货 fee2元？", "好，go"), apart=True) == "退 货 fee2 元？\n好，go"
    assert bench.row_text(row("No such sign  here.", "Fine"), apart=True) == "No such sign  here.\nFine"


def test_every_copy_joins_the_family_of_its_row(bench, tmp_path):
    rows, kinds = bench.prepared(1500, 42, tmp_path)
    family = bench.families(rows)
    copies = {i for i, kind in enumerate(kinds) if kind.startswith("copy:")}
    assert {i for i, first in enumerate(family) if first != i} == copies
    assert {kinds[i] for i in copies} == set(bench.ALIKE)
    lines = (tmp_path / "texts0.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines[:2]] == [dict(id=str(i), text=bench.row_text(rows[i])) for i in (0, 1)]


KINDS = ["free", "copy:word", "copy:same", "rubric", "copy:space"]
FAMILY = [0, 0, 0, 3, 3]


@pytest.mark.parametrize("kept, found, lost", [
    ({0, 3}, {"word", "same", "space"}, set()),
    ({2, 4}, {"word", "same", "space"}, set()),  # a copy stays instead: nothing is lost
    ({1, 2, 3}, {"same", "space"}, set()),  # the same text stands for the row, so the other one was missed
    ({0, 1, 2, 3, 4}, set(), set()),
    ({3}, {"word", "same", "space"}, {"free"}),
])  # fmt: skip
def test_the_judge_is_fair_to_those_who_keep_another_one_of_a_family(bench, tmp_path, kept, found, lost):
    said = bench.verdict(kept, [row(str(i), "x") for i in range(5)], KINDS, FAMILY, tmp_path)
    assert said["kept"] == len(kept) and said["unaccounted"] == 0
    assert {k.removeprefix("copy:") for k, share in said["found"].items() if share} == found
    assert {k for k, share in said["lost"].items() if share} == lost


def test_a_peer_that_fails_is_a_line_with_its_error(bench, tmp_path, monkeypatch):
    rows, kinds = bench.prepared(5, 42, tmp_path)
    monkeypatch.setattr(bench, "install", lambda name, folder: Path(sys.executable))
    line = bench.Line("nobody", "none", "datasketch", "no_such_function")
    result = bench.one_line(line, tmp_path, tmp_path, rows, kinds, bench.families(rows))
    assert "no_such_function" in result["error"] and "cpu" not in result


def test_the_tables_leave_out_who_failed(bench):
    good = dict(name="good", rows_per_cpu_second=1234.5, wall=2.0, peak_gib=0.5, kept=9, found={"copy:same": 1.0},
                lost={"free": 0.125})  # fmt: skip
    speed, found, lost = bench.tables([good, dict(name="bad", error="no")])
    assert [list(c.cells) for c in speed.columns] == [["good"], ["1,234"], ["2.0"], ["0.50"], ["9"]]
    assert [c.header for c in found.columns] == ["found", "same"] and list(found.columns[1].cells) == ["100.0%"]
    assert list(lost.columns[1].cells) == ["12.5%"]
    assert all(not table.row_count for table in bench.tables([dict(name="bad", error="no")]))


def test_every_line_names_its_pins_and_a_function_of_the_worker(bench):
    code = (BENCH / "peer_cleaners.py").read_text()
    for line in bench.LINES:
        assert all("==" in pin for pin in bench.PINS[line.pins])
        assert f"def {line.function}(" in code
    help_ = subprocess.run([sys.executable, "-I", str(BENCH / "peer_cleaners.py"), "--help"], capture_output=True)
    assert help_.returncode == 0
