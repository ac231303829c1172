"""Losses: every term against a naive loop, and the trainer against itself, cut into other batches."""

import math
from functools import lru_cache

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from deepseek_cookbook.models import load_model, load_tokenizer
from deepseek_cookbook.settings import load_settings
from deepseek_cookbook.sft import losses as L
from deepseek_cookbook.sft.losses import LossConfig, LossError, TermsTrainer
from deepseek_cookbook.sft.train import sft_config, to_dataset

quick = hypothesis_settings(max_examples=40, deadline=None)


def random_batch(rows=3, tokens=9, vocabulary=11, seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, vocabulary, (rows, tokens), generator=g)
    labels[torch.rand(rows, tokens, generator=g) < 0.4] = -100
    return torch.randn(rows, tokens, vocabulary, generator=g, dtype=torch.float64), labels


def naive_ce(logits, labels):
    "Sum of nats and count, token by token."
    total, count = 0.0, 0
    for b in range(labels.shape[0]):
        for t in range(labels.shape[1] - 1):
            if labels[b, t + 1] == -100:
                continue
            row = logits[b, t].tolist()
            total += math.log(sum(map(math.exp, row))) - row[labels[b, t + 1]]
            count += 1
    return total, count


@quick
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 4), tokens=st.integers(1, 9))
def test_cross_entropy_is_the_naive_loop(seed, rows, tokens):
    logits, labels = random_batch(rows, tokens, seed=seed)
    total, count = naive_ce(logits, labels)
    assert L.answer_ce(logits, labels).item() == pytest.approx(total / max(1, count), rel=1e-5)
    assert L.answer_ce(logits, labels, num_items=7).item() == pytest.approx(total / 7, rel=1e-5)


def test_shapes_that_do_not_fit_are_refused():
    logits, labels = random_batch()
    with pytest.raises(LossError, match="positions"):
        L.answer_ce(logits[:, 1:], labels)


@quick
@given(seed=st.integers(0, 10**6), epsilon=st.floats(0, 0.9))
def test_smoothing_is_torchs(seed, epsilon):
    logits, labels = random_batch(seed=seed)
    x, y = L.answers(logits.float(), labels)
    if not len(y):
        return
    ours = L.answer_ce(logits, labels) + epsilon * L.smoothing_gap(x, y).mean()
    theirs = torch.nn.functional.cross_entropy(x, y, label_smoothing=epsilon)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-4)


def naive_length(p):
    "Sum of t times the probability of that length; the end of the reference ends it."
    alive, total = 1.0, 0.0
    for t, x in enumerate(p, 1):
        total += t * alive * (x if t < len(p) else 1.0)
        alive *= 1 - x
    return total


@quick
@given(st.lists(st.lists(st.floats(1e-6, 0.999), min_size=1, max_size=8), min_size=1, max_size=4))
def test_expected_length_is_the_definition(answers):
    p = torch.tensor([x for a in answers for x in a])
    ids = torch.tensor([i for i, a in enumerate(answers) for _ in a])
    got = L.expected_length(p.log(), ids).tolist()
    assert got == pytest.approx([naive_length(a) for a in answers], rel=1e-4)


