"""Rows on disk: what was stored is read back, in any order; the memory holds a place a row, the folder no file."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from deepseek_cookbook.data.spool import Spool, View, alphabetical, progress
from deepseek_cookbook.settings import WriteError

texts = st.text(st.characters(exclude_categories=()), max_size=9)  # half characters as well
values = st.none() | st.booleans() | st.integers() | texts
values = st.recursive(values, lambda v: st.lists(v) | st.dictionaries(texts, v))


@examples(deadline=None, max_examples=40)
@given(rows=st.lists(st.dictionaries(texts, values, max_size=4), max_size=9), data=st.data())
def test_rows_come_back_by_number(tmp_path_factory, rows, data):
    with Spool(tmp_path_factory.getbasetemp() / "rows") as spool:
        places = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=9) if rows else st.just([]))
        for i, row in enumerate(rows):
            assert spool.add(row) == i
            assert spool[i] == row, "reading in between does not disturb writing"
        assert len(spool) == len(rows) and list(spool) == spool[:] == rows and spool[::-1] == rows[::-1]
        view = View(spool, np.array(places, int), lambda row, i: [i, row])
        assert list(view) == view[:] == [[i, rows[at]] for i, at in enumerate(places)] and len(view) == len(places)
        assert rows == [] or spool[-1] == rows[-1]
        with pytest.raises(IndexError):
            spool[len(rows)]
        assert list((spool.folder).iterdir()) == []


def test_a_disk_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="as much as the rows have, or choose another folder"):
        Spool(tmp_path / "file")


word = st.text("ab\0é中🙂", max_size=3)


@examples(deadline=None, max_examples=300)
@given(st.lists(st.tuples(st.sampled_from(["", "a" * 40, "a" * 16, "中" * 30]), word).map("".join), unique=True),
       st.integers(1, 200))  # fmt: skip
def test_the_alphabet_is_that_of_python(said, most):
    sizes = np.array([len(t.encode()) for t in said], int)
    assert [said[i] for i in alphabetical(said, sizes, most)] == sorted(said)


def test_texts_behind_a_shared_page_are_read_a_few_times():
    page, n, reads = "p" * 5000, 2003, []

    class Texts(list):
        def __getitem__(self, i):
            reads.append(i)
            return page + f"{i * 7919 % n:04d}"

    order = alphabetical(Texts([None] * n), np.full(n, 5004), most=100_000)
    assert [i * 7919 % n for i in order] == list(range(n))
    assert len(reads) < 6 * n


def test_a_bar_hands_the_rows_on(capfd):
    assert list(progress(iter("ab"), "read", True)) == list(progress(["a", "b"], "read")) == ["a", "b"]
    assert capfd.readouterr().err == ""
    assert list(progress(["a", "b"], "read", False)) == ["a", "b"] and "read" in capfd.readouterr().err
