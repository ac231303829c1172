"""The two PPO benches: arguments, tables, the clock, and that all methods see the reward's columns (toys only)."""

import importlib.util
import math
import sys
from pathlib import Path

import pytest

from deepseek_cookbook.ppo import batch, train

BENCH = Path(__file__).parent.parent / "scripts" / "bench"


def load(name: str):
    "A bench as a module; the second one imports the first by its plain name, as a script does."
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ppo = load("ppo")
baselines = load("ppo_baselines")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setenv("DSC_PROFILE", "tiny")


def measured(total=10.0, peak=2.0, **parts):
    times = dict(total=total, training=total - sum(parts.values())) | parts
    return dict(wall=dict(times), cpu=dict(times), updates=2, samples=16, tokens=512, peak=peak, imports=0.5, trained=9)


# --- ours beside TRL 1.12 ---


def test_the_table_says_speed_memory_and_shares_against_trl():
    runs = {"ours": [measured(5, 1, generation=2), measured(5, 1.5, generation=2)],
            "TRL": [measured(10, 4, generation=2, reference=2)]}
    head, rule, ours, trl = [[c.strip() for c in line.strip("|").split("|")] for line in ppo.table(runs).split("\n")]
    assert len(head) == len(rule) == len(ours) == len(trl)

    def at(row, name):
        return row[head.index(name)]

    assert at(ours, "samples/CPU s") == "3.20" and at(trl, "samples/CPU s") == "1.60"
    assert at(ours, "to TRL") == "2.00x" and at(trl, "to TRL") == "1.00x"
    assert at(ours, "peak GiB") == "1.50"  # the larger one of two rounds
    assert ours[head.index("peak GiB") + 1] == "0.38x"
    assert at(ours, "generation") == "40%" and at(trl, "reference") == "20%" and at(trl, "training") == "60%"
    assert "values" not in head  # nobody spent time there
    assert at(ours, "new tokens") == "32.0"


def test_the_table_stands_without_trl():
    assert "x |" not in ppo.table({"ours": [measured(generation=1)]})


def test_the_bound_is_what_the_rest_would_leave():
    assert "generation takes 20%" in ppo.bound({"ours": [measured(10, generation=2)]})
    assert "5.00x" in ppo.bound({"ours": [measured(10, generation=2)]})
    assert ppo.bound({"TRL": [measured(10, generation=2)]}) == ""


def test_the_clock_leaves_the_first_update_out():
    class Toy:
        def update(self): self.draw()
        def draw(self): return sum(range(200_000))

    clock, toy = ppo.Clock(), Toy()
    clock.wrap(toy, "draw", "generation", tokens=lambda out: 7)
    clock.wrap(toy, "update", begins=True)
    for _ in range(3): toy.update()
    found = clock.result(batch=8)
    assert (found["updates"], found["samples"], found["tokens"]) == (2, 16, 14)
    for times in (found["wall"], found["cpu"]):
        assert 0 < times["generation"] <= times["total"]
        assert math.isclose(times["generation"] + times["training"], times["total"])


def test_the_clock_refuses_a_run_that_only_warmed_up():
    clock = ppo.Clock()
    clock.marks, clock.end = [clock.now()], clock.now()
    with pytest.raises(SystemExit, match="nothing left to measure"): clock.result(8)


@pytest.mark.parametrize("wrong", [["--updates", "1"], ["--batch", "8", "--minibatches", "3"], ["--only", "verl"]])
def test_arguments_that_cannot_be_meant(wrong):
    with pytest.raises(SystemExit): ppo.arguments(wrong)


def test_the_plan_has_as_many_prompts_as_the_updates_need():
    args = ppo.arguments(["--updates", "3", "--batch", "4", "--only", "ours"])
    plan = ppo.make_plan(args)
    assert len(plan["rows"]) == 12 and plan["lora"]["lora_dropout"] == 0
    assert all(r["input_ids"] for r in plan["rows"])


