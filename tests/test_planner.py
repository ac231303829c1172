"""The planner: published figures, autograd's own count, monotone estimates, and refusals that help."""

import importlib.util
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_cookbook import planner
from deepseek_cookbook.planner import (
    ARTICLE,
    GPUS,
    METHODS,
    SIZES,
    PlanError,
    implied_tokens,
    make_job,
    memory,
    plan,
    tokens_per_second,
)
from deepseek_cookbook.registry import MODELS, Shape

GIB = 2**30


def peak(model="7b", method="lora", gpu="a100-80g", rows=1, gpus=1, **options) -> int:
    "Bytes on one GPU."
    return memory(make_job(model, method, gpu, **options), rows, gpus).peak


@pytest.mark.parametrize("model, parameters", [("7b", 6.738e9), ("13b", 13.016e9), ("70b", 68.977e9), ("67b", 67.42e9)])
def test_plain_sizes_have_the_published_numbers_of_parameters(model, parameters):
    assert SIZES[model].parameters == pytest.approx(parameters, rel=0.001)


def test_published_memory_figures():
    # Dettmers et al. 2023: a 65B model is tuned on one GPU of 48 GB.
    assert plan("67b", "qlora", "a6000-48g", gpus=1, batch=1, seq_len=512).fits
    # Rajbhandari et al. 2020: 16 bytes a parameter for weights, gradients and Adam.
    parts = memory(make_job("7b", "full", "a100-80g"))
    assert parts.weights + parts.gradients + parts.optimizer == 16 * SIZES["7b"].parameters
    # Llama-2-7B: half a MiB of keys and values a token.
    assert planner.kv_bytes(make_job("7b", "ppo", "a100-80g", seq_len=1024), 1) == 1024 * 2**19


def test_four_models_of_ppo_take_36_bytes_a_parameter():
    parts = memory(make_job("7b", "ppo", "a100-80g"))
    assert parts.weights + parts.gradients + parts.optimizer == 36 * SIZES["7b"].parameters


SHAPES = {
    "square": Shape(3, 128, 4, 4, 384, 320),
    "grouped": Shape(4, 192, 6, 2, 512, 320),
    "wide heads": Shape(3, 128, 4, 2, 320, 448, head_dim=48),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
@pytest.mark.parametrize("dtype", ["fp32", "mixed"])
@pytest.mark.parametrize(
    "method, targets, dropout",
    [
        ("full", ("q_proj",), 0.0),
        ("lora", ("q_proj", "v_proj"), 0.0),
        ("lora", planner.ALL_LINEAR, 0.0),
        ("lora", planner.ALL_LINEAR, 0.1),
        ("lora", ("o_proj", "down_proj"), 0.0),
    ],
)
def test_the_formula_meets_what_autograd_keeps(shape, dtype, method, targets, dropout):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.hidden, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, intermediate_size=shape.intermediate, vocab_size=shape.vocab,
        head_dim=shape.head_dim or shape.hidden // shape.heads,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    blocks = model.model
    if method == "lora":
        model = get_peft_model(model, LoraConfig(r=8, lora_dropout=dropout, target_modules=list(targets)))
    model.train()
    sizes = {s for p in model.parameters() for s in (p.shape, p.shape[::-1])}
    kept = {}

    def keep(x):
        if x.shape not in sizes:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    rows, length = 3, 57  # no product of these is a width of a matrix
    ids = torch.randint(0, shape.vocab, (rows, length))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "mixed"):
        # The input needs a gradient, so that the first block keeps as much as every other.
        start = model.get_input_embeddings()(ids).detach().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            states = blocks(inputs_embeds=start).last_hidden_state
    job = planner.check_job(
        planner.Job(shape, method, rank=8, targets=targets, dropout=dropout, dtype=dtype, device=GPUS["cpu"])
    )
    assert states.requires_grad
    final_norm = 4 * rows * length * shape.hidden * (2 if method == "full" else 1)
    counted = shape.layers * rows * length * planner.block_bytes(job) + final_norm
    assert counted == pytest.approx(sum(kept.values()), rel=0.03)


