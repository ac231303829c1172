"""PPO, GRPO and RLOO at equal budget: the same prompts, the same checkable reward, the same number of completions.

    .venv/bin/python scripts/bench/ppo_baselines.py --profile laptop --seeds 42      (make bench-ppo)
    .venv/bin/python scripts/bench/ppo_baselines.py --profile tiny --seeds 1 2 3

GRPO and RLOO are TRL's trainers, PPO is ours. All start from the same weights (the model, after a few steps of
supervised training on the good answers of the preference set, so that the reward has something to rank), with the same
LoRA, learning rate, KL price, completions a step, epochs and minibatches; GRPO and RLOO ask each prompt as often as a
group is large, and PPO asks as many different prompts. Each run has a process of its own. The reward is the rule
`gold_reward`; before and after are the same held-out prompts, sampled with the same random numbers. KL is k3 against
the start on those answers, measured by our `score` for all.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from ppo import launch, markdown, peak_gib

ROOT = Path(__file__).resolve().parent.parent.parent
METHODS = ("PPO", "GRPO", "RLOO")
# What a profile needs to be done in seconds (tiny) or minutes (laptop).
SIZES = {
    "tiny": dict(episodes=512, batch=32, new_tokens=64, held=64, sft_steps=200, sft_rate=3e-3, learning_rate=1e-3),
    "laptop": dict(episodes=192, batch=16, new_tokens=40, held=48, sft_steps=16, sft_rate=1e-3, learning_rate=5e-4),
}


def questions(plan: dict) -> tuple[list[dict], list[dict], list[dict]]:
    "Prompts to train on, held-out prompts, and demonstrations; each with the true intent."
    from deepseek_cookbook.reward.pairs import bank_pairs

    train, held, _ = bank_pairs(plan["episodes"], plan["data_seed"], plan["held"], chinese=0)
    rows = [[dict(prompt=p["prompt"], intent=p["intent"]) for p in pairs] for pairs in (train, held)]
    return *rows, [p["prompt"] + p["chosen"] for p in train]


def make_start(plan: dict, folder: str) -> dict:
    "Supervised training on good answers, merged into the weights that all methods start from."
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    from deepseek_cookbook.models import load_model, load_tokenizer

    transformers.set_seed(plan["data_seed"])
    model, tokenizer = load_model(plan["model"], dtype="float32"), load_tokenizer(plan["model"])
    if plan["profile"] != "tiny":  # random weights learn nothing through an adapter
        model = get_peft_model(model, LoraConfig(**plan["lora"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=plan["sft_rate"])
    talks, batch, loss = questions(plan)[2], 8, None
    for step in range(plan["sft_steps"]):
        part = [talks[i % len(talks)] for i in range(step * batch, (step + 1) * batch)]
        found = tokenizer.apply_chat_template(part, return_dict=True, return_assistant_tokens_mask=True, padding=True,
                                              return_tensors="pt")
        labels = found["input_ids"].masked_fill(~torch.as_tensor(found["assistant_masks"]).bool(), -100)
        with torch.autocast("cpu", torch.bfloat16, enabled=plan["bf16"]):
            loss = model(input_ids=found["input_ids"], attention_mask=found["attention_mask"], labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    whole = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    whole.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return dict(sft_loss=None if loss is None else loss.item())


def look(model, tokenizer, plan: dict, held: list[dict], off) -> dict:
    "Rewards of answers to held-out prompts, and KL to the start (the model in the block `off()`), nats a token."
    from deepseek_cookbook.ppo.losses import token_kl
    from deepseek_cookbook.ppo.rollout import RolloutConfig, sample, score
    from deepseek_cookbook.reward.pairs import gold_reward

    config = RolloutConfig(plan["new_tokens"], batch_size=plan["batch"])
    said = sample(model, tokenizer, [r["prompt"] for r in held], config, seed=7)
    rewards = gold_reward([r["prompt"] for r in held], said.texts, intent=[r["intent"] for r in held])
    with off():
        kl_BC = token_kl(said.logprobs_BC, score(model, said, config)[0], "k3")
    mask_BC = said.completion_mask_BC
    return dict(rewards=rewards, kl=float((kl_BC * mask_BC).sum() / mask_BC.sum()), answer=said.texts[0])


class Counted:
    "The reward, with what it has seen: completions, their tokens (where the trainer passes them), columns."

    def __init__(self):
        self.completions, self.tokens, self.columns, self.__name__ = 0, 0, set(), "gold_reward"

    def __call__(self, prompts, completions, **columns):
        from deepseek_cookbook.reward.pairs import gold_reward

        self.completions, self.columns = self.completions + len(completions), self.columns | set(columns)
        self.tokens += sum(map(len, columns.get("completion_ids") or []))
        return gold_reward(prompts, completions, intent=columns["intent"])


def group_trainer(method: str, plan: dict, model, tokenizer, rows: list[dict], reward, folder: str):
    "TRL's GRPOTrainer or RLOOTrainer with the budget of the plan."
    import trl
    from datasets import Dataset
    from peft import LoraConfig

    updates, minibatch = plan["episodes"] // plan["batch"], plan["batch"] // plan["minibatches"]
    config = getattr(trl, f"{method}Config")(
        folder, max_steps=updates * plan["epochs"] * plan["minibatches"], num_iterations=plan["epochs"],
        per_device_train_batch_size=minibatch, gradient_accumulation_steps=1, steps_per_generation=plan["minibatches"],
        num_generations=plan["group"], max_completion_length=plan["new_tokens"], beta=plan["kl_coef"], temperature=1.0,
        learning_rate=plan["learning_rate"], lr_scheduler_type="constant", seed=plan["seed"], use_cpu=True,
        bf16=plan["bf16"], gradient_checkpointing=False, activation_checkpointing=False, report_to="none",
        save_strategy="no", disable_tqdm=True, logging_steps=10**6)  # fmt: skip
    return getattr(trl, f"{method}Trainer")(
        model=model, reward_funcs=reward, args=config, train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer, peft_config=LoraConfig(**plan["lora"]))  # fmt: skip


def ppo_trainer(plan: dict, model, tokenizer, rows: list[dict], reward, folder: str):
    "Ours with the budget of the plan."
    from deepseek_cookbook.ppo.policy import make_models
    from deepseek_cookbook.ppo.rollout import RolloutConfig
    from deepseek_cookbook.ppo.train import PPOConfig, PPOTrainer

    minibatch = plan["batch"] // plan["minibatches"]
    models = make_models(model, plan["lora"], value_layers=plan["value_layers"], seed=plan["seed"])
    config = PPOConfig(
        total_episodes=plan["episodes"], batch_size=plan["batch"], num_mini_batches=plan["minibatches"],
        num_ppo_epochs=plan["epochs"], per_device_train_batch_size=minibatch, learning_rate=plan["learning_rate"],
        kl_coef=plan["kl_coef"], lr_scheduler_type="constant", value_layers=plan["value_layers"],
        save_steps=10**6)  # fmt: skip
    rollout = RolloutConfig(plan["new_tokens"], batch_size=plan["batch"])
    return PPOTrainer(config, models, tokenizer, rows, reward, folder, rollout, seed=plan["seed"], quiet=True)


def run(plan: dict, method: str, folder: str) -> dict:
    "One method from the start to the end of its budget."
    import transformers

    from deepseek_cookbook.models import load_model, load_tokenizer

    transformers.set_seed(plan["seed"])
    model, tokenizer = load_model(plan["start"], dtype="float32"), load_tokenizer(plan["start"])
    rows, held, _ = questions(plan)
    reward = Counted()
    if method == "PPO":
        trainer = ppo_trainer(plan, model, tokenizer, rows, reward, folder)
        policy, off = trainer.models.policy, trainer.models.as_reference
    else:
        tokenizer.padding_side = "left"
        trainer = group_trainer(method, plan, model, tokenizer, rows, reward, folder)
        policy = trainer.accelerator.unwrap_model(trainer.model)
        off = policy.disable_adapter
    before = look(policy, tokenizer, plan, held, off)
    wall, cpu = time.perf_counter(), time.process_time()
    trainer.train()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    after = look(policy.eval(), tokenizer, plan, held, off)
    tokens = trainer.counts["tokens"] if method == "PPO" else reward.tokens
    return dict(before=before, after=after, wall=wall, cpu=cpu, peak=peak_gib(), completions=reward.completions,
                tokens=tokens, columns=sorted(reward.columns), seed=plan["seed"])


def error(xs: list[float]) -> float:
    "Standard error of the mean."
    return statistics.stdev(xs) / len(xs) ** 0.5 if len(xs) > 1 else float("nan")


def table(runs: dict[str, list[dict]]) -> str:
    "One line a method, means over the seeds; the error is over all held-out answers."
    rows = []
    for name, rs in runs.items():
        cells = [name]
        for when in ("before", "after"):
            said = [x for r in rs for x in r[when]["rewards"]]
            cells.append(f"{statistics.mean(said):.3f} ± {error(said):.3f}")
        mean = {k: statistics.mean(r[k] for r in rs) for k in ("completions", "tokens", "wall", "cpu")}
        cells.append(f"{statistics.mean(r['after']['kl'] for r in rs):.3f}")
        cells += [f"{x:.0f}" for x in (*mean.values(), mean["tokens"] / mean["cpu"])]
        rows.append([*cells, f"{max(r['peak'] for r in rs):.2f}"])
    return markdown(["", "reward before", "after", "KL, nats a token", "completions", "tokens", "wall s", "CPU s",
                     "tokens/CPU s", "peak GiB"], rows)


def make_plan(args) -> dict:
    "Everything that all methods share."
    from deepseek_cookbook.models import precision
    from deepseek_cookbook.settings import load_settings

    settings = load_settings(args.profile, args.set)
    given = {k: v for k, v in vars(args).items() if k in SIZES["tiny"] and v is not None}
    keep = ("epochs", "minibatches", "group", "kl_coef", "value_layers")
    plan = SIZES[args.profile] | given | {k: getattr(args, k) for k in keep}
    return plan | dict(profile=args.profile, model=settings["model"]["name"], data_seed=settings.build("run").seed,
                       lora=settings["lora"] | dict(lora_dropout=0.0), bf16=precision("cpu").autocast is not None)


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", choices=tuple(SIZES), default=os.environ.get("DSC_PROFILE", "laptop"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--episodes", type=int, help="completions in all")
    parser.add_argument("--batch", type=int, help="completions a step")
    parser.add_argument("--new-tokens", type=int)
    parser.add_argument("--held", type=int, help="held-out prompts")
    parser.add_argument("--sft-steps", type=int, help="steps of 8 demonstrations before; 0: the bare model")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--minibatches", type=int, default=2, help="updates an epoch")
    parser.add_argument("--group", type=int, default=4, help="answers to a prompt in GRPO and RLOO")
    parser.add_argument("--kl-coef", type=float, default=0.05)
    parser.add_argument("--value-layers", type=int, help="layers with a value adapter in PPO; all by default")
    parser.add_argument("--set", nargs="*", default=[], help="settings, such as lora.r=8")
    parser.add_argument("--only", nargs="*", choices=METHODS, default=METHODS)
    parser.add_argument("--json", type=Path, default=ROOT / "runs" / "bench" / "ppo_baselines.json")
    parser.add_argument("--child", choices=("start", *METHODS), help=argparse.SUPPRESS)
    parser.add_argument("--plan", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    plan = SIZES[args.profile]
    batch, episodes = args.batch or plan["batch"], args.episodes or plan["episodes"]
    if batch % args.group or batch % args.minibatches or episodes % batch:
        parser.error(f"--batch {batch}: a multiple of --group and --minibatches, a divisor of --episodes {episodes}")
    return args


def child(args):
    "Run one method, or make the start, and print what was measured."
    plan = json.loads(Path(args.plan).read_text())
    with tempfile.TemporaryDirectory() as folder:
        found = make_start(plan, plan["start"]) if args.child == "start" else run(plan, args.child, folder)
    print("RESULT " + json.dumps(found))


def main():
    args = arguments()
    if args.child:
        return child(args)
    from deepseek_cookbook.settings import write_json

    runs, plan = {name: [] for name in args.only}, make_plan(args)
    with tempfile.TemporaryDirectory() as folder:
        plan["start"] = str(Path(folder) / "start")
        file = write_json(Path(folder) / "plan.json", plan)
        made = launch(__file__, sys.executable, ["--child", "start", "--plan", str(file)], "start")
        print("start", made, file=sys.stderr)
        for i, seed in enumerate(args.seeds):
            file = write_json(Path(folder) / "plan.json", plan | dict(seed=seed))
            for name in list(args.only)[:: -1 if i % 2 else 1]:
                runs[name].append(launch(__file__, sys.executable, ["--child", name, "--plan", str(file)], name))
                brief = {k: v for k, v in runs[name][-1].items() if k not in ("before", "after")}
                print(name, json.dumps(brief), file=sys.stderr, flush=True)
    print(f"{plan['model']}, {plan['sft_steps']} supervised steps before, {plan['episodes']} completions of up to "
          f"{plan['new_tokens']} tokens, {plan['batch']} a step, {plan['epochs']} epochs of {plan['minibatches']} "
          f"updates, groups of {plan['group']}, KL price {plan['kl_coef']}, learning rate {plan['learning_rate']}, "
          f"seeds {args.seeds}, {plan['held']} held-out prompts\n\n{table(runs)}")
    write_json(args.json, dict(plan=plan, start=made, runs=runs, table=table(runs)))


if __name__ == "__main__":
    main()
