"""What rank, targets, alpha and dropout do, and full training against LoRA on a classification task.

    .venv/bin/python scripts/bench/lora.py study --profile laptop
    .venv/bin/python scripts/bench/lora.py claim --profile laptop --seeds 42

Every run is a process of its own, so that its peak memory is its own. `study` trains each adapter on the same short
records of the chatterbot corpus (topics ai and psychology) and measures the loss on held-out ones; `claim` trains a
classifier of topics (see nbs/03_sft.lora.ipynb) and gives the accuracy with its 95 % interval, and the share of the
accuracy of full training that LoRA keeps, with a paired bootstrap over the same test questions. Of full training's two
learning rates the better one on the test questions counts, which favours full training.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections import Counter

from rich.console import Console
from rich.table import Table

RANKS, KINDS = (4, 8, 16, 64), ("qv", "all-linear")
STUDY = {"full": None} | {
    f"r={r}, {kind}": dict(r=r, lora_alpha=2 * r, target_modules=kind) for kind in KINDS for r in RANKS
}
MIDDLE = STUDY["r=16, all-linear"]
STUDY |= {
    "r=16, all-linear, alpha 8": MIDDLE | dict(lora_alpha=8),
    "r=16, all-linear, dropout 0.1": MIDDLE | dict(lora_dropout=0.1),
    "r=64, all-linear, alpha 32": STUDY["r=64, all-linear"] | dict(lora_alpha=32),
    "r=64, all-linear, alpha 32, rsLoRA": STUDY["r=64, all-linear"] | dict(lora_alpha=32, use_rslora=True),
}
CLAIM = {  # name: arguments of LoRA, learning rate as a multiple of the settings' (which is LoRA's)
    "full, lr/10": (None, 0.1),
    "full, lr/30": (None, 1 / 30),
    "LoRA r=16, all-linear": (dict(r=16, lora_alpha=32, target_modules="all-linear"), 1),
    "LoRA r=36, all-linear": (dict(r=36, lora_alpha=72, target_modules="all-linear"), 1),
    "LoRA r=8, qv": (dict(r=8, lora_alpha=16, target_modules="qv"), 1),
}


def study(name: str, settings, args) -> dict:
    import transformers

    from deepseek_cookbook.data.formats import chatterbot_records
    from deepseek_cookbook.data.mix import near_pairs, split_records
    from deepseek_cookbook.evaluate.metrics import answer_nll
    from deepseek_cookbook.models import load_model, load_tokenizer
    from deepseek_cookbook.monitor import peak_memory_gib
    from deepseek_cookbook.sft.lora import answer_batches, fit, lora_study, state_mib

    model, tokenizer = load_model(**settings["model"]), load_tokenizer(settings["model"]["name"])
    found = [r for topic in ("psychology", "ai") for r in chatterbot_records("english", topic)[0]]
    short = [r for r in found if len(tokenizer.tokenize(r["instruction"] + r["output"])) < 48]
    train, held = split_records(short, 0.2, args.seed, near=near_pairs)
    batches = answer_batches(tokenizer, train, args.batch, seed=args.seed)[: args.steps]
    held, evaluate, lr = held[: args.held], settings.build("evaluate", quiet=True), settings["sft"]["learning_rate"]

    if STUDY[name] is not None:
        [row] = lora_study(model, tokenizer, batches, held, {name: STUDY[name]}, lr, evaluate, args.seed)
    else:
        transformers.set_seed(args.seed)
        model.requires_grad_(True)
        base, count, _ = answer_nll(model, tokenizer, held, evaluate)
        print(f"base: held-out loss {base.sum() / count.sum():.4f}", file=sys.stderr)
        ran = fit(model, batches, lr / 10)
        nll, count, _ = answer_nll(model, tokenizer, held, evaluate)
        row = dict(name=name, trainable=1.0, state_mib=state_mib(model), loss=float(nll.sum() / count.sum()))
        row |= dict(seconds=ran["seconds"], cpu_seconds=ran["cpu_seconds"])
    return row | dict(peak_gib=peak_memory_gib())


def claim(name: str, settings, args) -> dict:
    from deepseek_cookbook.data.mix import near_pairs, split_records
    from deepseek_cookbook.monitor import peak_memory_gib
    from deepseek_cookbook.sft.lora import classify, topic_records

    questions = topic_records()
    classes = sorted({r["output"] for r in questions})
    train, test = split_records(questions, 0.4, args.seed, lambda r: r["output"], near_pairs)
    lora, factor = CLAIM[name]
    lr = factor * settings["sft"]["learning_rate"]
    row, right = classify(settings["model"]["name"], train, test, classes, lora, lr, args.epochs, args.seed)
    most = max(Counter(r["output"] for r in test).values()) / len(test)
    extra = dict(peak_gib=peak_memory_gib(), hits=right.tolist(), commonest=most, train=len(train), test=len(test))
    return dict(name=name) | row | extra


def child(args) -> None:
    from deepseek_cookbook.settings import load_settings

    settings = load_settings(args.profile, args.set)
    print("RESULT " + json.dumps(dict(study=study, claim=claim)[args.what](args.child, settings, args)))


def start(name: str, seed: int, args) -> dict:
    options = dict(child=name, profile=args.profile, seed=seed, steps=args.steps, batch=args.batch, held=args.held,
                   epochs=args.epochs)
    command = [sys.executable, __file__, args.what, *(f"--{k}={v}" for k, v in options.items()), "--set", *args.set]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    row = json.loads(done.stdout.split("RESULT ")[-1].splitlines()[0]) | dict(seed=seed)
    base = [line for line in done.stderr.splitlines() if line.startswith("base:")]
    print(*base, {k: v for k, v in row.items() if k != "hits"}, file=sys.stderr, flush=True)
    return row


def kept(rows: list[dict]) -> list[str]:
    "For each seed and adapter, the share of full training's accuracy that it keeps."
    import numpy as np

    from deepseek_cookbook.evaluate.metrics import relative_fall

    out = []
    for seed in dict.fromkeys(r["seed"] for r in rows):
        mine = [r for r in rows if r["seed"] == seed]
        full = max((r for r in mine if r["trainable"] == 1), key=lambda r: r["accuracy"])
        for r in (r for r in mine if r["trainable"] < 1):
            fall, low, high = relative_fall(np.array(full["hits"]), np.array(r["hits"]))
            out.append(f"seed {seed}, {r['name']}: {1 - r['trainable']:.1%} fewer, keeps {1 - fall:.1%} "
                       f"({1 - high:.1%} to {1 - low:.1%}) of {full['name']}")
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("study", "claim"))
    parser.add_argument("--profile", default=os.environ.get("DSC_PROFILE", "laptop"))
    parser.add_argument("--seeds", type=int, nargs="*", default=[42])
    parser.add_argument("--steps", type=int, default=10, help="study: training steps")
    parser.add_argument("--batch", type=int, default=8, help="study: records a step")
    parser.add_argument("--held", type=int, default=32, help="study: held-out records")
    parser.add_argument("--epochs", type=int, default=2, help="claim: passes over the training questions")
    parser.add_argument("--only", nargs="*", help="names of the runs")
    parser.add_argument("--set", nargs="*", default=[], help="settings, such as sft.learning_rate=5e-4")
    parser.add_argument("--seed", type=int, default=42, help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args)
    names = args.only or list(dict(study=STUDY, claim=CLAIM)[args.what])
    rows = [start(name, seed, args) for seed in args.seeds for name in names]
    where = f"{platform.machine()}, {os.cpu_count()} cores"
    table = Table(title=f"LoRA, {args.what}, profile {args.profile}, {where}")
    columns = [k for k in rows[0] if k not in ("hits", "commonest", "train", "test")]
    for column in columns:
        table.add_column(column, justify="left" if column == "name" else "right")
    for r in rows:
        table.add_row(*(f"{r[k]:.4g}" if isinstance(r[k], float) else str(r[k]) for k in columns))
    Console(width=160).print(table)
    if args.what == "claim":
        print(f"the commonest class alone: {rows[0]['commonest']:.3f} of {rows[0]['test']}", *kept(rows), sep="\n")


if __name__ == "__main__":
    main()
