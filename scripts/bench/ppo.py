"""PPO side by side in one go: ours, and TRL's last PPOTrainer (1.12.0, trl.experimental.ppo) on the same work.

    .venv/bin/python scripts/bench/ppo.py --updates 5          (make bench-ppo)

TRL 1.12.0 lives in an environment of its own, .venv-trl112, that this script builds beside .venv: the same torch,
transformers and peft, and another TRL. Every contender runs in a process of its own, in turns and every second round
backwards, so that its peak memory is its own and none meets a warmer machine. All have the same model, prompts, LoRA,
lengths, epochs, minibatches, reward model, threads and arithmetic (one autocast around the whole of TRL's train(),
whose own reaches only its training pass). The first update is not counted.

ours                 one base in memory: the policy is an adapter, the reference is the base, the value a head on the
                     reference's last hidden states, which are computed once a step
ours, value adapter  the value has an adapter of its own, in all layers
ours, upper          the policy's adapter in the upper layers only; what lies below is computed once a step
TRL                  policy and reference share a base; a value model of its own, with the same LoRA
TRL, head            the same, but of the value model only the head is trained: no backward pass through it
TRL, full            the same, but the whole value model is trained, as TRL's example script does
"""

import argparse
import gc
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent.parent
TRL = "trl==1.12.0"
CONTENDERS = ("ours", "TRL", "ours, upper", "TRL, head", "ours, value adapter")
ALL = (*CONTENDERS, "TRL, full")
# lower: hidden states of frozen layers that are kept; old: the policy's log-probabilities before the update
PARTS = ("generation", "reward", "lower", "old", "reference", "values", "training")


def old_environment(folder: Path) -> Path:
    "The Python of an environment with TRL 1.12.0 in front of everything that this one has; built if it isn't there."
    python = folder / "bin" / "python"
    if (folder / ".ready").is_file():
        return python
    shutil.rmtree(folder, ignore_errors=True)

    def run(*command):
        subprocess.run(command, check=True, stdout=sys.stderr)

    run(sys.executable, "-m", "venv", "--without-pip", str(folder))
    site = next(folder.glob("lib/python*/site-packages"))
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), TRL)
    ours = Path(sys.prefix) / site.relative_to(folder)
    (site / "beside.pth").write_text(f"import site; site.addsitedir({str(ours)!r})\n")
    run(str(python), "-c", "import trl; assert trl.__version__ == '1.12.0', trl.__version__")
    (folder / ".ready").touch()
    return python


# --- what the processes measure ---------------------------------------------------------------------------------


def peak_gib() -> float:
    "The largest resident memory of this process so far."
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30


class Clock:
    "Wall and CPU seconds by part; `marks` says where updates begin. After its block the functions are plain again."

    def __init__(self):
        self.parts, self.marks, self.tokens, self.end = defaultdict(lambda: [0.0, 0.0]), [], 0, None
        self.undo = ExitStack()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.undo.close()

    def now(self):
        return dict(wall=time.perf_counter(), cpu=time.process_time(), tokens=self.tokens,
                    parts={k: tuple(v) for k, v in self.parts.items()})

    def wrap(self, owner, name: str, part=None, begins: bool = False, tokens=None):
        "Count the time in `owner.name` as `part` (a name, or a function of the arguments; None: not counted)."
        plain = getattr(owner, name)

        def timed(*args, **kwargs):
            if begins:
                self.marks.append(self.now())
            label = part(*args, **kwargs) if callable(part) else part
            wall, cpu = time.perf_counter(), time.process_time()
            out = plain(*args, **kwargs)
            if label:
                self.parts[label][0] += time.perf_counter() - wall
                self.parts[label][1] += time.process_time() - cpu
            self.tokens += tokens(out, *args) if tokens else 0
            self.end = self.now()
            return out

        self.undo.enter_context(patch.object(owner, name, timed))

    def result(self, batch: int, warm: int = 1) -> dict:
        "What all updates but the first `warm` took, up to the end of the last function with a clock on it."
        if len(self.marks) <= warm:
            raise SystemExit(f"{len(self.marks)} updates, {warm} of them to warm up: nothing left to measure")
        first, last = self.marks[warm], self.end
        out = {}
        for i, t in enumerate(("wall", "cpu")):
            spent = {k: v[i] - first["parts"].get(k, (0.0, 0.0))[i] for k, v in last["parts"].items()}
            total = last[t] - first[t]
            out[t] = spent | dict(total=total, training=total - sum(spent.values()))
        updates = len(self.marks) - warm
        return out | dict(updates=updates, samples=updates * batch, tokens=last["tokens"] - first["tokens"])