def test_expected_length_has_a_finite_gradient_at_the_extremes():
    log_p = torch.tensor([0.0, -1e-9, -200.0, -20.0] * 1000, requires_grad=True)
    length = L.expected_length(log_p, torch.arange(4000) // 8)
    length.sum().backward()
    assert torch.isfinite(log_p.grad).all() and length.min() >= 1 and length.max() <= 8


def test_the_length_term_moves_the_length_towards_the_target():
    for target, sign in ((3.0, -1), (9.0, 1)):
        logit = torch.full((10,), -2.0, requires_grad=True)
        before = L.expected_length(torch.nn.functional.logsigmoid(logit), torch.zeros(10, dtype=torch.long))
        L.length_term(before, target).backward()
        with torch.no_grad():
            moved = torch.nn.functional.logsigmoid(logit - 0.1 * logit.grad)
        after = L.expected_length(moved, torch.zeros(10, dtype=torch.long))
        assert sign * (after.item() - before.item()) > 0


def test_answers_are_runs_of_labels_padded_or_end_to_end():
    x = -100
    padded = torch.tensor([[x, x, 5, 6, x, 7, 8, 9], [x, 3, 4, x, x, x, x, x], [x, x, x, x, x, x, 2, 1]])
    assert L.answer_ids(padded).tolist() == [0, 0, 1, 1, 1, 2, 2, 3, 3]
    flat = torch.tensor([[x, 5, 6, x, 7, 8, x, 9]])  # TRL: the first label of a row is -100
    assert L.answer_ids(flat).tolist() == [0, 0, 1, 1, 2]
    assert L.answer_ids(torch.full((2, 4), x)).tolist() == []


def test_several_turns_in_one_run_are_refused():
    L.check_stops(torch.tensor([4, 5, 2, 7, 2]), torch.tensor([0, 0, 0, 1, 1]), [2])
    with pytest.raises(LossError, match="middle of an answer"):
        L.check_stops(torch.tensor([4, 2, 5, 7, 2]), torch.tensor([0, 0, 0, 1, 1]), [2])


def test_kl_is_the_naive_sum_and_zero_for_itself():
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(5, 7, generator=g), torch.randn(5, 7, generator=g)
    p, q = a.softmax(-1), b.softmax(-1)
    naive = [sum(x * math.log(x / y) for x, y in zip(*rows)) for rows in zip(p.tolist(), q.tolist())]
    assert L.kl_to_base(a, b).tolist() == pytest.approx(naive, rel=1e-4)
    assert L.kl_to_base(a, a).abs().max() < 1e-6 and (L.kl_to_base(a, b) >= 0).all()
    assert L.kl_to_base(a, b).tolist() != pytest.approx(L.kl_to_base(b, a).tolist(), rel=1e-3)


@pytest.mark.parametrize("size", [1, 3, 8, 100])
def test_chunks_have_the_values_and_gradients_of_the_whole(size):
    g = torch.Generator().manual_seed(2)
    head = torch.nn.Linear(6, 20)
    base, targets = torch.randn(8, 6, generator=g), torch.randint(0, 20, (8,), generator=g)

    def run(size):
        hidden = torch.randn(8, 6, generator=torch.Generator().manual_seed(3)).requires_grad_()
        out = L.token_terms(hidden, targets, head, base, (2, 5), size)
        grads = torch.autograd.grad(sum(v.sum() for v in out.values()), [hidden, *head.parameters()])
        return out, grads

    (some, some_grads), (whole, whole_grads) = run(size), run(1000)
    for k in ("gap", "stop", "kl"):
        torch.testing.assert_close(some[k], whole[k])
    torch.testing.assert_close(some_grads, whole_grads)
    logits = head(torch.randn(8, 6, generator=torch.Generator().manual_seed(3)))
    torch.testing.assert_close(whole["kl"], L.kl_to_base(logits, head(base)))
    torch.testing.assert_close(whole["stop"], logits.log_softmax(-1)[:, [2, 5]].logsumexp(1))
    torch.testing.assert_close(whole["gap"], L.smoothing_gap(logits, targets))


def test_no_answer_token_in_a_batch():
    out = L.token_terms(torch.zeros(0, 6, requires_grad=True), torch.zeros(0, dtype=torch.long), torch.nn.Linear(6, 9),
                        torch.zeros(0, 6), (1,))
    assert all(v.shape == (0,) for v in out.values())
    sum(v.sum() for v in out.values()).backward()


def record(question, answer, history=()):
    return dict(instruction=question, input="", output=answer, history=list(history))


ROWS = [record("What is wrong with the printer?", "The driver is missing."), record("It is dark.", "Restart it."),
        record("How do I reset my password?", "Open the settings and follow the instructions."),
        record("And now?", "Call us.", [["It hangs.", "Wait a minute."]])]


@lru_cache
def parts(name="tiny-llama"):
    return load_tokenizer(name)


def chosen(*overrides):
    quiet = ["sft.disable_tqdm=true", "sft.eval_strategy=no", "sft.save_strategy=no",
             "sft.load_best_model_at_end=false",
             "sft.bf16=false", "sft.max_grad_norm=0", "sft.optim=sgd", "sft.learning_rate=0.5", "sft.warmup_steps=0",
             "sft.lr_scheduler_type=constant", "sft.max_steps=1", "sft.logging_steps=1", "lora.lora_dropout=0",
             "sft.weight_decay=0"]
    return load_settings("tiny", [*quiet, *overrides])


def make(folder, *overrides, terms=None, model=None, kind=TermsTrainer, lora=True, records=ROWS, **more):
    "A trainer on a tiny model whose adapter is not zero."
    settings, tokenizer = chosen(*overrides), parts()
    config = sft_config(settings, folder)
    data = to_dataset(records, tokenizer, config.max_length)
    if kind is TermsTrainer:
        more["terms"] = terms
    torch.manual_seed(0)
    peft = settings.build("lora") if lora else None
    trainer = kind(model or load_model("tiny-llama"), config, train_dataset=data, eval_dataset=data,
                   processing_class=tokenizer, peft_config=peft, **more)
    torch.manual_seed(1)
    for name, p in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    return trainer


def trained(trainer):
    trainer.train()
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def same(a, b, tolerance=1e-5):
    return max((a[n] - b[n]).abs().max().item() for n in a) <= tolerance


def test_the_reference_is_the_base_and_leaves_nothing_behind(tmp_path):
    model = make(tmp_path).model.train()
    frozen = [p for n, p in model.named_parameters() if "lora_A" in n][:3]
    for p in frozen:
        p.requires_grad_(False)
    model.get_base_model().model.layers[0].eval()
    modes, flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    ids = torch.arange(20, 30)[None]
    with L.drop_heads(model, 0.5), L.reference(model):
        base = model(input_ids=ids).logits
    assert not base.requires_grad
    torch.testing.assert_close(base, load_model("tiny-llama").eval()(input_ids=ids).logits)
    assert modes == [m.training for m in model.modules()] and flags == [p.requires_grad for p in model.parameters()]
    with pytest.raises(RuntimeError, match="inside"), L.reference(model):
        raise RuntimeError("inside")
    assert flags == [p.requires_grad for p in model.parameters()]


def test_penalties_are_the_naive_sums():
    g = torch.Generator().manual_seed(4)
    w, a, f = ({"x": torch.randn(2, 3, generator=g), "y": torch.randn(4, generator=g)} for _ in range(3))
    flat = [(w[n].flatten()[i].item(), a[n].flatten()[i].item(), f[n].flatten()[i].item())
            for n in w for i in range(w[n].numel())]
    assert L.l1_to_start(w, a).item() == pytest.approx(sum(abs(x - y) for x, y, _ in flat), rel=1e-5)
    assert L.l2_to_start(w, a).item() == pytest.approx(sum((x - y) ** 2 for x, y, _ in flat), rel=1e-5)
    assert L.ewc_penalty(w, a, f).item() == pytest.approx(sum(z * (x - y) ** 2 for x, y, z in flat) / 2, rel=1e-5)


def old_batches(trainer):
    return [trainer.data_collator([row]) for row in trainer.train_dataset]


def test_fisher_is_the_mean_of_squared_gradients_of_sequences(tmp_path):
    trainer = make(tmp_path)
    model, batches = trainer.model.train(), old_batches(trainer)
    fisher = L.fisher_diagonal(model, iter(batches))
    assert model.training and all(p.grad is None for p in model.parameters())
    name, weight = next((n, p) for n, p in model.named_parameters() if "lora_B" in n)
    naive = torch.zeros_like(weight)
    for batch in batches:
        model.zero_grad()
        logits = model(input_ids=batch["input_ids"]).logits
        count = (batch["labels"][:, 1:] != -100).sum()
        (L.answer_ce(logits, batch["labels"]) * count).backward()
        naive += weight.grad ** 2 / len(batches)
    torch.testing.assert_close(fisher[name], naive, rtol=1e-3, atol=1e-8)


def test_fisher_refuses_several_sequences_and_none(tmp_path):
    for free in ("true", "false"):
        trainer = make(tmp_path, f"sft.padding_free={free}", "sft.max_length=none")
        with pytest.raises(LossError, match="sequences"):
            L.fisher_diagonal(trainer.model, [trainer.data_collator([trainer.train_dataset[i] for i in (0, 1)])])
    with pytest.raises(LossError, match="old"):
        make(tmp_path, terms=LossConfig(ewc_lambda=1.0))


def test_perturbed_weights_come_back_bit_for_bit(tmp_path):
    model = load_model("tiny-llama")
    ids = torch.arange(20, 30)[None]
    weight = model.get_input_embeddings().weight
    with pytest.raises(LossError, match="adversarial_step"), L.perturbed(weight, 0.1):
        pass
    model(input_ids=ids, labels=ids).loss.backward()
    before = weight.detach().clone()
    with pytest.raises(KeyError), L.perturbed(weight, 0.1):
        assert (weight - before).norm().item() == pytest.approx(0.1, rel=1e-3)
        raise KeyError
    assert torch.equal(weight, before)


def batches_of(trainer):
    return next(iter(trainer.get_train_dataloader()))


def test_the_adversarial_step_is_the_one_computed_by_hand(tmp_path):
    """Gradients after both passes = those of the clean loss plus those at hand-made embeddings."""
    trainer = make(tmp_path, "sft.per_device_train_batch_size=4")
    model, batch = trainer.model.eval(), batches_of(trainer)
    plain = {k: v for k, v in batch.items() if k != "input_ids"}
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    loss = model(inputs_embeds=embedded, **plain).loss
    g, = torch.autograd.grad(loss, embedded)
    step = torch.stack([0.2 * row / row.norm() for row in g])
    model.zero_grad()
    (model(**batch).loss + model(inputs_embeds=embedded.detach() + step, **plain).loss).backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with L.adversarial_step(model, 0.2) as attack:
        with pytest.raises(LossError, match="backward"), attack(L.row_ids(batch)):
            pass
        model(**batch).loss.backward()
        with attack(L.row_ids(batch)):
            worse = model(**batch).loss
            worse.backward()
    assert worse > loss
    for n, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, wanted[n], rtol=1e-4, atol=1e-6)
    assert torch.equal(model(**batch).loss, model(**batch).loss)


