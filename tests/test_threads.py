"""Threads by the load: counters, quotas and environments as facts; the user's variables win; PyTorch comes after."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from deepseek_cookbook import threads
from deepseek_cookbook.threads import MARK, NAMES, SPIN, Choice, Reading, decide, fitting, follow, free_cores

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems have no /proc/stat")
START = Reading(cpus=2, idle=0, total=0, own=0.0, at=0.0)


@pytest.fixture
def clean(monkeypatch):
    "A process in which nobody chose anything."
    for name in (*NAMES, MARK, "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "_now", {})
    before, put_back = torch.get_num_threads(), torch.set_num_threads
    yield monkeypatch
    put_back(before)


# ---------------------------------------------------------------- what the machine says


@pytest.mark.parametrize("files, cores", [
    ({"cpu.max": "200000 100000\n"}, 2.0),
    ({"cpu.max": "50000 100000\n"}, 0.5),
    ({"cpu.max": "max 100000\n"}, None),
    ({"cpu/cpu.cfs_quota_us": "150000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1.5),
    ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
    ({"cpu.max": "nonsense"}, None),
    ({}, None),
])
def test_the_quota_of_a_control_group(tmp_path, files, cores):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert threads.cpu_quota(tmp_path) == cores


@pytest.mark.parametrize("quota, cpus, cores", [(None, 2, 2), (0.5, 2, 1), (1.5, 4, 1), (3.0, 2, 2), (4.0, 64, 4)])
def test_cores_are_bounded_by_quota_and_affinity(monkeypatch, quota, cpus, cores):
    monkeypatch.setattr(threads, "cpu_quota", lambda: quota)
    monkeypatch.setattr(threads, "usable_cpus", lambda: set(range(cpus)))
    monkeypatch.setattr(threads, "physical_cores", len)
    assert threads.usable_cores() == cores


@pytest.mark.parametrize("siblings, cores", [(["0", "1"], 2), (["0-1", "0-1"], 1), (["0,2", "1,3", "0,2", "1,3"], 2)])
def test_hardware_threads_are_not_cores(tmp_path, siblings, cores):
    for n, text in enumerate(siblings):
        (tmp_path / f"cpu{n}" / "topology").mkdir(parents=True)
        (tmp_path / f"cpu{n}" / "topology" / "thread_siblings_list").write_text(text + "\n")
    assert threads.physical_cores(set(range(len(siblings))), tmp_path) == cores
    assert threads.physical_cores({0, 1, 2}, tmp_path / "absent") == 3


STAT = """cpu  999 0 999 999 0 0 0 0 0 0
cpu0 10 1 5 80 2 0 1 1 0 0
cpu1 50 0 10 40 0 0 0 0 0 0
cpu10 7 7 7 7 7 7 7 7 7 7
intr 1 2 3
"""


@pytest.mark.parametrize("cpus, idle, total", [({0}, 82, 100), ({0, 1}, 122, 200), ({10}, 14, 56)])
def test_counters_of_the_usable_processors(tmp_path, cpus, idle, total):
    (tmp_path / "stat").write_text(STAT)
    found = threads.read_counters(cpus, tmp_path / "stat")
    assert (found.cpus, found.idle, found.total) == (len(cpus), idle, total)


def test_counters_that_are_not_there(tmp_path):
    (tmp_path / "stat").write_text("intr 1\n")
    assert threads.read_counters({0}, tmp_path / "stat") is None
    assert threads.read_counters({0}, tmp_path / "absent") is None


@pytest.mark.parametrize("idle, own, free", [
    (200, 0.0, 2.0),  # a quiet machine
    (100, 0.0, 1.0),  # one core is another program's
    (100, 1.0, 2.0),  # one core is ours
    (0, 2.0, 2.0),  # both are ours
    (0, 1.3, 1.3),  # three threads share two cores
    (0, 0.0, 0.0),
    (200, 0.5, 2.0),  # counters of hundredths are not exact
])
def test_our_own_load_does_not_count(idle, own, free):
    assert free_cores(START, Reading(2, idle, 200, own, 1.0)) == pytest.approx(free)


def test_counters_that_stand_still_say_nothing():
    assert free_cores(START, replace(START, at=1.0)) is None


@pytest.mark.parametrize("free, cores, expected", [
    (2.0, 2, 2), (1.71, 2, 2), (1.69, 2, 1), (1.0, 2, 1), (0.0, 2, 1), (15.8, 16, 16), (7.2, 16, 7), (64.0, 4, 4)])
def test_threads_that_fit(free, cores, expected):
    assert fitting(free, cores) == expected


# ---------------------------------------------------------------- the choice


@pytest.mark.parametrize("free, count", [(2.0, "2"), (1.0, "1"), (0.1, "1")])
def test_without_the_users_word_the_load_decides(free, count):
    assert decide(free, 2, {}).variables == {"OMP_NUM_THREADS": count, "GOMP_SPINCOUNT": str(SPIN)}


@pytest.mark.parametrize("own, variables, threads_, wait", [
    ({"OMP_NUM_THREADS": "2"}, {"GOMP_SPINCOUNT": "0"}, 2, "spin 0"),  # more than are free: no spinning
    ({"OMP_NUM_THREADS": "1"}, {"GOMP_SPINCOUNT": str(SPIN)}, 1, f"spin {SPIN}"),
    ({"OMP_WAIT_POLICY": "PASSIVE"}, {"OMP_NUM_THREADS": "1"}, 1, "wait passive"),
    ({"GOMP_SPINCOUNT": "7"}, {"OMP_NUM_THREADS": "1"}, 1, "spin 7"),
    ({"OMP_NUM_THREADS": "4,2", "OMP_WAIT_POLICY": "active"}, {}, 4, "wait active"),
])
def test_the_users_own_variables_win(own, variables, threads_, wait):
    choice = decide(1.0, 2, own)
    assert (choice.variables, choice.threads, choice.wait) == (variables, threads_, wait)
    assert all(f"{n}={v}" in str(choice) for n, v in own.items())


@pytest.mark.parametrize("value", ["", "0", "many", "-1"])
def test_a_number_that_is_none(value):
    assert threads.asked_threads({"OMP_NUM_THREADS": value}) is None


def test_what_we_set_is_not_the_users():
    ours = threads.marked(decide(1.0, 2, {}).variables)
    assert threads.users_own(ours) == {}
    assert decide(2.0, 2, ours).threads == 2
    assert threads.users_own({**ours, "OMP_WAIT_POLICY": "active"}) == {"OMP_WAIT_POLICY": "active"}


def test_an_unknown_load_leaves_everything_alone(clean):
    choice = decide(None, 8, {})
    assert choice.variables == {} and choice.threads is None and "doesn't tell" in str(choice)
    clean.setattr(sys, "platform", "darwin")
    clean.setattr(threads, "probe", lambda: pytest.fail("looked"))
    assert threads.look({}).variables == {}


def test_nothing_is_measured_where_everything_is_decided(monkeypatch):
    monkeypatch.setattr(threads, "probe", lambda: pytest.fail("looked"))
    assert threads.look({"OMP_NUM_THREADS": "1"}).threads == 1
    assert threads.look({"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "5"}).wait == "spin 5"


@linux
def test_processes_of_one_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr(threads, "probe", lambda: 8.0)
    monkeypatch.setattr(threads, "usable_cores", lambda: 8)
    assert threads.look({"LOCAL_WORLD_SIZE": "4"}).threads == 2
    assert threads.look({"LOCAL_WORLD_SIZE": "16"}).threads == 1


@linux
def test_a_shell_can_eval_the_choice():
    text = threads.as_exports(decide(2.0, 2, {}))
    shown = subprocess.run(["sh", "-c", f'{text}\necho "$OMP_NUM_THREADS $GOMP_SPINCOUNT $DSC_THREADS"'],
                           capture_output=True, text=True)
    assert shown.stdout == f"2 {SPIN} OMP_NUM_THREADS GOMP_SPINCOUNT\n"


# ---------------------------------------------------------------- while it trains


def busy_later(monkeypatch, *readings):
    "Readings that the next looks see."
    left = list(readings)
    monkeypatch.setattr(threads, "read_counters", lambda: left.pop(0))


def test_threads_follow_the_load_and_come_back(clean):
    torch.set_num_threads(2)
    threads._now.update(choice=decide(2.0, 2, {}), reading=START)
    busy_later(clean, Reading(2, 0, 400, 2.0, 2.0), Reading(2, 10, 440, 2.1, 2.2), Reading(2, 200, 800, 4.0, 4.0))
    assert threads.adapt_threads() == torch.get_num_threads() == 1
    assert threads.adapt_threads() == 1  # too soon to tell
    assert threads.adapt_threads() == torch.get_num_threads() == 2
    assert threads.current().changes == 2 and "changes since: 2" in str(threads.current())


def test_an_equal_load_changes_nothing():
    choice = decide(2.0, 2, {})
    assert follow(choice, START, Reading(2, 0, 200, 2.0, 1.0)) is choice
    assert follow(choice, START, replace(START, at=1.0)) is choice


@pytest.mark.parametrize("choice", [None, Choice(2, 2, "spin 0", "set by you", {"GOMP_SPINCOUNT": "0"})])
def test_threads_that_are_not_ours_stay(clean, choice):
    threads._now.update(choice=choice, reading=START) if choice else None
    clean.setattr(torch, "set_num_threads", lambda n: pytest.fail("changed"))
    clean.setattr(threads.time, "sleep", lambda s: pytest.fail("waited"))
    assert threads.adapt_threads(wait=0.33) is None


def test_a_number_that_a_program_set_stays(clean):
    threads._now.update(choice=decide(2.0, 2, {}), reading=START)
    torch.set_num_threads(1)
    busy_later(clean, Reading(2, 200, 200, 0.0, 1.0))
    assert threads.adapt_threads() is None and torch.get_num_threads() == 1


def test_a_program_inherits_the_choice_of_the_one_that_started_it(clean):
    for name, value in threads.marked({"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "9"}).items():
        clean.setenv(name, value)
    assert (threads.current().threads, threads.current().wait) == (2, "spin 9")


# ---------------------------------------------------------------- the command line


def run(code: str, **variables) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k not in (*NAMES, MARK)}
    return subprocess.run([sys.executable, "-c", code], env={**env, "HF_HUB_OFFLINE": "1", **variables},
                          capture_output=True, text=True, timeout=120)


# Notes what the environment holds at the moment when PyTorch is first imported.
WATCH = """
import os, sys
class Spy:
    def find_spec(self, name, path=None, target=None):
        if name == "torch" and not seen: seen.update({n: os.environ.get(n) for n in %r})
