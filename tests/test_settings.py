"""Settings: bad files and overrides, types, profiles as shipped, files that are written whole or not at all."""

import dataclasses
import errno
import json
import math
import os
import subprocess
import sys
from enum import Enum
from typing import Literal, get_type_hints

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from deepseek_cookbook.settings import (
    PROFILES,
    SECTIONS,
    ReadError,
    RunFolder,
    Settings,
    SettingsError,
    WriteError,
    atomic_write,
    find_settings,
    load_settings,
    nearest,
    parse_value,
    read_json,
    read_jsonl,
    section_class,
    write_json,
    write_jsonl,
)

slow_folder = examples(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


def ini(folder, text):
    "A settings file with this content."
    file = folder / "settings.ini"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


# ---------------------------------------------------------------- bad files

BAD_FILES = {
    "unknown key": ("[run]\nseed = 1\n\n[sft]\nlerning_rate = 1\n", ":5: [sft] lerning_rate", "'learning_rate'"),
    "unknown section": ("# first\n[stf]\nmax_steps = 3\n", ":2: [stf]", "'sft'"),
    "unknown profile": ("[run]\nseed = 1\n[sft.labtop]\nmax_steps = 3\n", ":3: [sft.labtop]", "'laptop'"),
    "typo in a profile that is not in use": ("[run.cluster]\nsede = 1\n", ":2: [run.cluster] sede", "'seed'"),
    "key of another section": ("[run]\nmax_steps = 1\n", ":2: [run] max_steps", "Known: folder, seed"),
    "text for an int": ("[run]\nseed = many\n", ":2: [run] seed = 'many'", "int"),
    "float for an int": ("[run]\nseed = 1.5\n", ":2: [run] seed = '1.5'", "int"),
    "nothing for an int": ("[run]\nseed =\n", ":2: [run] seed = ''", "int"),
    "none for an int": ("[run]\nseed = none\n", ":2: [run] seed = 'none'", "int"),
    "text for a float": ("[data]\nvalidation = a tenth\n", ":2: [data] validation", "float"),
    "nan": ("[data]\nvalidation = nan\n", ":2: [data] validation = 'nan'", "finite"),
    "inf": ("[data]\nvalidation = -inf\n", ":2: [data] validation = '-inf'", "finite"),
    "text for a bool": ("[evaluate]\nquiet = perhaps\n", ":2: [evaluate] quiet", "bool"),
    "no number for an optional": ("[data]\nlimit = few\n", ":2: [data] limit = 'few'", "int | None"),
    "half a list": ('[monitor]\nkl_growth_max = [1, 2\n', ":2: [monitor] kl_growth_max", "float"),
    "broken JSON": ("[monitor]\ngrad_norm_band = [1 2]\n", ":2: [monitor] grad_norm_band", "JSON"),
    "infinity in a list": ("[monitor]\ngrad_norm_band = [1, Infinity]\n", ":2: [monitor] grad_norm_band", "finite"),
    "a band of three": ("[monitor]\ngrad_norm_band = [1, 2, 3]\n", ":2: [monitor] grad_norm_band", "tuple"),
    "no name of an enum": ("[monitor]\nloss_action = panic\n", ":2: [monitor] loss_action = 'panic'", "Action"),
    "JSON nested too deeply": ("[monitor]\ngrad_norm_band = " + "[" * 30_000 + "]" * 30_000, ":2: [monitor]", "JSON"),
    "key set twice": ("[run]\nseed = 1\nseed = 2\n", ":3: [run] seed", "twice"),
    "section twice": ("[run]\nseed = 1\n[run]\n", ":3: [run]", "second"),
    "no section": ("seed = 1\n", ":1: 'seed = 1'", "[section]"),
    "no equals sign": ("[run]\nseed\n", ":2: 'seed", "key = value"),
    "no UTF-8": (b"[run]\nfolder = \xff\xfe\n", "settings.ini: byte 16", "UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_told_with_file_line_section_and_key(tmp_path, name):
    text, place, hint = BAD_FILES[name]
    file = ini(tmp_path, text)
    with pytest.raises(SettingsError) as found:
        load_settings("tiny", path=file)
    message = str(found.value)
    assert message.startswith(str(file)) and place in message and hint in message
    assert len(message.splitlines()) == 1


def test_a_file_that_is_not_there_and_a_folder(tmp_path):
    for path, hint in ((tmp_path / "none.ini", "no such settings file"), (tmp_path, "Give the path of a settings")):
        with pytest.raises(SettingsError, match=hint):
            load_settings("tiny", path=path)


@slow_folder
@given(st.binary(max_size=80) | st.text(alphabet="[]sftrun.seed=:# \n\t1", max_size=40).map(str.encode))
def test_any_bytes_are_settings_or_a_settings_error(tmp_path, data):
    file = ini(tmp_path, data)
    try:
        load_settings("tiny", path=file)
    except SettingsError as e:
        assert str(file) in str(e)


def test_every_field_of_every_section_is_typed_or_refused(tmp_path):
    "No field has a type that ends in another error than ours."
    kinds = dict(sft=("1", "none", "x", "[1]", '{"a": 1}', "true", ""), lora=("1", "none", "x", '["a"]', '{"a": 1}'))
    for section in SECTIONS:
        for field in dataclasses.fields(section_class(section)):
            for text in kinds.get(section, ("1", "none", "x", "[1]")):
                try:
                    load_settings("tiny", [f"{section}.{field.name}={text}"], path=ini(tmp_path, ""))
                except SettingsError as e:
                    assert f"{section}.{field.name}" in str(e)


# ---------------------------------------------------------------- good files


def test_bom_windows_lines_comments_and_case(tmp_path):
    file = ini(tmp_path, "\ufeff[run]\r\nSeed = 7   # a comment\r\n; another\r\nfolder = 运行\r\n")
    assert load_settings("tiny", path=file)["run"] == {"seed": 7, "folder": "运行"}


def test_an_empty_file_means_defaults(tmp_path):
    settings = load_settings("tiny", path=ini(tmp_path, ""))
    assert settings["run"] == {} and settings.build("run").seed == 42


def test_an_empty_text_is_a_text(tmp_path):
    assert load_settings("tiny", path=ini(tmp_path, "[run]\nfolder =\n"))["run"]["folder"] == ""


def test_a_profile_wins_wherever_it_stands_and_others_are_left_alone(tmp_path):
    file = ini(tmp_path, "[run.tiny]\nseed = 2\n[run]\nseed = 1\nfolder = x\n[run.gpu]\nseed = 3\n")
    assert [load_settings(p, path=file)["run"]["seed"] for p in PROFILES] == [2, 1, 3, 1]
    assert load_settings("tiny", path=file)["run"]["folder"] == "x"


def test_profile_from_argument_then_environment_then_laptop(monkeypatch):
    monkeypatch.setenv("DSC_PROFILE", "tiny")
    assert load_settings().profile == "tiny" and load_settings("gpu").profile == "gpu"
    monkeypatch.setenv("DSC_PROFILE", "")
    assert load_settings().profile == "laptop"
    monkeypatch.setenv("DSC_PROFILE", "labtop")
    with pytest.raises(SettingsError, match="labtop.*'laptop'"):
        load_settings()


def test_the_nearest_file_upward_then_the_one_in_the_package(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    file = ini(tmp_path, "[run]\nseed = 5\n")
    assert find_settings(tmp_path / "a" / "b") == file
    monkeypatch.chdir(tmp_path / "a" / "b")
    assert load_settings("tiny")["run"]["seed"] == 5
    file.unlink()
    assert find_settings().parent.name == "deepseek_cookbook" and load_settings("tiny")["model"]["name"] == "tiny-llama"


# ---------------------------------------------------------------- overrides


def test_overrides_come_last_and_the_last_one_wins():
    overrides = ["sft.learning_rate=2e-5", "run.seed=1", "run.seed=2", "data.source=a=b.jsonl", "data.limit=none"]
    settings = load_settings("tiny", overrides)
    assert settings["sft"]["learning_rate"] == 2e-5 and settings["run"]["seed"] == 2
    assert settings["data"]["source"] == "a=b.jsonl" and settings["data"]["limit"] is None


@pytest.mark.parametrize(
    "text, hint",
    [
        ("sft", "section.key=value"), ("sft=1", "section.key=value"), ("sft.max_steps", "section.key=value"),
        ("sft.=1", "section.key=value"), ("=1", "section.key=value"), ("", "section.key=value"),
        (".seed=1", "unknown section"), ("stf.max_steps=1", "'sft'"), ("sft.max_step=1", "'max_steps'"),
        ("sft.tiny.max_steps=1", "unknown key"), ("sft.max_steps=lots", "int"), ("run.seed=", "int"),
    ],
)  # fmt: skip
def test_a_bad_override_is_quoted(text, hint):
    with pytest.raises(SettingsError, match=hint) as found:
        load_settings("tiny", [text])
    assert text.split("=")[0] in str(found.value)


@examples(deadline=None, max_examples=50)
@given(st.text(max_size=30))
def test_any_override_is_taken_or_a_settings_error(text):
    for override in (text, f"run.{text}", f"run.seed={text}", f"evaluate.quiet={text}"):
        try:
            load_settings("tiny", [override])
        except SettingsError:
            pass


# ---------------------------------------------------------------- types

VALUES = [
    ("3", int, 3), ("-1", int, -1), ("2e-5", float, 2e-5), ("1", float, 1.0), ("true", bool, True), ("No", bool, False),
    ("none", int | None, None), ("None", str | None, None), ("none", str, "none"), ("7", int | None, 7),
    ('["a", "b"]', list[str] | str | None, ["a", "b"]), ("all-linear", list[str] | str | None, "all-linear"),
    ('{"a": [1, null]}', dict | str, {"a": [1, None]}), ("[2, 5]", tuple[float, float] | None, (2.0, 5.0)),
    ("red", Colour, Colour.RED), ("none", Colour | None, None), ("a", Literal["a", "b"], "a"), ("你好", str, "你好"),
    ("[x] y", str, "[x] y"), ("", str, ""),
]  # fmt: skip


@pytest.mark.parametrize("text, hint, value", VALUES)
def test_text_becomes_the_type_of_the_field(text, hint, value):
    found = parse_value(f" {text} ", hint)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "text, hint",
    [("green", Colour), ("c", Literal["a", "b"]), ("[1.5]", list[int]), ("[", list[int]), ("2", bool), ("[x]", str)],
)
def test_another_type_is_a_value_error(text, hint):
    with pytest.raises(ValueError):
        parse_value(text, hint)


finite = st.floats(allow_nan=False, allow_infinity=False)


@examples(deadline=None)
@given(st.integers(-(10**12), 10**12), finite, st.booleans(), st.lists(st.integers()), st.lists(finite, min_size=1))
def test_typed_values_survive_the_way_through_text(i, x, flag, ints, floats):
    assert parse_value(str(i), int) == i and parse_value(repr(x), float) == x and parse_value(str(flag), bool) is flag
    assert parse_value(json.dumps(ints), list[int]) == ints
    assert parse_value(json.dumps(floats), list[float] | None) == floats


# What an INI file can hold in a line: no line breaks, no comment sign, no space at the ends.
no_blanks = st.characters(blacklist_categories=["Cs", "Cc", "Zl", "Zp", "Zs"], blacklist_characters="#;")
line = st.text(no_blanks, min_size=1)


@slow_folder
@given(folder=line, seed=st.integers(-(2**40), 2**40), share=finite)
def test_values_survive_the_way_through_a_file(tmp_path, folder, seed, share):
    text = f"[run]\nfolder = {folder}\nseed = {seed}\n[data]\nvalidation = {share!r}\n"
    if folder[0] in "[{" and folder[-1] in "]}":
        return  # JSON, by the rule of the file
    settings = load_settings("tiny", path=ini(tmp_path, text))
    assert settings["run"] == {"folder": folder, "seed": seed} and settings["data"]["validation"] == share


@given(st.text(), st.lists(st.text(min_size=1), min_size=1))
def test_a_hint_names_something_that_exists(word, known):
    assert any(repr(k) in nearest(word, known) or k in nearest(word, known) for k in known)


# ---------------------------------------------------------------- the file as shipped


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_of_the_repository_builds_every_section(profile, root):
    settings = load_settings(profile, path=root / "settings.ini")
    for section in SECTIONS:
        extra = dict(output_dir="x", use_cpu=True, bf16=False, report_to="none") if section in ("sft", "reward") else {}
        built = settings.build(section, **extra)
        assert isinstance(built, section_class(section))
        for key, value in settings[section].items():
            if not isinstance(getattr(built, key), Enum | set):  # peft keeps lists as sets, transformers texts as enums
                assert getattr(built, key) == value, (section, key)


@pytest.mark.parametrize("profile", PROFILES)
def test_values_can_be_kept_in_a_result(profile, root):
    values = load_settings(profile, path=root / "settings.ini").values
    assert json.loads(json.dumps(values, allow_nan=False)) == json.loads(json.dumps(values))


def test_every_key_is_a_field_and_every_section_in_the_file(root):
    text = (root / "settings.ini").read_text(encoding="utf-8")
    assert all(f"[{section}]" in text for section in SECTIONS)
    for section in SECTIONS:
        assert set(load_settings("tiny")[section]) <= set(get_type_hints(section_class(section)))


def test_values_that_the_library_refuses_are_told_with_their_section(tmp_path):
    overrides = ["sft.eval_strategy=sometimes", "lora.task_type=NONSENSE", "evaluate.max_length=0"]
    for override in overrides + ["sft.tf32=true"] * (not torch.cuda.is_available()):
        settings, section = load_settings("tiny", [override]), override.split(".")[0]
        with pytest.raises(SettingsError, match=rf"\[{section}\], profile tiny"):
            settings.build(section, **({"output_dir": str(tmp_path)} if section in ("sft", "reward") else {}))


def test_importing_settings_is_light():
    code = "import sys, deepseek_cookbook.settings; print([m for m in ('torch', 'trl') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_digest_follows_values_and_nothing_else(tmp_path):
    a = load_settings("tiny")
    b = Settings("gpu", tmp_path, {k: dict(reversed(list(v.items()))) for k, v in a.values.items()})
    other = load_settings("tiny", ["lora.r=5"])
    assert a.digest("sft", "lora") == b.digest("sft", "lora") != other.digest("sft", "lora")
    assert a.digest("sft") == other.digest("sft")


# ---------------------------------------------------------------- files


@slow_folder
@given(old=st.text(), new=st.text(), at=st.integers(0, 20))
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, old, new, at):
    file = tmp_path / "x" / "result.json"
    with atomic_write(file) as f:
        f.write(old)
    before = file.read_bytes()
    for error in (KeyboardInterrupt, RuntimeError):
        with pytest.raises(error), atomic_write(file) as f:
            f.write(new[:at])
            raise error
    assert file.read_bytes() == before and os.listdir(file.parent) == ["result.json"]
    with atomic_write(file, "wb") as f:
        f.write(new.encode("utf-8", "surrogatepass"))
    assert file.read_bytes() == new.encode("utf-8", "surrogatepass")


def full(*_args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, call):
    file = tmp_path / "rows.jsonl"
    write_jsonl(file, [{"a": 1}])
    monkeypatch.setattr(os, call, full)
    with pytest.raises(WriteError, match=r"rows\.jsonl: No space left on device\. Free some space"):
        write_jsonl(file, [{"a": 2}])
    monkeypatch.undo()
    assert read_jsonl(file) == [{"a": 1}] and os.listdir(tmp_path) == ["rows.jsonl"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(WriteError, match="file"):
        RunFolder(tmp_path / "file").phase("sft")
    with pytest.raises(WriteError, match="file"):
        write_json(tmp_path / "file" / "a.json", {})
    with pytest.raises(WriteError):
        write_json(tmp_path, {})
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("value", [math.nan, math.inf, {"a": [-math.inf]}, "\ud800"])
def test_what_no_reader_could_read_is_not_written(tmp_path, value):
    for write, name in ((write_json, "a.json"), (lambda p, v: write_jsonl(p, [{}, v]), "a.jsonl")):
        with pytest.raises(WriteError, match=name):
            write(tmp_path / name, value)
    assert os.listdir(tmp_path) == []


scalars = st.none() | st.booleans() | st.integers() | finite | st.text()
rows = st.lists(st.dictionaries(st.text(), scalars | st.lists(scalars)), max_size=5)


@slow_folder
@given(rows)
def test_json_survives_the_way_through_a_file(tmp_path, rows):
    file = tmp_path / "rows"
    try:
        assert write_jsonl(file, rows) == len(rows)
        assert read_jsonl(file) == rows
        assert read_json(write_json(file, rows)) == rows
    except WriteError:
        assert any("\ud800" <= c <= "\udfff" for c in repr(rows).encode().decode("unicode_escape"))


@pytest.mark.parametrize("content", [b'{"a": 1', b"\xff", b"[" * 50_000, b'{"a": 1}\n{"b'])
def test_a_damaged_file_is_named(tmp_path, content):
    file = tmp_path / "result.json"
    file.write_bytes(content)
    for read in (read_json, read_jsonl):
        with pytest.raises(ReadError, match="result.json.*phase") as found:
            read(file)
        assert isinstance(found.value, ValueError)
    with pytest.raises(ReadError, match="missing.json: No such file"):
        read_jsonl(tmp_path / "missing.json")


def test_results_of_a_run_folder(tmp_path):
    run = RunFolder(tmp_path / "runs" / "tiny")
    assert run.result("sft") is None and not run.root.exists()
    write_json(run.phase("sft") / "result.json", {"loss": 0.5})
    assert run.result("sft") == {"loss": 0.5}
