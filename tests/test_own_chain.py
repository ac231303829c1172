"""A user's own files through the whole path, by commands alone, in the tiny profile."""

import html
import os
import re
import subprocess
import sys

import own_files
import pytest
import yaml

from deepseek_cookbook.reward.pairs import load_desks
from deepseek_cookbook.settings import read_json, read_jsonl

FEW = ["sft.max_steps=4", "sft.eval_steps=2", "sft.save_steps=2", "sft.disable_tqdm=true", "evaluate.quiet=true",
       "evaluate.samples=2", "reward.disable_tqdm=true", "reward.max_steps=20", "reward.eval_steps=10",
       "reward.save_steps=10", "ppo.total_episodes=16", "constitution.rounds=1", "constitution.prompts=4",
       "constitution.heldout=4", "constitution.sft_steps=2", "constitution.ppo_episodes=8",
       "constitution.classifiers=false", "data.test=0.15"]  # fmt: skip


def command(folder, *words, stdin=None):
    "Run `deepseek-cookbook` in a folder."
    done = subprocess.run([sys.executable, "-m", "deepseek_cookbook.cli", *map(str, words)], cwd=folder, text=True,
                          capture_output=True, timeout=600, input=stdin, env=os.environ | dict(DSC_PROFILE="tiny"))
    return done


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    "The run folder of one `cook` on own files."
    home = tmp_path_factory.mktemp("own")
    own_files.write(home / "mine.jsonl", own_files.messages())
    own_files.write(home / "pairs.jsonl", own_files.pairs())
    words = ["data.source=mine.jsonl", "reward_model.source=pairs.jsonl", "task.source=mine.jsonl", *FEW]
    done = command(home, "cook", *words)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return home, words, done


def desk_words():
    "Whole sentences of the built-in desk and its constitution, and words that only a bank says."
    from importlib.resources import files

    def texts(value):
        if isinstance(value, str):
            yield value
        for v in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from texts(v)

    book = yaml.safe_load((files("deepseek_cookbook") / "constitution.yml").read_text(encoding="utf-8"))
    long = {t for t in [*texts(load_desks()), *texts(book)] if len(t) > 12 or re.search("[\u4e00-\u9fff]{4}", t)}
    assert len(long) > 100
    return long | {"intent:", "customer", "banker", "银行", "客户", "转账"}


def test_nothing_of_the_bank_desk_is_on_the_page(walked):
    home, _, _ = walked
    page = html.unescape((home / "runs/tiny/report.html").read_text(encoding="utf-8"))
    found = [w for w in desk_words() if w in page]
    assert not found and "bank desk" not in page.split("<details>")[0]
    for said in ("your pairs: pairs.jsonl", "your prompts: mine.jsonl", "mine.jsonl, test side", "PPO", "SFT"):
        assert said in page, said
    own = {q for q in own_files.questions() if q in page}
    assert any("里的" in q for q in own) and any("mend" in q for q in own)


def test_every_stage_is_measured_on_the_users_test_rows(walked):
    home, _, _ = walked
    result = read_json(home / "runs/tiny/evaluate/result.json")["result"]
    test = {r["instruction"] for r in read_jsonl(home / "runs/tiny/data/test.jsonl")}
    assert result["side"] == "test" and result["records"] == len(test)
    assert result["stages"] == ["ppo", "constitution"]
    assert {a["question"] for a in result["answers"]} <= test
    assert all(isinstance(a[k], str) for a in result["answers"] for k in ("before", "after", "ppo", "constitution"))
    assert len({result[k]["loss"] for k in ("before", "after", "ppo", "constitution")}) >= 3


def test_the_chain_hangs_together(walked):
    home, _, _ = walked
    results = {n: read_json(home / f"runs/tiny/{n}/result.json")["result"] for n in ("reward", "ppo", "constitution")}
    assert results["reward"]["passed"] and results["ppo"]["task"] == "model"
    assert results["constitution"]["started_from"] == "ppo"
    assert results["constitution"]["rounds"][0]["reward"] == "your reward model"
    files = [home / f"runs/tiny/data/{side}.jsonl" for side in ("validation", "test")]
    held_out = {r["instruction"] for file in files for r in read_jsonl(file)}
    asked = {r["prompt"][-1]["content"] for r in read_jsonl(home / "runs/tiny/constitution/round-1/answers.jsonl")}
    assert asked <= set(own_files.questions()) - held_out
    assert {a["question"] for a in results["ppo"]["heldout"]["answers"]} <= held_out


def test_a_second_cook_skips_all_and_a_changed_file_is_noticed(walked, monkeypatch):
    home, words, _ = walked
    done = command(home, "cook", *words)
    assert done.stdout.count("skipped") == 7
    from deepseek_cookbook.pipeline import PHASES, phase_key
    from deepseek_cookbook.settings import load_settings

    monkeypatch.chdir(home)
    settings, keys = load_settings("tiny", [*words]), {}
    for name in ("mine.jsonl", "pairs.jsonl"):
        text = (home / name).read_text()
        before = {p.name: phase_key(p, settings, settings.run_folder) for p in PHASES}
        (home / name).write_text(text + "\n")
        keys[name] = {p.name for p in PHASES if phase_key(p, settings, settings.run_folder) != before[p.name]}
        (home / name).write_text(text)
    assert keys["mine.jsonl"] == {"data", "ppo", "constitution"}  # sft and the rest follow through data's files
    assert keys["pairs.jsonl"] >= {"reward"}


