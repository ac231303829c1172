"""Split templated rows with the search for near copies, each kind in a process of its own: CPU seconds and peak memory.

    python scripts/bench/split.py [--rows 100000] [--kinds template rubric …] [--out FILE]

Kinds: `template` (one sentence; numbers and names differ), `rubric` (a page of rubric in front of it, in one field),
`task` (the rubric as instruction, a note as input), `same` (a template without numbers: all rows meet in one bucket),
`free` (no two alike). Seconds are those of `split_sides`; the peak is of the whole process, with the rows. `--out`
takes the figures as JSON; scripts/bench/results/split.json are those of 100,000 rows. Exit code 1 where a kind needs
more than 20 CPU seconds a 100,000 rows or 500 MB, where rows are lost, or where another share comes out than asked for.
"""

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

SECONDS, MEGABYTES, SHARE = 20, 500, 0.12
NAMES = "Ada Bo Chen Dara Emil Fay Gita Hugo Ines Jan Kai Lena Ming Nora Otto Pia Qing Rosa Sven Tao".split()
WORDS = """account balance transfer refund order parcel invoice support login payment product quality size colour
address contract rate loan points member offer event review change contact choose system service market report
model data test error device memory window branch table server morning letter street garden river doctor
teacher engineer""".split()
RUBRIC = " ".join(
    f"{n} points if the {a} is named, and none if the {b} is missing or only hinted at."
    for n, a, b in zip(("One", "Two", "Three", "Four", "Five", "Six"), WORDS[:6], WORDS[6:12], strict=True)
)


def rows(kind: str, n: int, seed: int):
    "Rows of a kind, one after the other."
    rng = random.Random(seed)
    for i in range(n):
        sentence = f"Please transfer {rng.randrange(10**6)} yuan to {rng.choice(NAMES)} by day {1 + i % 28} at noon."
        note = " ".join(rng.choices(WORDS, k=12))
        asked = {
            "template": (sentence, ""),
            "rubric": (f"{RUBRIC}\n{sentence}", ""),
            "task": (RUBRIC, note),
            "same": (f"{RUBRIC}\nPlease greet {rng.choice(NAMES)} {rng.choice(WORDS)} {rng.choice(WORDS)}.", ""),
            "free": (note, ""),
        }[kind]
        yield dict(instruction=asked[0], input=asked[1], output=rng.choice(("Done.", "Refused.")), history=[])


def child(kind: str, n: int, seed: int) -> dict:
    "Split the rows of one kind."
    from deepseek_cookbook.data.split import near_pairs, split_sides

    records = list(rows(kind, n, seed))
    unit = 2**20 if sys.platform == "darwin" else 2**10
    peak = lambda: round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)  # noqa: E731
    held, began = peak(), time.process_time()
    split = split_sides(records, dict(validation=SHARE), seed, near=near_pairs)
    seconds = time.process_time() - began
    total = sum(map(len, split.sides.values()))
    return dict(kind=kind, rows=n, cpu_seconds=round(seconds, 2), peak_mib=peak(), rows_mib=held,
                complete=total == n, **split.facts())  # fmt: skip


def failed(r: dict) -> bool:
    "Whether a kind needs too much or is split wrongly."
    too_much = r["cpu_seconds"] > SECONDS * r["rows"] / 1e5 or r["peak_mib"] * 2**20 > MEGABYTES * 1e6
    return too_much or not r["complete"] or abs(r["shares"]["validation"] - SHARE) > 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--kinds", nargs="+", default=["template", "rubric", "task", "same", "free"])
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child, args.rows, args.seed)))
        return
    results = []
    for kind in args.kinds:
        command = [sys.executable, __file__, "--child", kind, "--rows", str(args.rows), "--seed", str(args.seed)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        if done.returncode:
            sys.exit(f"{kind}: {done.stderr[-3000:]}")
        results.append(json.loads(done.stdout.splitlines()[-1]))
    table = Table("kind", "rows", "CPU seconds", "peak MiB", "held out", "units", "largest", "near copies", "cut")
    for r in results:
        figures = [r["cpu_seconds"], r["peak_mib"], f"{r['shares']['validation']:.2%}", r["units"], r["largest_unit"]]
        table.add_row(r["kind"], *map(str, (r["rows"], *figures, r["near_copies"], r["near_copies_cut"])))
    Console(width=120).print(table)
    record = dict(results=results, asked=SHARE, limits=dict(cpu_seconds=SECONDS, megabytes=MEGABYTES),
                  machine=dict(python=platform.python_version(), processor=platform.machine()))  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(any(map(failed, results)))


if __name__ == "__main__":
    main()
