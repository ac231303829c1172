"""Learning rate, schedule and parameter groups, each by the held-out loss after the same steps from the same start.

    python scripts/bench/optim.py                                  (profile laptop: about 25 CPU minutes)
    python scripts/bench/optim.py --profile tiny --seeds 3         (half a minute)
    python scripts/bench/optim.py --study rates --steps 41         (one study, longer runs)

Each row is a run of its own on the same records in the same order; only what the row names differs. "fall" is the fall
of the held-out loss against the untrained model, with its paired 95 % interval over the held-out records of all seeds.
Nothing is chosen on these held-out records, but whoever picks the best row of a table does so: measure it anew.
"""

import argparse
import os
import random
import sys
import time
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


@dataclass(frozen=True)
class Run:
    "One row of a table."

    name: str
    weights: str = "lora"  # lora or full
    rate: float = 1e-3
    sft: dict = field(default_factory=dict)  # what differs in [sft]
    optim: dict = field(default_factory=dict)  # what differs in OptimConfig


def span(layers: int, first: int, last: int) -> str:
    "Layers `first` to `last` of twelve, counted from 1 as the article does, in a model of another depth, from 0."
    start = layers * (first - 1) // 12
    return f"{start}-{max(start, layers * last // 12 - 1)}"


def rates(chosen: dict, layers: int) -> list[Run]:
    return [Run(f"{w}, {rate:.0e}", w, rate) for w in ("lora", "full") for rate in RATES]


def schedules(chosen: dict, layers: int) -> list[Run]:
    kinds = {k: ({"lr_scheduler_type": k}, {}) for k in ("constant_with_warmup", "linear", "cosine")}
    kinds["exponential to 0.1"] = {}, {"exponential_final": 0.1}
    base = Run("", "lora", chosen["lora"])
    rows = [replace(base, name=name, sft=sft, optim=optim) for name, (sft, optim) in kinds.items()]
    for name, steps in {"cosine, no warm-up": 0, "cosine, warm-up 0.3": 0.3}.items():
        rows.append(replace(base, name=name, sft={"lr_scheduler_type": "cosine", "warmup_steps": steps}))
    return rows


def groups(chosen: dict, layers: int) -> list[Run]:
    rate, full = chosen["lora"], Run("", "full", chosen["full"])
    wishes = {"one rate": {}, "attention at a tenth": {"attention_learning_rate": rate / 10},
              "ffn at a tenth": {"ffn_learning_rate": rate / 10}, "layer-wise decay 0.9": {"layerwise_decay": 0.9},
              "LoRA+, B 4 times A": {"lora_plus_ratio": 4.0}}  # fmt: skip
    rows = [Run(f"lora, {name}", "lora", rate, {}, optim) for name, optim in wishes.items()]
    article = {f"attention:{span(layers, 4, 6)}": 1e-5, f"ffn:{span(layers, 7, 12)}": 5e-6}
    louder = {key: 10 * value for key, value in article.items()}
    rows += [replace(full, name="full, one rate"),
             replace(full, name="full, layer-wise decay 0.9", optim={"layerwise_decay": 0.9}),
             replace(full, name="full, the article's spans, the rest frozen", rate=0,
                     optim={"layer_learning_rates": article}),
             replace(full, name="full, ten times the article's", rate=0, optim={"layer_learning_rates": louder}),
             replace(full, name="full, the article's spans, the rest at 1e-5", rate=1e-5,
                     optim={"layer_learning_rates": article})]  # fmt: skip
    return rows


STUDIES = {"rates": rates, "schedules": schedules, "groups": groups}


def prepare(settings, seed: int, steps: int, held_out: int):
    "Training batches, each one micro-batch of rows end to end, and held-out records."
    from deepseek_cookbook.data.formats import load_records
    from deepseek_cookbook.data.mix import drop_copies, split_records
    from deepseek_cookbook.data.tokens import encode_records, packed_batch
    from deepseek_cookbook.models import load_tokenizer

    tokenizer = load_tokenizer(settings["model"]["name"])
    records, _ = drop_copies(load_records(settings["data"]["source"])[0])
    train, validation = split_records(records, settings["data"]["validation"], seed)
    rows, _ = encode_records(tokenizer, train, 256)
    rows, size = random.Random(seed).sample(rows, len(rows)), settings["sft"]["per_device_train_batch_size"]
    batches = [[packed_batch([rows[(i * size + j) % len(rows)] for j in range(size)])] for i in range(steps)]
    return tokenizer, batches, random.Random(seed).sample(validation, min(held_out, len(validation)))


def load(settings, weights: str, seed: int):
    import peft

    from deepseek_cookbook.models import load_model

    model = load_model(**settings["model"])
    torch.manual_seed(seed)
    return peft.get_peft_model(model, settings.build("lora")) if weights == "lora" else model