def test_any_stage_answers_and_is_merged(walked):
    "Chinese and English, from an argument and from standard input; adapters and the whole model of the constitution."
    home, _, _ = walked
    for phase in ("base", "ppo", "constitution"):
        done = command(home, "answer", "怎么修茶壶？", "--phase", phase, "--max-new-tokens", "4")
        assert done.returncode == 0 and done.stdout and not done.stderr, done.stderr[-2000:]
    done = command(home, "answer", "--phase", "sft", "--max-new-tokens", "4", stdin="Who?\n\n你好吗？\n")
    assert done.returncode == 0 and done.stdout.count("\n") >= 2, done.stderr[-2000:]
    for phase in ("ppo", "constitution"):
        done = command(home, "merge", home / f"merged-{phase}", "--phase", phase)
        assert done.returncode == 0 and (home / f"merged-{phase}/model.safetensors").is_file(), done.stderr[-2000:]
    done = command(home, "push", "me/mine", "--phase", "ppo")
    assert done.returncode == 1 and "nothing was sent" in done.stderr
    card = (home / "runs/tiny/ppo/adapter/README.md").read_text(encoding="utf-8")
    assert "then by PPO" in card and "your prompts: mine.jsonl" in card
    done = command(home, "answer", "?", "--phase", "pppo")
    assert done.returncode == 1 and "Did you mean 'ppo'?" in done.stderr


def test_what_is_streamed_is_the_answer(capsys):
    "By a model that says the same words each time, half of them Chinese."
    import torch

    from deepseek_cookbook.models import load_tokenizer
    from deepseek_cookbook.stage_commands import say

    tokenizer = load_tokenizer("tiny-llama")

    class Parrot:
        device = torch.device("cpu")

        def generate(self, input_ids, streamer, **options):
            ids = tokenizer("好的 of course 再见", add_special_tokens=False, return_tensors="pt")["input_ids"][0]
            streamer.put(input_ids)
            for i in ids:
                streamer.put(i[None])
            streamer.end()
            return torch.cat([input_ids[0], ids])[None]

    told = say(Parrot(), tokenizer, [dict(role="user", content="你好")], 8)
    assert told == "好的 of course 再见" and capsys.readouterr().out.strip() == told


def test_phases_alone_take_files_and_a_function_of_the_articles_shape(walked):
    "`reward` alone; then `ppo` by (history, response), which gets a list of turns, in the run folder of the chain."
    home, words, _ = walked
    (home / "mine.py").write_text(
        "def custom_reward(history, response):\n"
        "    assert isinstance(history, list) and len(history[-1]) > 5, history\n"
        "    return 0.6 * ('e' in response) + 0.4 * (history[-1] in response)\n")
    done = command(home, "ppo", "--prompts", "mine.jsonl", "--reward", "mine:custom_reward", *words)
    assert done.returncode == 0 and '"task": "mine:custom_reward"' in done.stdout, done.stderr[-2000:]
    done = command(home, "reward", "--pairs", "pairs.jsonl", *words)
    assert done.returncode == 0 and "skipped" in done.stdout, done.stderr[-2000:]


@pytest.mark.parametrize("words, told", [
    (["cook", "task.source=mine.jsonl"], "task.reward=module:function"),
    (["cook", "task.source=mine.jsonl", "task.reward=rules"], "the rules know the questions of the built-in bank desk"),
    (["cook", "task.source=mine.jsonl", "task.reward=mine:custom"], "Did you mean 'custom_reward'?"),
    (["cook", "reward_model.source=none.jsonl"], "reward_model.source = none.jsonl: no such file"),
    (["cook", "reward_model.source=pairs.jsonl", "constitution.file=mine.yml"], "kind: no check"),
])  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_is_trained(tmp_path, monkeypatch, words, told):
    from typer.testing import CliRunner

    from deepseek_cookbook.cli import app

    own_files.write(tmp_path / "mine.jsonl", own_files.messages(12))
    own_files.write(tmp_path / "pairs.jsonl", own_files.pairs(12))
    (tmp_path / "mine.py").write_text("def custom_reward(history, response): return 1.0\n")
    both = dict(en="x", zh="某")
    texts = {k: both for k in ("name", "critique", "revision", "preference")}
    (tmp_path / "mine.yml").write_text(yaml.safe_dump(dict(principles=[dict(id="kind", **texts)])))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("mine", None)
    done = CliRunner().invoke(app, [*words, "-p", "tiny"])
    assert done.exit_code == 1 and told in done.stderr, done.stderr + done.stdout
    assert not (tmp_path / "runs/tiny/sft").exists()
