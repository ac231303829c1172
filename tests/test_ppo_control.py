"""What steers PPO: coefficients on synthetic series, a price on a tempted policy, replay against exact expectations."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_cookbook.ppo import control as C
from deepseek_cookbook.ppo.control import AdaptiveKL, ControlError, FixedKL, Lagrangian, Replay, StepSize
from deepseek_cookbook.ppo.losses import policy_loss

quick = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 10**6)
NAN, INF = float("nan"), float("inf")


def revived(thing, **kwargs):
    "The same object after a kill: built from settings, its state through JSON."
    twin = type(thing)(**kwargs)
    twin.load_state_dict(json.loads(json.dumps(thing.state_dict())))
    return twin


# beta


@quick
@given(st.floats(0, 100), st.floats(0.01, 1), st.integers(1, 64))
def test_adaptive_kl_is_the_formula(kl, beta, n):
    control = AdaptiveKL(beta, target=5.0, horizon=200)
    error = kl / 5.0 - 1
    error = 0.2 if error > 0.2 else -0.2 if error < -0.2 else error
    assert control.update(kl, n) == pytest.approx(min(max(beta * (1 + error * n / 200), 1e-4), 10.0))


@quick
@given(st.lists(st.one_of(st.floats(-10, 1e6), st.sampled_from([NAN, INF, -INF])), max_size=60), st.integers(1, 5000))
def test_beta_stays_inside_its_bounds_and_finite(kls, n):
    control = AdaptiveKL(0.05, beta_min=0.01, beta_max=0.2, horizon=100)
    for kl in kls:
        before = control.beta
        beta = control.update(kl, n)
        assert 0.01 <= beta <= 0.2
        if not math.isfinite(kl):
            assert beta == before


@pytest.mark.learning
@pytest.mark.parametrize("beta", [0.002, 0.05, 1.0])
@pytest.mark.parametrize("pull", [0.1, 0.5])
def test_adaptive_kl_reaches_its_target(beta, pull, seed, spread):
    "Twenty seeds, ten of them in FP32 with AVX2: 5.85 to 6.23."
    control, g, kl, seen = AdaptiveKL(beta, target=6.0, horizon=160), torch.Generator().manual_seed(seed), 0.0, []
    for _ in range(500):
        kl += pull * (0.3 / control.beta - kl)
        seen.append(kl)
        control.update(kl * (1 + 0.2 * torch.randn((), generator=g).item()), 16)
    assert spread("KL", sum(seen[-100:]) / 100) == pytest.approx(6.0, rel=0.1)


def test_fixed_kl_stays_and_can_be_scaled():
    control = FixedKL(0.1, beta_max=0.3)
    assert [control.update(kl, 16) for kl in (0.0, 100.0, NAN)] == [0.1] * 3
    assert [control.scale(f) for f in (2, 2, 0)] == pytest.approx([0.2, 0.3, 0.0])
    assert FixedKL(0.0).update(5.0) == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: FixedKL(-0.1),
        lambda: FixedKL(20.0),
        lambda: FixedKL(NAN),
        lambda: AdaptiveKL(0.0),
        lambda: AdaptiveKL(target=0),
        lambda: AdaptiveKL(horizon=0),
        lambda: AdaptiveKL(beta_min=0),
        lambda: StepSize(target=0),
        lambda: StepSize(change=1),
        lambda: StepSize(factor=9),
        lambda: Lagrangian(init=0),
        lambda: Lagrangian(init=11),
        lambda: Lagrangian(lr=0),
        lambda: Lagrangian(delay=-1),
        lambda: Lagrangian(damping=-1),
        lambda: Lagrangian(lambda_min=0),
        lambda: Lagrangian(lambda_max=INF),
        lambda: Replay(capacity=0),
        lambda: Replay(max_age=-1),
        lambda: Replay(alpha=2),
        lambda: Replay(b=-1),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(make):
    with pytest.raises(ControlError):
        make()


def test_when_to_leave_the_batch():
    assert not C.too_far(0.014, 0.01) and C.too_far(0.016, 0.01) and C.too_far(NAN, 0.01)
    assert not C.too_far(99, None)


@quick
@given(st.lists(st.floats(0, 1), max_size=40))
def test_step_size_is_the_rule_within_bounds(kls):
    step, factor = StepSize(target=0.1), 1.0
    for kl in kls:
        if kl > 0.2:
            factor = max(factor / 1.5, 0.05)
        elif kl < 0.05:
            factor = min(factor * 1.5, 2.0)
        assert step.update(kl) == factor
    assert step.update(NAN) <= factor


def test_step_size_settles():
    step = StepSize(target=0.01)
    factors = [step.update(0.1 * step.factor**2) for _ in range(30)]  # KL of a step: square of its length
    assert len(set(factors[-10:])) == 1 and 0.005 <= 0.1 * factors[-1] ** 2 <= 0.02


# the price


@quick
@given(st.lists(st.one_of(st.floats(-5, 5), st.just(NAN)), max_size=60), st.floats(0, 5), st.integers(0, 5))
def test_lambda_is_positive_bounded_and_follows_the_cost(costs, damping, delay):
    price = Lagrangian(limit=0.5, lr=0.3, damping=damping, delay=delay)
    looked = 0
    for cost in costs:
        memory, before = price.log_lambda, price.value
        lam = price.update(cost)
        looked += math.isfinite(cost)
        assert 0 < 0.01 * (1 - 1e-9) <= lam <= 10 * (1 + 1e-9)
        if not math.isfinite(cost) or looked <= delay:
            assert lam == before
        elif cost > 0.5:
            assert price.log_lambda > memory or price.log_lambda == math.log(10)
        elif cost < 0.5:
            assert price.log_lambda < memory or price.log_lambda == math.log(0.01)


@pytest.mark.parametrize("damping", [0, 2])
def test_cost_above_raises_and_below_lowers(damping):
    for cost, end in ((0.9, 10), (0.0, 0.01)):
        price = Lagrangian(limit=0.3, lr=0.2, damping=damping)
        lams = [price.update(cost) for _ in range(100)]
        assert lams == sorted(lams, reverse=cost < 0.3)
        assert lams[-1] == pytest.approx(end)
    assert Lagrangian(limit=0.3, init=2.0).update(0.3) == pytest.approx(2.0)


def test_from_its_bound_the_price_comes_back_at_once():
    price = Lagrangian(limit=0.3, lr=0.2, damping=0)
    for _ in range(10_000):
        price.update(0.0)
    low = price.value
    assert price.update(1.0) > low


@quick
@given(seeds, st.floats(0, 10))
def test_combined_advantage_is_the_formula(seed, lam):
    g = torch.Generator().manual_seed(seed)
    a, c = (torch.randn(2, 3, generator=g, dtype=torch.float64) for _ in range(2))
    got = C.combine_advantages(a, c, lam)
    for b in range(2):
        for t in range(3):
            assert got[b, t].item() == pytest.approx((a[b, t].item() - lam * c[b, t].item()) / (1 + lam))
    assert torch.equal(C.combine_advantages(a, c, 0.0), a)
    assert torch.allclose(C.combine_advantages(a, c, 1e9), -c, atol=1e-6)


def test_a_price_below_zero_is_refused():
    with pytest.raises(ControlError, match="below 0"):
        C.combine_advantages(torch.zeros(1), torch.zeros(1), -0.1)


REWARD, COST = torch.tensor([0.0, 0.5, 0.8, 1.0]), torch.tensor([0.0, 0.1, 0.4, 1.0])


def tempted(price, seed, steps=300):
    "Costs of a softmax policy whose better paid actions cost more."
    g, logits, costs = torch.Generator().manual_seed(seed), torch.zeros(4, requires_grad=True), []
    for _ in range(steps):
        ids = torch.multinomial(logits.detach().softmax(0), 64, replacement=True, generator=g)
        r, c = REWARD[ids], COST[ids]
        lam = price.update(c.mean().item()) if price else 0.0
        a = C.combine_advantages(r - r.mean(), c - c.mean(), lam)[:, None]
        logp = logits.log_softmax(0)[ids, None]
        (slope,) = torch.autograd.grad(policy_loss(logp, logp.detach(), a, torch.ones_like(a))[0], logits)
        logits.data -= 2.0 * slope
        costs.append(c.mean().item())
    return torch.tensor(costs[100:])


@pytest.mark.learning
def test_the_constrained_policy_keeps_its_limit_where_the_plain_one_does_not(seed, spread):
    """Twenty seeds, ten of them in FP32 with AVX2: costs of 0.995 to 0.996, and of 0.251 to 0.254.

    Damped, 0.25 to 0.34 of their spread is left.
    """
    assert spread("plain", tempted(None, seed).mean()) > 0.9
    damped, undamped = (tempted(Lagrangian(limit=0.25, damping=d), seed) for d in (5, 0))
    assert spread("damped", damped.mean()) == pytest.approx(0.25, abs=0.02)
    assert spread("spread left", damped.std() / undamped.std()) < 0.5


# replay


@quick
@given(st.lists(st.floats(0, 100), min_size=1, max_size=20), st.floats(0, 1), st.floats(0, 1))
def test_probabilities_and_weights_are_the_loops(priorities, alpha, b):
    powers = [(p + 1e-3) ** alpha for p in priorities]
    probs = [x / sum(powers) for x in powers]
    raw = [(len(probs) * x) ** -b for x in probs]
    got = C.sampling_probs(torch.tensor(priorities, dtype=torch.float64), alpha)
    assert got.tolist() == pytest.approx(probs)
    weights = C.replay_weights(got, b)
    assert weights.tolist() == pytest.approx([w / max(raw) for w in raw])
    assert weights.max() == 1 and (weights > 0).all()
    if alpha == 0 or b == 0:
        assert weights.tolist() == pytest.approx([1] * len(probs))


@quick
@given(seeds, st.floats(0, 1))
def test_weighted_draws_have_the_mean_of_the_buffer(seed, alpha):
    g = torch.Generator().manual_seed(seed)
    probs = C.sampling_probs(torch.rand(7, generator=g), alpha)
    x, weights = torch.randn(7, generator=g, dtype=torch.float64), C.replay_weights(probs)
    assert ((probs * weights * x).sum() / (probs * weights).sum()).item() == pytest.approx(x.mean().item(), abs=1e-9)


@pytest.mark.parametrize("bad", [NAN, INF, -0.1])
def test_priorities_must_be_numbers_from_zero_up(bad):
    with pytest.raises(ControlError, match="finite"):
        C.sampling_probs(torch.tensor([1.0, bad]))
    buffer = Replay()
    buffer.add([{"n": 0}], [1.0], 0)
    with pytest.raises(ControlError, match="finite"):
        buffer.add([{"n": 1}], [bad], 0)
    with pytest.raises(ControlError, match="finite"):
        buffer.set_priorities([0], [bad])
    assert len(buffer) == 1 and buffer.priorities == [1.0]


@quick
@given(seeds, st.sampled_from([None, 0.5, 2.0]))
def test_behaviour_ratio_is_the_loop(seed, cap):
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(5) < torch.randint(1, 6, (3,), generator=g)[:, None]
    logp, mu = (-torch.rand(3, 5, generator=g, dtype=torch.float64) for _ in range(2))
    dirty = torch.where(mask, logp, NAN), torch.where(mask, mu, INF)
    whole, single = (C.behaviour_ratio(*dirty, mask, level, cap) for level in ("sequence", "token"))
    assert whole.shape == (3, 1) and single.shape == (3, 5)
    for b in range(3):
        product = 1.0
        for t in range(5):
            ratio = math.exp(logp[b, t] - mu[b, t]) if mask[b, t] else 1.0
            product *= ratio
            if mask[b, t]:
                assert single[b, t].item() == pytest.approx(min(ratio, cap or INF))
        assert whole[b, 0].item() == pytest.approx(min(product, cap or INF))
    with pytest.raises(ControlError, match="sequence or token"):
        C.behaviour_ratio(logp, mu, mask, "word")


def table_gradients(seed, priority=True, ratio=True, level="sequence"):
    "All sequences of two tokens from three words: expected gradient of a replayed batch, and the on-policy one."
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    table, old = draw(4, 3).requires_grad_(), draw(4, 3)
    ids = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    before = torch.stack([torch.full((9,), 3), ids[:, 0]], 1)
    a, mask = draw(9, 1), torch.ones(9, 2)

    def logp(t):
        return t.log_softmax(1)[before, ids]

    pi, mu = logp(table).detach().sum(1).exp(), logp(old).sum(1).exp()
    drawn = mu * (a[:, 0].abs() + 1e-3) ** 0.6  # buffer filled by mu, drawn by priority
    drawn = drawn / drawn.sum()
    weights = (mu / drawn)[:, None] if priority else torch.ones(9, 1)
    if ratio:
        weights = weights * C.behaviour_ratio(logp(table), logp(old), mask, level, cap=None)

    def slope(prob, w):
        loss, _ = policy_loss(logp(table), logp(table).detach(), a, mask, weights_BT=prob[:, None] * w)
        return torch.autograd.grad(loss, table)[0]

    return slope(drawn, weights), slope(pi, 1.0)


@quick
@given(seeds)
def test_a_replayed_batch_with_weights_gives_the_on_policy_gradient(seed):
    got, wanted = table_gradients(seed)
    assert torch.allclose(got, wanted, atol=1e-10)


@pytest.mark.learning
@pytest.mark.parametrize("wrong", [dict(priority=False), dict(ratio=False), dict(level="token")])
def test_and_without_any_one_of_them_it_does_not(wrong, seed, spread):
    "Twenty seeds: errors of 0.17 or more of the gradient."
    got, wanted = table_gradients(seed, **wrong)
    assert spread("error", (got - wanted).norm() / wanted.norm()) > 0.01


def filled(**kwargs):
    buffer = Replay(**kwargs)
    for step in range(4):
        buffer.add([{"step": step, "n": n, "ids": [1, 2, n]} for n in range(3)], [0.1, 0.5, 2.0], step)
    return buffer


def test_what_the_buffer_draws_is_what_it_says():
    buffer, g = filled(capacity=99, max_age=99), torch.Generator().manual_seed(0)
    indices, rows, weights = buffer.sample(40_000, step=4, generator=g)
    share = torch.bincount(torch.tensor(indices), minlength=12) / 40_000
    assert torch.allclose(share.double(), C.sampling_probs(torch.tensor(buffer.priorities)), atol=0.01)
    value = torch.tensor([float(r["step"] + r["n"]) for r in rows])
    assert ((weights * value).sum() / weights.sum()).item() == pytest.approx(2.5, abs=0.05)  # mean over all twelve
    assert value.mean().item() > 2.8  # and without weights it is another
    assert [buffer.rows[i] for i in indices[:20]] == rows[:20] and weights.max() <= 1


def test_staleness_and_capacity():
    buffer = filled(capacity=7, max_age=2)
    assert len(buffer) == 7 and buffer.steps == [1, 2, 2, 2, 3, 3, 3]
    assert buffer.expire(4) == 1 and buffer.steps == [2, 2, 2, 3, 3, 3]
    _, rows, _ = buffer.sample(50, step=5)
    assert {r["step"] for r in rows} == {3}
    assert buffer.sample(4, step=6)[:2] == ([], []) and len(buffer) == 0
    assert filled(max_age=0).sample(9, step=3)[1][0]["step"] == 3
    assert Replay(capacity=2).add([{}] * 5, [1.0] * 5, 0) == 3


def test_new_priorities_change_the_draw():
    buffer = filled(capacity=99, max_age=99)
    buffer.set_priorities(range(12), [0.0] * 11 + [1e6])
    indices, _, _ = buffer.sample(50, 4, torch.Generator().manual_seed(0))
    assert indices.count(11) > 45
    with pytest.raises(ControlError, match="2 samples and 1"):
        buffer.add([{}, {}], [1.0], 0)
    with pytest.raises(ValueError):
        buffer.set_priorities([0, 1], [1.0])


# interrupted and straight runs


@quick
@given(seeds, st.integers(0, 20))
def test_an_interrupted_run_equals_a_straight_one(seed, killed):
    g = torch.Generator().manual_seed(seed)
    series = (3 * torch.rand(20, generator=g)).tolist()
    if 0 < killed < 20:
        series[killed] = NAN  # ignored: what stands is what was restored
    makers = [
        (AdaptiveKL, dict(horizon=20)),
        (StepSize, dict(target=1.0)),
        (FixedKL, {}),
        (Lagrangian, dict(limit=1.0, delay=3)),
    ]
    for make, kwargs in makers:
        straight, broken = make(**kwargs), make(**kwargs)
        for i, x in enumerate(series):
            if i == killed:
                broken = revived(broken, **kwargs)
            assert straight.update(x) == broken.update(x)
        assert straight.state_dict() == broken.state_dict()


def test_a_revived_buffer_draws_the_same_and_shares_nothing():
    buffer = filled(capacity=9, max_age=3)
    twin = revived(buffer, capacity=9, max_age=3)
    draws = [b.sample(20, 4, torch.Generator().manual_seed(5)) for b in (buffer, twin)]
    assert draws[0][:2] == draws[1][:2] and torch.equal(draws[0][2], draws[1][2])
    state = buffer.state_dict()
    twin.load_state_dict(state)
    buffer.set_priorities([0], [77.0])
    assert 77.0 not in state["priorities"] and 77.0 not in twin.priorities
    twin.set_priorities([0], [88.0])
    assert 88.0 not in state["priorities"]


def test_the_state_of_something_else_is_refused():
    states = {type(x).__name__: x.state_dict() for x in (FixedKL(), StepSize(), Lagrangian(), Replay())}
    for thing in (AdaptiveKL(), StepSize(), Lagrangian(), Replay()):
        for state in states.values():
            if set(state) == set(thing.moving):
                continue
            with pytest.raises(ControlError, match=type(thing).__name__):
                thing.load_state_dict(state)
