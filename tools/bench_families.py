"""Speed and memory of one QLoRA step of published models of every family, with random weights, on one device.

    python -m lora_jax.tools.bench_families --case 8x2048 --out results.json

Every row is rank 16 on all linear layers of the blocks, experts included, over a base in double-quantised NF4, unless
`--targets` says otherwise. All programs are compiled first, several at a time; then the models are made, one after the
other, and take their steps. `active` are the parameters that a token is multiplied by: of the experts those that it
goes to, and not the embedding. `share` is tokens/s times these, over that of the first row's model, which is dense.
`TFLOP/s` are those of the model (`lora_jax.plan.model_flops`: attention counts, what is computed again does not). GiB
are what the compiler counts for the step, weights included. Speed depends on the card: compare numbers of one run only.
"""

import argparse
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lora_jax import CausalLM, LoraConfig, SFTConfig, get_peft_model, make_train_step, plan
from lora_jax.cards import GIB
from lora_jax.models.decoder import DecoderConfig
from lora_jax.optim import make_optimizer
from lora_jax.step import bytes_held
from lora_jax.tools.bench_step import abstract_model, environment, random_weights, token_ids
from lora_jax.tools.published import PUBLISHED

__all__ = ["MODELS", "Program", "active_parameters", "build", "compiled", "measure"]

# Those whose step fits one GPU of 80 GB; the first is what the others are compared with.
MODELS = ("Llama-3.1-8B", "Llama-3.2-1B", "Llama-3.2-3B", "Mistral-7B-v0.3", "Mistral-Nemo-2407", "Qwen2.5-7B")
MODELS += (
    "Qwen3-8B",
    "Qwen3-14B",
    "gemma-2-9b",
    "gemma-3-4b",
    "gemma-3-12b",
    "Phi-3-mini-4k-instruct",
    "phi-4",
    "OLMo-2-1124-7B",
)
MODELS += ("SmolLM3-3B", "granite-3.1-8b-base", "Qwen3-30B-A3B", "DeepSeek-V2-Lite", "gpt-oss-20b", "Mixtral-8x7B")


class Program(NamedTuple):
    """What is known of a model before its arrays are made."""

    build: Any  # compiled: () -> (lora, opt_state, frozen)
    step: Any  # compiled: the training step
    work: plan.Workload
    seconds: float  # that both took to compile


def build(hf: dict[str, Any], targets: tuple[str, ...] | None) -> CausalLM:
    """The model with random weights (see `bench_step.random_weights`) and adapters; to be called under `jax.jit`."""
    model = abstract_model(hf)
    nnx.update(model.module, random_weights(nnx.state(model.module), model.config))
    return get_peft_model(model, LoraConfig(r=16, target_modules=targets), verbose=False)


def compiled(hf: dict[str, Any], rows: int, length: int, remat: str, targets: tuple[str, ...] | None) -> Program:
    """Compiles what makes a model and its training step; makes no arrays."""
    start = time.perf_counter()
    optimizer, _ = make_optimizer(SFTConfig(output_dir="unused", learning_rate=2e-4, optim="adamw_8bit"), 1000)
    models = []

    def arrays():
        model = build(hf, targets)
        graph, lora, frozen = model.split()
        models.append((graph, model.lora_config))
        return lora, optimizer.init(lora), frozen

    make = jax.jit(arrays).trace()
    lora, opt_state, frozen = make.out_info
    graph, lora_config = models[0]
    model = CausalLM(nnx.merge(graph, lora, frozen), hf_config=hf, source=Path("random"))
    model.lora_config = lora_config
    ids = jax.ShapeDtypeStruct((1, rows, length), jnp.int32)
    arguments = lora, opt_state, frozen, {"input_ids": ids, "labels": ids}
    step: Any = make_train_step(model, optimizer, remat=remat, scan_layers=True)
    programs = make.lower().compile(), step.lower(*arguments).compile()
    return Program(*programs, plan.of_step(model, *arguments), time.perf_counter() - start)