@pytest.fixture(scope="module")
def simulate():
    "The bench that adds up the memory of steps on fake tensors."
    file = Path(__file__).parent.parent / "scripts" / "bench" / "simulate_memory.py"
    spec = importlib.util.spec_from_file_location("simulate_memory", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SIMULATED = {
    "packed": ("sft", []),
    "plain rows": ("sft", ["sft.packing=false", "lora.lora_dropout=0.0"]),
    "two layers adapted": ("sft", ['lora.target_modules=["q_proj", "v_proj"]', "sft.per_device_train_batch_size=2"]),
    "one micro-batch": ("sft", ["sft.gradient_accumulation_steps=1", "lora.r=64"]),
    "reward": ("reward", []),
    "update": ("ppo update", []),
    "rollout": ("ppo rollout", []),
}  # fmt: skip


@pytest.mark.parametrize("case, changes", SIMULATED.values(), ids=list(SIMULATED))
@pytest.mark.parametrize("shape", [Shape(3, 1024, 8, 8, 2816, 8192), Shape(2, 768, 6, 2, 2048, 4096)])
def test_the_plan_of_a_gpu_meets_a_simulated_step(simulate, case, changes, shape):
    from deepseek_cookbook.settings import load_settings

    sizes = ["sft.max_length=1024", "reward.max_length=512", "rollout.max_new_tokens=64", "rollout.batch_size=32"]
    row = simulate.compare(case, shape, load_settings("gpu", sizes + changes))
    assert row["ratio"] == pytest.approx(1, abs=0.05), row


def test_what_the_simulation_taught_the_plan():
    sft = make_job("7b", "lora", "a100-80g", seq_len=4096)
    packed, flash = replace(sft, packed=True), replace(sft, packed=True, flash=True)
    assert memory(packed, 4).mask == 3 * 16384**2 == 4 * memory(sft, 4).mask  # one row instead of four
    assert memory(flash, 4).mask == 0
    score = replace(sft, loss="score")  # a reward model has no output layer
    assert memory(sft, 4).weights - memory(score, 4).weights == 2 * 32000 * 4096
    ppo = make_job("7b", "ppo", "a100-80g", adapters=True, batch=256, generated=64)
    assert memory(ppo, 8).optimizer == 2 * memory(sft, 8).optimizer  # policy and value
    assert memory(ppo, 8).kv_cache == memory(replace(ppo, batch=64), 8).kv_cache


@given(
    st.sampled_from(METHODS), st.sampled_from(["7b", "13b", "deepseek-r1-distill-qwen-1.5b", "tiny-deepseek-v3"]),
    st.integers(1, 64), st.sampled_from([512, 1024, 4096]), st.booleans(), st.sampled_from(["a100-80g", "cpu"]),
    st.sampled_from([1, 2, 8]), st.booleans(),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_memory_grows_with_batch_length_and_width(method, model, rows, seq_len, checkpointing, gpu, gpus, adapters):
    options = dict(
        checkpointing=checkpointing, adapters=adapters, completion=256, gpu=gpu, gpus=gpus, batch=99 * gpus
    )
    base = peak(model, method, rows=rows, seq_len=seq_len, **options)
    assert base > 0
    assert peak(model, method, rows=rows + 1, seq_len=seq_len, **options) >= base
    assert peak(model, method, rows=rows, seq_len=2 * seq_len, **options) > base
    job = make_job(model, method, gpu, seq_len=seq_len, checkpointing=checkpointing, adapters=adapters, completion=256)
    for change in (
        dict(layers=job.shape.layers + 1),
        dict(intermediate=job.shape.intermediate + 64),
        dict(vocab=job.shape.vocab + 1024),
    ):
        larger = replace(job, shape=replace(job.shape, **change))
        assert memory(larger, rows).peak > memory(job, rows).peak
        assert larger.shape.parameters > job.shape.parameters


@given(
    st.sampled_from(["7b", "13b", "70b", *MODELS]), st.integers(1, 16), st.sampled_from([256, 2048]), st.booleans(),
    st.sampled_from([1, 4]),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_qlora_below_lora_below_full_and_adapters_below_four_models(model, rows, seq_len, checkpointing, gpus):
    options = dict(seq_len=seq_len, checkpointing=checkpointing, rows=rows, gpus=gpus, completion=128, batch=64)
    options |= dict(dropout=0)  # with dropout on every input, LoRA's activations can outgrow those of full training
    small = (MODELS[model].shape if model in MODELS else SIZES[model]).parameters < 1e9
    if not small:  # in a toy the adapters outweigh the matrices
        assert peak(model, "qlora", **options) < peak(model, "lora", **options) < peak(model, "full", **options)
        assert peak(model, "ppo", adapters=True, **options) < peak(model, "ppo", adapters=False, **options)


@pytest.mark.parametrize("method", METHODS)
def test_checkpointing_saves_memory_and_costs_time(method):
    on, off = (make_job("7b", method, "a100-80g", checkpointing=c) for c in (True, False))
    assert memory(on, 8).peak < memory(off, 8).peak
    assert tokens_per_second(on) < tokens_per_second(off)


def test_flops_are_those_of_the_papers():
    job = make_job("7b", "full", "a100-80g", seq_len=1, checkpointing=False)
    active = SIZES["7b"].parameters - 32000 * 4096
    assert planner.train_flops(job) == pytest.approx(6 * active, rel=0.001)
    lora = make_job("7b", "lora", "a100-80g", seq_len=1, checkpointing=False)
    assert planner.train_flops(lora) == pytest.approx(4 * active, rel=0.001)


def test_idle_experts_cost_memory_and_no_time():
    shape = MODELS["tiny-deepseek-v3"].shape
    more = replace(shape, experts=replace(shape.experts, routed=16))
    assert more.parameters > shape.parameters
    routers = 2 * shape.hidden  # one row a routed expert in each sparse block, at most
    assert planner.active_parameters(more) - planner.active_parameters(shape) <= 8 * routers


@given(st.integers(1, 300), st.sampled_from(METHODS), st.sampled_from(sorted(GPUS)))
@settings(max_examples=100, deadline=None)
def test_rows_accumulation_and_gpus_make_up_the_batch(batch, method, gpu):
    p = plan("deepseek-r1-distill-qwen-1.5b", method, gpu, batch=batch, seq_len=512, completion=128)
    assert p.rows * p.accumulation * p.gpus >= batch
    assert p.rows * (p.accumulation - 1) * p.gpus < batch
    assert p.fits == (p.memory.peak <= p.job.device.memory * GIB)
    assert p.fits or p.advice


def test_the_fewest_gpus():
    p = plan("7b", "full", "a100-80g")
    assert p.gpus == 2 and p.fits
    assert not plan("7b", "full", "a100-80g", gpus=1).fits


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(model="7b", method="full", gpus=1), ["method lora", "method qlora", "2 GPUs"]),
        (dict(model="7b", method="lora", gpu="v100-32g", gpus=1, checkpointing=False, seq_len=8192, batch=1),
         ["gradient checkpointing"]),
        (dict(model="7b", method="ppo", gpus=1, batch=1), ["adapters"]),
        (dict(model="67b", method="full", gpu="cpu"), ["smaller model"]),
    ],
)  # fmt: skip
def test_advice_is_given_and_true(arguments, words):
    p = plan(**arguments)
    assert not p.fits
    assert all(any(word in line for line in p.advice) for word in words), p.advice


