"""Training: what is refused, what is in the loss, and that a killed run goes on as if it had not been killed."""

import math
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from glob import glob
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState
from transformers.trainer_utils import IntervalStrategy

from deepseek_cookbook.models import load_model, load_tokenizer
from deepseek_cookbook.settings import SettingsError, load_settings, read_json, read_jsonl
from deepseek_cookbook.sft.checks import TrainError, few_steps, memory_advice, to_dataset, wide_evaluation
from deepseek_cookbook.sft.train import (
    EarlyStop,
    TrainConfig,
    last_checkpoint,
    save_adapter,
    sft_config,
    some_rows,
    train_sft,
    with_replay,
)

COMMAND = str(Path(sys.executable).with_name("deepseek-cookbook"))
QUIET = ["sft.disable_tqdm=true", "evaluate.quiet=true", "evaluate.samples=1",
         "reward.max_steps=2", "reward.eval_steps=2", "reward.save_steps=2", "reward_model.pairs=40",
         "reward_model.heldout=20", "reward_model.validation=8"]


def record(question, answer, history=()):
    return dict(instruction=question, input="", output=answer, history=list(history))


RECORDS = [record(f"What is {i} plus {i}?", f"It is {2 * i}.") for i in range(24)]
RECORDS += [record("你是谁？", "我是一个程序。")] * 8


def settings(*overrides):
    return load_settings("tiny", [*QUIET, *overrides])


def test_no_records_and_masked_records_are_refused():
    tokenizer = load_tokenizer("tiny-llama")
    with pytest.raises(TrainError, match="no records"):
        to_dataset([], tokenizer)
    with pytest.raises(TrainError, match="max_length"):
        to_dataset(RECORDS, tokenizer, max_length=2)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-deepseek-v3"])
@pytest.mark.parametrize("how", [
    ["sft.max_length=200"], ["sft.padding_free=true", "sft.max_length=none"],
    ["sft.packing=true", "sft.max_length=200"], ["sft.max_length=200", "sft.assistant_only_loss=false"]])
def test_rows_that_fit_are_those_that_trl_makes_itself(tmp_path, name, how):
    """Batches of both ways are equal, token for token and label for label."""
    from datasets import Dataset
    from trl import SFTTrainer

    from deepseek_cookbook.data.formats import to_messages
    from deepseek_cookbook.sft.losses import TermsTrainer

    rows = [*RECORDS, record("Bye.", "再见！", [["Hello?", "Yes, hello."], ["你好吗？", "很好。"]])]
    tokenizer, config = load_tokenizer(name), sft_config(settings(*how, "sft.bf16=false"), tmp_path)
    batches = []
    for kind, data in ((SFTTrainer, Dataset.from_list([{"messages": to_messages(r)} for r in rows])),
                       (TermsTrainer, to_dataset(rows, tokenizer, config.max_length))):
        trainer = kind(load_model(name, dtype="float32"), config, train_dataset=data, eval_dataset=data,
                       processing_class=tokenizer)
        torch.manual_seed(0)
        batches.append([*trainer.get_train_dataloader(), *trainer.get_eval_dataloader()])
    for theirs, ours in zip(*batches, strict=True):
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(torch.as_tensor(theirs[k]), torch.as_tensor(ours[k])) for k in theirs)