def test_row_norms_of_nothing_give_no_step():
    g = torch.zeros(2, 3, 4)
    g[0, 1, 2] = 2.0
    norms = L.row_norms(g, L.row_ids(dict(input_ids=torch.zeros(2, 3))))
    assert norms.tolist() == [[2.0] * 3, [math.inf] * 3] and (g / norms[..., None]).isfinite().all()


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen2", "tiny-deepseek-v3"])
def test_dropped_heads_are_whole_heads(name):
    model, x = load_model(name).train(), []
    layer = next(m for n, m in model.named_modules() if n.endswith("o_proj"))
    ids = torch.arange(20, 30)[None].repeat(6, 1)
    plain = model(input_ids=ids).logits
    with L.drop_heads(model, 0.5):
        layer.register_forward_pre_hook(lambda m, a: x.append(a[0]))
        torch.manual_seed(0)
        dropped = model(input_ids=ids).logits
        torch.testing.assert_close(model.eval()(input_ids=ids).logits, plain)
        model.train()
    heads = x[0].unflatten(-1, (model.config.num_attention_heads, -1))
    gone = (heads == 0).all(-1)  # (B, T, H)
    assert (gone == gone[:, :1]).all() and 0 < gone[:, 0].float().mean() < 1
    whole = x[1].unflatten(-1, (model.config.num_attention_heads, -1))
    torch.testing.assert_close(heads[~gone], 2 * whole[~gone])
    assert not torch.allclose(dropped, plain)
    torch.testing.assert_close(model(input_ids=ids).logits, plain)


