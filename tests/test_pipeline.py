"""The path: what is skipped, what runs again, and what is never taken for whole."""

import json
import os
from html import escape

import pytest
from filelock import FileLock

from deepseek_cookbook import pipeline
from deepseek_cookbook.pipeline import PHASES, PipelineError, cook, is_finished, open_folder, phase_key
from deepseek_cookbook.settings import RunFolder, load_settings, write_jsonl

FAST = ["sft.max_steps=4", "sft.eval_steps=2", "sft.save_steps=2", "sft.disable_tqdm=true", "evaluate.quiet=true",
        "evaluate.samples=1", "data.limit=40",
        "reward.max_steps=2", "reward.eval_steps=2", "reward.save_steps=2", "reward_model.pairs=40",
        "reward_model.heldout=20", "reward_model.validation=8",
        "ppo.total_episodes=16", "task.heldout=4"]


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """A run folder in which the whole path was walked once."""
    folder = tmp_path_factory.mktemp("runs")
    return folder, walk(folder)[0]


def walk(folder, *overrides, **kwargs):
    lines = []
    records = cook(load_settings("tiny", [f"run.folder={folder}", *FAST, *overrides]), tell=lines.append, **kwargs)
    return records, {line.split("  ")[1].split(":")[0]: "skipped" in line for line in lines}


def skipped(folder, *overrides, **kwargs):
    return [name for name, yes in walk(folder, *overrides, **kwargs)[1].items() if yes]


def test_every_phase_leaves_a_whole_result(walked):
    folder, records = walked
    assert list(records) == [p.name for p in PHASES]
    for name, record in records.items():
        assert json.loads((folder / "tiny" / name / "result.json").read_text()) == json.loads(json.dumps(record))
        assert record["seconds"] > 0 and record["peak_memory_gib"] > 0 and record["made_with"]["torch"]
    made = records["report"]["made_with"]
    assert made["threads"] == 1 and "thread" in made["threads_chosen"] and made["waiting"]
    page = (folder / "tiny" / "report.html").read_text()
    assert all(escape(str(made[name])) in page for name in ("processor", "instructions", "precision", "threads_chosen"))
    assert (folder / "tiny" / "report.html").is_file()


def test_nothing_runs_twice(walked):
    assert skipped(walked[0]) == [p.name for p in PHASES]


def test_a_damaged_file_is_made_again(walked):
    adapter = walked[0] / "tiny/sft/adapter/adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:-1] + b"x")
    assert skipped(walked[0]) == ["data", "reward", "constitution"]


def test_a_damaged_result_is_made_again(walked):
    (walked[0] / "tiny/evaluate/result.json").write_text('{"phase": "evalu')
    assert skipped(walked[0])[:3] == ["data", "sft", "reward"]
    assert "evaluate" not in skipped(walked[0], "evaluate.max_new_tokens=3")
    walk(walked[0])


def test_a_changed_setting_runs_its_phase_and_what_follows(walked):
    assert skipped(walked[0], "sft.learning_rate=2e-3") == ["data", "reward"]
    assert skipped(walked[0], "sft.learning_rate=2e-3", "data.validation=0.3") == ["reward", "constitution"]
    walk(walked[0])


def test_force_runs_everything(walked):
    assert skipped(walked[0], only=["data"], force=True) == []


def test_a_changed_data_file_is_noticed(tmp_path):
    rows = [dict(instruction=f"q{i}", input="", output=f"a{i}", history=[]) for i in range(20)]
    write_jsonl(tmp_path / "mine.jsonl", rows)
    mine = f"data.source={tmp_path / 'mine.jsonl'}"
    assert skipped(tmp_path, mine, only=["data"]) == []
    assert skipped(tmp_path, mine, only=["data"]) == ["data"]
    write_jsonl(tmp_path / "mine.jsonl", rows[:-1])
    assert skipped(tmp_path, mine, only=["data"]) == []


def test_a_setting_out_of_range_stops_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match="max_length"):
        walk(tmp_path, "evaluate.max_length=0")
    assert not (tmp_path / "tiny" / "data").exists()


def test_a_phase_without_its_inputs_is_refused(tmp_path):
    with pytest.raises(PipelineError, match="needs data"):
        walk(tmp_path, only=["sft"])


def test_an_unknown_phase_is_refused(tmp_path):
    with pytest.raises(PipelineError, match="Did you mean 'evaluate'"):
        walk(tmp_path, only=["evalute"])