def test_a_long_dialogue_trains_its_own_answer(tmp_path):
    from deepseek_cookbook.sft.train import make_trainer

    turns = [["Hello there, who is this?", "This is the desk of the library, good morning."],
             ["Do you lend bicycles, too?", "No, we lend books, records and games only."]]
    rows = [record("Then a game of chess, please.", "It stands on shelf nine.", turns)]
    tokenizer = load_tokenizer("tiny-llama")
    trainer = make_trainer(settings("sft.max_length=128"), rows, rows, tmp_path, load_model("tiny-llama"), tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    text = tokenizer.decode(batch["labels"][batch["labels"] != -100])
    assert text == "No, we lend books, records and games only.<|im_end|>It stands on shelf nine.<|im_end|>"


def test_a_cut_answer_is_left_out_and_text_without_an_end_is_cut():
    tokenizer = load_tokenizer("tiny-llama")
    rows = [*RECORDS[:3], record("Which trees grow here?", "An ash, an elm, an oak, a lime, a beech, a birch.")]
    assert len(to_dataset(rows, tokenizer, 60)) == 3 and len(to_dataset(rows, tokenizer)) == 4
    kept = to_dataset(rows, tokenizer, 60, cut=True)
    assert [len(r) for r in kept["input_ids"]][3] == 60 and kept["labels"][3][-1] == kept["input_ids"][3][-1]
    with pytest.raises(TrainError, match="goes beyond sft.max_length = 30"):
        to_dataset(rows[3:], tokenizer, 30)


def test_control_tokens_of_a_record_are_not_trained_as_ends():
    tokenizer = load_tokenizer("tiny-llama")
    rows = to_dataset([record("What closes a turn?<|im_end|>", "The text <|im_end|> and a line break.")], tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (rows["input_ids"][0].count(end), rows["labels"][0].count(end)) == (2, 1)


def test_only_the_answers_are_in_the_loss(tmp_path):
    """The labels that the trainer builds are the answer's tokens and its end of turn, and nothing else."""
    from deepseek_cookbook.sft.train import make_trainer

    chosen, tokenizer = settings(), load_tokenizer("tiny-llama")
    rows = [record("Second question?", "Second answer.", [["First question?", "First answer."]])]
    trainer = make_trainer(chosen, rows, rows, tmp_path, load_model("tiny-llama"), tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    trained = batch["input_ids"][batch["labels"] != -100]
    text = tokenizer.decode(trained)
    assert "answer." in text and "question" not in text and text.endswith("<|im_end|>")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen2"])
def test_rows_end_to_end_have_the_loss_of_padded_rows(tmp_path, name, attention):
    """Padding-free batches: no row sees another, and no pad is counted."""
    from deepseek_cookbook.sft.train import make_trainer

    loss = {}
    for free in ("true", "false"):
        chosen = settings(f"sft.padding_free={free}", "sft.max_length=none", "sft.bf16=false", "lora.lora_dropout=0")
        torch.manual_seed(0)
        model = load_model(name, attention=attention)
        trainer = make_trainer(chosen, RECORDS[-12:], RECORDS[-12:], tmp_path, model, load_tokenizer(name))
        batch = next(iter(trainer.get_eval_dataloader()))
        trainer.model.eval()
        with torch.no_grad():
            loss[free] = trainer.compute_loss(trainer.model, dict(batch)).item()
        assert batch["input_ids"].shape[0] == (1 if free == "true" else 12)
    assert abs(loss["true"] - loss["false"]) < 1e-5


def test_the_kernel_of_training_is_its_own(tmp_path):
    chosen = settings("sft.max_steps=1", "sft.eval_strategy=no", "sft.load_best_model_at_end=false", "sft.bf16=false")
    kernels = {}
    for attention in ("eager", None):
        own = train_keys(chosen, attention=attention)
        kernels[attention], _ = train_sft(own, RECORDS, RECORDS[:4], tmp_path / str(attention))
    assert {k: m.config._attn_implementation for k, m in kernels.items()} == {"eager": "eager", None: "sdpa"}
    assert load_settings("laptop").build("train").attention == "eager"


def test_settings_win_over_the_machine(tmp_path):
    assert sft_config(settings("sft.bf16=false"), tmp_path).bf16 is False
    assert sft_config(settings("sft.gradient_checkpointing=true"), tmp_path).gradient_checkpointing is True


def test_no_removed_argument_is_in_the_settings():
    """Names that tutorials still use and that today's libraries have dropped."""
    gone = {"warmup_ratio", "evaluation_strategy", "group_by_length", "logging_dir", "max_seq_length"}
    assert not gone & {k for p in ("tiny", "laptop", "gpu", "cluster") for k in load_settings(p)["sft"]}


@pytest.mark.parametrize("state", [None, "", '{"global_step": 8', "\x00" * 64])
def test_a_checkpoint_that_was_cut_short_is_removed(tmp_path, state):
    for step, text in ((4, '{"global_step": 4}'), (8, state)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if text is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    assert last_checkpoint(tmp_path).name == "checkpoint-4"
    assert not (tmp_path / "checkpoint-8").exists()


def test_checkpoints_are_ordered_by_number(tmp_path):
    for step in (90, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert last_checkpoint(tmp_path).name == "checkpoint-100"


def test_a_failed_save_keeps_the_old_adapter(tmp_path):
    class Full:
        def save_pretrained(self, folder, **kwargs):
            Path(folder).mkdir(exist_ok=True)
            (Path(folder) / "adapter_model.safetensors").write_bytes(b"half")
            raise OSError(28, "No space left on device")

    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"whole")
    with pytest.raises(OSError):
        save_adapter(Full(), tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == b"whole"


def test_a_full_disk_at_a_checkpoint_is_told_and_resumed(tmp_path, monkeypatch):
    """The save of the second checkpoint fails; the message says so; the next call resumes from the first."""
    from trl import SFTTrainer

    save = SFTTrainer._save_checkpoint

    def full(self, *args, **kwargs):
        if self.state.global_step == 8:
            raise OSError(28, "No space left on device")
        return save(self, *args, **kwargs)

    chosen = settings("sft.max_steps=12", "sft.save_steps=4", "sft.eval_steps=4")
    with monkeypatch.context() as patch:
        patch.setattr(SFTTrainer, "_save_checkpoint", full)
        with pytest.raises(TrainError, match="disk is full"):
            train_sft(chosen, RECORDS, RECORDS[:4], tmp_path)
    assert train_sft(chosen, RECORDS, RECORDS[:4], tmp_path)[1]["resumed_from"] == "checkpoint-4"


def test_resumed_weights_equal_straight_weights(tmp_path):
    """Dropout, data order, optimizer, schedule: all of it comes back, so the adapters agree bit for bit."""
    chosen = settings("sft.max_steps=12", "sft.save_steps=4", "sft.eval_steps=4", "sft.load_best_model_at_end=false",
                      "lora.lora_dropout=0.2")
    straight, _ = train_sft(chosen, RECORDS, RECORDS[:4], tmp_path / "a")
    train_sft(settings("sft.max_steps=12", "sft.save_steps=4", "sft.eval_steps=4", "sft.load_best_model_at_end=false",
                       "lora.lora_dropout=0.2"), RECORDS, RECORDS[:4], tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoint-12")
    resumed, figures = train_sft(chosen, RECORDS, RECORDS[:4], tmp_path / "b")
    assert figures["resumed_from"] == "checkpoint-8"
    for (name, a), (_, b) in zip(straight.named_parameters(), resumed.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=name)


# ---------------------------------------------------------------- bad input


def short(*more):
    """Twelve steps with three evaluations, dropout off."""
    return settings("sft.max_steps=12", "sft.save_steps=4", "sft.eval_steps=4", "sft.logging_steps=1",
                    "lora.lora_dropout=0", "sft.bf16=false", *more)


@pytest.mark.parametrize("train, validation, side", [([], RECORDS[:4], "train"), (RECORDS, [], "validation")])
def test_an_empty_side_is_named(tmp_path, train, validation, side):
    with pytest.raises(TrainError, match=f"no records on the {side} side"):
        train_sft(short(), train, validation, tmp_path)


def test_a_row_longer_than_the_window_is_named(tmp_path):
    """Nothing cuts rows without a max_length; tiny-llama has 2,048 positions."""
    rows = RECORDS[:5] + [record("Tell me a story.", "word " * 3000)] + RECORDS[5:]
    with pytest.raises(TrainError, match=r"train row 5 .* window has 2048"):
        train_sft(short("sft.max_length=none"), rows, RECORDS[:4], tmp_path)
    with pytest.raises(TrainError, match=r"validation row 1 "):
        train_sft(short("sft.max_length=none"), RECORDS, [RECORDS[0], rows[5]], tmp_path)


def test_rows_that_are_left_out_are_in_the_log_and_in_the_result(tmp_path):
    """An answer that doesn't end before max_length would teach not to stop."""
    rows = RECORDS + [record("word " * 200, "Late.")] * 2 + [record("Long?", "word " * 200)]
    _, figures = train_sft(short("sft.max_length=128"), rows, RECORDS[:4], tmp_path)
    assert (figures["left_out"], figures["left_out_validation"], figures["rows"]) == (3, 0, len(rows))
    notes = [r["message"] for r in read_jsonl(tmp_path / "metrics.jsonl") if r.get("guard") == "data"]
    assert notes == [f"train: 3 of {len(rows)} rows left out, their answers go beyond 128 tokens"]


def test_packed_rows_are_counted_one_by_one(tmp_path):
    """A packed row is as long as max_length; the window is for the records in it."""
    chosen = short("sft.packing=true", "sft.max_length=1024", "sft.max_steps=1")
    train_sft(chosen, RECORDS, RECORDS[:4], tmp_path)
    assert not [r for r in read_jsonl(tmp_path / "metrics.jsonl") if r.get("guard") == "data"]


@pytest.mark.parametrize("change, says", [("lora.r=8", "r = 4 there, 8 here"),
                                          ("model.name=tiny-qwen2", r"tiny-llama\S* there, tiny-qwen2\S* here")])
def test_a_foreign_checkpoint_is_refused_and_kept(tmp_path, change, says):
    train_sft(short("sft.max_steps=4"), RECORDS, RECORDS[:4], tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(TrainError, match=says):
        train_sft(short("sft.max_steps=4", change), RECORDS, RECORDS[:4], tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert train_sft(short("sft.max_steps=4", change), RECORDS, RECORDS[:4], tmp_path, resume=False)[1]["steps"] == 4


def test_a_loss_that_is_no_number_leaves_its_rows(tmp_path, monkeypatch):
    """One token's embedding is NaN: the guard restores, and the file names the rows that hold it."""
    from deepseek_cookbook.sft import train

    load, poison = train.load_model, "zzz"

    def sick(**arguments):
        model = load(**arguments)
        token = load_tokenizer("tiny-llama")(poison, add_special_tokens=False)["input_ids"][-1]
        with torch.no_grad():
            model.get_input_embeddings().weight[token] = float("nan")
            if model.lm_head.weight is model.get_input_embeddings().weight:
                model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
        return model

    monkeypatch.setattr(train, "load_model", sick)
    rows = RECORDS + [record(f"What is {poison}?", "Nothing.")]
    chosen = settings("sft.max_steps=8", "sft.save_steps=1", "sft.eval_steps=1", "sft.logging_steps=1",
                      "sft.bf16=false", "sft.save_total_limit=none")
    _, figures = train_sft(chosen, rows, RECORDS[:4], tmp_path)
    log = read_jsonl(tmp_path / "metrics.jsonl")
    stop = next(r for r in log if r.get("event") == "stop_restore")
    found = read_jsonl(tmp_path / "sick_batches.jsonl")
    assert figures["steps"] == stop["step"] < 8
    assert any(poison in r["text"] for r in found if r["sick"])
    assert {r["step"] for r in found if r["sick"]} == {stop["step"]}
    assert not any(poison in r["text"] for r in found if not r["sick"])
    assert any(f"at step {stop['step']}" in r["message"] for r in log if r.get("guard") == "batches")


def test_a_healthy_run_leaves_no_sick_batches(tmp_path):
    model, _ = train_sft(short("sft.max_steps=4"), RECORDS, RECORDS[:4], tmp_path)
    assert not (tmp_path / "sick_batches.jsonl").exists()
    assert not model._forward_hooks


def test_out_of_memory_comes_with_the_planners_advice(tmp_path, monkeypatch):
    from trl import SFTTrainer

    def full(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(SFTTrainer, "training_step", full)
    with pytest.raises(TrainError, match=r"planner reckons .* GiB for 8 rows of 512 tokens"):
        train_sft(short(), RECORDS, RECORDS[:4], tmp_path)


@pytest.mark.parametrize("gib, says", [
    (6, "per_device_train_batch_size="), (10**4, "By that it fits"), (1, "smaller model")])
def test_advice_depends_on_what_is_there(gib, says):
    chosen = load_settings("laptop", ["sft.max_length=512", "sft.gradient_accumulation_steps=2"])
    assert says in memory_advice(chosen, gib)


def test_no_advice_for_an_unknown_model():
    chosen = load_settings("tiny", ["model.name=someone/something"])
    assert memory_advice(chosen, 16) == ""


# ---------------------------------------------------------------- trust


def train_keys(chosen, **keys):
    chosen.values["train"] = keys
    return chosen


@pytest.mark.parametrize("patience, last", [(3, 10), (2, 8), (None, 12)])
def test_training_stops_when_it_has_waited_long_enough(tmp_path, monkeypatch, patience, last):
    """The held-out loss is best at step 4; those weights come back. A run cut off while waiting goes on counting."""
    from trl import SFTTrainer

    loss, call = {2: 5.0, 4: 4.0, 6: 4.5, 8: 4.4, 10: 4.3, 12: 4.2}, SFTTrainer.prediction_step

    def fixed(self, *args, **kwargs):
        return torch.tensor(loss[self.state.global_step]), *call(self, *args, **kwargs)[1:]

    monkeypatch.setattr(SFTTrainer, "prediction_step", fixed)
    chosen = settings("sft.max_steps=12", "sft.save_steps=2", "sft.eval_steps=2", "sft.save_total_limit=none")
    model, figures = train_sft(train_keys(chosen, patience=patience), RECORDS, RECORDS[:4], tmp_path)
    assert (figures["steps"], figures["best_step"], figures["best_eval_loss"]) == (last, 4, 4.0)
    best = load_file(tmp_path / "checkpoint-4/adapter_model.safetensors")
    saved = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert all(torch.equal(best[k], saved[k]) for k in best)
    if patience:
        for step in range(8, last + 1, 2):
            shutil.rmtree(tmp_path / f"checkpoint-{step}")
        again = train_sft(chosen, RECORDS, RECORDS[:4], tmp_path)[1]
        assert (again["resumed_from"], again["steps"]) == ("checkpoint-6", last)


def test_a_run_that_stopped_early_is_not_taken_further(tmp_path, monkeypatch):
    """Killed after its last checkpoint and before its adapter was saved: the second call restores the same weights."""
    from trl import SFTTrainer

    call = SFTTrainer.prediction_step
    monkeypatch.setattr(SFTTrainer, "prediction_step", lambda self, *a, **k: (
        torch.tensor(4.0 + self.state.global_step), *call(self, *a, **k)[1:]))
    chosen = train_keys(settings("sft.max_steps=12", "sft.save_steps=2", "sft.eval_steps=2"), patience=1)
    assert train_sft(chosen, RECORDS, RECORDS[:4], tmp_path)[1]["steps"] == 4
    shutil.rmtree(tmp_path / "adapter")
    again = train_sft(chosen, RECORDS, RECORDS[:4], tmp_path)[1]
    assert again["steps"] <= 5 and again["best_step"] == 2  # a step before it looks; thrown away
    best, saved = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("checkpoint-2", "adapter"))
    assert all(torch.equal(best[k], saved[k]) for k in best)


def test_replay_adds_a_share_of_old_text(tmp_path):
    (tmp_path / "old.txt").write_text("The first old passage is here.\n\nThe second old\npassage is here too.\n" * 40)
    for general in ("python", str(tmp_path / "old.txt")):
        mixed = with_replay(RECORDS, TrainConfig(replay=0.1, general=general), seed=1)
        size = [sum(len(r["output"]) for r in rows) for rows in (mixed, mixed[len(RECORDS):])]
        assert mixed[:len(RECORDS)] == RECORDS and 0.1 <= size[1] / size[0] < 0.5
    assert with_replay(RECORDS, TrainConfig(), seed=1) is RECORDS
    figures = train_sft(train_keys(short("sft.max_steps=4"), replay=0.1), RECORDS, RECORDS[:4], tmp_path / "run")[1]
    assert figures["rows"] > len(RECORDS)


@pytest.mark.parametrize("keys, says", [(dict(patience=0), "patience = 0"), (dict(replay=1), "replay = 1"),
                                        (dict(general="gone.txt", replay=0.1), "gone.txt")])
def test_a_wrong_train_key_is_named(tmp_path, keys, says):
    with pytest.raises((TrainError, SettingsError), match=says):
        train_sft(train_keys(short(), **keys), RECORDS, RECORDS[:4], tmp_path)


# ---------------------------------------------------------------- killed runs


def cook(folder, *more):
    return [COMMAND, "cook", "-p", "tiny", f"run.folder={folder}", *QUIET,
            "sft.max_steps=40", "sft.save_steps=4", "sft.eval_steps=4", *more]


def wait_for(folder, process, seconds=120):
    """The first complete checkpoint of a run in `folder`."""
    end = time.time() + seconds
    while time.time() < end and process.poll() is None:
        if glob(f"{folder}/tiny/sft/checkpoint-*/trainer_state.json"):  # Path.glob raises if a folder goes meanwhile
            return
        time.sleep(0.02)
    pytest.fail(f"no checkpoint: exit code {process.poll()}")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The run folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("straight")
    subprocess.run(cook(folder), check=True, capture_output=True)
    return folder / "tiny"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_run_again_equals_straight(straight, tmp_path, how):
    """`kill -9` and Ctrl-C in the middle of SFT; the second call resumes and ends with the straight run's loss."""
    listens = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a worker of pytest-xdist ignores Ctrl-C
    process = subprocess.Popen(cook(tmp_path / "killed"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               preexec_fn=listens)
    wait_for(tmp_path / "killed", process)
    process.send_signal(how)
    out, _ = process.communicate()
    assert process.returncode == (-9 if how == signal.SIGKILL else 130), out
    if how == signal.SIGINT:
        assert "run the same command again" in " ".join(out.split()) and "Traceback" not in out
    assert not (tmp_path / "killed/tiny/sft/result.json").exists()
    subprocess.run(cook(tmp_path / "killed"), check=True, capture_output=True)
    folders = (straight, tmp_path / "killed" / "tiny")
    resumed = [read_json(folder / "sft/result.json")["result"]["resumed_from"] for folder in folders]
    loss = [read_json(folder / "evaluate/result.json")["result"]["after"]["loss"] for folder in folders]
    assert resumed[1] and not resumed[0]
    assert abs(loss[0] - loss[1]) < 1e-4


def test_terms_and_groups_are_settings(tmp_path):
    """One override switches a term on, one a rate; the log shows the first, the optimizer the second."""
    chosen = settings("loss.kl_beta=0.5", "optim.lora_plus_ratio=4", "sft.max_steps=4",
                      "sft.eval_steps=4", "sft.save_steps=4", "sft.logging_steps=1")  # fmt: skip
    train_sft(chosen, RECORDS, RECORDS[:8], tmp_path)
    rows = [r for r in read_jsonl(tmp_path / "metrics.jsonl") if "kl" in r]
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-5) and rows[-1]["kl"] > 1e-4
    assert rows[-1]["added_loss"] == pytest.approx(0.5 * rows[-1]["kl"], rel=1e-3)
    state = torch.load(tmp_path / "checkpoint-4" / "optimizer.pt", weights_only=True)
    rates = {g["name"]: g["initial_lr"] for g in state["param_groups"]}
    assert max(rates.values()) == pytest.approx(4 * min(rates.values()))


def test_a_run_with_all_terms_resumes_exactly(tmp_path):
    """The anchors of EWC are the weights before training, also in a resumed run."""
    terms = ["loss.kl_beta=0.1", "loss.ewc_lambda=10", "loss.l2_start=0.1", "loss.fgm_epsilon=0.1", "loss.drophead=0.1",
             "loss.label_smoothing=0.1", "optim.layerwise_decay=0.9"]  # fmt: skip
    chosen = settings(*terms, "sft.max_steps=4", "sft.eval_steps=2", "sft.save_steps=2")
    train_sft(chosen, RECORDS, RECORDS[:8], tmp_path / "straight")
    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-4")
    shutil.rmtree(tmp_path / "resumed" / "adapter")
    _, figures = train_sft(chosen, RECORDS, RECORDS[:8], tmp_path / "resumed")
    assert figures["resumed_from"] == "checkpoint-2"
    a, b = (load_file(tmp_path / x / "adapter" / "adapter_model.safetensors") for x in ("straight", "resumed"))
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-6, rtol=0)


def test_all_weights_can_be_trained(tmp_path):
    """`train.full`: every tensor moves, the saved folder is the model, and the phase refuses it."""
    from deepseek_cookbook.settings import RunFolder
    from deepseek_cookbook.sft.train import sft_phase

    chosen = settings("train.full=true", "model.dtype=float32", "sft.learning_rate=1e-3", "sft.max_steps=2",
                      "sft.eval_steps=2", "sft.save_steps=2")  # fmt: skip
    start = {n: p.detach().clone() for n, p in load_model("tiny-llama", dtype="float32").named_parameters()}
    model, figures = train_sft(chosen, RECORDS, RECORDS[:8], tmp_path)
    assert figures["trainable_share"] == 1 and not (tmp_path / "adapter").exists()
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, start[n])]
    assert set(moved) == set(start)
    again = load_model(tmp_path / "model", dtype="float32")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model.float().eval()(ids).logits, atol=1e-4, rtol=0)
    with pytest.raises(TrainError, match="train.full"):
        sft_phase(chosen, RunFolder(tmp_path / "run"))
    rounded = settings("train.full=true", "model.quantization=nf4")
    with pytest.raises(TrainError, match="nf4"):
        train_sft(rounded, RECORDS, RECORDS[:8], tmp_path / "rounded")
    with pytest.raises(TrainError, match="float32"):
        train_sft(settings("train.full=true", "model.dtype=bfloat16"), RECORDS, RECORDS[:8], tmp_path / "small")


@pytest.mark.parametrize("on", [True, False])
def test_checkpointing_on_a_cpu_gives_memory_back(tmp_path, monkeypatch, on):
    """glibc keeps the holes that checkpointing leaves (chapter on models); without checkpointing, time counts more."""
    from deepseek_cookbook.sft import train

    calls = []
    monkeypatch.setattr(train, "return_freed_memory", lambda: calls.append(1))
    chosen = settings(f"sft.activation_checkpointing={str(on).lower()}", "model.name=tiny-llama")
    train.make_trainer(chosen, RECORDS, RECORDS[:4], tmp_path, load_model("tiny-llama"), load_tokenizer("tiny-llama"))
    assert bool(calls) is on


@pytest.mark.parametrize("targets", ["nope_proj", "all-linear"])
def test_targets_that_fit_nothing_are_named_before_training(tmp_path, targets):
    """A name that matches nothing, and experts with dropout, which PEFT can't do."""
    from deepseek_cookbook.sft.lora import TargetError

    chosen = settings("model.name=tiny-deepseek-v3", f"lora.target_modules={targets}", "lora.lora_dropout=0.05")
    with pytest.raises(TargetError, match=targets if targets == "nope_proj" else "lora_dropout"):
        train_sft(chosen, RECORDS, RECORDS[:4], tmp_path)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_records_with_tool_calls_are_refused_before_training():
    "The reader keeps them whole; a template that can't write a call would end in a traceback, or leave it out."
    from deepseek_cookbook.data.records import to_record

    call = dict(type="function", function=dict(name="weather", arguments='{"city": "Oslo"}'))
    turns = [dict(role="user", content="Rain in Oslo?"), dict(role="assistant", content=None, tool_calls=[call]),
             dict(role="tool", content="yes"), dict(role="assistant", content="It rains.")]  # fmt: skip
    plain = dict(instruction="A?", input="", output="B.", history=[])
    record, faults = to_record(dict(messages=turns), "messages")
    assert not faults and record["messages"][1]["tool_calls"]
    with pytest.raises(TrainError, match="record 2 of the train side calls tools"):
        to_dataset([plain, record], load_tokenizer("tiny-llama"))


def plan_of(folder, *changes):
    return sft_config(load_settings("gpu", ["sft.bf16=false", "sft.activation_checkpointing=false", *changes]), folder)


def test_a_run_of_few_steps_is_told_with_its_numbers_and_what_to_change(tmp_path):
    lengths = [30] * 965 + [0]
    said = few_steps(plan_of(tmp_path), lengths, 8)  # packed
    assert said.startswith("3 optimizer steps") and "966 rows of 28,950 tokens, packed into 8" in said
    assert "sft.packing=false (183 steps)" in said
    assert "take 5 rows a step instead of 16" in few_steps(plan_of(tmp_path), lengths[:90], 90)
    assert few_steps(plan_of(tmp_path), lengths, 966) is None
    assert few_steps(plan_of(tmp_path, "sft.max_steps=3"), lengths, 8) is None  # somebody chose it
    assert few_steps(plan_of(tmp_path), lengths[:300], 300, processes=8).startswith("9 optimizer steps")


def test_the_mask_of_an_evaluation_is_told_where_it_is_large(tmp_path):
    said = wide_evaluation(plan_of(tmp_path, "sft.per_device_eval_batch_size=16"), 4096, 100, "sdpa")
    assert "16 rows of up to 4,096 tokens" in said and "12.0 GiB" in said and "size=4." in said
    assert wide_evaluation(plan_of(tmp_path), 4096, 100, "sdpa") is None  # what the profile does
    assert wide_evaluation(plan_of(tmp_path, "sft.per_device_eval_batch_size=16"), 4096, 3, "sdpa") is None
    for kernel, changes in (("flash_attention_2", []), ("sdpa", ["sft.packing=false"])):
        wide = plan_of(tmp_path, "sft.per_device_eval_batch_size=16", *changes)
        assert wide_evaluation(wide, 4096, 100, kernel) is None


def test_few_steps_are_said_before_training_and_eval_rows_are_drawn_once(tmp_path, capsys):
    change = settings("sft.max_steps=-1", "sft.num_train_epochs=1", "train.eval_rows=5", "sft.eval_steps=1")
    _, figures = train_sft(change, RECORDS[:24], RECORDS[8:], tmp_path)
    said = capsys.readouterr().err
    steps = figures["steps"]
    assert f"{steps} optimizer steps in all" in said and "sft.num_train_epochs" in said
    notes = [r["message"] for r in read_jsonl(tmp_path / "metrics.jsonl") if r.get("event") == "note"]
    assert any(f"{steps} optimizer steps" in message for message in notes)
    assert len(some_rows(RECORDS, 5, 42)) == 5 and some_rows(RECORDS, 5, 42) == some_rows(RECORDS, 5, 42)
    assert some_rows(RECORDS, None, 42) is RECORDS and some_rows(RECORDS, 99, 42) is RECORDS
    with pytest.raises(TrainError, match="eval_rows"):
        TrainConfig(eval_rows=0)


def test_what_only_looks_like_a_checkpoint_is_left_alone(tmp_path):
    "A user's copies, a folder named best, a file: none of them is a step, and none is removed."
    names = ("checkpoint-6", "checkpoint-best", "checkpoint-12-bak", "checkpoint-old-8", "checkpoint-")
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text("{}" if name == "checkpoint-6" else "cut sho")
    (tmp_path / "checkpoint-7").write_text("a file")
    assert last_checkpoint(tmp_path).name == "checkpoint-6"
    assert {p.name for p in tmp_path.iterdir()} == {*names, "checkpoint-7"}


@pytest.mark.parametrize("threshold", [0.0, 0.15])
@pytest.mark.parametrize("greater", [False, True])
@given(st.lists(st.sampled_from([0.5, 0.6, 0.7, 0.8, math.nan]), min_size=1, max_size=8))
def test_waiting_is_counted_after_a_resume_as_before_it(greater, threshold, values):
    "By either spelling of the metric; an oracle goes through the history as transformers' callback does."
    counts = set()
    for name in ("loss", "eval_loss"):
        state, control = TrainerState(), TrainerControl()
        args = SimpleNamespace(metric_for_best_model=name, load_best_model_at_end=True, greater_is_better=greater,
                               eval_strategy=IntervalStrategy.STEPS)
        live = EarlyStoppingCallback(99, threshold)
        for step, value in enumerate(values, 1):
            state.log_history += [dict(loss=0.1, step=step)] * 3 + [dict(eval_loss=value, step=step)]
            live.on_evaluate(args, state, control, metrics=dict(eval_loss=value))
            better = state.best_metric is None or (value > state.best_metric if greater else value < state.best_metric)
            if better:
                state.best_metric, state.best_global_step = value, step
        stop = EarlyStop(3)
        stop.early_stopping_threshold = threshold
        stop.on_train_begin(args, state, control)
        assert stop.early_stopping_patience_counter == live.early_stopping_patience_counter
        assert control.should_training_stop == (live.early_stopping_patience_counter >= 3)
        counts.add(stop.early_stopping_patience_counter)
    assert len(counts) == 1
