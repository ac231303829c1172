"""Hold the planner's memory estimate beside the measured peak of training steps of the embedded model on a CPU.

    python scripts/bench/memory.py [--steps 4] [--limit 0.25] [--json FILE]

Every case runs in a fresh process, twice: with a malloc that gives freed blocks back (what the tensors need) and with
the system's default one (what a user sees; with checkpointing the trainer calls `return_freed_memory`, and so does
this script). Measured is the peak of resident memory minus what was resident after the
imports, before the model was loaded. Exit code 1 where an estimate is off by more than the limit.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
from dataclasses import replace

from deepseek_cookbook.planner import ALL_LINEAR, make_job, memory

MODEL = "smollm2-135m-instruct"
QV = ("q_proj", "v_proj")
MIB = 2**20
# Trainer, method, sequences, tokens a sequence, dtype, targets, checkpointing.
CASES = [
    ("loop", "lora", 4, 128, "fp32", QV, False),
    ("loop", "lora", 4, 256, "fp32", QV, False),
    ("loop", "lora", 4, 128, "mixed", ALL_LINEAR, False),
    ("loop", "lora", 8, 256, "mixed", ALL_LINEAR, False),
    ("loop", "full", 4, 128, "fp32", ALL_LINEAR, False),
    ("loop", "full", 4, 256, "fp32", ALL_LINEAR, False),
    ("loop", "full", 4, 256, "mixed", ALL_LINEAR, False),
    ("loop", "full", 8, 256, "fp32", ALL_LINEAR, True),
    ("trl", "lora", 8, 256, "mixed", ALL_LINEAR, False),
    # Not among the cases that the allocator's factor was fitted on.
    ("loop", "lora", 6, 192, "mixed", QV, False),
    ("loop", "lora", 4, 256, "fp32", ALL_LINEAR, True),
    ("loop", "full", 6, 192, "mixed", ALL_LINEAR, True),
    ("loop", "lora", 6, 256, "mixed", ALL_LINEAR, True),
    ("loop", "lora", 2, 384, "fp32", QV, False),
]
# The threshold is fixed, so malloc neither raises it nor keeps larger blocks.
RETURNS = {"MALLOC_MMAP_THRESHOLD_": "131072"}


def build_job(trainer, method, rows, seq_len, dtype, targets, checkpointing):
    "The planner's view of a case."
    return make_job(
        MODEL, method, "cpu", batch=rows, seq_len=seq_len, dtype=dtype, targets=targets, checkpointing=checkpointing,
        loss="tiled" if trainer == "trl" else "full",
    )  # fmt: skip


def predict(case) -> tuple[float, float]:
    "Predicted peak in MiB: with a malloc that gives back, and with the default one."
    job = build_job(*case)
    parts = memory(job, rows=job.batch)
    used = replace(parts, reserve=0, allocator=0).peak
    return used / MIB, (used + parts.allocator) / MIB


def resident() -> int:
    "Bytes of resident memory now."
    import psutil

    return psutil.Process().memory_info().rss


def peak() -> int:
    "The largest resident memory of this process so far, in bytes."
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run_loop(case, steps: int) -> None:
    "Plain training steps: forward, backward, AdamW."
    import torch
    from peft import LoraConfig, get_peft_model

    from deepseek_cookbook.models import load_model

    _, method, rows, seq_len, dtype, targets, checkpointing = case
    model = load_model(MODEL, dtype="float32")
    if method == "lora":
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules=targets))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(0, 49152, (rows, seq_len))
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "mixed"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def run_trl(case, steps: int) -> None:
    "The same by TRL's SFTTrainer, whose loss is computed in tiles."
    import tempfile

    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    from deepseek_cookbook.models import load_model, load_tokenizer

    _, _, rows, seq_len, dtype, targets, checkpointing = case
    data = Dataset.from_dict({"input_ids": torch.randint(0, 49152, (rows * steps, seq_len)).tolist()})
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            folder, per_device_train_batch_size=rows, max_steps=steps, max_length=seq_len, bf16=dtype == "mixed",
            use_cpu=True, gradient_checkpointing=checkpointing, report_to="none", save_strategy="no",
            disable_tqdm=True, learning_rate=1e-4,
        )  # fmt: skip
        adapter = LoraConfig(
            r=16, lora_alpha=32, lora_dropout=0.05, target_modules=list(targets), task_type="CAUSAL_LM"
        )
        model, tokenizer = load_model(MODEL, dtype="float32"), load_tokenizer(MODEL)
        SFTTrainer(model, config, train_dataset=data, processing_class=tokenizer, peft_config=adapter).train()


def child(case, steps: int) -> None:
    "Run one case and print its measured peak in MiB."
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import torch
    from trl import SFTConfig, SFTTrainer  # noqa: F401

    from deepseek_cookbook.models import return_freed_memory

    torch.manual_seed(0)
    if case[-1]:
        return_freed_memory()
    before = resident()
    (run_trl if case[0] == "trl" else run_loop)(case, steps)
    print(json.dumps({"imports": before / MIB, "peak": (peak() - before) / MIB}))


def measure(case, steps: int, returns: bool) -> dict:
    "Run one case in a process of its own."
    env = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "HF_HUB_OFFLINE": "1"}
    env.setdefault("OMP_NUM_THREADS", "1")
    env = env | RETURNS if returns else {k: v for k, v in env.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, __file__, "--child", json.dumps(case), "--steps", str(steps)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    if run.returncode:
        raise SystemExit(f"{case}: {run.stderr.strip().splitlines()[-1:]}")
    return json.loads(run.stdout.strip().splitlines()[-1])


def main() -> int:
    "Measure all cases, print the table, and say whether the estimates hold."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--limit", type=float, default=0.25)
    parser.add_argument("--json", help="also write the rows here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(json.loads(args.child), args.steps)
        return 0
    rows, worst = [], 0.0
    print(f"peak in MiB beyond the imports; {MODEL}, {platform.processor() or platform.machine()}")
    print("| case | predicted, tensors | measured | error | predicted, default malloc | measured | error |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for case in CASES:
        used, total = predict(case)
        found = measure(case, args.steps, True)["peak"], measure(case, args.steps, False)["peak"]
        errors = used / found[0] - 1, total / found[1] - 1
        worst = max(worst, *map(abs, errors))
        trainer, method, n, seq_len, dtype, targets, checkpointing = case
        name = f"{method}{' q, v' if method == 'lora' and targets == QV else ''}, {n} x {seq_len}, {dtype}"
        name += ", checkpointing" * checkpointing + ", SFTTrainer" * (trainer == "trl")
        print(
            f"| {name} | {used:,.0f} | {found[0]:,.0f} | {errors[0]:+.0%} "
            f"| {total:,.0f} | {found[1]:,.0f} | {errors[1]:+.0%} |",
            flush=True,
        )
        rows.append({"case": name, "predicted": [used, total], "measured": found})
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=2)
    print(f"largest error {worst:.0%}, limit {args.limit:.0%}")
    return int(worst > args.limit)


if __name__ == "__main__":
    raise SystemExit(main())
