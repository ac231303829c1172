"""Reward models: losses against naive oracles, heads on every architecture, equal scores, save, resume, errors."""

import math
import shutil
from importlib import import_module

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from deepseek_cookbook.models import load_tokenizer
from deepseek_cookbook.ppo.rollout import prompt_ids
from deepseek_cookbook.reward.losses import bradley_terry, head_targets, multi_head, triplet
from deepseek_cookbook.reward.model import (
    PURPOSES,
    RewardModel,
    RewardModelConfig,
    RewardModelError,
    encode,
    find_reward,
    head_class,
    head_names,
    load_reward,
    load_reward_model,
    put_head,
    to_rows,
    token_batches,
    train_reward,
)
from deepseek_cookbook.reward.pairs import DIMENSIONS, bank_pairs, to_preference
from deepseek_cookbook.settings import load_settings, read_json

TINY = ("tiny-llama", "tiny-qwen2", "tiny-deepseek-v3")
TRAIN, HELDOUT, _ = bank_pairs(60, held=12)
SHORT = ["reward.disable_tqdm=true", "reward.max_steps=6", "reward.eval_steps=3", "reward.save_steps=3",
         "reward.logging_steps=1", "reward.per_device_train_batch_size=4"]
numbers = st.lists(st.tuples(st.floats(-30, 30), st.floats(-30, 30), st.floats(0, 3)), min_size=1, max_size=6)


def settings(*overrides):
    return load_settings("tiny", [*SHORT, *overrides])


@hypothesis_settings(deadline=None, max_examples=50)
@given(numbers)
def test_losses_equal_naive_sums(rows):
    c, r, m = (torch.tensor(x, dtype=torch.float64) for x in zip(*rows, strict=True))
    naive = sum(math.log1p(math.exp(-(a - b - k))) for a, b, k in rows) / len(rows)
    assert bradley_terry(c, r, m).item() == pytest.approx(naive, abs=1e-9)
    assert triplet(c, r, m).item() == pytest.approx(sum(max(0, k - (a - b)) for a, b, k in rows) / len(rows), abs=1e-9)
    for target in (0.0, 0.5, 1.0):
        soft = sum(target * math.log1p(math.exp(b - a)) + (1 - target) * math.log1p(math.exp(a - b))
                   for a, b, _ in rows) / len(rows)
        found = multi_head(c[:, None], r[:, None], torch.full((len(rows), 1), target, dtype=torch.float64))
        assert found.item() == pytest.approx(soft, abs=1e-9)


def test_targets_of_heads():
    scores = dict(chosen=dict(a=1, b=0, c=2), rejected=dict(a=0, b=1, c=2))
    assert head_targets(dict(scores=scores), ("c", "a", "b")) == [0.5, 1.0, 0.0]


@pytest.mark.parametrize("margin", [True, False])
def test_bradley_terry_is_trls(tmp_path, margin):
    """The trainer's loss on a batch, against the formula on scores of unpadded rows."""
    from deepseek_cookbook.reward.model import make_reward_trainer

    chosen = settings(f"reward_model.margin={str(margin).lower()}", "reward.bf16=false")
    model, tokenizer = load_reward_model("tiny-llama", device="cpu"), load_tokenizer("tiny-llama")
    trainer, cut = make_reward_trainer(chosen, TRAIN[:8], TRAIN[:8], tmp_path, model, tokenizer, ("reward",))
    batch = next(iter(trainer.get_eval_dataloader()))
    assert ("margin" in batch) == margin and cut == 0
    with torch.no_grad():
        by_trl = trainer.compute_loss(trainer.model, dict(batch)).item()
    reward = RewardModel(trainer.model, tokenizer)
    score = [torch.tensor([reward([p["prompt"]], [p[k]])[0] for p in TRAIN[:8]]) for k in ("chosen", "rejected")]
    m = torch.tensor([p["margin"] for p in TRAIN[:8]]) if margin else 0.0
    assert by_trl == pytest.approx(bradley_terry(*score, m).item(), abs=1e-5)