def held_out_nats(model, tokenizer, records) -> tuple[np.ndarray, np.ndarray]:
    "Nats and answer tokens of each record, in the precision of training."
    from deepseek_cookbook.evaluate.metrics import EvaluateConfig, answer_nll
    from deepseek_cookbook.models import precision

    half = precision().autocast
    with torch.autocast(model.device.type, half or torch.bfloat16, enabled=half is not None):
        return answer_nll(model, tokenizer, records, EvaluateConfig(quiet=True))[:2]


def one(run: Run, settings, seed: int, data) -> tuple[float, np.ndarray]:
    "The last training loss, and the nats of each held-out record."
    import trl

    from deepseek_cookbook.models import precision
    from deepseek_cookbook.sft.optim import OptimConfig, make_optimizer, make_schedule, take_steps

    tokenizer, batches, records = data
    keys = {k: settings["sft"][k] for k in ("lr_scheduler_type", "warmup_steps", "max_grad_norm")}
    args = trl.SFTConfig(use_cpu=not torch.cuda.is_available(), bf16=False, report_to="none",
                         **keys | run.sft | dict(learning_rate=run.rate))  # fmt: skip
    model, config, half = load(settings, run.weights, seed).train(), OptimConfig(**run.optim), precision().autocast
    batches = [[{k: v.to(model.device) if torch.is_tensor(v) else v for k, v in m.items()} for m in b] for b in batches]
    optimizer = make_optimizer(model, args, config)
    schedule = make_schedule(optimizer, args, len(batches), config)
    losses = take_steps(model, batches, optimizer, schedule, args.max_grad_norm, half)
    return losses[-1], held_out_nats(model, tokenizer, records)[0]


def study(name: str, settings, args, chosen: dict, console: Console) -> list[dict]:
    "Run and print one study."
    from deepseek_cookbook.evaluate.metrics import relative_fall
    from deepseek_cookbook.models import load_model

    data = {seed: prepare(settings, seed, args.steps, args.held_out) for seed in range(args.seeds)}
    model, base = load_model(**settings["model"]), []
    for tokenizer, _, records in data.values():
        base.append(held_out_nats(model, tokenizer, records))
    before, count = (np.concatenate(x) for x in zip(*base, strict=True))
    table = Table("", "held-out loss", "fall", "95 %", "last training loss", "CPU s", title=(
        f"{name}: profile {settings.profile}, {args.steps} steps, {args.seeds} seeds; untrained "
        f"{before.sum() / count.sum():.3f}"))  # fmt: skip
    rows = []
    for run in STUDIES[name](chosen, model.config.num_hidden_layers):
        if args.only and not any(part in run.name for part in args.only):
            continue
        began = time.process_time()
        last, after = zip(*[one(run, settings, seed, d) for seed, d in data.items()], strict=True)
        seconds, after = (time.process_time() - began) / args.seeds, np.concatenate(after)
        fall, low, high = relative_fall(before, after)
        loss = float(after.sum() / count.sum())
        rows.append(dict(name=run.name, weights=run.weights, rate=run.rate, loss=loss, fall=fall, low=low, high=high,
                         last=float(np.mean(last)), seconds=seconds))  # fmt: skip
        table.add_row(run.name, f"{loss:.3f}", f"{fall:+.1%}", f"{low:+.1%} to {high:+.1%}", f"{np.mean(last):.3f}",
                      f"{seconds:.0f}")  # fmt: skip
        print(rows[-1], file=sys.stderr, flush=True)
    console.print(table)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default=os.environ.get("DSC_PROFILE", "laptop"))
    parser.add_argument("--study", nargs="*", default=list(STUDIES), choices=list(STUDIES))
    parser.add_argument("--only", nargs="*", help="parts of the rows' names, such as full article")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--held-out", type=int, default=64, help="held-out records a seed")
    parser.add_argument("--lora-rate", type=float, help="of the other studies; else the best of the first")
    parser.add_argument("--full-rate", type=float)
    parser.add_argument("--json", help="write all figures to this file")
    args = parser.parse_args()
    from deepseek_cookbook.settings import load_settings, write_json

    settings, console, found = load_settings(args.profile), Console(width=120), {}
    chosen = dict(lora=args.lora_rate or settings["sft"]["learning_rate"], full=args.full_rate or 1e-4)
    for name in args.study:
        found[name] = study(name, settings, args, chosen, console)
        if name == "rates" and not args.only:
            for weights, given in dict(lora=args.lora_rate, full=args.full_rate).items():
                best = min((r for r in found[name] if r["weights"] == weights), key=lambda r: r["loss"])
                chosen[weights] = given or best["rate"]
        if args.json:
            write_json(args.json, found)


if __name__ == "__main__":
    main()
