"""Speed and memory of whole training steps of real model shapes, with random NF4 weights.

    python -m lora_jax.tools.bench_step --cases 2x2048 4x2048 --remat full selective --out results.json
    python -m lora_jax.tools.bench_step --optim adamw_8bit --checkpoint /tmp/random-8b --peers unsloth peft

Every case runs in a process of its own, since a device's peak of memory is never reset. A case reports the median
time of a step over several runs of steps that follow each other without a wait, tokens/s (all tokens of the batch
count), the peak that JAX's allocator saw, and the compiler's own account of the step's memory, beside what
lora_jax.plan estimates of both. Speed depends on the card: compare numbers of one run only.
"""

import argparse
import datetime
import functools
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_jax.model import CausalLM

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, vocab_size=512, max_position_embeddings=4096),
    "llama3.2-1b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
                        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072),
    "llama3.1-8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072),
    "mistral-7b": dict(architectures=["MistralForCausalLM"], hidden_size=4096, intermediate_size=14336,
                       num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, vocab_size=32768,
                       max_position_embeddings=32768, sliding_window=None, rope_theta=1e6),
    "qwen3-8b": dict(architectures=["Qwen3ForCausalLM"], hidden_size=4096, intermediate_size=12288,
                     num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
                     vocab_size=151936, max_position_embeddings=40960, rms_norm_eps=1e-6, rope_theta=1e6),
    "llama2-7b": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
                      num_key_value_heads=32, vocab_size=32000, max_position_embeddings=4096),
    "llama2-13b": dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40,
                       num_key_value_heads=40, vocab_size=32000, max_position_embeddings=4096),
    "codellama-34b": dict(hidden_size=8192, intermediate_size=22016, num_hidden_layers=48, num_attention_heads=64,
                          num_key_value_heads=8, vocab_size=32000, max_position_embeddings=16384, rope_theta=1e6),
    "llama3.3-70b": dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
                         num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072),
    "qwen3-14b": dict(architectures=["Qwen3ForCausalLM"], hidden_size=5120, intermediate_size=17408,
                      num_hidden_layers=40, num_attention_heads=40, num_key_value_heads=8, head_dim=128,
                      vocab_size=151936, max_position_embeddings=40960, rms_norm_eps=1e-6, rope_theta=1e6),
}  # fmt: skip


def hf_config(shape: dict[str, Any]) -> dict[str, Any]:
    """config.json of one of SHAPES."""
    architecture = shape.get("architectures", ["LlamaForCausalLM"])
    model_type = architecture[0].removesuffix("ForCausalLM").lower()
    common = {"architectures": architecture, "model_type": model_type, "hidden_act": "silu", "rms_norm_eps": 1e-5}
    return {**common, "rope_theta": 500000.0, "tie_word_embeddings": False, **shape}


def token_ids(batch: int, length: int, vocabulary: int):
    """Random tokens, int64 [B, T], the same for every implementation."""
    import numpy as np

    return np.random.default_rng(1).integers(0, vocabulary, (batch, length))


def abstract_model(hf: dict[str, Any], *, nf4: bool = True, dtype: str = "bfloat16") -> "CausalLM":
    """A `CausalLM` of arrays' shapes alone; the linear layers of its blocks in double-quantised NF4 if `nf4`.

    Args:
      hf: config.json of the model.
      nf4: see above.
      dtype: of the other weights.
    """
    import jax.numpy as jnp

    from lora_jax.kernels.nf4.format import NF4Weight
    from lora_jax.model import CausalLM
    from lora_jax.models.decoder import Decoder
    from lora_jax.models.registry import config_from_hf

    module = Decoder(config_from_hf(hf), jnp.dtype(dtype))
    for _, _, part in module.block_linears() if nf4 else ():
        part.weight.set_value(NF4Weight.abstract(part.weight.get_value().shape, True))
    return CausalLM(module, hf_config=hf, source=Path("random"))