def test_drophead_keeps_the_expectation_and_refuses_what_it_cannot_do():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    attention = torch.nn.ModuleDict(dict(o_proj=torch.nn.Identity()))
    attention.config = load_model("tiny-llama").config
    with L.drop_heads(_Holder(attention), 0.3):
        torch.manual_seed(0)
        out = attention["o_proj"](torch.ones(4000, 1, 64))
    assert out.mean().item() == pytest.approx(1, abs=0.02)
    for p in (-0.1, 1.0):
        with pytest.raises(LossError, match="drophead"):
            L.drop_heads(attention, p)
    small = GPTNeoXConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                          intermediate_size=16)
    with pytest.raises(LossError, match="o_proj"):
        L.drop_heads(GPTNeoXForCausalLM(small), 0.1)


class _Holder(torch.nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.self_attn, self.config = attention, attention.config


@pytest.mark.parametrize("wrong, message", [
    (dict(kl_beta=-0.1), "kl_beta"), (dict(drophead=1.0), "below 1"), (dict(label_smoothing=1.5), "below 1"),
    (dict(ewc_lambda=float("nan")), "ewc_lambda"), (dict(l2_start=float("inf")), "l2_start"),
    (dict(kl_beta="0.1"), "kl_beta"), (dict(fgm_epsilon=True), "fgm_epsilon"),
    (dict(length_lambda=0.1), "length_target"), (dict(length_lambda=0.1, length_target=0.5), "length_target")])
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(LossError, match=message):
        LossConfig(**wrong)


EVERY = dict(label_smoothing=0.1, kl_beta=0.3, length_lambda=0.05, length_target=4, l1_start=1e-3, l2_start=1e-2,
             ewc_lambda=10.0)


def old(records=ROWS[:2]):
    return to_dataset(records, parts())


def test_terms_have_the_scale_of_the_formula(tmp_path):
    """Loss of the trainer = cross-entropy + each term computed here from full logits."""
    trainer = make(tmp_path, "sft.per_device_train_batch_size=4", terms=LossConfig(**EVERY), old_dataset=old())
    model, batch = trainer.model.train(), batches_of(trainer)
    trainer.current_gradient_accumulation_steps = 1
    items = (batch["labels"][:, 1:] != -100).sum()
    got = trainer.compute_loss(model, dict(batch), num_items_in_batch=items)
    x, y = L.answers(model(**{k: v for k, v in batch.items() if k != "labels"}).logits, batch["labels"])
    with L.reference(model):
        base, _ = L.answers(model(**{k: v for k, v in batch.items() if k != "labels"}).logits, batch["labels"])
    t = trainer.terms
    length = L.expected_length(L.log_stop(x, [parts().eos_token_id]), L.answer_ids(batch["labels"]))
    wanted = (torch.nn.functional.cross_entropy(x, y, label_smoothing=0.1) + 0.3 * L.kl_to_base(x, base).mean()
              + 0.05 * L.length_term(length, 4) + 1e-3 * L.l1_to_start(t.weights, t.anchors)
              + 1e-2 * L.l2_to_start(t.weights, t.anchors) + 10 * L.ewc_penalty(t.weights, t.anchors, t.fisher))
    assert len(length) == 5  # the last row has two answers
    assert got.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert trainer._metrics["train"]["kl"][0] > 1e-4


@pytest.mark.parametrize("terms", [dict(EVERY, length_lambda=0.0), dict(fgm_epsilon=0.1)], ids=["terms", "fgm"])
def test_accumulated_batches_take_the_step_of_the_large_batch(tmp_path, terms):
    step = {}
    for size, count in ((4, 1), (2, 2), (1, 4)):
        trainer = make(tmp_path, f"sft.per_device_train_batch_size={size}", f"sft.gradient_accumulation_steps={count}",
                       terms=LossConfig(**terms), old_dataset=old())
        step[size] = trained(trainer), trainer.state.log_history[0]
    plain = trained(make(tmp_path, "sft.per_device_train_batch_size=4"))
    assert not same(step[4][0], plain, 1e-4)
    assert same(step[4][0], step[2][0]) and same(step[4][0], step[1][0])
    for key in ("loss", "added_loss", "ewc", "l2_start", "fgm_loss"):
        if key in step[4][1]:
            assert step[1][1][key] == pytest.approx(step[4][1][key], rel=1e-3)


def test_the_length_of_a_micro_batch_is_judged_by_itself(tmp_path):
    """Documented: accumulation adds the mean of absolute differences, not the difference of the mean."""
    only = LossConfig(length_lambda=1.0, length_target=9)
    added = {}
    for size, count in ((4, 1), (1, 4)):
        trainer = make(tmp_path, f"sft.per_device_train_batch_size={size}", f"sft.gradient_accumulation_steps={count}",
                       terms=only)
        trainer.train()
        added[size] = trainer.state.log_history[0]["added_loss"]
    assert added[1] > added[4] + 0.1


@pytest.mark.parametrize("terms", [EVERY, dict(fgm_epsilon=0.1)], ids=["terms", "fgm"])
def test_rows_end_to_end_take_the_step_of_padded_rows(tmp_path, terms):
    step = {}
    for free in ("true", "false"):
        trainer = make(tmp_path, f"sft.padding_free={free}", "sft.max_length=none",
                       "sft.per_device_train_batch_size=4", terms=LossConfig(**terms), old_dataset=old())
        step[free] = trained(trainer), trainer.state.log_history[0]
    assert same(step["true"][0], step["false"][0])
    for key in {"kl", "gap", "expected_length", "fgm_loss"} & step["true"][1].keys():
        assert step["true"][1][key] == pytest.approx(step["false"][1][key], rel=1e-3)


def test_packed_rows_run_with_every_term(tmp_path):
    trainer = make(tmp_path, "sft.packing=true", "sft.max_length=128", terms=LossConfig(**EVERY, fgm_epsilon=0.1),
                   old_dataset=old())
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["loss"])


