"""Write synthetic instruction rows in Chinese and English with planted faults, the same ones for the same seed.

    python scripts/bench/make_rows.py rows.jsonl --rows 1000000 [--seed 42] [--json FILE]

Of a hundred rows about: 8 exact copies, 6 near copies (a word replaced), 5 short answers, 5 with invisible
characters, 5 with private data, 1 decoded wrongly, 1 line that is no record. The others differ from each other by their
words. Copies are of any row before, near or far. What was planted goes to the standard output as JSON, or to --json.
"""

import argparse
import json
import random
from collections import Counter

ZH = (
    "账户余额转账退款订单物流发票客服密码登录支付商品质量尺寸颜色时间地址电话合同利率贷款还款信用积分会员优惠活动"
    "申请办理审核通过拒绝修改取消确认联系咨询提供选择使用下载安装更新设置打开关闭保存删除查询显示网络系统服务安全"
)
EN = """account balance transfer refund order parcel invoice support password login payment product quality size colour
time address contract rate loan repay credit points member offer event apply handle review approve refuse change cancel
confirm contact ask supply choose use download install update set open close save delete query show network system
service safety market report model data train test value error device memory window branch record table server client
morning evening letter number street garden river mountain doctor teacher student engineer answer
question reason""".split()
KINDS = dict(exact_copy=8, near_copy=6, short=5, invisible=5, private=5, garbled=1, broken=1, plain=69)
INVISIBLE = ["\u200b", "\u202e", "\x07", "\ue000", "\u00ad"]
# 010-… and …@example.com belong to nobody; the identity number is the example of the standard.
PRIVATE = ["li.wei@example.com", "13800138000", "+44 20 7946 0958", "11010519491231002X"]
KEEP = 4096  # rows, from all over the file, that a copy can be of


def words(rng: random.Random, chinese: bool, n: int) -> list[str]:
    "Some words: pairs of characters, or English words with an ending that makes them many."
    if chinese:
        return ["".join(rng.choices(ZH, k=2)) for _ in range(n)]
    return [rng.choice(EN) + rng.choice(("", "s", "ed", "ing", "er")) for _ in range(n)]


def join(parts: list[str], chinese: bool) -> str:
    return "".join(parts) + "。" if chinese else " ".join(parts).capitalize() + "."


def plain(rng: random.Random) -> tuple[bool, list[str], list[str]]:
    "Language, words of the question, words of the answer: 15 to 60 words in all."
    chinese = rng.random() < 0.5
    return chinese, words(rng, chinese, rng.randint(5, 12)), words(rng, chinese, rng.randint(10, 48))


def near(rng: random.Random, row):
    "The row with a word of the answer replaced, two in a long one."
    chinese, ask, answer = row
    answer = list(answer)
    for i in rng.sample(range(len(answer)), 1 if len(answer) < 45 else 2):
        answer[i] = words(rng, chinese, 1)[0]
    return chinese, ask, answer


def as_json(chinese, ask, answer) -> str:
    row = dict(instruction=join(ask, chinese), input="", output=join(answer, chinese), history=[])
    return json.dumps(row, ensure_ascii=False)


def lines(rows: int, seed: int, planted: Counter):
    "The lines of the file; what was planted is counted."
    rng, recent = random.Random(seed), []
    names, weights = list(KINDS), list(KINDS.values())
    for _ in range(rows):
        kind = rng.choices(names, weights)[0]
        if kind in ("exact_copy", "near_copy") and not recent:
            kind = "plain"
        planted[kind] += 1
        row = rng.choice(recent) if kind in ("exact_copy", "near_copy") else plain(rng)
        while kind == "near_copy" and len(row[2]) < 24:  # in a short answer another word is another answer
            row = plain(rng) if all(len(r[2]) < 24 for r in recent) else rng.choice(recent)
        if kind == "near_copy":
            row = near(rng, row)
        chinese, ask, answer = row
        if kind == "short":
            answer = answer[:1]
        elif kind == "invisible":
            answer = [*answer[:3], answer[3] + rng.choice(INVISIBLE), *answer[4:]]
        elif kind == "private":
            answer = [*answer[:3], f" {rng.choice(PRIVATE)} ", *answer[3:]]
        elif kind == "garbled":
            answer = [*answer, "\ufffd\ufffd"]
        elif kind == "plain":
            if len(recent) < KEEP:
                recent.append(row)
            else:
                recent[rng.randrange(KEEP)] = row
        text = as_json(chinese, ask, answer)
        yield text[: len(text) // 2] if kind == "broken" else text


def write(path: str, rows: int, seed: int = 42) -> Counter:
    "Write the file; returns what was planted."
    planted = Counter()
    with open(path, "w", encoding="utf-8", newline="\n") as f:
        f.writelines(line + "\n" for line in lines(rows, seed, planted))
    return planted


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("path")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--json", help="write what was planted here")
    args = parser.parse_args()
    text = json.dumps(dict(rows=args.rows, seed=args.seed, planted=write(args.path, args.rows, args.seed)))
    if args.json:
        with open(args.json, "w", encoding="utf-8") as f:
            f.write(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
