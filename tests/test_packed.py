"""Pairs in one row: the mask against a naive loop, the scores and gradients against the ordinary pass, refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_cookbook.models import load_tokenizer
from deepseek_cookbook.reward.losses import PairCollator, bradley_terry
from deepseek_cookbook.reward.model import encode, load_reward_model
from deepseek_cookbook.reward.packed import PackedError, layer_of, one_row, packed_pairs, pair_mask
from deepseek_cookbook.reward.pairs import bank_pairs

MODELS = ("tiny-llama", "tiny-qwen2", "tiny-deepseek-v3")
tokens = st.lists(st.integers(0, 3), min_size=2, max_size=9)


def batch_of(name, n=5):
    "Pairs of the desk as TRL's collator lays them out."
    tokenizer, pairs = load_tokenizer(name), bank_pairs(n, 3, 2)[0]
    rows = [{f"{k}_ids": encode(tokenizer, p["prompt"], p[k])[0] for k in ("chosen", "rejected")} for p in pairs]
    return PairCollator(tokenizer.pad_token_id)(rows)


def frozen_below(name, frozen, kernel="sdpa"):
    model = load_reward_model(name, dtype="float32", attention=kernel)
    for n, p in model.base_model.named_parameters():
        p.requires_grad_(layer_of(n) >= frozen and layer_of(n) < 10**6)
    return model


@given(tokens, tokens)
def test_a_row_holds_both_dialogues(chosen, rejected):
    ids, places, parts = one_row(chosen, rejected)
    for side, dialogue in ((1, chosen), (2, rejected)):
        mine = [i for i, part in enumerate(parts) if part in (0, side)]
        assert [ids[i] for i in mine] == dialogue
        assert [places[i] for i in mine] == list(range(len(dialogue)))
        assert side in parts
    assert parts == sorted(parts)


@settings(deadline=None)
@given(st.lists(st.tuples(tokens, tokens), min_size=1, max_size=3))
def test_the_mask_is_the_loop(pairs):
    rows = [one_row(*p)[2] for p in pairs]
    width = max(map(len, rows)) + 1
    parts = [r + [-1] * (width - len(r)) for r in rows]
    found = pair_mask(torch.tensor(parts))
    assert found.shape == (len(rows), 1, width, width)
    for b, row in enumerate(parts):
        for i, mine in enumerate(row):
            for j, other in enumerate(row):
                assert found[b, 0, i, j] == (j <= i and (other == mine or other == 0))


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_the_ordinary_pass(name, kernel):
    model, batch = frozen_below(name, 1, kernel), batch_of(name)
    with torch.no_grad():
        plain = model(**batch, use_cache=False).logits
        for frozen in (0, 1):
            with packed_pairs(model, frozen) as packed:
                assert torch.allclose(model(**batch, use_cache=False).logits, plain, atol=1e-5)
                again = model(**batch).logits  # from what was kept
                assert torch.allclose(again, plain, atol=1e-5) and len(packed.kept) == 5 * frozen
    assert torch.equal(model(**batch, use_cache=False).logits, plain)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_ordinary_pass(name):
    batch, found = batch_of(name), []
    for packed in (False, True, True):
        model = frozen_below(name, 1)
        if packed:
            with packed_pairs(model, 1):
                model(**batch)  # the states are kept now
                loss = bradley_terry(*model(**batch).logits[:, 0].chunk(2))
                loss.backward()
        else:
            loss = bradley_terry(*model(**batch, use_cache=False).logits[:, 0].chunk(2))
            loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and any("layers.1." in n for n in found[0])
    assert not any("layers.0." in n for n in found[0])
    for n, grad in found[0].items():
        assert torch.allclose(found[1][n], grad, atol=1e-5 + 1e-4 * float(grad.abs().max())), n


def test_an_answer_does_not_see_the_other():
    "The score of the better answer stays where it is, whatever the worse one says."
    model, batch = frozen_below("tiny-llama", 0), batch_of("tiny-llama")
    other = {k: v.clone() for k, v in batch.items()}
    ends = other["attention_mask"].sum(1)
    other["input_ids"][5:, :] = torch.where(
        torch.arange(other["input_ids"].shape[1]) == ends[5:, None] - 2, 7, other["input_ids"][5:])
    with torch.no_grad(), packed_pairs(model):
        before, after = model(**batch).logits, model(**other).logits
    assert torch.allclose(before[:5], after[:5], atol=1e-6)
    assert not torch.allclose(before[5:], after[5:], atol=1e-4)


def test_what_cannot_be_packed_is_refused():
    model = load_reward_model("tiny-llama", dtype="float32")
    with pytest.raises(PackedError, match="is trained"), packed_pairs(model, 1):
        pass
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(PackedError, match="reward_model.attention"), packed_pairs(model):
        pass
    assert "forward" not in vars(model)


def test_the_ordinary_pass_is_back_after_an_error():
    model = load_reward_model("tiny-llama", dtype="float32")
    layers = model.model.layers
    with pytest.raises(ZeroDivisionError), packed_pairs(model):
        raise ZeroDivisionError
    assert "forward" not in vars(model) and model.model.layers is layers


def test_what_is_kept_does_not_depend_on_the_company():
    "A run that goes on meets its pairs in other batches: the states are equal bit for bit."
    model, batch = frozen_below("tiny-llama", 1), batch_of("tiny-llama")
    two = {k: v[[0, 1, 5, 6]] for k, v in batch.items()}
    with torch.autocast("cpu", torch.bfloat16):
        with packed_pairs(model, 1) as first:
            model(**batch)
        with packed_pairs(model, 1) as second:
            model(**two)
    assert len(second.kept) == 2
    assert all(torch.equal(states, first.kept[pair]) for pair, states in second.kept.items())