def random_weights(frozen: Any, config: Any) -> Any:
    """Values for the frozen leaves, to be called under jit: random bytes, of scales that keep activations finite.

    Args:
      frozen: the leaves.
      config: the model's `DecoderConfig`.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from lora_jax.kernels.nf4.format import nested_code

    def fill(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path)
        key = jax.random.key(sum(name.encode()))
        if leaf.dtype == np.uint8:  # layer after layer: drawing a byte takes several
            keys = jax.random.split(key, leaf.shape[0])
            return jax.lax.map(lambda one: jax.random.bits(one, leaf.shape[1:], np.uint8), keys)
        if "nested_code" in name:
            return jnp.broadcast_to(jnp.asarray(nested_code()), leaf.shape)
        if "nested" in name:  # scales of about 0.6 / sqrt(hidden size)
            size = 0.1 if "absmax" in name else 0.6
            return jnp.full(leaf.shape, size * config.hidden_size**-0.5, leaf.dtype)
        if "norm" in name:
            return jnp.full(leaf.shape, 0.0 if config.norm_plus_one else 1.0, leaf.dtype)
        # What random layers add is much the same for all tokens: beside small embeddings they would all go to the same
        # few experts, where those of trained models spread.
        scale = 1.0 if config.moe is not None and "embed_tokens" in name else 0.02
        return (scale * jax.random.normal(key, leaf.shape)).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, frozen)


def random_model(
    shape: dict[str, Any],
    *,
    nf4: bool = True,
    offload_embedding: bool = False,
    offload_head: bool = False,
    offload_layers: bool = False,
) -> "CausalLM":
    """`abstract_model` with `random_weights`; what is offloaded never lies on the device."""
    import jax
    import numpy as np
    from flax import nnx

    from lora_jax.models.streamed import make_room, pin

    model = abstract_model(hf_config(shape), nf4=nf4)
    if offload_layers:
        make_room(model.module)
        drawn = np.random.default_rng(0).integers(0, 256, 2**26 + 1, np.uint8)
        for _, _, part in model.module.block_linears():
            for buffer in part.weight.get_value().packed.buffers:
                if not buffer.any():
                    buffer[:] = np.resize(drawn, buffer.size)
        pin(model.module)
    for offload, part in (
        (model.offload_embedding if offload_embedding else None, model.module.embed_tokens),
        (model.offload_head if offload_head else None, model.module.lm_head),
    ):
        if offload is not None:
            if part is not None:
                like = part.weight.get_value()
                rows = 0.02 * np.random.default_rng(0).standard_normal((1024, like.shape[1]), np.float32)
                part.weight.set_value(np.resize(rows.astype(like.dtype), like.shape))
            offload()
    frozen = nnx.state(model.module)
    drawn = jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.ShapeDtypeStruct) else None, frozen)
    drawn = jax.jit(functools.partial(random_weights, drawn, model.config))()
    frozen = jax.tree.map(lambda new, old: old if new is None else new, drawn, frozen, is_leaf=lambda x: x is None)
    nnx.update(model.module, frozen)
    return model


def packed_chats(mean: int, batch: int, length: int, vocabulary: int) -> dict[str, Any]:
    """Rows [1, B, T] of random chats, packed as in training; their lengths are gamma-distributed with this mean."""
    import numpy as np

    from lora_jax.batches import Example, pack, pack_batch

    rng = np.random.default_rng(2)
    sizes = np.clip(rng.gamma(2, mean / 2, 8 * batch * length // mean), 16, length).astype(int)
    texts = [rng.integers(0, vocabulary, size).astype(np.int32) for size in sizes]
    # The rows that training would make of eight times as many chats, of which those are taken that are filled as most.
    rows = sorted(pack(texts, length), key=lambda row: sum(sizes[i] for i in row))
    middle = (len(rows) - batch) // 2
    packed = pack_batch([Example(ids, ids) for ids in texts], rows[middle : middle + batch], length, 0)
    return {name: array[None] for name, array in packed.items()}


def run_case(args: argparse.Namespace) -> dict[str, Any]:
    """One case in this process."""
    import jax
    import numpy as np

    import lora_jax
    from lora_jax import plan
    from lora_jax.cards import GIB, this_card
    from lora_jax.kernels.dispatch import using
    from lora_jax.optim import make_optimizer
    from lora_jax.remat import RematPlan
    from lora_jax.step import PlannedStep
    from lora_jax.tools.measure import trace_totals

    batch, length = map(int, args.case.split("x"))
    shape = SHAPES[args.model]
    if args.memory_limit:
        lora_jax.limit_memory(args.memory_limit)
    if args.compile_only:
        model = abstract_model(hf_config(shape), nf4=not args.bf16)
    elif args.checkpoint:
        model, _ = lora_jax.from_pretrained(args.checkpoint, progress=False)
    else:
        names = ("offload_embedding", "offload_head", "offload_layers")
        model = random_model(shape, nf4=not args.bf16, **{name: getattr(args, name) for name in names})
    lora_jax.get_peft_model(model, r=args.rank, verbose=False)
    if args.checkpoint and args.offload_embedding:
        model.offload_embedding()
    if args.offload_head and not model.head_on_host:
        if args.compile_only and (head := model.module.lm_head) is not None:  # a shape does not say where it lies
            head.weight.set_value(np.zeros(head.weight.get_value().shape, model.module.dtype))
        model.offload_head()
    optimizer, _ = make_optimizer(lora_jax.SFTConfig(output_dir="unused", learning_rate=2e-4, optim=args.optim), 1000)
    budget = args.memory_budget if args.remat_one == "auto" else None
    remat = json.loads(args.remat_one) if args.remat_one.startswith("[") else args.remat_one
    step: Any = lora_jax.make_train_step(
        model, optimizer, remat=remat, memory_budget=budget, scan_layers=args.scan_layers
    )
    _, lora, frozen = model.split()
    opt_state = optimizer.init(lora)
    ids = token_ids(batch, length, shape["vocab_size"]).astype(np.int32)[None]
    content = packed_chats(args.documents, batch, length, shape["vocab_size"]) if args.documents else None
    data = {"input_ids": ids, "labels": ids} if content is None else content
    if args.offload_embedding and args.compile_only:
        table = model.module.embed_tokens  # which takes no memory of the device, nor here
        shape_of_table = table.weight.get_value().shape
        table.weight.set_value(np.broadcast_to(np.zeros((), model.module.dtype), shape_of_table))
        table.offloaded = True
        embeds = jax.ShapeDtypeStruct((*ids.shape, model.config.hidden_size), model.module.dtype)
        data |= {"inputs_embeds": embeds}
    else:
        data = model.with_embeddings(data)
    real = batch * length if content is None else int((content["labels"] != -100).sum())
    arguments = (lora, opt_state, frozen, data)
    start = time.perf_counter()
    with using(**dict(pair.split("=") for pair in args.use)):
        planned = isinstance(step, PlannedStep)
        compiled = step.compile(*arguments) if planned else step.lower(*arguments).compile()
        compile_s = time.perf_counter() - start
        chosen = step.plans[ids.shape] if planned else RematPlan.of(remat)
        work, card = plan.of_step(model, *arguments), this_card()
        need = plan.memory(work, chosen, card)
    analysis = compiled.memory_analysis()
    if args.compile_only:
        held = {"argument_gib": analysis.argument_size_in_bytes / GIB, "temp_gib": analysis.temp_size_in_bytes / GIB}
        return {"model": args.model, "case": args.case, "plan": chosen.to_list(), "compile_s": compile_s, **held}
    times, losses, least = [], [], 0.0
    for steps in (*[1] * args.warmup, *[args.steps] * args.runs):
        start = time.perf_counter()
        for _ in range(steps):  # as in training, the host does not wait for a step before it sends the next
            lora, opt_state, metrics = compiled(lora, opt_state, frozen, model.with_embeddings(data))
        losses.append(float(metrics["loss"]))
        # Of A, which has no gradient while B is zero, as it is in the first step.
        least = min(float(np.min(norms)) for norms in jax.tree.leaves(metrics["leaf_grad_norms"]))
        times.append((time.perf_counter() - start) / steps)
    if not np.isfinite(losses).all() or (len(losses) > 1 and not losses[-1] < losses[0]):
        raise SystemExit(f"the loss of one repeated batch must fall; got {losses}")
    if args.trace:
        with jax.profiler.trace(args.trace):
            jax.block_until_ready(compiled(lora, opt_state, frozen, data))
        for name, calls, ms in trace_totals(Path(args.trace))[:60]:
            print(f"{ms:9.3f} ms  {calls:5} x  {name}", file=sys.stderr)
    seconds = float(np.median(times[args.warmup :]))
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "implementation": "lora-jax",
        "model": args.model,
        "case": args.case,
        "remat": args.remat_one,
        "plan": chosen.to_list(),
        "estimated_ms": 1e3 * sum(plan.seconds(work, chosen, card).values()),
        "estimated_gib": need.total / GIB,
        "host_gib": need.host / GIB,
        "least_layer_grad_norm": least,
        "base": "bf16" if args.bf16 else "nf4 (double-quantised)",
        "rank": args.rank,
        "optim": args.optim,
        "offload_embedding": args.offload_embedding,
        "offload_head": args.offload_head,
        "offload_layers": args.offload_layers,
        "memory_limit": args.memory_limit,
        "memory_budget": budget,
        "use": args.use,
        "scan_layers": args.scan_layers,
        "ms": 1e3 * seconds,
        "model_flop_utilization": plan.model_flops(work) / seconds / (1e12 * card.tflops),
        "first_step_s": compile_s + times[0],  # weights aside
        "ms_min_max": [1e3 * min(times[args.warmup :]), 1e3 * max(times[args.warmup :])],
        "tokens_per_s": batch * length / seconds,
        "documents": args.documents,
        "label_tokens_per_s": real / seconds,
        "peak_gib": stats.get("peak_bytes_in_use", 0) / GIB,
        "argument_gib": analysis.argument_size_in_bytes / GIB,
        "temp_gib": analysis.temp_size_in_bytes / GIB,
        "compile_s": compile_s,
        "losses": losses,
    }


def environment() -> dict[str, str]:
    """Date, device, versions and commit that a result belongs to."""
    import jax

    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "commit": git.stdout.strip() or "unknown",
    }


def main() -> None:
    """Runs every case in its own process and writes one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama3.1-8b", choices=SHAPES)
    parser.add_argument("--cases", nargs="+", default=["2x2048"], help="BATCHxTOKENS ...")
    parser.add_argument("--remat", nargs="+", default=["full"], help="presets of lora_jax.remat, or auto")
    parser.add_argument("--memory-budget", help="for auto, such as 12GB; else all that JAX may take")
    parser.add_argument("--documents", type=int, help="mean length of random chats, packed into the rows")
    parser.add_argument("--checkpoint", help="folder of the model instead of random weights; peers write it themselves")
    parser.add_argument("--peers", nargs="*", choices=["unsloth", "peft"], default=[], help="measured first")
    parser.add_argument("--peers-path", help="folder that stands first on the peers' PYTHONPATH")
    parser.add_argument("--bf16", action="store_true", help="16-bit base weights instead of NF4")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--optim", default="adamw_torch", help="as in SFTConfig")
    parser.add_argument("--offload-embedding", action="store_true", help="keep the embedding table on the host")
    parser.add_argument("--offload-head", action="store_true", help="keep the head on the host")
    parser.add_argument("--offload-layers", action="store_true", help="keep the layers' weights on the host")
    parser.add_argument("--memory-limit", help="behave as a card of so much, such as 12GB")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="in one run")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--use", nargs="+", default=[], metavar="OP=IMPLEMENTATION", help="such as flash_attention=triton"
    )
    parser.add_argument(
        "--scan-layers", action=argparse.BooleanOptionalAction, help="a loop over layers, or all written out"
    )
    parser.add_argument("--compile-only", action="store_true", help="fill the cache of compiled programs")
    parser.add_argument("--trace", help="folder for a profiler trace of one step")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--remat-one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print("RESULT " + json.dumps({**run_case(args), "environment": environment()}))
        return
    if args.peers and not args.checkpoint:
        parser.error("--peers wants --checkpoint FOLDER, the weights that all load; it is written if it is not there")
    results = []
    for case in args.cases:
        for peer in args.peers:
            results.append(_measured(args, case, peer, _peer_command(args, case, peer), args.peers_path))
        for remat in args.remat:
            command = [sys.executable, "-m", "lora_jax.tools.bench_step", *sys.argv[1:], "--case", case]
            results.append(_measured(args, case, remat, [*command, "--remat-one", remat]))
    if args.out:
        args.out.write_text(json.dumps({"tool": "tools/bench_step.py", "results": results}, indent=1) + "\n")


