"""Run a command as on other processors, on this one: other instruction sets, threads, and precision of training.

    python scripts/other_cpus.py -- python -c "import torch; print(torch.backends.cpu.get_cpu_capability())"
    python scripts/other_cpus.py --only avx2 --threads 1 -- python -m pytest tests/test_ppo_learns.py
    python scripts/other_cpus.py --json runs/tiny/evaluate/result.json -- deepseek-cookbook cook -p tiny --force
    python scripts/other_cpus.py --numbers "loss[ =]+([-+.0-9e]+)" -- python my_run.py

The same program adds numbers in another order where vectors are shorter, and rounds elsewhere in BF16, so training
takes another path. PyTorch's own kernels obey ATEN_CPU_CAPABILITY, those of oneDNN ONEDNN_MAX_CPU_ISA, and
DSC_CPU_PRECISION overrules what `has_bf16_cpu` finds. Only what this machine has can be tried. What a run answered in
`--numbers` or `--json` is compared: for each number its least and largest value over all runs.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

# name -> (ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA, what /proc/cpuinfo must have)
SETS = {
    "default": ("default", "AVX2", "avx2"),
    "avx2": ("avx2", "AVX2", "avx2"),
    "avx512": ("avx512", "AVX512_CORE", "avx512f"),
    "avx512_bf16": ("avx512", "AVX512_CORE_BF16", "avx512_bf16"),
    "amx": ("avx512", "AVX512_CORE_AMX", "amx_bf16"),
}
PRECISIONS = ("float32", "bfloat16")


def available(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    "The instruction sets of `SETS` that this processor has."
    found = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text() if cpuinfo.exists() else "", re.M)
    flags = set(found[1].split()) if found else set()
    return [name for name, (_, _, flag) in SETS.items() if flag in flags]


def leaves(value, path: str = "") -> Iterator[tuple[str, float]]:
    "The numbers of nested JSON with their places."
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from leaves(inner, f"{path}[{i}]")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, float(value)


def answer(args: argparse.Namespace, printed: str) -> dict[str, float]:
    "The numbers of one run."
    found = {}
    if args.numbers:
        for i, match in enumerate(re.finditer(args.numbers, printed)):
            for j, text in enumerate(match.groups() or (match[0],)):
                try:
                    found[f"number {i + 1}" + (f".{j + 1}" if j else "")] = float(text)
                except (TypeError, ValueError):
                    pass
    if args.json and args.json.is_file():
        found |= dict(leaves(json.loads(args.json.read_text())))
    return found


def run(args: argparse.Namespace, name: str, threads: int, precision: str) -> dict:
    "One run: its exit code, seconds, last line and numbers."
    aten, onednn, _ = SETS[name]
    own = dict(ATEN_CPU_CAPABILITY=aten, ONEDNN_MAX_CPU_ISA=onednn, OMP_NUM_THREADS=str(threads))
    if args.json:
        args.json.unlink(missing_ok=True)  # or a failed run would answer for the one before
    began = time.perf_counter()
    done = subprocess.run(args.command, env=os.environ | own | {"DSC_CPU_PRECISION": precision}, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    return dict(set=name, threads=threads, precision=precision, code=done.returncode, printed=done.stdout,
                seconds=time.perf_counter() - began, last=lines[-1] if lines else "",
                numbers=answer(args, done.stdout))  # fmt: skip


def differences(runs: list[dict]) -> list[str]:
    "A line for each number that is not the same in all runs."
    names = dict.fromkeys(name for r in runs for name in r["numbers"])
    lines = []
    for name in names:
        values = [r["numbers"][name] for r in runs if name in r["numbers"]]
        missing = f", missing in {len(runs) - len(values)}" if len(values) < len(runs) else ""
        if missing or min(values) != max(values):
            lines.append(f"{name}: {min(values):.6g} to {max(values):.6g}{missing}")
    return lines or ([f"all {len(names)} numbers are equal"] if names else [])


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    "The command line, checked."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = available()
    parser.add_argument("--only", nargs="+", choices=SETS, default=here, help=f"instruction sets; here: {here}")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="OMP_NUM_THREADS (default: 1 2)")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=PRECISIONS, help="default: both")
    parser.add_argument("--numbers", metavar="REGEX", help="numbers in what the command prints, to be compared")
    parser.add_argument("--json", type=Path, metavar="FILE", help="a file that the command writes, to be compared")
    parser.add_argument("--keep-going", action="store_true", help="exit with 0 whatever the runs did")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what to run, behind --")
    args = parser.parse_args(words)
    args.command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not args.command:
        parser.error("no command: write it behind --")
    if lacking := sorted(set(args.only) - set(here)):
        parser.error(f"this processor lacks {', '.join(lacking)}; it has {', '.join(here) or 'none of these'}")
    return args


def main(words: list[str] | None = None) -> int:
    "Run all, print a line for each at once, and what differs at the end."
    args, runs = arguments(words), []
    print(shlex.join(args.command))
    print(f"{'set':12} {'threads':>7}  {'precision':9} {'exit':>4} {'seconds':>8}  last line", flush=True)
    for name in args.only:
        for threads in args.threads:
            for precision in args.precision:
                runs.append(r := run(args, name, threads, precision))
                print(f"{name:12} {threads:7}  {precision:9} {r['code']:4} {r['seconds']:8.1f}  {r['last'][:90]}",
                      flush=True)  # fmt: skip
    for r in runs:
        if r["code"]:
            print(f"\n--- {r['set']}, {r['threads']} threads, {r['precision']}: exit code {r['code']}")
            print("\n".join(r["printed"].splitlines()[-15:]))
    if lines := differences(runs):
        print("\n" + "\n".join(lines))
    return 0 if args.keep_going else int(any(r["code"] for r in runs))


if __name__ == "__main__":
    sys.exit(main())
