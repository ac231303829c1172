"""Precision and method side by side in one run: bf16 against fp32, and LoRA against all weights.

    .venv/bin/python scripts/bench/precision.py --steps 24          (make bench)

Each case trains in a process of its own, so that its peak memory is its own, in turns (there, and back in the next
round), so that none meets a warmer machine. All see the same records in the same order for the same number of steps
with the settings of the profile; only what the row says differs, and the learning rate of full fine-tuning, since that
of LoRA would destroy the weights (--full-rate). tokens/s counts the tokens of the rows, not the padding, over the wall
time of trainer.train() without evaluation. Peak memory is read before the held-out records are measured.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile

from sft import measure, records

CASES = ("LoRA, fp32", "LoRA, bf16", "full, fp32", "full, bf16")
BASE = "base, untrained"


def overrides(case: str, args) -> list[str]:
    "What a case changes in the settings."
    full, half = case.startswith("full"), case.endswith("bf16")
    out = [f"sft.max_steps={args.steps}", "sft.num_train_epochs=1", "sft.eval_strategy=no", "sft.save_steps=100000",
           "sft.load_best_model_at_end=false", "sft.disable_tqdm=true", "evaluate.quiet=true", *args.set]
    out += [f"sft.bf16={str(half).lower()}", "sft.fp16=false", "sft.tf32=none"]
    if full or not half:  # weights that are trained stay in fp32; bf16 is then that of the products
        out.append("model.dtype=float32")
    return out + ([f"sft.learning_rate={args.full_rate}"] if full else [])


def held_out(model, settings, validation: list[dict]) -> float:
    from deepseek_cookbook.evaluate.metrics import answer_nll
    from deepseek_cookbook.models import load_tokenizer

    tokenizer = load_tokenizer(settings["model"]["name"])
    nll, count, _ = answer_nll(model, tokenizer, validation, settings.build("evaluate"))
    return float(nll.sum() / count.sum())


def train(case: str, settings, folder: str) -> tuple:
    "The trained model and what training took."
    import transformers
    from trl import SFTTrainer

    from deepseek_cookbook.models import load_model, load_tokenizer
    from deepseek_cookbook.sft.train import sft_config, to_dataset

    rows, _ = records(settings)
    transformers.set_seed(settings.build("run").seed)
    model, tokenizer = load_model(**settings["model"]), load_tokenizer(settings["model"]["name"])
    config = sft_config(settings, folder)
    trainer = SFTTrainer(model, config, train_dataset=to_dataset(rows, tokenizer, config.max_length),
                         processing_class=tokenizer,
                         peft_config=None if case.startswith("full") else settings.build("lora"))
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    return trainer.model, measure(trainer) | dict(trainable=trainable)


def child(args):
    from deepseek_cookbook.models import load_model
    from deepseek_cookbook.settings import load_settings
    from deepseek_cookbook.sft.adapters import machine

    settings = load_settings(args.profile, overrides(args.child, args))
    validation = records(settings)[1][: args.held]
    with tempfile.TemporaryDirectory() as folder:
        if args.child == BASE:
            model, out = load_model(**settings["model"]), {}
        else:
            model, out = train(args.child, settings, folder)
        out |= dict(held=held_out(model, settings, validation), records=len(validation), seed=settings["run"]["seed"],
                    model=settings["model"]["name"], **machine())
    print("RESULT " + json.dumps(out))


def run(case: str, args) -> dict:
    "One case in a process of its own."
    command = [sys.executable, __file__, "--child", case, "--profile", args.profile, "--steps", str(args.steps),
               "--held", str(args.held), "--full-rate", str(args.full_rate), "--set", *args.set]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{case}: {done.stderr[-3000:]}")
    out = json.loads(done.stdout.split("RESULT ")[-1].splitlines()[0])
    print(case, {k: out.get(k) for k in ("tokens", "wall", "cpu", "peak", "held")}, file=sys.stderr, flush=True)
    return out


def summary(runs: list[dict]) -> dict:
    "Several rounds of one case: rates over all of them, the highest peak, the mean loss."
    total = {k: sum(r[k] for r in runs) for k in ("tokens", "wall", "cpu")}
    return dict(rate=total["tokens"] / total["wall"], per_cpu=total["tokens"] / total["cpu"],
                seconds=total["wall"] / len(runs), peak=max(r["peak"] for r in runs),
                held=sum(r["held"] for r in runs) / len(runs), trainable=runs[0]["trainable"])


def table(rows: dict[str, dict], base: float) -> str:
    lines = ["| case | trained parameters | seconds | tokens/s | tokens/CPU s | peak GiB | held-out loss |",
             "|---|--:|--:|--:|--:|--:|--:|", f"| {BASE} | 0 | | | | | {base:.3f} |"]
    for case, r in rows.items():
        lines.append(f"| {case} | {r['trainable']:,} | {r['seconds']:.0f} | {r['rate']:.0f} | {r['per_cpu']:.0f} | "
                     f"{r['peak']:.2f} | {r['held']:.3f} |")
    return "\n".join(lines)


def verdicts(rows: dict[str, dict], base: float) -> list[str]:
    "The claims in a sentence each, from the numbers."
    out = []
    for method in ("LoRA", "full"):
        slow, fast = rows.get(f"{method}, fp32"), rows.get(f"{method}, bf16")
        if not slow or not fast:
            continue
        gain = fast["per_cpu"] / slow["per_cpu"] - 1
        where = "below" if gain < 0.3 else "within" if gain <= 0.5 else "above"
        out.append(f"Claim 27 (mixed precision is 30-50 % faster), {method}: {gain:+.0%} tokens per CPU second "
                   f"({fast['rate'] / slow['rate'] - 1:+.0%} per second of wall time), {where} what is claimed; peak "
                   f"memory {slow['peak']:.2f} -> {fast['peak']:.2f} GiB, held-out loss {slow['held']:.3f} -> "
                   f"{fast['held']:.3f}.")
    for kind in ("fp32", "bf16"):
        lora, full = rows.get(f"LoRA, {kind}"), rows.get(f"full, {kind}")
        if lora and full:
            out.append(f"LoRA against all weights, {kind}: {lora['trainable'] / full['trainable']:.2%} of the trained "
                       f"parameters, {lora['seconds'] / full['seconds']:.0%} of the time, "
                       f"{lora['peak'] / full['peak']:.0%} of the peak memory, and a fall of the held-out loss by "
                       f"{1 - lora['held'] / base:.1%} against {1 - full['held'] / base:.1%}.")
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default=os.environ.get("DSC_PROFILE", "laptop"))
    parser.add_argument("--steps", type=int, default=24, help="training steps of each case; -1: one whole epoch")
    parser.add_argument("--held", type=int, default=48, help="held-out records")
    parser.add_argument("--rounds", type=int, default=1, help="of all cases, every second one backwards")
    parser.add_argument("--full-rate", type=float, default=5e-5, help="learning rate of full fine-tuning")
    parser.add_argument("--set", nargs="*", default=[], help="settings, such as sft.learning_rate=5e-4")
    parser.add_argument("--only", nargs="*", default=CASES, choices=CASES)
    parser.add_argument("--child")
    args = parser.parse_args()
    if args.child:
        return child(args)
    base = run(BASE, args)
    runs = {case: [] for case in args.only}
    for i in range(args.rounds):
        for case in list(args.only)[:: -1 if i % 2 else 1]:
            runs[case].append(run(case, args))
    rows = {case: summary(rs) for case, rs in runs.items()}
    print(f"**{base['model']}**, profile {args.profile}, {args.steps} steps, {base['records']} held-out records, seed "
          f"{base['seed']}, mean of {args.rounds}; {base['hardware']}; {base['versions']}\n")
    print(table(rows, base["held"]), "", *verdicts(rows, base["held"]), sep="\n")


if __name__ == "__main__":
    main()