def judge(plan: dict, vocabulary: int, pad: int):
    "The reward model of both sides: a classifier of two small layers, or one of the policy's size; random weights."
    import torch
    from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

    from deepseek_cookbook.models import locate

    with torch.random.fork_rng():
        torch.manual_seed(plan["seed"])
        if plan["reward"] == "full":
            return AutoModelForSequenceClassification.from_pretrained(
                **locate(plan["model"]), num_labels=1, dtype=torch.float32, pad_token_id=pad).eval()
        return LlamaForSequenceClassification(LlamaConfig(
            vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_labels=1, pad_token_id=pad, bos_token_id=None, eos_token_id=None)).eval()


class Scorer:
    "The same reward model as a reward function: prompts and completions in, numbers out."

    def __init__(self, plan: dict, tokenizer, vocabulary: int, dtype):
        self.model, self.tokenizer = judge(plan, vocabulary, tokenizer.pad_token_id), tokenizer
        self.dtype, self.__name__ = dtype, "judge"

    def __call__(self, prompts, completions, **columns):
        import torch

        from deepseek_cookbook.ppo.rollout import pad_rows, prompt_ids
        from deepseek_cookbook.reward.pairs import text_of

        rows = [prompt_ids(self.tokenizer, p) + self.tokenizer(text_of(c), add_special_tokens=False)["input_ids"]
                for p, c in zip(prompts, completions)]
        ids, mask = pad_rows(rows, self.tokenizer.pad_token_id)
        with torch.no_grad(), torch.autocast("cpu", self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            logits = self.model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
        return logits[:, 0].float().tolist()


def no_end(tokenizer, model):
    "All completions have the same length: the token that ends one is a word that the model hardly ever says."
    last = model.config.vocab_size - 1
    while last in tokenizer.all_special_ids:
        last -= 1
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(last)
    model.generation_config.eos_token_id = last


# --- the contenders ---------------------------------------------------------------------------------------------


def autocast_of(plan: dict):
    "The format that both sides multiply in: what the hardware prefers, or 32 bits."
    from deepseek_cookbook.models import precision

    return precision("cpu").autocast if plan["autocast"] == "auto" else None


def trl_value(plan: dict, kind: str, pad: int):
    "TRL's value model: a second backbone with a score head."
    import torch
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import AutoModelForSequenceClassification

    from deepseek_cookbook.models import locate

    value = AutoModelForSequenceClassification.from_pretrained(
        **locate(plan["model"]), num_labels=1, dtype=getattr(torch, plan["dtype"]), pad_token_id=pad)
    if kind == "TRL":
        value = inject_adapter_in_model(LoraConfig(**plan["lora"] | dict(task_type=None)), value)
    elif kind == "TRL, head":
        value.requires_grad_(False)
    value.score.requires_grad_(True)
    return value


def run_trl(plan: dict, kind: str, folder: str) -> dict:
    "TRL's PPOTrainer with a clock on its functions."
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import torch
    import trl.experimental.ppo.ppo_trainer as module
    from datasets import Dataset
    from peft import LoraConfig
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    from deepseek_cookbook.models import load_model, load_tokenizer

    imports = peak_gib()
    torch.manual_seed(plan["seed"])
    tokenizer, model = load_tokenizer(plan["model"]), load_model(plan["model"], dtype=plan["dtype"])
    no_end(tokenizer, model)
    tokenizer.padding_side, clock, fast = "left", Clock(), autocast_of(plan)
    rows, batch = Dataset.from_list([dict(input_ids=r["input_ids"]) for r in plan["rows"]]), plan["batch"]
    value = trl_value(plan, kind, tokenizer.pad_token_id)
    config = PPOConfig(
        folder, total_episodes=plan["updates"] * batch, num_ppo_epochs=plan["epochs"],
        num_mini_batches=plan["minibatches"], per_device_train_batch_size=plan["micro"],
        gradient_accumulation_steps=batch // plan["micro"] // plan["minibatches"],
        local_rollout_forward_batch_size=batch, response_length=plan["new_tokens"], stop_token="eos", temperature=1.0,
        learning_rate=plan["learning_rate"], lr_scheduler_type="constant", seed=plan["seed"], use_cpu=True, bf16=False,
        gradient_checkpointing=False, num_sample_generations=0, report_to="none", save_strategy="no",
        disable_tqdm=True, logging_steps=10**6)  # fmt: skip
    trainer = PPOTrainer(config, tokenizer, model, None, judge(plan, model.config.vocab_size, tokenizer.pad_token_id),
                         rows, value, eval_dataset=rows, peft_config=LoraConfig(**plan["lora"]))
    clock.wrap(trainer, "train")
    clock.wrap(module, "batch_generation", "generation", begins=True,
               tokens=lambda out, policy, queries, *rest: out[0][:, queries.shape[1]:].numel())
    clock.wrap(module, "forward", lambda *a, **k: None if torch.is_grad_enabled() else "reference")
    clock.wrap(module, "get_reward", lambda m, *a: "reward" if m is trainer.reward_model else "values")
    with clock, torch.autocast("cpu", fast or torch.bfloat16, enabled=fast is not None):
        trainer.train()
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    return clock.result(batch) | dict(peak=peak_gib(), imports=imports, trained=trained)


def run_ours(plan: dict, kind: str, folder: str) -> dict:
    "Our trainer with the same clock."
    from peft.tuners.tuners_utils import BaseTunerLayer

    from deepseek_cookbook.models import load_model, load_tokenizer
    from deepseek_cookbook.ppo import batch as looks
    from deepseek_cookbook.ppo import train as module
    from deepseek_cookbook.ppo.policy import make_models
    from deepseek_cookbook.ppo.rollout import RolloutConfig

    imports, clock = peak_gib(), Clock()
    layers = dict(upper_layers=plan["upper"] if kind == "ours, upper" else None,
                  value_layers=None if "adapter" in kind else 0)
    tokenizer = load_tokenizer(plan["model"])
    base = load_model(plan["model"], dtype=plan["dtype"], attention=plan["attention"])
    no_end(tokenizer, base)
    scorer = Scorer(plan, tokenizer, base.config.vocab_size, autocast_of(plan))
    models = make_models(base, plan["lora"], **layers, seed=plan["seed"])
    config = module.PPOConfig(
        total_episodes=plan["updates"] * plan["batch"], batch_size=plan["batch"], num_mini_batches=plan["minibatches"],
        num_ppo_epochs=plan["epochs"], per_device_train_batch_size=plan["micro"], learning_rate=plan["learning_rate"],
        value_learning_rate=plan["learning_rate"], **layers, save_steps=10**6)
    rollout = RolloutConfig(plan["new_tokens"], batch_size=plan["batch"], autocast=plan["autocast"])
    rows = [dict(prompt=r["prompt"]) for r in plan["rows"]]
    trainer = module.PPOTrainer(config, models, tokenizer, rows, scorer, folder, rollout, seed=plan["seed"], quiet=True)

    def whose(model, *rest, **more):
        layer = next(m for m in model.modules() if isinstance(m, BaseTunerLayer))
        return "old" if "policy" in layer.active_adapters else "reference"

    with clock:
        clock.wrap(module.PPOTrainer, "one_step", begins=True)
        clock.wrap(module, "sample", "generation", tokens=lambda out, *a: int(out.lengths_B.sum()))
        clock.wrap(module, "scored", "reward")
        clock.wrap(looks, "score", whose)
        clock.wrap(looks, "keep_lower", "lower")
        clock.wrap(looks, "values_of", "values")
        trainer.train(resume=False)
    return clock.result(plan["batch"]) | dict(peak=peak_gib(), imports=imports,
                                              trained=sum(p.numel() for g in trainer.groups for p in g))


def child(args):
    "Run one contender and print what it measured."
    plan = json.loads(Path(args.plan).read_text())
    run = run_trl if args.child.startswith("TRL") else run_ours
    with tempfile.TemporaryDirectory() as folder:
        found = run(plan, args.child, folder)
    gc.collect()
    print("RESULT " + json.dumps(found))


# --- the table --------------------------------------------------------------------------------------------------


def combine(runs: list[dict]) -> dict:
    "Several runs of a contender as one: times, samples and tokens summed, the largest peak."
    out = {k: sum(r[k] for r in runs) for k in ("updates", "samples", "tokens")}
    for t in ("wall", "cpu"):
        out[t] = {k: sum(r[t].get(k, 0.0) for r in runs) for k in ("total", *PARTS)}
    return out | {k: max(r[k] for r in runs) for k in ("peak", "imports", "trained")}


def table(runs: dict[str, list[dict]], against: str = "TRL") -> str:
    "Speed, memory and where the time goes, as a Markdown table; shares are of CPU seconds."
    rows, whole = [], {n: combine(r) for n, r in runs.items()}
    base, parts = whole.get(against), [p for p in PARTS if any(r["cpu"][p] for r in whole.values())]
    for name, r in whole.items():
        cpu, per = r["cpu"], r["samples"] / r["cpu"]["total"]
        rows.append([
            name, f"{r['samples'] / r['wall']['total']:.2f}", f"{per:.2f}",
            f"{per * base['cpu']['total'] / base['samples']:.2f}x" if base else "", f"{r['peak']:.2f}",
            f"{r['peak'] / base['peak']:.2f}x" if base else "", *(f"{cpu[p] / cpu['total']:.0%}" for p in parts),
            f"{r['samples'] / cpu['generation']:.2f}" if cpu["generation"] else "", f"{r['tokens'] / r['samples']:.1f}",
            f"{r['trained'] / 1e6:.1f}"])
    return markdown(["", "samples/s", "samples/CPU s", "to TRL", "peak GiB", "to TRL", *parts,
                     "generation alone, samples/CPU s", "new tokens", "trained, millions"], rows)


def markdown(head: list[str], rows: list[list[str]]) -> str:
    "A pipe table, numbers to the right."
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] + ["---:"] * (len(head) - 1), *rows))


