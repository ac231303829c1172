"""The page of rows: counts, samples, copies side by side, and texts that stay texts."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_cookbook.data.formats import DataError, Row
from deepseek_cookbook.data.show import Overview, overview, show_page, shown_turns, side_by_side


def record(ask, answer, **more):
    return dict(instruction=ask, input="", output=answer, history=[]) | more


@given(st.text(max_size=60), st.text(max_size=60))
def test_the_pieces_are_the_texts(a, b):
    pieces = side_by_side(a, b)
    assert "".join(x for _, x, _ in pieces) == a and "".join(y for _, _, y in pieces) == b
    assert all((x == y) for same, x, y in pieces if same)
    assert all(x != y for same, x, y in pieces if not same)


def rows_of(*records):
    return [Row("a.jsonl", n, r, r, []) for n, r in enumerate(records, 1)]


def test_a_sample_is_fair_and_counts_are_whole():
    hits = [0] * 20
    for seed in range(400):
        found = Overview(limit=5, seed=seed)
        for i in range(20):
            found.add("kept", i)
        assert found.counts["kept"] == 20 and len(set(found.sample["kept"])) == 5
        for i in found.sample["kept"]:
            hits[i] += 1
    assert all(60 <= n <= 140 for n in hits)  # 100 in the mean, a standard deviation of 8.7


def test_what_is_no_record_is_still_shown():
    assert shown_turns("half a {line") == [["line", "half a {line"]]
    assert shown_turns([1, None]) == [["row", "[1, null]"]]
    assert shown_turns(dict(question="Why?", n=3)) == [["question", "Why?"], ["n", "3"]]
    assert shown_turns(dict(instruction="Why?", output="So.")) == [["user", "Why?"], ["assistant", "So."]]


def test_a_copy_stands_beside_its_original():
    copy = record("鱼叫什么？", "是鲫鱼。")
    rows = rows_of(record("Name a fish.", "A pike."), record("鱼叫什么？", "是鲤鱼。"), copy)
    bad = [dict(reason="near_copy", detail="line 2", number=3, line=json.dumps(copy, ensure_ascii=False))]
    found = overview(rows, bad)
    assert found.counts == dict(kept=2, near_copy=1)
    assert [p for p in found.sample["near_copy"][0]["pair"] if not p[0]] == [[False, "鲤", "鲫"]]
    assert found.languages == {"short, latin letters": 1, "short, han letters": 1}


def test_languages_are_told_apart_not_only_scripts():
    french = record("Comment puis-je ouvrir un compte chez vous ?", "Venez avec une carte et votre dernière facture.")
    english = record("How do I open an account with you?", "Bring a card and the last bill that you were sent.")
    chinese = record("怎样在你们这里开一个账户？", "请带上您的身份证和最近一个月的账单来办理。")
    found = overview(rows_of(french, english, chinese, record("x", "42")))
    assert found.languages == dict(fr=1, en=1, zh=1) | {"short, other letters": 1}
    assert "<td>fr" in show_page(found) or ">fr<" in show_page(found)


def test_what_was_rejected_elsewhere_is_refused():
    "And rows that a data phase rejected have no line: they are shown, and paired with nothing."
    rows = rows_of(record("A?", "B"), record("C?", "D"))
    with pytest.raises(DataError, match="a.jsonl:2: another row"):
        overview(rows, [dict(reason="near_copy", detail="line 1", number=2, line=json.dumps(record("E?", "F")))])
    found = overview(rows, [dict(reason="near_copy", detail="line 1", row=record("E?", "F"))])
    assert found.counts == dict(kept=2, near_copy=1) and "pair" not in found.sample["near_copy"][0]


EVIL = '</script><script>document.title = "taken"</script><img src=x onerror="document.title=1">'


def test_the_page_in_a_browser(tmp_path, chromium):
    sync_api = pytest.importorskip("playwright.sync_api")
    copy = record("Question 7?", "Answer  7!")
    asked = [record(f"Question {i}?", f"Answer {i}.") for i in range(1, 121)]
    kept = rows_of(*asked, record("Evil?", EVIL), copy)
    bad = [dict(reason="near_copy", detail="line 7", number=122, line=json.dumps(copy))]
    page = tmp_path / "rows.html"
    page.write_text(show_page(overview(kept, bad), "Rows & <more>"), encoding="utf-8")
    with sync_api.sync_playwright() as playwright:
        window = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab, problems = window.new_page(), []
        tab.on("console", lambda message: problems.append(message.text))
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.goto(page.as_uri())
        assert tab.title() == "Rows & <more>"
        assert tab.locator("#count").inner_text() == "122 of the 122 rows on this page"
        assert tab.locator("article").count() == 50
        tab.get_by_role("button", name="More rows").click()
        assert tab.locator("article").count() == 100
        tab.get_by_label("Search in texts").fill("question 12")
        assert tab.locator("article").count() == 2  # 12 and 120
        tab.get_by_label("Search in texts").fill("evil")
        assert EVIL in tab.locator("article").inner_text() and tab.locator("img").count() == 0
        tab.get_by_label("Search in texts").fill("")
        tab.get_by_label("Reason").select_option("near_copy")
        assert tab.locator("mark").all_inner_texts() and "like line 7" in tab.locator("article header").inner_text()
        assert tab.locator("#more").is_hidden()
        tab.set_viewport_size(dict(width=360, height=740))
        assert tab.evaluate("document.documentElement.scrollWidth") <= 360
        assert tab.title() == "Rows & <more>" and not problems
        window.close()


def test_the_data_can_be_read_back():
    page = show_page(overview(rows_of(record("A?", "<b>"))))
    data = page.split('id="data">')[1].split("</script>")[0]
    assert json.loads(data)[0]["turns"] == [["user", "A?"], ["assistant", "<b>"]]
