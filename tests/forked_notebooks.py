"""Notebooks run in processes that are copies of one that has imported the large packages: seconds saved for each.

`nbdev-test` runs cells in the same way, by execnb; a kernel of its own gets each notebook when its outputs are saved.
"""

import json
import multiprocessing
import os
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

LARGE = ["torch", "transformers", "datasets", "peft", "trl", "trl.trainer.sft_trainer", "trl.trainer.reward_trainer",
         "pandas", "matplotlib.figure", "execnb.shell"]  # fmt: skip


def run_notebook(path: Path, profile: str) -> tuple[dict, float, float, str]:
    "Its cells with outputs, wall and CPU seconds, and the error."
    from execnb.shell import CaptureShell
    from fastcore.nbio import read_nb
    from save_notebooks import skipped

    os.environ["DSC_PROFILE"], began = profile, time.perf_counter()
    os.chdir(path.parent)
    notebook, shell, error = read_nb(path), CaptureShell(path), ""
    try:
        shell.run_all(notebook, exc_stop=True, preproc=lambda c: c.cell_type != "code" or skipped(c.source),
                      cell_timeout=300)  # fmt: skip
    except BaseException as e:
        error = "\n".join((shell.prettytb(fname=path) or repr(e)).splitlines()[-25:])
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(u.ru_utime + u.ru_stime for u in used)
    return json.loads(json.dumps(notebook, default=dict)), time.perf_counter() - began, cpu, error


def run_notebooks(paths: list[Path], profile: str, workers: int) -> list[tuple[dict, float, float, str]]:
    "Each notebook in a process of its own."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LARGE)
    with ProcessPoolExecutor(workers, context, max_tasks_per_child=1) as pool:
        return list(pool.map(run_notebook, paths, [profile] * len(paths)))
