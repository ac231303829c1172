"""Run notebooks in fresh kernels and store their outputs, with what is needed to trust them.

    python scripts/save_notebooks.py [names] [--stale] [--profile laptop]

Stored in the notebook's metadata under `cookbook`: the hash of the code cells, profile, seconds, versions, hardware and
peak memory. Progress bars, warnings on stderr and widgets are dropped. A notebook that fails stays as it was. The index
is run last, because its table shows the records of the others; README.md is written from it.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from check_notebooks import ROOT, check_fresh, code_hash, directives, find_notebooks

from deepseek_cookbook.threads import look, marked

PACKAGES = ("torch", "transformers", "trl", "peft", "deepseek-cookbook")
INDEX = ROOT / "nbs" / "index.ipynb"
# The last cell of every run: what the kernel used. VmHWM is the peak of resident memory on Linux.
PROBE = """
import json, re, resource, sys, time
try: peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
except (OSError, TypeError):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
kids = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps({"peak": peak, "cpu": time.process_time() + kids.ru_utime + kids.ru_stime}))
"""


@dataclass
class Run:
    "What a run of a notebook gave."

    notebook: dict
    seconds: float
    cpu_seconds: float = 0.0
    peak_bytes: int = 0
    error: str = ""


def skipped(source: str) -> bool:
    "Whether a cell is not run: `#| eval: false` and `#| notest`, as in nbdev-test."
    found = directives(source)
    return found.get("eval", "").lower() == "false" or "notest" in found


def execute(
    path: Path,  # A notebook
    profile: str,  # Value of DSC_PROFILE in the kernel
    timeout: int = 1800,  # Seconds a cell may take
) -> Run:  # The notebook with outputs, or the error
    "Run a notebook in a fresh kernel, in its own folder, without network for the hub."
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    class Client(NotebookClient):
        async def async_execute_cell(self, cell, cell_index, *args, **kwargs):
            return cell if skipped(cell.source) else await super().async_execute_cell(cell, cell_index, *args, **kwargs)

    notebook = nbformat.read(path, as_version=4)
    probe = nbformat.v4.new_code_cell(PROBE)
    notebook.cells.append(probe)
    env = {**os.environ, "DSC_PROFILE": profile, "PYTHONHASHSEED": "0", **marked(look().variables)}
    env.setdefault("HF_HUB_OFFLINE", "1")
    folder = {"metadata": {"path": str(path.parent)}}
    client = Client(notebook, timeout=timeout, kernel_name="python3", resources=folder)
    client.extra_arguments = ["--IPKernelApp.log_level=40"]
    start = time.perf_counter()
    try:
        client.execute(env=env)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
        return Run(notebook, time.perf_counter() - start, error="\n".join(text.splitlines()[-25:]))
    seconds = time.perf_counter() - start
    used = json.loads("".join(o["text"] for o in probe.outputs if o.get("name") == "stdout"))
    notebook.cells.remove(probe)
    return Run(notebook, seconds, used["cpu"], used["peak"])


def strip_output(
    output: dict,  # One output of a cell
) -> dict | None:  # The output to keep, or None
    "Drop stderr, widgets and progress bars; of a line that was overwritten keep the last state."
    if output["output_type"] == "stream":
        if output["name"] == "stderr":
            return None
        lines = [line.rsplit("\r", 1)[-1] for line in output["text"].split("\n")]
        return {**output, "text": "\n".join(lines)} if "".join(lines).strip() else None
    data = output.get("data", {})
    if any("widget" in mime for mime in data) or "<progress" in "".join(data.get("text/html", "")):
        return None
    return output


def hardware() -> str:
    "The machine in words: cores, bf16, memory; nothing that names it."
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fast = next((name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if f" {name}" in flags), "")
    memory = psutil.virtual_memory().total / 2**30
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return ", ".join(filter(None, [f"{cores} {platform.machine()} cores", fast, f"{memory:.0f} GiB"]))


def record(run: Run, profile: str) -> dict:
    "The metadata that says how the outputs came about."
    versions = {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in PACKAGES}
    return {
        "code_hash": code_hash(run.notebook),
        "hardware": hardware(),
        "peak_memory_gib": round(run.peak_bytes / 2**30, 2),
        "profile": profile,
        "seconds": round(run.seconds, 1),
        "versions": versions,
    }


def store(
    path: Path,  # Where the notebook is
    run: Run,  # A run without error
    profile: str,  # The profile it ran in
) -> None:
    "Write the notebook with its outputs, cleaned as nbdev-clean does, under a temporary name first."
    from fastcore.nbio import nb2str
    from nbdev.clean import clean_nb

    notebook = json.loads(json.dumps(run.notebook))
    for cell in notebook["cells"]:
        if "outputs" in cell:
            cell["outputs"] = [kept for output in cell["outputs"] if (kept := strip_output(output))]
    notebook["metadata"]["kernelspec"] = {
        "display_name": "Python 3 (ipykernel)",
        "language": "python",
        "name": "python3",
    }
    notebook["metadata"]["cookbook"] = record(run, profile)
    clean_nb(notebook, allowed_metadata_keys=["cookbook"])
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(nb2str(notebook), encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save(path: Path, profile: str) -> bool:
    "Run one notebook and store it; say how it went."
    before = path.read_bytes()
    run = execute(path, profile)
    name = path.relative_to(ROOT)
    if run.error:
        print(f"FAILED {name} after {run.seconds:.0f} s; the file is unchanged\n{run.error}\n", file=sys.stderr)
        return False
    if path.read_bytes() != before:
        print(f"FAILED {name}: the file was edited during the run; it is left as edited, run again", file=sys.stderr)
        return False
    store(path, run, profile)
    print(
        f"saved {name}: {run.seconds:.0f} s, {run.cpu_seconds:.0f} CPU s, peak {run.peak_bytes / 2**30:.1f} GiB",
        flush=True,
    )
    return True


def main() -> int:
    "Choose the notebooks, run them one after the other, the index last."
    parser = argparse.ArgumentParser(description="Run notebooks and store their outputs.")
    parser.add_argument("names", nargs="*", help="parts of notebook names (default: all)")
    parser.add_argument("--stale", action="store_true", help="only those whose code changed since they were saved")
    parser.add_argument(
        "--profile", default=os.environ.get("DSC_PROFILE") or "laptop", help="default: DSC_PROFILE, else laptop"
    )
    args = parser.parse_args()
    from check_notebooks import Notebook

    paths = [p for p in find_notebooks(args.names) if p != INDEX]
    if args.stale:
        paths = [p for p in paths if list(check_fresh(Notebook(p)))]
    failed = [path.stem for path in paths if not save(path, args.profile)]
    if INDEX.exists():
        if not save(INDEX, args.profile):
            failed.append(INDEX.stem)
        failed += ["README.md"] * (
            subprocess.run([sys.executable, str(ROOT / "scripts" / "readme.py")]).returncode != 0
        )
    if failed:
        print(f"Not saved: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
