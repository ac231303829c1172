"""What is forgotten while a task is learnt, by nine ways to train it: chapter 03e's study at full size.

    python scripts/bench/forgetting.py --profile tiny --seeds 3 --steps 60 --set data.limit=none --ewc 1 10 100
    python scripts/bench/forgetting.py --profile laptop --seeds 1 --json forgetting.json --plot forgetting.png

Every run starts from the same base and takes the same number of steps on the train split of the data phase. Measured on
the held-out split, and as plain text on two kinds of passages that no run is trained on: the Python reference, from
which replay and EWC take other passages, and software licences. In the tiny profile the base is a toy that first learns
some of both kinds. `EWC` is there once for each --ewc value; --lora-rates adds LoRA at other parts of its rate.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default=os.environ.get("DSC_PROFILE", "laptop"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=24, help="of sft.per_device_train_batch_size rows")
    parser.add_argument("--teach", type=int, default=600, help="steps in which a toy learns general text first")
    parser.add_argument("--held", type=int, default=48, help="held-out records of the task")
    parser.add_argument("--passages", type=int, default=24, help="held-out passages of each kind")
    parser.add_argument("--ewc", type=float, nargs="+", default=[1e1, 1e2], help="values of loss.ewc_lambda")
    parser.add_argument("--l2", type=float, default=0.1, help="loss.l2_start")
    parser.add_argument("--full-rate", type=float, default=0.3, help="of full fine-tuning, as a part of LoRA's rate")
    parser.add_argument("--lora-rates", type=float, nargs="*", default=[], help="more LoRA runs, times its rate")
    parser.add_argument("--only", nargs="*", help="names of variants")
    parser.add_argument("--set", nargs="*", default=[], help="overrides such as data.limit=400")
    parser.add_argument("--json", help="write the rows to this file")
    parser.add_argument("--plot", help="draw both plots into this file")
    return parser.parse_args()


def show(rows: list[dict], console: Console, title: str):
    table = Table("", "target", "python", "licences", "trained", "grad norm", "CPU s", title=title)
    for row in rows:
        cells = (f"{100 * x['rise']:+.1f} % ({100 * x['low']:+.1f} to {100 * x['high']:+.1f})"
                 for x in row["losses"].values())  # fmt: skip
        norm = "{} [{}-{}]".format(*(f"{row['grad_norm'][i]:.1f}" for i in (1, 0, 2)))
        table.add_row(row["variant"], *cells, f"{row['trainable_share']:.1%}", norm, f"{row['cpu_seconds']:.0f}")
    console.print(table)


def main():
    args = arguments()
    from deepseek_cookbook.data.mix import data_phase, python_texts
    from deepseek_cookbook.models import load_model, load_tokenizer
    from deepseek_cookbook.settings import RunFolder, load_settings, read_jsonl, write_json
    from deepseek_cookbook.sft import forgetting as f

    settings = load_settings(args.profile, [f"sft.max_steps={args.steps}", *args.set])
    seeds, began, console, rows = range(args.seeds), time.perf_counter(), Console(width=130), []
    kit = f.variants(tuple(args.ewc), args.l2, args.full_rate)
    kit += [f.Variant(f"LoRA, rate x {x:g}", rate=x) for x in args.lora_rates]
    kit = [v for v in kit if not args.only or v.name in args.only]
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        data_phase(settings, RunFolder(work))
        train, held = (read_jsonl(work / f"data/{side}.jsonl") for side in ("train", "validation"))
        held = held[: args.held]
        general = f.split_general({"python": python_texts(), "licences": f.licence_texts()}, args.passages)
        settings = f.with_knowledge(settings, general.known, args.teach, work / "base")
        base, tokenizer = load_model(**settings["model"]), load_tokenizer(settings["model"]["name"])
        before = f.measure(base, tokenizer, held, general, settings)
        del base
        print({k: round(n.sum() / t.sum(), 3) for k, (n, t) in before.items()}, file=sys.stderr)
        for variant in kit:
            for seed in seeds:
                rows.append(f.run_variant(settings, variant, train, held, general, before, work / "run", seed))
                print(rows[-1], file=sys.stderr, flush=True)
                if args.json:
                    write_json(args.json, rows)
    means = f.over_seeds(rows)
    losses = ", ".join(f"{k} {x['before']:.3f}" for k, x in rows[0]["losses"].items())
    title = f"rise of the loss, profile {args.profile}, {args.steps} steps, seeds: {args.seeds}; before: {losses}"
    show(means, console, title)
    for kind in general.held:
        console.print(f"not dominated, {kind}: " + "; ".join(r["variant"] for r in f.pareto(means, kind)))
    console.print(f"{time.perf_counter() - began:.0f} s in all, {time.process_time():.0f} CPU s")
    if args.plot:
        f.plot_pareto(means).savefig(args.plot)


if __name__ == "__main__":
    main()
