"""The registry's numbers, precision by hardware, loading, and every error with its way out."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from toy_gguf import write_gguf
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen2Config, TrainingArguments

import deepseek_cookbook
from deepseek_cookbook import models
from deepseek_cookbook.models import (
    Precision,
    agree,
    attention_kernel,
    load_model,
    load_tokenizer,
    locate,
    precision,
    weight_bytes,
)
from deepseek_cookbook.registry import MODELS, Experts, Latent, ModelError, Shape, find_model, register
from deepseek_cookbook.templates import TEMPLATES
from deepseek_cookbook.weights import TINY, build_tiny, convert_gguf

TOYS = list(TINY)
PLAIN = [m for m in MODELS.values() if m.task != "test"]


def on_meta(model):
    "The model built by transformers without memory for its weights."
    s = model.shape
    kind = Qwen2Config if s.qkv_bias else LlamaConfig
    config = kind(
        vocab_size=s.vocab, hidden_size=s.hidden, intermediate_size=s.intermediate, num_hidden_layers=s.layers,
        num_attention_heads=s.heads, num_key_value_heads=s.kv_heads, tie_word_embeddings=s.tied,
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


# The registry


@pytest.mark.parametrize("model", PLAIN, ids=lambda m: m.name)
def test_shape_counts_what_transformers_builds(model):
    assert on_meta(model).num_parameters() == model.shape.parameters


@pytest.mark.parametrize(
    "name, published",  # billions, from the model cards
    [
        ("deepseek-llm-7b-base", 6.91), ("deepseek-llm-67b-base", 67.4), ("deepseek-llm-7b-chat", 6.91),
        ("deepseek-llm-67b-chat", 67.4), ("deepseek-math-7b-instruct", 6.91), ("deepseek-coder-6.7b-base", 6.74),
        ("deepseek-r1-distill-qwen-1.5b", 1.78), ("deepseek-r1-distill-qwen-7b", 7.62),
        ("deepseek-r1-distill-qwen-14b", 14.8), ("deepseek-r1-distill-qwen-32b", 32.8),
        ("deepseek-r1-distill-llama-8b", 8.03), ("deepseek-r1-distill-llama-70b", 70.6),
        ("smollm2-135m-instruct", 0.1345), ("qwen2.5-coder-0.5b-instruct", 0.494),
        ("qwen2.5-coder-1.5b-instruct", 1.54),
    ],
)
def test_shape_is_the_published_size(name, published):
    assert MODELS[name].shape.parameters / 1e9 == pytest.approx(published, rel=0.004)


def test_latent_attention_and_experts_at_full_size():
    "DeepSeek-V3: 671 B parameters, of which 37 B work on a token (section 2 of its report)."
    v3 = Shape(
        61, 7168, 128, 128, 18432, 129280, latent=Latent(1536, 512, 64, 128, 128), experts=Experts(256, 1, 8, 2048, 3)
    )
    assert v3.parameters / 1e9 == pytest.approx(671, rel=0.002)
    idle = v3.experts.parameters(v3) - v3.experts.parameters(v3, active=True)
    assert (v3.parameters - idle) / 1e9 == pytest.approx(37, rel=0.02)


@pytest.mark.parametrize("name", TOYS)
def test_toys_are_as_large_as_their_shape(name):
    model = load_model(name, device="cpu")
    assert model.num_parameters() == MODELS[name].shape.parameters
    assert model.config.vocab_size == MODELS[name].shape.vocab == len(load_tokenizer(name))


def test_the_registry_covers_the_tasks():
    assert {m.task for m in MODELS.values()} == {"general", "math", "code", "reasoning", "embedded", "test"}
    for name, m in MODELS.items():
        assert name == m.name == name.lower() and m.template in TEMPLATES and m.license
        assert m.task in ("embedded", "test") or m.source.startswith("deepseek-ai/")


def test_names_are_found_in_any_case_and_by_hub_id():
    assert find_model("DeepSeek-LLM-7B-Base").source == "deepseek-ai/deepseek-llm-7b-base"
    assert find_model("deepseek-ai/deepseek-r1-distill-qwen-7b").template == "deepseek-r1"
    assert find_model("nobody/knows-it") is None


def test_the_registry_imports_without_torch():
    code = "import sys, deepseek_cookbook.registry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_model_of_ones_own():
    register("Mine", "general", "me/mine", MODELS["tiny-llama"].shape, "chatml", "MIT")
    try:
        assert locate("mine") == {"pretrained_model_name_or_path": "me/mine"}
    finally:
        del MODELS["mine"]


# Precision


@pytest.mark.parametrize(
    "capability, half, tf32", [((9, 0), torch.bfloat16, True), ((8, 0), torch.bfloat16, True),
                               ((7, 5), torch.float16, False), ((7, 0), torch.float16, False)]
)
def test_precision_by_compute_capability(capability, half, tf32):
    p = precision("cuda", capability)
    assert p == Precision("cuda", half, half, tf32=tf32, gradient_checkpointing=True)
    arguments = p.arguments()
    assert arguments["bf16"] != arguments["fp16"] and arguments["use_cpu"] is False


@pytest.mark.parametrize("bf16", [True, False])
def test_precision_on_a_cpu(monkeypatch, bf16, tmp_path):
    monkeypatch.delenv("DSC_CPU_PRECISION", raising=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": bf16})
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    p = precision("cpu")
    assert p.weights == torch.float32 and p.autocast == (torch.bfloat16 if bf16 else None) and not p.tf32
    arguments = TrainingArguments(output_dir=str(tmp_path), **p.arguments())
    assert arguments.bf16 is bf16 and not arguments.fp16 and not arguments.gradient_checkpointing


@pytest.mark.parametrize("limit, bf16", [
    (None, True), ("ALL", True), ("AVX512_CORE_BF16", True), ("AVX512_CORE_AMX", True), ("AVX10_1_512", True),
    ("nonsense", True), ("AVX512_CORE", False), ("avx512_core_vnni", False), ("AVX2", False), ("SSE41", False)])
@pytest.mark.parametrize("name", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
def test_a_limit_on_instructions_is_respected(monkeypatch, name, limit, bf16):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True, "avx512_bf16": True})
    monkeypatch.delenv("DSC_CPU_PRECISION", raising=False)
    for variable in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(variable, raising=False)
    if limit:
        monkeypatch.setenv(name, limit)
    assert precision("cpu").autocast == (torch.bfloat16 if bf16 else None)


@pytest.mark.parametrize("bf16", [True, False])
def test_precision_on_a_cpu_can_be_said(monkeypatch, bf16):
    "Whatever the processor can do; scripts/other_cpus.py relies on it."
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": not bf16})
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setenv("DSC_CPU_PRECISION", "bfloat16" if bf16 else "float32")
    assert precision("cpu").autocast == (torch.bfloat16 if bf16 else None)
    monkeypatch.setenv("DSC_CPU_PRECISION", "")
    assert precision("cpu").autocast == (None if bf16 else torch.bfloat16)
    monkeypatch.setenv("DSC_CPU_PRECISION", "fp8")
    with pytest.raises(ModelError, match="DSC_CPU_PRECISION = 'fp8': choose float32 or bfloat16"):
        precision("cpu")


def test_the_line_of_the_article_fails():
    for ampere in (True, False):
        with pytest.raises(ValueError):
            TrainingArguments(fp16=True, bf16=ampere, tf32=True, activation_checkpointing=True)


def test_attention_kernel(monkeypatch):
    assert attention_kernel("auto", "cuda", torch.float32) == "sdpa"
    monkeypatch.setattr(models, "is_flash_attn_2_available", lambda: True)
    assert attention_kernel("auto", "cuda", torch.bfloat16) == "flash_attention_2"
    assert attention_kernel("auto", "cpu", torch.bfloat16) == "sdpa"
    assert attention_kernel("eager") == "eager"
    for call in (lambda: attention_kernel("egar"), lambda: load_model("tiny-llama", attention="egar")):
        with pytest.raises(ModelError, match="attention = 'egar': choose one of auto, eager.*sdpa"):
            call()
    with pytest.raises(ModelError, match="device cpu.*Use attention='sdpa'"):
        attention_kernel("flash_attention_2", "cpu", torch.bfloat16)


# Loading


@pytest.mark.parametrize("name", TOYS)
def test_model_and_tokenizer_agree(name):
    model, tokenizer = load_model(name, device="cpu"), load_tokenizer(name)
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id, tokenizer.bos_token_id)
    for config in (model.config, model.generation_config):
        assert (config.pad_token_id, config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert tokenizer.chat_template == TEMPLATES[MODELS[name].template]
    assert model.dtype == torch.float32 and model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", ["bfloat16", "bf16", torch.bfloat16, "torch.bfloat16"])
def test_dtype_by_any_name(dtype):
    assert load_model("tiny-llama", dtype=dtype, device="cpu").dtype == torch.bfloat16


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantization_on_a_cpu(quantization):
    pytest.importorskip("bitsandbytes")
    model = load_model("tiny-llama", quantization=quantization, device="cpu")
    full = load_model("tiny-llama", device="cpu")
    assert model.get_memory_footprint() < full.get_memory_footprint()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        a, b = full(ids).logits, model(ids).logits
    assert torch.nn.functional.cosine_similarity(a.flatten(), b.float().flatten(), dim=0) > 0.9


def test_missing_bitsandbytes_is_named(monkeypatch):
    monkeypatch.setattr(models, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(ModelError, match=r"deepseek-cookbook\[quant\]"):
        load_model("tiny-llama", quantization="nf4", device="cpu")


@pytest.fixture
def adapter(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load_model("tiny-llama", device="cpu"), LoraConfig(r=2, init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("trainable", [False, True])
def test_adapter(adapter, trainable):
    model = load_model("tiny-llama", adapter=adapter, trainable=trainable, device="cpu")
    assert {p.requires_grad for n, p in model.named_parameters() if "lora_" in n} == {trainable}
    ids = torch.arange(20)[None]
    with torch.no_grad(), model.disable_adapter():
        base = model(ids).logits
    with torch.no_grad():
        assert not torch.allclose(model(ids).logits, base)


def test_adapter_errors(adapter, tmp_path):
    with pytest.raises(ModelError, match="no adapter_config.json"):
        load_model("tiny-llama", adapter=tmp_path, device="cpu")
    with pytest.raises(ModelError, match="It is a LoRA adapter"):
        load_model(adapter, device="cpu")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"r": 4}))
    with pytest.raises(ModelError, match="does not fit this base model"):
        load_model("tiny-llama", adapter=adapter, device="cpu")


def test_a_saved_folder_keeps_its_template(tmp_path):
    tokenizer = load_tokenizer("tiny-qwen2")
    load_model("tiny-qwen2", device="cpu").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.chat_template == TEMPLATES["deepseek-r1"] and again.pad_token == tokenizer.pad_token
    assert load_model(tmp_path, device="cpu").num_parameters() == MODELS["tiny-qwen2"].shape.parameters


def test_a_foreign_folder_gets_a_template_by_its_vocabulary(tmp_path):
    shutil.copytree(build_tiny("tiny-llama"), tmp_path / "m")
    assert load_tokenizer(tmp_path / "m").chat_template == TEMPLATES["chatml"]
    assert load_tokenizer(tmp_path / "m", template="deepseek-v3").chat_template == TEMPLATES["deepseek-v3"]


def test_embeddings_grow_only_where_needed():
    model, tokenizer = load_model("tiny-llama", device="cpu"), load_tokenizer("tiny-llama")
    assert agree(model, tokenizer).get_input_embeddings().num_embeddings == 640
    tokenizer.add_tokens(["<|new|>"])
    assert agree(model, tokenizer).get_input_embeddings().num_embeddings == 704


def test_a_gguf_file(tmp_path):
    gguf = pytest.importorskip("gguf")
    model, tokenizer = load_model("tiny-llama", device="cpu"), load_tokenizer("tiny-llama")
    path = tmp_path / "toy.gguf"
    write_gguf(gguf, path, model, tokenizer)
    loaded = load_model(path, device="cpu")
    assert len(load_tokenizer(path)) == 640
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-4)
    assert not getattr(loaded, "is_quantized", False)
    convert_gguf(path, tmp_path / "folder")
    assert load_model(tmp_path / "folder", device="cpu").num_parameters() == model.num_parameters()
    with pytest.raises(ModelError, match="quantized already"):
        load_model(path, quantization="nf4", device="cpu")


def test_a_gguf_file_that_lost_its_special_tokens_is_refused(tmp_path):
    "transformers reads full-width special tokens out of a GGUF file as plain text."
    gguf = pytest.importorskip("gguf")
    tokenizer = load_tokenizer("tiny-qwen2")
    write_gguf(gguf, tmp_path / "toy.gguf", load_model("tiny-llama", device="cpu"), tokenizer)
    with pytest.raises(ModelError, match="pieces.*own folder"):
        load_tokenizer(tmp_path / "toy.gguf", template="deepseek-v3")


# Errors


@pytest.mark.parametrize(
    "name, said",
    [
        ("deepseek-7b", "deepseek-llm-7b-base"), ("smollm", "reasoning: deepseek-r1-distill"),
        ("./nowhere", "does not exist"), ("/no/such/model.gguf", "does not exist"), ("x.gguf", "does not exist"),
        ("", "no model ''"),
    ],
)
def test_wrong_names(name, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=re.escape(said)):
        locate(name)
    with pytest.raises(ModelError):
        load_tokenizer(name)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ModelError, match="has no config.json"):
        load_model(tmp_path)


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_offline_hub_model_names_the_ways_out(load, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(models.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError) as e:
        load("nobody/no-such-model")
    for word in ("HF_HUB_OFFLINE is set", "hf download nobody/no-such-model", "HF_ENDPOINT", "smollm2-135m-instruct"):
        assert word in str(e.value)


def test_an_unreachable_hub_is_noticed_at_once(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(models.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(models.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match="127.0.0.1:9.*refused"):
        load_tokenizer("nobody/no-such-model")


def test_too_little_memory_names_what_fits(monkeypatch):
    memory = type("Memory", (), {"available": 4 * 2**30})
    monkeypatch.setattr(models.psutil, "virtual_memory", lambda: memory)
    with pytest.raises(ModelError) as e:
        load_model("deepseek-llm-7b-base", device="cpu")
    for word in ("25.7 GiB", "4.0 GiB", "nf4", "deepseek-r1-distill-qwen-1.5b", "smollm2-135m-instruct"):
        assert word in str(e.value)
    assert "deepseek-r1-distill-qwen-7b" not in str(e.value)


def test_weight_bytes_of_a_folder_are_read_from_its_headers():
    folder = build_tiny("tiny-llama")
    source, shape = {"pretrained_model_name_or_path": str(folder)}, MODELS["tiny-llama"].shape
    assert weight_bytes(folder, source, torch.bfloat16) == 2 * shape.parameters
    assert weight_bytes(folder, source, torch.float32, "int8") == shape.parameters + 3 * shape.embeddings


@pytest.mark.laptop
@pytest.mark.parametrize("quantization", [None, "nf4", "int8"])
def test_weight_bytes_are_what_loading_takes(quantization):
    pytest.importorskip("bitsandbytes")
    name = "smollm2-135m-instruct"
    model = load_model(name, quantization=quantization, device="cpu")
    expected = weight_bytes(name, locate(name), torch.float32, quantization)
    assert model.get_memory_footprint() == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(
    "arguments, said", [({"dtype": "float8"}, "use auto"), ({"dtype": "int"}, "use auto"),
                        ({"quantization": "int4"}, "use nf4 or int8")]
)
def test_wrong_arguments(arguments, said):
    with pytest.raises(ModelError, match=said):
        load_model("tiny-llama", device="cpu", **arguments)


def test_broken_weights_are_named(tmp_path):
    shutil.copytree(build_tiny("tiny-llama"), tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"rotten")
    with pytest.raises(ModelError, match="model.safetensors"):
        load_model(tmp_path / "m", device="cpu")


def test_code_that_comes_with_a_model_is_never_run(tmp_path):
    "A folder whose config asks for its own Python class is loaded without it, or not at all."
    shutil.copytree(build_tiny("tiny-llama"), tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    (tmp_path / "m" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ModelError, match="its own code"):
        load_model(tmp_path / "m", device="cpu")
    assert not (tmp_path / "ran").exists()


def test_no_module_trusts_remote_code():
    for path in Path(deepseek_cookbook.__file__).parent.rglob("*.py"):
        for found in re.findall(r"trust_remote_code\W*[=:]\s*(\w+)", path.read_text()):
            assert found == "False", path


# The real model


@pytest.mark.laptop
def test_the_embedded_model_is_as_large_as_its_shape_and_answers():
    model, tokenizer = load_model("smollm2-135m-instruct", device="cpu"), load_tokenizer("smollm2-135m-instruct")
    assert model.num_parameters() == MODELS["smollm2-135m-instruct"].shape.parameters
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    shape, config = MODELS["smollm2-135m-instruct"].shape, AutoConfig.from_pretrained(model.name_or_path)
    assert dataclasses.astuple(shape)[:6] == (
        config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.num_key_value_heads,
        config.intermediate_size, config.vocab_size,
    )
    ask = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(ask, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer) and answer[-1] == tokenizer.eos_token_id


@pytest.mark.laptop
def test_padding_does_not_change_what_the_embedded_model_says():
    model, tokenizer = load_model("smollm2-135m-instruct", device="cpu"), load_tokenizer("smollm2-135m-instruct")
    tokenizer.padding_side = "left"
    texts = ["The sky is", "My printer does not print because the"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        together = model.generate(**batch, max_new_tokens=5, do_sample=False)[:, -5:]
        alone = [model.generate(**tokenizer(t, return_tensors="pt"), max_new_tokens=5, do_sample=False)[0, -5:]
                 for t in texts]
    assert [row.tolist() for row in together] == [row.tolist() for row in alone]


@pytest.mark.parametrize("damage", ["no peft_type", "cut weights"])
def test_a_damaged_adapter_is_told(adapter, damage):
    if damage == "no peft_type":
        config = json.loads((adapter / "adapter_config.json").read_text())
        del config["peft_type"]
        (adapter / "adapter_config.json").write_text(json.dumps(config))
    else:
        weights = adapter / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ModelError, match="damaged or does not fit"):
        load_model("tiny-llama", adapter=adapter, device="cpu")


# ---- memory -------------------------------------------------------------------------------------------------------


def test_a_weight_that_was_let_go_is_read_again(tmp_path):
    "From a file, and, where there is no file, nothing is lost either."
    values = torch.arange(3_000_000.0)
    save_file(dict(a=values), tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        mapped = file.get_tensor("a")
    for tensor in (mapped, values.clone(), values[5:], torch.zeros(3), torch.zeros(0)):
        before = tensor.clone()
        models.page_out(tensor)
        assert torch.equal(tensor, before)
    assert not models.page_out(torch.zeros(3))


@pytest.mark.skipif(sys.platform != "linux", reason="madvise")
def test_a_mapped_weight_needs_no_memory_until_somebody_looks(tmp_path):
    save_file(dict(a=torch.ones(20_000_000)), tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        mapped = file.get_tensor("a")
    assert mapped.sum() == 20_000_000
    read = psutil.Process().memory_info().rss
    if models.page_out(mapped):
        assert read - psutil.Process().memory_info().rss > 0.9 * 80_000_000