def bound(runs: dict[str, list[dict]]) -> str:
    "What the fastest of ours could still gain."
    whole = {n: combine(r) for n, r in runs.items() if n.startswith("ours")}
    lines = [f"{n}: generation takes {r['cpu']['generation'] / r['cpu']['total']:.0%} of the CPU seconds, so with all "
             f"else for nothing it would be {r['cpu']['total'] / r['cpu']['generation']:.2f}x as fast, and with "
             f"generation for nothing {1 / (1 - r['cpu']['generation'] / r['cpu']['total']):.2f}x."
             for n, r in whole.items() if r["cpu"]["generation"]]
    return "\n".join(lines)


def launch(script: str, python, arguments: list[str], label: str) -> dict:
    "One child process; its RESULT line."
    env = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "HF_HUB_OFFLINE": "1",
           "TOKENIZERS_PARALLELISM": "false"} | os.environ
    done = subprocess.run([str(python), script, *arguments], capture_output=True, text=True, env=env)
    if done.returncode or "RESULT " not in done.stdout:
        sys.exit(f"{label} failed:\n{(done.stderr or done.stdout)[-3000:]}")
    return json.loads(done.stdout.split("RESULT ")[-1].splitlines()[0])


def make_plan(args) -> dict:
    "Everything that all contenders share, written down once."
    from deepseek_cookbook.models import load_tokenizer
    from deepseek_cookbook.ppo.rollout import prompt_ids
    from deepseek_cookbook.reward.pairs import bank_pairs
    from deepseek_cookbook.settings import load_settings

    settings = load_settings(args.profile, args.set)
    model, tokenizer = settings["model"]["name"], load_tokenizer(settings["model"]["name"])
    pairs = bank_pairs(args.updates * args.batch, settings.build("run").seed, 2, chinese=0)[0]
    rows = [dict(prompt=p["prompt"], input_ids=prompt_ids(tokenizer, p["prompt"])) for p in pairs]
    keep = ("batch", "updates", "epochs", "minibatches", "new_tokens", "learning_rate", "reward", "autocast", "dtype",
            "attention", "upper", "micro")
    return {k: getattr(args, k) for k in keep} | dict(
        profile=args.profile, set=args.set, model=model, seed=settings.build("run").seed, rows=rows,
        lora=settings["lora"] | dict(lora_dropout=0.0))


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default=os.environ.get("DSC_PROFILE", "laptop"))
    parser.add_argument("--updates", type=int, default=5, help="of the policy's batch, the first to warm up")
    parser.add_argument("--rounds", type=int, default=1, help="of all contenders, every second one backwards")
    parser.add_argument("--batch", type=int, default=8, help="completions an update")
    parser.add_argument("--minibatches", type=int, default=1, help="optimizer steps an epoch")
    parser.add_argument("--micro", type=int, default=4, help="rows whose activations exist at the same time, of all")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--upper", type=int, default=10, help="layers with adapters where it says upper")
    parser.add_argument("--reward", choices=("small", "full"), default="small", help="size of the reward model")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the frozen weights")
    parser.add_argument("--autocast", choices=("auto", "float32"), default="auto")
    parser.add_argument("--attention", default="eager", help="kernel of ours; TRL has that of transformers, sdpa")
    parser.add_argument("--set", nargs="*", default=[], help="settings, such as lora.r=8")
    parser.add_argument("--only", nargs="*", choices=ALL, default=CONTENDERS)
    parser.add_argument("--environment", type=Path, default=ROOT / ".venv-trl112")
    parser.add_argument("--json", type=Path, default=ROOT / "runs" / "bench" / "ppo.json")
    parser.add_argument("--child", choices=ALL, help=argparse.SUPPRESS)
    parser.add_argument("--plan", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.updates < 2 or args.batch % (args.minibatches * args.micro):
        parser.error("--updates: from 2 on; --batch: a multiple of --minibatches times --micro")
    return args


def main():
    args = arguments()
    if args.child:
        return child(args)
    from deepseek_cookbook.settings import write_json

    old = old_environment(args.environment) if any(n.startswith("TRL") for n in args.only) else None
    runs, plan = {name: [] for name in args.only}, make_plan(args)
    with tempfile.TemporaryDirectory() as folder:
        file = write_json(Path(folder) / "plan.json", plan)
        for i in range(args.rounds):
            for name in list(args.only)[:: -1 if i % 2 else 1]:
                python = old if name.startswith("TRL") else sys.executable
                runs[name].append(launch(__file__, python, ["--child", name, "--plan", str(file)], name))
                print(name, json.dumps(runs[name][-1]), file=sys.stderr, flush=True)
    lengths = [len(r["input_ids"]) for r in plan["rows"]]
    print(f"PPO on {plan['model']}, {args.batch} completions an update, {args.epochs} epochs of {args.minibatches} "
          f"minibatches, {args.micro} rows at a time, "
          f"prompts of {min(lengths)} to {max(lengths)} tokens, {args.new_tokens} new ones, LoRA r "
          f"{plan['lora']['r']}, weights {args.dtype}, autocast {args.autocast}, "
          f"{os.environ.get('OMP_NUM_THREADS', '1')} thread, "
          f"{platform.machine()}, {args.updates - 1} updates of {args.rounds} rounds\n")
    print(table(runs), bound(runs), sep="\n\n")
    del plan["rows"]
    write_json(args.json, dict(plan=plan, prompt_lengths=[min(lengths), max(lengths)], runs=runs, table=table(runs)))


if __name__ == "__main__":
    main()