def test_our_contenders_run_as_toys(tmp_path):
    args = ppo.arguments("--updates 2 --batch 2 --micro 2 --new-tokens 4 --upper 1 --only ours".split())
    plan, plain = ppo.make_plan(args), (batch.score, train.sample, train.PPOTrainer.one_step)
    whole, upper = (ppo.run_ours(plan, name, str(tmp_path / name)) for name in ("ours", "ours, upper"))
    assert whole["samples"] == 2 and whole["tokens"] == 8  # nobody stops early
    assert whole["trained"] > upper["trained"] > 0
    assert whole["cpu"]["generation"] > 0 and upper["cpu"]["lower"] > 0
    assert (batch.score, train.sample, train.PPOTrainer.one_step) == plain  # the clock is gone


def test_both_sides_have_the_same_reward_model():
    from deepseek_cookbook.models import load_tokenizer

    args = ppo.arguments(["--updates", "2", "--batch", "1", "--micro", "1", "--only", "ours"])
    plan, tokenizer = ppo.make_plan(args), load_tokenizer("tiny-llama")
    one, two = (ppo.judge(plan, len(tokenizer), tokenizer.pad_token_id) for _ in range(2))
    assert all((a == b).all() for a, b in zip(one.parameters(), two.parameters()))
    scorer = ppo.Scorer(plan, tokenizer, len(tokenizer), None)
    a, b = scorer([plan["rows"][0]["prompt"]] * 2, ["yes", [{"role": "assistant", "content": "yes"}]])
    assert a == b


# --- PPO, GRPO, RLOO ---


def test_the_baselines_table_has_a_line_a_method_and_the_error_of_all_answers():
    def run(kl):
        before, after = dict(rewards=[0.0, 0.0], kl=0.0), dict(rewards=[0.0, 1.0], kl=kl)
        return dict(before=before, after=after, wall=2, cpu=1, peak=1.0, completions=8, tokens=100, seed=1)

    lines = baselines.table({"PPO": [run(0.1), run(0.3)], "GRPO": [run(0.5)]}).split("\n")
    assert len(lines) == 4
    assert "0.500 ± 0.289" in lines[2] and "| 0.200 |" in lines[2]  # 4 answers of 0, 1, 0, 1; mean KL of two seeds
    assert "0.500 ± 0.500" in lines[3]


@pytest.mark.parametrize("wrong", [["--batch", "6"], ["--episodes", "33"], ["--batch", "4", "--minibatches", "3"]])
def test_baseline_arguments_that_cannot_be_meant(wrong):
    with pytest.raises(SystemExit): baselines.arguments(["--profile", "tiny", *wrong])


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    "Two steps of four completions, from a start that one step of training has touched."
    args = baselines.arguments(["--profile", "tiny", "--episodes", "8", "--batch", "4", "--new-tokens", "4", "--held",
                                "4", "--sft-steps", "1", "--group", "2", "--epochs", "1"])
    plan = baselines.make_plan(args) | dict(seed=1, start=str(tmp_path_factory.mktemp("ppo") / "start"))
    assert math.isfinite(baselines.make_start(plan, plan["start"])["sft_loss"])
    return plan


@pytest.mark.parametrize("method", baselines.METHODS)
def test_every_method_sees_the_right_columns_and_the_same_budget(plan, method, tmp_path):
    found = baselines.run(plan, method, str(tmp_path))
    assert "intent" in found["columns"]
    assert found["completions"] == plan["episodes"] and 0 < found["tokens"] <= plan["episodes"] * plan["new_tokens"]
    assert len(found["before"]["rewards"]) == len(found["after"]["rewards"]) == plan["held"]
    assert found["before"]["kl"] == 0 and found["after"]["kl"] > 0


def test_all_methods_begin_with_the_same_answers(plan, tmp_path):
    from peft import LoraConfig, get_peft_model

    from deepseek_cookbook.models import load_model, load_tokenizer

    held, tokenizer = baselines.questions(plan)[1], load_tokenizer(plan["start"])
    base, other = (load_model(plan["start"], dtype="float32") for _ in range(2))
    ours = baselines.ppo_trainer(plan, base, tokenizer, held, print, tmp_path)
    theirs = get_peft_model(other, LoraConfig(**plan["lora"]))
    a = baselines.look(ours.models.policy, tokenizer, plan, held, ours.models.as_reference)
    b = baselines.look(theirs.eval(), tokenizer, plan, held, theirs.disable_adapter)
    assert a == b
