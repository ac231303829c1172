"""Peak memory and CPU seconds of each data command, on two files of real-shaped rows: what one more row costs.

    python scripts/bench/data_memory.py [--rows 20000 200000] [--commands check split …] [--beside FOLDER] [--out FILE]

Every command is a process of its own. The smaller file tells what Python and the libraries need; the difference of the
two, by the difference of the rows, is the memory that grows with the data. `held` is the same for the rows as a list of
dictionaries, the least that a command needs that keeps them all. `--beside` is the root of another checkout, measured
on the same files. `--out` takes the figures as JSON; scripts/bench/results/data_memory.json are those of 50,000 rows.
Exit code 1 where a command of this checkout needs more than `--limit` bytes a row.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import data_rows
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent.parent
CLI = "from deepseek_cookbook.cli import app; app()"
HELD = "import json, sys; rows = [json.loads(line) for line in open(sys.argv[1], encoding='utf-8')]"
SETTINGS = ["data.limit=none", "data.test=0.1"]


def words(source: Path, other: Path, out: Path) -> dict[str, list[str]]:
    "The words of each command after `deepseek-cookbook`."
    cook = ["cook", "--profile", "tiny", "--only", "data", *SETTINGS, f"data.source={source}", f"run.folder={out}"]
    return dict(
        check=["data", "check", str(source), "-q"],
        show=["data", "show", str(source), str(out / "rows.html"), "-q"],
        convert=["data", "convert", str(source), str(out / "converted.jsonl"), "-q"],
        clean=["data", "clean", str(source), str(out / "clean.jsonl"), "-q"],
        split=["data", "split", str(source), str(out), "--test", "0.1", "-q"],
        mix=["data", "mix", str(out / "mixed.jsonl"), f"{source}=2", f"{other}=1", "-q"],
        augment=["data", "augment", str(source), str(out / "more.jsonl"), "-q"],
        cook=cook,
        cook_augment=[*cook, "data.augment=true"],
    )


def measured(command: list[str], root: Path) -> dict:
    "CPU seconds and peak MiB of a process."
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, cwd=root, env=env, stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{' '.join(command)}:\n{said.read().decode()[-2000:]}")
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return dict(cpu_seconds=round(usage.ru_utime + usage.ru_stime, 1), peak_mib=round(usage.ru_maxrss / unit))


def bench(name: str, files: dict[int, tuple[Path, Path]], root: Path) -> dict:
    "One command on both files."
    runs = {}
    for rows, (source, other) in files.items():
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-c", HELD, str(source)]
            if name != "held":
                command = [sys.executable, "-c", CLI, *words(source, other, Path(folder))[name]]
            runs[rows] = measured(command, root)
    (few, small), (many, large) = sorted(runs.items())
    more = many + many * (name == "mix") // 2 - few - few * (name == "mix") // 2  # the second source of a mixture
    grown = (large["peak_mib"] - small["peak_mib"]) * 2**20 / more
    return dict(command=name, rows=many, **large, peak_mib_few=small["peak_mib"], bytes_a_row=round(grown))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs=2, default=[20_000, 200_000])
    parser.add_argument("--commands", nargs="+", default=["held", *words(Path(), Path(), Path())])
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--limit", type=int, default=1000, help="bytes a row")
    parser.add_argument("--beside", type=Path, help="root of another checkout")
    parser.add_argument("--beside-commands", nargs="+", default=["split", "mix", "augment", "cook"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for n in args.rows:
            files[n] = Path(folder) / f"a{n}.jsonl", Path(folder) / f"b{n}.jsonl"
            data_rows.write(str(files[n][0]), n, args.seed)
            data_rows.write(str(files[n][1]), n // 2, args.seed + 1)
        row_bytes = round(files[max(args.rows)][0].stat().st_size / max(args.rows))
        for root in [ROOT, *([args.beside.resolve()] if args.beside else [])]:
            for name in args.commands if root == ROOT else args.beside_commands:
                checkout = "this one" if root == ROOT else root.name
                found.append(dict(checkout=checkout) | bench(name, files, root))
                print(json.dumps(found[-1]), flush=True)
    table = Table("command", "checkout", "rows", "CPU seconds", "peak MiB", "bytes a row more")
    for r in found:
        figures = r["rows"], r["cpu_seconds"], r["peak_mib"], r["bytes_a_row"]
        table.add_row(r["command"], r["checkout"], *(f"{x:,}" for x in figures))
    Console(width=100).print(table)
    if args.out:
        from deepseek_cookbook.pipeline import made_with
        from deepseek_cookbook.settings import write_json

        given = [w for w in sys.argv[1:] if w not in ("--out", str(args.out))]
        command = " ".join(["python", "scripts/bench/data_memory.py", *given])
        if args.beside:
            command = command.replace(str(args.beside), args.beside.name)
        write_json(args.out, dict(command=command, bytes_of_a_row=row_bytes, results=found, made_with=made_with()))
    mine = [r for r in found if r["checkout"] == "this one" and r["command"] != "held"]
    sys.exit(any(r["bytes_a_row"] > args.limit for r in mine))


if __name__ == "__main__":
    main()
