"""The environment check: every awkward machine as facts, and no traceback on any of them."""

import json
import os
import subprocess
import sys
import time
from collections import namedtuple
from dataclasses import replace
from io import StringIO
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from deepseek_cookbook import doctor
from deepseek_cookbook.doctor import GIB, Check, GpuFacts
from deepseek_cookbook.threads import decide

A100 = GpuFacts("NVIDIA A100-SXM4-80GB", "535.104.05", 80 * GIB, (8, 0), "12.8", "2.13.0+cu128", usable=True)
NONE = GpuFacts(torch="2.13.0+cpu")
GPU_CHECKS = (doctor.check_driver, doctor.check_cuda, doctor.check_capability, doctor.check_formats)


@pytest.mark.parametrize(
    "found, needed, expected",
    [
        ("535.54.03", "535.86.10", False),
        ("535.86.10", "535.86.10", True),
        ("535.104.05", "535.86.10", True),
        ("580.1", "535.86.10", True),
        ("9.2", "11.8", False),
        ("11.10", "11.8", True),
        (None, "11.8", None),
        ("", "11.8", None),
        ("N/A", "11.8", None),
    ],
)
def test_versions_compare_as_versions(found, needed, expected):
    assert doctor.at_least(found, needed) is expected


@given(st.text(max_size=20))
def test_a_version_from_anywhere_never_raises(text):
    assert doctor.at_least(text, "11.8") in (True, False, None)


@pytest.mark.parametrize("version, status", [((3, 10, 14), "fail"), ((3, 11, 0), "ok"), ((3, 13, 1), "ok")])
def test_python(version, status):
    assert doctor.check_python(version).status == status


@pytest.mark.parametrize(
    "prefix, base, conda, status",
    [
        ("/x/.venv", "/usr", None, "ok"),
        ("/opt/conda/envs/cook", "/opt/conda/envs/cook", "cook", "ok"),
        ("/opt/conda", "/opt/conda", "base", "warn"),
        ("/usr", "/usr", None, "warn"),
    ],
)
def test_isolation(prefix, base, conda, status):
    check = doctor.check_isolation(prefix, base, conda)
    assert check.status == status
    assert bool(check.advice) == (status != "ok")


def test_required_packages_missing_old_and_right():
    have = {"torch": "2.13.0+cpu", "trl": "0.9.0"}.get
    check = doctor.check_required(["torch>=2.6", "trl>=1.16", "peft>=0.21"], have)
    assert check.status == "fail"
    assert "trl 0.9.0 (needs >=1.16)" in check.found and "peft is missing" in check.found
    assert "torch" not in check.found
    assert doctor.check_required(["torch>=2.6"], have).status == "ok"
    assert doctor.check_required([], have).status == "warn"


def test_constraints_are_read_with_comments_options_and_markers():
    text = (
        "# head\ntorch==2.13.0  # CPU\n-r other.txt\n--index-url https://x\nnumpy>=2\n\nmine==1 ; python_version<'3'\n"
    )
    assert doctor.parse_constraints(text) == {"torch": "2.13.0"}


def test_pinned_versions():
    have = {f"p{i}": "1.0" for i in range(10)} | {"torch": "2.13.0+cu128"}
    assert doctor.check_pinned(None).status == "skip"
    assert doctor.check_pinned({"torch": "2.13.0", "absent": "1.0"}, have.get).status == "ok"
    check = doctor.check_pinned({f"p{i}": "2.0" for i in range(10)}, have.get)
    assert check.status == "warn"
    assert check.found.endswith("and 4 more")


def test_constraints_are_found_upward(tmp_path):
    (tmp_path / "constraints.txt").write_text("torch==1.0\n")
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    assert doctor.find_constraints(deep) == tmp_path / "constraints.txt"


