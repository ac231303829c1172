# ruff: noqa: E501
"""Write real-shaped instruction rows, and say of each whether it must stay: the same file for the same seed.

    python scripts/bench/data_rows.py rows.jsonl --rows 1000000 [--seed 42] [--kinds FILE]

A third are templated rows (slots of one or two words), a third ask under a long rubric or about a long page, a third
are free. All of them say something different and must stay; half are Chinese. One row in ten is a copy of an earlier
one: the same text, other punctuation, other case, other white space, or a word or two of a long answer replaced.
The kind of every row goes to --kinds, one a line: `templated`, `rubric`, `free`, or `copy:` and how it was made.
"""

import argparse
import json
import random
import re
from collections.abc import Iterator

from make_rows import EN, ZH

FUNCTION = "the of and to in for with that is are was on by from this which when it as at".split()
SYLLABLES = "ba be bi bo da de di do fa fe ka ke ki ko la le li lo ma me mi mo na ne ni no pa pe ra re ri ro sa se ta te va ve"
STEMS = ["".join((a, b, c)) for a in SYLLABLES.split() for b in SYLLABLES.split()[::3] for c in "nrstlm"]
NAMES = [s.capitalize() for s in STEMS[::7]]
HAN = [chr(c) for c in range(0x4E00, 0x4E00 + 2400, 2)]
COLOURS = "red green blue black white brown yellow grey purple orange".split()
THINGS = "kettle lamp desk chair clock mirror basket blanket ladder bucket hammer carpet bottle candle pillow".split()
LABELS = "loans rooms events complaints fines cards".split()
ZH_LABELS = "借阅 场馆 活动 投诉 罚款 办证".split()
RUBRIC = (
    "You sort letters of a library's readers. Read the letter below and name the desk that should answer it. "
    "The desks are {}. Write the name of one desk, in small letters, and nothing else: no reason, no greeting, "
    "no full stop. Where a letter touches two desks, take the one that its last sentence is about. Letter: "
)
ZH_RUBRIC = (
    "你负责给图书馆读者的来信分类。请阅读下面的来信，写出应当回复它的部门名称。可选的部门有{}。"
    "只写一个部门的名称，不写理由，不写问候，也不写句号。来信涉及两个部门时，以最后一句为准。来信："
)
COPIES = ("same", "punctuation", "case", "space", "word")
SHARE = 0.1  # of copies
KEEP = 4096  # rows, from all over the file, that a copy can be of


def words(rng: random.Random, n: int) -> str:
    "An English sentence of `n` words, one in three a function word, the others from some four thousand."

    def pick():
        return rng.choice(FUNCTION if rng.random() < 0.33 else EN if rng.random() < 0.3 else STEMS)

    return " ".join(pick() for _ in range(n)).capitalize()


def han(rng: random.Random, n: int) -> str:
    "`n` Han characters: half from the common words of the service desk, half from all over."
    return "".join(rng.choice(ZH if rng.random() < 0.5 else HAN) for _ in range(n))


def row(instruction: str, output: str, page: str = "") -> dict:
    return dict(instruction=instruction, input=page, output=output, history=[])


def templated(rng: random.Random) -> dict:
    "One of six templates, with slots of one or two words, of numbers, or of code."
    name, town, thing = rng.choice(NAMES), rng.choice(NAMES), rng.choice(THINGS)
    colour, n, place = rng.choice(COLOURS), rng.randint(2, 99999), han(rng, 2)
    which = rng.randrange(6)
    if which == 0:
        ask = (f"Write a short and friendly reply to {name} of {town}, who ordered a {colour} {thing} last week and now "
               "asks us when the parcel will arrive at the house.")  # fmt: skip
        return row(ask, f"Dear {name}, thank you for your order of a {colour} {thing}. It has left our house and should "
                        f"reach {town} within a few days. Please write to us again if it does not.")  # fmt: skip
    if which == 1:
        return row(f"Please transfer {n} yuan to {name}.", f"I have transferred {n} yuan to {name}.")
    if which == 2:
        return row("Translate the word into French.", rng.choice(STEMS) + "eau", f"{rng.choice(STEMS)} {name}")
    if which == 3:
        a, b, op = rng.choice(STEMS), rng.choice(STEMS), rng.choice("+-*/%")
        return row(f"Write a Python function {a}_{b} of two numbers.", f"def {a}_{b}(x, y):\n    return x {op} {n}*y")
    if which == 4:
        return row(f"请帮{han(rng, 3)}查询从{place}到{han(rng, 2)}的火车时刻。", f"去往{place}的列车每天{n % 24}点发车。")
    return row(f"Is the mood of this review good or bad? Review: {words(rng, rng.randint(4, 12))}.",
               rng.choice(("good", "bad")))  # fmt: skip


