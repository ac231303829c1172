"""Near-copy cleaning by the field's pipelines, each run by clean_peers.py with the Python of an environment of its own.

    PYTHON scripts/bench/peer_cleaners.py PEER TEXTS.jsonl FOLDER [--tuned]

TEXTS holds `id` and `text`, one row a line. The ids of the rows that stay go to FOLDER/kept.txt, one a line.
The default settings are those of each pipeline; `--tuned` takes pairs of words and a threshold near 0.75.
Nothing of the cookbook is imported here.
"""

import argparse
import hashlib
import json
import re
import sys
from pathlib import Path


def lines(path: Path):
    with open(path, encoding="utf-8") as f:
        yield from map(json.loads, f)


def datatrove(texts: Path, folder: Path, tuned: bool) -> list[str]:
    """The four stages of MinHash, one worker; the second has a task for each bucket, one after the other.

    Its other step for parts of texts, exact substrings, needs a program in Rust that pip doesn't bring: left out.
    """
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import (
        MinhashConfig,
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
    )
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter

    config = MinhashConfig(n_grams=2, num_buckets=14, hashes_per_bucket=9) if tuned else MinhashConfig()
    signed, buckets, remove, out = (str(folder / name) for name in ("signed", "buckets", "remove", "out"))
    reader = JsonlReader(str(texts.parent), glob_pattern=texts.name)
    stages = [
        ([reader, MinhashDedupSignature(signed, config=config)], 1),
        ([MinhashDedupBuckets(signed, buckets, config=config)], config.num_buckets),
        ([MinhashDedupCluster(buckets, remove, config=config)], 1),
        ([reader, MinhashDedupFilter(remove), JsonlWriter(out, compression=None)], 1),
    ]
    for n, (pipeline, tasks) in enumerate(stages):
        LocalPipelineExecutor(pipeline, tasks=tasks, workers=1, logging_dir=str(folder / f"logs{n}")).run()
    return [row["id"] for path in sorted(Path(out).glob("*.jsonl")) for row in lines(path)]


def text_dedup(texts: Path, folder: Path, tuned: bool) -> list[str]:
    "The command `python -m text_dedup.minhash`, one process."
    from datasets import load_from_disk
    from text_dedup.minhash import main

    out = str(folder / "out")
    command = ["--path", "json", "--data_files", str(texts), "--split", "train", "--cache_dir", str(folder / "cache")]
    command += ["--output", out, "--column", "text", "--num_proc", "1"]
    if tuned:
        command += ["--ngram", "2", "--min_length", "1", "--threshold", "0.75"]
    main(command, standalone_mode=False)
    return list(load_from_disk(out)["id"])


def words(text: str, tuned: bool) -> list[bytes]:
    "The words of a text, as datasketch's own examples cut it; tuned: pairs of words, without case and punctuation."
    if not tuned:
        return [word.encode() for word in text.split()]
    parts = re.findall(r"\w+", text.casefold())
    pairs = [f"{a} {b}".encode() for a, b in zip(parts, parts[1:], strict=False)]
    return pairs or [" ".join(parts).encode()]


def datasketch(texts: Path, folder: Path, tuned: bool) -> list[str]:
    "Ask the index, insert what is new. Tuned: candidates are checked by their whole signatures."
    from datasketch import MinHash, MinHashLSH

    index, kept = MinHashLSH(threshold=0.75) if tuned else MinHashLSH(), {}
    for row in lines(texts):
        signed = MinHash()
        signed.update_batch(words(row["text"], tuned))
        near = index.query(signed)
        if not (any(kept[j].jaccard(signed) >= 0.75 for j in near) if tuned else near):
            kept[row["id"]] = signed
            index.insert(row["id"], signed)
    return list(kept)


def nemo_like(texts: Path, folder: Path, tuned: bool) -> list[str]:
    "The documented defaults of NeMo-Curator: MD5, then 24 characters, 20 bands of 13, and one row for each component."
    from datasketch import MinHash, MinHashLSH

    index, seen, parent = MinHashLSH(num_perm=260, params=(20, 13)), set(), {}

    def root(i):
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    for row in lines(texts):
        text = row["text"].encode()
        digest = hashlib.md5(text, usedforsecurity=False).digest()
        if digest in seen:
            continue
        seen.add(digest)
        signed, text = MinHash(num_perm=260), row["text"]
        signed.update_batch([text[i : i + 24].encode() for i in range(max(1, len(text) - 23))])
        parent[row["id"]] = row["id"]
        for other in index.query(signed):
            parent[root(row["id"])] = root(other)
        index.insert(row["id"], signed)
    return [i for i in parent if root(i) == i]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("peer", choices=("datatrove", "text_dedup", "datasketch", "nemo_like"))
    parser.add_argument("texts", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tuned", action="store_true")
    args = parser.parse_args()
    kept = globals()[args.peer](args.texts, args.folder, args.tuned)
    (args.folder / "kept.txt").write_text("".join(f"{i}\n" for i in kept))
    return 0


if __name__ == "__main__":
    sys.exit(main())
