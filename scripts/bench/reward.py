"""The losses of the reward model side by side: the same pairs, the same base, the same number of steps, the same gate.

    python scripts/bench/reward.py --profile laptop                        (about four minutes of two cores a loss)
    python scripts/bench/reward.py --profile laptop --losses triplet margin

Intervals are Wilson's, 95 %. Seconds are CPU seconds of training with its evaluations, without the gate.
"""

import argparse
import shutil
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


def measure(loss: str, profile: str, overrides: list[str]) -> dict:
    "Train with one loss, and what the gate measured."
    from deepseek_cookbook.reward.gate import reward_phase
    from deepseek_cookbook.settings import RunFolder, load_settings

    folder = Path(tempfile.mkdtemp())
    settings = load_settings(profile, ["reward.disable_tqdm=true", *overrides, *OPTIONS[loss]])
    try:
        return reward_phase(settings, RunFolder(folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def cells(loss: str, result: dict) -> list[str]:
    "A row of the table."
    rows = {r["name"]: r for r in result["gate"]}
    whole, matched = rows["held-out accuracy"], rows["accuracy, length-matched"]
    by_dimension = {n: r for n, r in rows.items() if n.startswith("accuracy: ") and "domain" not in n}
    dimensions = [f"{r['value']:.2f}" for r in by_dimension.values()]
    shown = f"{whole['value']:.3f} ({whole['low']:.2f}-{whole['high']:.2f})"
    error = result["calibration"]
    return [loss, shown, f"{matched['value']:.3f}", *dimensions, f"{error['error']:.3f}",
            f"{error['error_scaled']:.3f}", f"{result['cpu_seconds']:.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--profile", default="tiny")
    parser.add_argument("--losses", nargs="+", choices=OPTIONS, default=list(OPTIONS))
    parser.add_argument("--set", nargs="*", default=[], help="settings, such as reward.max_steps=20")
    args = parser.parse_args()
    results = {loss: measure(loss, args.profile, args.set) for loss in args.losses}
    first = next(iter(results.values()))["gate"]
    names = [r["name"].removeprefix("accuracy: ") for r in first
             if r["name"].startswith("accuracy: ") and "domain" not in r["name"]]
    table = Table(title=f"{args.profile}: held-out pair accuracy by loss")
    for head in ("loss", "accuracy (95 %)", "length-matched", *names, "ECE", "ECE scaled", "CPU s"):
        table.add_column(head)
    for loss, result in results.items():
        table.add_row(*cells(loss, result))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
