"""Continued pretraining on plain text: embeddings and head are trained too, at a rate of their own."""

import os

from datasets import load_dataset

from lora_jax import FastLanguageModel  # was: from unsloth import FastLanguageModel
from lora_jax import (
    UnslothTrainer,
    UnslothTrainingArguments,
)  # was: from unsloth import UnslothTrainer, UnslothTrainingArguments

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name=os.environ["MODEL"],  # was: model_name="unsloth/mistral-7b-v0.3",
    max_seq_length=2048,
    dtype=None,
    load_in_4bit=True,
)
model = FastLanguageModel.get_peft_model(
    model,
    r=32,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    modules_to_save=["embed_tokens", "lm_head"],
    lora_alpha=32,
    lora_dropout=0,
    bias="none",
    use_gradient_checkpointing="unsloth",
    random_state=3407,
    use_rslora=True,
    loftq_config=None,
)
dataset = load_dataset(
    "json", data_files=os.environ["DATA"] + "/stories.jsonl", split="train", streaming=True
)  # was: dataset = load_dataset("roneneldan/TinyStories", split="train", streaming=True)
EOS_TOKEN = tokenizer.eos_token


def formatting_prompts_func(examples):
    return {"text": [example + EOS_TOKEN for example in examples["text"]]}


dataset = dataset.map(formatting_prompts_func, batched=True)

trainer = UnslothTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=dataset,
    dataset_text_field="text",
    max_seq_length=512,
    dataset_num_proc=8,
    packing=True,
    args=UnslothTrainingArguments(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        warmup_ratio=0.1,
        max_steps=3,
        learning_rate=5e-5,
        embedding_learning_rate=5e-6,
        logging_steps=1,
        optim="adamw_8bit",
        weight_decay=0.00,
        lr_scheduler_type="cosine",
        seed=3407,
        output_dir="outputs",
        report_to="none",
    ),
)
trainer_stats = trainer.train()

inputs = tokenizer(["Once upon a time, in a galaxy, far far away,"])
# was: inputs = tokenizer(["Once upon a time, in a galaxy, far far away,"], return_tensors="pt").to("cuda")
outputs = model.generate(**inputs, max_new_tokens=12, use_cache=True, repetition_penalty=1.0)
print(tokenizer.batch_decode(outputs)[0])
