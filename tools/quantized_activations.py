"""What keeping activations in 8 bits does to gradients and to training: the error of each tensor, and loss curves.

    python -m lora_jax.tools.quantized_activations --out results.json
    python -m lora_jax.tools.quantized_activations --shape llama3.1-8b --out results.json
    python -m lora_jax.tools.quantized_activations --presets --out results.json

A rematerialisation plan may keep a tensor for backward as int8 (`save_quantized`, see lora_jax.remat). The loss stays
as it is; gradients do not. On SmolLM2-135M-Instruct in NF4 with rank 16, 20 steps into a training, this prints for
every tensor the relative error and the cosine of the gradients of each layer's adapters against the exact ones; beside
them what keys and values would do in NF4, and what bfloat16 in place of float32 arithmetic does. Then it trains from
the same start with exact and with quantised activations, on rows in the same order. All arithmetic is float32, so that
nothing but the tensors kept differs.

With --shape it compares the gradients of a model of that shape with random weights and adapters instead, on random
tokens. With --presets it trains with each preset of rematerialisation instead: the losses should be the same but for
rounding.
"""

import argparse
import contextlib
import functools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from lora_jax.tools.bench_step import SHAPES, abstract_model, environment, hf_config, random_weights, token_ids

STEPS, WARM_UP = 200, 20
ROWS, LENGTH = 2, 128  # of a step
ALL = ("input", "q", "k", "v", "attention", "residual", "gate", "up")
TENSORS = (*((name,) for name in ALL), ("k", "v"), ("gate", "up"), ("k", "v", "gate", "up"), ALL)
CHOSEN = (("k", "v"), ("gate", "up"), ALL)  # of training, and with --shape
PRESETS = ("full", "none", "selective", "offload")


def main() -> None:
    """Prints both comparisons and writes them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each training; 0 for none")
    parser.add_argument("--shape", choices=SHAPES, help="gradients of random weights of this shape instead")
    parser.add_argument("--tokens", type=int, default=256, help="of the one row, with --shape")
    parser.add_argument("--presets", action="store_true", help="losses with each preset of rematerialisation instead")
    args = parser.parse_args()
    if args.presets:
        return compare_presets(args.steps, args.out)
    if args.shape:
        rows = gradients_of_shape(args.shape, args.tokens)
        return _write(
            args.out, {"environment": environment(), "shape": args.shape, "tokens": args.tokens, "gradients": rows}
        )
    result: dict[str, Any] = {"environment": environment(), "gradients": gradients()}
    if args.steps:
        result["losses"] = {}
        for names in ((), *CHOSEN):
            result["losses"][" ".join(names) or "exact"] = train(names, args.steps)
            _print_losses(result["losses"])
            _write(args.out, result)
    _write(args.out, result)


def compare_presets(steps: int, out: Path | None) -> None:
    """Prints how far the losses of each preset are from those of the first, and writes them as JSON."""
    import numpy as np

    losses: dict[str, list[float]] = {}
    for preset in PRESETS:
        losses[preset] = _trained(_model("float32"), preset, steps)[1]
        off = np.abs(np.divide(losses[preset], losses[PRESETS[0]]) - 1)
        print(
            f"{preset}: mean loss {np.mean(losses[preset]):.6f}, each within {off.max():.1e} of {PRESETS[0]}'s, "
            f"{int((off == 0).sum())} of {steps} equal",
            flush=True,
        )
        _write(out, {"environment": environment(), "losses": losses})


def _write(out: Path | None, result: dict[str, Any]) -> None:
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")


def gradients() -> list[dict[str, Any]]:
    """For each choice of tensors, relative errors and cosines of every layer's gradient."""
    adapter, _ = _trained(_model("float32"), _plan(()), WARM_UP)
    batch = _batches(1, seed=1)[0]
    exact = _gradients(_model("float32"), adapter, batch, ())
    rows = []
    for names in TENSORS:
        rows.append(_compared(" ".join(names), _gradients(_model("float32"), adapter, batch, names), exact))
    with _nf4():
        rows.append(_compared("k v in NF4", _gradients(_model("float32"), adapter, batch, ("k", "v")), exact))
    in_bfloat16 = _gradients(_model("bfloat16"), adapter, batch, ())
    return [*rows, _compared("none, arithmetic in bfloat16", in_bfloat16, exact)]


