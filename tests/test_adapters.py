"""Adapters: saved whole, refused where they don't fit, switched, merged exactly, and published without secrets."""

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from deepseek_cookbook.evaluate.metrics import answer
from deepseek_cookbook.models import load_model, load_tokenizer
from deepseek_cookbook.settings import load_settings
from deepseek_cookbook.sft.adapters import (
    TWINS,
    AdapterError,
    active_adapter,
    base_name,
    check_out,
    difference,
    is_local,
    load_adapters,
    merge_adapter,
    model_card,
    plain,
    probe_logits,
    push_adapter,
    save_adapter,
    switch_adapter,
    whole_folder,
)
from deepseek_cookbook.sft.train import train_sft

QUICK = ["sft.max_steps=6", "sft.eval_steps=6", "sft.save_steps=6", "sft.disable_tqdm=true", "sft.bf16=false",
         "evaluate.quiet=true", "lora.lora_dropout=0"]
RECORDS = [dict(instruction=f"What is {i} plus {i}?", input="", output=f"It is {2 * i}.", history=[])
           for i in range(16)]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def chosen(name: str, *more: str):
    return load_settings("tiny", [*QUICK, f"model.name={name}", *more])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A function: the trained model, its figures and its saved adapter, once for each toy."
    made, root = {}, tmp_path_factory.mktemp("trained")

    def get(name):
        if name not in made:
            model, figures = train_sft(chosen(name), RECORDS, RECORDS[:4], root / name)
            made[name] = model, figures, save_adapter(model, root / f"{name}-adapter")
        return made[name]

    return get


def copy(folder: Path, to: Path, **changes) -> Path:
    "The adapter once more, with other values in its configuration."
    to.mkdir(parents=True)
    for file in (CONFIG, WEIGHTS):
        (to / file).write_bytes((folder / file).read_bytes())
    (to / CONFIG).write_text(json.dumps(json.loads((to / CONFIG).read_text()) | changes))
    return to


# --- the whole round: train, save, load, merge, read again ---


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen2", "tiny-deepseek-v3"])
def test_train_save_load_merge_give_equal_logits_and_answers(trained, tmp_path, name):
    model, _, folder = trained(name)
    base = probe_logits(load_model(name, dtype="float32"))
    loaded = load_adapters(load_model(name, dtype="float32"), {"a": folder})
    figures = merge_adapter(name, folder, tmp_path / "merged")
    merged = load_model(tmp_path / "merged", dtype="float32")
    after = probe_logits(model)
    assert (after - base).abs().max() > 1e-2  # it has learnt something
    torch.testing.assert_close(probe_logits(loaded), after, rtol=0, atol=1e-4)
    torch.testing.assert_close(probe_logits(merged), after, rtol=0, atol=1e-4)
    assert figures["merging"] < 1e-4 and figures["writing"] < 1e-4 and figures["rounding"] == 0
    assert figures["bytes"] == 4 * sum(p.numel() for p in merged.parameters())
    tokenizer, config = load_tokenizer(tmp_path / "merged"), chosen(name).build("evaluate")
    said = [answer(m, tokenizer, RECORDS[:2], config) for m in (model, loaded, merged)]
    assert said[0] == said[1] == said[2]
    assert tokenizer.chat_template == load_tokenizer(name).chat_template


def test_merged_weights_are_the_sum_of_the_formula(trained, tmp_path):
    "The naive oracle: W + alpha/r B A, from the files."
    _, _, folder = trained("tiny-llama")
    merge_adapter("tiny-llama", folder, tmp_path / "merged")
    config, lora = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    before = dict(load_model("tiny-llama", dtype="float32").named_parameters())
    after = dict(load_model(tmp_path / "merged", dtype="float32").named_parameters())
    for key, weight in before.items():
        path = f"base_model.model.{key.removesuffix('.weight')}"
        expected = weight
        if f"{path}.lora_A.weight" in lora:
            product = lora[f"{path}.lora_B.weight"] @ lora[f"{path}.lora_A.weight"]
            expected = weight + config["lora_alpha"] / config["r"] * product
        torch.testing.assert_close(after[key], expected, rtol=0, atol=1e-6, msg=key)