def test_without_terms_it_is_trls_trainer(tmp_path):
    from trl import SFTTrainer

    a, b = (trained(make(tmp_path, "sft.per_device_train_batch_size=4", kind=k)) for k in (TermsTrainer, SFTTrainer))
    assert same(a, b, 0)


def test_evaluation_is_plain_cross_entropy(tmp_path):
    from trl import SFTTrainer

    plain = make(tmp_path, kind=SFTTrainer).evaluate()["eval_loss"]
    trainer = make(tmp_path, terms=LossConfig(**EVERY, drophead=0.5), old_dataset=old())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain, rel=1e-6)


def test_the_adversarial_pass_counts_no_token_twice(tmp_path):
    rows = {}
    for epsilon in (0.0, 0.5):
        trainer = make(tmp_path, "sft.per_device_train_batch_size=2", "sft.gradient_accumulation_steps=2",
                       terms=LossConfig(fgm_epsilon=epsilon))
        trainer.train()
        rows[epsilon] = trainer.state.log_history[0]
    assert "fgm_loss" not in rows[0.0] and rows[0.5]["fgm_loss"] > rows[0.5]["loss"]
    for key in ("num_tokens", "loss", "entropy", "mean_token_accuracy"):
        assert rows[0.5][key] == pytest.approx(rows[0.0][key], rel=1e-5)
    assert not trainer.model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("terms", [EVERY, dict(fgm_epsilon=0.1), dict(drophead=0.4)], ids=["terms", "fgm", "drophead"])
