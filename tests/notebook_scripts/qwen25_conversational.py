"""Qwen 2.5 on conversations, with evaluation, an early stop and batched generation."""

import os

from datasets import load_dataset
from transformers import EarlyStoppingCallback

from lora_jax import FastLanguageModel  # was: from unsloth import FastLanguageModel
from lora_jax import SFTConfig, SFTTrainer  # was: from trl import SFTConfig, SFTTrainer
from lora_jax.chat_templates import (  # was: from unsloth.chat_templates import (
    get_chat_template,
    standardize_data_formats,
)

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name=os.environ["MODEL"],  # was: model_name="unsloth/Qwen2.5-7B",
    max_seq_length=1024,
    load_in_4bit=False,
)
model = FastLanguageModel.get_peft_model(
    model, r=8, lora_alpha=16, lora_dropout=0, use_dora=True, layers_to_transform=[1], random_state=3407
)
tokenizer = get_chat_template(tokenizer, chat_template="qwen-2.5")

dataset = load_dataset(
    "json", data_files=os.environ["DATA"] + "/sharegpt.jsonl", split="train"
)  # was: dataset = load_dataset("mlabonne/FineTome-100k", split="train")
dataset = standardize_data_formats(dataset)


def formatting_func(example):
    return tokenizer.apply_chat_template(example["conversations"], tokenize=False)


split = dataset.train_test_split(test_size=0.25, seed=3407)
trainer = SFTTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=split["train"],
    eval_dataset=split["test"],
    formatting_func=formatting_func,
    callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    args=SFTConfig(
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=1,
        max_steps=6,
        learning_rate=5e-4,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        save_strategy="no",
        seed=3407,
        output_dir="outputs",
        report_to="none",
    ),
)
trainer.train()
print(trainer.state.best_metric)

tokenizer.padding_side = "left"
texts = [
    tokenizer.apply_chat_template([{"role": "user", "content": q}], tokenize=False, add_generation_prompt=True)
    for q in ("Two and two?", "What is the capital of France, and of Spain?")
]
inputs = tokenizer(texts, padding=True)  # was: inputs = tokenizer(texts, padding=True, return_tensors="pt").to("cuda")
outputs = model.generate(**inputs, max_new_tokens=12, do_sample=True, temperature=0.7, top_p=0.9, top_k=20)
print(tokenizer.batch_decode(outputs, skip_special_tokens=True))
model.print_trainable_parameters()