def test_two_cooks_in_one_folder_are_refused(tmp_path):
    (tmp_path / "tiny").mkdir()
    with FileLock(tmp_path / "tiny" / ".lock"), pytest.raises(PipelineError, match="another cook"):
        walk(tmp_path)


def test_a_folder_of_other_settings_is_emptied_and_one_that_was_cut_off_is_kept(tmp_path):
    run, phase = RunFolder(tmp_path), PHASES[0]
    (open_folder(phase, "key one", run) / "checkpoint").write_text("half the work")
    assert (open_folder(phase, "key one", run) / "checkpoint").exists()
    assert not (open_folder(phase, "key two", run) / "checkpoint").exists()
    assert not is_finished(phase, "key two", run)


def test_the_key_depends_on_settings_not_on_their_order():
    a, b = (load_settings("tiny", o) for o in (["data.limit=9", "run.seed=1"], ["run.seed=1", "data.limit=9"]))
    assert phase_key(PHASES[0], a, RunFolder("nowhere")) == phase_key(PHASES[0], b, RunFolder("nowhere"))


@pytest.mark.parametrize("setting", ["data.source={0}", 'data.mix={{"{0}": 1}}', 'clean.evaluation=["{0}"]'])
def test_the_key_changes_with_a_file_that_the_phase_reads(tmp_path, setting):
    file = tmp_path / "rows.jsonl"
    settings, keys = load_settings("tiny", [setting.format(file)]), set()
    for text in ("one", "two"):
        file.write_text(text)
        keys.add(phase_key(PHASES[0], settings, RunFolder("nowhere")))
    assert len(keys) == 2


@pytest.mark.parametrize("large", [2**28, 3])
@pytest.mark.parametrize("name", ["model.gguf", "folder"])
@pytest.mark.parametrize("phase", [p.name for p in PHASES if "model" in p.sections])
def test_the_key_changes_with_a_model_of_the_users_own(tmp_path, monkeypatch, phase, name, large):
    "A file or a folder of the same name with other weights in it; what is large is known by its size and time."
    monkeypatch.setattr(pipeline, "LARGE", large)
    phase, keys = next(p for p in PHASES if p.name == phase), []
    settings = load_settings("tiny", [f"model.name={tmp_path / name}"])
    for text in ("weights", "weight2", "weight2"):
        file = tmp_path / name if name.endswith("gguf") else tmp_path / name / "sub" / "model.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
            os.utime(file, ns=(10**9 * len(keys), 10**9 * len(keys)))
        keys.append(phase_key(phase, settings, RunFolder(tmp_path / "run")))
    assert keys[0] != keys[1] == keys[2]


def test_phases_depend_on_earlier_phases_and_real_sections():
    from deepseek_cookbook.settings import SECTIONS

    for i, phase in enumerate(PHASES):
        assert set(phase.after) <= {p.name for p in PHASES[:i]}
        assert set(phase.sections) <= set(SECTIONS)


@pytest.mark.laptop
def test_sft_lowers_the_held_out_loss_of_the_real_model(tmp_path):
    """Sixteen steps of the laptop profile on 128 records; the full run, with its figures, is `make cook`."""
    settings = load_settings("laptop", [f"run.folder={tmp_path}", *FAST, "sft.max_steps=16", "sft.eval_steps=16",
                                        "sft.save_steps=16", "data.limit=128", "evaluate.max_new_tokens=8"])
    records = cook(settings, only=["data", "sft", "evaluate"], tell=lambda line: None)
    result = records["evaluate"]["result"]
    assert result["fall"] > 0.10, result
    assert max(r["peak_memory_gib"] for r in records.values()) < 6


def test_a_constitution_that_was_edited_is_another_one(tmp_path):
    file = tmp_path / "mine.yml"
    phase = next(p for p in PHASES if p.name == "constitution")
    keys = []
    for text in ("principles: []", "principles: [x]"):
        file.write_text(text)
        keys.append(phase_key(phase, load_settings("tiny", [f"constitution.file={file}"]), RunFolder(tmp_path)))
    assert keys[0] != keys[1]


def test_a_setting_that_is_empty_names_no_file_and_not_the_working_folder():
    for empty in (None, "", [], {}):
        assert pipeline.named_files(empty) == []
    assert pipeline.named_files(["", "a.jsonl"]) == ["a.jsonl"] and pipeline.named_files("a,b") == ["a", "b"]
