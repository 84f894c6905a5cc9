"""Whether the adapter may be merged into the bfloat16 weight of each step: an experiment, and the reason for our form.

    python -m lora_jax.tools.merged_form --out results.json

A QLoRA step needs bfloat16(NF4 weight) anyway. Adding scale (A B)^T to it before it is rounded would make the adapter's
product free; the exact form adds the product to the accumulator of the matmul instead, and costs 4 % of the layer. This
prints, for both, the error against float64 and the cosine between the effect of the adapter, y - y(B = 0), and the true
effect, for B of several sizes; and trains SmolLM2-135M-Instruct with both. All sums are float32, so that nothing but
the rounding of the operands differs.

Found (tools/results/2026-11-26-cpu-merged-form.json): the errors of y are equal, 0.17 %, but a merged adapter's effect
has a cosine of 0.11 with the true one at B = 1e-5, 0.33 at 1e-4, 0.87 at 1e-3 and 1.00 at 1e-2, where the exact form
has 1.00 throughout. Over 200 steps the losses stay close (mean of the last 20: 0.0377 exact, 0.0381 merged), since B
soon grows. The exact form is the only one that `lora_matmul` has.
"""

import argparse
import json
from pathlib import Path
from typing import Any
from unittest import mock

STEPS = 200


def main() -> None:
    """Prints both comparisons and writes them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each training; 0 for none")
    args = parser.parse_args()
    from lora_jax.tools.bench_step import environment

    result: dict[str, Any] = {"environment": environment(), "layer": layer()}
    for row in result["layer"]:
        print("  ".join(f"{key} {value:.3g}" for key, value in row.items()), flush=True)
    if args.steps:
        result["losses"] = {form: train(form, args.steps) for form in ("exact", "merged")}
        for form, losses in result["losses"].items():
            print(form, "mean loss of the last 20 steps", round(sum(losses[-20:]) / len(losses[-20:]), 4))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def layer() -> list[dict[str, float]]:
    """Errors and cosines of a layer 2048 -> 2048 of rank 16 for B from 1e-6 to 1e-2, A as LoRA draws it."""
    import jax.numpy as jnp
    import numpy as np

    from lora_jax.kernels.nf4 import dequantize, quantize

    rng = np.random.default_rng(0)
    bf16 = lambda v: np.asarray(jnp.asarray(v, jnp.bfloat16)).astype(np.float64)  # noqa: E731
    size, rank = 2048, 16
    weight = quantize(jnp.asarray(rng.normal(size=(size, size)) / size**0.5, jnp.float32))
    w = np.asarray(dequantize(weight, jnp.float32), np.float64)
    x, a = bf16(rng.normal(size=(256, size))), rng.uniform(-1, 1, size=(size, rank)) * (3 / size) ** 0.5
    rows = []
    for magnitude in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2):
        b = magnitude * rng.normal(size=(rank, size))
        effect, truth = x @ a @ b, x @ w.T + x @ a @ b
        exact = x @ bf16(w).T + bf16(x @ bf16(a)) @ bf16(b)
        merged = x @ bf16(w + (a @ b).T).T
        row = {"B": magnitude}
        for form, y in (("exact", exact), ("merged", merged)):
            seen = y - x @ bf16(w).T
            cosine = (seen * effect).sum() / max(np.linalg.norm(seen) * np.linalg.norm(effect), 1e-30)
            row |= {f"{form} error": float(np.linalg.norm(y - truth) / np.linalg.norm(truth)), f"{form} cosine": cosine}
        rows.append(row)
    return rows


def train(form: str, steps: int) -> list[float]:
    """Losses of `steps` steps of the demo's task, with the exact or the merged form in every layer."""
    import jax.numpy as jnp

    from lora_jax import SFTConfig, SFTTrainer, from_pretrained, get_peft_model
    from lora_jax.kernels.nf4 import dequantize, xla
    from lora_jax.tools.demo_task import make_task
    from lora_jax.tools.smollm2 import fetch_smollm2

    def weight(w, a, b):
        """The weight rounded to bfloat16, with the adapter in it or not."""
        base = dequantize(w, jnp.float32)
        base = base + jnp.dot(a, b).T if form == "merged" else base
        return base.astype(jnp.bfloat16).astype(jnp.float32)

    def forward(x, w, a, b):
        y = jnp.dot(x, weight(w, a, b).T)
        return (y if form == "merged" else y + jnp.dot(jnp.dot(x, a), b)), None

    def input_gradient(dy, w, a, b):
        thin = jnp.dot(dy, b.T)
        dx = jnp.dot(dy, weight(w, a, b))
        return (dx if form == "merged" else dx + jnp.dot(thin, a.T)), thin

    with mock.patch.multiple(xla, forward=forward, input_gradient=input_gradient):
        model, tokenizer = from_pretrained(fetch_smollm2(), load_in_4bit=True, dtype="float32")
        get_peft_model(model, r=16, lora_alpha=16, random_state=0, verbose=False)
        args = SFTConfig(
            output_dir=f"outputs/merged-form-{form}",
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=2e-4,
            logging_steps=1,
            max_length=128,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
        )
        rows = [row.training for row in make_task(4 * steps, 1, seed=0).train]
        trainer = SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


if __name__ == "__main__":
    main()
