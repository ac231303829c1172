"""SFT side by side in one run: ours, and TRL's SFTTrainer alone on the same data, model, LoRA and arguments.

    .venv/bin/python scripts/bench/sft.py --steps 24          (make bench)

Each contender runs in a process of its own, in turns (ours, bare, bare, ours), so that neither meets a warmer machine.
tokens/s counts the tokens of the rows, not the padding, over the wall time of trainer.train() without evaluation.
"ours" takes the attention kernel of [train]; "ours, model's kernel" and all bare ones take that of [model]. All have
the dropout of [lora] but the one that names another.
"bare" is TRL's SFTTrainer with the same arguments, but padded batches as it makes them by default; the other
bare ones change one thing: rows end to end, rows of like length together, gradient checkpointing as TRL has it.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

CONTENDERS = (
    "ours", "ours, model's kernel", "ours, dropout 0.05", "bare", "bare, padding-free", "bare, grouped by length",
    "bare, TRL defaults",
)  # fmt: skip


def records(settings):
    from deepseek_cookbook.data.formats import load_records
    from deepseek_cookbook.data.mix import drop_copies, split_records

    kept, _ = drop_copies(load_records(settings["data"]["source"])[0])
    return split_records(kept, settings["data"]["validation"], settings.build("run").seed)


def measure(trainer) -> dict:
    from deepseek_cookbook.monitor import peak_memory_gib

    wall, cpu = time.perf_counter(), time.process_time()
    trainer.train()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    tokens = trainer._total_train_tokens
    loss = [row["loss"] for row in trainer.state.log_history if "loss" in row][-1]
    return dict(tokens=tokens, wall=wall, cpu=cpu, loss=float(loss), peak=peak_memory_gib())


def contender(name: str, settings, folder: str) -> dict:
    import transformers

    from deepseek_cookbook.models import load_model, load_tokenizer, with_attention
    from deepseek_cookbook.sft.train import make_trainer, sft_config, to_dataset

    train, validation = records(settings)
    transformers.set_seed(settings.build("run").seed)
    if name == "ours, dropout 0.05":
        settings["lora"]["lora_dropout"] = 0.05
    own = settings.build("train").attention if name in ("ours", "ours, dropout 0.05") else None
    model = load_model(**with_attention(settings["model"], own))
    tokenizer = load_tokenizer(settings["model"]["name"])
    if name.startswith("ours"):
        from deepseek_cookbook.monitor import MetricsLog, MonitorCallback, make_guards

        monitor = MonitorCallback(MetricsLog(Path(folder) / "metrics.jsonl"), make_guards(settings.build("monitor")))
        trainer = make_trainer(settings, train, validation, folder, model, tokenizer, [monitor])
    else:
        from trl import SFTTrainer

        config = sft_config(settings, folder)
        config.padding_free, config.max_length = name == "bare, padding-free", None
        config.train_sampling_strategy = "group_by_length" if "grouped" in name else "random"
        if name == "bare, TRL defaults":
            config.gradient_checkpointing = config.activation_checkpointing = True
        trainer = SFTTrainer(model, config, train_dataset=to_dataset(train, tokenizer), processing_class=tokenizer,
                             eval_dataset=to_dataset(validation, tokenizer), peft_config=settings.build("lora"))
    return measure(trainer)


def child(args):
    import tempfile

    from deepseek_cookbook.settings import load_settings

    settings = load_settings(args.profile, [
        f"sft.num_train_epochs={args.epochs}", f"sft.max_steps={args.steps}", "sft.eval_strategy=no",
        "sft.save_steps=100000", "sft.load_best_model_at_end=false", "sft.disable_tqdm=true", *args.set])
    with tempfile.TemporaryDirectory() as folder:
        print("RESULT " + json.dumps(contender(args.child, settings, folder)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default=os.environ.get("DSC_PROFILE", "laptop"))
    parser.add_argument("--steps", type=int, default=-1, help="training steps; -1: one whole epoch")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--rounds", type=int, default=1, help="of all contenders, every second one backwards")
    parser.add_argument("--set", nargs="*", default=[], help="settings, such as sft.bf16=false")
    parser.add_argument("--only", nargs="*", default=CONTENDERS[:5])
    parser.add_argument("--child")
    args = parser.parse_args()
    if args.child:
        return child(args)
    runs = {name: [] for name in args.only}
    for i in range(args.rounds):
        for name in list(args.only)[:: -1 if i % 2 else 1]:
            command = [sys.executable, __file__, "--child", name, "--profile", args.profile, "--steps", str(args.steps),
                       "--epochs", str(args.epochs), "--set", *args.set]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr[-3000:])
            runs[name].append(json.loads(done.stdout.split("RESULT ")[-1].splitlines()[0]))
            print(name, runs[name][-1], file=sys.stderr, flush=True)
    where = f"{platform.machine()}, {os.cpu_count()} cores"
    table = Table(title=f"SFT, profile {args.profile}, {where}, mean of {args.rounds}")
    for column in ("", "tokens/s", "tokens/CPU s", "to bare", "peak GiB", "last loss"):
        table.add_column(column, justify="left" if not column else "right")
    rate = {n: sum(r["tokens"] for r in rs) / sum(r["wall"] for r in rs) for n, rs in runs.items()}
    for name, rs in runs.items():
        per_cpu = sum(r["tokens"] for r in rs) / sum(r["cpu"] for r in rs)
        ratio = f"{rate[name] / rate['bare']:.2f}x" if "bare" in rate else ""
        table.add_row(name, f"{rate[name]:.0f}", f"{per_cpu:.0f}", ratio, f"{max(r['peak'] for r in rs):.2f}",
                      f"{sum(r['loss'] for r in rs) / len(rs):.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
