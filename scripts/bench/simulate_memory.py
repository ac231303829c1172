"""Memory of training steps at the sizes of the gpu profile, without a GPU: real code, tensors without contents.

    python scripts/bench/simulate_memory.py [--model deepseek-llm-7b-base] [--only sft reward …] [--out FILE]

transformers' Llama, PEFT's adapters, activation checkpointing, autograd and AdamW run on fake tensors, which have a
shape and no memory, and torch's `MemTracker` adds up what a GPU's allocator would hold. Sizes are those of the gpu
profile; two optimizer steps run, and the peak of the second one counts. The planner's figures stand beside them, both
without the reserve for context and fragments. Exit code 1 where a peak is off by more than `--limit`.

The fake device is a CPU: torch without CUDA can't build graphs on a fake GPU. What that changes, and what is done:

- attention is SDPA's fused kernel for CPUs. It keeps query, key, value, mask, output and one FP32 number a row and
  head, as the memory-efficient kernel for GPUs does; work space inside a kernel isn't seen on either;
- dropout is called by the kernel that GPUs use, with a mask of one byte a number;
- autocast has the CPU's list of operations; a Llama block's come out alike;
- the output layer's loss is a stand-in for TRL's Triton kernel: one tile of 4096 tokens x 32768 words, an FP32 gradient
  of the hidden states, no gradient of the layer;
- the optimizer is AdamW without temporary copies, as the fused one for GPUs.

The trainers' loops are left out: losses are plain sums, and PPO's rows are all of full length (real rollouts choose
tokens by their values, which fake tensors don't have). All rows have the maximum length, the worst case.
"""

import argparse
import json
import sys
import time
import weakref
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

GIB = 2**30
TILE = 4096, 32768  # tokens, words: as in TRL's kernels/chunked_logprob.py


class Tracker(TorchDispatchMode):
    "Bytes that live tensors hold, by what they are for; `MemTracker` of torch wants a gradient for every parameter."

    def __init__(self, weights):
        super().__init__()
        self.live, self.kind, self.now = {}, "weights", Counter()
        self.restart()
        for p in weights:
            self.add(p)

    def restart(self):
        "Forget the peak so far."
        self.peak, self.at_peak = sum(self.now.values()), Counter(self.now)

    def add(self, x: torch.Tensor, kind: str | None = None):
        "Count a tensor's storage; one that is known may change its kind."
        storage = x.untyped_storage()
        key, size = storage._cdata, 512 * -(-storage.nbytes() // 512)  # as CUDA's allocator rounds
        if key not in self.live:
            forget = weakref.ref(storage, lambda _, key=key: self.remove(key))
            self.live[key] = [kind or self.kind, size, forget]
            self.now[kind or self.kind] += size
        elif kind and self.live[key][0] != kind:
            self.now[self.live[key][0]] -= size
            self.now[kind] += size
            self.live[key][0] = kind
        if (total := sum(self.now.values())) > self.peak:
            self.peak, self.at_peak = total, Counter(self.now)

    def remove(self, key: int):
        kind, size, _ = self.live.pop(key)
        self.now[kind] -= size

    @contextmanager
    def counting(self, kind: str):
        "What is made inside is of this kind."
        before, self.kind = self.kind, kind
        with self:
            yield
        self.kind = before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        tree_map_only(torch.Tensor, self.add, out)
        return out


class Dropout(torch.nn.Dropout):
    "Dropout as a GPU computes it."

    def forward(self, x):
        return torch.native_dropout(x, self.p, True)[0] if self.training and self.p else x


class TiledLoss(torch.autograd.Function):
    "The tensors of TRL's loss where Triton is there: hidden states (N, D), output layer (V, D) -> one number a token."

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD):
        ctx.save_for_backward(hidden_ND, weight_VD)
        tile = hidden_ND.new_empty(min(len(hidden_ND), TILE[0]), TILE[1])
        return torch.zeros(len(hidden_ND), device=tile.device)

    @staticmethod
    def backward(ctx, grad_N):
        hidden_ND, weight_VD = ctx.saved_tensors
        grad_ND = torch.zeros_like(hidden_ND, dtype=torch.float32)
        tile = hidden_ND.new_empty(min(len(hidden_ND), TILE[0]), TILE[1])
        del tile
        return grad_ND.to(hidden_ND.dtype), None


