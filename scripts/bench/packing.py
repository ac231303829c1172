"""Packed rows beside padded ones, in one run: padding share of a corpus, and tokens/s of training passes.

    .venv/bin/python scripts/bench/packing.py --rows 32          (laptop profile: under two minutes)

Both contenders run forward and backward through the same rows with the same LoRA adapter and unchanged weights, in
turns (padded, packed, packed, padded), so that neither meets a warmer machine; the losses per token must agree.
tokens/s counts the tokens of the rows and not the padding. The shares are those of the whole corpus.
"""

import argparse
import os
import platform
import random
import time

from rich.console import Console
from rich.table import Table

ORDER = ("padded", "packed", "packed", "padded")


def rows_of(settings, tokenizer):
    from deepseek_cookbook.data.formats import load_records
    from deepseek_cookbook.data.mix import drop_copies
    from deepseek_cookbook.data.tokens import encode_records

    records, _ = drop_copies(load_records(settings["data"]["source"])[0])
    rows, _ = encode_records(tokenizer, records)
    random.Random(settings.build("run").seed).shuffle(rows)
    return rows


def batches(name: str, rows: list[dict], args, pad: int) -> list[dict]:
    from deepseek_cookbook.data.tokens import pack, packed_batch, pad_rows

    if name == "padded":
        return [pad_rows(rows[i : i + args.batch], pad) for i in range(0, len(rows), args.batch)]
    return [packed_batch([rows[i] for i in one]) for one in pack([len(r["input_ids"]) for r in rows], args.bin)]


def one_pass(model, made: list[dict], dtype) -> dict:
    "Forward and backward; the sum of the loss over all labels, seconds of wall and of CPU."
    import torch

    device, total, labels = model.device.type, 0.0, 0
    wall, cpu = time.perf_counter(), time.process_time()
    for batch in made:
        batch = {k: v.to(model.device) if hasattr(v, "to") else v for k, v in batch.items()}
        with torch.autocast(device, dtype or torch.float32, enabled=dtype is not None):
            loss = model(**batch).loss
        loss.backward()
        n = int((batch["labels"][:, 1:] != -100).sum())
        total, labels = total + loss.item() * n, labels + n
        model.zero_grad(set_to_none=True)
    return dict(loss=total / labels, wall=time.perf_counter() - wall, cpu=time.process_time() - cpu)


def shares(lengths: list[int], args) -> dict[str, float]:
    from deepseek_cookbook.data.tokens import pack, padding_share

    return dict(padded=padding_share(lengths, args.batch),
                packed=1 - sum(lengths) / (args.bin * len(pack(lengths, args.bin))))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default=os.environ.get("DSC_PROFILE", "laptop"))
    parser.add_argument("--rows", type=int, default=32, help="rows of a timed pass")
    parser.add_argument("--batch", type=int, default=8, help="rows of a padded batch")
    parser.add_argument("--bin", type=int, default=512, help="tokens of a packed row")
    args = parser.parse_args()
    import peft
    import transformers

    from deepseek_cookbook.models import load_model, load_tokenizer, precision
    from deepseek_cookbook.settings import load_settings

    settings = load_settings(args.profile)
    transformers.utils.logging.disable_progress_bar()
    transformers.set_seed(settings.build("run").seed)
    tokenizer = load_tokenizer(settings["model"]["name"])
    rows, dtype = rows_of(settings, tokenizer), precision().autocast
    lengths = [len(r["input_ids"]) for r in rows]
    args.bin = max(args.bin, *lengths)
    model = peft.get_peft_model(load_model(**settings["model"]), settings.build("lora")).eval()  # eval: no dropout
    made = {name: batches(name, rows[: args.rows], args, tokenizer.pad_token_id) for name in ("padded", "packed")}
    for name in made:
        one_pass(model, made[name][-1:], dtype)  # the first pass allocates
    runs = {name: [] for name in made}
    for name in ORDER:
        runs[name].append(one_pass(model, made[name], dtype))
    show(settings, args, lengths, made, runs, dtype)


def show(settings, args, lengths, made, runs, dtype):
    tokens, share = sum(lengths[: args.rows]), shares(lengths, args)
    title = (f"{args.rows} rows, {tokens} tokens, {settings['model']['name']}, {dtype or 'float32'}, "
             f"{platform.machine()}, {os.cpu_count()} cores; corpus: {len(lengths)} rows up to {max(lengths)} tokens")
    table = Table(title=title)
    for column in ("", "padding, corpus", "batches", "tokens/s", "tokens/CPU s", "to padded", "loss"):
        table.add_column(column, justify="right" if column else "left")
    rate = {name: {k: len(rs) * tokens / sum(r[k] for r in rs) for k in ("wall", "cpu")} for name, rs in runs.items()}
    for name, rs in runs.items():
        table.add_row(name, f"{share[name]:.1%}", str(len(made[name])), f"{rate[name]['wall']:.0f}",
                      f"{rate[name]['cpu']:.0f}", f"{rate[name]['wall'] / rate['padded']['wall']:.2f}x",
                      f"{rs[0]['loss']:.4f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
