"""Clean synthetic rows through the command line, and hold the near-duplicate step beside datasketch.

    python scripts/bench/clean.py [--rows 1000000] [--documents 50000] [--workers 1] [--limit-gib 0.5] [--out FILE]
    python scripts/bench/clean.py --documents 0 --beside FOLDER     (another checkout cleans the same file, in turn)

Cleaning: `deepseek-cookbook data clean IN OUT --report report.html` on the rows of data_rows.py, in a process of its
own; CPU seconds are those of it and its workers, peak memory is the largest sum of their resident memory. Of the
planted copies it is counted how many were found, of the rows that say something of their own how many were lost. The
order of the checkouts is turned round once, and the smaller CPU seconds of both rounds are taken. Near duplicates: the
same documents and shingles; each contender in a process of its own, one thread, CPU seconds from shingles to answers.
datasketch with 128 hash functions and 16 bands of 8. Shingling, the same for both, is outside of the clock. Without
datasketch (pip install datasketch) it is skipped.
Exit code 1 where the memory is above the limit, where rows are unaccounted for, or where the ratio is below 8.
"""

import argparse
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import data_rows
import make_rows
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
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


def cleaned_once(source: Path, folder: Path, workers: int, root: Path) -> dict:
    "Clean a file by the command of a checkout."
    code = "from deepseek_cookbook.cli import app; app()"
    command = [sys.executable, "-c", code, "data", "clean", str(source), str(folder / "out.jsonl")]
    command += ["--report", str(folder / "report.html"), "--workers", str(workers), "--quiet"]
    before = os.times()
    done, wall, peak = measured(command, cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"})
    after = os.times()
    if done.returncode:
        raise SystemExit(f"data clean failed: {done.stderr[-2000:]}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return dict(wall=wall, cpu=cpu, peak_gib=peak)


def judged(folder: Path, kinds: list[str]) -> dict:
    "What became of each kind of row."
    reasons, gone = Counter(), {}
    with open(folder / "rejected.jsonl", encoding="utf-8") as f:
        for line in f:
            row = json.loads(line)
            reasons[row["reason"]] += 1
            gone[row["number"]] = row["reason"]
    planted, rejected = Counter(kinds), Counter(kind for n, kind in enumerate(kinds, 1) if n in gone)
    share = {kind: round(rejected[kind] / n, 5) for kind, n in sorted(planted.items())}
    kept = count_lines(folder / "out.jsonl")
    return dict(kept=kept, rejected=dict(reasons), planted=dict(planted), unaccounted=len(kinds) - kept - len(gone),
                found={k: v for k, v in share.items() if k.startswith("copy:")},
                lost={k: v for k, v in share.items() if not k.startswith("copy:")})  # fmt: skip


def bench_clean(rows: int, workers: int, seed: int, folder: Path, roots: list[Path]) -> list[dict]:
    "Clean the same rows by the command line of each checkout, in both orders."
    source = folder / "in.jsonl"
    kinds = data_rows.write(str(source), rows, seed)
    runs = {root: [] for root in roots}
    for order in (roots, roots[::-1]):
        for root in order:
            runs[root].append(cleaned_once(source, folder, workers, root) | judged(folder, kinds))
    out = []
    for root, both in runs.items():
        best = min(both, key=lambda r: r["cpu"])
        out.append(dict(checkout="this one" if root == ROOT else root.name, rows=rows, workers=workers,
                        mib=source.stat().st_size / 2**20, rows_per_cpu_second=rows / best["cpu"],
                        cpu_both=[round(r["cpu"], 2) for r in both], **best))  # fmt: skip
    return out


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


def show(cleaned: list[dict], near: list[dict]):
    console = Console(soft_wrap=True, highlight=False)
    first = cleaned[0]
    title = f"data clean, {first['rows']:,} rows, {first['mib']:,.0f} MiB, {first['workers']} process(es)"
    table = Table("what", *(r["checkout"] for r in cleaned), title=title, title_justify="left")
    lines = {
        "rows a CPU second": lambda r: f"{r['rows_per_cpu_second']:,.0f}",
        "wall seconds": lambda r: f"{r['wall']:.1f}",
        "peak memory, GiB": lambda r: f"{r['peak_gib']:.2f}",
        "kept": lambda r: f"{r['kept']:,}",
    }
    lines |= {f"lost: {k}": lambda r, k=k: f"{r['lost'][k]:.2%}" for k in first["lost"]}
    lines |= {f"found: {k}": lambda r, k=k: f"{r['found'][k]:.2%}" for k in first["found"]}
    for name, value in lines.items():
        table.add_row(name, *map(value, cleaned))
    console.print(table)
    if not near:
        return
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
    parser.add_argument("--limit-gib", type=float, default=0.5)
    parser.add_argument("--beside", type=Path, help="root of another checkout, cleaned with in turn")
    parser.add_argument("--out", type=Path, help="write the figures here")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        contender(args.contender, args.documents, args.seed)
        return 0
    roots = [ROOT] + ([args.beside.resolve()] if args.beside else [])
    with tempfile.TemporaryDirectory(prefix="clean-") as folder:
        cleaned = bench_clean(args.rows, args.workers, args.seed, Path(folder), roots)
    near = bench_near(args.documents, args.seed) if args.documents else []
    ratio = near[1]["cpu"] / near[0]["cpu"] if len(near) > 1 else None
    show(cleaned, near)
    if near:
        print(f"datasketch / ours: {ratio:.1f}" if ratio else "datasketch isn't installed: no comparison")
    if args.out:
        from deepseek_cookbook.pipeline import made_with
        from deepseek_cookbook.settings import write_json

        command = " ".join(["python", "scripts/bench/clean.py", *sys.argv[1:]])
        if args.beside:
            command = command.replace(str(args.beside), args.beside.name)
        write_json(args.out, dict(command=command, clean=cleaned, near=near, ratio=ratio, made_with=made_with()))
    mine = cleaned[0]
    bad = mine["peak_gib"] > args.limit_gib or mine["unaccounted"] or (ratio is not None and ratio < RATIO)
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
