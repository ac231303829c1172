"""The fall of the held-out loss on several splits: how much of one number is the luck of which questions were held out.

    python scripts/bench/splits.py                         (profile laptop, seeds 1 to 5 and 42: about 40 CPU minutes)
    python scripts/bench/splits.py --profile tiny          (a minute)
    python scripts/bench/splits.py --set sft.learning_rate=1e-3 lora.lora_dropout=0.05

Each seed is `deepseek-cookbook cook` for data, SFT and evaluation with another `run.seed`: other held-out questions,
another start and order. Finished seeds are kept in runs/bench/splits/<name of the settings> and not run again.
The intervals of one seed say how sure a fall is on *its* questions; the spread over seeds says how far to trust one.
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

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
PHASES = ("data", "sft", "evaluate")


def cook(seed: int, args: argparse.Namespace) -> dict:
    "The figures of one seed."
    key = hashlib.sha256(" ".join(sorted(args.set)).encode()).hexdigest()[:8] if args.set else "as_is"
    folder = args.folder / key / str(seed)
    command = [sys.executable, "-m", "deepseek_cookbook.cli", "cook", f"run.seed={seed}", f"run.folder={folder}",
               *args.set, "sft.disable_tqdm=true", "evaluate.quiet=true", "--profile", args.profile,
               *(word for phase in PHASES for word in ("--only", phase))]  # fmt: skip
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.jobs))}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | threads)
    if done.returncode:
        sys.exit(f"seed {seed}: {done.stderr[-3000:]}")
    result, sft = (json.loads((folder / args.profile / p / "result.json").read_text()) for p in ("evaluate", "sft"))
    print(f"seed {seed}: {result['result']['fall']:.1%}", file=sys.stderr, flush=True)
    return result["result"] | dict(seed=seed, seconds=sft["seconds"], peak=sft["peak_memory_gib"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default=os.environ.get("DSC_PROFILE", "laptop"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2, 3, 4, 5])
    parser.add_argument("--jobs", type=int, default=2, help="seeds at a time, each with its share of the cores")
    parser.add_argument("--set", nargs="*", default=[], help="settings, such as lora.r=64")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "bench" / "splits")
    args = parser.parse_args()
    with ThreadPoolExecutor(args.jobs) as pool:
        rows = list(pool.map(lambda seed: cook(seed, args), args.seeds))
    where = f"{platform.machine()}, {os.cpu_count()} cores, {args.jobs} at a time"
    table = Table(title=f"Fall of the held-out loss, profile {args.profile}, {where} {' '.join(args.set)}".rstrip())
    for column in ("seed", "records", "base", "trained", "fall", "95 % interval", "SFT s", "peak GiB"):
        table.add_column(column, justify="right")
    for r in rows:
        low, high = r["fall_interval"]
        table.add_row(str(r["seed"]), str(r["records"]), f"{r['before']['loss']:.3f}", f"{r['after']['loss']:.3f}",
                      f"{r['fall']:.1%}", f"{low:.1%} to {high:.1%}", f"{r['seconds']:.0f}", f"{r['peak']:.2f}")
    falls = [r["fall"] for r in rows]
    spread = f", standard deviation {statistics.stdev(falls):.1%}" if len(falls) > 1 else ""
    Console(width=120).print(table)
    print(f"mean {statistics.mean(falls):.1%}{spread}, {min(falls):.1%} to {max(falls):.1%}")


if __name__ == "__main__":
    main()
