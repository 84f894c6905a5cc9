"""Llama 3.1 on ShareGPT's conversations, in its chat template, responses alone."""

import os

from datasets import load_dataset
from transformers import DataCollatorForSeq2Seq

from lora_jax import FastLanguageModel  # was: from unsloth import FastLanguageModel
from lora_jax import SFTTrainer  # was: from trl import SFTTrainer
from lora_jax import TextStreamer  # was: from transformers import TextStreamer
from lora_jax import TrainingArguments  # was: from transformers import TrainingArguments
from lora_jax import is_bfloat16_supported  # was: from unsloth import is_bfloat16_supported
from lora_jax.chat_templates import (  # was: from unsloth.chat_templates import (
    get_chat_template,
    standardize_sharegpt,
    train_on_responses_only,
)

max_seq_length = 2048

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name=os.environ["MODEL"],  # was: model_name="unsloth/Llama-3.1-8B-Instruct",
    max_seq_length=max_seq_length,
    load_in_4bit=True,
)
model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16, lora_dropout=0, bias="none", random_state=3407)

tokenizer = get_chat_template(tokenizer, chat_template="llama-3.1")


def formatting_prompts_func(examples):
    convos = examples["conversations"]
    texts = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=False) for c in convos]
    return {"text": texts}


dataset = load_dataset(
    "json", data_files=os.environ["DATA"] + "/sharegpt.jsonl", split="train"
)  # was: dataset = load_dataset("mlabonne/FineTome-100k", split="train")
dataset = standardize_sharegpt(dataset)
dataset = dataset.map(formatting_prompts_func, batched=True)
print(dataset[5]["conversations"], dataset[5]["text"])

trainer = SFTTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=dataset,
    dataset_text_field="text",
    max_seq_length=max_seq_length,
    data_collator=DataCollatorForSeq2Seq(tokenizer=tokenizer),
    dataset_num_proc=2,
    packing=False,
    args=TrainingArguments(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        warmup_steps=1,
        max_steps=3,
        learning_rate=2e-4,
        fp16=not is_bfloat16_supported(),
        bf16=is_bfloat16_supported(),
        logging_steps=1,
        optim="adamw_8bit",
        weight_decay=0.01,
        lr_scheduler_type="linear",
        seed=3407,
        output_dir="outputs",
        report_to="none",
    ),
)
trainer = train_on_responses_only(
    trainer,
    instruction_part="<|start_header_id|>user<|end_header_id|>\n\n",
    response_part="<|start_header_id|>assistant<|end_header_id|>\n\n",
)
print(tokenizer.decode(trainer.train_dataset[5]["input_ids"]))
space = tokenizer(" ", add_special_tokens=False).input_ids[0]
print(tokenizer.decode([space if x == -100 else x for x in trainer.train_dataset[5]["labels"]]))

trainer_stats = trainer.train()

FastLanguageModel.for_inference(model)
messages = [{"role": "user", "content": "Continue the series: 1, 1, 2, 3, 5, 8,"}]
inputs = tokenizer.apply_chat_template(
    messages,
    tokenize=True,
    add_generation_prompt=True,
    # was: return_tensors="pt",
)
# was: ).to("cuda")
outputs = model.generate(input_ids=inputs, max_new_tokens=16, use_cache=True, temperature=1.5, min_p=0.1)
print(tokenizer.batch_decode(outputs))

text_streamer = TextStreamer(tokenizer, skip_prompt=True)
_ = model.generate(
    input_ids=inputs, streamer=text_streamer, max_new_tokens=16, use_cache=True, temperature=1.5, min_p=0.1
)