def rubric(rng: random.Random) -> dict:
    "A letter under a rubric with a label for an answer, or a question about a long page."
    if rng.random() < 0.3:
        return row(RUBRIC.format(", ".join(LABELS)) + words(rng, rng.randint(5, 25)) + ".", rng.choice(LABELS))
    if rng.random() < 0.5:
        return row(ZH_RUBRIC.format("、".join(ZH_LABELS)) + han(rng, rng.randint(10, 40)) + "。", rng.choice(ZH_LABELS))
    chinese = rng.random() < 0.5
    page = random.Random(rng.randrange(2000))  # one of two thousand pages: many rows ask about the same one
    if chinese:
        text = "。".join(han(page, page.randint(12, 30)) for _ in range(8)) + "。"
        return row(f"关于{han(rng, rng.randint(2, 6))}，文中是怎么说的？", han(rng, rng.randint(4, 50)) + "。", text)
    text = ". ".join(words(page, page.randint(8, 18)) for _ in range(10)) + "."
    return row(f"What does the page say of {words(rng, rng.randint(2, 5)).lower()}?",
               words(rng, rng.randint(3, 40)) + ".", text)  # fmt: skip


def free(rng: random.Random) -> dict:
    "A question and an answer of any length."
    if rng.random() < 0.5:
        return row(han(rng, rng.randint(8, 40)) + "？", "，".join(han(rng, rng.randint(8, 20)) for _ in range(rng.randint(1, 8))) + "。")
    return row(words(rng, rng.randint(5, 20)) + "?", ". ".join(words(rng, rng.randint(8, 15)) for _ in range(rng.randint(1, 8))) + ".")


def swapped(rng: random.Random, text: str) -> str | None:
    "The text with one word replaced, two from eighty pieces on; None where it is short (below thirty)."
    parts = re.findall(r"[A-Za-z]+|[\u4e00-\u9fff]|[^A-Za-z\u4e00-\u9fff]+", text)
    at = [i for i, p in enumerate(parts) if p[0].isalpha()]
    if len(at) < 30 or re.search(r"\n| {2}", text):
        return None
    for i in rng.sample(at, 1 + (len(at) >= 80)):
        parts[i] = rng.choice(HAN) if parts[i] >= "\u4e00" else rng.choice(STEMS)
    return "".join(parts)


def changed(rng: random.Random, old: dict, how: str) -> dict | None:
    "A copy, made by `how`; None where it would be no copy (code, a short answer for `word`)."
    code = old["output"].startswith("def ")
    if how == "same":
        return dict(old)
    if how == "word":
        answer = None if old["instruction"].startswith("Write a short") else swapped(rng, old["output"])
        return answer and old | dict(output=answer)
    if code:
        return None
    if how == "punctuation":
        return old | {k: old[k].replace("，", "、").replace("。", "！").replace(".", " !").replace("?", " ??").replace(",", " –")
                      for k in ("instruction", "output")}  # fmt: skip
    if how == "case":
        new = old | dict(instruction=rng.choice((str.lower, str.upper))(old["instruction"]))
        return None if new == old or len(re.findall(r"\w", old["instruction"])) < 3 else new
    return old | dict(instruction="  " + old["instruction"].replace(" ", "  ") + "\n", output=old["output"] + " \n")


def rows(n: int, seed: int = 42) -> Iterator[tuple[dict, str]]:
    "The rows and their kinds."
    rng, recent, seen = random.Random(seed), [], set()
    for _ in range(n):
        if recent and rng.random() < SHARE:
            how = rng.choice(COPIES)
            copy = changed(rng, rng.choice(recent), how)
            if copy:
                yield copy, f"copy:{how}"
                continue
        while True:
            make = rng.choice((templated, rubric, free))
            new = make(rng)
            key = hash((new["instruction"].casefold(), new["input"]))
            if key not in seen:
                break
        seen.add(key)
        if len(recent) < KEEP:
            recent.append(new)
        else:
            recent[rng.randrange(KEEP)] = new
        yield new, make.__name__


def write(path: str, n: int, seed: int = 42) -> list[str]:
    "Write the file; returns the kind of each row."
    kinds = []
    with open(path, "w", encoding="utf-8", newline="\n") as f:
        for new, kind in rows(n, seed):
            f.write(json.dumps(new, ensure_ascii=False) + "\n")
            kinds.append(kind)
    return kinds


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("path")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--kinds", help="write the kind of each row here")
    args = parser.parse_args()
    kinds = write(args.path, args.rows, args.seed)
    if args.kinds:
        with open(args.kinds, "w", encoding="utf-8") as f:
            f.write("\n".join(kinds) + "\n")


if __name__ == "__main__":
    main()