def test_latent_attention_and_experts_are_adapted_and_the_router_stays(tmp_path):
    "all-linear on experts, as `lora_config` reads it, and the same written out by hand."
    attention = '["q_a_proj","q_b_proj","kv_a_proj_with_mqa","kv_b_proj","o_proj"]'
    experts = '["experts.gate_up_proj","experts.down_proj"]'
    found = {}
    some = [f"lora.target_modules={attention}", f"lora.target_parameters={experts}"]
    for kind, more in dict(all=[], some=some).items():
        run = chosen("tiny-deepseek-v3", "sft.max_steps=1", *more)
        model, _ = train_sft(run, RECORDS, RECORDS[:4], tmp_path / kind)
        found[kind] = {n for n, p in model.named_parameters() if p.requires_grad}
        save_adapter(model, tmp_path / f"{kind}-adapter")
        merge_adapter("tiny-deepseek-v3", tmp_path / f"{kind}-adapter", tmp_path / f"{kind}-merged")
    router = {k: any(".gate.lora" in n for n in names) for k, names in found.items()}
    assert router == dict(all=False, some=False)
    assert all(any("kv_b_proj" in n for n in names) for names in found.values())
    assert {k: any(".experts." in n for n in names) for k, names in found.items()} == dict(all=False, some=True)
    assert any("shared_experts" in n for n in found["all"])  # plain PEFT 0.21 takes their names for experts


def test_sixteen_bit_merge_says_what_rounding_costs_and_keeps_buffers(trained, tmp_path):
    _, _, folder = trained("tiny-deepseek-v3")
    figures = merge_adapter("tiny-deepseek-v3", folder, tmp_path / "merged", dtype="bfloat16")
    assert 1e-5 < figures["rounding"] < 0.1 and figures["writing"] < 1e-4
    assert load_model(tmp_path / "merged").dtype in (torch.bfloat16, torch.float32)
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    assert {v.dtype for k, v in weights.items() if k.endswith("_proj.weight")} == {torch.bfloat16}
    assert weights["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32


def test_an_adapter_over_nf4_is_merged_in_floats(tmp_path):
    model, _ = train_sft(chosen("tiny-llama", "model.quantization=nf4"), RECORDS, RECORDS[:4], tmp_path / "run")
    figures = merge_adapter("tiny-llama", save_adapter(model, tmp_path / "adapter"), tmp_path / "merged")
    assert figures["merging"] < 1e-4
    assert load_model(tmp_path / "merged", dtype="float32").dtype == torch.float32


# --- saved whole ---


def test_a_failed_save_keeps_the_old_adapter_and_leaves_no_rest(trained, tmp_path):
    class Full:
        def save_pretrained(self, folder, **kwargs):
            (Path(folder) / WEIGHTS).write_bytes(b"half")
            raise OSError(28, "No space left on device")

    save_adapter(trained("tiny-llama")[0], tmp_path / "adapter")
    before = (tmp_path / "adapter" / WEIGHTS).read_bytes()
    with pytest.raises(OSError):
        save_adapter(Full(), tmp_path / "adapter")
    assert (tmp_path / "adapter" / WEIGHTS).read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_a_kill_between_two_renames_is_mended(tmp_path):
    "What a kill leaves: the old folder under its other name. The next save, even a failing one, brings it back."
    (tmp_path / "adapter.old").mkdir()
    (tmp_path / "adapter.old" / "a").write_text("old")
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "adapter"):
        raise ZeroDivisionError
    assert (tmp_path / "adapter" / "a").read_text() == "old"
    with whole_folder(tmp_path / "adapter") as part:
        (part / "a").write_text("new")
    assert (tmp_path / "adapter" / "a").read_text() == "new" and len(list(tmp_path.iterdir())) == 1


