"""A bank of templates: different prompts, each combination once, faults named, nothing leaves the sandbox."""

import itertools
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from deepseek_cookbook.augment.rewrite import AugmentError, fill_template
from deepseek_cookbook.augment.templates import bank_faults, draw_prompts, shuffled, slots_of

FORMS = ["How do I {{ action }} my {{ card }}?", "请问{{ card }}怎么{{ action }}？", "{{ action }}!"]
SLOTS = dict(action=["block", "办理", "close"], card=["debit card", "信用卡"])

bank_of = st.dictionaries(st.sampled_from("abc"), st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=3)
some_forms = st.lists(
    st.lists(st.sampled_from("abc"), min_size=1, max_size=3, unique=True).map(
        lambda names: "-".join(f"{{{{ {n} }}}}" for n in names)
    ),
    min_size=1,
    max_size=4,
)


@examples(deadline=None, max_examples=60)
@given(some_forms, bank_of, st.integers(0, 99), st.data())
def test_prompts_are_those_of_the_product_and_different(forms, slots, seed, data):
    "Against the product of all values, written out."
    used = {name for t in forms for name in slots_of(t)}
    slots = {k: v for k, v in slots.items() if k in used}
    every = {fill_template(t, **dict(zip(slots_of(t), values, strict=True)))
             for t in forms for values in itertools.product(*(slots[k] for k in slots_of(t)))}  # fmt: skip
    n = data.draw(st.integers(0, len(every)))
    drawn = draw_prompts(forms, slots, n, seed)
    texts = [d["prompt"] for d in drawn]
    assert len(texts) == len(set(texts)) == n and set(texts) <= every
    assert all(fill_template(d["template"], **d["slots"]) == d["prompt"] for d in drawn)
    assert all(value in slots[name] for d in drawn for name, value in d["slots"].items())
    assert draw_prompts(forms, slots, n, seed) == drawn
    with pytest.raises(AugmentError, match=f"the bank holds {len(every)} different prompts"):
        draw_prompts(forms, slots, len(every) + 1, seed)


def test_templates_take_turns_and_the_seed_matters():
    drawn = draw_prompts(FORMS, SLOTS, 9)
    assert Counter(d["template"] for d in drawn) == dict.fromkeys(FORMS, 3)
    assert [d["prompt"] for d in draw_prompts(FORMS, SLOTS, 9, seed=1)] != [d["prompt"] for d in drawn]
    assert len(draw_prompts(FORMS, SLOTS, 15)) == 15  # one form has three combinations only
    texts = [{d["prompt"] for d in draw_prompts(forms, SLOTS, 15)} for forms in (FORMS * 2, FORMS)]
    assert texts[0] == texts[1]


@examples(deadline=None)
@given(st.integers(0, 300), st.integers())
def test_shuffled_gives_each_number_once(total, seed):
    numbers = list(shuffled(total, random.Random(seed)))
    assert sorted(numbers) == list(range(total))


def test_shuffled_is_fair():
    first = Counter(tuple(shuffled(3, random.Random(seed))) for seed in range(6000))
    assert len(first) == 6 and all(850 < n < 1150 for n in first.values())


def test_every_fault_of_a_bank_is_named():
    faults = bank_faults(["{{ acton }} {{ card }}", "{{ card }}"], dict(action=["x"], card=[], day="Monday"))
    told = "\n".join(faults)
    assert "no values for 'acton'" in told and "Did you mean 'action'" in told
    assert "slot 'action': no template uses it" in told and "slot 'day': no template uses it" in told
    assert "slot 'card': found '[]'" in told and "slot 'day': found 'Monday'" in told
    assert bank_faults(FORMS, SLOTS) == [] and "templates: none" in bank_faults([], {})[-1]
    with pytest.raises(AugmentError, match="faults in the bank"):
        draw_prompts(["{{ b }}"], dict(a=[1]), 1)
    with pytest.raises(AugmentError, match="Correct the template"):
        draw_prompts(["{{ a"], dict(a=[1]), 1)


def test_names_that_a_template_sets_itself_are_no_slots():
    assert slots_of("{% set x = a %}{% for i in range(2) %}{{ x }}{{ loop.index }}{% endfor %}") == ["a"]
    assert slots_of("{% if a %}{{ b }}{% endif %}") == ["a", "b"]


@pytest.mark.parametrize(
    "template",
    ["{{ a.__class__ }}", "{% include a %}", "{{ a.append(1) }}", "{% for i in range(10**9) %}{{ a }}{% endfor %}"],
)
def test_a_bank_stays_in_the_sandbox(template):
    with pytest.raises(AugmentError, match="Correct the template"):
        draw_prompts([template], dict(a=[[1]]), 1)


def test_a_value_is_never_a_template():
    assert draw_prompts(["{{ a }}"], dict(a=["{{ 7 * 7 }}"]), 1)[0]["prompt"] == "{{ 7 * 7 }}"
