"""How far local models of three sizes agree with the desk's rules when they judge pairs, in both orders.

    python scripts/bench/judge.py [--models NAME ...] [--pairs 25]

The pairs are those of the bank desk, English and Chinese: the better answer is better by rule, and one dimension of the
other is broken. Each pair is asked in both orders; a verdict is the log-odds of A against B. Fetch the models first:
deepseek-cookbook fetch NAME. The result is printed, and goes to scripts/bench/results/judge.json.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "judge.json"
MODELS = ["smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct", "qwen2.5-coder-1.5b-instruct"]


def draw(desk: str, n: int) -> tuple[list[dict], list[str]]:
    "Rows to judge, and the dimension that is broken in the second answer of each."
    from deepseek_cookbook.reward.pairs import desk_pairs, text_of

    pairs = desk_pairs(n, "held", {desk: 1.0})
    rows = [dict(prompt=p["prompt"], answers=[text_of(p["chosen"]), text_of(p["rejected"])]) for p in pairs]
    return rows, [p["dimension"] for p in pairs]


def gold(prompt, answer) -> float:
    from deepseek_cookbook.reward.pairs import gold_reward

    return gold_reward([prompt], [answer])[0]


def right_by_dimension(rows, verdicts, dimensions: list[str], calibrate: bool) -> dict[str, str]:
    "Pairs that were judged as the rule says, in both orders, of those with that dimension broken."
    from deepseek_cookbook.reward.judge import outcomes

    found = {o["row"]: o["outcome"] == "first" for o in outcomes(verdicts, calibrate)}
    at = {d: [found[i] for i, other in enumerate(dimensions) if other == d] for d in sorted(set(dimensions))}
    return {d: f"{sum(hits)} of {len(hits)}" for d, hits in at.items()}


def measure(name: str, desks: dict[str, tuple[list[dict], list[str]]]) -> list[dict]:
    "One model on all desks."
    from deepseek_cookbook.models import load_model, load_tokenizer
    from deepseek_cookbook.reward.judge import LocalJudge, judge_answers, judge_report, place_bias

    judge = LocalJudge(load_model(name, dtype="bfloat16"), load_tokenizer(name), name)
    made = []
    for desk, (rows, dimensions) in desks.items():
        began = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            verdicts = judge_answers(rows, judge, Path(folder) / "judged.jsonl")
        seconds = (time.process_time() - began) / len(verdicts)
        row = dict(model=name, desk=desk, verdicts=len(verdicts), cpu_seconds_a_verdict=round(seconds, 2),
                   place_bias=round(place_bias(verdicts), 2))  # fmt: skip
        single = sum((v["choice"] == "A") != v["swapped"] for v in verdicts)
        row["single_verdicts_right"] = f"{single} of {len(verdicts)}"
        for calibrate in (False, True):
            report = judge_report(rows, verdicts, gold, calibrate=calibrate)
            told = ("outcomes", "consistent", "first_place", "longer_chosen", "accuracy", "kappa")
            kept = {k: report[k] for k in told}
            kept["right_in_both_orders"] = right_by_dimension(rows, verdicts, dimensions, calibrate)
            row["calibrated" if calibrate else "raw"] = kept
        print(json.dumps(row), flush=True)
        made.append(row)
    return made


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--pairs", type=int, default=25)
    args = parser.parse_args()
    import torch
    import transformers

    desks = {desk: draw(desk, args.pairs) for desk in ("bank.en", "bank.zh")}
    result = dict(command=f"scripts/bench/judge.py --pairs {args.pairs}", pairs_a_desk=args.pairs, dtype="bfloat16",
                  torch=torch.__version__, transformers=transformers.__version__, rows=[])  # fmt: skip
    for name in args.models:
        result["rows"] += measure(name, desks)
        RESULT.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
