"""Fine-tune DeepSeek models from data to serving, with notebooks that run."""

from importlib import import_module

__version__ = "0.1.0"

# Public name -> the module that defines it. Nothing is imported before it is asked for: torch alone takes seconds.
_PUBLIC = {
    "load_settings": "settings",
    "Settings": "settings",
    "RunFolder": "settings",
    "load_model": "models",
    "load_tokenizer": "models",
    "read_records": "data.formats",
    "to_messages": "data.records",
    "clean": "data.clean",
    "clean_records": "data.clean",
    "CleanConfig": "data.clean",
    "split_records": "data.split",
    "train_sft": "sft.train",
    "TrainConfig": "sft.train",
    "LoRALinear": "sft.lora",
    "find_targets": "sft.lora",
    "lora_config": "sft.lora",
    "LossConfig": "sft.losses",
    "TermsTrainer": "sft.losses",
    "OptimConfig": "sft.optim",
    "parameter_groups": "sft.optim",
    "make_optimizer": "sft.optim",
    "make_schedule": "sft.optim",
    "save_adapter": "sft.adapters",
    "load_adapters": "sft.adapters",
    "switch_adapter": "sft.adapters",
    "merge_adapter": "sft.adapters",
    "model_card": "sft.adapters",
    "push_adapter": "sft.adapters",
    "run_variant": "sft.forgetting",
    "pareto": "sft.forgetting",
    "make_scene": "sft.control",
    "score_table": "sft.control",
    "read_pairs": "reward.pairs",
    "mix_pairs": "reward.pairs",
    "to_preference": "reward.pairs",
    "bank_pairs": "reward.pairs",
    "gold_reward": "data.desk",
    "LocalJudge": "reward.judge",
    "HttpJudge": "reward.judge",
    "judge_answers": "reward.judge",
    "judged_pairs": "reward.judge",
    "judge_report": "reward.judge",
    "as_reward": "reward.functions",
    "combine": "reward.combine",
    "cached": "reward.combine",
    "train_reward": "reward.model",
    "load_reward": "reward.model",
    "gate": "reward.gate",
    "check_gate": "reward.gate",
    "RolloutConfig": "ppo.rollout",
    "Rollout": "ppo.rollout",
    "sample": "ppo.rollout",
    "PPOConfig": "ppo.config",
    "PPOTrainer": "ppo.train",
    "train_ppo": "ppo.task",
    "make_models": "ppo.policy",
    "load_constitution": "ppo.principles",
    "cook": "pipeline",
}
__all__ = list(_PUBLIC)


def __getattr__(name):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__})