def test_rows_are_trls_rows(tmp_path):
    """Our tokens are those that RewardTrainer makes of the same pairs; targets and margins follow."""
    from trl import RewardConfig, RewardTrainer

    tokenizer = load_tokenizer("tiny-llama")
    config = RewardConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=None)
    trainer = RewardTrainer(load_reward_model("tiny-llama", device="cpu"), config, processing_class=tokenizer,
                            train_dataset=to_preference(TRAIN[:5]))
    rows, cut = to_rows(TRAIN[:5], tokenizer, RewardModelConfig(margin=True))
    for key in ("chosen_ids", "rejected_ids"):
        assert list(rows[key]) == list(trainer.train_dataset[key])
    assert list(rows["margin"]) == [p["margin"] for p in TRAIN[:5]] and cut == 0


def same_scores(reward):
    """Scores of rows of many lengths: together, alone, in other batches, padded left."""
    prompts = [p["prompt"] for p in TRAIN[:6]] + ["Hi", "你好"]
    answers = [p["chosen"] for p in TRAIN[:6]] + ["", "short"]
    together = reward(prompts, answers)
    rows = [encode(reward.tokenizer, p, a)[0] for p, a in zip(prompts, answers, strict=True)]
    left = (reward.score_ids(rows, side="left").sum(-1) - reward.mean) / reward.std
    alone = [reward([p], [a])[0] for p, a in zip(prompts, answers, strict=True)]
    reward.batch_tokens = 2 * max(map(len, rows))
    for other in (left.tolist(), alone, reward(prompts, answers), reward(prompts[::-1], answers[::-1])[::-1]):
        assert max(abs(a - b) for a, b in zip(together, other, strict=True)) < 1e-4
    assert len({round(x, 5) for x in together}) > 4
    return together


@pytest.mark.parametrize("name", TINY)
def test_equal_scores_however_they_are_batched(name):
    same_scores(RewardModel(load_reward_model(name, device="cpu", heads=2), load_tokenizer(name), ("a", "b")))


@pytest.mark.laptop
def test_equal_scores_of_the_real_base():
    name = "smollm2-135m-instruct"
    same_scores(RewardModel(load_reward_model(name, device="cpu"), load_tokenizer(name)))


def test_pad_equal_to_eos_is_consistent_but_reads_an_earlier_token():
    model, tokenizer = load_reward_model("tiny-llama", device="cpu"), load_tokenizer("tiny-llama")
    row, end = encode(tokenizer, "Hi", "Hello.")[0], tokenizer.eos_token_id
    row = row[: len(row) - row[::-1].index(end)]  # nothing after the end of turn
    model.config.pad_token_id = end
    reward = RewardModel(model, tokenizer)
    states = model.score(model.model(torch.tensor([row])).last_hidden_state)[0, :, 0]
    both = reward.score_ids([row, row[:1] + row])[0, 0].item()
    assert row[-1] == end and both == pytest.approx(states[-2].item(), abs=1e-5)


def test_a_head_where_transformers_has_no_class():
    from transformers import DeepseekV32Config, DeepseekV32ForCausalLM

    config = DeepseekV32Config(vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
                               num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4,
                               num_experts_per_tok=2, n_group=1, topk_group=1, q_lora_rank=16, kv_lora_rank=8,
                               qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=1,
                               index_n_heads=2, index_head_dim=16, index_topk=8, pad_token_id=0)
    causal = DeepseekV32ForCausalLM(config)
    model = put_head(causal, 3, seed=0)
    assert head_class(causal).__name__ == "DeepseekV32ForSequenceClassification"
    assert model.model is causal.model and model(torch.tensor([[5, 6, 0]])).logits.shape == (1, 3)


def test_a_checkpoint_with_a_head_keeps_it(tmp_path):
    model, tokenizer = load_reward_model("tiny-llama", device="cpu", seed=7), load_tokenizer("tiny-llama")
    model.save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    again = load_reward_model(tmp_path / "rm", device="cpu")
    torch.testing.assert_close(again.score.weight, model.score.weight)
    assert again.config.pad_token_id == tokenizer.pad_token_id


def test_a_head_is_seeded():
    a, b, c = (load_reward_model("tiny-llama", device="cpu", seed=s).score.weight for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    with pytest.raises(RewardModelError, match="heads = 0"):
        load_reward_model("tiny-llama", heads=0)


@hypothesis_settings(deadline=None)
@given(st.lists(st.integers(1, 90), max_size=40), st.integers(1, 300))
def test_batches_hold_each_row_once_within_the_budget(lengths, budget):
    batches = list(token_batches(lengths, budget))
    assert sorted(i for b in batches for i in b) == list(range(len(lengths)))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= budget for b in batches)