def test_a_saved_adapter_names_its_base_and_no_path(trained):
    _, _, folder = trained("tiny-llama")
    assert sorted(p.name for p in folder.iterdir()) == [CONFIG, WEIGHTS]
    text = (folder / CONFIG).read_text()
    assert json.loads(text)["base_model_name_or_path"] == "tiny-llama" and str(Path.home()) not in text


def test_of_several_adapters_the_asked_one_is_saved_flat(trained, tmp_path):
    _, _, folder = trained("tiny-llama")
    other = copy(folder, tmp_path / "other")
    save_file({k: 2 * v for k, v in load_file(other / WEIGHTS).items()}, other / WEIGHTS, metadata={"format": "pt"})
    model = load_adapters(load_model("tiny-llama", dtype="float32"), {"a": folder, "b": other})
    for name, source in dict(a=folder, b=other).items():
        saved = save_adapter(model, tmp_path / "saved", name)
        assert sorted(p.name for p in saved.iterdir()) == [CONFIG, WEIGHTS]
        expected, found = load_file(source / WEIGHTS), load_file(saved / WEIGHTS)
        assert expected.keys() == found.keys() and all(torch.equal(expected[k], found[k]) for k in expected)


# --- refused ---


def test_a_base_of_the_same_shape_is_refused(trained):
    "tiny-llama and tiny-qwen2 have the same layers and widths: bare PEFT takes this adapter."
    with pytest.raises(AdapterError, match="trained on tiny-qwen2, and this model is tiny-llama"):
        load_adapters(load_model("tiny-llama"), {"a": trained("tiny-qwen2")[2]})


def test_another_architecture_is_refused_by_its_layers(trained, tmp_path):
    nameless = copy(trained("tiny-deepseek-v3")[2], tmp_path / "a", base_model_name_or_path=None)
    with pytest.raises(AdapterError, match="which tiny-llama does not have"):
        load_adapters(load_model("tiny-llama"), {"a": nameless})


def test_another_width_and_too_few_layers_are_refused(trained, tmp_path):
    folder = trained("tiny-llama")[2]
    weights = load_file(folder / WEIGHTS)
    narrow = copy(folder, tmp_path / "narrow")
    key = next(k for k in weights if "q_proj.lora_A" in k)
    save_file(weights | {key: weights[key][:, :7].contiguous()}, narrow / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(AdapterError, match="is 64 wide in tiny-llama, and the adapter was made for 7"):
        load_adapters(load_model("tiny-llama"), {"a": narrow})
    short = copy(folder, tmp_path / "short")
    save_file({k: v for k, v in weights.items() if "layers.1." not in k}, short / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(AdapterError, match="has nothing for 14 layers"):
        load_adapters(load_model("tiny-llama"), {"a": short})
    ranks = copy(folder, tmp_path / "ranks", r=8)
    with pytest.raises(AdapterError, match="does not fit"):
        load_adapters(load_model("tiny-llama"), {"a": ranks})


@pytest.mark.parametrize("config", ["", "{", "[]", "\x00" * 9])
def test_damaged_and_missing_files_are_told(trained, tmp_path, config):
    base, folder = load_model("tiny-llama"), copy(trained("tiny-llama")[2], tmp_path / "a")
    with pytest.raises(AdapterError, match="has no adapter_config"):
        load_adapters(base, {"a": tmp_path})
    (folder / CONFIG).write_text(config)
    with pytest.raises(AdapterError, match="damaged"):
        load_adapters(base, {"a": folder})
    (folder / CONFIG).write_bytes((trained("tiny-llama")[2] / CONFIG).read_bytes())
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:900])
    with pytest.raises(AdapterError, match="damaged"):
        load_adapters(base, {"a": folder})
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(AdapterError, match="pickle"):
        load_adapters(base, {"a": folder})
    with pytest.raises(AdapterError, match="no adapter given"):
        load_adapters(base, {})


