"""TRL: rows of prompt and completion, the completion alone is trained on, with LoRA+ and PiSSA."""

import os

from datasets import load_dataset
from transformers import AutoTokenizer

from lora_jax import AutoModelForCausalLM  # was: from transformers import AutoModelForCausalLM
from lora_jax import AutoPeftModelForCausalLM  # was: from peft import AutoPeftModelForCausalLM
from lora_jax import LoraConfig  # was: from peft import LoraConfig
from lora_jax import SFTConfig, SFTTrainer  # was: from trl import SFTConfig, SFTTrainer
from lora_jax import get_peft_model  # was: from peft import get_peft_model

model_id = os.environ["MODEL"]  # was: model_id = "meta-llama/Llama-3.2-1B-Instruct"
tokenizer = AutoTokenizer.from_pretrained(model_id)
model = AutoModelForCausalLM.from_pretrained(model_id, device_map="auto")
# was: model = AutoModelForCausalLM.from_pretrained(model_id, device_map="auto", torch_dtype=torch.bfloat16)

config = LoraConfig(
    r=8,
    lora_alpha=8,
    lora_dropout=0.0,
    bias="none",
    task_type="CAUSAL_LM",
    target_modules=["q_proj", "v_proj", "up_proj"],
    init_lora_weights="pissa_niter_4",
    rank_pattern={"up_proj": 4},
)
model = get_peft_model(model, config)
model.print_trainable_parameters()

dataset = load_dataset(
    "json", data_files=os.environ["DATA"] + "/messages.jsonl", split="train"
)  # was: dataset = load_dataset("trl-lib/Capybara", split="train")
dataset = dataset.map(
    lambda row: {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}, remove_columns=["messages"]
)

trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir="outputs",
        completion_only_loss=True,
        max_length=1024,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=3,
        learning_rate=1e-4,
        loraplus_lr_ratio=4.0,
        logging_steps=1,
        report_to="none",
    ),
    train_dataset=dataset,
    processing_class=tokenizer,
)
trainer.train()
trainer.save_model("outputs/final")

model = AutoPeftModelForCausalLM.from_pretrained("outputs/final")
# was: model = AutoPeftModelForCausalLM.from_pretrained("outputs/final", torch_dtype=torch.bfloat16).to("cuda")
messages = [{"role": "user", "content": "Two and two?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
# was: inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt").to("cuda")
outputs = model.generate(**inputs, max_new_tokens=12)
print(tokenizer.decode(outputs[0][len(inputs["input_ids"]) :]))