def test_long_rows_are_refused_or_cut_and_counted():
    tokenizer = load_tokenizer("tiny-llama")
    ids, _ = encode(tokenizer, "A long question " * 20, "An answer.")
    with pytest.raises(RewardModelError, match="max_length"):
        encode(tokenizer, "A long question " * 20, "An answer.", max_length=40)
    assert encode(tokenizer, "A long question " * 20, "An answer.", 40, "cut") == (ids[-40:], len(ids) - 40)
    reward = RewardModel(load_reward_model("tiny-llama", device="cpu"), tokenizer, max_length=40, long="cut")
    reward(["A long question " * 20, "Hi"], ["An answer.", "Hm"])
    assert reward.truncated == 1
    with pytest.raises(RewardModelError, match="max_length"):
        to_rows(TRAIN[:2], tokenizer, RewardModelConfig(), max_length=20)
    with pytest.raises(RewardModelError, match="same tokens"):
        to_rows(TRAIN[:40], tokenizer, RewardModelConfig(long="cut"), max_length=2)


@pytest.mark.parametrize("change, word", [
    (dict(rejected=TRAIN[0]["chosen"]), "equal"), (dict(chosen=[{"role": "assistant", "content": " "}]), "chosen"),
    (dict(chosen=""), "chosen"), (dict(provenance="hearsay"), "provenance")])
def test_bad_pairs_are_named(change, word):
    with pytest.raises(RewardModelError, match=f"pair .*{word}"):
        to_rows([TRAIN[1], TRAIN[0] | change], load_tokenizer("tiny-llama"), RewardModelConfig())


def test_heads_that_cannot_learn_are_refused():
    several = RewardModelConfig(loss="multi_head")
    assert head_names(several, TRAIN) == tuple(sorted(DIMENSIONS))
    with pytest.raises(RewardModelError, match="no pair has scores"):
        head_names(several, [{k: v for k, v in TRAIN[0].items() if k != "scores"}])
    with pytest.raises(RewardModelError, match="every pair is a tie"):
        head_names(several, [p for p in TRAIN if p["dimension"] != "safe"])
    with pytest.raises(RewardModelError, match="Did you mean 'polite'"):
        head_names(RewardModelConfig(loss="multi_head", heads=("polit",)), TRAIN)


@pytest.mark.parametrize("wrong", [dict(loss="hinge"), dict(long="drop"), dict(pairs=0), dict(upper_layers=0),
                                   dict(heads=("safe",)), dict(loss="multi_head", margin=True)])
def test_settings_that_mean_nothing(wrong):
    with pytest.raises(ValueError):
        RewardModelConfig(**wrong)


def test_adapters_where_the_settings_say():
    """[lora]'s targets hold in the upper layers too, and [reward_model]'s go before them."""
    from peft import get_peft_model

    from deepseek_cookbook.reward.model import reward_lora

    def adapted(*overrides):
        model = load_reward_model("tiny-llama", device="cpu")
        names = get_peft_model(model, reward_lora(settings(*overrides), model)).state_dict()
        return {n.split(".lora_A")[0].rpartition(".")[2] for n in names if ".lora_A." in n}, {
            n.split("layers.")[1][0] for n in names if ".lora_A." in n}

    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    both, top = ({"0", "1"}, {"1"})
    assert adapted("lora.target_modules=qv") == ({"q_proj", "v_proj"}, both)
    assert adapted("lora.target_modules=qv", "reward_model.upper_layers=1") == ({"q_proj", "v_proj"}, top)
    assert adapted("lora.target_modules=qv", "reward_model.target_modules=attention") == (attention, both)
    assert adapted("reward_model.target_modules=attention", "reward_model.upper_layers=1") == (attention, top)
    with pytest.raises(ValueError, match="Did you mean"):
        adapted("reward_model.target_modules=q_proy")


