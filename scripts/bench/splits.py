"""The fall of the held-out loss on several splits: how much of one number is the luck of which questions were held out.

    python scripts/bench/splits.py                         (profile laptop, seeds 42 and 1 to 4: about 20 CPU minutes)
    python scripts/bench/splits.py --profile tiny          (a minute)
    python scripts/bench/splits.py --set sft.learning_rate=2e-3 lora.lora_dropout=0.1

Each seed is `deepseek-cookbook cook` for data and SFT with another `run.seed`: other held-out questions, another start
and order. Finished seeds are kept in runs/bench/splits/<digest of the settings> and not run again. The fall has two
intervals, one that draws records and one that draws questions with all their answers, and is told once more without
the question that has the most answer tokens. An interval says how sure a fall is on its own questions; the spread over
seeds says how far to trust one.
"""

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]


def train(seed: int, args: argparse.Namespace) -> Path:
    "Run data and SFT of one seed; returns its run folder."
    key = hashlib.sha256(" ".join(sorted(args.set)).encode()).hexdigest()[:8] if args.set else "as_is"
    folder = args.folder / key / str(seed)
    command = [sys.executable, "-m", "deepseek_cookbook.cli", "cook", f"run.seed={seed}", f"run.folder={folder}",
               *args.set, "sft.disable_tqdm=true", "--profile", args.profile,
               "--only", "data", "--only", "sft"]  # fmt: skip
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.jobs))}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | threads)
    if done.returncode:
        sys.exit(f"seed {seed}: {done.stderr[-3000:]}")
    print(f"seed {seed}: trained", file=sys.stderr, flush=True)
    return folder / args.profile


def measure(run: Path, profile: str) -> dict:
    "Losses with the adapter off and on: of all records, of the heaviest question, and of the rest."
    from deepseek_cookbook.data.formats import to_messages
    from deepseek_cookbook.evaluate.metrics import answer_nll, heaviest, relative_fall
    from deepseek_cookbook.models import load_model, load_tokenizer
    from deepseek_cookbook.settings import load_settings, read_jsonl

    settings = load_settings(profile, ["evaluate.quiet=true"])
    config, tokenizer = settings.build("evaluate"), load_tokenizer(settings["model"]["name"])
    records = read_jsonl(run / "data" / "validation.jsonl")
    model = load_model(**settings["model"], adapter=run / "sft" / "adapter")
    after, count, _ = answer_nll(model, tokenizer, records, config)
    with model.disable_adapter():
        before, _, _ = answer_nll(model, tokenizer, records, config)
    asked = np.array([to_messages(r)[-2]["content"] for r in records])
    one = heaviest(before, after, count, asked)
    rest = asked != one["unit"]
    return one | dict(
        all=len(records), base=before.sum() / count.sum(), trained=after.sum() / count.sum(),
        by_record=relative_fall(before, after), by_question=relative_fall(before, after, asked),
        heavy=relative_fall(before[~rest], after[~rest]),
        without=relative_fall(before[rest], after[rest], asked[rest]),
    )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default=os.environ.get("DSC_PROFILE", "laptop"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=2, help="seeds at a time, each with its share of the cores")
    parser.add_argument("--set", nargs="*", default=[], help="settings of data and SFT, such as lora.r=64")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "bench" / "splits")
    args = parser.parse_args()
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = list(pool.map(lambda seed: train(seed, args), args.seeds))
    where = f"{platform.machine()}, {os.cpu_count()} cores, {args.jobs} at a time"
    table = Table(title=f"Fall of the held-out loss, profile {args.profile}, {where} {' '.join(args.set)}".rstrip())
    for column in ("seed", "records", "base", "trained", "fall, %", "records drawn", "questions drawn",
                   "heaviest question: records, share", "its fall, %", "fall without it, %",
                   "SFT s", "GiB"):  # fmt: skip
        table.add_column(column, justify="right")

    def share(fall: tuple[float, float, float]) -> str:
        value, low, high = (f"{x:.1%}"[:-1] for x in fall)
        return f"{value} ({low} to {high})" if low != high else value  # one record alone has no interval

    falls = []
    for seed, run in zip(args.seeds, runs, strict=True):
        r, sft = measure(run, args.profile), json.loads((run / "sft" / "result.json").read_text())
        falls.append(r["by_record"][0])
        ends = [share(r[k]).partition(" ")[2].strip("()") for k in ("by_record", "by_question")]
        table.add_row(str(seed), str(r["all"]), f"{r['base']:.3f}", f"{r['trained']:.3f}", f"{falls[-1]:.1%}"[:-1],
                      *ends, f"{r['records']}, {r['share']:.0%}", share(r["heavy"]), share(r["without"]),
                      f"{sft['seconds']:.0f}", f"{sft['peak_memory_gib']:.2f}")  # fmt: skip
    Console(width=160).print(table)
    spread = f", standard deviation {statistics.stdev(falls):.1%}" if len(falls) > 1 else ""
    print(f"mean {statistics.mean(falls):.1%}{spread}, {min(falls):.1%} to {max(falls):.1%}")


if __name__ == "__main__":
    main()
