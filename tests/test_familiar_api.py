"""What scripts written for Unsloth, TRL and transformers pass: taken over, said to have no effect, or refused."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq
from transformers.training_args import TrainingArguments

import lora_jax
from lora_jax import SFTConfig, SFTTrainer, config, get_peft_model, train_on_responses_only
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_folder(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def model(folder):
    return get_peft_model(tiny.open_model(folder), r=2, verbose=False)


@pytest.fixture(scope="module")
def tokenizer(folder):
    from lora_jax.loading import load_tokenizer

    return load_tokenizer(folder)


TEXTS = [{"text": f"user: {i}?<|eot|>assistant: {i + 1}.<|eot|>user: ok<|eot|>assistant: bye<|eot|>"} for i in range(4)]


def make(model, tokenizer, tmp_path, data: Any = None, **options):
    args = options.pop("args", None) or SFTConfig(output_dir=str(tmp_path), max_steps=2, disable_tqdm=True)
    rows = TEXTS if data is None else data
    return SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=rows, args=args, **options)


def test_arguments_that_trl_has_moved_to_its_config(model, tokenizer, tmp_path, capsys):
    old: dict[str, Any] = {"dataset_text_field": "text", "max_seq_length": 64, "packing": True, "dataset_num_proc": 2}
    trainer = make(model, tokenizer, tmp_path, data_collator=DataCollatorForSeq2Seq(tokenizer=tokenizer), **old)
    assert (trainer.args.max_length, trainer.args.packing, trainer.max_length) == (64, True, 64)
    assert trainer.tokenizer is trainer.processing_class is tokenizer
    said = capsys.readouterr().err
    assert "SFTTrainer: data_collator has no effect: DataCollatorForSeq2Seq pads" in said
    assert "dataset_num_proc has no effect" in said
    make(model, tokenizer, tmp_path, max_length=64, data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False))
    with pytest.raises(ValueError, match="data_collator=<.*print> is not supported"):
        make(model, tokenizer, tmp_path, data_collator=print)
    with pytest.raises(ValueError, match="compute_metrics=.* is not supported: use a callback with on_evaluate"):
        make(model, tokenizer, tmp_path, compute_metrics=print)
    with pytest.raises(TypeError, match="unknown argument 'max_seq_len'. Did you mean 'max_seq_length'"):
        make(model, tokenizer, tmp_path, max_seq_len=32)


def test_every_training_argument_is_known():
    known = {f.name for f in dataclasses.fields(SFTConfig)} | set(config._ALIASES) | set(config._NO_EFFECT)
    missing = [f.name for f in dataclasses.fields(TrainingArguments) if f.name not in known | set(config._REFUSED)]
    assert not missing
    # Defaults of transformers, spelt out, ask for nothing that is not there.
    plain = {f.name: f.default for f in dataclasses.fields(TrainingArguments) if f.name in config._REFUSED}
    plain = {name: value for name, value in plain.items() if value is not dataclasses.MISSING}
    SFTConfig(**plain)


def test_train_on_responses_only(model, tokenizer, tmp_path, capsys):
    trainer = make(model, tokenizer, tmp_path, eval_dataset=TEXTS[:1], max_seq_length=128)
    everything = trainer.train_dataset[1]["labels"]
    assert -100 not in everything[1:]
    out = train_on_responses_only(trainer, instruction_part="user: ", response_part="assistant: ", num_proc=2)
    assert out is trainer
    for rows, number in ((trainer.train_dataset, 1), (trainer.eval_dataset, 0)):
        row = rows[number]
        assert len(row["labels"]) == len(row["input_ids"]) == len(row["attention_mask"])
        trained = [t for t in row["labels"] if t != -100]
        # EOS, which rows of text get, follows the last response.
        assert tokenizer.decode(trained) == f"{number + 1}.<|eot|>bye<|eot|><|end|>"
    assert len(trainer.train_dataset[1:3]) == 2
    assert "num_proc has no effect" in capsys.readouterr().err
    by_template = train_on_responses_only(make(model, tokenizer, tmp_path, max_seq_length=128))
    labels = [[row["labels"] for row in one.train_dataset or ()] for one in (by_template, trainer)]
    assert labels[0] == labels[1]
    last = train_on_responses_only(trainer, "user: ", "assistant: ", last_response_only=True)
    assert tokenizer.decode([t for t in last.train_dataset[0]["labels"] if t != -100]) == "bye<|eot|><|end|>"
    with pytest.raises(ValueError, match="nothing to train on"):
        train_on_responses_only(trainer, "Frage: ", "Antwort: ")
    with pytest.raises(ValueError, match="give instruction_part and response_part, or neither"):
        train_on_responses_only(trainer, instruction_part="user: ")
    with pytest.raises(TypeError, match="unknown argument 'respons_part'"):
        train_on_responses_only(trainer, respons_part="assistant: ")


@pytest.mark.filterwarnings("ignore:.* rows. conversations do not begin with the BOS")
def test_responses_of_messages_and_of_prompts(model, tokenizer, tmp_path):
    turns = [("user", "hi"), ("assistant", "yo"), ("user", "so"), ("assistant", "bye")]
    messages = [{"messages": [{"role": role, "content": text} for role, text in turns]}]
    trainer = train_on_responses_only(make(model, tokenizer, tmp_path, Dataset.from_list(messages), max_length=99))
    assert tokenizer.decode([t for t in trainer.train_dataset[0]["labels"] if t != -100]) == "yo<|eot|>bye<|eot|>"
    prompts = [{"prompt": "user: hi<|eot|>assistant: yo<|eot|>user: so<|eot|>", "completion": "assistant: bye"}]
    trainer = train_on_responses_only(make(model, tokenizer, tmp_path, prompts, max_length=99))
    assert tokenizer.decode([t for t in trainer.train_dataset[0]["labels"] if t != -100]) == "yo<|eot|>bye<|end|>"


def test_a_stream_without_end_is_read_as_far_as_packed_steps_need(model, tokenizer, tmp_path):
    read = itertools.count()

    def stream():
        for row in itertools.cycle(TEXTS):
            next(read)
            yield row

    args = SFTConfig(output_dir=str(tmp_path), max_steps=3, packing=True, max_length=128, disable_tqdm=True,
                     per_device_train_batch_size=2, gradient_accumulation_steps=2)  # fmt: skip
    trainer = make(model, tokenizer, tmp_path, stream(), args=args)
    assert next(read) <= 257  # one part of it
    assert trainer._batches.steps_per_epoch >= 3


def test_generate_takes_what_transformers_does(model, tokenizer, capsys):
    inputs = tokenizer(["user: hi", "user: hello"], padding=True, padding_side="left")
    want = model.generate([tokenizer("user: hi")["input_ids"], tokenizer("user: hello")["input_ids"]], max_new_tokens=4)
    got = model.generate(**inputs, max_new_tokens=4, use_cache=True, pad_token_id=tokenizer.pad_token_id)
    np.testing.assert_array_equal(got[:, -4:], want[:, -4:])
    assert "generate: use_cache has no effect" in capsys.readouterr().err
    np.testing.assert_array_equal(model.generate(input_ids=inputs, max_length=got.shape[1])[:, -4:], want[:, -4:])
    one = tokenizer("user: hi", return_tensors="np")
    np.testing.assert_array_equal(model.generate(**one, max_new_tokens=4)[:, -4:], want[:1, -4:])
    # At min_p = 1 only the likeliest token is left, whatever the temperature; without it there are others.
    np.testing.assert_array_equal(
        model.generate(one, max_new_tokens=4, temperature=5.0, min_p=1.0)[:, -4:], want[:1, -4:]
    )
    assert (model.generate(one, max_new_tokens=4, temperature=50.0)[:, -4:] != want[:1, -4:]).any()
    with pytest.raises(ValueError, match="generate: num_beams=4 is not supported"):
        model.generate(one, num_beams=4)
    with pytest.raises(TypeError, match="generate: unknown argument 'max_new_token'. Did you mean 'max_new_tokens'"):
        model.generate(one, max_new_token=3)


def test_unsloths_names_are_ours():
    assert lora_jax.UnslothTrainer is lora_jax.Trainer is lora_jax.SFTTrainer
    assert lora_jax.UnslothTrainingArguments is lora_jax.TrainingArguments is lora_jax.SFTConfig
    assert SFTConfig(gradient_checkpointing="unsloth").remat == "full"
