"""The command line as a person meets it: help, one clear message for a mistake, exit codes."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deepseek_cookbook.cli import app

COMMAND = str(Path(sys.executable).with_name("deepseek-cookbook"))
runner = CliRunner()
SHORT = ["reward.max_steps=2", "reward.eval_steps=2", "reward.save_steps=2", "reward_model.pairs=40",
         "reward_model.heldout=20", "reward_model.validation=8"]


def test_help_names_every_command_in_a_sentence():
    out = runner.invoke(app, ["--help"]).stdout
    for command in ("cook", "sft", "ppo", "merge", "push", "doctor", "plan", "settings", "fetch"):
        assert command in out
        one = runner.invoke(app, [command, "--help"])
        assert one.exit_code == 0 and "Usage" in one.stdout


@pytest.mark.parametrize("words, says", [
    (["cook", "sft.learning_rat=1"], "learning_rate"),
    (["cook", "sft.max_steps=many"], "max_steps"),
    (["cook", "sft"], "section.key=value"),
    (["cook", "-p", "tiny", "sft.save_steps=3"], "[sft]"),  # no multiple of eval_steps: trl.SFTConfig refuses it
    (["cook", "-p", "labtop"], "laptop"),
    (["cook", "-p", "tiny", "--only", "stf"], "sft"),
    (["cook", "-p", "tiny", "model.name=tiny-lama"], "tiny-llama"),
    (["cook", "-p", "tiny", "data.source=chatterbot:englisch"], "english"),
    (["cook", "-p", "tiny", "data.source=missing.jsonl"], "missing.jsonl"),
    (["settings", "model.nam=x"], "name"),
    (["fetch", "deepseek-llm-7b-base"], "hf download deepseek-ai/deepseek-llm-7b-base"),
    (["fetch", "qwen"], "no model 'qwen'"),
])
def test_a_mistake_is_one_message_and_exit_code_1(tmp_path, words, says):
    result = runner.invoke(app, [*words, *([f"run.folder={tmp_path}"] if words[0] == "cook" else [])])
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("Error: ") and says in result.stderr and "Traceback" not in result.output


def test_a_settings_file_with_a_typo_names_its_line(tmp_path):
    (tmp_path / "settings.ini").write_text("[sft]\n\nlearning_rat = 1\n")
    done = subprocess.run([COMMAND, "cook"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "settings.ini:3: [sft] learning_rat" in done.stderr
    assert "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["settings.ini"]


def test_fetch_lists_what_there_is_and_fetches_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("DSC_CACHE", str(tmp_path))
    result = runner.invoke(app, ["fetch", "--list"])
    assert result.exit_code == 0 and result.stdout.count("Apache-2.0") == 3 and not list(tmp_path.iterdir())
    for words in ("smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct", "478 MB", "1,093 MB"):
        assert words in result.stdout
    said = runner.invoke(app, ["fetch", "tiny-llama"])
    assert said.exit_code == 0 and "tiny-llama is in " in said.stdout


def test_settings_are_shown_typed():
    out = runner.invoke(app, ["settings", "-p", "gpu", "lora.r=64"]).stdout
    assert "r = 64" in out and "deepseek-llm-7b-base" in out


def test_help_does_not_wait_for_torch():
    code = "import sys, deepseek_cookbook.cli; print(sorted({'torch', 'transformers', 'trl'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    "A finished run of the toy."
    folder = tmp_path_factory.mktemp("walked")
    done = runner.invoke(app, ["cook", "-p", "tiny", f"run.folder={folder}", "sft.disable_tqdm=true", *SHORT])
    assert done.exit_code == 0, done.output
    return folder


def test_a_run_is_merged_into_a_folder_that_loads(walked, tmp_path):
    from deepseek_cookbook.models import load_model

    words = ["merge", str(tmp_path / "m"), "-p", "tiny", "--dtype", "float32", f"run.folder={walked}"]
    done = runner.invoke(app, words)
    assert done.exit_code == 0, done.output
    assert load_model(tmp_path / "m").num_parameters() == load_model("tiny-llama").num_parameters()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    other = runner.invoke(app, ["merge", str(tmp_path / "mine"), "-p", "tiny", f"run.folder={walked}"])
    assert other.exit_code == 1 and "Error: " in other.stderr
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_push_without_a_network_writes_the_card(walked, tmp_path):
    done = runner.invoke(app, ["push", "me/toy", "-p", "tiny", f"run.folder={walked}"])
    assert done.exit_code == 1 and "README.md" in done.stderr and "Traceback" not in done.output
    card = (walked / "tiny" / "sft" / "adapter" / "README.md").read_text()
    assert card.startswith("---\n") and "library_name: peft" in card and "held-out" in card.lower()
    nothing = runner.invoke(app, ["push", "me/toy", "-p", "tiny", f"run.folder={tmp_path}"])
    assert nothing.exit_code == 1 and "deepseek-cookbook cook" in nothing.stderr