def gradients_of_shape(name: str, tokens: int) -> list[dict[str, Any]]:
    """As `gradients`, of random weights; float32 arithmetic."""
    import jax
    import numpy as np
    from flax import nnx

    from lora_jax import get_peft_model

    model = abstract_model(hf_config(SHAPES[name]), dtype="float32")
    draw = functools.partial(random_weights, nnx.state(model.module), model.config.hidden_size)
    nnx.update(model.module, jax.jit(draw)())
    get_peft_model(model, r=16, lora_alpha=16, random_state=0, verbose=False)
    ids = token_ids(1, tokens, model.config.vocab_size).astype(np.int32)[None]
    batch = {"input_ids": ids, "labels": ids}
    # B is zero before training, and then A has no gradient.
    _, lora, _ = model.split()
    leaves, tree = jax.tree.flatten(lora)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    lora = tree.unflatten(
        [leaf + 0.01 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    )
    exact = _gradients(model, lora, batch, ())
    rows = [_compared(" ".join(names), _gradients(model, lora, batch, names), exact) for names in CHOSEN]
    with _nf4():
        return [*rows, _compared("k v in NF4", _gradients(model, lora, batch, ("k", "v")), exact)]


def _compared(what: str, got: list[Any], exact: list[Any]) -> dict[str, Any]:
    """Prints and returns relative errors and cosines of the gradients of the layers."""
    import numpy as np

    errors = [float(np.linalg.norm(g - e) / np.linalg.norm(e)) for g, e in zip(got, exact, strict=True)]
    norms = [np.linalg.norm(g) * np.linalg.norm(e) for g, e in zip(got, exact, strict=True)]
    cosines = [float(g @ e / norm) for g, e, norm in zip(got, exact, norms, strict=True)]
    low, high, mean = min(errors), max(errors), float(np.mean(errors))
    print(
        f"{what:40} error of a layer {low:.4f} to {high:.4f}, mean {mean:.4f}; least cosine {min(cosines):.6f}",
        flush=True,
    )
    return {"tensors": what, "relative error": errors, "cosine": cosines}


def train(names: tuple[str, ...], steps: int) -> list[float]:
    """Losses of `steps` steps with these tensors kept in 8 bits."""
    return _trained(_model("float32"), _plan(names), steps)[1]


def _model(dtype: str) -> Any:
    from lora_jax import from_pretrained, get_peft_model
    from lora_jax.tools.smollm2 import fetch_smollm2

    model, _ = from_pretrained(fetch_smollm2(), load_in_4bit=True, dtype=dtype)
    return get_peft_model(model, r=16, lora_alpha=16, random_state=0, verbose=False)


def _batches(steps: int, seed: int) -> list[dict[str, Any]]:
    """Rows of the demo's task, int32 [1, ROWS, length] a step."""
    from transformers import AutoTokenizer

    from lora_jax.batches import BatchIterator
    from lora_jax.data import tokenize_rows
    from lora_jax.tools.demo_task import make_task
    from lora_jax.tools.smollm2 import fetch_smollm2

    tokenizer = AutoTokenizer.from_pretrained(fetch_smollm2())
    rows = [row.training for row in make_task(ROWS * steps, 1, seed=seed).train]
    examples = tokenize_rows(rows, tokenizer, max_length=LENGTH, progress=False)
    batches = BatchIterator(examples, batch_size=ROWS, max_length=LENGTH, buckets=(LENGTH,))
    return [batches.batch(step) for step in range(steps)]


def _plan(names: tuple[str, ...]) -> Any:
    from lora_jax.remat import RematPlan

    return RematPlan(((None, {**dict.fromkeys(ALL, "save"), **dict.fromkeys(names, "save_quantized")}),))


def _trained(model: Any, remat: Any, steps: int) -> tuple[Any, list[float]]:
    """(adapter, losses) after training with a preset or plan."""
    from lora_jax import SFTConfig
    from lora_jax.optim import make_optimizer
    from lora_jax.step import make_train_step

    optimizer, _ = make_optimizer(SFTConfig(learning_rate=2e-4), max(steps, STEPS))
    step = make_train_step(model, optimizer, remat=remat)
    _, lora, frozen = model.split()
    state, losses, start = optimizer.init(lora), [], time.perf_counter()
    for batch in _batches(steps, seed=0):
        lora, state, metrics = step(lora, state, frozen, batch)
        losses.append(float(metrics["loss"]))
    print(f"{steps} steps in {time.perf_counter() - start:.0f} s", flush=True)
    return lora, losses


def _gradients(model: Any, lora: Any, batch: dict[str, Any], names: tuple[str, ...]) -> list[Any]:
    """The gradient of each layer's adapters, one vector a layer."""
    import jax
    import numpy as np

    from lora_jax.step import sum_of_losses

    graph, _, frozen = model.split()
    micro = {name: array[0] for name, array in batch.items()}

    @jax.jit
    def gradient(lora, frozen):
        return jax.grad(lambda lora: sum_of_losses(graph, lora, frozen, micro, remat=_plan(names))[0])(lora)

    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(gradient(lora, frozen))]
    return [np.concatenate([leaf[layer].ravel() for leaf in leaves]) for layer in range(len(leaves[0]))]


@contextlib.contextmanager
def _nf4() -> Iterator[None]:
    """Codes of NF4 in place of int8's, with a scale for 64 features, as weights have them."""
    import jax.numpy as jnp
    import numpy as np

    from lora_jax.kernels import kept
    from lora_jax.kernels.nf4.format import CODE

    code = np.asarray(CODE, np.float32)

    def quantize(x):
        blocks = x.reshape(*x.shape[:-1], -1, kept.block_of(x.shape[-1])).astype(jnp.float32)
        scales = jnp.abs(blocks).max(axis=-1).astype(jnp.bfloat16)
        relative = blocks / jnp.maximum(scales.astype(jnp.float32), 1e-30)[..., None]
        codes = jnp.searchsorted((code[1:] + code[:-1]) / 2, relative).astype(jnp.int8)
        return codes.reshape(x.shape), scales

    def dequantize(codes, scales, dtype):
        blocks = jnp.take(code, codes.reshape(*scales.shape, -1).astype(jnp.int32))
        return (blocks * scales.astype(jnp.float32)[..., None]).astype(dtype).reshape(codes.shape)

    with mock.patch.multiple(kept, MAX_BLOCK=64, quantize=quantize, dequantize=dequantize):
        yield


def _print_losses(losses: dict[str, list[float]]) -> None:
    """Means of 20 steps each against the exact run's."""
    import numpy as np

    def means(one: list[float]) -> np.ndarray:
        return np.mean(np.reshape(one[: len(one) // 20 * 20], (-1, 20)), axis=1)

    name = list(losses)[-1]
    off = means(losses[name]) / means(losses["exact"]) - 1
    print(
        f"{name}: mean loss {np.mean(losses[name]):.5f}, of the last 20 steps {np.mean(losses[name][-20:]):.5f}; "
        f"means of 20 steps are off by at most {100 * np.abs(off).max():.2f} %",
        flush=True,
    )


if __name__ == "__main__":
    main()
