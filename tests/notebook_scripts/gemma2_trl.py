"""Gemma 2 with transformers, PEFT and TRL: QLoRA by a quantisation config, rows of messages, packing."""

import os

from datasets import load_dataset
from transformers import AutoTokenizer

from lora_jax import AutoModelForCausalLM  # was: from transformers import AutoModelForCausalLM
from lora_jax import BitsAndBytesConfig  # was: from transformers import BitsAndBytesConfig
from lora_jax import LoraConfig  # was: from peft import LoraConfig
from lora_jax import SFTConfig, SFTTrainer  # was: from trl import SFTConfig, SFTTrainer
from lora_jax import prepare_model_for_kbit_training  # was: from peft import prepare_model_for_kbit_training

model_id = os.environ["MODEL"]  # was: model_id = "google/gemma-2-9b-it"

bnb_config = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_use_double_quant=True,
    bnb_4bit_quant_type="nf4",
    # was: bnb_4bit_compute_dtype=torch.bfloat16,
)
tokenizer = AutoTokenizer.from_pretrained(model_id)
tokenizer.padding_side = "right"
model = AutoModelForCausalLM.from_pretrained(
    model_id,
    quantization_config=bnb_config,
    attn_implementation="eager",
    device_map="auto",
    trust_remote_code=True,
    # was: torch_dtype=torch.bfloat16,
)
model = prepare_model_for_kbit_training(model)

peft_config = LoraConfig(
    r=8,
    lora_alpha=16,
    lora_dropout=0.05,
    bias="none",
    task_type="CAUSAL_LM",
    target_modules="all-linear",
)

dataset = load_dataset(
    "json", data_files=os.environ["DATA"] + "/messages.jsonl", split="train"
)  # was: dataset = load_dataset("HuggingFaceTB/smoltalk", "everyday-conversations", split="train")
dataset = dataset.train_test_split(test_size=0.2, seed=42)

args = SFTConfig(
    output_dir="gemma-2-trained",
    max_length=512,
    packing=True,
    num_train_epochs=1,
    per_device_train_batch_size=2,
    per_device_eval_batch_size=2,
    gradient_accumulation_steps=2,
    gradient_checkpointing=True,
    gradient_checkpointing_kwargs={"use_reentrant": False},
    optim="adamw_torch_fused",
    logging_steps=1,
    eval_strategy="steps",
    eval_steps=0.5,
    save_strategy="epoch",
    learning_rate=2e-4,
    bf16=True,
    tf32=True,
    max_grad_norm=0.3,
    warmup_steps=0.03,
    lr_scheduler_type="constant_with_warmup",
    push_to_hub=False,
    report_to="none",
)
trainer = SFTTrainer(
    model=model,
    args=args,
    train_dataset=dataset["train"],
    eval_dataset=dataset["test"],
    peft_config=peft_config,
    processing_class=tokenizer,
)
trainer.train()
print(trainer.evaluate())
trainer.save_model()
print([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
