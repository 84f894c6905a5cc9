"""Llama 3 on Alpaca's rows, put into a prompt of their own."""

# was: import torch
import os

from datasets import load_dataset

from lora_jax import FastLanguageModel  # was: from unsloth import FastLanguageModel
from lora_jax import SFTConfig, SFTTrainer  # was: from trl import SFTConfig, SFTTrainer
from lora_jax import TextStreamer  # was: from transformers import TextStreamer

max_seq_length = 2048
dtype = None  # chosen by the checkpoint
load_in_4bit = True

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name=os.environ["MODEL"],  # was: model_name="unsloth/llama-3-8b-bnb-4bit",
    max_seq_length=max_seq_length,
    dtype=dtype,
    load_in_4bit=load_in_4bit,
)

model = FastLanguageModel.get_peft_model(
    model,
    r=16,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    lora_alpha=16,
    lora_dropout=0,
    bias="none",
    use_gradient_checkpointing="unsloth",
    random_state=3407,
    use_rslora=False,
    loftq_config=None,
)

alpaca_prompt = """Answer the instruction, with the input in mind.

### Instruction:
{}

### Input:
{}

### Response:
{}"""

EOS_TOKEN = tokenizer.eos_token


def formatting_prompts_func(examples):
    texts = []
    for instruction, context, output in zip(
        examples["instruction"], examples["input"], examples["output"], strict=True
    ):
        texts.append(alpaca_prompt.format(instruction, context, output) + EOS_TOKEN)
    return {"text": texts}


dataset = load_dataset(
    "json", data_files=os.environ["DATA"] + "/alpaca.jsonl", split="train"
)  # was: dataset = load_dataset("yahma/alpaca-cleaned", split="train")
dataset = dataset.map(formatting_prompts_func, batched=True)

trainer = SFTTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=dataset,
    dataset_text_field="text",
    max_seq_length=max_seq_length,
    packing=False,
    args=SFTConfig(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        warmup_steps=1,
        max_steps=3,
        learning_rate=2e-4,
        logging_steps=1,
        optim="adamw_8bit",
        weight_decay=0.01,
        lr_scheduler_type="linear",
        seed=3407,
        output_dir="outputs",
        report_to="none",
    ),
)

# was: gpu_stats = torch.cuda.get_device_properties(0)
# was: start_gpu_memory = round(torch.cuda.max_memory_reserved() / 1024 / 1024 / 1024, 3)
trainer_stats = trainer.train()
print(f"{trainer_stats.metrics['train_runtime']} seconds used for training.")

FastLanguageModel.for_inference(model)
inputs = tokenizer([alpaca_prompt.format("Continue the series.", "1, 2, 3, 5, 8", "")])
# was: inputs = tokenizer([alpaca_prompt.format("Continue the series.", "1, 2, 3, 5, 8", "")], return_tensors="pt").to("cuda")
outputs = model.generate(**inputs, max_new_tokens=16, use_cache=True)
print(tokenizer.batch_decode(outputs))

text_streamer = TextStreamer(tokenizer)
_ = model.generate(**inputs, streamer=text_streamer, max_new_tokens=16)

model.save_pretrained("lora_model")
tokenizer.save_pretrained("lora_model")

if True:
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name="lora_model",
        max_seq_length=max_seq_length,
        dtype=dtype,
        load_in_4bit=load_in_4bit,
    )
    FastLanguageModel.for_inference(model)