def test_recomputed_activations_change_nothing(tmp_path, terms):
    """Gradient checkpointing runs layers twice: the same heads are dropped, the same step is taken."""
    step = []
    for again in ("true", "false"):
        trainer = make(tmp_path, f"sft.gradient_checkpointing={again}", "sft.per_device_train_batch_size=4",
                       terms=LossConfig(**terms), old_dataset=old())
        torch.manual_seed(5)
        step.append(trained(trainer))
    assert same(*step)


@pytest.mark.parametrize("name", ["tiny-qwen2", "tiny-deepseek-v3"])
def test_other_architectures_take_every_term(tmp_path, name):
    trainer = make(tmp_path, "sft.per_device_train_batch_size=4", model=load_model(name), old_dataset=old(),
                   terms=LossConfig(**EVERY, fgm_epsilon=0.1, drophead=0.2))
    trainer.train()
    row = trainer.state.log_history[0]
    assert {"kl", "gap", "expected_length", "ewc", "l1_start", "l2_start", "fgm_loss", "added_loss"} <= row.keys()
    assert all(math.isfinite(v) for v in row.values() if isinstance(v, float))


def test_full_weights_take_all_terms_but_kl(tmp_path):
    terms = {k: v for k, v in EVERY.items() if k != "kl_beta"}
    trainer = make(tmp_path, lora=False, terms=LossConfig(**terms, fgm_epsilon=0.1, drophead=0.1), old_dataset=old())
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["added_loss"])
    with pytest.raises(LossError, match="needs a LoRA adapter"):
        make(tmp_path, lora=False, terms=LossConfig(kl_beta=0.1))


