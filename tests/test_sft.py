"""Training: what is refused, what is in the loss, and that a killed run goes on as if it had not been killed."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from deepseek_cookbook.models import load_model, load_tokenizer
from deepseek_cookbook.settings import load_settings, read_json
from deepseek_cookbook.sft.train import TrainError, last_checkpoint, save_adapter, sft_config, to_dataset, train_sft

COMMAND = str(Path(sys.executable).with_name("deepseek-cookbook"))
QUIET = ["sft.disable_tqdm=true", "evaluate.quiet=true", "evaluate.samples=1"]


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


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen2"])
def test_rows_end_to_end_have_the_loss_of_padded_rows(tmp_path, name):
    """Padding-free batches: no row sees another, and no pad is counted."""
    from deepseek_cookbook.sft.train import make_trainer

    loss = {}
    for free in ("true", "false"):
        chosen = settings(f"sft.padding_free={free}", "sft.max_length=none", "sft.bf16=false", "lora.lora_dropout=0")
        torch.manual_seed(0)
        trainer = make_trainer(chosen, RECORDS[-12:], RECORDS[-12:], tmp_path, load_model(name), load_tokenizer(name))
        batch = next(iter(trainer.get_eval_dataloader()))
        trainer.model.eval()
        with torch.no_grad():
            loss[free] = trainer.compute_loss(trainer.model, dict(batch)).item()
        assert batch["input_ids"].shape[0] == (1 if free == "true" else 12)
    assert abs(loss["true"] - loss["false"]) < 1e-5


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
        def save_pretrained(self, folder):
            Path(folder).mkdir()
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
    import shutil

    shutil.rmtree(tmp_path / "b" / "checkpoint-12")
    resumed, figures = train_sft(chosen, RECORDS, RECORDS[:4], tmp_path / "b")
    assert figures["resumed_from"] == "checkpoint-8"
    for (name, a), (_, b) in zip(straight.named_parameters(), resumed.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=name)


def cook(folder, *more):
    return [COMMAND, "cook", "-p", "tiny", f"run.folder={folder}", *QUIET,
            "sft.max_steps=40", "sft.save_steps=4", "sft.eval_steps=4", *more]


def wait_for(folder, process, seconds=120):
    """The first complete checkpoint of a run in `folder`."""
    end = time.time() + seconds
    while time.time() < end and process.poll() is None:
        if list(Path(folder).glob("tiny/sft/checkpoint-*/trainer_state.json")):
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
    process = subprocess.Popen(cook(tmp_path / "killed"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
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