def llama(shape):
    "A Llama of this shape in BF16, on torch's device meta."
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
                         num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
                         num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim or shape.hidden // shape.heads,
                         max_position_embeddings=4096, tie_word_embeddings=shape.tied, pad_token_id=0)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")


def as_on_gpu(model):
    "Put in the dropout of GPUs and switch checkpointing on."
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is torch.nn.Dropout:
                module._modules[name] = Dropout(child.p)
    model.activation_checkpointing_enable(dict(use_reentrant=False))
    return model


class Simulation:
    "One model with an optimizer, on fake tensors; micro-steps and optimizer steps are counted."

    def __init__(self, *parts):
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        with self.fake:
            for part in parts:
                part.to_empty(device="cpu")
            weights = [p for part in parts for p in (*part.parameters(), *part.buffers())]
        learns = [p for p in weights if p.requires_grad]
        self.tracker = Tracker(weights)
        for p in learns:
            p.register_post_accumulate_grad_hook(lambda p: self.tracker.add(p.grad, "gradients"))
        self.optimizer = torch.optim.AdamW(learns, foreach=False)

    @contextmanager
    def forward(self, autocast: bool):
        with self.tracker.counting("activations"), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            yield

    def backward(self, loss):
        with self.tracker.counting("backward"):
            loss.backward()

    def step(self):
        with self.tracker.counting("optimizer"):
            self.optimizer.step()
        self.optimizer.zero_grad()

    def run(self, micro_step, accumulation: int = 1) -> dict:
        "The second step's peak: optimizer states are there, gradients too in its second part."
        with self.fake:
            for _ in range(2):
                self.tracker.restart()
                for _ in range(min(2, accumulation)):
                    micro_step()
                self.step()
        return dict(self.tracker.at_peak) | dict(peak=self.tracker.peak)

    def without_learning(self, passes) -> dict:
        "The peak of passes without gradients, beside the optimizer's states."
        with self.fake:
            for group in self.optimizer.param_groups:
                for p in group["params"]:
                    p.grad = torch.zeros_like(p)
            self.step()
            self.tracker.restart()
            passes()
        return dict(self.tracker.at_peak) | dict(peak=self.tracker.peak)


def sft(shape, settings):
    "Rows of the maximum length, all of whose tokens count for the loss; packed, they are one row."
    from peft import get_peft_model

    from deepseek_cookbook.planner import ALL_LINEAR, GPUS, Job
    from deepseek_cookbook.sft.lora import lora_config

    args = settings["sft"]
    rows, length, times = (args[k] for k in (
        "per_device_train_batch_size", "max_length", "gradient_accumulation_steps"))
    packed = args["packing"]
    base = llama(shape)
    with torch.device("meta"):
        model = as_on_gpu(get_peft_model(base, lora_config(base, settings["lora"])))
    model.enable_input_require_grads()
    run = Simulation(model.train())

    def micro_step():
        ids_BT = torch.zeros(rows, length, dtype=torch.long)
        more = dict(attention_mask=torch.ones_like(ids_BT))
        if packed:
            ids_BT, more = ids_BT.view(1, -1), dict(position_ids=torch.arange(length).repeat(rows)[None])
        with run.forward(autocast=True):
            hidden_BTD = base.model(input_ids=ids_BT, use_cache=False, **more).last_hidden_state
            loss = TiledLoss.apply(hidden_BTD.flatten(0, 1), base.lm_head.weight).sum()
        del hidden_BTD
        run.backward(loss)

    named = settings["lora"]["target_modules"]
    targets = ALL_LINEAR if named == "all-linear" else tuple(named)
    job = Job(shape, "lora", batch=rows * times, seq_len=length, rank=settings["lora"]["r"],
              dropout=settings["lora"]["lora_dropout"], packed=packed, targets=targets, device=GPUS["a100-80g"])
    return run.run(micro_step, times), job, rows