seen = {}
sys.meta_path.insert(0, Spy())
from deepseek_cookbook.cli import app
try: app(%r)
except SystemExit: pass
import json, torch
print("SEEN", json.dumps([seen, torch.get_num_threads()]))
"""


@linux
@pytest.mark.parametrize("words", [["doctor", "--json"], ["cook", "-p", "tiny", "--only", "stf"]])
def test_the_variables_are_set_before_torch_is_loaded(words):
    done = run(WATCH % (NAMES, words))
    seen, count = json.loads(done.stdout.split("SEEN ")[1])
    assert seen["GOMP_SPINCOUNT"] == str(SPIN) and seen["OMP_WAIT_POLICY"] is None, done.stderr
    assert int(seen["OMP_NUM_THREADS"]) == count
    if words[0] == "cook":
        assert done.stdout.startswith(f"{count} thread") and f"spin {SPIN}: " in done.stdout
    if words[0] == "doctor":
        line = next(c for c in json.loads(done.stdout.split("SEEN ")[0]) if c["name"] == "Threads")
        assert line["found"].startswith(f"{count} thread") and f"spin {SPIN}" in line["found"]


@linux
def test_the_command_line_keeps_what_the_user_set():
    done = run(WATCH % (NAMES, ["doctor", "--json"]), OMP_NUM_THREADS="2", OMP_WAIT_POLICY="PASSIVE")
    seen, count = json.loads(done.stdout.split("SEEN ")[1])
    assert seen == {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": None} and count == 2


def test_importing_changes_nothing():
    code = ("import os, sys; before = dict(os.environ); import deepseek_cookbook.threads, deepseek_cookbook.cli; "
            "print(before == dict(os.environ), 'torch' in sys.modules)")
    assert run(code).stdout.split() == ["True", "False"]
