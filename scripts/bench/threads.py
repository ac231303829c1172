"""Three ways to choose threads, side by side in one run: SFT, reward model and PPO, on a quiet machine and a busy one.

    .venv/bin/python scripts/bench/threads.py --busy                 (about 8 minutes of two cores)
    .venv/bin/python scripts/bench/threads.py --rounds 2 --spins 10000 30000

Each contender trains all three in a process of its own, in turns; every second round goes backwards. With --busy all
of it runs once more while a child process keeps one core busy. Seconds are those of `train()`, without loading and
evaluation; tokens/s counts the tokens of SFT and reward model without padding, completions/s those of PPO. The result
goes to scripts/bench/results/threads.json.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from deepseek_cookbook.threads import MARK, NAMES, choose_threads, current, look, usable_cores

RESULTS = Path(__file__).resolve().parent / "results" / "threads.json"
CORES = str(usable_cores())
BEFORE, ONE, CHOSEN = "threads that sleep at once", "one thread", "chosen"
CONTENDERS = {
    BEFORE: {"OMP_NUM_THREADS": CORES, "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"},
    ONE: {"OMP_NUM_THREADS": "1"},
    CHOSEN: {},
}
TASKS = {"sft": "tokens/s", "reward": "tokens/s", "ppo": "completions/s"}


# ---------------------------------------------------------------- one contender, in a process of its own


def settings_for(profile: str, steps: dict[str, int], folder: str):
    "No evaluation and no checkpoint on the way: steps only."
    from deepseek_cookbook.settings import load_settings

    trainer = ("eval_strategy=no", "save_steps=100000", "load_best_model_at_end=false", "disable_tqdm=true",
               "logging_steps=1")
    chosen = load_settings(profile, [
        f"run.folder={folder}", f"sft.max_steps={steps['sft']}", f"reward.max_steps={steps['reward']}",
        *(f"{section}.{option}" for section in ("sft", "reward") for option in trainer)])
    chosen["ppo"]["total_episodes"] = steps["ppo"] * chosen.build("ppo").batch_size
    return chosen


@contextmanager
def clocked(trainer: type):
    "Wall and CPU seconds of `trainer.train`, in the dict that is given."
    seen, train = {}, trainer.train

    def timed(self, *args, **kwargs):
        wall, cpu = time.perf_counter(), time.process_time()
        result = train(self, *args, **kwargs)
        seen.update(seconds=time.perf_counter() - wall, cpu_seconds=time.process_time() - cpu)
        return result

    trainer.train = timed
    try:
        yield seen
    finally:
        trainer.train = train


def tokens_in(folder: Path) -> int:
    from deepseek_cookbook.monitor import read_metrics

    return max(int(row["num_tokens"]) for row in read_metrics(folder / "metrics.jsonl") if "num_tokens" in row)


def train_three(settings, folder: Path) -> dict[str, dict]:
    "The three trainings; what was done, wall and CPU seconds of each."
    import transformers

    from deepseek_cookbook.data.mix import data_phase
    from deepseek_cookbook.ppo.task import task_rows, train_ppo
    from deepseek_cookbook.ppo.train import PPOTrainer
    from deepseek_cookbook.reward.model import train_reward
    from deepseek_cookbook.reward.pairs import bank_pairs, gold_reward
    from deepseek_cookbook.settings import read_jsonl
    from deepseek_cookbook.sft.train import train_sft

    run, own, seed = settings.run_folder, settings.build("reward_model"), settings.build("run").seed
    data_phase(settings, run)
    rows = [read_jsonl(run.phase("data") / f"{name}.jsonl") for name in ("train", "validation")]
    pairs = bank_pairs(own.pairs + own.validation, seed, own.heldout, own.chinese)[0]
    with clocked(transformers.Trainer) as sft:
        train_sft(settings, *rows, folder / "sft")
    with clocked(transformers.Trainer) as reward:
        train_reward(settings, pairs[own.validation:], pairs[:own.validation], folder / "reward")
    with clocked(PPOTrainer) as ppo:
        train_ppo(settings, task_rows(settings.build("task"), seed)[0], gold_reward, folder / "ppo", quiet=True)
    sft["done"], reward["done"] = tokens_in(folder / "sft"), tokens_in(folder / "reward")
    ppo["done"] = settings["ppo"]["total_episodes"]
    return dict(sft=sft, reward=reward, ppo=ppo)


def child(args):
    choose_threads()
    from deepseek_cookbook.cli import quiet_libraries
    from deepseek_cookbook.pipeline import made_with

    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_for(args.profile, steps_of(args), folder)
        tasks = train_three(settings, Path(folder))
    print("RESULT " + json.dumps(dict(tasks=tasks, threads=str(current()), made_with=made_with(),
                                      seed=settings.build("run").seed)))


# ---------------------------------------------------------------- all of them


def steps_of(args) -> dict[str, int]:
    return dict(zip(TASKS, args.steps, strict=True))


@contextmanager
def load(busy: bool):
    "One core at work for somebody else, or none."
    if not busy:
        yield
        return
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        other.kill()
        other.wait()


def run_contender(variables: dict[str, str], args) -> dict:
    clean = {k: v for k, v in os.environ.items() if k not in (*NAMES, MARK)}
    command = [sys.executable, __file__, "--child", "--profile", args.profile, "--steps", *map(str, args.steps)]
    done = subprocess.run(command, env={**clean, "HF_HUB_OFFLINE": "1", **variables}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(done.stdout.split("RESULT ")[-1].splitlines()[0])


def measure(args) -> list[dict]:
    "All runs, in the order in which they ran."
    contenders = dict(CONTENDERS)
    for spin in args.spins:
        contenders[f"{CORES} threads, spin {spin}"] = {"OMP_NUM_THREADS": CORES, "GOMP_SPINCOUNT": str(spin)}
    runs = []
    for busy in (False, True)[:1 + args.busy]:
        for i in range(args.rounds):
            for name in list(contenders)[:: -1 if i % 2 else 1]:
                with load(busy):
                    found = run_contender(contenders[name], args)
                runs.append(dict(load="one core busy" if busy else "quiet", round=i, contender=name, **found))
                rates = {t: round(r["done"] / r["seconds"], 2) for t, r in found["tasks"].items()}
                print(runs[-1]["load"], "|", name, "|", rates, "|", found["threads"], file=sys.stderr, flush=True)
    return runs


def summary(runs: list[dict]) -> list[dict]:
    "Rates over all rounds, and their ratio to the two rules that don't look."
    rows = []
    for state in dict.fromkeys(r["load"] for r in runs):
        for task, unit in TASKS.items():
            rates, cpu = {}, {}
            for name in dict.fromkeys(r["contender"] for r in runs):
                tasks = [r["tasks"][task] for r in runs if (r["load"], r["contender"]) == (state, name)]
                rates[name] = sum(t["done"] for t in tasks) / sum(t["seconds"] for t in tasks)
                cpu[name] = sum(t["cpu_seconds"] for t in tasks) / len(tasks)
            rows += [dict(load=state, task=task, unit=unit, contender=name, rate=rate, cpu_seconds=cpu[name],
                          to_before=rate / rates[BEFORE], to_one=rate / rates[ONE]) for name, rate in rates.items()]
    return rows


def show(rows: list[dict], title: str):
    table = Table(title=title, title_justify="left")
    for head in ("load", "task", "threads", "rate", "unit", "CPU s", "to sleeping", "to one thread"):
        table.add_column(head, justify="left" if head in ("load", "task", "threads", "unit") else "right")
    for r in rows:
        table.add_row(r["load"], r["task"], r["contender"], f"{r['rate']:.2f}", r["unit"], f"{r['cpu_seconds']:.0f}",
                      f"{r['to_before']:.2f}x", f"{r['to_one']:.2f}x")
    Console(width=130).print(table)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="laptop")
    parser.add_argument("--steps", type=int, nargs=3, default=[12, 8, 2], metavar=("SFT", "REWARD", "PPO"))
    parser.add_argument("--rounds", type=int, default=1, help="of all contenders, every second one backwards")
    parser.add_argument("--busy", action="store_true", help="then again with one core kept busy")
    parser.add_argument("--spins", type=int, nargs="*", default=[], help="more contenders: all cores, spin so long")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args)
    began, at_start = time.perf_counter(), str(look({}))
    runs = measure(args)
    rows = summary(runs)
    last = next(r for r in reversed(runs) if r["contender"] == CHOSEN)
    kept = ("load", "round", "contender", "threads", "tasks")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(dict(
        command=shlex.join(["scripts/bench/threads.py", *sys.argv[1:]]), profile=args.profile, steps=steps_of(args),
        seed=last["seed"], at_start=at_start, seconds=round(time.perf_counter() - began), made_with=last["made_with"],
        rows=rows, runs=[{k: r[k] for k in kept} for r in runs]), indent=1) + "\n")
    show(rows, f"{last['made_with']['processor']}, profile {args.profile}; at the start: {at_start}")


if __name__ == "__main__":
    main()
