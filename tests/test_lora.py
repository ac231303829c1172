"""LoRA: the update by hand against naive sums, targets on every architecture, what PEFT reaches, the comparisons."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    DeepseekV2Config,
    DeepseekV3Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen2MoeConfig,
)

from deepseek_cookbook.models import load_model, load_tokenizer
from deepseek_cookbook.settings import load_settings
from deepseek_cookbook.sft.lora import (
    KINDS,
    LoRALinear,
    TargetError,
    answer_batches,
    check_targets,
    class_batches,
    find_experts,
    find_targets,
    fit,
    hits,
    linear_layers,
    load_classifier,
    lora_config,
    lora_study,
    matched,
    reached,
    topic_records,
    trainable_share,
)

MLA = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
FFN = ["gate_proj", "up_proj", "down_proj"]


@given(st.integers(1, 6), st.floats(0.5, 64), st.booleans(), st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_by_hand_equals_naive_sums(r, alpha, rslora, seed):
    "y_o = sum_i W_oi x_i + b_o + s sum_r B_or sum_i A_ri x_i, one number at a time; merged, the same."
    torch.manual_seed(seed)
    layer = LoRALinear(nn.Linear(5, 3), r, alpha, rslora)
    layer.B_OR.data.normal_()
    x = torch.randn(5)
    W, b, A, B = layer.base.weight, layer.base.bias, layer.A_RI, layer.B_OR
    scale = alpha / math.sqrt(r) if rslora else alpha / r
    for o in range(3):
        update = sum(B[o, j] * sum(A[j, i] * x[i] for i in range(5)) for j in range(r))
        expected = sum(W[o, i] * x[i] for i in range(5)) + b[o] + scale * update
        assert layer(x)[o].item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-4)
    before = layer(x).detach()
    assert torch.allclose(layer.merge()(x), before, rtol=1e-4, atol=1e-4)


def test_a_new_adapter_changes_nothing_and_trains_only_itself():
    layer = LoRALinear(nn.Linear(8, 4))
    x = torch.randn(3, 8)
    assert torch.equal(layer(x), layer.base(x))
    layer(x).sum().backward()
    assert layer.base.weight.grad is None and layer.base.bias.grad is None
    assert layer.A_RI.grad.abs().sum() == 0 and layer.B_OR.grad.abs().sum() > 0


def test_dropout_is_of_the_update_alone_and_off_in_evaluation():
    torch.manual_seed(0)
    layer, x = LoRALinear(nn.Linear(8, 4), dropout=0.5), torch.randn(3, 8)
    layer.B_OR.data.normal_()
    layer.eval()
    still = layer(x)
    layer.train()
    assert not torch.allclose(layer(x), still) and torch.equal(layer.base(x), layer.eval().base(x))


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_computes_the_same_with_both_scales(rslora):
    torch.manual_seed(0)
    base = nn.Linear(6, 5)
    config = LoraConfig(r=4, lora_alpha=12, use_rslora=rslora, init_lora_weights=False, target_modules=["layer"])
    theirs = get_peft_model(nn.ModuleDict(dict(layer=nn.Linear(6, 5))), config).base_model.model["layer"]
    theirs.base_layer.load_state_dict(base.state_dict())
    ours = LoRALinear(base, 4, 12, rslora)
    ours.A_RI.data, ours.B_OR.data = theirs.lora_A.default.weight.data, theirs.lora_B.default.weight.data
    x = torch.randn(7, 6)
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)


@pytest.mark.parametrize(
    ("config", "attention", "qv", "mlp"),
    [
        (LlamaConfig(num_hidden_layers=2), ["q_proj", "k_proj", "v_proj", "o_proj"], ["q_proj", "v_proj"], FFN),
        (Qwen2Config(num_hidden_layers=2), ["q_proj", "k_proj", "v_proj", "o_proj"], ["q_proj", "v_proj"], FFN),
        (DeepseekV2Config(num_hidden_layers=2), MLA, ["q_b_proj", "kv_b_proj"], FFN),
        (DeepseekV2Config(num_hidden_layers=2, q_lora_rank=None), ["q_proj", *MLA[2:]], ["q_proj", "kv_b_proj"], FFN),
        (DeepseekV3Config(num_hidden_layers=5), MLA, ["q_b_proj", "kv_b_proj"], FFN),
        (
            GPTNeoXConfig(num_hidden_layers=2),
            ["query_key_value", "dense"],
            ["query_key_value"],
            ["dense_h_to_4h", "dense_4h_to_h"],
        ),
        (
            GPT2Config(n_layer=2),
            ["c_attn", "attn.c_proj"],
            ["c_attn"],
            ["c_fc", "mlp.c_proj"],
        ),
    ],
    ids=lambda x: getattr(x, "model_type", ""),
)
def test_targets_by_architecture(config, attention, qv, mlp):
    assert find_targets(config, "attention") == attention
    assert find_targets(config, "qv") == qv
    assert set(find_targets(config, "mlp")) == set(mlp)


@pytest.mark.parametrize("config", [BertConfig(num_hidden_layers=2, is_decoder=True), GPT2Config(n_layer=2)])
@pytest.mark.parametrize("kind", KINDS)
def test_names_reach_the_layers_of_their_kind_and_no_others(config, kind):
    """BERT and GPT-2 use one name in both parts of a block: the ends of paths must be long enough."""
    from deepseek_cookbook.sft.lora import _skeleton, of_kind

    model = _skeleton(config)
    found = {p for paths in matched(model, find_targets(model, kind)).values() for p in paths}
    assert found == {p for p in linear_layers(model) if of_kind(p, kind)}


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen2"])
def test_all_linear_is_what_peft_means_by_it(name):
    model = load_model(name)
    theirs = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    expected, model = reached(theirs), theirs.unload()
    ours = get_peft_model(model, lora_config(model, dict(task_type="CAUSAL_LM", target_modules="all-linear")))
    assert reached(ours) == expected


def test_output_layers_heads_and_routers_are_no_targets():
    assert not any("lm_head" in k for k in linear_layers(load_model("tiny-deepseek-v3")))
    assert not any("score" in k for k in linear_layers(load_classifier("tiny-llama", ["a", "b"])))
    assert "shared_expert_gate" not in find_targets(Qwen2MoeConfig(num_hidden_layers=2))
    assert find_experts(MixtralConfig(num_hidden_layers=2)) == ["experts.gate_up_proj", "experts.down_proj"]
    assert find_experts(LlamaConfig(num_hidden_layers=2)) == []


def test_errors_name_the_model_what_was_asked_for_and_what_is_there():
    model = load_model("tiny-llama")
    with pytest.raises(TargetError, match="'query_key_value'.*llama.*asked for: query_key_value.*v_proj"):
        check_targets(model, ["query_key_value"])
    with pytest.raises(TargetError, match="Did you mean 'v_proj'"):
        check_targets(model, ["q_proj", "v_prj"])
    with pytest.raises(TargetError, match="LlamaMLP"):
        check_targets(model, ["mlp"])
    with pytest.raises(TargetError, match="Did you mean 'attention'"):
        find_targets(model, "atention")
    with pytest.raises(TargetError, match="no linear layer of kind 'qv'"):
        find_targets(nn.Sequential(nn.Linear(2, 2)), "qv")
    with pytest.raises(TargetError, match="no experts"):
        lora_config(model, dict(target_parameters=["experts.down_proj"]))
    with pytest.raises(TargetError, match="adapter already"):
        find_targets(get_peft_model(model, lora_config(model, {})))


def test_regular_expressions_and_kinds_are_counted():
    model = load_model("tiny-llama")
    assert check_targets(model, r".*\.1\.self_attn\.[qv]_proj") == {r".*\.1\.self_attn\.[qv]_proj": 2}
    assert check_targets(model, "qv") == dict(q_proj=2, v_proj=2)
    adapted = get_peft_model(model, lora_config(model, dict(target_modules=r".*\.1\.self_attn\.[qv]_proj")))
    assert reached(adapted) == {"self_attn.q_proj": 1, "self_attn.v_proj": 1}


ROUTED = dict(target_modules="attention", target_parameters=["experts.gate_up_proj", "experts.down_proj"])


@pytest.mark.parametrize("lora", [dict(target_modules="all-linear"), dict(target_modules="mlp"), ROUTED])
def test_deepseek_v3_trains_what_was_named_saves_reloads_and_merges(tmp_path, lora):
    model = load_model("tiny-deepseek-v3")
    adapted = get_peft_model(model, lora_config(model, dict(r=2, task_type="CAUSAL_LM") | lora))
    found = reached(adapted)
    assert "mlp.gate" not in found
    assert ("shared_experts.down_proj" in found) == (lora is not ROUTED)
    assert ("mlp.experts" in found) == (lora is ROUTED)
    for p in adapted.parameters():
        if p.requires_grad:
            p.data.normal_(std=0.05)
    ids = torch.arange(5, 45)[None]
    logits = adapted(ids).logits
    with adapted.disable_adapter():
        assert (adapted(ids).logits - logits).abs().max() > 1e-3
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load_model("tiny-deepseek-v3"), tmp_path)
    assert (again(ids).logits - logits).abs().max() < 1e-5
    assert (adapted.merge_and_unload()(ids).logits - logits).abs().max() < 1e-4


def test_dropout_with_experts_is_refused_before_training():
    model = load_model("tiny-deepseek-v3")
    with pytest.raises(TargetError, match="lora_dropout=0"):
        lora_config(model, dict(target_modules="all-linear", lora_dropout=0.1))
    assert lora_config(model, dict(target_modules="attention", lora_dropout=0.1)).lora_dropout == 0.1


def test_peft_still_rewrites_the_targets_of_deepseek_v3():
    "The reason for `lora_config`. When this fails, PEFT has changed, and the chapter must say so."
    plain = get_peft_model(load_model("tiny-deepseek-v3"), LoraConfig(target_modules="all-linear"))
    found = reached(plain)
    assert "mlp.gate" in found and "mlp.experts" in found and "shared_experts.up_proj" not in found


def test_the_study_leaves_the_base_as_it_was_and_repeats_itself():
    model, tokenizer = load_model("tiny-llama"), load_tokenizer("tiny-llama")
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    records = [dict(instruction=f"What is {i}?", input="", output=f"It is {i}.", history=[]) for i in range(8)]
    batches = answer_batches(tokenizer, records, 4)
    evaluate = load_settings("tiny").build("evaluate", quiet=True)
    configs = dict(low=dict(r=2), high=dict(r=8), again=dict(r=2))
    table = lora_study(model, tokenizer, batches * 4, records, configs, 1e-2, evaluate)
    assert table[0]["loss"] == table[2]["loss"]
    assert table[0]["trainable"] < table[1]["trainable"] < 1
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_fit_lowers_the_loss_and_moves_only_what_may_move():
    model = nn.Linear(3, 1, bias=False)
    model.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x, y):
            return type("Out", (), dict(loss=(self.inner(x) - y).square().mean()))

    torch.manual_seed(0)
    x = torch.randn(32, 3)
    ran = fit(Wrapper(), [dict(x=x, y=x.sum(1, keepdim=True))] * 60, 0.1)
    assert ran["losses"][-1] < ran["losses"][0] / 5 and torch.equal(model.frozen, torch.ones(2))
    assert trainable_share(model) == 3 / 5


def test_topics_have_one_right_answer_and_no_copy():
    records = topic_records()
    asked = [" ".join(r["instruction"].casefold().split()) for r in records]
    assert len(set(asked)) == len(asked) > 500
    assert "hello" not in asked  # stands in greetings and in conversations
    counts = {t: sum(r["output"] == t for r in records) for t in {r["output"] for r in records}}
    assert min(counts.values()) >= 40 and len(counts) >= 5


@pytest.mark.learning
def test_a_classifier_learns_and_its_hits_are_in_order(seed, spread):
    """Padding must not reach the last token's state, nor the order of the rows change.

    Twenty seeds, ten of them in FP32 with AVX2: all hits.
    """
    classes, tokenizer = ["digit", "word"], load_tokenizer("tiny-llama")
    records = [dict(instruction=f"number {i} " * (1 + i % 3), output="digit") for i in range(20)]
    records += [dict(instruction="plain word " * (1 + i % 3), output="word") for i in range(20)]
    model = load_classifier("tiny-llama", classes, seed)
    fit(model, class_batches(tokenizer, records, classes, size=8, epochs=8, seed=seed), 1e-3)
    together = hits(model, class_batches(tokenizer, records, classes, size=16, seed=None))
    alone = np.concatenate([hits(model, class_batches(tokenizer, [r], classes, size=1, seed=None)) for r in records])
    assert spread("hits", together.mean()) > 0.9 and (together == alone).all()


def test_a_class_is_of_the_whole_question():
    tokenizer = load_tokenizer("tiny-llama")
    rows = [dict(instruction="Long or short?", input=text, output="a", history=[]) for text in ("one", "two")]
    (batch,) = class_batches(tokenizer, rows, ["a"], seed=None)
    assert tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True).endswith("Long or short?\none")
    assert not torch.equal(batch["input_ids"][0], batch["input_ids"][1])
