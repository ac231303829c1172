"""A command under other instruction sets, and learning tests over seeds: what the two scripts run and print."""

import json
import sys

import other_cpus
import pytest
import seeds

HERE = other_cpus.available()
ASK = "import torch, os; print(torch.backends.cpu.get_cpu_capability(), os.environ['DSC_CPU_PRECISION'])"


@pytest.mark.skipif("avx2" not in HERE, reason="a processor with AVX2")
def test_a_command_runs_under_each_instruction_set(capsys):
    words = ["--only", "default", "avx2", "--threads", "1", "--precision", "float32", "--", sys.executable, "-c", ASK]
    assert other_cpus.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:4]] == ["default", "avx2"]
    assert [line.split()[-2:] for line in lines[2:4]] == [["DEFAULT", "float32"], ["AVX2", "float32"]]


@pytest.mark.skipif(not HERE, reason="no processor of these")
def test_what_differs_is_told(tmp_path, capsys):
    file = tmp_path / "result.json"
    code = (
        "import json, os, sys; low = os.environ['DSC_CPU_PRECISION'] == 'bfloat16'; print('loss', 1.5 + low); "
        f"json.dump(dict(a=[1, 2 + low], b=True), open({str(file)!r}, 'w')); sys.exit(3 * low)"
    )
    words = ["--only", HERE[0], "--threads", "1", "--numbers", r"loss ([\d.]+)", "--json", str(file)]
    assert other_cpus.main([*words, "--", sys.executable, "-c", code]) == 1
    said = capsys.readouterr().out
    assert "number 1: 1.5 to 2.5" in said and "a[1]: 2 to 3" in said and "a[0]" not in said
    assert "bfloat16: exit code 3" in said
    assert other_cpus.main([*words, "--keep-going", "--precision", "float32", "--", sys.executable, "-c", code]) == 0
    assert "all 3 numbers are equal" in capsys.readouterr().out


def test_sets_that_are_not_there_and_missing_commands_are_refused(tmp_path, capsys):
    (tmp_path / "cpuinfo").write_text("processor : 0\nflags\t\t: sse avx2 avx512f amx_bf16\n")
    assert other_cpus.available(tmp_path / "cpuinfo") == ["default", "avx2", "avx512", "amx"]
    assert other_cpus.available(tmp_path / "none") == []
    for words, told in ((["--threads", "1"], "no command"), (["--only", "mmx", "--", "true"], "invalid choice")):
        with pytest.raises(SystemExit):
            other_cpus.arguments(words)
        assert told in capsys.readouterr().err
    assert dict(other_cpus.leaves(json.loads('{"a": {"b": [1, null, 2.5]}, "c": "3", "d": true}'))) == {
        "a.b[0]": 1, "a.b[2]": 2.5}  # fmt: skip


LEARNT = """
import pytest

@pytest.mark.learning
@pytest.mark.parametrize("name", ["x", "y"])
def test_luck(name, seed, spread):
    assert spread("number", seed / 2) < 1.5 or name == "x"
"""


def test_seeds_are_counted(tmp_path, root, capsys, monkeypatch):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_luck.py").write_text(LEARNT)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = learning")
    for name in ("conftest.py", "no_network"):
        (tmp_path / "tests" / name).symlink_to(root / "tests" / name)
    monkeypatch.setattr(seeds, "ROOT", tmp_path)
    assert seeds.main(["--seeds", "1-4"]) == 1
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert any(line.startswith("test_luck::test_luck[x] 4 0 ") for line in lines)
    assert any(line.startswith("test_luck::test_luck[y] 2 2 ") and line.endswith("seeds [3, 4]") for line in lines)
    assert "number: 0.5 to 2" in lines and lines[-1] == "2 tests, seeds 1-4: 6 passed, 2 failed"