def test_adapters_in_the_upper_layers_only(tmp_path):
    """Also with experts, which PEFT adapts in all layers once it adapts them in one."""
    import copy

    from transformers import AutoModelForCausalLM

    from deepseek_cookbook.models import load_model
    from deepseek_cookbook.reward.model import make_reward_trainer

    config = copy.deepcopy(load_model("tiny-deepseek-v3", device="cpu").config)
    config.num_hidden_layers, config.mlp_layer_types = 4, ["dense", "sparse", "sparse", "sparse"]
    model, tokenizer = put_head(AutoModelForCausalLM.from_config(config), 1, 0), load_tokenizer("tiny-deepseek-v3")
    trainer, _ = make_reward_trainer(settings("reward_model.upper_layers=1"), TRAIN[:4], TRAIN[:4], tmp_path, model,
                                     tokenizer, ("reward",))
    trained = [n for n, p in trainer.model.named_parameters() if p.requires_grad]
    assert any("score" in n for n in trained) and any("layers.3." in n for n in trained)
    assert all("score" in n or "layers.3." in n for n in trained)


@pytest.mark.parametrize("name, loss", [("tiny-llama", "bradley_terry"), ("tiny-qwen2", "triplet"),
                                        ("tiny-deepseek-v3", "multi_head")])
def test_trained_saved_and_loaded_is_one_function(tmp_path, name, loss):
    chosen = settings(f"model.name={name}", f"reward_model.loss={loss}", "reward_model.attention=eager")
    reward, figures = train_reward(chosen, TRAIN[12:], TRAIN[:12], tmp_path)
    asked = [p["prompt"] for p in HELDOUT[:3]], [p["chosen"] for p in HELDOUT[:3]]
    loaded = load_reward(tmp_path, device="cpu")
    assert [r.model.config._attn_implementation for r in (reward, loaded)] == ["eager", "sdpa"]
    assert loaded(*asked) == pytest.approx(reward(*asked), abs=1e-4)
    assert figures["steps"] == 6 and figures["loss"] == loss and figures["cut"] == 0 and not figures["packed"]
    same_scores(loaded)
    if loss == "multi_head":
        heads = loaded.heads(*asked)
        assert set(heads) == set(DIMENSIONS) and "accuracy/safe" in figures
        safe = load_reward(tmp_path, weights={"safe": 2.0}, device="cpu")(*asked)
        assert safe == pytest.approx([2 * x for x in heads["safe"]], abs=1e-4)
        assert find_reward("values").load(tmp_path, device="cpu").weights == {"safe": 1.0, "polite": 1.0}
    fresh = load_reward_model(name, device="cpu", heads=len(loaded.names)).score.weight
    assert not torch.allclose(loaded.model.base_model.model.score.modules_to_save["default"].weight, fresh)


def test_normalised_scores(tmp_path):
    train_reward(settings(), TRAIN[12:], TRAIN[:12], tmp_path)
    reward = load_reward(tmp_path, normalize=True, device="cpu")
    prompts = [p["prompt"] for p in TRAIN[:12]] * 2
    scores = torch.tensor(reward(prompts, [p[k] for k in ("chosen", "rejected") for p in TRAIN[:12]]))
    assert scores.mean().abs() < 0.1 and (scores.std(correction=0) - 1).abs() < 0.1


