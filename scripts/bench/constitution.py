"""Rounds of a constitution side by side: who judges, and what PPO follows; the same start, prompts and steps.

    python scripts/bench/constitution.py --profile laptop                  (about ten minutes of one core a run)
    python scripts/bench/constitution.py --profile laptop --runs model --seeds 3 --set constitution.rounds=2

Violations are measured by rules on held-out prompts, helpfulness by the gold rule without safety; intervals are 95 %.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

RUNS = {
    "rules": ["constitution.judge=rules", "constitution.reward=rules"],  # rules judge, and PPO follows them directly
    "reward model": ["constitution.judge=rules", "constitution.reward=model"],  # rules judge, a reward model learns it
    "model": ["constitution.judge=model", "constitution.reward=model"],  # the paper's: a model criticises and judges
    "no PPO": ["constitution.judge=rules", "constitution.ppo_episodes=0"],  # revisions alone
}
HEADS = ("violations", "violations/red", "helpfulness", "needless", "words")


def measure(run: str, profile: str, overrides: list[str]) -> dict:
    "One run of the phase."
    from deepseek_cookbook.ppo.constitution import constitution_phase
    from deepseek_cookbook.settings import RunFolder, load_settings

    quiet = ["sft.disable_tqdm=true", "reward.disable_tqdm=true"]
    settings = load_settings(profile, [*quiet, "constitution.rounds=3", *RUNS[run], *overrides])
    with tempfile.TemporaryDirectory() as folder:
        began, cpu = time.perf_counter(), time.process_time()
        result = constitution_phase(settings, RunFolder(Path(folder)))
    return result | dict(seconds=time.perf_counter() - began, cpu_seconds=time.process_time() - cpu)


def add_rows(table: Table, run: str, result: dict) -> None:
    "A row a stage."
    show = lambda x: f"{x['value']:.2f} ({x['low']:.2f}-{x['high']:.2f})"  # noqa: E731
    for stage in result["measured"]:
        table.add_row(run, stage["stage"], *(show(stage[h]) for h in HEADS))
    for r in result["rounds"]:
        counts = ", ".join(f"{v} {k}" for k, v in r["answers"].items() if k not in ("steps", "seconds", "answers"))
        table.add_row("", f"{r['round']}: {counts}; {r['ai_pairs']} pairs; reward {r['reward']}; {r['seconds']:.0f} s")
    table.add_row("", f"{result['seconds']:.0f} s, {result['cpu_seconds']:.0f} CPU s", end_section=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--profile", default="tiny")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--set", nargs="*", default=[], help="settings, such as constitution.rounds=2")
    parser.add_argument("--json", help="a file for all figures")
    args = parser.parse_args()
    table, found = Table(title=f"{args.profile}: rounds of a constitution"), {}
    for head in ("run", "stage", *HEADS):
        table.add_column(head)
    for run in args.runs:
        for seed in range(42, 42 + args.seeds):
            name = f"{run}, seed {seed}"
            found[name] = measure(run, args.profile, [f"run.seed={seed}", *args.set])
            add_rows(table, name, found[name])
            if args.json:
                Path(args.json).write_text(json.dumps(found, indent=1, default=str))
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
