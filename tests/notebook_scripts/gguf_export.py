"""What a trained model is saved as: adapter, merged folder, GGUF files."""

import os

from datasets import load_dataset

from lora_jax import FastLanguageModel  # was: from unsloth import FastLanguageModel
from lora_jax import SFTConfig, SFTTrainer  # was: from trl import SFTConfig, SFTTrainer

model, tokenizer = FastLanguageModel.from_pretrained(
    os.environ["MODEL"],  # was: "unsloth/Llama-3.2-3B-Instruct",
    max_seq_length=1024,
    load_in_4bit=True,
)
model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16, use_gradient_checkpointing="unsloth")
dataset = load_dataset(
    "json", data_files=os.environ["DATA"] + "/messages.jsonl", split="train"
)  # was: dataset = load_dataset("trl-lib/Capybara", split="train")
trainer = SFTTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=dataset,
    args=SFTConfig(per_device_train_batch_size=2, max_steps=2, output_dir="outputs", report_to="none"),
)
trainer.train()

model.save_pretrained("lora_model")
tokenizer.save_pretrained("lora_model")
if False:
    model.push_to_hub("your_name/lora_model", token="...")
    tokenizer.push_to_hub("your_name/lora_model", token="...")

if True:
    model.save_pretrained_merged("model", tokenizer, save_method="merged_16bit")
if False:
    model.push_to_hub_merged("hf/model", tokenizer, save_method="merged_16bit", token="")
if True:
    model.save_pretrained_merged("model_lora", tokenizer, save_method="lora")

if True:
    model.save_pretrained_gguf("gguf", tokenizer, quantization_method="q8_0")
if True:
    model.save_pretrained_gguf("gguf16", tokenizer, quantization_method="f16")
if False:
    model.push_to_hub_gguf("hf/model", tokenizer, quantization_method=["q4_k_m", "q8_0"], token="")
