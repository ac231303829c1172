"""LoRA on a randomly initialised model of 7 billion parameters, over bf16 and over NF4, on the GPU at hand.

    .venv/bin/python scripts/bench/gpu_sft.py                                   (a GPU with 24 GB or more)
    .venv/bin/python scripts/bench/gpu_sft.py --device cpu --layers 2 --hidden 64      (a toy, to try the script)

The shape is that of deepseek-llm-7b-base. Random weights are as fast and as large as trained ones; only the loss means
nothing. The weights are written once to a temporary folder in bf16 (13 GB) and loaded by load_model, as everyone does.
Each case is a process of its own. Rows are random tokens of one length, so that there is no padding. Time is that of
the steps after the first --warmup. MFU counts the operations that the model needs (forward, and backward to the
activations; frozen weights need no gradient); "hardware" counts the recomputation of checkpointing as well.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CASES = ("bf16", "nf4")
TOY = 50e6  # parameters, for a run without a GPU


def shape_of(args):
    from deepseek_cookbook.registry import Shape

    heads = args.heads or max(1, args.hidden // 128)
    inter = args.inter or (11008 if args.hidden == 4096 else 256 * -(-args.hidden * 8 // 3 // 256))
    vocab = args.vocab or (102400 if args.hidden == 4096 else 1024)
    return Shape(args.layers, args.hidden, heads, heads, inter, vocab)


def refuse(args, shape) -> str | None:
    "Why this can't run here."
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        return ("no CUDA device. Run it on a machine with one; to try the script, ask for a toy: "
                "--device cpu --layers 2 --hidden 64")
    if args.device == "cpu" and shape.parameters > TOY:
        return (f"{shape.parameters / 1e9:.2f} billion parameters on a CPU would say nothing; at most "
                f"{TOY / 1e6:.0f} million. A toy: --device cpu --layers 2 --hidden 64")
    return None


def write_random(folder: str, shape, args):
    "A Llama of this shape with seeded random weights, and a small tokenizer, which is not used for the rows."
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from deepseek_cookbook.weights import tiny_tokenizer

    config = LlamaConfig(vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
                         num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
                         num_key_value_heads=shape.kv_heads, max_position_embeddings=max(4096, args.seq_len),
                         tie_word_embeddings=False, dtype="bfloat16")
    torch.manual_seed(args.seed)
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tiny_tokenizer("<｜end▁of▁sentence｜>").save_pretrained(folder)


def rows_of(shape, args):
    import torch
    from datasets import Dataset

    count = args.steps * args.batch * args.accumulation
    draw = torch.Generator().manual_seed(args.seed)
    ids = torch.randint(shape.vocab, (count, args.seq_len), generator=draw).tolist()
    return Dataset.from_dict(dict(input_ids=ids, labels=ids))


def clock(warmup: int):
    "A callback that notes the end of each step."
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self):
            self.ends, self.losses = [], []

        def on_step_end(self, args, state, control, **kwargs):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.losses += [float(logs["loss"])] if "loss" in (logs or {}) else []

        @property
        def seconds(self) -> float:  # of one step
            ends = self.ends[warmup - 1 :] if warmup else self.ends
            return (ends[-1] - ends[0]) / (len(ends) - 1)

    return Clock()


def train(case: str, shape, args) -> dict:
    "One case: seconds a step, losses, peak memory."
    import torch
    import transformers
    from peft import prepare_model_for_kbit_training
    from trl import SFTTrainer

    from deepseek_cookbook.models import load_model, load_tokenizer
    from deepseek_cookbook.monitor import peak_memory_gib
    from deepseek_cookbook.settings import load_settings
    from deepseek_cookbook.sft.train import sft_config

    settings = load_settings("gpu", [
        f"sft.max_steps={args.steps}", f"sft.per_device_train_batch_size={args.batch}", f"run.seed={args.seed}",
        f"sft.gradient_accumulation_steps={args.accumulation}", f"sft.max_length={args.seq_len}", "sft.packing=false",
        "sft.assistant_only_loss=false", "sft.eval_strategy=no", "sft.save_strategy=no", "sft.logging_steps=1",
        "sft.load_best_model_at_end=false", "sft.disable_tqdm=true",
        f"sft.activation_checkpointing={str(not args.no_checkpointing).lower()}"])
    transformers.set_seed(args.seed)
    model = load_model(args.folder, dtype="bfloat16", quantization="nf4" if case == "nf4" else None,
                       device=args.device)
    if case == "nf4":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    watch = clock(args.warmup)
    with tempfile.TemporaryDirectory() as folder:
        config = sft_config(settings, folder)
        config.use_cpu, config.bf16 = args.device == "cpu", True
        trainer = SFTTrainer(model, config, train_dataset=rows_of(shape, args), callbacks=[watch],
                             processing_class=load_tokenizer(args.folder), peft_config=settings.build("lora"))
        trainer.train()
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    reserved = torch.cuda.max_memory_reserved() / 2**30 if torch.cuda.is_available() else None
    return dict(seconds=watch.seconds, first=watch.losses[0], last=watch.losses[-1], peak=peak_memory_gib(),
                reserved=reserved, trainable=trainable, attention=trainer.model.config._attn_implementation,
                rank=settings["lora"]["r"])


def job_of(case: str, shape, args, device=None, checkpointing=None):
    "The same run for the planner."
    from deepseek_cookbook.planner import GPUS, Job, check_job

    return check_job(Job(shape, "qlora" if case == "nf4" else "lora", batch=args.batch * args.accumulation,
                         seq_len=args.seq_len, device=device or GPUS["a100-80g"],
                         checkpointing=not args.no_checkpointing if checkpointing is None else checkpointing))


def card(name: str):
    "The planner's entry of a GPU, by the name that the driver gives it; None: unknown."
    from deepseek_cookbook.planner import GPUS

    plain = name.lower().replace(" ", "")
    found = [k for k in GPUS if k != "cpu" and k.split("-")[0] in plain]
    return GPUS[found[0]] if found else None


def figures(case: str, shape, args, got: dict, gpu) -> dict:
    "Rates and utilisation from seconds."
    from deepseek_cookbook.planner import memory, train_flops

    tokens = args.batch * args.accumulation * args.seq_len
    rate = tokens / got["seconds"]
    peak = (args.tflops or (gpu.tflops if gpu else 0)) * 1e12
    share = {k: rate * train_flops(job_of(case, shape, args, gpu, c)) / peak if peak else None
             for k, c in dict(mfu=False, hardware=None).items()}
    planned = memory(job_of(case, shape, args, gpu), args.batch) if args.device == "cuda" else None
    return got | share | dict(rate=rate, planned=planned and (planned.peak - planned.reserve) / 2**30)


def table(rows: dict[str, dict]) -> str:
    "Peak and plan are those of tensors; what the driver and the libraries take comes on top."
    lines = ["| base | trained parameters | s/step | tokens/s | MFU | hardware | peak GiB | planned GiB | reserved GiB "
             "| loss, first -> last |", "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|"]

    def percent(x):
        return "unknown" if x is None else f"{x:.1%}"

    for case, r in rows.items():
        planned, reserved = ("" if r[k] is None else f"{r[k]:.2f}" for k in ("planned", "reserved"))
        lines.append(f"| {case} | {r['trainable']:,} | {r['seconds']:.3g} | {r['rate']:,.0f} | {percent(r['mfu'])} | "
                     f"{percent(r['hardware'])} | {r['peak']:.2f} | {planned} | {reserved} | "
                     f"{r['first']:.2f} -> {r['last']:.2f} |")
    return "\n".join(lines)


def child(args):
    shape = shape_of(args)
    out = write_random(args.folder, shape, args) or {} if args.child == "write" else train(args.child, shape, args)
    print("RESULT " + json.dumps(out))


def run(case: str, argv: list[str], folder: str) -> dict:
    done = subprocess.run([sys.executable, __file__, *argv, "--child", case, "--folder", folder], capture_output=True,
                          text=True)
    if done.returncode:
        sys.exit(f"{case}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.split("RESULT ")[-1].splitlines()[0])


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--heads", type=int, help="default: 128 wide each")
    parser.add_argument("--inter", type=int, help="inner width; default: that of the 7B model, or 8/3 hidden")
    parser.add_argument("--vocab", type=int, help="default: 102400, or 1024 for another width")
    parser.add_argument("--batch", type=int, default=4, help="rows of a micro-batch")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=2, help="steps that are not timed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-checkpointing", action="store_true", help="keep all activations")
    parser.add_argument("--tflops", type=float, help="dense bf16 peak of the device, where the planner has none")
    parser.add_argument("--only", nargs="*", default=CASES, choices=CASES)
    parser.add_argument("--child")
    parser.add_argument("--folder")
    return parser


def main():
    parser = arguments()
    args = parser.parse_args()
    if args.child:
        return child(args)
    if args.steps < args.warmup + 2:
        parser.error(f"--steps {args.steps}: {args.warmup + 2} or more are needed to time a step after the warm-up")
    import torch

    from deepseek_cookbook.sft.adapters import machine

    shape = shape_of(args)
    if why := refuse(args, shape):
        sys.exit(why)
    gpu = card(torch.cuda.get_device_name()) if args.device == "cuda" else None
    with tempfile.TemporaryDirectory() as folder:
        run("write", sys.argv[1:], folder)
        size = sum(p.stat().st_size for p in Path(folder).glob("*.safetensors")) / 2**30
        rows = {case: figures(case, shape, args, run(case, sys.argv[1:], folder), gpu) for case in args.only}
    where, one = machine(), next(iter(rows.values()))
    print(f"Random weights: {shape.parameters / 1e9:.2f} billion parameters ({size:.1f} GiB in bf16), {shape.layers} "
          f"layers, width {shape.hidden}, {shape.vocab} tokens; LoRA r={one['rank']}, all linear layers; {args.batch} "
          f"x {args.accumulation} rows of {args.seq_len} tokens, {args.steps} steps, {args.warmup} of them not timed, "
          f"{one['attention']}, checkpointing {'off' if args.no_checkpointing else 'on'}, seed {args.seed}; "
          f"{where['hardware']}; {where['versions']}\n")
    print(table(rows))


if __name__ == "__main__":
    main()
