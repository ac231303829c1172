"""The report: one page, nothing from outside, every text escaped, only the phases that ran."""

import html
import json
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from deepseek_cookbook.ppo.principles import COLUMNS
from deepseek_cookbook.report import (
    SECTION_OF,
    ReportError,
    figures,
    minutes,
    outcome,
    phase_rows,
    render,
    report_html,
    report_phase,
)
from deepseek_cookbook.settings import RunFolder, SettingsError, load_settings, write_json, write_jsonl

EVIL = """<script>alert(1)</script><img src="http://evil.example/x.png" onerror='x'>{{ 7*7 }}{% raw %}&amp;</h2>你好"""
VOID = {"meta", "img", "br", "hr", "link", "input"}


def made(name, result, **settings):
    "A result.json."
    about = {"processor": EVIL, "torch": "2.13.0", "deepseek_cookbook": "0.1.0"}
    return dict(phase=name, key="k", profile="tiny", seconds=12.3, peak_memory_gib=1.25, files={}, made_with=about,
                settings=settings, result=result)  # fmt: skip


def all_records():
    share = dict(value=0.5, low=0.2, high=0.8)
    side = dict(reward=0.2, error=0.01, n=8, polite=0.5, completion_length=9.0, distinct=1.0, kl=0.1)
    told = [dict(question=EVIL, before=EVIL, after=EVIL, before_score=0.1, after_score=0.9) for _ in range(2)]
    answers = [dict(question=EVIL, reference=EVIL, before=EVIL, after=EVIL) for _ in range(8)]
    return {
        "data": made("data", dict(source=EVIL, read=10, train=6, validation=2, rejected={EVIL: 1, "exact_copy": 1},
                                  first=dict(instruction=EVIL)), data={"source": EVIL}),
        "sft": made("sft", dict(steps=12, resumed_from=EVIL, first_eval_loss=3.1, best_eval_loss=2.5, best_step=12,
                                tokens_per_second=123.4, trainable=1000, trainable_share=0.01, events=1),
                    sft={"learning_rate": 1e-3, "output_dir": EVIL}, model={"name": EVIL}),
        "reward": made("reward", dict(
            pairs=dict(train=10, validation=2, heldout=4, ood=4), passed=False,
            gate=[dict(name="held-out accuracy", value=0.5, n=4, low=0.15, high=0.85, limit="at least 0.75",
                       passed=False),
                  dict(name=f"accuracy: {EVIL}", value=None, n=0, low=None, high=None, limit="", passed=None)],
            calibration=dict(error=0.1, temperature=1.0, bins=[
                dict(claimed=0.7, observed=0.6, low=0.4, high=0.8, n=4)]))),
        "ppo": made("ppo", dict(
            steps=4, completion_tokens=99, samples_per_second=1.5, resumed_from=EVIL, restored_to=3,
            stopped=dict(guard=EVIL, step=4, since=3), task="rules",
            heldout=dict(before=side, after=side | dict(reward=0.4), gain=-0.2, gain_error=0.05, answers=told)),
            ppo={"engine": EVIL}),
        "constitution": made("constitution", dict(judge=EVIL, measured=[
            dict(stage=stage, **(dict.fromkeys(COLUMNS, share) | dict(toxicity=None))) for stage in ("start", EVIL)])),
        "evaluate": made("evaluate", dict(before=dict(loss=3.0, perplexity=20.1), after=dict(loss=2.0, perplexity=7.4),
                                          fall=1 / 3, fall_interval=[0.3, 0.36], records=2,
                                          heaviest=dict(unit=EVIL, records=3, share=0.4, fall_without=0.625),
                                          tokens=40, cut=1,
                                          answers=answers)),
    }  # fmt: skip


@pytest.fixture
def run(tmp_path):
    "A run folder whose phases left something nasty everywhere."
    run = RunFolder(tmp_path / "runs" / "tiny")
    for name, record in all_records().items():
        write_json(run.phase(name) / "result.json", record)
    rows = [dict(step=i, loss=3.0 - i / 10, grad_norm=1.0, learning_rate=1e-3, eval_loss=3.0) for i in range(1, 11)]
    event = dict(step=5, event=EVIL, guard=EVIL, message=EVIL, action="note", value=1.0)
    write_jsonl(run.phase("sft") / "metrics.jsonl", [*rows, event])
    rows = [dict(step=i, reward=0.1 * i, kl=0.01 * i, entropy=2.0, objective=0.1 * i) for i in range(1, 5)]
    write_jsonl(run.phase("ppo") / "metrics.jsonl", [*rows, event])
    return run