def test_resumed_weights_equal_straight_weights(tmp_path):
    chosen = settings("reward.load_best_model_at_end=false", "reward_model.loss=multi_head")
    straight, _ = train_reward(chosen, TRAIN[12:], TRAIN[:12], tmp_path / "a")
    train_reward(chosen, TRAIN[12:], TRAIN[:12], tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoint-6")
    shutil.rmtree(tmp_path / "b" / "adapter")
    resumed, figures = train_reward(chosen, TRAIN[12:], TRAIN[:12], tmp_path / "b")
    assert figures["resumed_from"] == "checkpoint-3"
    for (name, a), (_, b) in zip(straight.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=name)


def test_a_failed_save_keeps_the_old_model(tmp_path, monkeypatch):
    train_reward(settings(), TRAIN[12:], TRAIN[:12], tmp_path)
    old = read_json(tmp_path / "adapter" / "reward.json")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("deepseek_cookbook.reward.model.write_json", full)
    with pytest.raises((OSError, RewardModelError)):
        train_reward(settings(), TRAIN[12:], TRAIN[:12], tmp_path)
    assert read_json(tmp_path / "adapter" / "reward.json") == old
    load_reward(tmp_path, device="cpu")


def test_folders_and_calls_that_cannot_be_used(tmp_path):
    with pytest.raises(RewardModelError, match="reward.json"):
        load_reward(tmp_path)
    with pytest.raises(RewardModelError, match="no pairs"):
        train_reward(settings(), [], TRAIN[:2], tmp_path)
    reward = RewardModel(load_reward_model("tiny-llama", device="cpu"), load_tokenizer("tiny-llama"))
    with pytest.raises(RewardModelError, match="1 prompts and 2"):
        reward(["a"], ["b", "c"])
    assert reward([], []) == []
    with pytest.raises(RewardModelError, match="is no head"):
        RewardModel(reward.model, reward.tokenizer, weights={"rewrad": 1.0})
    with torch.no_grad():
        reward.model.score.weight.fill_(float("nan"))
    with pytest.raises(RewardModelError, match="isn't finite"):
        reward(["a"], ["b"])


def test_every_purpose_names_what_exists():
    for purpose in PURPOSES.values():
        assert set(purpose.heads) <= set(DIMENSIONS)
        for function in purpose.functions:
            module, name = function.split(":")
            assert callable(getattr(import_module(f"deepseek_cookbook.{module}"), name))
    assert find_reward("deepseek-r1-rm-chat") is PURPOSES["chat"]
    with pytest.raises(RewardModelError, match="unknown"):
        find_reward("truth")


# ---------------------------------------------------------------- what the policy wrote


@hypothesis_settings(deadline=None, max_examples=40)
@given(st.text("ab 好.\n", max_size=12), st.text("Zinc。 ", min_size=1, max_size=12),
       st.sampled_from(["tiny-llama", "tiny-qwen2", "tiny-deepseek-v3"]))  # fmt: skip
def test_the_reward_model_reads_the_tokens_of_the_rollout(thought, said, name):
    tokenizer, ask = load_tokenizer(name), [dict(role="user", content="Name a metal.<|im_end|>")]
    if name == "tiny-qwen2":  # R1's template: the prompt has opened the reasoning
        said = thought + "</think>\n\n" + said
    own = tokenizer(said, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    behind = tokenizer("\n", add_special_tokens=False)["input_ids"] if name == "tiny-llama" else []
    assert encode(tokenizer, ask, said)[0] == prompt_ids(tokenizer, ask) + own + behind


def test_a_pair_without_reasoning_is_read_where_the_policy_answers():
    tokenizer, ask = load_tokenizer("tiny-qwen2"), [dict(role="user", content="Name a metal.")]
    assert encode(tokenizer, ask, "Zinc.")[0] == encode(tokenizer, ask, "\n</think>\n\nZinc.")[0]


@pytest.mark.parametrize("loss", ["bradley_terry", "triplet", "multi_head"])
def test_scores_are_centred_by_every_loss(tmp_path, loss):
    "TRL's term, the mean square of the sum of a pair's scores, times the coefficient: the same for each of the losses."
    from deepseek_cookbook.reward.model import head_names, make_reward_trainer

    found = {}
    for center in ("none", 0.5):
        chosen = settings(f"reward.center_rewards_coefficient={center}", f"reward_model.loss={loss}")
        names = head_names(chosen.build("reward_model"), TRAIN)
        model = load_reward_model("tiny-llama", heads=len(names), dtype="float32")
        tokenizer = load_tokenizer("tiny-llama")
        trainer, _ = make_reward_trainer(chosen, TRAIN[:4], TRAIN[:4], tmp_path, model, tokenizer, names)
        trainer.model.eval()
        batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        kept = {k: v.clone() for k, v in batch.items()}
        with torch.no_grad():
            found[center] = trainer.compute_loss(trainer.model, batch).item()
            read = {k: kept[k] for k in ("input_ids", "attention_mask")}
            better, worse = trainer.model(**read, use_cache=False).logits.float().chunk(2)
    assert found[0.5] - found["none"] == pytest.approx(0.5 * (better + worse).square().mean().item(), rel=1e-3)
    assert (better + worse).square().mean() > 1e-6


def test_a_scale_of_all_heads_is_not_that_of_some():
    with pytest.raises(RewardModelError, match="Give one of the two"):
        load_reward("nowhere", weights=dict(a=1.0), normalize=True)