def measure(program: Program, warmup: int, steps: int) -> dict[str, Any]:
    """Makes the model, takes its steps and lets go of it."""
    work = program.work
    start = time.perf_counter()
    lora, opt_state, frozen = jax.block_until_ready(program.build())
    made = time.perf_counter() - start
    ids = token_ids(work.batch, work.length, work.config.vocab_size).astype(np.int32)[None]
    data, losses = {"input_ids": ids, "labels": ids}, []
    for count in (*[1] * warmup, steps):
        start = time.perf_counter()
        for _ in range(count):  # as in training, the host does not wait for a step before it sends the next
            lora, opt_state, metrics = program.step(lora, opt_state, frozen, data)
        losses.append(float(metrics["loss"]))
        seconds = (time.perf_counter() - start) / count
    if not np.isfinite(losses).all() or not losses[-1] < losses[0]:
        raise ValueError(f"the loss of one repeated batch must fall; got {losses}")
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "ms": 1e3 * seconds,
        "tokens_per_s": work.tokens / seconds,
        "active_parameters": active_parameters(work.config),
        "model_tflops": plan.model_flops(work) / seconds / 1e12,
        "gib": bytes_held(program.step) / GIB,
        "weights_gib": work.weights / GIB,
        "peak_gib_so_far": stats.get("peak_bytes_in_use", 0) / GIB,  # of this process
        "compile_s": program.seconds,
        "make_s": made,
        "losses": losses,
    }


def active_parameters(config: DecoderConfig) -> int:
    """Weights that a token is multiplied by: all matrices but the embedding, and of the experts those it goes to."""
    widths = (plan.layer_widths(config, layer) for layer in range(config.num_layers))
    layers = sum(w.qkv + w.hidden * w.attention + 3 * w.hidden * w.mlp for w in widths)
    return layers + config.vocab_size * config.hidden_size


def _results(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    rows, length = map(int, args.case.split("x"))
    targets = tuple(args.targets) if args.targets else None
    first = 0.0
    with ThreadPoolExecutor(args.threads) as pool:
        futures = {}
        for name in args.models:
            futures[name] = pool.submit(compiled, PUBLISHED[name][0], rows, length, args.remat, targets)
        # All of them before the first is timed: the compiler tries matmuls on the device.
        errors = {name: future.exception() for name, future in futures.items()}
    for name, future in futures.items():
        result: dict[str, Any] = {"model": name, "case": args.case, "remat": args.remat, "targets": args.targets}
        try:
            if (error := errors[name]) is not None:
                raise error
            result |= measure(future.result(), args.warmup, args.steps)
        except Exception as error:  # the others are measured all the same
            yield {**result, "error": f"{type(error).__name__}: {error}"[:500]}
            continue
        speed = result["tokens_per_s"] * result["active_parameters"]
        first = first or speed
        yield {**result, "share": speed / first}


def main() -> None:
    """Measures the models, prints a row for each and writes one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=PUBLISHED)
    parser.add_argument("--case", default="8x2048", help="BATCHxTOKENS")
    parser.add_argument("--remat", default="full", help="a preset of lora_jax.remat")
    parser.add_argument("--targets", nargs="+", help="target_modules; else all linear layers of the blocks")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=8, help="that compile")
    parser.add_argument("--out", type=Path, help="JSON file to write, anew after every model")
    args = parser.parse_args()
    results = []
    print("model | tokens/s | GiB | active (1e9) | TFLOP/s | share", flush=True)
    for result in _results(args):
        results.append(result)
        if "error" in result:
            print(f"{result['model']} | {result['error']}", flush=True)
        else:
            active = result["active_parameters"] / 1e9
            numbers = f"{result['tokens_per_s']:,.0f} | {result['gib']:.1f} | {active:.2f}"
            print(f"{result['model']} | {numbers} | {result['model_tflops']:.0f} | {result['share']:.0%}", flush=True)
        if args.out:
            text = {"tool": "tools/bench_families.py", "environment": environment(), "results": results}
            args.out.write_text(json.dumps(text, indent=1) + "\n")


if __name__ == "__main__":
    main()
