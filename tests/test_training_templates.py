"""A model's own chat template: which one is taken, what is marked in it, and that nothing else changes."""

import json
import shutil
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from deepseek_cookbook import models
from deepseek_cookbook import training_templates as T
from deepseek_cookbook.models import ModelError, agree, load_model, load_tokenizer, tokenizer_of
from deepseek_cookbook.pipeline import PipelineError, cook
from deepseek_cookbook.registry import MODELS
from deepseek_cookbook.settings import load_settings
from deepseek_cookbook.sft.checks import TrainError
from deepseek_cookbook.sft.train import make_trainer, train_sft
from deepseek_cookbook.templates import TEMPLATES, trained_parts
from deepseek_cookbook.weights import build_tiny, tiny_tokenizer

EOS = "<｜end▁of▁sentence｜>"
HEADER = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]

# Templates of known families, by shape: what each is here for stands beside it.
QWEN2 = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a model, made by somebody. You help.<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'user' or m.role == 'assistant' %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""  # a system prompt of its own; ends in a line break
QWEN3 = """\
{%- set last = namespace(ask=0) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set last.ask = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
    {%- set text = m.content %}
    {%- if m.role == 'assistant' %}
        {%- set thought = text.split('</think>')[0].split('<think>')[-1].strip('\\n') if '</think>' in text else '' %}
        {%- set text = text.split('</think>')[-1].lstrip('\\n') %}
        {%- if loop.index0 > last.ask %}
            {%- set text = '<think>\\n' + thought + '\\n</think>\\n\\n' + text %}
        {%- endif %}
    {%- endif %}
    {{- '<|im_start|>' + m.role + '\\n' + text + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""  # history loses its reasoning
LLAMA3 = """\
{% for message in messages %}{% set content = HEAD + message['role'] + TAIL + message['content'] | trim + '<|eot_id|>' \
%}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}\
{% if add_generation_prompt %}{{ HEAD + 'assistant' + TAIL }}{% endif %}"""
LLAMA3 = LLAMA3.replace("HEAD", "'<|start_header_id|>'").replace("TAIL", "'<|end_header_id|>\\n\\n'")  # trims
DATED = """\
{{- bos_token }}{%- set day = strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nThe date is ' + day + '.' }}
{%- if messages[0].role == 'system' %}{{- '\\n\\n' + messages[0].content | trim }}{%- set messages = messages[1:] %}
{%- endif %}{{- '<|eot_id|>' }}
{%- for m in messages %}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
GEMMA = """\
{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}\
{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') \
}}{% endif %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim + \
'<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
MISTRAL = """\
{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}\
{% elif m.role == 'system' %}{{ '<<SYS>>' + m.content + '<</SYS>>' }}\
{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"""  # knows no generation prompt
DEEPSEEK = """\
{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{{ bos_token }}\
{% for m in messages %}{% if m['role'] == 'user' %}{{ 'User: ' + m['content'] + '\\n\\n' }}\
{% elif m['role'] == 'assistant' %}{{ 'Assistant: ' + m['content'] + eos_token }}\
{% elif m['role'] == 'system' %}{{ m['content'] + '\\n\\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""
PHI = """\
{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""  # another eos at the end
R1 = """\
{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}\
{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + eos_token }}\
{% else %}{{ ('<｜User｜>' if m.role == 'user' else '') + m.content }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"""  # prompts open a block, rows leave it out
FAMILIES = {  # template, tokens that it needs, end of turn, how contents are written
    "qwen2": (QWEN2, [], "<|im_end|>", str),
    "qwen3": (QWEN3, [], "<|im_end|>", None),
    "llama3": (LLAMA3, HEADER, "<|eot_id|>", str.strip),
    "dated": (DATED, HEADER, "<|eot_id|>", str.strip),
    "gemma": (GEMMA, ["<start_of_turn>", "<end_of_turn>"], "<end_of_turn>", str.strip),
    "mistral": (MISTRAL, [], EOS, lambda text: " " + text),
    "deepseek": (DEEPSEEK, [], EOS, lambda text: " " + text),
    "phi": (PHI, ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"], "<|end|>", str),
    "r1": (R1, [], EOS, None),
}
PUBLISHED = ["qwen2_5", "qwen3", "qwen3_instruct_2507", "llama3", "llama3_1", "gemma", "gemma3", "phi3", "cohere2",
             "deepseek_r1_distill", "lfm2_2_5", "gptoss"]


def published(name):
    "A template as its makers published it; TRL carries them."
    from trl import chat_template_utils

    return (Path(chat_template_utils.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def foreign(template, tokens=(), eos=EOS):
    tokenizer = tiny_tokenizer(eos)
    tokenizer.add_special_tokens({"additional_special_tokens": [*tokens]})
    tokenizer.chat_template = template
    return tokenizer


@lru_cache
def chosen(family):
    "A family's tokenizer with the template that was chosen, and one that kept its own."
    template, tokens, end, _ = FAMILIES[family]
    tokenizer = foreign(template, tokens)
    T.choose_template(tokenizer)
    assert tokenizer.eos_token == end
    return tokenizer, foreign(template, tokens)


def ids(tokenizer, chat, **more):
    return tokenizer.apply_chat_template(chat, return_dict=True, **more)["input_ids"]


def text(tokenizer, chat, ask=False):
    return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=ask)


def folder(tmp_path, tokenizer, base="tiny-qwen2", **config):
    "A model folder as somebody else would have saved it."
    home = tmp_path / "model"
    shutil.copytree(build_tiny(base), home)
    (home / "manifest.json").unlink()
    tokenizer.save_pretrained(home)
    if config:
        old = {k: v for k, v in json.loads((home / "config.json").read_text()).items() if k != "layer_types"}
        (home / "config.json").write_text(json.dumps(old | config))
    return home


WORDS = st.one_of(
    st.text(max_size=12),
    st.sampled_from([" 4 ", "\n4\n", "<think>\nwell\n</think>\n\n4", "<|im_end|>", EOS, "a<|eot_id|>b", "好的。",
                     "{{ x }}", "<think>", "</think>", "it says 'no' and \"yes\" \\ twice"]),
).filter(lambda s: s.isprintable() or "\n" in s)
PLAIN = st.text("abc 好\n", max_size=9)
DIALOGUES = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3)


# ---- what is marked -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@example(pairs=[("1+1?", "2"), ("2+2?", " 4 ")], system="Be brief.")
@given(pairs=DIALOGUES, system=st.none() | WORDS)
def test_text_and_prompts_are_the_models_own_byte_for_byte(family, pairs, system):
    ours, theirs = chosen(family)
    chat = [dict(role=r, content=c) for pair in pairs for r, c in zip(("user", "assistant"), pair)]
    if system is not None and family != "gemma":
        chat.insert(0, dict(role="system", content=system))
    assert text(ours, chat[:-1], True) == text(theirs, chat[:-1], True)
    assert ids(ours, chat[:-1], add_generation_prompt=True) == ids(theirs, chat[:-1], add_generation_prompt=True)
    if family != "r1":
        assert text(ours, chat) == text(theirs, chat)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(pairs=st.lists(st.tuples(PLAIN, PLAIN), min_size=1, max_size=3))
def test_labels_are_the_answers_and_the_end_of_turn(family, pairs):
    _, _, end, written = FAMILIES[family]
    ours, theirs = chosen(family)
    chat = [dict(role=r, content=c) for pair in pairs for r, c in zip(("user", "assistant"), pair)]
    answers = [a for _, a in pairs]
    if written:
        assert trained_parts(ours, chat) == [written(a) + end for a in answers]
    else:  # a model that thinks: the last answer, behind an empty block
        opening = "<think>\n" if family == "qwen3" else ""
        last = answers[-1].lstrip("\n") if family == "qwen3" else answers[-1]
        parts = [opening + "\n</think>\n\n" + last + end]
        if family == "qwen3" and len(pairs) > 1:  # an earlier answer differs from what is written when it is new
            assert len(trained_parts(ours, chat)) == 1
        assert trained_parts(ours, chat) == parts
    out = ours.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    first = T.runs(out["assistant_masks"])[-1][0]
    assert out["input_ids"][:first] == ids(theirs, chat[:-1], add_generation_prompt=True)


@pytest.mark.parametrize("family", ["qwen3", "r1"])
def test_a_model_that_thinks(family):
    "The last answer keeps its reasoning; an earlier one that lost it is context."
    ours, _ = chosen(family)
    think = [dict(role="user", content="2+2?"), dict(role="assistant", content="<think>\ntwice\n</think>\n\n4")]
    start = "<think>\n" if family == "qwen3" else ""
    end = FAMILIES[family][2]
    assert trained_parts(ours, think) == [f"{start}twice\n</think>\n\n4{end}"]
    assert trained_parts(ours, think + think) == [f"{start}twice\n</think>\n\n4{end}"]
    assert text(ours, think + think).count("twice") == 1


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_templates(name):
    "As their makers wrote them: prompts stay, and each trained run begins where a prompt ends."
    source = published(name)
    special = sorted({t for t in source.replace("'", " ").replace("\\", " ").replace("+", " ").split() if t[:2] == "<|"
                      and t[-2:] == "|>" or t in ("<start_of_turn>", "<end_of_turn>")})
    special += ["<|eot_id|>", "<|end|>", "<|return|>", "<|END_OF_TURN_TOKEN|>", "<|END_RESPONSE|>", "<end_of_turn>"]
    tokenizer, theirs = foreign(source, special), foreign(source, special)
    how = T.choose_template(tokenizer)
    assert T.template_fault(theirs, tokenizer.chat_template, T.unmarked(source)) is None
    for chat in T.CHATS.values():
        if name in ("gemma",) and chat[0]["role"] == "system":
            assert "refuses a system prompt" in how
            continue
        assert text(tokenizer, chat[:-1], True) == text(theirs, chat[:-1], True)
    assert trained_parts(tokenizer, T.PROBE)[-1].endswith(tokenizer.eos_token)


def test_a_template_that_refuses_a_system_prompt_says_so():
    assert "refuses a system prompt" in T.choose_template(foreign(GEMMA, ["<start_of_turn>", "<end_of_turn>"]))
    assert "puts a text of its own" in T.choose_template(foreign(QWEN2))
    assert "writes the date" in T.choose_template(foreign(DATED, HEADER))
    assert "only the last answer" in T.choose_template(foreign(QWEN3))
    assert ";" not in T.choose_template(foreign(DEEPSEEK))


@pytest.mark.parametrize(
    "harm, fault",
    [
        (lambda t: t.replace('+ "<|im_end|>" -%}', "-%}"), "end of a turn"),
        (lambda t: t.replace("row[at.done:prompt|length]", "row[at.done:prompt|length] + ' '"), "another text"),
        (lambda t: t.replace("= own(messages, add", "= own(messages[:1], add"), "another text"),
        (lambda t: t.replace("{%- generation -%}{{- answer -}}{%- endgeneration -%}", "{{- answer -}}"), "no trained"),
        (lambda t: t.replace("{%- generation -%}{{- answer", "{{- answer[0] -}}{%- generation -%}{{- answer[1:]"),
         "begin where the prompt ends"),
    ],
)
def test_the_check_finds_what_is_wrong(harm, fault):
    tokenizer = foreign(QWEN2)
    good = T.derive_template(tokenizer, QWEN2)
    assert T.template_fault(tokenizer, good, QWEN2) is None
    assert harm(good) != good
    assert fault in T.template_fault(tokenizer, harm(good), QWEN2)


# ---- which template is taken --------------------------------------------------------------------------------------


def test_the_word_generation_is_no_mark():
    tokenizer = foreign(QWEN2)
    assert "generation" in QWEN2 and not T.has_generation(QWEN2)
    for tag in ("{% generation %}", "{%- generation -%}", "{%-generation%}", "{%+ generation +%}"):
        assert T.has_generation(tag + "x{% endgeneration %}")
    assert not T.has_generation("{% if add_generation_prompt %}{% endif %}{# the word generation #}")
    T.choose_template(tokenizer)
    assert trained_parts(tokenizer, T.PROBE) == ["2 二<|im_end|>"]


def test_a_template_with_good_marks_is_kept_and_one_with_bad_marks_is_not():
    good = QWEN2.replace("{%- if m.role == 'user' or", "{%- if m.role == 'user' or 0 and").replace(
        "    {%- endif %}\n{%- endfor", "    {%- elif m.role == 'assistant' %}{{- '<|im_start|>assistant\\n' }}"
        "{%- generation %}{{- m.content + '<|im_end|>' }}{%- endgeneration %}{{- '\\n' }}{%- endif %}\n{%- endfor")
    tokenizer = foreign(good)
    assert T.choose_template(tokenizer).startswith("the model's own, which marks its answers")
    assert tokenizer.chat_template.endswith(good) and tokenizer.eos_token == "<|im_end|>"
    late = "m.content }}{%- endgeneration %}{{- '<|im_end|>' }}"
    bad = good.replace("m.content + '<|im_end|>' }}{%- endgeneration %}", late)
    tokenizer = foreign(bad)
    assert "found by rendering" in T.choose_template(tokenizer)
    assert trained_parts(tokenizer, T.PROBE) == ["2 二<|im_end|>"]


def test_the_setting_wins(tmp_path):
    home = folder(tmp_path, foreign(QWEN2))
    assert load_tokenizer(home, "deepseek-v3").chat_template == TEMPLATES["deepseek-v3"]
    file = tmp_path / "mine.jinja"
    for source in (DEEPSEEK, T.derive_template(foreign(DEEPSEEK), DEEPSEEK), TEMPLATES["deepseek-llm"]):
        file.write_text(source, encoding="utf-8")
        tokenizer = load_tokenizer(home, str(file))
        assert trained_parts(tokenizer, T.PROBE) == [f" 2 二{EOS}"]
        assert "mine.jinja" in T.describe_template(tokenizer)
    file.write_text(TEMPLATES["deepseek-r1"], encoding="utf-8")  # taken at its word
    assert load_tokenizer("tiny-llama", str(file)).chat_template.endswith(TEMPLATES["deepseek-r1"])


@pytest.mark.parametrize(
    "setting, said",
    [
        ("chatlm", "no such template or file.*Did you mean 'chatml'"),
        ("nowhere/x.jinja", "model.template = nowhere/x.jinja: no such template or file"),
        ("broken.jinja", "model.template = broken.jinja:2: "),
        ("empty.jinja", "model.template"),
        ("late.jinja", "Move it inside the generation block"),
        ("bytes.jinja", "model.template = bytes.jinja: .*utf-8"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(tmp_path, monkeypatch, setting, said):
    home = folder(tmp_path, foreign(QWEN2))
    monkeypatch.chdir(tmp_path)
    Path("broken.jinja").write_text("{% generation %}\n{% if %}{% endgeneration %}")
    Path("empty.jinja").write_text("")
    late = TEMPLATES["chatml"].replace("{{- message.content + '<|im_end|>' -}}{%- endgeneration -%}",
                                       "{{- message.content -}}{%- endgeneration -%}{{- '<|im_end|>' -}}")
    Path("late.jinja").write_text(late)
    Path("bytes.jinja").write_bytes(b"\xff\xfe{{")
    with pytest.raises(ModelError, match=said):
        load_tokenizer(home, setting)


@pytest.mark.parametrize(
    "template",
    ["{% for m in messages %}{{ m.content }}\n---\n{% endfor %}", "{{ messages[9].x.y }}", "{% if %}",
     "{{ raise_exception('never') }}"],
)
def test_a_template_that_cannot_be_marked_names_the_setting(tmp_path, capfd, template):
    "It loads, for prompts; training refuses before anything is tokenised."
    tokenizer = foreign(QWEN2)
    tokenizer.chat_template = template
    home = folder(tmp_path, tokenizer)
    assert load_tokenizer(home).chat_template == template
    assert "for prompts only" in capfd.readouterr().err
    with pytest.raises(TrainError, match="Set model.template to one of chatml, .*jinja"):
        train_sft(tiny(home), RECORDS, RECORDS[:2], tmp_path / "sft")
    with pytest.raises(PipelineError, match="Set model.template to one of chatml"):
        cook(tiny(home, f"run.folder={tmp_path / 'runs'}"), tell=lambda line: None)


def test_a_tokenizer_from_elsewhere_is_sent_to_load_tokenizer():
    with pytest.raises(ValueError, match="load_tokenizer"):
        T.require_marks(foreign(QWEN2))
    with pytest.raises(ValueError, match="no chat template"):
        T.require_marks(foreign(None))
    T.require_marks(load_tokenizer("tiny-llama"))


def test_an_encoder_has_no_template_and_needs_none(tmp_path):
    "As before: a tokenizer without any template, end or marker is left as it is."
    tokenizer = tiny_tokenizer(EOS)
    tokenizer.eos_token = None
    assert models.guess_template(tokenizer) == "chatml"  # this vocabulary has <|im_end|>
    assert T.choose_template(tokenizer) == "none" and tokenizer.chat_template is None


def test_named_variants():
    "Some tokenizers carry a template for tools beside the one for conversations."
    tokenizer = foreign({"default": QWEN2, "tool_use": "{{ raise_exception('tools only') }}"})
    T.choose_template(tokenizer)
    assert trained_parts(tokenizer, T.PROBE) == ["2 二<|im_end|>"]


DISTILL = dict(num_hidden_layers=28, hidden_size=1536, num_attention_heads=12, num_key_value_heads=2,
               intermediate_size=8960, vocab_size=151936)


def test_a_local_copy_of_a_registered_model(tmp_path, capfd):
    "By its sizes; the tokenizer brings the published template."
    home = folder(tmp_path, foreign(published("deepseek_r1_distill")), **DISTILL)
    assert T.twins(home)[0].name == "deepseek-r1-distill-qwen-1.5b"
    assert load_tokenizer(home).chat_template == TEMPLATES["deepseek-r1"]
    assert "as for deepseek-r1-distill-qwen-1.5b" in capfd.readouterr().err


def test_a_local_copy_of_a_chat_model(tmp_path):
    "deepseek-llm-7b-chat: the sizes of its base, and the format that the registry names for it."
    sizes = dict(model_type="llama", num_hidden_layers=30, hidden_size=4096, num_attention_heads=32,
                 num_key_value_heads=32, intermediate_size=11008, vocab_size=102400)
    home = folder(tmp_path, foreign(DEEPSEEK), **sizes)
    assert load_tokenizer(home).chat_template == TEMPLATES["deepseek-llm"]
    theirs = foreign(DEEPSEEK)
    assert text(load_tokenizer(home), T.SEVERAL) == text(theirs, T.SEVERAL)


def test_sizes_alone_are_no_copy(tmp_path):
    "Qwen2.5-1.5B-Instruct is as large as the distillate, and speaks ChatML."
    home = folder(tmp_path, foreign(published("qwen2_5")), **DISTILL)
    assert T.twins(home)
    assert trained_parts(load_tokenizer(home), T.PROBE) == ["2 二<|im_end|>"]


def test_a_copy_without_a_template_is_known_by_name_or_sizes(tmp_path):
    home = folder(tmp_path, foreign(None), _name_or_path="deepseek-ai/deepseek-llm-7b-base")
    assert [m.name for m in T.twins(home)] == ["deepseek-llm-7b-base"]
    assert load_tokenizer(home).chat_template == TEMPLATES["deepseek-llm"]


@pytest.mark.parametrize("name", [m.name for m in MODELS.values() if m.task not in ("test", "embedded")])
def test_every_registered_size_is_recognised(tmp_path, name):
    s = MODELS[name].shape
    kind = "deepseek_v3" if s.latent else "qwen2" if s.qkv_bias else "llama"
    config = dict(num_hidden_layers=s.layers, hidden_size=s.hidden, num_attention_heads=s.heads, model_type=kind,
                  num_key_value_heads=s.kv_heads, intermediate_size=s.intermediate, vocab_size=s.vocab,
                  tie_word_embeddings=s.tied)
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = T.twins(tmp_path)
    assert name in [m.name for m in found] and all(m.shape == s for m in found)
    (tmp_path / "config.json").write_text(json.dumps(config | dict(num_hidden_layers=s.layers + 1)))
    assert T.twins(tmp_path) == []


@pytest.mark.parametrize("config", ["", "[]", '{"hidden_size": null}', None])
def test_a_damaged_config_is_no_copy(tmp_path, config):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    assert T.twins(tmp_path) == []


def test_registered_names_keep_the_registrys(capfd):
    for name in ("tiny-llama", "tiny-qwen2", "tiny-deepseek-v3"):
        assert load_tokenizer(name).chat_template == TEMPLATES[MODELS[name].template]
    assert "chat template" not in capfd.readouterr().err


def test_the_choice_is_told_once(tmp_path, capfd):
    home = folder(tmp_path, foreign(QWEN2))
    load_tokenizer(home), load_tokenizer(home)
    said = [line for line in capfd.readouterr().err.splitlines() if "chat template" in line]
    assert len(said) == 1 and "found by rendering" in said[0] and str(home) in said[0]


def test_a_saved_tokenizer_keeps_what_it_was_trained_with(tmp_path):
    first = load_tokenizer(folder(tmp_path, foreign(PHI, FAMILIES["phi"][1])))
    first.save_pretrained(tmp_path / "saved")
    shutil.copy(build_tiny("tiny-qwen2") / "config.json", tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert (again.chat_template, again.eos_token) == (first.chat_template, "<|end|>")
    assert T.describe_template(again) == T.describe_template(first)
    assert text(again, T.SEVERAL) == text(foreign(PHI, FAMILIES["phi"][1]), T.SEVERAL)


# ---- the model beside it ------------------------------------------------------------------------------------------


def test_the_other_tokens_that_stop_a_model_are_kept():
    model, tokenizer = load_model("tiny-qwen2", device="cpu"), foreign(LLAMA3, HEADER)
    T.choose_template(tokenizer)
    end, old, pad = tokenizer.convert_tokens_to_ids(["<|eot_id|>", EOS, "<|endoftext|>"])
    model.generation_config.eos_token_id = [old, pad, end]
    agree(model, tokenizer)
    assert model.generation_config.eos_token_id == [end, old] and model.config.eos_token_id == end


def test_a_revision_belongs_to_a_hub_id(monkeypatch):
    for call in (load_model, load_tokenizer):
        with pytest.raises(ModelError, match="model.revision = v1: .* Set model.revision to none"):
            call("tiny-llama", revision="v1")
    asked = []

    def refuse(**arguments):
        asked.append(arguments["revision"])
        raise OSError("v9 is not a valid git identifier")

    monkeypatch.setattr(models, "reach_hub", lambda source: None)
    monkeypatch.setattr(models.AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(ModelError, match="v9 is not a valid git"):
        tokenizer_of(dict(name="somebody/model", revision="v9"))
    assert asked == ["v9"]


def test_a_model_spread_over_gpus(monkeypatch):
    with pytest.raises(ModelError, match="computes on cpu"):
        load_model("tiny-llama", device="cpu", device_map="auto")
    with pytest.raises(ModelError, match="choose one of auto, balanced, sequential"):
        models.spread_over("everywhere", "cuda")
    with pytest.raises(ModelError, match="for one process, and 2 were started"):
        models.spread_over("auto", "cuda", 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu=None: (10 if gpu is None else gpu + 1, 99))
    assert (models.free_memory("cuda"), models.free_memory("cuda", spread=True)) == (10, 6)
    model = load_model("tiny-llama", device="cpu")
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": "disk"}
    with pytest.raises(ModelError, match=r"model.layers.1 .* would stay on the CPU"):
        models.check_spread(model)


# ---- training -----------------------------------------------------------------------------------------------------

RECORDS = [dict(instruction=f"What is {i} plus {i}?", input="", output=f"It is {2 * i}.", history=[["Hi", "Hello"]])
           for i in range(8)]


def tiny(home, *more):
    return load_settings("tiny", [f"model.name={home}", "sft.disable_tqdm=true", "sft.max_steps=2", "sft.eval_steps=2",
                                  "sft.save_steps=2", "sft.logging_steps=1", "sft.max_length=512", *more])


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama3", "deepseek", "gemma", "mistral", "phi", "r1"])
def test_labels_of_the_trainer(tmp_path, family):
    "What TRL's batches hold for a folder with a foreign template: the answers' tokens and the end of each turn."
    template, tokens, end, written = FAMILIES[family]
    home = folder(tmp_path, foreign(template, tokens))
    chosen, tokenizer = tiny(home), load_tokenizer(home)
    rows, model = RECORDS[1:2], load_model(home, device="cpu")
    trainer = make_trainer(chosen, rows, rows, tmp_path / "out", model, tokenizer)
    labels = next(iter(trainer.get_train_dataloader()))["labels"][0].tolist()
    trained = [labels[a:b] for a, b in T.runs([int(x != -100) for x in labels])]
    if written:
        assert [tokenizer.decode(t) for t in trained] == [written("Hello") + end, written("It is 2.") + end]
    else:
        assert [tokenizer.decode(t) for t in trained] == [("<think>\n" if family == "qwen3" else "")
                                                          + "\n</think>\n\nIt is 2." + end]
    assert trained[-1][-1] == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids(end)


def test_a_folder_with_a_chat_template_of_its_own_trains(tmp_path):
    home = folder(tmp_path, foreign(LLAMA3, HEADER))
    model, figures = train_sft(tiny(home), RECORDS, RECORDS[:2], tmp_path / "sft")
    assert figures["steps"] == 2 and figures["trainable"] > 0
    assert "found by rendering" in figures["template"]
    assert len(load_tokenizer(home)) <= model.get_input_embeddings().num_embeddings


def test_the_setting_reaches_the_run(tmp_path):
    home = folder(tmp_path, foreign(LLAMA3, HEADER))
    _, figures = train_sft(tiny(home, "model.template=chatml"), RECORDS, RECORDS[:2], tmp_path / "sft")
    assert figures["template"] == "chatml"


def test_a_record_that_the_template_refuses_is_told(tmp_path):
    home = folder(tmp_path, foreign(GEMMA, ["<start_of_turn>", "<end_of_turn>"]))
    rows = [r | dict(system="Be brief.") for r in RECORDS]
    with pytest.raises(TrainError, match="refuses a record: System role not supported"):
        train_sft(tiny(home), rows, rows[:2], tmp_path / "sft")
