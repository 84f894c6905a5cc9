"""A run that is stopped, and goes on from its newest checkpoint."""

import os

from datasets import load_dataset

from lora_jax import FastLanguageModel  # was: from unsloth import FastLanguageModel
from lora_jax import SFTConfig, SFTTrainer  # was: from trl import SFTConfig, SFTTrainer


def make_trainer(max_steps):
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=os.environ["MODEL"],  # was: model_name="unsloth/Llama-3.2-1B-Instruct",
        max_seq_length=1024,
        load_in_4bit=True,
    )
    model = FastLanguageModel.get_peft_model(model, r=8, lora_alpha=16, lora_dropout=0.1, random_state=3407)
    dataset = load_dataset(
        "json", data_files=os.environ["DATA"] + "/messages.jsonl", split="train"
    )  # was: dataset = load_dataset("trl-lib/Capybara", split="train")
    return SFTTrainer(
        model=model,
        tokenizer=tokenizer,
        train_dataset=dataset,
        args=SFTConfig(
            per_device_train_batch_size=2,
            gradient_accumulation_steps=1,
            max_steps=max_steps,
            learning_rate=2e-4,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="steps",
            save_steps=2,
            save_total_limit=2,
            seed=3407,
            output_dir="outputs",
            report_to="none",
        ),
    )


trainer = make_trainer(max_steps=2)
trainer.train()

trainer = make_trainer(max_steps=4)
trainer_stats = trainer.train(resume_from_checkpoint=True)
assert trainer_stats.global_step == 4
print([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