def test_what_would_be_wrong_is_refused(tmp_path):
    with pytest.raises(LossError, match="loss.label_smoothing"):
        make(tmp_path, "sft.label_smoothing_factor=0.1", terms=LossConfig(kl_beta=0.1))
    with pytest.raises(LossError, match="loss_type"):
        make(tmp_path, "sft.loss_type=dft", terms=LossConfig(label_smoothing=0.1))
    with pytest.raises(LossError, match="modules_to_save"):
        make(tmp_path, 'lora.modules_to_save=["lm_head"]', terms=LossConfig(kl_beta=0.1))
    capped = load_model("tiny-llama")
    capped.config.logit_scale = 0.5
    with pytest.raises(LossError, match="logit_scale"):
        make(tmp_path, model=capped, terms=LossConfig(label_smoothing=0.1))
    whole = make(tmp_path, "sft.assistant_only_loss=false", terms=LossConfig(length_lambda=0.1, length_target=4))
    with pytest.raises(LossError, match="assistant_only_loss"):
        whole.train()


def test_trls_own_smoothing_also_changes_evaluation(tmp_path):
    """The chapter says so; if TRL changes it, the chapter must."""
    from trl import SFTTrainer

    with pytest.warns(FutureWarning, match="label_smoothing_factor"):
        smoothed = make(tmp_path, "sft.label_smoothing_factor=0.5", kind=SFTTrainer).evaluate()["eval_loss"]
    plain = make(tmp_path, kind=SFTTrainer).evaluate()["eval_loss"]
    assert abs(smoothed - plain) > 1e-4
    dft = [trained(make(tmp_path, "sft.loss_type=dft", f"sft.label_smoothing_factor={e}", kind=SFTTrainer))
           for e in (0.0, 0.5)]
    assert same(*dft, 0)


@pytest.mark.learning
def test_the_length_term_shortens_generated_answers(tmp_path, seed, spread):
    """Expected length is not only a number: after training, the model stops sooner.

    Twenty seeds, ten of them in FP32 with AVX2: 0.13 to 0.38 of the length is left.
    """
    lengths = {}
    for strength in (0.0, 1.0):
        trainer = make(tmp_path, "sft.max_steps=60", "sft.optim=adamw_torch", "sft.learning_rate=0.003",
                       "sft.per_device_train_batch_size=4", "sft.logging_steps=60", f"run.seed={seed}",
                       records=ROWS[:3], lora=False,
                       terms=LossConfig(length_lambda=strength, length_target=2) if strength else None)
        trainer.train()
        model, total = trainer.model.eval(), 0
        for r in ROWS[:3]:
            ids = parts().apply_chat_template([dict(role="user", content=r["instruction"])], add_generation_prompt=True,
                                              return_tensors="pt", return_dict=True)["input_ids"]
            torch.manual_seed(seed)
            out = model.generate(input_ids=ids.repeat(16, 1), max_new_tokens=24, do_sample=True,
                                 pad_token_id=parts().pad_token_id)
            total += (out[:, ids.shape[1]:] != parts().pad_token_id).sum().item()
        lengths[strength] = total / 48
    assert spread("length left", lengths[1.0] / lengths[0.0]) < 0.7
