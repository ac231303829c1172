"""Four models on one base: who is trained, who is the reference, what is saved, and rewards on the same base."""

import copy
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_ppo import EXACT, LORA, NAMES, ROWS, logged, peaked, shaken, text_of, trainer, vowels

from deepseek_cookbook.models import load_tokenizer
from deepseek_cookbook.ppo import policy as P
from deepseek_cookbook.ppo import task
from deepseek_cookbook.ppo.policy import PolicyError, make_models, reward_on_base, save_policy, trained
from deepseek_cookbook.ppo.rollout import base_of, sample, score, token_logprobs
from deepseek_cookbook.ppo.task import check_reward, make_reward, train_ppo
from deepseek_cookbook.ppo.train import PPOError
from deepseek_cookbook.reward.gate import GateError
from deepseek_cookbook.reward.model import load_reward, load_reward_model, save_reward
from deepseek_cookbook.settings import load_settings

PROMPTS = [r["prompt"] for r in ROWS[:4]]


def start_adapter(folder, name="tiny-llama", size=0.05):
    "An adapter in all layers, as SFT leaves it, with other ranks and scales than the policy's."
    targets = r".*\.self_attn\..*_proj" if "deepseek" in name else "all-linear"  # experts can't be joined
    lora = LoraConfig(r=3, lora_alpha=5, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(peaked(name), lora)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_" in n:
                p.copy_(size * torch.randn(p.shape, generator=g))
    model.save_pretrained(folder)
    return folder


def with_start(folder, name="tiny-llama"):
    return PeftModel.from_pretrained(peaked(name), str(folder)).eval()


def said_by(models, name="tiny-llama"):
    with models.as_policy():
        return sample(models.policy, load_tokenizer(name), PROMPTS, EXACT, seed=5)


# ---------------------------------------------------------------- who is trained


def layer_of(name):
    return next((int(x) for x in name.split(".")[1:] if x.isdigit()), None)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("upper, value", [(None, None), (1, None), (None, 1), (1, 1)])
def test_what_is_trained_by_name(tmp_path, name, upper, value):
    models = make_models(peaked(name), LORA, start_adapter(tmp_path, name), upper, value, values=2)
    names = trained(models)
    by_part = {part: [n for n in names if n.startswith(f"{part}.")] for part in ("policy", "value", "head")}
    assert sum(map(len, by_part.values())) == len(names) and by_part["head"] == ["head.weight", "head.bias"]
    for part, layers in dict(policy=upper, value=value).items():
        assert by_part[part] and all(f".lora_A.{part}." in n or f".lora_B.{part}." in n for n in by_part[part])
        assert {layer_of(n) for n in by_part[part]} == ({1} if layers else {0, 1})
    assert {n for n, p in models.frozen.named_parameters() if p.requires_grad} == {
        n.split(".", 1)[1] for n in names if not n.startswith("head.")
    }
    assert models.head.weight.shape[0] == 2 and not models.head.weight.any()
    assert not any(m.training for m in models.policy.modules())


def test_all_weights_or_those_of_the_upper_layers():
    whole = trained(make_models(peaked(), LORA, full=True))
    assert {n.removeprefix("policy.") for n in whole if n.startswith("policy.")} == {
        n for n, _ in peaked().named_parameters()
    }
    upper = [n for n in trained(make_models(peaked(), LORA, full=True, upper_layers=1)) if n.startswith("policy.")]
    assert any(".layers.1." in n for n in upper) and not any(".layers.0." in n or "embed" in n for n in upper)
    with pytest.raises(PolicyError, match="float32"):
        make_models(peaked().to(torch.bfloat16), LORA, full=True)


def test_one_base_in_memory_for_four_models(tmp_path):
    "Policy, value, reward and reference: the bytes of one base, and small adapters."
    base = peaked()
    alone = sum(p.nbytes for p in base.parameters())
    models = make_models(base, LORA | dict(r=1), None)
    reward = reward_on_base(models, reward_model(tmp_path, r=1))
    reward(PROMPTS, ["a"] * 4)
    assert models.policy is models.frozen and base_of(models.policy) is base
    tensors = {p.data_ptr(): p.nbytes for m in (models.policy, models.head) for p in m.parameters()}
    assert alone < sum(tensors.values()) < 1.3 * alone  # four copies: 4


# ---------------------------------------------------------------- the reference


@pytest.mark.learning
@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_reference_is_the_start(tmp_path, name, started, seed, spread):
    "Twenty seeds, ten of them in FP32 with AVX2: two steps move a log-probability by 0.22 or more."
    folder = start_adapter(tmp_path / "start", name) if started else None
    models = make_models(peaked(name), LORA, folder)
    alone = with_start(folder, name) if started else peaked(name)
    for moved in (False, True):
        if moved:
            more = dict(models=models, learning_rate=1e-2, num_ppo_epochs=2, seed=seed)
            run = trainer(tmp_path / "run", 2, name=name, **more)
            run.train()
        rollout = said_by(models, name)
        mask = rollout.completion_mask_BC
        with models.as_reference():
            ref, _ = score(models.frozen, rollout, EXACT)
        plain, _ = score(alone, rollout, EXACT)
        assert (ref - plain)[mask].abs().max() < 1e-5
        with models.as_policy():
            now, _ = score(models.policy, rollout, EXACT)
        assert (spread(f"moved {moved}", (now - ref)[mask].abs().max()) > 1e-3) == moved
    bare, _ = score(peaked(name), rollout, EXACT)
    assert ((bare - ref)[mask].abs().max() > 1e-3) == started
    assert max(abs(k) for k in logged(run, "kl")[:1]) < 1e-6


def test_the_one_who_answers_is_put_back_after_an_error():
    models = shaken(make_models(peaked(), LORA))
    rollout, active = said_by(models), list(models.policy.base_model.active_adapters)
    flags = {n: p.requires_grad for n, p in models.policy.named_parameters()}
    for block in (models.as_reference, models.as_value, models.as_policy):
        with pytest.raises(KeyError), block():
            raise KeyError
    again, _ = score(models.policy, rollout, EXACT)
    assert torch.equal(again, rollout.logprobs_BC) and models.policy.base_model.active_adapters == active
    assert {n: p.requires_grad for n, p in models.policy.named_parameters()} == flags


@pytest.mark.parametrize("full", [False, True])
def test_the_value_does_not_change_the_policy(full):
    models = shaken(make_models(peaked(), LORA, full=full))
    rollout = said_by(models)
    before = P.values_of(models, rollout)
    with torch.no_grad():
        for n, p in models.frozen.named_parameters():
            if ".value." in n:
                p.mul_(2)
    assert torch.equal(said_by(models).logprobs_BC, rollout.logprobs_BC)
    assert not torch.allclose(P.values_of(models, rollout), before)


# ---------------------------------------------------------------- what is saved


def deltas(model, *names):
    "What adapters add to each weight."
    return {
        path: sum(m.get_delta_weight(n) for n in names if n in m.lora_A)
        for path, m in base_of(model).named_modules()
        if hasattr(m, "lora_A") and any(n in m.lora_A for n in names)
    }


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("upper", [None, 1])
def test_the_saved_adapter_is_start_and_policy_weight_by_weight(tmp_path, name, upper):
    folder = start_adapter(tmp_path / "start", name)
    models = shaken(make_models(peaked(name), LORA, folder, upper))
    saved = with_start(save_policy(models, tmp_path / "saved"), name)
    wanted, found = deltas(models.policy, "start", "policy"), deltas(saved, "default")
    assert wanted.keys() == found.keys() and len(wanted) > 8
    for path, x in wanted.items():
        assert torch.allclose(found[path], x, atol=1e-6), path
    old = deltas(models.policy, "start")
    moved = {path for path, x in found.items() if not torch.allclose(x, old.get(path, 0 * x), atol=1e-6)}
    assert moved == {p for p in wanted if upper is None or layer_of(p) == 1}
    rollout = said_by(models, name)
    again, _ = score(saved, rollout, EXACT)
    assert (again - rollout.logprobs_BC).abs().max() < 1e-4
    config = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert max(config["rank_pattern"].values(), default=0) < config["r"] == LORA["r"] + 3


@pytest.mark.learning
def test_a_trained_policy_is_not_its_start(tmp_path, seed, spread):
    "Twenty seeds, ten of them in FP32 with AVX2: each matrix moves by 0.017 or more somewhere."
    folder = start_adapter(tmp_path / "start")
    models = make_models(peaked(), LORA, folder)
    run = trainer(tmp_path / "run", 3, models=models, learning_rate=1e-2, seed=seed)
    run.train()
    saved = with_start(tmp_path / "run" / "adapter")
    before, after = deltas(models.policy, "start"), deltas(saved, "default")
    assert spread("least moved", min((after[p] - before[p]).abs().max() for p in before)) > 1e-5
    for path, x in deltas(models.policy, "start", "policy").items():
        assert torch.allclose(after[path], x, atol=1e-6)
    kept = load_file(folder / "adapter_model.safetensors")  # and the start is as it was
    now = {n: p for n, p in models.policy.state_dict().items() if ".start." in n}
    assert now and all(torch.equal(p, kept[n.replace(".start.", ".")]) for n, p in now.items())


def test_a_run_from_another_start_is_not_continued(tmp_path):
    "Its tensors have the same names and shapes, and would be added to the wrong base."
    for size, more in ((0.05, 1), (0.05, 2)):
        models = make_models(peaked(), LORA, start_adapter(tmp_path / "start", size=size))
        trainer(tmp_path / "run", more, models=models).train()
    models = make_models(peaked(), LORA, start_adapter(tmp_path / "other", size=0.06))
    with pytest.raises(PPOError, match="another model, start"):
        trainer(tmp_path / "run", 3, models=models).train()


def test_all_weights_are_saved_as_a_model(tmp_path):
    models = make_models(peaked(), LORA, start_adapter(tmp_path / "start"), full=True)
    with torch.no_grad():
        for p in models.policy.parameters():
            p.mul_(1.01)
    save_policy(models, tmp_path / "saved")
    found = load_file(tmp_path / "saved" / "model.safetensors")
    for n, p in models.policy.named_parameters():
        assert n not in found or torch.equal(found[n], p)
    assert len(found) > 10


# ---------------------------------------------------------------- rewards


def reward_model(folder, seed=3, heads=1, r=4, name="tiny-llama", passed=True):
    "What the reward phase leaves: adapter, head, facts, and the report of its gate."
    torch.manual_seed(seed)
    model = load_reward_model(name, heads=heads, dtype="float32", seed=seed)
    lora = LoraConfig(r=r, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"])
    model = get_peft_model(model, lora)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B" in n or ("score" in n and "modules_to_save" in n):
                p.copy_(0.2 * torch.randn(p.shape))
    names = [f"head{i}" for i in range(heads)]
    save_reward(model, folder, dict(base=name, names=names, mean=0.1, std=2.0, max_length=512))
    return folder


def test_a_reward_model_on_the_base_scores_as_it_does_alone(tmp_path):
    "Whatever the policy has become, and with several of them on one base."
    folders = [reward_model(tmp_path / str(i), seed=i, heads=1 + i) for i in range(2)]
    said = ["A short answer.", "", "Something longer than that, with some more words.", "yes"]
    base = peaked()
    with torch.no_grad():
        base.get_output_embeddings().weight.div_(5)  # the start's own weights, also where they are tied
    models = shaken(make_models(base, LORA, None))
    rollout = said_by(models)
    rewards = [reward_on_base(models, f) for f in folders]
    for reward, folder in zip(rewards, folders):
        alone = load_reward(folder, dtype="float32")(PROMPTS, said)
        assert reward(PROMPTS, said) == pytest.approx(alone, abs=1e-4) and max(alone) - min(alone) > 1e-2
    again, _ = score(models.policy, rollout, EXACT)
    assert torch.equal(again, rollout.logprobs_BC)  # the policy answers as before
    assert not any(p.requires_grad for n, p in models.frozen.named_parameters() if "reward" in n)
    assert all(p.requires_grad for p in trained(models).values())
    with pytest.raises(PolicyError, match="was trained on tiny-qwen2"):
        reward_on_base(models, reward_model(tmp_path / "other", name="tiny-qwen2"))


def test_rewards_are_functions_folders_or_weighted(tmp_path):
    folder = reward_model(tmp_path / "rm")
    other = reward_model(tmp_path / "rm2", seed=9)
    foreign = reward_model(tmp_path / "foreign", name="tiny-qwen2")
    models, said = make_models(peaked(), LORA), ["aeiou", "xyz", "a x", "b"]
    alone = [make_reward(r, models) for r in (vowels, folder, other, foreign)]
    assert alone[0] is vowels
    scores = [torch.tensor(r(PROMPTS, said)) for r in alone]
    both = make_reward(dict(a=(0.5, vowels), b=(2.0, folder), c=(-1.0, other), d=(1.0, foreign)), models)
    wanted = 0.5 * scores[0] + 2.0 * scores[1] - scores[2] + scores[3]
    assert torch.tensor(both(PROMPTS, said)) == pytest.approx(wanted, abs=1e-4)
    assert scores[1].std() > 1e-3 and not torch.allclose(scores[1], scores[2])
    for wrong in (7, ["a"], torch.nn.Linear(1, 1)):
        if callable(wrong):
            check_reward(wrong)  # a module is a function, too
        else:
            with pytest.raises(PPOError, match="Give a function"):
                check_reward(wrong)


def test_the_gate_comes_before_anything_is_loaded(tmp_path, monkeypatch):
    class Loaded(Exception):
        pass

    def never(*args, **kwargs):
        raise Loaded

    monkeypatch.setattr(task, "load_model", never)
    folder, toy = reward_model(tmp_path / "rm"), load_settings("tiny")
    judged = []

    def gate(report, force):
        judged.append(report)
        if not force:
            raise GateError("the reward did not pass the gate")
        return SimpleNamespace(forced=True)

    monkeypatch.setattr(task, "check_gate", gate)
    for reward in (folder, str(folder), dict(a=(0.5, vowels), b=(0.5, folder)), dict(a=(1.0, dict(b=(1.0, folder))))):
        with pytest.raises(GateError):
            train_ppo(toy, ROWS, reward, tmp_path / "run", quiet=True)
        with pytest.raises(Loaded):
            train_ppo(toy, ROWS, reward, tmp_path / "run", force=True, quiet=True)
    assert judged == [folder, folder, str(folder), str(folder), *[folder] * 4]
    with pytest.raises(Loaded):  # a function has no gate
        train_ppo(toy, ROWS, vowels, tmp_path / "run", quiet=True)
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_reward_model_without_a_gate_is_refused(tmp_path):
    with pytest.raises((GateError, ValueError, RuntimeError), match="gate"):
        check_reward(reward_model(tmp_path))


def test_a_start_that_cannot_be_joined_is_refused(tmp_path):
    model = get_peft_model(peaked(), LoraConfig(r=2, target_modules="all-linear", use_dora=True, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    with pytest.raises(PolicyError, match="use_dora.*[Mm]erge it"):
        make_models(peaked(), LORA, tmp_path)
    with pytest.raises(PolicyError, match="upper_layers"):
        make_models(peaked(), LORA, None, upper_layers=-1)


def test_the_reward_learns_nothing_while_the_policy_does(tmp_path):
    models = make_models(peaked(), LORA)
    reward = reward_on_base(models, reward_model(tmp_path / "rm"))
    before = copy.deepcopy({n: p for n, p in models.frozen.state_dict().items() if "reward" in n})
    asked = reward(PROMPTS, ["some words"] * 4)
    run = trainer(tmp_path / "run", 2, reward, models=models, learning_rate=1e-2)
    run.train()
    assert before and all(torch.equal(models.frozen.state_dict()[n], p) for n, p in before.items())
    assert reward(PROMPTS, ["some words"] * 4) == asked
    texts = run.last.rollout.texts
    assert run.last.score_B.tolist() == pytest.approx(reward([r["prompt"] for r in run.last.rows], texts), abs=1e-4)
    assert text_of(texts[0]) == texts[0]


# ---------------------------------------------------------------- adapters that would lie


@pytest.mark.parametrize(
    "more, found",
    [
        (dict(use_dora=True), "use_dora"),  # the saved sum had no place for DoRA's lengths
        (dict(modules_to_save=["lm_head"]), "modules_to_save"),  # the copy stayed on for the reference
        (dict(trainable_token_indices=[5]), "trainable_token_indices"),
        (dict(target_modules=["embed_tokens", "q_proj"]), "embed_tokens"),  # was never trained
        (dict(bias="all"), "bias"),
    ],
)
def test_lora_that_cannot_be_switched_off_or_joined_is_refused(more, found):
    with pytest.raises(PolicyError, match=rf"\[lora\] has .*{found}"):
        make_models(peaked(), LORA | more)


@pytest.mark.parametrize(
    "more, found",
    [
        (dict(trainable_token_indices=[5, 6]), "tokens|token_indices"),
        (dict(target_modules=["embed_tokens"]), "embeddings"),
    ],
)
def test_a_start_below_the_layers_is_refused(tmp_path, more, found):
    config = LoraConfig(**dict(r=2, target_modules="all-linear", task_type="CAUSAL_LM") | more)
    get_peft_model(peaked(), config).save_pretrained(tmp_path)
    with pytest.raises(PolicyError, match=found):
        make_models(peaked(), LORA, tmp_path)


def test_the_value_has_no_adapter_on_the_output_layer(tmp_path):
    models = make_models(peaked(), LORA | dict(target_modules=["lm_head", "q_proj"]))
    rollout = said_by(models)
    with models.as_policy():
        token_logprobs(models.policy, rollout)[0].sum().backward()
    P.values_of(models, rollout).sum().backward()
    assert {n.split(".")[0] for n in trained(models) if "lm_head" in n} == {"policy"}
    assert all(p.grad is not None for p in trained(models).values())  # torchrun adds up all gradients


def test_a_reward_model_on_the_base_keeps_its_32_bits(tmp_path):
    "It scores without autocast, which 16-bit matrices could not."
    models = make_models(peaked(), LORA)
    with P.narrowed(models, "bfloat16") as matrices:
        assert matrices == 14
    models.frozen.add_adapter("reward", LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    with P.narrowed(models, "bfloat16") as matrices:
        assert matrices == 0
    with P.narrowed(models, "float32") as matrices:
        assert matrices == 0


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("value", [None, 0])
def test_the_reward_model_judges_from_the_base_that_it_was_trained_on(tmp_path, full, started, value):
    "Whatever is merged into what is frozen, and also where that carries no adapter at all."
    folder, said = reward_model(tmp_path / "rm"), ["A short answer.", "", "Something longer than that.", "yes"]
    start = start_adapter(tmp_path / "start", size=0.3) if started else None
    base = peaked()
    with torch.no_grad():
        base.get_output_embeddings().weight.div_(5)
    models = make_models(base, LORA, start, value_layers=value, full=full)
    alone = load_reward(folder, dtype="float32")(PROMPTS, said)
    for reward in (reward_on_base(models, folder), make_reward(folder, models)):
        assert reward(PROMPTS, said) == pytest.approx(alone, abs=1e-4)
    assert all(p.requires_grad for p in trained(models).values())


def test_a_run_of_another_reward_model_is_not_continued(tmp_path):
    "Known by its weights, wherever it lies."
    folders = [reward_model(tmp_path / str(seed), seed=seed) for seed in (3, 4)]
    shutil.copytree(folders[0], tmp_path / "moved")

    def run(steps, folder):
        models = make_models(peaked(), LORA)
        return trainer(tmp_path / "run", steps, make_reward(folder, models), models=models).train()

    assert run(1, folders[0])["steps"] == 1 and run(2, tmp_path / "moved")["resumed_from"] == 1
    with pytest.raises(PPOError, match="another reward"):
        run(3, folders[1])
