"""Two gloo processes: the result of one, an exact resume, one failure for all; recipes that their tools accept."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import two_processes

from deepseek_cookbook.cli import app
from deepseek_cookbook.settings import load_settings, read_jsonl, write_jsonl
from deepseek_cookbook.sft.distributed import is_main, on_main, one_failure, rank, world_size
from deepseek_cookbook.sft.train import TrainError, train_sft
from deepseek_cookbook.train_rl import make_parser

SCRIPT = Path(two_processes.__file__)
ROOT = SCRIPT.parent.parent
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2",
              "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]  # fmt: skip
TRAINED = 1e-5  # adapter weights after 12 steps at learning rate 1e-2; measured 5e-7


@pytest.fixture(scope="module", params=[LAUNCH, ACCELERATE], ids=["torchrun", "accelerate"])
def two(request, tmp_path_factory):
    "What two processes left: straight run, resumed run, FSDP2."
    folder = tmp_path_factory.mktemp("two")
    done = subprocess.run([*request.param, SCRIPT, folder, "train"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    "The same run by one process."
    folder = tmp_path_factory.mktemp("one")
    model, _ = train_sft(two_processes.settings(1), two_processes.RECORDS, two_processes.RECORDS[:6], folder)
    return folder, two_processes.weights(model)


def losses(folder, name):
    return [row[name] for row in read_jsonl(folder / "metrics.jsonl") if name in row]


def test_without_a_launcher_there_is_one_process():
    assert (rank(), world_size(), is_main()) == (0, 1, True)
    assert on_main(max, [1, 3, 2]) == 3
    with pytest.raises(KeyError, match="same"), one_failure():
        raise KeyError("same")


@pytest.mark.parametrize("name", ["loss", "eval_loss", "grad_norm", "num_tokens"])
def test_two_processes_log_what_one_logs(one, two, name):
    "Same rows in the same step, every token with the same weight."
    a, b = losses(one[0], name), losses(two / "run", name)
    assert len(a) == len(b) > 0
    assert a == pytest.approx(b, rel=1e-4, abs=1e-4)


def test_two_processes_train_the_weights_of_one(one, two):
    theirs = torch.load(two / "weights.pt", weights_only=True)
    assert (one[1] - theirs).abs().max() < TRAINED
    assert one[1].abs().max() > 0.01  # something was trained


def test_both_processes_hold_the_same_run(two):
    "One writer: no row of the log is there twice; both report the same figures but for their own time and memory."
    a, b = (json.loads((two / f"rank-{r}.json").read_text()) for r in (0, 1))
    own = {"seconds", "tokens_per_second", "peak_memory_gib"}
    assert {k: v for k, v in a["figures"].items() if k not in own} == {
        k: v for k, v in b["figures"].items() if k not in own}
    assert a["figures"]["processes"] == 2
    steps = [r["step"] for r in read_jsonl(two / "run/metrics.jsonl") if "loss" in r]
    assert steps == list(range(1, 13))
    assert len(list((two / "run").glob("checkpoint-12/rng_state_*.pth"))) == 2
    assert (two / "run/adapter/adapter_model.safetensors").is_file()


def test_a_resume_by_two_processes_is_exact(two):
    for r in (0, 1):
        out = json.loads((two / f"rank-{r}.json").read_text())
        assert out["resumed"] == "checkpoint-6" and out["gap"] == 0


def test_a_failure_of_the_main_process_is_everyones(two):
    a, b = (json.loads((two / f"rank-{r}.json").read_text())["refused"] for r in (0, 1))
    assert a == "ZeroDivisionError: division by zero" and b == f"TeamError: process 0: {a}"


def test_fsdp2_has_the_loss_of_the_whole_model(two):
    "Frozen bf16 base and fp32 adapters, each process with half of every weight."
    out = json.loads((two / "rank-0.json").read_text())["fsdp"]
    assert out["share"] == 0.5
    assert out["sharded"] == pytest.approx(out["whole"], rel=1e-4)
    assert out["grad_gap"] < 1e-3


def test_a_checkpoint_of_two_processes_is_not_continued_by_one(two):
    with pytest.raises(TrainError, match="2 processes wrote it, 1 would go on"):
        train_sft(two_processes.settings(1), two_processes.RECORDS, two_processes.RECORDS[:6], two / "run")


def test_one_process_out_of_memory_ends_both_with_its_message(tmp_path):
    "Process 1 fails while process 0 waits for its gradients; without the board process 0 reports a lost connection."
    began = time.time()
    done = subprocess.run([*LAUNCH, SCRIPT, tmp_path, "fail"], capture_output=True, text=True, timeout=200)
    assert done.returncode != 0 and time.time() - began < 180
    said = (tmp_path / "rank-1.txt").read_text()
    assert said.startswith("TrainError: out of memory") and "planner" in said
    if (tmp_path / "rank-0.txt").exists():  # unless torchrun ended it before it woke up
        told = (tmp_path / "rank-0.txt").read_text()
        assert told.startswith("TeamError: process 1 of 2") and "out of memory" in told
    assert not (tmp_path / "adapter").exists()


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="thread names are read from /proc")
def test_leaving_ends_the_threads_of_the_connection(tmp_path):
    "A gloo thread that outlives Python aborts a process whose work was done."
    done = subprocess.run([*LAUNCH, SCRIPT, tmp_path, "leave"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    for number in (0, 1):
        during, after = json.loads((tmp_path / f"rank-{number}.json").read_text())
        assert "pt_gloo_runloop" in during and "pt_gloo_runloop" not in after


def test_the_phase_in_two_processes_has_one_result(two):
    "What `deepseek-cookbook sft` does under torchrun: data first, one result; the second call finds it finished."
    outs = [json.loads((two / f"rank-{r}.json").read_text()) for r in (0, 1)]
    result = json.loads((two / "tiny/sft/result.json").read_text())
    assert result["result"]["processes"] == 2 and outs[0]["command"] == outs[1]["command"] == result["result"]
    assert "told" not in outs[1] and len(outs[0]["told"]) == 1  # the main process speaks, and says it once


def test_a_launcher_can_start_the_module():
    done = subprocess.run([sys.executable, "-m", "deepseek_cookbook.cli", "sft", "--help"],
                          capture_output=True, text=True)
    assert done.returncode == 0 and "torchrun" in done.stdout


# ---------------------------------------------------------------- recipes

SHELL = sorted((ROOT / "recipes").glob("*.sh"))
CONFIGS = sorted((ROOT / "recipes/accelerate").glob("*.yaml"))


def test_the_recipes_are_there():
    assert [p.stem for p in SHELL] == ["cluster", "laptop", "one_gpu"]
    assert [p.stem for p in CONFIGS] == ["eight_80g_fsdp2", "one_24g_nf4", "one_80g"]


@pytest.mark.parametrize("path", SHELL, ids=lambda p: p.stem)
def test_a_recipe_is_sound_shell(path):
    "Stops at the first error, quotes what it expands, and says how it is called."
    text = path.read_text()
    assert subprocess.run(["bash", "-n", path], capture_output=True).returncode == 0
    assert os.access(path, os.X_OK) and text.startswith("#!/usr/bin/env bash\n#")
    assert "\nset -euo pipefail\n" in text and "`" not in text
    code = [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]
    for line in code:
        bare = re.sub(r'"\$\([^)]*\)[^"]*"|"[^"]*"|\$\(\(.*?\)\)|\(\(.*?\)\)|\[\[.*?\]\]', "", line)
        assert not re.search(r"\$[\w{@*]", bare), f"{path.name}: not quoted: {line}"


@pytest.mark.parametrize("path", SHELL, ids=lambda p: p.stem)
def test_a_recipe_names_what_exists(path):
    "Profiles, settings, configurations and commands in it are real."
    text = path.read_text()
    for profile in re.findall(r"--profile (\w+)", text):
        load_settings(profile, re.findall(r"\b(?:model|sft|lora|ppo)\.\w+=[\w.-]+", text))
    for command in re.findall(r"^\s*deepseek-cookbook (\w+)|deepseek_cookbook\.cli (\w+)", text, re.M):
        command = "".join(command)
        assert command in {c.name or c.callback.__name__ for c in app.registered_commands}
    for argument in re.findall(r" (--\w*_\w+|--adapter) ", "".join(re.findall(r"train_rl(?:.*\\\n)*.*", text))):
        assert argument in make_parser().format_help()
    for config in re.findall(r"config=(\w+)", text) + re.findall(r"accelerate/(\w+)\.yaml", text):
        assert config in {p.stem for p in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_accelerate_knows_every_key(path):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    config = load_config_from_file(str(path))  # refuses unknown keys at the top
    known = {action.dest for action in launch_command_parser()._actions}
    assert set(config.fsdp_config) <= known
    sharded = "fsdp2" in path.stem
    assert config.num_processes == (8 if sharded else 1) and config.use_cpu is False
    assert config.distributed_type.value == ("FSDP" if sharded else "NO")
    if sharded:
        assert config.fsdp_config["fsdp_version"] == 2 and "fsdp_sharding_strategy" not in config.fsdp_config


def test_the_laptop_recipe_runs(tmp_path):
    "The real file, with the toy model and two steps."
    words = [f"run.folder={tmp_path}", *two_processes.QUIET, "evaluate.quiet=true", "evaluate.samples=1",
             "data.limit=16", "sft.max_steps=2", "sft.eval_steps=2", "sft.save_steps=2", "ppo.total_episodes=8",
             "reward.max_steps=4", "reward.eval_steps=2", "reward.save_steps=2"]
    write_jsonl(tmp_path / "asked.jsonl", [dict(prompt="My card is lost.", intent="card")])
    own = dict(PROFILE="tiny", PROMPTS=f"{tmp_path}/asked.jsonl", OUT=f"{tmp_path}/own",
               ADAPTER=f"{tmp_path}/tiny/sft/adapter")
    done = subprocess.run([ROOT / "recipes/laptop.sh", *words], env=os.environ | own,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "tiny/report.html").is_file()
    assert (tmp_path / "own/adapter/adapter_model.safetensors").is_file()
