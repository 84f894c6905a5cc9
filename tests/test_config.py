"""SFTConfig: Hugging Face's names, aliases, and what it says about wrong ones."""

from typing import Any

import pytest

from lora_jax import config as config_module

SFTConfig: Any = config_module.SFTConfig  # Any: what type checkers refuse is tested here, too


def test_aliases_name_the_same_setting():
    assert SFTConfig(max_seq_length=512).max_length == 512
    assert SFTConfig(max_length=512, max_seq_length=512).max_seq_length == 512
    assert SFTConfig(evaluation_strategy="epoch").eval_strategy == "epoch"


def test_aliases_that_contradict_each_other_are_an_error():
    with pytest.raises(ValueError, match="max_length=512 and max_seq_length=1024.*Give only max_length"):
        SFTConfig(max_length=512, max_seq_length=1024)


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("learning_rte", "learning_rate"),
        ("lr_scheduler", "lr_scheduler_type"),
        ("gradient_accumulation", "gradient_accumulation_steps"),
        ("max_seq_len", "max_seq_length"),
        ("warmup_step", "warmup_steps"),
    ],
)
def test_unknown_name_is_refused_with_the_nearest(wrong: str, nearest: str):
    with pytest.raises(TypeError, match=f"unknown argument '{wrong}'. Did you mean '{nearest}'"):
        SFTConfig(**{wrong: 1})


def test_unknown_name_near_nothing_lists_the_valid_ones():
    with pytest.raises(TypeError, match="Valid names: .*learning_rate.*weight_decay"):
        SFTConfig(zzzzqqq=1)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate=0.0; wanted a number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"per_device_train_batch_size": 0}, "at least 1"),
        ({"max_steps": 0}, "max_steps=0; wanted at least 1, or -1"),
        ({"num_train_epochs": -1}, "num_train_epochs"),
        ({"warmup_steps": 1.5}, "whole number"),
        ({"warmup_ratio": 1.5}, "from 0 to 1"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"adam_beta2": 1.0}, "adam_beta2"),
        ({"max_grad_norm": -1.0}, "max_grad_norm"),
        ({"max_length": 1}, "at least 2 tokens"),
        ({"save_total_limit": 0}, "or None to keep all"),
        ({"seed": -1}, "seed"),
        ({"lr_scheduler_type": "cosin"}, "wanted one of linear, .*Did you mean 'cosine'"),
        ({"optim": "adamw_troch"}, "Did you mean 'adamw_torch'"),
        ({"eval_strategy": "step"}, "Did you mean 'steps'"),
        ({"report_to": "mlflow"}, "report_to='mlflow'.*pass a callback"),
        ({"report_to": "wandbb"}, "Did you mean 'wandb'"),
        ({"warmup_steps": 5, "warmup_ratio": 0.1}, "Give one"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 5}, "constant_with_warmup"),
        ({"eval_steps": 5}, "eval_strategy='steps'"),
        ({"assistant_only_loss": True, "completion_only_loss": True}, "Rows with messages want the first"),
        ({"fp16": True}, "fp16=True is not supported: use bf16=True"),
        (
            {"load_best_model_at_end": True},
            "eval_strategy='no', save_strategy='steps': the best is found by evaluating",
        ),
        ({"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "no"}, "kept by saving"),
        ({"save_strategy": "best"}, "save_strategy='best' with eval_strategy='no'"),
        ({"resume_from_checkpoint": True}, r"trainer.train\(resume_from_checkpoint"),
    ],
)
def test_bad_value_says_what_is_wanted(kwargs: dict, message: str):
    with pytest.raises(ValueError, match=message):
        SFTConfig(**kwargs)


@pytest.mark.parametrize("kwargs", [{"learning_rate": "2e-4"}, {"max_steps": True}, {"packing": 1}, {"seed": 1.0}])
def test_wrong_type_is_named(kwargs: dict):
    (name,) = kwargs
    with pytest.raises(TypeError, match=f"{name}=.*of type .*; wanted"):
        SFTConfig(**kwargs)


def test_names_without_effect_are_accepted_and_said_once(capsys: pytest.CaptureFixture, monkeypatch):
    monkeypatch.setattr(config_module, "_said", set())
    for _ in range(2):
        SFTConfig(dataloader_num_workers=4, fp16=False, bf16=True)
    said = capsys.readouterr().err
    assert said.count("dataloader_num_workers has no effect") == 1


@pytest.mark.parametrize(
    ("name", "bits", "paged"),
    [
        ("adamw_torch", 32, False),
        ("adamw_8bit", 8, False),
        ("adamw_bnb_8bit", 8, False),
        ("paged_adamw", 32, True),
        ("paged_adamw_32bit", 32, True),
        ("paged_adamw_8bit", 8, True),
    ],
)
def test_names_of_adamw_say_how_its_state_is_kept(name: str, bits: int, paged: bool):
    config = SFTConfig(optim=name)
    assert (config.optim_bits, config.optim_is_paged) == (bits, paged)


def test_from_dict_reads_numbers_as_yaml_gives_them():
    # YAML 1.1 reads 2e-4 as text, for want of a dot.
    config = SFTConfig.from_dict(
        {"learning_rate": "2e-4", "max_steps": "10", "output_dir": "7", "max_grad_norm": "0.5"}
    )
    assert (config.learning_rate, config.max_steps, config.output_dir, config.max_grad_norm) == (2e-4, 10, "7", 0.5)
    with pytest.raises(TypeError, match="max_steps='ten' is of type str"):
        SFTConfig.from_dict({"max_steps": "ten"})
    with pytest.raises(TypeError, match="got list, wanted a mapping"):
        SFTConfig.from_dict([1])
    assert SFTConfig.from_dict(config.to_dict()) == config


def test_warmup_is_rounded_as_in_hugging_face():
    # TrainingArguments.get_warmup_steps: a share is rounded up, a count is taken as it is.
    assert SFTConfig(warmup_ratio=0.1).get_warmup_steps(25) == 3
    assert SFTConfig(warmup_steps=0.1).get_warmup_steps(25) == 3
    assert SFTConfig(warmup_steps=7).get_warmup_steps(25) == 7
    assert SFTConfig().get_warmup_steps(25) == 0


def test_gradient_checkpointing_names_a_preset():
    assert SFTConfig().remat == "full"
    assert SFTConfig(gradient_checkpointing=False).remat == "none"
    assert SFTConfig(gradient_checkpointing="offload").remat == "offload"
