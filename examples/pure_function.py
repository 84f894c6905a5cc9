"""The model as a pure function of arrays, and the training step with any optax transformation.

    python examples/pure_function.py FOLDER_OR_HUB_NAME

`model.split()` gives a static graph and two pytrees, trained and frozen. A loss is then a function of arrays: jit it,
differentiate it, shard it, or scan over it. `lora_jax.train_step` is such a function, too.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import lora_jax
from lora_jax.batches import BatchIterator
from lora_jax.data import tokenize_rows
from lora_jax.step import sum_of_losses

ROWS = [{"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a in range(4) for b in range(4)]

model, tokenizer = lora_jax.from_pretrained(sys.argv[1], dtype="float32", progress=False)
lora_jax.get_peft_model(model, r=8, lora_alpha=16)
graph, lora, frozen = model.split()


@jax.jit
def logits_of(lora: nnx.State, frozen: nnx.State, ids: jax.Array) -> jax.Array:
    """[B, T, V] of token ids [B, T]."""
    return (module := nnx.merge(graph, lora, frozen)).head().logits(module(ids)[0])


# Two steps of 8 rows an epoch; arrays [1 micro-batch, 8 rows, tokens], int32.
batches = BatchIterator(tokenize_rows(ROWS, tokenizer, max_length=32, progress=False), batch_size=8)
one = {name: jnp.asarray(array[0]) for name, array in batches.batch(0).items()}


@jax.jit
@jax.value_and_grad
def pulled_loss(lora: nnx.State, frozen: nnx.State, batch: dict[str, jax.Array]) -> jax.Array:
    """A loss of one's own: the model's mean over the label tokens, and a pull of the adapter towards zero."""
    total, count = sum_of_losses(graph, lora, frozen, batch)
    return total / count + 1e-3 * optax.tree.norm(lora) ** 2


print("loss {:.4f}, norm of the gradient {:.4f}".format(*map(optax.tree.norm, pulled_loss(lora, frozen, one))))
# Any optax transformation: here Lion with clipped gradients and a schedule, averaged over two steps.
schedule = optax.warmup_cosine_decay_schedule(0.0, 2e-3, warmup_steps=2, decay_steps=6)
clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.lion(schedule))
optimizer = optax.MultiSteps(clipped, every_k_schedule=2).gradient_transformation()
step = jax.jit(functools.partial(lora_jax.train_step, graph=graph, optimizer=optimizer), donate_argnums=(0, 1))
opt_state = optimizer.init(lora)
for number in range(12):
    lora, opt_state, metrics = step(lora, opt_state, frozen, batches.batch(number))
    print(f"step {number + 1}: loss {metrics['loss']:.4f}")
model.update_lora(lora)
print(tokenizer.decode(logits_of(lora, frozen, one["input_ids"][:1])[0, -1].argmax().item()))