def test_weights_that_are_no_numbers_are_not_written(trained, tmp_path):
    folder = copy(trained("tiny-llama")[2], tmp_path / "a")
    save_file({k: v * float("nan") for k, v in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    with pytest.raises((AdapterError, ValueError), match="NaN|differ"):
        merge_adapter("tiny-llama", folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_folder_that_is_no_model_is_not_replaced(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("")
    for out in (tmp_path / "photos", tmp_path / "photos" / "a.jpg"):
        with pytest.raises(AdapterError, match="no model folder"):
            check_out(out)
    assert check_out(tmp_path / "new") == tmp_path / "new"


def test_a_disk_without_room_is_told_before_writing(trained, tmp_path, monkeypatch):
    import shutil
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda p: SimpleNamespace(free=1000))
    with pytest.raises(AdapterError, match="Free some space"):
        merge_adapter("tiny-llama", trained("tiny-llama")[2], tmp_path / "merged")
    assert not list(tmp_path.glob("merged*"))


# --- switched ---


def test_switching_is_exact_and_thaws_nothing(trained, tmp_path):
    _, _, folder = trained("tiny-llama")
    other = copy(folder, tmp_path / "other")
    save_file({k: -v for k, v in load_file(other / WEIGHTS).items()}, other / WEIGHTS, metadata={"format": "pt"})
    base = probe_logits(load_model("tiny-llama", dtype="float32"))
    alone = {n: probe_logits(load_adapters(load_model("tiny-llama", dtype="float32"), {n: f}))
             for n, f in dict(a=folder, b=other).items()}
    model = load_adapters(load_model("tiny-llama", dtype="float32"), {"a": folder, "b": other})
    frozen = [p.requires_grad for p in model.parameters()]
    assert active_adapter(model) == "a"
    with switch_adapter(model, "b"):
        assert torch.allclose(probe_logits(model), alone["b"], atol=1e-5)
        with switch_adapter(model, None):
            assert active_adapter(model) is None and torch.allclose(probe_logits(model), base, atol=1e-5)
        assert active_adapter(model) == "b"
    assert torch.equal(probe_logits(model), alone["a"])
    switch_adapter(model, None)  # without `with` it stays
    assert active_adapter(model) is None
    with pytest.raises(ZeroDivisionError), switch_adapter(model, "a"):
        raise ZeroDivisionError
    assert active_adapter(model) is None
    assert [p.requires_grad for p in model.parameters()] == frozen == [False] * len(frozen)
    with pytest.raises(AdapterError, match="there are a, b"):
        switch_adapter(model, "c")


def test_a_trained_model_stays_trainable(trained):
    model = trained("tiny-llama")[0]
    before = [p.requires_grad for p in model.parameters()]
    with switch_adapter(model, None):
        pass
    assert [p.requires_grad for p in model.parameters()] == before and any(before)


# --- names ---


@pytest.mark.parametrize("path, name", [
    ("deepseek-llm-7b-base", "deepseek-ai/deepseek-llm-7b-base"),
    ("DeepSeek-AI/deepseek-llm-7b-base", "deepseek-ai/deepseek-llm-7b-base"),
    ("/home/me/.cache/deepseek_cookbook/models/smollm2-135m-instruct-1", "smollm2-135m-instruct"),
    (r"C:\Users\me\AppData\deepseek_cookbook\models\tiny-llama-0a1b2c3d", "tiny-llama"),
    ("Qwen/Qwen2.5-Coder-0.5B-Instruct", "qwen2.5-coder-0.5b-instruct"),
    ("/cache/models/qwen2.5-coder-1.5b-instruct-1", "qwen2.5-coder-1.5b-instruct"),
    ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m-instruct"),
    ("/x/hub/models--org--Model-7B/snapshots/0123/", "org/Model-7B"),
    ("org/model", "org/model"), ("/data/mine", "/data/mine"), ("", ""),
])
def test_base_names(path, name):
    assert base_name(path) == name


@given(st.from_regex(r"(/[a-z]{1,8}){2,5}", fullmatch=True))
@settings(max_examples=50, deadline=None)
def test_of_a_path_only_the_last_part_is_shown(path):
    assert is_local(path) and plain(path) == path.rpartition("/")[2]


# --- the card ---

COMPARISON = dict(before=dict(loss=3.2, perplexity=24.5), after=dict(loss=2.1, perplexity=8.2), fall=0.34,
                  fall_interval=[0.3, 0.38], records=24, tokens=812)


def head(card: str) -> dict:
    import yaml

    return yaml.safe_load(card.split("---")[1])


def test_a_card_says_what_was_measured(trained):
    run, figures = chosen("smollm2-135m-instruct"), trained("tiny-llama")[1]
    data = dict(source="/home/me/secret/tickets.jsonl", read=40, train=20, validation=4, test=7)
    data["first"] = {"output": "private"}
    card = model_card(run, figures, COMPARISON, data, language=["en"], repo_id="someone/desk")
    top = head(card)
    assert top["base_model"] == TWINS["smollm2-135m-instruct"] and top["library_name"] == "peft"
    assert top["license"] == "apache-2.0" and top["language"] == ["en"]
    measured = top["model-index"][0]["results"][0]["metrics"]
    assert {m["type"]: m["value"] for m in measured} == dict(loss=2.1, perplexity=8.2)
    for text in ("3.2", "34.0%", "30.0%", "tickets.jsonl", "torch", "| seed | 42 |", "| test | 7 |",
                 "someone/desk", "4-bit copy"):  # fmt: skip
        assert text in card, text
    assert f"{figures['best_eval_loss']:.4g}" in card
    for text in ("/home", "secret/", "private", "None |"):
        assert text not in card, text


def test_a_card_says_what_was_not_measured():
    run = chosen("deepseek-llm-7b-base", "model.quantization=nf4")
    card = model_card(run, {})
    assert "Not measured." in card and "was not compared" in card and "model-index" not in card
    assert head(card)["license_name"] == "deepseek" and "| quantization | nf4 |" in card
    assert "base_model" not in head(model_card(chosen("/srv/models/mine"), {}))
    assert "/srv" not in model_card(chosen("/srv/models/mine"), {})


def test_a_strange_title_stays_one_value_of_the_head():
    "A data source with YAML in its name does not write fields of its own."
    data = dict(source="x: [y\nlicense: gpl", train=1)
    assert head(model_card(chosen("tiny-llama"), {}, COMPARISON, data))["license"] == "apache-2.0"


# --- the push ---


class Hub:
    "HfApi's methods, noted."

    def __init__(self, private=True, error=None):
        self.private, self.error, self.sent, self.asked = private, error, None, None

    def create_repo(self, repo_id, **kwargs):
        self.asked = kwargs
        if self.error:
            raise self.error

    def repo_info(self, repo_id):
        return self

    def upload_folder(self, repo_id, folder_path, **kwargs):
        self.sent = {p.name: p.read_bytes() for p in Path(folder_path).rglob("*") if p.is_file()}


def ready(trained, tmp_path, **changes) -> Path:
    folder = copy(trained("tiny-llama")[2], tmp_path / "adapter", **changes)
    (folder / "metrics.jsonl").write_text('{"path": "/home/me"}')
    (folder / "checkpoint-6").mkdir()
    (folder / "checkpoint-6" / "optimizer.pt").write_bytes(b"x")
    return folder


def test_only_adapter_and_card_are_sent(trained, tmp_path):
    folder, hub = ready(trained, tmp_path, base_model_name_or_path="smollm2-135m-instruct"), Hub()
    assert push_adapter(folder, "someone/desk", "# Card", api=hub).endswith("/someone/desk")
    assert sorted(hub.sent) == ["README.md", CONFIG, WEIGHTS] and hub.asked == dict(private=True, exist_ok=True)
    assert json.loads(hub.sent[CONFIG])["base_model_name_or_path"] == TWINS["smollm2-135m-instruct"]
    assert hub.sent[WEIGHTS] == (folder / WEIGHTS).read_bytes()


@pytest.mark.parametrize("card", ["see /home/me/data.jsonl", "token hf_" + "a" * 34, r"at C:\Users\me\x", "(/tmp/run)"])
def test_a_card_with_a_path_or_a_token_is_not_sent(trained, tmp_path, card):
    folder, hub = ready(trained, tmp_path), Hub()
    with pytest.raises(AdapterError, match="would publish") as e:
        push_adapter(folder, "someone/desk", f"# Card\n{card}\n", api=hub)
    assert hub.sent is None and "a" * 34 not in str(e.value)


def test_links_are_no_paths(trained, tmp_path):
    hub = Hub()
    push_adapter(ready(trained, tmp_path), "someone/desk", "[a](https://example.org/home/x) 3/4 a/b/c", api=hub)
    assert hub.sent


def test_what_the_hub_must_not_get(trained, tmp_path):
    hub = Hub(private=False)
    folder = ready(trained, tmp_path)
    with pytest.raises(AdapterError, match="is public"):
        push_adapter(folder, "someone/desk", "# Card", api=hub)
    with pytest.raises(AdapterError, match="repo_id"):
        push_adapter(folder, "a/b/c", "# Card", api=hub)
    (folder / "README.md").unlink()
    with pytest.raises(AdapterError, match="no card"):
        push_adapter(folder, "someone/desk", api=hub)
    own = ready(trained, tmp_path / "own", base_model_name_or_path="/data/mine")
    with pytest.raises(AdapterError, match="nobody else has"):
        push_adapter(own, "someone/desk", "# Card", api=hub)
    assert hub.sent is None
    push_adapter(folder, "someone/desk", "# Card", private=False, api=hub)
    assert hub.sent


def test_a_refusal_is_told_without_the_token(trained, tmp_path):
    folder, secret = ready(trained, tmp_path), "hf_" + "b" * 34
    with pytest.raises(AdapterError, match="did not take it: 403") as e:
        push_adapter(folder, "someone/desk", "# Card", api=Hub(error=OSError(f"403 for {secret}")))
    assert secret not in str(e.value) and str(folder / "README.md") in str(e.value)


def test_offline_and_without_a_token_the_card_is_kept(trained, tmp_path, monkeypatch):
    from deepseek_cookbook.sft import adapters

    folder = ready(trained, tmp_path)
    for offline, words in ((True, "offline"), (False, "no token")):
        monkeypatch.setattr(adapters.constants, "is_offline_mode", lambda said=offline: said)
        monkeypatch.setattr(adapters, "get_token", lambda: None)
        (folder / "README.md").unlink(missing_ok=True)
        with pytest.raises(AdapterError, match=words):
            push_adapter(folder, "someone/desk", "# Card")
        assert (folder / "README.md").read_text() == "# Card"


def test_pushed_adapters_of_the_embedded_model_fit_its_twin():
    assert all(base_name(twin) == own for own, twin in TWINS.items())
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+", twin) for twin in TWINS.values())


# --- the two benches ---


BENCH = Path(__file__).parent.parent / "scripts" / "bench"


def module(name: str):
    "A bench as a module."
    import importlib.util

    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_the_gpu_bench_refuses_what_would_say_nothing():
    gpu = module("gpu_sft")
    full, toy = (gpu.arguments().parse_args(words.split()) for words in ("", "--device cpu --layers 2 --hidden 64"))
    assert gpu.shape_of(full) == load_shape() and gpu.shape_of(toy).parameters < 1e6
    if not torch.cuda.is_available():
        assert "no CUDA device" in gpu.refuse(full, gpu.shape_of(full))
    full.device = "cpu"
    assert "6.91 billion" in gpu.refuse(full, gpu.shape_of(full)) and gpu.refuse(toy, gpu.shape_of(toy)) is None


def load_shape():
    from deepseek_cookbook.registry import DEEPSEEK_7B

    return DEEPSEEK_7B


def test_utilisation_is_that_of_a_naive_count():
    "Seven billion weights, two operations each, forward and backward to the activations: 4 N a token, and attention."
    from deepseek_cookbook.planner import GPUS

    gpu = module("gpu_sft")
    args = gpu.arguments().parse_args(["--batch", "4", "--seq-len", "2048"])
    shape = gpu.shape_of(args)
    got = gpu.figures("bf16", shape, args, dict(seconds=2.0), GPUS["a100-80g"])
    matrices = shape.parameters - shape.vocab * shape.hidden
    naive = 4 * matrices + 4 * shape.layers * shape.hidden * 2048
    assert got["rate"] == 4096 and got["mfu"] == pytest.approx(4096 * naive / 312e12, rel=0.01)
    assert got["hardware"] == pytest.approx(1.5 * got["mfu"])
    assert gpu.card("NVIDIA H200") == GPUS["h200-141g"] and gpu.card("NVIDIA A100-SXM4-80GB").tflops == 312
    assert gpu.card("Some Other Card") is None


def test_the_gpu_bench_runs_as_a_toy(tmp_path):
    gpu = module("gpu_sft")
    words = "--device cpu --layers 1 --hidden 64 --vocab 640 --seq-len 16 --batch 1 --steps 3 --warmup 1 --folder"
    args = gpu.arguments().parse_args([*words.split(), str(tmp_path)])
    shape = gpu.shape_of(args)
    gpu.write_random(args.folder, shape, args)
    rows = {case: gpu.figures(case, shape, args, gpu.train(case, shape, args), None) for case in gpu.CASES}
    for row in rows.values():
        assert row["rate"] > 0 and row["trainable"] == rows["bf16"]["trainable"] > 0 and row["mfu"] is None
        assert 6 < row["first"] < 7  # log of 640 tokens is 6.46
    assert gpu.table(rows).count("unknown") == 4


def test_the_verdicts_say_what_the_numbers_say(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    precision = module("precision")

    def row(rate, held, peak=2.0, trainable=10):
        return dict(rate=rate, per_cpu=rate, seconds=100 / rate, peak=peak, held=held, trainable=trainable)

    rows = {"LoRA, fp32": row(100, 2.0), "LoRA, bf16": row(140, 2.0), "full, fp32": row(50, 1.5, 4.0, 100),
            "full, bf16": row(100, 1.5, 4.0, 100)}
    said = precision.verdicts(rows, base=4.0)
    assert "LoRA: +40% tokens per CPU second" in said[0] and "within" in said[0]
    assert "full: +100%" in said[1] and "above" in said[1]
    assert "10.00% of the trained parameters, 50% of the time, 50% of the peak memory" in said[2]
    assert "50.0% against 62.5%" in said[2]
    text = precision.table(rows, 4.0)
    assert [line.count("|") for line in text.splitlines()] == [8] * 7


@pytest.mark.parametrize("targets", ['["embed_tokens"]', '["q_proj","embed_tokens"]'])
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen2"])
def test_an_adapter_on_the_embedding_is_merged_too(tmp_path, name, targets):
    "Also where input and output share a matrix: the adapter changed what is read alone, and so does the merged model."
    more = [f"lora.target_modules={targets}", "sft.learning_rate=1e-2", "sft.max_steps=6"]
    model, _ = train_sft(chosen(name, *more), RECORDS, RECORDS[:4], tmp_path / "run")
    figures = merge_adapter(name, tmp_path / "run/adapter", tmp_path / "merged")
    merged = load_model(tmp_path / "merged", dtype="float32")
    trained = probe_logits(load_adapters(load_model(name, dtype="float32"), dict(a=tmp_path / "run/adapter")))
    assert figures["merging"] < 1e-4 and difference(probe_logits(merged), trained) < 1e-4
    assert difference(trained, probe_logits(load_model(name, dtype="float32"))) > 1e-3