@pytest.mark.parametrize(
    "flags, capability, precision, limits, status, found",
    [
        (None, None, None, (), "skip", "X: unknown, no bf16; training in float32"),
        ({"avx2", "avx512_bf16"}, "AVX512", "bfloat16", (), "ok", "X: AVX512, avx512_bf16; training in bfloat16"),
        ({"avx2", "avx512f"}, "AVX512", "float32", (), "warn", "X: AVX512, no bf16; training in float32"),
        ({"asimd", "bf16"}, "DEFAULT", "float32", (), "ok", "X: DEFAULT, bf16; training in float32"),
        ({"amx_bf16"}, "AVX512", "float32", ("ONEDNN_MAX_CPU_ISA=AVX2",), "warn", "ONEDNN_MAX_CPU_ISA=AVX2"),
        ({"amx_bf16"}, "AVX2", "bfloat16", ("ATEN_CPU_CAPABILITY=avx2",), "ok", "ATEN_CPU_CAPABILITY=avx2"),
    ],
)
def test_processor(flags, capability, precision, limits, status, found):
    check = doctor.check_cpu(doctor.CpuFacts("X", flags, capability, precision, limits))
    assert check.status == status
    assert found in check.found
    assert bool(check.advice) == (status == "warn")


def test_the_name_of_the_processor(tmp_path):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: AMD EPYC 9555\nmodel name\t: other\n")
    assert doctor.cpu_name(tmp_path / "cpuinfo") == "AMD EPYC 9555"
    assert doctor.cpu_name(tmp_path / "absent")


@pytest.mark.parametrize("limit", [{}, {"ONEDNN_MAX_CPU_ISA": "AVX2"}])
def test_the_processor_as_pytorch_sees_it(monkeypatch, limit):
    import torch

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    for name, value in limit.items():
        monkeypatch.setenv(name, value)
    facts = doctor.cpu_facts(os.environ)
    assert facts.precision == ("float32" if limit else "bfloat16")
    assert facts.capability == torch.backends.cpu.get_cpu_capability()
    assert ("ONEDNN_MAX_CPU_ISA=AVX2" in facts.instructions) == bool(limit)


def test_flags_of_intel_arm_and_no_such_file(tmp_path):
    intel, arm = tmp_path / "intel", tmp_path / "arm"
    intel.write_text("processor\t: 0\nflags\t\t: fpu avx2 avx512f\nbugs\t: x\n")
    arm.write_text("processor\t: 0\nFeatures\t: fp asimd bf16\n")
    assert doctor.cpu_flags(intel) == {"fpu", "avx2", "avx512f"}
    assert doctor.cpu_flags(arm) == {"fp", "asimd", "bf16"}
    assert doctor.cpu_flags(tmp_path / "absent") is None


@pytest.mark.parametrize(
    "free, cores, environ, status",
    [
        (2.0, 2, {}, "ok"),
        (1.0, 2, {}, "ok"),
        (None, 2, {}, "ok"),
        (1.0, 1, {}, "warn"),
        (8.0, 8, {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}, "ok"),
        (2.0, 2, {"OMP_WAIT_POLICY": "passive"}, "warn"),
        (2.0, 2, {"GOMP_SPINCOUNT": "0"}, "warn"),
        (2.0, 2, {"OMP_NUM_THREADS": "4"}, "warn"),
    ],
)
def test_threads(free, cores, environ, status):
    check = doctor.check_threads(decide(free, cores, environ))
    assert check.status == status
    assert bool(check.advice) == (status != "ok")


@pytest.mark.parametrize("gib, status", [(0.5, "fail"), (2, "warn"), (5.9, "warn"), (6, "ok"), (500, "ok")])
def test_memory(gib, status):
    assert doctor.check_memory(int(gib * GIB)).status == status


def test_the_limit_of_a_container_counts(tmp_path):
    limit, none = tmp_path / "memory.max", tmp_path / "none"
    limit.write_text("4294967296\n")
    none.write_text("max\n")
    assert doctor.cgroup_limit((none, tmp_path / "absent", limit)) == 4 * GIB
    assert doctor.cgroup_limit((none,)) is None


Usage = namedtuple("Usage", "free")


@pytest.mark.parametrize("gib, status", [(0.1, "fail"), (1, "warn"), (2.9, "warn"), (3, "ok")])
def test_disk(tmp_path, gib, status):
    check = doctor.check_disk("Run folder", tmp_path / "not" / "yet", lambda folder: Usage(gib * GIB))
    assert check.status == status
    assert ("run.folder" in check.advice) == (status != "ok")


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "cache").write_text("")
    check = doctor.check_disk("Cache folder", tmp_path / "cache" / "models")
    assert check.status == "fail" and "DSC_CACHE" in check.advice


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path):
    tmp_path.chmod(0o500)
    assert doctor.check_disk("Run folder", tmp_path / "runs").status == "fail"


