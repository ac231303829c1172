"""Clean synthetic rows through the command line, and hold the near-duplicate step beside datasketch.

    python scripts/bench/clean.py [--rows 1000000] [--documents 50000] [--workers 1] [--limit-gib 1.5] [--json FILE]

Cleaning: `deepseek-cookbook data clean IN OUT --report report.html` in a process of its own; peak memory is the
largest sum of resident memory over it and its workers. Near duplicates: the same documents and shingles, 128 hash
functions, 16 bands of 8; each contender in a process of its own, one thread, CPU seconds from shingles to answers.
Shingling, the same for both, is outside of the clock. Without datasketch (pip install datasketch) it is skipped.
Exit code 1 where the memory is above the limit, where rows are lost, or where the ratio is below 8.
"""

import argparse
import importlib.util
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import make_rows
from rich.console import Console
from rich.table import Table

RATIO = 8
THRESHOLD = 0.75


def tree_rss(pid: int) -> int:
    "Bytes of resident memory of a process and its children."
    import psutil

    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    total = 0
    for process in family:
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            pass
    return total


def measured(command: list[str], **kwargs) -> tuple[subprocess.CompletedProcess, float, float]:
    "A command that ran, its wall seconds, and its peak memory in GiB (sampled twenty times a second)."
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)
    done = threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(0.05):
            peak = max(peak, tree_rss(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    out, err = process.communicate()
    done.set()
    watcher.join()
    return subprocess.CompletedProcess(command, process.returncode, out, err), time.perf_counter() - start, peak / 2**30


def count_lines(path: Path) -> int:
    with open(path, "rb") as f:
        return sum(1 for _ in f)


def bench_clean(rows: int, workers: int, seed: int, folder: Path) -> dict:
    "Clean `rows` synthetic rows by the command line."
    source, target = folder / "in.jsonl", folder / "out.jsonl"
    planted = make_rows.write(str(source), rows, seed)
    code = "from deepseek_cookbook.cli import app; app()"
    command = [sys.executable, "-c", code, "data", "clean", str(source), str(target)]
    command += ["--report", str(folder / "report.html"), "--min-answer", "3", "--workers", str(workers)]
    done, wall, peak = measured(command)
    if done.returncode:
        raise SystemExit(f"data clean failed: {done.stderr[-2000:]}")
    reasons = {}
    with open(folder / "rejected.jsonl", encoding="utf-8") as f:
        for line in f:
            reason = json.loads(line)["reason"]
            reasons[reason] = reasons.get(reason, 0) + 1
    kept = count_lines(target)
    mib, speed = source.stat().st_size / 2**20, rows / wall
    return dict(rows=rows, workers=workers, mib=mib, wall=wall, rows_per_second=speed, peak_gib=peak, kept=kept,
                rejected=reasons, planted=planted, lost=rows - kept - sum(reasons.values()))  # fmt: skip


def documents(n: int, seed: int) -> tuple[list[list[str]], list[bool]]:
    "Shingles of documents of 50 to 70 pieces, one in five a near copy of an earlier one, and which those are."
    from deepseek_cookbook.data.duplicates import shingles
    from deepseek_cookbook.data.filters import pieces

    rng, texts, sets, copies = random.Random(seed), [], [], []
    for _ in range(n):
        copy = bool(texts) and rng.random() < 0.2
        if copy:
            row = make_rows.near(rng, rng.choice(texts))
        else:
            chinese = rng.random() < 0.5
            row = chinese, [], make_rows.words(rng, chinese, rng.randint(50, 70) // (2 if chinese else 1))
            texts.append(row)
        sets.append(shingles(pieces(make_rows.join(row[2], row[0]))))
        copies.append(copy)
    return sets, copies


def ours(sets: list[list[str]]) -> list[bool]:
    "Which documents are near to an earlier one, by the cookbook."
    import numpy as np

    from deepseek_cookbook.data.duplicates import NearIndex, signatures

    index, out = NearIndex(THRESHOLD), []
    for start in range(0, len(sets), 2000):
        signed = signatures(sets[start : start + 2000])
        out += (index.first_like(signed, np.zeros(len(signed), np.uint64)) >= 0).tolist()
    return out


def datasketch(sets: list[list[str]]) -> list[bool]:
    "The same by datasketch: query, then insert what is new; candidates are checked as ours are."
    from datasketch import MinHash, MinHashLSH

    lsh, kept, out = MinHashLSH(num_perm=128, params=(16, 8)), {}, []
    for i, shingles in enumerate(sets):
        signed = MinHash(num_perm=128)
        signed.update_batch([s.encode() for s in shingles])
        copy = any(kept[j].jaccard(signed) >= THRESHOLD for j in lsh.query(signed))
        if not copy:
            kept[i] = signed
            lsh.insert(i, signed)
        out.append(copy)
    return out


def contender(name: str, n: int, seed: int):
    "Run one contender here and print its figures."
    sets, copies = documents(n, seed)
    globals()[name](sets[:100])  # imports and tables are made
    cpu, wall = time.process_time(), time.perf_counter()
    said = globals()[name](sets)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    hits = sum(s and c for s, c in zip(said, copies, strict=True))
    print(json.dumps(dict(name=name, cpu=cpu, wall=wall, found=hits / max(1, sum(copies)), false=sum(said) - hits)))


def bench_near(n: int, seed: int) -> list[dict]:
    "Both contenders, each in a fresh process."
    names = ["ours"] + ["datasketch"] * bool(importlib.util.find_spec("datasketch"))
    out = []
    for name in names:
        command = [sys.executable, __file__, "--contender", name, "--documents", str(n), "--seed", str(seed)]
        done, _, peak = measured(command, env={**os.environ, "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"})
        if done.returncode:
            raise SystemExit(f"{name} failed: {done.stderr[-2000:]}")
        out.append(json.loads(done.stdout.splitlines()[-1]) | dict(peak_gib=peak))
    return out


def show(cleaned: dict, near: list[dict]):
    console = Console(soft_wrap=True, highlight=False)
    table = Table("what", "value", title=f"data clean, {cleaned['workers']} process(es)", title_justify="left")
    table.add_row("rows", f"{cleaned['rows']:,} ({cleaned['mib']:,.0f} MiB)")
    table.add_row("seconds", f"{cleaned['wall']:.1f}")
    table.add_row("rows/s", f"{cleaned['rows_per_second']:,.0f}")
    table.add_row("peak memory", f"{cleaned['peak_gib']:.2f} GiB")
    table.add_row("kept", f"{cleaned['kept']:,}")
    for reason, n in sorted(cleaned["rejected"].items()):
        table.add_row(reason, f"{n:,}")
    table.add_row("planted", ", ".join(f"{k} {v:,}" for k, v in sorted(cleaned["planted"].items())))
    console.print(table)
    table = Table("near duplicates", "CPU s", "wall s", "peak GiB", "planted found", "false")
    for r in near:
        table.add_row(r["name"], f"{r['cpu']:.2f}", f"{r['wall']:.2f}", f"{r['peak_gib']:.2f}", f"{r['found']:.1%}",
                      str(r["false"]))  # fmt: skip
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--documents", type=int, default=50_000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--limit-gib", type=float, default=1.5)
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        contender(args.contender, args.documents, args.seed)
        return 0
    with tempfile.TemporaryDirectory(prefix="clean-") as folder:
        cleaned = bench_clean(args.rows, args.workers, args.seed, Path(folder))
    near = bench_near(args.documents, args.seed)
    ratio = near[1]["cpu"] / near[0]["cpu"] if len(near) > 1 else None
    show(cleaned, near)
    print(f"datasketch / ours: {ratio:.1f}" if ratio else "datasketch isn't installed: no comparison")
    if args.json:
        machine = dict(processor=platform.processor() or platform.machine(), cores=os.cpu_count())
        Path(args.json).write_text(json.dumps(dict(clean=cleaned, near=near, ratio=ratio, machine=machine), indent=1))
    bad = cleaned["peak_gib"] > args.limit_gib or cleaned["lost"] or (ratio is not None and ratio < RATIO)
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
