"""PPO's maths: every function against a naive loop, and what people got wrong as tables of cases."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_cookbook.ppo import losses as L
from deepseek_cookbook.ppo.losses import PPOLossError

quick = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 10**6)
NAN, INF = float("nan"), float("inf")


def batch(seed, rows=None, tokens=None):
    "A generator, a right-padded mask, and a function that draws (B, T) numbers."
    g = torch.Generator().manual_seed(seed)
    rows = rows or int(torch.randint(1, 5, (), generator=g))
    tokens = tokens or int(torch.randint(1, 8, (), generator=g))
    length = torch.randint(1, tokens + 1, (rows,), generator=g)
    mask = torch.arange(tokens) < length[:, None]
    return mask, lambda *shape: torch.randn(*(shape or mask.shape), generator=g, dtype=torch.float64)


def real(mask):
    return [(b, t) for b in range(mask.shape[0]) for t in range(mask.shape[1]) if mask[b, t]]


def spoiled(x, mask, value=NAN):
    return torch.where(mask, x, value)


# masks


@quick
@given(seeds)
def test_masked_mean_is_the_loop_whatever_stands_in_the_padding(seed):
    mask, draw = batch(seed)
    x = draw()
    naive = sum(x[i].item() for i in real(mask)) / len(real(mask))
    for value in (0.0, NAN, INF, -INF):
        for m in (mask, mask.int(), mask.float()):
            assert L.masked_mean(spoiled(x, mask, value), m).item() == pytest.approx(naive, abs=1e-12)
    assert L.masked_mean(x, mask, 7).item() == pytest.approx(naive * len(real(mask)) / 7, abs=1e-12)
    assert L.masked_mean(x, torch.zeros_like(mask)).item() == 0


@pytest.mark.parametrize("row", [[0, 0, 0], [0, 1, 1], [1, 0, 1]])
def test_a_row_that_is_empty_or_has_holes_is_refused(row):
    mask = torch.tensor([[1, 1, 0], row])
    with pytest.raises(PPOLossError, match="Row 1"):
        L.lengths(mask)
    with pytest.raises(PPOLossError, match="Row 1"):
        L.shape_rewards(torch.zeros(2), torch.zeros(2, 3), mask, 0.1)
    with pytest.raises(PPOLossError, match="Row 1"):
        L.gae(torch.zeros(2, 3), torch.zeros(2, 3), mask)
    assert L.lengths(mask[:1]).tolist() == [2]


# KL


@quick
@given(st.floats(-30, 30), st.floats(-30, 0))
def test_kl_estimators_are_the_formulas(d, ref):
    logp, reference = torch.tensor(ref + d, dtype=torch.float64), torch.tensor(ref, dtype=torch.float64)
    d = (logp - reference).item()
    assert L.token_kl(logp, reference).item() == d
    assert L.token_kl(logp, reference, "k2").item() == pytest.approx(d * d / 2)
    k3 = L.token_kl(logp, reference, "k3").item()
    assert k3 == pytest.approx(math.exp(-d) - 1 + d, rel=1e-9, abs=1e-9)
    assert k3 >= 0


@quick
@given(seeds, st.floats(1e-9, 1e-3))
def test_k3_is_not_negative_in_float32_either(seed, scale):
    g = torch.Generator().manual_seed(seed)
    logp = -10 * torch.rand(50, generator=g)
    assert (L.token_kl(logp + scale * torch.randn(50, generator=g), logp, "k3") >= 0).all()
    assert (L.token_kl(logp, logp, "k3") == 0).all()


def test_an_unknown_estimator_is_named():
    with pytest.raises(PPOLossError, match="k4"):
        L.token_kl(torch.zeros(1), torch.zeros(1), "k4")


def vocabulary(seed, V=5):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(V, generator=g, dtype=torch.float64).requires_grad_()
    return logits, torch.randn(V, generator=g, dtype=torch.float64).log_softmax(0)


@quick
@given(seeds)
def test_estimators_in_expectation_and_their_gradients(seed):
    logits, ref = vocabulary(seed)
    logp = logits.log_softmax(0)
    p = logp.exp().detach()
    exact = (p * (logp - ref)).sum().item()

    def slope(loss):
        return torch.autograd.grad(loss, logits, retain_graph=True)[0]

    def near(a, b):
        return torch.allclose(a, b, atol=1e-10)

    reverse = slope((logp.exp() * (logp - ref)).sum())
    forward = slope((ref.exp() * (ref - logp)).sum())
    k1, k2, k3 = (L.token_kl(logp, ref, k) for k in ("k1", "k2", "k3"))
    assert (p * k1).sum().item() == pytest.approx(exact) and (p * k3).sum().item() == pytest.approx(exact)
    assert near(slope((p * k1).sum()), torch.zeros(5, dtype=torch.float64))
    assert near(slope((p * k2).sum()), reverse) and near(slope((p * k3).sum()), forward)
    assert near(slope((p * k1.detach() * logp).sum()), reverse)
    assert near(slope((p * k3.detach() * logp).sum()), reverse - forward)


# rewards


@quick
@given(seeds, st.floats(0, 2))
def test_rewards_are_the_loop_and_sum_to_score_minus_kl(seed, beta):
    mask, draw = batch(seed)
    kl, score = draw(), draw(mask.shape[0])
    rewards = L.shape_rewards(score, spoiled(kl, mask), mask, beta)
    for b in range(mask.shape[0]):
        n = int(mask[b].sum())
        expected = [-beta * kl[b, t].item() + (score[b].item() if t == n - 1 else 0) for t in range(n)]
        assert rewards[b, :n].tolist() == pytest.approx(expected, abs=1e-12)
        assert (rewards[b, n:] == 0).all()
        assert rewards[b].sum().item() == pytest.approx(score[b].item() - beta * kl[b, :n].sum().item(), abs=1e-9)


def test_the_score_sits_on_the_stop_token_and_not_on_the_padding_behind_it():
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    rewards = L.shape_rewards(torch.tensor([5.0, 6.0, 7.0]), torch.zeros(3, 4), mask, 0.1)
    assert rewards.tolist() == [[0, 0, 5, 0], [6, 0, 0, 0], [0, 0, 0, 7]]
    assert (rewards * mask).sum(1).tolist() == [5, 6, 7]


def test_scores_of_another_batch_are_refused():
    with pytest.raises(PPOLossError, match="scores for 2"):
        L.shape_rewards(torch.zeros(3), torch.zeros(2, 2), torch.ones(2, 2), 0.1)


EOS, TURN, PAD = 2, 7, 0
ENDS = {  # name: (tokens, length, ended)
    "eos": ([5, 6, EOS, PAD], 3, True),
    "another stop token": ([5, 6, TURN, PAD], 3, True),
    "cut off at the limit": ([5, 6, 5, 6], 4, False),
    "a stop token within": ([5, EOS, 5, 6], 4, False),
    "stop token in the last place": ([5, 6, 5, EOS], 4, True),
    "cut off early, pad is eos": ([5, 6, EOS, EOS], 2, False),
    "ends with eos, pad is eos": ([5, 6, EOS, EOS], 3, True),
    "only eos": ([EOS, PAD, PAD, PAD], 1, True),
}


@pytest.mark.parametrize("name", ENDS)
def test_the_penalty_for_a_missing_end(name):
    ids, length, ended = ENDS[name]
    got = L.has_ended(torch.tensor([ids]), (torch.arange(4) < length)[None], [EOS, TURN])
    assert got.tolist() == [ended]
    for score in (-1.0, 0.25, 3.0):  # subtracted, not put in place of the score
        assert L.penalize_unended(torch.tensor([score]), got, 0.5).item() == score - (0 if ended else 0.5)


# advantages


def naive_gae(rewards, values, gamma, lam, after=0.0):
    values = [*values, after]
    delta = [r + gamma * values[t + 1] - values[t] for t, r in enumerate(rewards)]
    return [sum((gamma * lam) ** i * delta[t + i] for i in range(len(delta) - t)) for t in range(len(delta))]


@quick
@given(seeds, st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_gae_is_the_double_loop(seed, gamma, lam, cut_off):
    mask, draw = batch(seed)
    rewards, values, after = draw(), draw(), draw(mask.shape[0])
    a, r = L.gae(spoiled(rewards, mask), spoiled(values, mask, INF), mask, gamma, lam, after if cut_off else None)
    for b in range(mask.shape[0]):
        n = int(mask[b].sum())
        expected = naive_gae(rewards[b, :n].tolist(), values[b, :n].tolist(), gamma, lam, after[b].item() * cut_off)
        assert a[b, :n].tolist() == pytest.approx(expected, abs=1e-9)
        assert r[b, :n].tolist() == pytest.approx(
            [x + v for x, v in zip(expected, values[b, :n].tolist(), strict=True)], abs=1e-9
        )
        assert (a[b, n:] == 0).all() and (r[b, n:] == 0).all()


@quick
@given(seeds)
def test_gae_of_a_padded_batch_is_that_of_each_row_alone(seed):
    mask, draw = batch(seed)
    rewards, values = draw(), draw()
    a, _ = L.gae(rewards, values, mask)
    for b, n in enumerate(mask.sum(1).tolist()):
        alone, _ = L.gae(rewards[b : b + 1, :n], values[b : b + 1, :n], torch.ones(1, n))
        assert torch.allclose(a[b, :n], alone[0])


@quick
@given(seeds)
def test_the_ends_of_lambda(seed):
    mask, draw = batch(seed)
    rewards, values = torch.where(mask, draw(), 0), draw()
    to_go = rewards.flip(1).cumsum(1).flip(1)
    _, returns = L.gae(rewards, values, mask, 1.0, 1.0)
    assert torch.allclose(returns[mask], to_go[mask])  # whatever the values are
    after = torch.nn.functional.pad(torch.where(mask, values, 0), (0, 1))[:, 1:]
    one_step, _ = L.gae(rewards, values, mask, 1.0, 0.0)
    assert torch.allclose(one_step[mask], (rewards + after - values)[mask])
    perfect, _ = L.gae(rewards, to_go, mask, 1.0, 0.7)
    assert torch.allclose(perfect, torch.zeros_like(perfect))


def test_advantages_and_returns_carry_no_gradient():
    values = torch.randn(2, 3, requires_grad=True)
    a, r = L.gae(torch.randn(2, 3), values, torch.ones(2, 3))
    assert not a.requires_grad and not r.requires_grad


@quick
@given(seeds)
def test_whitening_is_the_loop(seed):
    mask, draw = batch(seed)
    x = 3 * draw() + 2
    flat = [x[i].item() for i in real(mask)]
    mean, sd = statistics.mean(flat), statistics.stdev(flat) if len(flat) > 1 else 0.0
    white, kept = L.whiten(spoiled(x, mask), mask), L.whiten(spoiled(x, mask), mask, shift_mean=False)
    for i in real(mask):
        expected = (x[i].item() - mean) / math.sqrt(sd**2 + 1e-8)
        assert white[i].item() == pytest.approx(expected, abs=1e-9)
        assert kept[i].item() == pytest.approx(expected + mean, abs=1e-9)
    assert (white[~mask] == 0).all() and (kept[~mask] == 0).all()


def test_whitening_of_one_token_and_of_equal_ones_is_zero():
    assert L.whiten(torch.tensor([[3.0, NAN]]), torch.tensor([[1, 0]])).tolist() == [[0, 0]]
    assert L.whiten(torch.full((2, 3), 4.0), torch.ones(2, 3)).abs().max() == 0


# losses


def naive_policy(logp, old, a, mask, eps, weights=None):
    total, cut, kl = 0.0, 0, 0.0
    for b, t in real(mask):
        ratio = math.exp(logp[b, t].item() - old[b, t].item())
        plain, near = a[b, t].item() * ratio, a[b, t].item() * min(max(ratio, 1 - eps), 1 + eps)
        total -= min(plain, near) * (1 if weights is None else weights[b].item())
        cut += near < plain
        kl += ratio - 1 - math.log(ratio)
    n = len(real(mask))
    return total / n, cut / n, kl / n


@quick
@given(seeds, st.floats(0.01, 0.9))
def test_policy_loss_is_the_loop(seed, eps):
    mask, draw = batch(seed)
    logp, old, a = -draw().abs(), -draw().abs(), draw()
    weights = draw(mask.shape[0]).abs()
    dirty = spoiled(logp, mask, INF), spoiled(old, mask, NAN), spoiled(a, mask, -INF)
    loss, metrics = L.policy_loss(*dirty, mask, eps)
    assert (loss.item(), metrics["clip_fraction"].item(), metrics["approx_kl"].item()) == pytest.approx(
        naive_policy(logp, old, a, mask, eps), abs=1e-9
    )
    assert metrics["ratio_max"].item() == pytest.approx((logp - old)[mask].max().exp().item())
    loss, _ = L.policy_loss(*dirty, mask, eps, weights_BT=weights[:, None])
    assert loss.item() == pytest.approx(naive_policy(logp, old, a, mask, eps, weights)[0], abs=1e-9)


@quick
@given(seeds)
def test_on_fresh_samples_the_ratio_is_one_and_the_gradient_that_of_reinforce(seed):
    mask, draw = batch(seed)
    logp, a = (-draw().abs()).requires_grad_(), draw()
    loss, metrics = L.policy_loss(logp, logp.detach(), a, mask)
    assert metrics["ratio"].item() == metrics["ratio_max"].item() == pytest.approx(1, abs=1e-5)
    assert metrics["clip_fraction"] == metrics["approx_kl"] == 0
    assert loss.item() == pytest.approx(-a[mask].mean().item(), abs=1e-9)
    loss.backward()
    assert torch.allclose(logp.grad, torch.where(mask, -a / mask.sum(), 0))


@pytest.mark.parametrize(
    "ratio,advantage,flat",
    [(1.5, 1, True), (1.5, -1, False), (0.5, 1, False), (0.5, -1, True), (1.1, 1, False), (0.9, -1, False)],
)
def test_where_the_clip_takes_the_gradient(ratio, advantage, flat):
    logp = torch.tensor([[math.log(ratio)]], requires_grad=True)
    loss, metrics = L.policy_loss(logp, torch.zeros(1, 1), torch.tensor([[float(advantage)]]), torch.ones(1, 1))
    loss.backward()
    assert (logp.grad.item() == 0) == flat == bool(metrics["clip_fraction"])


@quick
@given(seeds)
def test_padding_has_no_gradient_and_changes_none(seed):
    mask, draw = batch(seed)
    logp, old, a, values, was, returns = (draw() for _ in range(6))
    clean, dirty = ([x.clone().requires_grad_() for x in (logp, values)] for _ in range(2))
    with torch.no_grad():
        for x in dirty:
            x[~mask] = NAN

    def total(p, v, spoil):
        return L.policy_loss(p, spoil(old), spoil(a), mask)[0] + L.value_loss(v, spoil(was), spoil(returns), mask)[0]

    total(*clean, lambda x: x).backward()
    total(*dirty, lambda x: spoiled(x, mask, INF)).backward()
    for x, y in zip(clean, dirty, strict=True):
        assert torch.equal(x.grad, y.grad) and (y.grad[~mask] == 0).all()


@quick
@given(seeds, st.integers(1, 4))
def test_micro_batches_add_up(seed, size):
    mask, draw = batch(seed, rows=4)
    logp, old, a, values, was, returns = (draw() for _ in range(6))
    items = mask.sum()
    parts = [slice(i, i + size) for i in range(0, 4, size)]
    whole, metrics = L.policy_loss(logp, old, a, mask)
    some = [L.policy_loss(logp[p], old[p], a[p], mask[p], num_items=items) for p in parts]
    assert sum(x.item() for x, _ in some) == pytest.approx(whole.item(), abs=1e-9)
    for name in ("clip_fraction", "approx_kl", "ratio"):
        assert sum(m[name].item() for _, m in some) == pytest.approx(metrics[name].item(), abs=1e-9)
    whole, cut = L.value_loss(values, was, returns, mask)
    some = [L.value_loss(values[p], was[p], returns[p], mask[p], num_items=items) for p in parts]
    assert sum(x.item() for x, _ in some) == pytest.approx(whole.item(), abs=1e-9)
    assert sum(c.item() for _, c in some) == pytest.approx(cut.item(), abs=1e-9)


@quick
@given(seeds, st.one_of(st.none(), st.floats(0.01, 2)))
def test_value_loss_is_the_loop(seed, clip):
    mask, draw = batch(seed)
    values, was, returns = draw(), draw(), draw()
    total, cut = 0.0, 0
    for i in real(mask):
        v, o, r = values[i].item(), was[i].item(), returns[i].item()
        near = v if clip is None else o + min(max(v - o, -clip), clip)
        total += 0.5 * max((v - r) ** 2, (near - r) ** 2)
        cut += (near - r) ** 2 > (v - r) ** 2
    got = [x.item() for x in L.value_loss(values, was, returns, mask, clip)]
    assert got == pytest.approx([total / len(real(mask)), cut / len(real(mask))], abs=1e-9)


def test_values_beyond_the_clip_stop_on_their_way_to_the_return():
    values = torch.tensor([[0.5, -0.5]], requires_grad=True)  # from 0: towards the return 1, and away from it
    L.value_loss(values, torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 2), 0.2)[0].backward()
    assert values.grad[0, 0] == 0 and values.grad[0, 1] < 0


@quick
@given(seeds)
def test_explained_variance_is_the_loop(seed):
    mask, draw = batch(seed)
    values, returns = draw(), draw()
    r = [returns[i].item() for i in real(mask)]
    got = L.explained_variance(spoiled(values, mask), spoiled(returns, mask), mask).item()
    if len(r) == 1:
        assert math.isnan(got)
        return
    rest = [returns[i].item() - values[i].item() for i in real(mask)]
    assert got == pytest.approx(1 - statistics.pvariance(rest) / statistics.pvariance(r), abs=1e-6)
    assert L.explained_variance(returns + 3, returns, mask).item() == pytest.approx(1)


@quick
@given(seeds, st.integers(2, 9))
def test_entropy_is_the_loop_over_the_full_distribution(seed, V):
    g = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, 3, V, generator=g, dtype=torch.float64)
    h = L.entropy(logits)
    for b in range(2):
        for t in range(3):
            e = [math.exp(x) for x in logits[b, t].tolist()]
            assert h[b, t].item() == pytest.approx(-sum(x / sum(e) * math.log(x / sum(e)) for x in e), abs=1e-9)
    assert (h >= 0).all() and (h <= math.log(V) + 1e-9).all()
    assert L.entropy(torch.zeros(1, 1, V)).item() == pytest.approx(math.log(V), abs=1e-6)


def test_the_gradient_of_entropy_is_right_and_forbidden_words_are_no_trouble():
    logits = torch.randn(1, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(L.entropy, (logits,))
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.tensor([[[1.0, 0.0, -INF, -INF]]], dtype=dtype, requires_grad=True)
        L.entropy(x).sum().backward()
        assert x.grad.isfinite().all()
        assert L.entropy(x).item() == pytest.approx(L.entropy(x[..., :2]).item(), rel=1e-2)


@quick
@given(seeds)
def test_a_step_down_the_loss_raises_entropy(seed):
    g = torch.Generator().manual_seed(seed)
    logits = (2 * torch.randn(1, 1, 6, generator=g, dtype=torch.float64)).requires_grad_()
    before = L.entropy(logits).mean()
    (slope,) = torch.autograd.grad(L.ppo_loss(0.0, 0.0, before, entropy_coef=1.0), logits)
    assert L.entropy(logits - 0.01 * slope).mean() >= before
    assert L.ppo_loss(1.0, 2.0, 3.0, vf_coef=0.1, entropy_coef=0.01) == pytest.approx(1 + 0.2 - 0.03)


@pytest.mark.learning
def test_a_bandit_is_learnt_with_these_functions(seed, spread):
    """Reward does move: score, KL in the reward, GAE, whitening and the clipped loss, in one loop.

    Twenty seeds, ten of them in FP32 with AVX2: from 0.40 to 0.50 at first to 0.994 or more.
    """
    g = torch.Generator().manual_seed(seed)
    logits, target = torch.zeros(3, 4, requires_grad=True), torch.tensor([2, 0, 1])
    ref, scores = torch.zeros(3, 4).log_softmax(1), []
    for _ in range(60):
        now = logits.detach().log_softmax(1)
        ids = torch.stack([torch.multinomial(now[t].exp(), 32, replacement=True, generator=g) for t in range(3)], 1)

        def pick(table, ids=ids):
            return table[torch.arange(3), ids]

        score, mask = (ids == target).float().mean(1), torch.ones(32, 3)
        rewards = L.shape_rewards(score, L.token_kl(pick(now), pick(ref)), mask, 0.01)
        a, _ = L.gae(rewards, score.mean().expand(32, 3), mask, lam=1.0)
        for _ in range(2):
            loss, _ = L.policy_loss(pick(logits.log_softmax(1)), pick(now), L.whiten(a, mask), mask)
            (slope,) = torch.autograd.grad(loss, logits)
            logits.data -= 2.0 * slope
        scores.append(score.mean().item())
    first, last = statistics.mean(scores[:5]), statistics.mean(scores[-5:])
    assert spread("first", first) < 0.6 and spread("last", last) > 0.9
