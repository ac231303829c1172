"""Started by torchrun from test_distributed.py: `train_sft` in each process, and FSDP2 by plain torch.

    torchrun --standalone --nproc_per_node=2 tests/two_processes.py FOLDER train|fail|leave
"""

import json
import os
import shutil
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback

from deepseek_cookbook import cli
from deepseek_cookbook.models import load_model
from deepseek_cookbook.settings import load_settings
from deepseek_cookbook.sft import train
from deepseek_cookbook.sft.distributed import TeamError, is_main, join, leave, on_main, rank, world_size

QUIET = ["sft.disable_tqdm=true", "sft.bf16=false"]
RECORDS = [
    dict(instruction=f"What is {i} plus {i}?", input="", output=f"It is {2 * i}. " * (1 + i % 3), history=[])
    for i in range(48)
]


def settings(processes):
    "Eight rows a step in all, however many processes; no dropout, whose random numbers differ between processes."
    return load_settings("tiny", [
        *QUIET, f"sft.per_device_train_batch_size={8 // processes}", "sft.per_device_eval_batch_size=1",
        "sft.logging_steps=1", "lora.lora_dropout=0",
    ])


def weights(model):
    "The trained weights as one vector."
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def sharded_loss():
    "Loss of tiny-llama with bf16 base and fp32 adapters, whole and as two halves."
    import torch.distributed as dist
    from peft import LoraConfig, get_peft_model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(load_model("tiny-llama", dtype="bfloat16"), lora)
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    ids = torch.arange(4 * 16).reshape(4, 16) % 200 + 5
    whole = model(input_ids=ids, labels=ids).loss
    whole.backward()
    name, grad = next((n, p.grad.clone()) for n, p in model.named_parameters() if p.requires_grad)
    model.zero_grad()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    mine = ids.chunk(world_size())[rank()]
    part = model(input_ids=mine, labels=mine).loss
    part.backward()
    sharded = dict(model.named_parameters())[name]
    loss = part.detach().clone()
    dist.all_reduce(loss)
    share = sharded.to_local().numel() / sharded.numel()
    grad_gap = (sharded.grad.full_tensor() - grad).abs().max() / grad.abs().max()
    return dict(whole=whole.item(), sharded=loss.item() / world_size(), share=share, grad_gap=grad_gap.item())


def run(folder):
    "Straight, then resumed from the first checkpoint, then FSDP2."
    chosen = settings(world_size())
    straight, figures = train.train_sft(chosen, RECORDS, RECORDS[:6], folder / "run")
    straight = weights(straight)
    on_main(lambda: shutil.copytree(folder / "run", folder / "resumed") and shutil.rmtree(
        folder / "resumed" / "checkpoint-12"))
    again, more = train.train_sft(chosen, RECORDS, RECORDS[:6], folder / "resumed")
    out = dict(figures=figures, resumed=more["resumed_from"], gap=(weights(again) - straight).abs().max().item())
    try:
        on_main(lambda: 1 / 0)
    except (ZeroDivisionError, TeamError) as e:
        out["refused"] = f"{type(e).__name__}: {e}"
    whole = load_settings("tiny", [*QUIET, f"run.folder={folder}", "data.limit=24", "sft.max_steps=2",
                                   "sft.eval_steps=2", "sft.save_steps=2"])
    for _ in range(2):  # the second time it is finished, and all processes must know
        tell = lambda line: out.setdefault("told", []).append(line)  # noqa: E731
        out["command"] = cli.phase_together("sft", whole, first=["data"], tell=tell)
    out["fsdp"] = sharded_loss()
    (folder / f"rank-{rank()}.json").write_text(json.dumps(out))
    if is_main():
        torch.save(straight, folder / "weights.pt")


class Full(TrainerCallback):
    "Process 1 has no memory left at its third step."

    def on_step_begin(self, args, state, control, **kwargs):
        if rank() == 1 and state.global_step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")


def threads():
    "Names of this process's threads."
    return [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]


def hold():
    "A cycle that holds the connection, as a trainer does; nothing else holds the cycle."
    held = [torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))]
    held.append(held)
    return threads()


if __name__ == "__main__":
    folder, what = Path(sys.argv[1]), sys.argv[2]
    if what == "fail":
        made = train.make_callbacks
        train.make_callbacks = lambda *args: [*made(*args), Full()]
        try:
            train.train_sft(settings(world_size()), RECORDS, RECORDS[:6], folder)
        except Exception as e:
            (folder / f"rank-{rank()}.txt").write_text(f"{type(e).__name__}: {e}")
            raise
    elif what == "leave":
        join()
        during = hold()
        leave()
        (folder / f"rank-{rank()}.json").write_text(json.dumps([during, threads()]))
    else:
        run(folder)
        leave()
        sys.stdout.flush()
        os._exit(0)  # FSDP2's mesh holds gloo's threads, and they may abort Python at its end: pytorch issue 190489