def _peer_command(args: argparse.Namespace, case: str, peer: str) -> list[str]:
    names = ("checkpoint", "model", "rank", "optim", "warmup", "steps", "runs")
    options = [word for name in names for word in (f"--{name}", str(getattr(args, name)))]
    return [sys.executable, "-m", "lora_jax.tools.bench_step_torch", peer, "--case", case, *options]


def _measured(
    args: argparse.Namespace, case: str, label: str, command: list[str], path: str | None = None
) -> dict[str, Any]:
    """Runs a case in a process of its own, `path` first on its PYTHONPATH, and prints how it went."""
    environment = dict(os.environ)
    if path:
        environment["PYTHONPATH"] = os.pathsep.join([path, *filter(None, [environment.get("PYTHONPATH")])])
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    line = next((row for row in done.stdout.splitlines() if row.startswith("RESULT ")), None)
    if args.trace:
        print(done.stderr, file=sys.stderr)
    if line is None:
        said = [row for row in done.stderr.splitlines() if row.strip()]
        error = next((row for row in reversed(said) if "Error" in row), (said or ["no output"])[-1])[:300]
        print(f"{args.model} {case} {label}: {error}", flush=True)
        return {"model": args.model, "case": case, "remat": label, "error": error}
    result = json.loads(line.removeprefix("RESULT "))
    if args.compile_only:
        print(f"{args.model} {case} {label}: {json.dumps(result)}", flush=True)
        return result
    print(
        f"{args.model} {case} {label}: {result['ms']:.1f} ms, {result['tokens_per_s']:,.0f} tokens/s, "
        f"peak {result['peak_gib']:.2f} GiB, first step {result['first_step_s']:.0f} s, first loss "
        f"{result['losses'][0]:.4f}",
        flush=True,
    )
    return result


if __name__ == "__main__":
    main()