@pytest.mark.parametrize(
    "change, check, status, word",
    [
        ({}, doctor.check_driver, "ok", "535.104.05"),
        ({"driver": "535.54.03"}, doctor.check_driver, "fail", "535.54.03"),
        ({"driver": None}, doctor.check_driver, "warn", "unknown"),
        ({"driver": "[N/A]"}, doctor.check_driver, "warn", "N/A"),
        ({"fault": "nvidia-smi: TimeoutExpired"}, doctor.check_driver, "fail", "Timeout"),
        ({}, doctor.check_cuda, "ok", "12.8"),
        ({"cuda": "11.7"}, doctor.check_cuda, "fail", "11.8"),
        ({"cuda": "11.8"}, doctor.check_cuda, "ok", "11.8"),
        ({"cuda": None, "usable": False}, doctor.check_cuda, "fail", "without CUDA"),
        ({"usable": False}, doctor.check_cuda, "fail", "cannot open"),
        ({"torch": None}, doctor.check_cuda, "fail", "imported"),
        ({}, doctor.check_capability, "ok", "8.0, 80 GiB"),
        ({"capability": (6, 1)}, doctor.check_capability, "warn", "6.1"),
        ({"capability": None}, doctor.check_capability, "warn", "A100"),
        ({}, doctor.check_formats, "ok", "both"),
        ({"capability": (7, 5)}, doctor.check_formats, "warn", "neither"),
        ({"capability": (12, 0)}, doctor.check_formats, "ok", "both"),
        ({"capability": None}, doctor.check_formats, "skip", "unknown"),
    ],
)
def test_gpu_lines(change, check, status, word):
    found = check(replace(A100, **change))
    assert found.status == status
    assert word in found.found
    assert status not in ("fail", "warn") or found.advice


def test_a_machine_without_a_gpu_has_no_warnings():
    checks = [check(NONE) for check in GPU_CHECKS] + [doctor.check_flash(NONE, None)]
    assert {c.status for c in checks} == {"skip"}
    assert {c.found for c in checks} == {doctor.NO_GPU}
    assert doctor.exit_code(checks) == 0


@pytest.mark.parametrize(
    "capability, version, status",
    [((7, 5), "2.8", "warn"), ((8, 6), "2.8", "ok"), ((9, 0), None, "ok"), ((9, 0), "1.0", "ok")],
)
def test_flash_attention(capability, version, status):
    assert doctor.check_flash(replace(A100, capability=capability), version).status == status


@pytest.mark.parametrize(
    "version, libraries, gpu, status",
    [
        (None, [], NONE, "warn"),
        ("0.50.2", ["cpu"], NONE, "ok"),
        ("0.50.2", [], NONE, "warn"),
        ("0.50.2", ["cpu", "cuda128"], A100, "ok"),
        ("0.50.2", ["cpu", "cuda118"], A100, "warn"),
    ],
)
def test_bitsandbytes(version, libraries, gpu, status):
    assert doctor.check_bitsandbytes(version, libraries, gpu).status == status


def answer(stdout="", stderr="", code=0):
    return lambda *args, **options: SimpleNamespace(stdout=stdout, stderr=stderr, returncode=code)


def raises(error):
    def run(*args, **options):
        raise error

    return run