def reward(shape, settings):
    "Pairs of the maximum length; a model that gives one number."
    from peft import get_peft_model

    from deepseek_cookbook.planner import GPUS, Job
    from deepseek_cookbook.reward.model import put_head, reward_lora

    args = settings["reward"]
    rows, length = 2 * args["per_device_train_batch_size"], args["max_length"]
    base = put_head(llama(shape), 1, seed=0)
    config = reward_lora(settings, base)
    with torch.device("meta"):
        model = as_on_gpu(get_peft_model(base, config))
    model.enable_input_require_grads()
    run = Simulation(model.train())

    def micro_step():
        ids_BT = torch.zeros(rows, length, dtype=torch.long)
        with run.forward(autocast=True):
            score_B1 = model(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), use_cache=False).logits
            better_B, worse_B = score_B1[:, 0].float().chunk(2)
            loss = -torch.nn.functional.logsigmoid(better_B - worse_B).mean()
        run.backward(loss)

    job = Job(shape, "lora", batch=rows, seq_len=length, rank=config.r, dropout=config.lora_dropout,
              loss="score", device=GPUS["a100-80g"])
    return run.run(micro_step), job, rows


def ppo_models(shape, settings):
    "Policy, value, start and reward as adapters on one base, as the trainer has them."
    from deepseek_cookbook.ppo.policy import make_models, trained, upper_lora

    args, base = settings.build("ppo"), llama(shape)
    base.activation_checkpointing_enable(dict(use_reentrant=False))
    with torch.device("meta"):
        config = upper_lora(base, settings["lora"], None)
        models = make_models(base, settings["lora"], None, args.upper_layers, args.value_layers)
        for name in ("start", "reward"):
            models.frozen.add_adapter(name, config)
    models.start = ("start",)
    models.policy.base_model.set_adapter(["start", "policy"])
    models.policy.eval().requires_grad_(False)
    for p in trained(models).values():
        p.requires_grad_(True)
    return models


def ppo_job(shape, settings, length: int):
    from deepseek_cookbook.planner import GPUS, Job

    args, rollout = settings.build("ppo"), settings.build("rollout")
    return Job(shape, "ppo", adapters=True, batch=args.batch_size, seq_len=length, rank=settings["lora"]["r"],
               completion=rollout.max_new_tokens, generated=rollout.batch_size, device=GPUS["a100-80g"])


def update(shape, settings):
    "PPO's update: the policy's pass, then the value's, each with its own way back."
    from deepseek_cookbook.ppo.rollout import base_of, head_logprobs, no_dropout

    args, rollout = settings.build("ppo"), settings.build("rollout")
    rows, prompt = args.per_device_train_batch_size, rollout.max_new_tokens  # as long as the answers
    length = 2 * prompt
    models = ppo_models(shape, settings)
    run = Simulation(models.policy, models.head)
    backbone, output = base_of(models.policy).base_model, base_of(models.policy).get_output_embeddings()

    def states(ids_BT):
        hidden_BTD = backbone(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), use_cache=False)[0]
        return hidden_BTD[:, prompt - 1 : -1]

    def micro_step():
        ids_BT = torch.zeros(rows, length, dtype=torch.long)
        with models.as_policy(), no_dropout(models.policy, recompute=True):
            with run.forward(autocast=False):
                targets_N = ids_BT[:, prompt:].flatten()
                loss = head_logprobs(states(ids_BT).flatten(0, 1), targets_N, output, learn_entropy=False)[0].sum()
            run.backward(loss)
        del loss
        with models.as_value(), no_dropout(models.frozen, recompute=True):
            with run.forward(autocast=False):
                loss = models.head(states(ids_BT).float()).sum()
            run.backward(loss)

    job = ppo_job(shape, settings, length)
    return run.run(micro_step, 2), replace(job, generated=1), rows  # the update's moment alone