def test_advice_was_planned():
    p = plan("7b", "full", "a100-80g", gpus=1)
    assert plan("7b", "full", "a100-80g", gpus=2).fits and plan("7b", "lora", "a100-80g", gpus=1).fits
    assert "method lora" in p.advice


@pytest.mark.parametrize(
    "arguments, named",
    [
        (dict(model="deepseek-lm-7b-base"), "deepseek-llm-7b-base"),
        (dict(model="14b"), "13b"),
        (dict(method="qlorra"), "qlora"),
        (dict(gpu="a100-80"), "a100-80g"),
        (dict(batchs=4), "batch"),
        (dict(dtype="bf16"), "half"),
        (dict(targets=["q_prj"]), "q_proj"),
        (dict(batch=0), "batch"),
        (dict(batch=1.5), "batch"),
        (dict(batch=True), "batch"),
        (dict(seq_len=-1), "seq_len"),
        (dict(gpus=0), "gpus"),
        (dict(mfu=40), "mfu"),
        (dict(method="full", dtype="half"), "fp32"),
        (dict(method="ppo", seq_len=256), "completion"),
    ],
)
def test_wrong_names_and_values(arguments, named):
    with pytest.raises(PlanError, match=named):
        plan(**arguments)


def test_names_in_any_case_and_hub_ids():
    a, b = plan("DeepSeek-LLM-7B-base", "LoRA", "A100-80G"), plan("deepseek-ai/deepseek-llm-7b-base")
    assert a.memory == b.memory
    assert plan(targets="all-linear").memory == plan().memory


def test_hours_scale_with_tokens_and_epochs():
    one, six = plan("7b", tokens=1e7, epochs=1), plan("7b", tokens=2e7, epochs=3)
    assert six.hours == pytest.approx(6 * one.hours)
    assert plan("7b").hours is None


@pytest.mark.parametrize("model", ARTICLE)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_article_rows_come_back(model, method):
    batch, gpus, hours = ARTICLE[model]
    p = plan(model, method, "a100-80g", gpus=gpus, batch=batch, tokens=implied_tokens(model, method))
    assert p.hours == pytest.approx(hours)


def test_ppo_time_counts_generation_and_epochs():
    one, two = (make_job("7b", "ppo", "a100-80g", adapters=True, ppo_epochs=n) for n in (1, 4))
    assert tokens_per_second(two) < tokens_per_second(one)
    few, many = (make_job("7b", "ppo", "a100-80g", adapters=True, batch=n) for n in (1, 64))
    assert tokens_per_second(few) < tokens_per_second(many)


def test_a_plan_as_table_markdown_and_json():
    p = plan("7b", "full", gpus=1)
    assert json.loads(json.dumps(p.to_dict()))["peak"] == p.memory.peak
    assert p.table().row_count == len(p.lines())
    assert "does not fit" in p._repr_markdown_()


def test_every_registered_model_can_be_planned_by_every_method():
    for name in MODELS:
        for method in METHODS:
            p = plan(name, method, "h200-141g")
            assert math.isfinite(p.tokens_per_second) and p.memory.peak > 0


def test_importing_it_is_fast_and_without_torch():
    code = "import sys, deepseek_cookbook.planner; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.stdout.strip() == "False", run.stderr