@pytest.mark.parametrize(
    "run, expected",
    [
        (raises(FileNotFoundError()), {}),
        (raises(PermissionError()), {"fault": "nvidia-smi: PermissionError"}),
        (raises(subprocess.TimeoutExpired("nvidia-smi", 10)), {"fault": "nvidia-smi: TimeoutExpired"}),
        (answer(stderr="NVIDIA-SMI has failed\n", code=9), {"fault": "nvidia-smi: NVIDIA-SMI has failed"}),
        (answer(), {"fault": "nvidia-smi: no output"}),
        (answer("No devices were found\n"), {"fault": "nvidia-smi: No devices were found"}),
        (
            answer("Tesla T4, 550.54.15, 15360, 7.5\nTesla T4, 550.54.15, 15360, 7.5\n"),
            {"name": "Tesla T4", "driver": "550.54.15", "memory": 15 * GIB, "capability": (7, 5)},
        ),
        (
            answer("GRID X, 550.54.15, [N/A], [N/A]\n"),
            {"name": "GRID X", "driver": "550.54.15", "memory": None, "capability": None},
        ),
    ],
)
def test_what_nvidia_smi_may_say(run, expected):
    assert doctor.ask_driver(run) == expected


def test_nvidia_smi_is_called_without_a_shell_and_with_a_time_out():
    seen = {}

    def run(command, **options):
        seen.update(options, command=command)
        return answer()()

    doctor.ask_driver(run)
    assert isinstance(seen["command"], list) and seen["timeout"] <= 10 and not seen.get("shell")


def test_torch_missing_or_broken(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    facts = doctor.gpu_facts((doctor.ask_torch, lambda: {}))
    assert facts.torch is None  # reported by the lines on packages and CUDA
    doctor.check_cuda(replace(facts, name="A100"))


@pytest.mark.parametrize(
    "environ, reachable, status",
    [
        ({"HF_HUB_OFFLINE": "1"}, True, "skip"),
        ({"HF_HUB_OFFLINE": "0"}, True, "ok"),
        ({}, True, "ok"),
        ({}, False, "warn"),
        ({"HTTPS_PROXY": "http://proxy:8080"}, False, "ok"),
        ({"HF_ENDPOINT": "https://mirror.example"}, False, "warn"),
        ({"HF_ENDPOINT": "not a url"}, True, "warn"),
    ],
)
def test_hub(environ, reachable, status):
    check = doctor.check_hub(environ, lambda host, port: reachable)
    assert check.status == status
    if "mirror" in environ.get("HF_ENDPOINT", ""):
        assert "mirror.example" in check.found


def test_offline_is_respected_and_a_dead_name_server_does_not_hang(monkeypatch):
    doctor.check_hub({"HF_HUB_OFFLINE": "1"}, raises(AssertionError("contacted")))

    def hang(*args, **options):
        time.sleep(3)
        raise OSError

    monkeypatch.setattr(doctor.socket, "create_connection", hang)
    start = time.monotonic()
    assert not doctor.connect("example.invalid", timeout=0.2)
    assert time.monotonic() - start < 2


def test_an_unforeseen_error_is_a_line():
    check = doctor.attempt("Memory", raises(ZeroDivisionError("x")))
    assert check.status == "warn" and "ZeroDivisionError" in check.found


def test_the_whole_report(root, monkeypatch):
    monkeypatch.chdir(root)
    checks = doctor.check_environment(gpu=replace(A100, driver="535.54.03"), environ={"HF_HUB_OFFLINE": "1"})
    assert len({c.name for c in checks}) == len(checks) == 16
    assert all(c.status in doctor.COLOURS for c in checks)
    assert doctor.exit_code(checks) == 1
    assert json.loads(doctor.to_json(checks))[0].keys() == {"name", "status", "found", "advice"}
    out = StringIO()
    doctor.report(checks, Console(file=out, width=160))
    assert "535.54.03" in out.getvalue() and "1 fail" in out.getvalue()


def test_brackets_are_shown_as_they_are():
    out = StringIO()
    doctor.report([Check("x", "warn", "pip install 'a[b]'", "[N/A]")], Console(file=out, width=100))
    assert "a[b]" in out.getvalue() and "[N/A]" in out.getvalue()


def test_the_cache_folder_is_the_one_that_models_use(monkeypatch, tmp_path):
    from deepseek_cookbook.weights import cache_dir

    assert doctor.cache_folder(os.environ) == cache_dir()
    monkeypatch.setenv("DSC_CACHE", str(tmp_path))
    assert doctor.cache_folder(os.environ) == cache_dir() == tmp_path


def test_importing_it_is_fast_and_without_torch():
    code = "import sys, deepseek_cookbook.doctor; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.stdout.strip() == "False", run.stderr
