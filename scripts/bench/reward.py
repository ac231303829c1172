"""The losses of the reward model side by side, or one loss over seeds: the same base, number of steps and gate.

    python scripts/bench/reward.py --profile laptop                        (about three minutes of one core a run)
    python scripts/bench/reward.py --profile laptop --losses triplet margin
    python scripts/bench/reward.py --profile laptop --losses bradley_terry --seeds 42 1 2 3 4 --out seeds.json
    python scripts/other_cpus.py --threads 1 -- python scripts/bench/reward.py --losses bradley_terry --profile laptop

A seed draws the pairs, the order and the first weights. Intervals are Wilson's, 95 %. Seconds are CPU seconds of
training with its evaluations, without the gate. `--out` adds the rows to a JSON file, with hardware and versions.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

OPTIONS = {
    "bradley_terry": [],
    "margin": ["reward_model.margin=true"],
    "triplet": ["reward_model.loss=triplet"],
    "multi_head": ["reward_model.loss=multi_head"],
}


def measure(loss: str, seed: int, profile: str, overrides: list[str]) -> dict:
    "Train with one loss and seed, and what the gate measured."
    from deepseek_cookbook.reward.gate import reward_phase
    from deepseek_cookbook.settings import RunFolder, load_settings

    folder = Path(tempfile.mkdtemp())
    settings = load_settings(profile, ["reward.disable_tqdm=true", f"run.seed={seed}", *overrides, *OPTIONS[loss]])
    try:
        return reward_phase(settings, RunFolder(folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def cells(loss: str, seed: int, result: dict) -> list[str]:
    "A row of the table."
    rows = {r["name"]: r for r in result["gate"]}
    whole, matched = rows["held-out accuracy"], rows["accuracy, length-matched"]
    by_dimension = {n: r for n, r in rows.items() if n.startswith("accuracy: ") and "domain" not in n}
    dimensions = [f"{r['value']:.2f}" for r in by_dimension.values()]
    shown = f"{whole['value']:.3f} ({whole['low']:.2f}-{whole['high']:.2f})"
    error = result["calibration"]
    return [loss, str(seed), "passed" if result["passed"] else "FAILED", shown, f"{matched['value']:.3f}", *dimensions,
            f"{error['error']:.3f}", f"{error['error_scaled']:.3f}", f"{result['cpu_seconds']:.0f}"]


def record(loss: str, seed: int, result: dict) -> dict:
    "What is kept of a run."
    from deepseek_cookbook.pipeline import made_with

    kept = ("steps", "cpu_seconds", "peak_memory_gib", "passed")
    gate = {r["name"]: r["value"] for r in result["gate"]}
    return dict(loss=loss, seed=seed, **{k: result[k] for k in kept}, gate=gate, made_with=made_with())


def add_rows(path: Path, rows: list[dict]) -> None:
    "Add rows to a JSON file, written completely or not at all."
    from deepseek_cookbook.settings import write_json

    old = json.loads(path.read_text())["rows"] if path.is_file() else []
    write_json(path, dict(command=" ".join(["python", *sys.argv]), rows=old + rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--profile", default="tiny")
    parser.add_argument("--losses", nargs="+", choices=OPTIONS, default=list(OPTIONS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[42])
    parser.add_argument("--set", nargs="*", default=[], help="settings, such as reward.max_steps=20")
    parser.add_argument("--out", type=Path, help="a JSON file that the rows are added to")
    args = parser.parse_args()
    results = {(loss, seed): measure(loss, seed, args.profile, args.set) for loss in args.losses for seed in args.seeds}
    first = next(iter(results.values()))["gate"]
    names = [r["name"].removeprefix("accuracy: ") for r in first
             if r["name"].startswith("accuracy: ") and "domain" not in r["name"]]
    table = Table(title=f"{args.profile}: held-out pair accuracy by loss")
    for head in ("loss", "seed", "gate", "accuracy (95 %)", "matched", *names, "ECE", "ECE scaled", "CPU s"):
        table.add_column(head)
    for (loss, seed), result in results.items():
        table.add_row(*cells(loss, seed, result))
    Console(width=160).print(table)
    if args.out:
        add_rows(args.out, [record(*key, result) for key, result in results.items()])


if __name__ == "__main__":
    main()
