"""Run the learning tests with many seeds and count: which test failed how often, and how far from its limits it was.

    python scripts/seeds.py                                     (all learning tests, seeds 0 to 19)
    python scripts/seeds.py tests/test_ppo_learns.py --seeds 0-4 -k bandit
    python scripts/other_cpus.py --only avx2 --threads 1 -- python scripts/seeds.py --seeds 0-4

A learning test asserts what a trajectory did, so it has the marker `learning`, takes the fixture `seed`, and notes the
numbers that it judges with the fixture `spread`. Printed are passed and failed runs, the mean seconds of a run, and the
least and the largest of each number. A limit belongs well outside of that range, and the docstring of the test says how
many seeds were measured. Whatever is not an option here goes to pytest.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def results(report: Path) -> dict[str, dict]:
    "Of each test the outcomes, seconds and numbers over all seeds, from a report of pytest."
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = re.sub(r"-?seed\d+-?(?=.*\])", "", case.get("name")).replace("[]", "")
        entry = found.setdefault(f"{case.get('classname').split('.')[-1]}::{name}",
                                 dict(passed=0, failed=[], seconds=0.0, numbers={}))  # fmt: skip
        if case.find("skipped") is not None:
            continue
        seed = re.search(r"seed(\d+)", case.get("name"))
        if case.find("failure") is not None or case.find("error") is not None:
            entry["failed"].append(int(seed[1]) if seed else "default")
        else:
            entry["passed"] += 1
        entry["seconds"] += float(case.get("time"))
        for p in case.iter("property"):
            entry["numbers"].setdefault(p.get("name"), []).append(float(p.get("value")))
    return found


def table(found: dict[str, dict]) -> str:
    "One line a test, below it one line a number."
    width = max(map(len, found), default=4)
    lines = [f"{'test':{width}} {'passed':>6} {'failed':>6} {'mean s':>7}"]
    for name, entry in found.items():
        count = max(1, entry["passed"] + len(entry["failed"]))
        seeds = f"  seeds {entry['failed']}" if entry["failed"] else ""
        counts = f"{entry['passed']:6} {len(entry['failed']):6} {entry['seconds'] / count:7.1f}"
        lines.append(f"{name:{width}} {counts}{seeds}")
        lines += [f"    {k}: {min(v):.4g} to {max(v):.4g}" for k, v in entry["numbers"].items()]
    return "\n".join(lines)


def main(words: list[str] | None = None) -> int:
    "Run pytest once for all seeds; the exit code says whether all passed."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0-19", metavar="N-M", help="default: 0-19")
    args, rest = parser.parse_known_args(words)
    paths = [] if any(not word.startswith("-") and "test" in word for word in rest) else ["tests"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", *paths, "-m", "learning", "--learning-seed", args.seeds, *rest,
                   f"--junitxml={report}", "-o", "junit_family=xunit1", "-p", "no:cacheprovider",
                   "--disable-warnings"]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        found = results(report) if report.is_file() else {}
    if done.returncode:
        print(done.stdout[-6000:])
    print(table(found))
    passed, failed = sum(e["passed"] for e in found.values()), sum(len(e["failed"]) for e in found.values())
    print(f"{len(found)} tests, seeds {args.seeds}: {passed} passed, {failed} failed")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
