"""The model as a Flax NNX module, trained by NNX's own tools.

    python examples/nnx_module.py FOLDER_OR_HUB_NAME

`model.module` is an ordinary `nnx.Module`: calling it gives hidden states, `head().logits` what they predict. Trained
leaves are of the type `nnx.LoRAParam`, so every NNX filter finds them.
"""

import sys

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import lora_jax
from lora_jax.data import tokenize_rows
from lora_jax.models.decoder import Decoder

ROWS = [{"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a in range(4) for b in range(4)]


def batch_of(rows, tokenizer) -> dict[str, jax.Array]:
    """{"input_ids", "labels"}: int32 [rows, tokens]; labels are -100 where there is no loss."""
    examples = tokenize_rows(rows, tokenizer, max_length=32, progress=False)
    longest = max(map(len, examples))
    ids = [jnp.pad(e.input_ids, (0, longest - len(e))) for e in examples]
    labels = [jnp.pad(e.labels, (0, longest - len(e)), constant_values=-100) for e in examples]
    return {"input_ids": jnp.stack(ids), "labels": jnp.stack(labels)}


def loss_of(module: Decoder, batch: dict[str, jax.Array]) -> jax.Array:
    """Mean cross-entropy of the label tokens, in nats; the state at t predicts the token at t + 1."""
    states, _ = module(batch["input_ids"])
    logits, targets = module.head().logits(states[:, :-1]), batch["labels"][:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
    return jnp.mean(losses, where=targets != -100)


@nnx.jit
def train_step(module: Decoder, optimizer: nnx.Optimizer, batch: dict[str, jax.Array]) -> jax.Array:
    """One step, in place."""
    loss, gradients = nnx.value_and_grad(loss_of, argnums=nnx.DiffState(0, nnx.LoRAParam))(module, batch)
    optimizer.update(module, gradients)
    return loss


model, tokenizer = lora_jax.from_pretrained(sys.argv[1], dtype="float32", progress=False)
lora_jax.get_peft_model(model, r=8, lora_alpha=16)
optimizer = nnx.Optimizer(model.module, optax.adamw(5e-3), wrt=nnx.LoRAParam)
batch = batch_of(ROWS, tokenizer)
for step in range(1, 9):
    print(f"step {step}: loss {train_step(model.module, optimizer, batch):.4f}")
print(lora_jax.generate_text(model, tokenizer, ["2 + 3 ="], max_new_tokens=4))