def generate(shape, settings):
    "PPO's rollout: reading the prompts, and the last tokens, when the cache is full."
    from transformers import DynamicCache

    from deepseek_cookbook.ppo.rollout import base_of

    rollout = settings.build("rollout")
    models = ppo_models(shape, settings)
    run, model = Simulation(models.policy, models.head), base_of(models.policy)
    rows, prompt = rollout.batch_size, rollout.max_new_tokens
    length = 2 * prompt

    def read(ids_BT, cache, seen: int):
        mask_BT = torch.ones(rows, seen + ids_BT.shape[1], dtype=torch.long)
        place_BT = torch.arange(seen, mask_BT.shape[1])[None].expand(rows, -1)
        model(input_ids=ids_BT, attention_mask=mask_BT, position_ids=place_BT, past_key_values=cache, use_cache=True,
              logits_to_keep=1)

    @torch.no_grad()
    def passes():
        with run.tracker.counting("work"):
            read(torch.zeros(rows, prompt, dtype=torch.long), DynamicCache(config=model.config), 0)
        cache, width = DynamicCache(config=model.config), model.config.head_dim
        with run.tracker.counting("cache"):
            for layer in range(shape.layers):
                both = torch.zeros(2, rows, shape.kv_heads, length - 3, width, dtype=torch.bfloat16)
                cache.update(both[0].clone(), both[1].clone(), layer)
                del both
            for seen in (length - 3, length - 2):
                read(torch.zeros(rows, 1, dtype=torch.long), cache, seen)

    with models.as_policy():
        return run.without_learning(passes), ppo_job(shape, settings, length), 1  # the rollout's moment is the worst


CASES = {"sft": sft, "reward": reward, "ppo update": update, "ppo rollout": generate}


def compare(name: str, shape, settings) -> dict:
    "One case: GiB of the simulation and of the planner."
    from deepseek_cookbook.planner import check_job, memory

    began = time.perf_counter()
    found, job, rows = CASES[name](shape, settings)
    plan = memory(check_job(job), rows)
    planned = plan.peak - plan.reserve
    gib = {k: round(v / GIB, 3) for k, v in found.items() if k != "peak"}
    kept = {k: gib.pop(k, 0.0) for k in ("weights", "gradients", "optimizer")}
    return dict(case=name, rows=job.generated if CASES[name] is generate else rows, tokens=job.seq_len, **kept,
                activations=round(sum(gib.values()), 3), parts=gib, peak=round(found["peak"] / GIB, 3),
                planned=round(planned / GIB, 3), ratio=round(planned / found["peak"], 3),
                seconds=round(time.perf_counter() - began, 1))


def show(rows: list[dict], title: str):
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    keys = ("case", "weights", "gradients", "optimizer", "activations", "peak", "planned", "ratio")
    for key in keys:
        table.add_column(key, justify="left" if key == "case" else "right")
    for row in rows:
        table.add_row(f"{row['case']}, {row['rows']} x {row['tokens']}", *(f"{row[k]:.2f}" for k in keys[1:]))
    Console(width=120).print(table)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="of the registry; default: that of the profile")
    parser.add_argument("--profile", default="gpu")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--limit", type=float, default=0.1, help="how far a plan may be off, as a share")
    parser.add_argument("--out", type=Path, help="JSON")
    args = parser.parse_args()
    from deepseek_cookbook.pipeline import made_with
    from deepseek_cookbook.registry import MODELS
    from deepseek_cookbook.settings import load_settings

    settings = load_settings(args.profile)
    name = args.model or settings["model"]["name"]
    rows = [compare(case, MODELS[name].shape, settings) for case in args.only]
    show(rows, f"{name}, profile {args.profile}, SDPA, GiB without context and fragments")
    if args.out:
        facts = dict(command=f"scripts/bench/simulate_memory.py --profile {args.profile}", model=name,
                     unit="GiB, without the CUDA context and fragments", device="fake tensors, no GPU",
                     made_with=made_with(), rows=rows)
        args.out.write_text(json.dumps(facts, indent=1) + "\n")
    sys.exit(any(abs(row["ratio"] - 1) > args.limit for row in rows))


if __name__ == "__main__":
    main()
