"""The site builds, its links hold, and a browser shows it, wide and narrow."""

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import build_docs
import doc_procs
import pytest

PAGES = ("index.html", "settings.html")


def test_site_builds_without_a_problem(site):
    out, run = site
    if run.returncode:
        pytest.fail(run.stderr + run.stdout, pytrace=False)
    assert (out / "index.html").is_file()


@pytest.fixture(scope="module")
def pages(site):
    "The folder of the built site, for what looks at its pages."
    if not (site[0] / "index.html").is_file():
        pytest.skip("the site was not built: see test_site_builds_without_a_problem")
    return site[0]


def test_every_notebook_has_a_page(pages, root):
    names = [build_docs.site_name(p.name) for p in (root / "nbs").glob("*.ipynb")]
    assert len(names) == len(set(names))
    assert [n for n in names if not (pages / n).with_suffix(".html").is_file()] == []


def test_site_has_both_themes_search_and_chinese(pages):
    html = (pages / "index.html").read_text(encoding="utf-8")
    assert "cosmo" in html and "darkly" in html
    assert "中文摘要" in html and 'lang="zh-Hans"' in html
    assert (pages / "search.json").stat().st_size > 1000


def test_link_check_finds_what_is_broken(tmp_path):
    (tmp_path / "index.html").write_text('<a href="a.html#there">x</a><a href="a.html#gone">x</a><img src="no.png">')
    (tmp_path / "a.html").write_text('<h2 id="there">x</h2><a href="missing.html">x</a><a href="https://x.y/z">x</a>')
    (tmp_path / "alone.html").write_text("<p>x</p>")
    assert build_docs.check_links(tmp_path) == [
        "a.html: broken link missing.html",
        "index.html: link a.html#gone: the page has no such anchor",
        "index.html: broken link no.png",
        "alone.html: no page links to it",
    ]


def test_a_listed_page_that_does_not_exist_is_named(tmp_path):
    processed, stage = tmp_path / "proc", tmp_path / "stage"
    processed.mkdir()
    stage.mkdir()
    assert "_quarto.yml lists index.ipynb, which is not in nbs/" in build_docs.stage_site(processed, stage)


@pytest.mark.parametrize(
    "source, expected",
    [
        ("> **Note: a title** the text", '::: {.callout-note title="a title"}\n\nthe text\n\n:::'),
        ("> **Warning: x.**\n> - a\n> - b", '::: {.callout-warning title="x"}\n\n- a\n- b\n\n:::'),
        ("> 中文摘要：你好。", '::: {.chinese-summary lang="zh-Hans"}\n\n中文摘要：你好。\n\n:::'),
    ],
)
def test_block_quotes_become_callouts(source, expected):
    assert doc_procs.convert_quotes(f"before\n\n{source}\n\nafter").count(expected) == 1


def test_other_quotes_and_fences_stay():
    text = "> an ordinary quote\n\n```\n> **Note: x** y\n```\n\n    > **Tip: x** y"
    assert doc_procs.convert_quotes(text) == text


def test_text_under_the_title_is_kept():
    assert doc_procs.after_title("# T\n> sub\n\n> 中文摘要：你好。") == "> 中文摘要：你好。"
    assert doc_procs.after_title("# T\n\n> sub") == ""
    assert doc_procs.after_title("# T\n\ntext") == "text"


@pytest.fixture(scope="module")
def server(pages):
    "The site on a loopback port."

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(pages)))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()


@pytest.fixture(scope="module")
def browser(chromium):
    "Headless Chromium."
    sync_api = pytest.importorskip("playwright.sync_api")
    flags = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    with sync_api.sync_playwright() as playwright:
        window = playwright.chromium.launch(executable_path=chromium, args=flags)
        yield window
        window.close()


def open_page(browser, url, width, height):
    "Open a page with every other host cut off (KaTeX comes from a CDN); collect what the console complains about."
    page, errors = browser.new_page(viewport={"width": width, "height": height}), []
    outside = lambda address: not address.startswith(("http://127.0.0.1", "data:", "blob:"))  # noqa: E731
    page.route(outside, lambda route: route.fulfill(status=200, body="", content_type="text/plain"))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("response", lambda answer: errors.append(f"{answer.status} {answer.url}") if answer.status >= 400 else None)
    page.goto(url, wait_until="load")
    return page, errors


@pytest.mark.parametrize("width, height", [(1440, 900), (390, 844)])
@pytest.mark.parametrize("name", PAGES)
def test_page_in_a_browser(server, browser, name, width, height):
    page, errors = open_page(browser, f"{server}/{name}", width, height)
    try:
        assert errors == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.get_by_text("中文摘要").first.is_visible()
        assert page.locator("h1").first.is_visible()
        link = page.locator("#quarto-sidebar a", has_text="Settings").first
        if width < 992:  # narrow: the sidebar waits outside the window
            page.locator(".quarto-btn-toggle").click()
            page.locator("#quarto-sidebar.show").wait_for(timeout=5000)
        link.click()
        page.wait_for_url("**/settings.html", timeout=5000)
    finally:
        page.close()
