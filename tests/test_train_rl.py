"""PPO from a command line: alone, by two gloo processes, killed and gone on, refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import two_rl_processes as rl

from deepseek_cookbook.models import load_model
from deepseek_cookbook.ppo.policy import make_models, save_policy
from deepseek_cookbook.reward.pairs import gold_reward
from deepseek_cookbook.settings import read_json, read_jsonl, write_json, write_jsonl
from deepseek_cookbook.train_rl import find_reward, main, read_prompts

HERE = Path(rl.__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
MODULE = ["-m", "deepseek_cookbook.train_rl"]
ADAPTER = "adapter/adapter_model.safetensors"


def start(command, **environment):
    "Run to its end, with the rewards of this folder within reach."
    path = os.pathsep.join([str(HERE), os.environ["PYTHONPATH"], str(HERE.parent)])
    return subprocess.run([*map(str, command)], env=os.environ | {"PYTHONPATH": path} | environment,
                          capture_output=True, text=True, timeout=200)


def make_home(folder):
    "Prompts, and what the phases before PPO leave."
    write_jsonl(folder / "prompts.jsonl", rl.ROWS)
    models = make_models(load_model("tiny-llama"), dict(r=4, lora_alpha=8, target_modules="all-linear"))
    save_policy(models, folder / "tiny/sft/adapter")
    for phase in ("sft", "reward"):
        write_json(folder / "tiny" / phase / "result.json", dict(result={}))
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    "One process: a straight run, and one that was killed and is gone on."
    home = make_home(tmp_path_factory.mktemp("one"))
    done = start([sys.executable, *MODULE, *rl.words(home / "straight")])
    assert done.returncode == 0, done.stderr
    dead = start([sys.executable, *MODULE, *rl.words(home / "killed", "deadly")], KILL_RANK="0", KILL_STEP="3")
    assert dead.returncode == -9, dead.stderr
    assert read_jsonl(home / "killed/metrics.jsonl")[-1]["step"] == 3  # one step after the checkpoint
    return home, done


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    "Two processes: known completions, the phase, a straight run, one in which a process was killed."
    home = make_home(tmp_path_factory.mktemp("two"))
    dead = start([*TORCHRUN, rl.__file__, home], KILL_RANK="1", KILL_STEP="3")
    assert dead.returncode != 0 and (home / "killed/checkpoint-2").is_dir(), dead.stderr
    done = start([*TORCHRUN, *MODULE, *rl.words(home / "killed", "deadly")])
    assert done.returncode == 0, done.stderr
    return home, done


def test_one_process_ends_with_its_figures(one):
    "Standard output is JSON and nothing else; the folder holds what a run leaves."
    home, done = one
    figures = json.loads(done.stdout)
    assert figures["steps"] == 6 and figures["processes"] == 1 and 0 <= figures["reward_last"] <= 1
    record = read_json(home / "straight/result.json")
    assert record["result"] == figures and record["settings"]["ppo"]["kl_target"] == 0.5
    for name in (ADAPTER, "metrics.jsonl", "samples.jsonl", "checkpoint-6/state.json"):
        assert (home / "straight" / name).is_file()


def same(home, a="straight", b="killed"):
    assert (home / a / ADAPTER).read_bytes() == (home / b / ADAPTER).read_bytes()
    rows = [r for r in rl.metrics(home / a) if "event" not in r]
    assert len(rows) == 6 and rows == [r for r in rl.metrics(home / b) if "event" not in r]
    assert read_jsonl(home / a / "samples.jsonl") == read_jsonl(home / b / "samples.jsonl")


def test_a_killed_run_goes_on_as_if_nothing_had_happened(one, capsys):
    home, _ = one
    assert main(rl.words(home / "killed", "deadly")) == 0
    assert json.loads(capsys.readouterr().out)["resumed_from"] == 2
    same(home)


def test_a_killed_run_of_two_processes_goes_on_too(two):
    home, done = two
    figures = json.loads(done.stdout)  # one JSON: process 1 was silent
    assert figures["processes"] == 2 and figures["resumed_from"] == 2
    same(home)


def test_two_processes_write_each_row_once(two):
    home, _ = two
    assert [r["step"] for r in rl.metrics(home / "straight") if "event" not in r] == list(range(1, 7))
    assert len(read_json(home / "straight/checkpoint-6/state.json")["replay"]) == 2


def test_two_processes_have_the_gradient_of_one(two, tmp_path):
    "The same completions, dealt out: whitening, counts and sums are over all; three steps lead to the same weights."
    home, _ = two
    a, b = (torch.load(home / f"known-{r}.pt", weights_only=True) for r in (0, 1))
    alone = rl.on_known(tmp_path / "known")
    for name in ("policy", "value", "weights"):
        assert torch.equal(a[name], b[name]), name
    for name in ("policy", "value"):
        assert (a[name] - alone[name]).norm() < 1e-5 * alone[name].norm(), name
        assert alone[name].norm() > 1e-3
    assert (a["weights"] - alone["weights"]).abs().max() < 1e-5  # measured 9e-7
    assert alone["weights"].abs().max() > 1e-2
    local = {"reward_std", "explained_variance", "distinct", "ratio_first", "ratio_max"}  # of one process, or a mean
    for mine, theirs in zip(rl.metrics(tmp_path / "known"), rl.metrics(home / "known"), strict=True):
        for key in mine.keys() - local:
            assert mine[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-5), key


def test_the_phase_is_measured_once_and_told_to_all(two):
    "What `deepseek-cookbook ppo` does under torchrun."
    home, _ = two
    mine, theirs = (read_json(home / f"phase-{r}.json") for r in (0, 1))
    result = read_json(home / "tiny/ppo/result.json")["result"]
    assert mine["done"][0] == mine["done"][1] == theirs["done"][1] == result and result["processes"] == 2
    assert theirs["done"][0]["heldout"] == result["heldout"] and result["heldout"]["after"]["n"] == 4
    assert len(mine["told"]) == 1 and theirs["told"] == []


def test_a_reward_that_fails_in_one_process_ends_both_with_one_message(tmp_path):
    make_home(tmp_path)
    done = start([*TORCHRUN, *MODULE, *rl.words(tmp_path / "run", "faulty")])
    assert done.returncode == 1 and done.stdout == ""
    told = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(told) == 1 and "nothing to divide by" in told[0], done.stderr
    assert done.stderr.count("nothing to divide by") == 1 and "Traceback" not in done.stderr.split("elastic")[0]
    assert not (tmp_path / "run/adapter").exists()


@pytest.mark.parametrize("change, told, code", [
    (["--learning_rat", "1"], "Did you mean '--learning_rate'?", 2),
    (["--num_epochs", "2"], "not allowed with argument", 2),
    (["--learning_rate", "quick"], "ppo.learning_rate = 'quick'", 1),
    (["--batch_size", "7"], "write a multiple of 2", 1),
    (["--profile", "tinny"], "Did you mean 'tiny'?", 1),
    (["ppo.gama=1"], "Did you mean 'gamma'?", 1),
    (["--dataset_path", "none.jsonl"], "none.jsonl: No such file", 1),
    (["--adapter", "none"], "none", 1),
    (["--output_dir", __file__], "Give another folder", 1),
    (["--reward_model", "some/reward-model"], "nothing is fetched from a hub", 1),
    (["--reward_model", "."], "no adapter/reward.json", 1),
    (["--reward_model", "two_rl_processes:leters"], "Did you mean 'letters'?", 1),
    (["--reward_model", "two_rl_processes:Path"], "found a type", 1),
    (["--model_name", "no-such-model"], "no-such-model", 1),
])
def test_bad_arguments_are_one_message(change, told, code, tmp_path, capsys):
    write_jsonl(tmp_path / "prompts.jsonl", rl.ROWS)
    assert main([*rl.words(tmp_path / "run"), *change]) == code
    said = capsys.readouterr()
    assert said.out == "" and told in said.err and said.err.startswith("Error: ") and "Traceback" not in said.err


def test_a_reward_model_below_its_gate_needs_force(tmp_path, capsys):
    "Told before a model is loaded; with --force the next thing that is missing is the model itself."
    write_jsonl(tmp_path / "prompts.jsonl", rl.ROWS)
    row = dict(name="held-out accuracy", value=0.5, n=60, low=0.4, high=0.6, limit="at least 0.75", passed=False)
    write_json(tmp_path / "judge/gate.json", dict(rows=[row], calibration={}, model="", forced=False, passed=False))
    write_json(tmp_path / "judge/adapter/reward.json", {})
    command = [*rl.words(tmp_path / "run"), "--reward_model", str(tmp_path / "judge")]
    assert main(command) == 1
    assert "did not pass the gate" in capsys.readouterr().err
    with pytest.raises(Exception) as e:  # an empty folder is no model
        main([*command, "--force"])
    assert "gate" not in str(e.value) and not (tmp_path / "run/metrics.jsonl").exists()


def test_the_end_of_patience_is_an_exit_code(tmp_path, monkeypatch, capsys):
    "Ctrl-C: 130, and the same command goes on."
    write_jsonl(tmp_path / "prompts.jsonl", rl.ROWS)
    monkeypatch.setattr("two_rl_processes.letters", lambda **columns: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(rl.words(tmp_path / "run")) == 130
    assert "run the same command again" in capsys.readouterr().out
    monkeypatch.undo()
    assert main(rl.words(tmp_path / "run")) == 0


def test_a_finished_run_is_not_told_as_one_of_another_reward(tmp_path, capsys):
    "The record would name a reward that was never asked."
    write_jsonl(tmp_path / "prompts.jsonl", rl.ROWS)
    short = ["--total_episodes", "16"]
    assert main([*rl.words(tmp_path / "run"), *short]) == 0
    record = (tmp_path / "run/result.json").read_bytes()
    capsys.readouterr()
    assert main([*rl.words(tmp_path / "run", "deadly"), *short]) == 1
    assert "another reward (two_rl_processes:letters there, two_rl_processes:deadly here)" in capsys.readouterr().err
    assert (tmp_path / "run/result.json").read_bytes() == record
    assert main([*rl.words(tmp_path / "run", "deadly"), *short, "--overwrite_output_dir"]) == 0
    assert read_json(tmp_path / "run/result.json")["result"]["resumed_from"] is None


def test_a_missing_argument_is_named(capsys):
    assert main(["--dataset_path", "x"]) == 2
    assert "--output_dir, --reward_model" in capsys.readouterr().err


def test_bad_lines_are_all_named(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(['{"prompt": "Yes?"}', "no", '{"prompt": []}', '{"prompt": 3}', '{"title": "?"}', "[]",
                               '{"instruction": "", "input": ""}', '{"chosen": "a", "rejected": "a", "prompt": "b"}']))
    with pytest.raises(ValueError) as e:
        read_prompts(file)
    for line, field in ((2, "line"), (3, "prompt"), (4, "prompt"), (5, "record"), (6, "record"), (7, "instruction"),
                        (8, "rejected")):
        assert f"{file}:{line}:{field}" in str(e.value)


def test_prompts_of_every_kind(tmp_path):
    pair = dict(prompt="Two?", chosen="Yes.", rejected="No.", weight=2)
    write_jsonl(tmp_path / "rows.jsonl", [dict(prompt="One?", intent="x"), pair,
                                          dict(instruction="Three?", output="3", level=1)])
    text, ask, record = read_prompts(tmp_path / "rows.jsonl")
    assert text == dict(prompt="One?", intent="x")
    assert ask["prompt"] == [dict(role="user", content="Two?")] and ask["weight"] == 2
    assert record == dict(prompt=[dict(role="user", content="Three?")], reference="3", level=1)


def test_a_reward_is_asked_for_its_columns():
    "A function that names its columns takes those, and no others."
    assert find_reward("rules") is gold_reward
    sys.modules["narrow"] = type(sys)("narrow")
    sys.modules["narrow"].reward = lambda prompts, completions, intent: [0.0] * len(prompts)
    try:
        assert callable(find_reward("narrow:reward", {"intent"}))
        with pytest.raises(ValueError, match="unexpected keyword argument 'level'"):
            find_reward("narrow:reward", {"intent", "level"})
    finally:
        del sys.modules["narrow"]
