"""Clean instruction rows with planted copies, by the cookbook and by the field's pipelines, in one run.

    python scripts/bench/clean_peers.py [--rows 50000] [--peers NAME …] [--venvs FOLDER] [--nemo] [--out FILE]

Rows: those of data_rows.py; one in ten is a copy, all others must stay. Peers get a row as one text: instruction, input
and output, joined by line ends. Each has a line with its own defaults, and where it makes sense one that is tuned to
what the cookbook looks for: pairs of words, a threshold near 0.75, and Han characters set apart by blanks (done for
them outside of the clock). They are installed by pip, with pinned versions, each into an environment of its own in
FOLDER (a temporary one by default), never into the project's. A peer that fails is listed with its error.
Rows a CPU second are those of the whole command, from the file to the file, with its imports; one process each. Peak
memory is the largest sum of the resident memory of the command and its children. Found is a copy that is gone, lost a
row that is gone with all of its copies; which one of them stays counts against nobody: where a peer keeps copies only,
the one most like the row counts as the row. `--nemo` installs NeMo-Curator too (6 GB) and says why its own stages don't
run here; its line in the table is its documented defaults on datasketch.
scripts/bench/results/clean_peers.json are the figures of 50,000 rows, of two cores that had other work to do as well.
Exit code 1 where a peer failed or where rows of the cookbook's are unaccounted for.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import venv
from dataclasses import asdict, dataclass
from pathlib import Path

import data_rows
from clean import ROOT, cleaned_once, judged, measured
from rich.console import Console
from rich.table import Table

WORKER = Path(__file__).with_name("peer_cleaners.py")
HAN = r"[\u3400-\u4dbf\u4e00-\u9fff]"
BESIDE_HAN = re.compile(rf"(?<={HAN})(?=\w)|(?<=\w)(?={HAN})")
NUMPY = "numpy==2.4.6"
PINS = {
    "datatrove": ("datatrove==0.10.1", "spacy==3.8.18", "tokenizers==0.23.3", "regex==2026.11.19", "xxhash==3.8.2",
                  "orjson==3.13.0", NUMPY),
    "text-dedup": ("text-dedup==0.4.0", "datasets==5.2.0", NUMPY),
    "datasketch": ("datasketch==2.0.0", "scipy==1.17.1", NUMPY),
    "nemo-curator": ("nemo-curator==1.4.0",),
}
ALIKE = ["copy:same", "copy:case", "copy:space", "copy:punctuation", "copy:word"]  # the most alike first
NEMO = "nemo_curator.stages.deduplication.fuzzy.workflow"


@dataclass(frozen=True)
class Line:
    "One line of the table: a peer with some settings."
    name: str
    settings: str
    pins: str = ""  # its environment, a key of PINS; the cookbook has none
    function: str = ""  # in peer_cleaners.py
    tuned: bool = False


OURS = Line("deepseek_cookbook", "data clean, its defaults: fields apart, pairs of words, threshold 0.75")
LINES = (
    Line("datatrove", "defaults: 5 words, 14 buckets of 8, English", "datatrove", "datatrove"),
    Line("datatrove, tuned", "2 words, 14 buckets of 9 (half of the pairs at 0.75), Han characters apart",
         "datatrove", "datatrove", True),
    Line("text-dedup", "defaults of its minhash: 5 words, threshold 0.7, 250 hashes, rows below 5 words dropped",
         "text-dedup", "text_dedup"),
    Line("text-dedup, tuned", "2 words, threshold 0.75, min_length 1, Han characters apart",
         "text-dedup", "text_dedup", True),
    Line("NeMo-Curator-like", "its defaults on datasketch: MD5, then 24 characters, 20 bands of 13",
         "datasketch", "nemo_like"),
    Line("datasketch", "defaults: words at white space, threshold 0.9, 128 hashes, candidates unchecked",
         "datasketch", "datasketch"),
    Line("datasketch, tuned", "2 words, threshold 0.75, candidates checked, Han characters apart",
         "datasketch", "datasketch", True),
)  # fmt: skip


def row_text(row: dict, apart: bool = False) -> str:
    "A row as one text; `apart` sets its Han characters apart by blanks."
    text = "\n".join(row[name] for name in ("instruction", "input", "output") if row[name])
    return BESIDE_HAN.sub(" ", text) if apart else text


def families(rows: list[dict]) -> list[int]:
    "For each row the number of the first one that asks the same; a copy of data_rows.py changes no word of that."
    first = {}

    def asked(row):
        return tuple(" ".join(re.findall(r"\w+", row[name].casefold())) for name in ("instruction", "input"))

    return [first.setdefault(asked(row), i) for i, row in enumerate(rows)]


def fair(kept: set[int], family: list[int], kinds: list[str]) -> set[int]:
    "The kept rows; where only copies of a row are kept, the one most like it counts as the row itself."
    stand_in = {}
    for i in sorted(kept, key=lambda i: (ALIKE.index(kinds[i]) if kinds[i] in ALIKE else -1, i)):
        if family[i] not in kept:
            stand_in.setdefault(family[i], i)
    return (kept - set(stand_in.values())) | set(stand_in)


def install(name: str, folder: Path) -> Path:
    "The Python of a peer's environment; made where it isn't there yet."
    home, pins = folder / name, "\n".join(PINS[name])
    done, python = home / "pins.txt", home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not done.exists() or done.read_text() != pins:
        print(f"installing {', '.join(PINS[name])}", flush=True)
        venv.create(home, clear=True, with_pip=True)
        command = [str(python), "-m", "pip", "install", "--quiet", *PINS[name]]
        subprocess.run(command, check=True, capture_output=True, text=True)
        done.write_text(pins)
    return python


def last_line(text: str) -> str:
    return next((line.strip()[:300] for line in reversed(text.splitlines()) if line.strip()), "no message")


def run_peer(line: Line, texts: Path, folder: Path, python: Path) -> dict:
    "Run one line in a fresh process; returns its figures, and leaves the ids in kept.txt."
    command = [str(python), str(WORKER), line.function, str(texts), str(folder)] + ["--tuned"] * line.tuned
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"), "1")
    quiet = dict(HF_HOME=str(folder / "home"), HF_HUB_OFFLINE="1", PYTHONPATH="")
    before = os.times()
    done, wall, peak = measured(command, cwd=folder, env={**os.environ, **threads, **quiet})
    after = os.times()
    if done.returncode:
        raise RuntimeError(last_line(done.stderr))
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return dict(wall=wall, cpu=cpu, peak_gib=peak)


def verdict(kept: set[int], rows: list[dict], kinds: list[str], family: list[int], folder: Path) -> dict:
    "What became of each kind, by the judge of clean.py."
    kept = fair(kept, family, kinds)
    gone = [dict(number=i + 1, reason="near") for i in range(len(rows)) if i not in kept]
    for name, part in (("out", [rows[i] for i in sorted(kept)]), ("rejected", gone)):
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as f:
            f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
    return judged(folder, kinds)


def one_line(line: Line, base: Path, venvs: Path, rows: list[dict], kinds: list[str], family: list[int]) -> dict:
    "Figures of one line, or its error."
    with tempfile.TemporaryDirectory(prefix="peer-", dir=base) as name:
        folder = Path(name)
        try:
            if line.pins:
                figures = run_peer(line, base / f"texts{int(line.tuned)}.jsonl", folder, install(line.pins, venvs))
                ids = list(map(int, (folder / "kept.txt").read_text().split()))
                assert len(ids) == len(set(ids)), "a row was written twice"
                figures |= verdict(set(ids), rows, kinds, family, folder)
            else:
                figures = cleaned_once(base / "in.jsonl", folder, 1, ROOT) | judged(folder, kinds)
        except (RuntimeError, subprocess.CalledProcessError) as e:
            return asdict(line) | dict(error=last_line(getattr(e, "stderr", "") or str(e)))
    return asdict(line) | dict(rows_per_cpu_second=len(rows) / figures["cpu"], **figures)


def nemo_error(venvs: Path) -> str:
    "Why NeMo-Curator's own stages don't run here; empty where they can be imported."
    try:
        python = install("nemo-curator", venvs)
    except subprocess.CalledProcessError as e:
        return last_line(e.stderr)
    done = subprocess.run([str(python), "-c", f"import {NEMO}"], capture_output=True, text=True)
    return f"import {NEMO}: {last_line(done.stderr)}" if done.returncode else ""


def tables(results: list[dict]) -> list[Table]:
    "Speed and memory; copies that were found; rows that were lost."
    good = [r for r in results if "error" not in r]
    out = [Table("speed", "rows/CPU s", "wall s", "peak GiB", "kept")]
    for r in good:
        out[0].add_row(r["name"], f"{r['rows_per_cpu_second']:,.0f}", f"{r['wall']:.1f}", f"{r['peak_gib']:.2f}",
                       f"{r['kept']:,}")  # fmt: skip
    for part in ("found", "lost"):
        kinds = list(good[0][part]) if good else []
        out.append(Table(part, *(kind.removeprefix("copy:") for kind in kinds)))
        for r in good:
            out[-1].add_row(r["name"], *(f"{r[part][kind]:.1%}" for kind in kinds))
    return out


def prepared(n: int, seed: int, base: Path) -> tuple[list[dict], list[str]]:
    "The rows and their kinds; the files for the cookbook and for the peers are written."
    kinds = data_rows.write(str(base / "in.jsonl"), n, seed)
    rows = [json.loads(line) for line in (base / "in.jsonl").read_text(encoding="utf-8").splitlines()]
    for apart in (False, True):
        with open(base / f"texts{int(apart)}.jsonl", "w", encoding="utf-8") as f:
            for i, row in enumerate(rows):
                f.write(json.dumps(dict(id=str(i), text=row_text(row, apart)), ensure_ascii=False) + "\n")
    return rows, kinds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--peers", nargs="+", choices=[line.name for line in LINES], metavar="NAME",
                        help="lines of the table (default: all)")  # fmt: skip
    parser.add_argument("--venvs", type=Path, help="folder of the peers' environments (default: a temporary one)")
    parser.add_argument("--nemo", action="store_true", help="install NeMo-Curator, to say why it doesn't run here")
    parser.add_argument("--out", type=Path, help="write the figures here")
    args = parser.parse_args()
    lines = [line for line in LINES if not args.peers or line.name in args.peers]
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    with tempfile.TemporaryDirectory(prefix="peers-") as name:
        base = Path(name)
        venvs = args.venvs.resolve() if args.venvs else base / "venvs"
        rows, kinds = prepared(args.rows, args.seed, base)
        family, results = families(rows), []
        for line in (OURS, *lines):
            print(f"{line.name}: {line.settings}", flush=True)
            results.append(one_line(line, base, venvs, rows, kinds, family))
        nemo = nemo_error(venvs) if args.nemo else None
    Console(soft_wrap=True, highlight=False).print(*tables(results), sep="\n")
    failed = [r for r in results if "error" in r]
    for r in failed:
        print(f"{r['name']} failed: {r['error']}")
    if nemo:
        print(f"NeMo-Curator: {nemo}")
    if args.out:
        from deepseek_cookbook.pipeline import made_with
        from deepseek_cookbook.settings import write_json

        command = " ".join(["python", "scripts/bench/clean_peers.py", *sys.argv[1:]])
        command = command.replace(str(args.venvs), "FOLDER") if args.venvs else command
        write_json(args.out, dict(command=command, rows=args.rows, seed=args.seed, load_at_start=load, pins=PINS,
                                  lines=results, nemo_curator=nemo, made_with=made_with()))  # fmt: skip
    return int(bool(failed or results[0].get("unaccounted")))


if __name__ == "__main__":
    sys.exit(main())