@pytest.fixture
def settings():
    settings = load_settings("tiny")
    settings.values["model"]["name"] = EVIL
    return settings


class Page(HTMLParser):
    "Tags, attributes and text of a page; a tag that is not closed is noticed."

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts, self.headings = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == [], self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def test_no_text_becomes_markup(run, settings):
    text = report_html(all_records(), settings, run)
    page = Page(text)
    assert "script" not in page.tags and "onerror" not in [name for _, name, _ in page.attributes]
    assert "{{" not in html.unescape(text).replace(EVIL, "") and "{%" not in html.unescape(text).replace(EVIL, "")
    assert "".join(page.texts).count(EVIL) >= 8 * 4 + 5 + 2 * 3 + 5, (
        "answers, source, reason, model, processor, settings, guards, judge, stages: all shown"
    )


def test_nothing_comes_from_outside(run, settings):
    text = report_html(all_records(), settings, run)
    page = Page(text)
    links = [(tag, name, value) for tag, name, value in page.attributes
             if name in ("src", "href", "srcset", "poster", "action", "data", "background") or ":" in name]  # fmt: skip
    assert links and all(tag == "img" and value.startswith("data:image/") for tag, _, value in links)
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]
    assert "url(" not in style and "@import" not in style
    assert not {"link", "script", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert not any("url(" in (value or "") for _, name, value in page.attributes if name == "style")


def test_the_page_is_small_readable_on_a_phone_and_whole(run, settings):
    result = report_phase(settings, run)
    text = (run.root / "report.html").read_text(encoding="utf-8")
    assert 10 < result["kilobytes"] < 1000 and len(text.encode()) < 1_000_000
    assert text.startswith("<!doctype html>") and 'charset="utf-8"' in text and 'name="viewport"' in text
    assert Page(text).headings[0] == "Phases" and text.rstrip().endswith("</html>")
    in_a_box = re.findall(r'<div (?:class="scroll"|style="overflow-x:auto")><table', text)
    assert text.count("<table") == len(in_a_box) >= 6, "wide tables scroll in their own box"


def test_every_picture_says_what_it_shows(run, settings):
    images = re.findall(r"<img [^>]*>", report_html(all_records(), settings, run))
    assert images and all(re.search(r'alt="[^"]+"', image) for image in images)


NAMES = [name for name in SECTION_OF if name in all_records()]
HEADINGS = {"data": "Data", "sft": "Supervised fine-tuning", "reward": "Reward model and gate",
            "ppo": "PPO", "constitution": "Constitution", "evaluate": "Before and after"}  # fmt: skip


@pytest.mark.parametrize("present", [[name] for name in NAMES] + [["data", "evaluate"], ["data", "sft"], NAMES])
def test_only_phases_that_ran_are_shown(run, settings, present):
    records = {name: record for name, record in all_records().items() if name in present}
    headings = Page(report_html(records, settings, run)).headings
    assert headings == ["Phases", *(HEADINGS[name] for name in present), "To do it again"]
    shown = dict(figures(records))
    assert ("fall of the loss" in shown) == ("evaluate" in present)
    assert ("tokens a second in SFT" in shown) == ("sft" in present)
    assert ("reward of the policy after" in shown) == ("ppo" in present)
    for name in set(NAMES) - set(present):
        (run.root / name / "result.json").unlink()
    report_phase(settings, run)
    assert Page((run.root / "report.html").read_text()).headings == headings


def test_nothing_to_report_and_a_damaged_result(tmp_path, run, settings):
    with pytest.raises(ReportError, match="Run cook first"):
        report_phase(settings, RunFolder(tmp_path / "empty"))
    (run.root / "data" / "result.json").write_text('{"phase": ')
    with pytest.raises(ValueError, match="data/result.json.*run the phase again") as found:
        report_phase(settings, run)
    assert type(found.value).__module__.startswith("deepseek_cookbook")


def test_a_run_without_evaluation_or_speed(run, settings):
    records = all_records()
    records["sft"]["result"] |= dict(best_eval_loss=None, best_step=None, tokens_per_second=None, resumed_from=None)
    text = report_html(records, settings, run)
    assert "None" not in "".join(Page(text).texts) and "? tokens/s" in text
    assert "tokens a second in SFT" not in dict(figures(records))


@pytest.mark.parametrize("change, told", [
    ({}, True), (dict(share=0.05), False), (dict(fall_without=None), False), (None, False)])  # None: an older result
def test_a_question_that_outweighs_the_others_is_named(run, settings, change, told):
    records = all_records()
    result = records["evaluate"]["result"]
    if change is None:
        del result["heaviest"]
    else:
        result["heaviest"] |= change
    text = "".join(Page(report_html(records, settings, run)).texts)
    assert ("the others, the loss fell by 62.5%" in " ".join(text.split())) is told and "None" not in text


def said(records, settings, run):
    "The words of the page, in one line."
    return " ".join("".join(Page(report_html(records, settings, run)).texts).split())


@pytest.mark.parametrize("passed", [True, False])
@pytest.mark.parametrize("paid", [None, "rules", "model", "both"])
def test_the_page_says_what_ppo_was_paid_by(run, settings, passed, paid):
    "A page that says PPO refuses, above the curves of PPO, is wrong."
    records = all_records()
    records["reward"]["result"]["passed"] = passed
    if paid is None:
        del records["ppo"]
        (run.root / "ppo" / "result.json").unlink()
    else:
        records["ppo"]["result"]["task"] = paid
        write_json(run.root / "ppo" / "result.json", records["ppo"])
    text = said(records, settings, run)
    assert ("PPO will refuse to train against this reward, unless task.force is set." in text) is (
        paid is None and not passed
    )
    assert ("PPO may train against this reward." in text) is (paid is None and passed)
    assert ("this model was not used" in text) is (paid == "rules")
    assert ("PPO was trained against this reward" in text) is (paid in ("model", "both"))
    assert ("half and half" in text) is (paid == "both")
    assert ("because task.force was set" in text) is (paid in ("model", "both") and not passed)


def test_a_sick_end_is_told(run, settings):
    records = all_records()
    assert "stopped the run at step 4" in said(records, settings, run)
    records["ppo"]["result"]["sick_at_end"] = ["kl_max", "length"]
    text = said(records, settings, run)
    assert "the end of the run was refused by kl_max, length." in text and "stopped the run" not in text


def test_a_policy_that_got_worse_is_not_said_to_have_risen(run, settings):
    text = "".join(Page(report_html(all_records(), settings, run)).texts)
    assert "-0.200" in text and "rose" not in text


def test_a_run_that_logged_nothing_still_has_a_page(run, settings):
    for name in ("sft", "ppo"):
        (run.root / name / "metrics.jsonl").write_text("")
    assert "Supervised fine-tuning" in report_html(all_records(), settings, run)


def test_the_rows_of_the_terminal_are_those_of_the_page(run, settings):
    records = all_records()
    page = html.unescape(report_html(records, settings, run))
    for row in phase_rows(records):
        assert all(cell in page for cell in row)


def test_a_phase_of_your_own_is_shown_in_the_table():
    assert outcome("mine", {}) == "" and outcome("report", {"path": "x"}) == "x"


@examples(deadline=None)
@given(st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\r\0")))
def test_any_text_arrives_as_itself(text):
    page = render("{{ table(['a'], [[text]], wide=True) }}", text=text)
    cell = re.search(r'<td class="answer">(.*?)</td>', page, re.DOTALL)[1]
    assert html.unescape(cell) == text and "<" not in cell


@pytest.mark.parametrize("seconds, words", [(0, "0 s"), (89.4, "89 s"), (90, "1.5 min"), (3600, "60.0 min")])
def test_durations(seconds, words):
    assert minutes(seconds) == words


def test_settings_that_no_longer_build_are_told(run, settings):
    settings.values["monitor"] = {"window": "x", "no_such": 1}
    with pytest.raises(SettingsError, match=r"\[monitor\]"):
        report_html(all_records(), settings, run)
    json.dumps(all_records(), allow_nan=False)


def test_the_report_says_which_side_was_measured_and_what_cleaning_did(run, settings):
    "A test side chose nothing; the validation side chose the checkpoint. Neither may be told as the other."
    records = all_records()
    page = report_html(records, settings, run)
    assert "chosen on these same records" in page and "which chose nothing" not in page
    records["evaluate"]["result"] |= dict(side="test")
    records["data"]["result"] |= dict(test=2, private_left={"PHONE": 3})
    page = report_html(records, settings, run)
    assert "which chose nothing" in page and "chosen on these same records" not in page
    assert "<td>private left: PHONE</td>" in page and "<td>test</td>" in page
