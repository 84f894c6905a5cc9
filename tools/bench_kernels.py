"""Speed of the kernels at the shapes of an 8B model, beside XLA, cuBLAS, cuDNN, and torch's peers where importable.

    python -m lora_jax.tools.bench_kernels --out results.json
    python -m lora_jax.tools.bench_kernels --only attention loss

Every group of ops runs in a process of its own on random bfloat16 data. A time is the device time of one call: the sum
of its kernels, from CUPTI, the mean over runs, with working sets that rotate so that weights come from device memory.
Speed depends on the card: compare the numbers of one run only. bitsandbytes, Unsloth and torch are measured by
`bench_kernels_torch`, in processes of their own, if they can be imported.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
D, F, V = 4096, 14336, 128256  # Llama-3.1-8B


def main() -> None:
    """Runs every group in its own process, prints a table and writes one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--peers", nargs="*", choices=["torch", "unsloth"], default=["torch", "unsloth"])
    parser.add_argument("--peers-path", help="folder that stands first on the peers' PYTHONPATH")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one group")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--group", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.group:
        run_group(args.group)
        return
    jobs = [(group, [sys.executable, "-m", "lora_jax.tools.bench_kernels", "--group", group]) for group in args.only]
    jobs += [
        (peer, [sys.executable, "-m", "lora_jax.tools.bench_kernels_torch", peer, *args.only]) for peer in args.peers
    ]
    rows: list[Row] = []
    environment: dict[str, str] = {}
    for name, command in jobs:
        path = args.peers_path if name in args.peers else None
        for kind, data in _run(name, command, args.timeout, path):
            environment.update(data) if kind == "ENVIRONMENT" else rows.append(data)
    print(table(rows))
    if args.out:
        aside = args.out.with_suffix(".tmp")
        aside.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")
        aside.replace(args.out)


def _run(name: str, command: list[str], timeout: float, path: str | None) -> Iterator[tuple[str, Any]]:
    """(kind, data) of every line that a benchmark process prints as `KIND json`; other lines go to stderr."""
    environment = dict(os.environ)
    if path:
        environment["PYTHONPATH"] = os.pathsep.join([path, *filter(None, [environment.get("PYTHONPATH")])])
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=timeout, env=environment)
        output, end = done.stdout, f"ended with status {done.returncode}" if done.returncode else None
    except subprocess.TimeoutExpired as error:
        output, end = (error.stdout or b"").decode(), f"was stopped after {timeout:.0f} s"
    for line in output.splitlines():
        kind, _, data = line.partition(" ")
        if kind in ("ROW", "ENVIRONMENT"):
            yield kind, json.loads(data)
        else:
            print(line, file=sys.stderr)
    if end:
        print(f"{name}: {end}", file=sys.stderr)


def table(rows: list[Row]) -> str:
    """The rows as text, one op and case after another, the fastest implementation first."""
    lines = []
    order = list(dict.fromkeys((row["op"], row["case"]) for row in rows))
    for key in order:
        lines.append(f"{key[0]}, {key[1]}")
        for row in sorted((r for r in rows if (r["op"], r["case"]) == key), key=lambda r: r.get("us", float("inf"))):
            if "why" in row:
                lines.append(f"    {row['implementation']:34} {row['why']}")
                continue
            rate = (
                f"{row['tflops']:8.0f} TFLOP/s"
                if "tflops" in row
                else f"{row['gbps']:8.0f} GB/s"
                if "gbps" in row
                else ""
            )
            lines.append(f"    {row['implementation']:34}{row['us']:11.1f} us {rate}")
    return "\n".join(lines)


def run_group(name: str) -> None:
    """Runs one group in this process, printing one line a row."""
    from lora_jax.tools.bench_step import environment

    print("ENVIRONMENT " + json.dumps(environment()))
    GROUPS[name]()


def report(
    op: str, case: str, implementation: str, fn: Callable, sets: list[tuple], *, flops: float = 0, bytes: float = 0
) -> None:
    """Times fn and prints a row."""
    from lora_jax.tools.measure import kernel_times

    print_row(op, case, implementation, lambda: sum(us for _, us in kernel_times(fn, sets)), flops, bytes)


def print_row(
    op: str, case: str, implementation: str, measure: Callable[[], float], flops: float = 0, bytes: float = 0
) -> None:
    """Measures microseconds and prints a row; an implementation that refuses or fails is a row with the reason."""
    row: Row = {"op": op, "case": case, "implementation": implementation}
    try:
        us = measure()
    except Exception as error:  # a benchmark goes on; the reason is in its result
        print("ROW " + json.dumps({**row, "why": f"{type(error).__name__}: {str(error)[:200]}"}), flush=True)
        return
    row["us"] = us
    if flops:
        row["tflops"] = flops / us / 1e6
    if bytes:
        row["gbps"] = bytes / us / 1e3
    print("ROW " + json.dumps(row), flush=True)


def normal(seed: int, shape: tuple[int, ...], scale: float = 1.0, dtype: str = "bfloat16"):
    """Random normal numbers, [shape], in `dtype`."""
    import jax
    import jax.numpy as jnp

    return (scale * jax.random.normal(jax.random.key(seed), shape, jnp.float32)).astype(dtype)


def nf4_weight(seed: int, n: int, k: int):
    """A random double-quantised NF4 weight [N, K]."""
    import jax

    from lora_jax.kernels.nf4 import quantize

    return jax.jit(quantize)(normal(seed, (n, k), k**-0.5))


def dequantize() -> None:
    """NF4 to bfloat16."""
    import jax.numpy as jnp

    from lora_jax.kernels.nf4 import dequantize, triton

    for n, k in ((F, D), (D, F), (D, D), (1024, D)):
        sets = [(nf4_weight(seed, n, k),) for seed in range(max(4, 8 * F // n if n * k < D * F else 4))]
        size = n * k * (0.5 + 2 + 1 / 64)
        report("dequantise NF4", f"{n}x{k}", "xla", lambda w: dequantize(w, jnp.bfloat16), sets, bytes=size)
        report("dequantise NF4", f"{n}x{k}", "triton", triton.dequantize, sets, bytes=size)


def linear() -> None:
    """x W^T + scale (x A) B, and its gradient with respect to x, at training and decoding row counts."""
    import jax

    from lora_jax.kernels.nf4 import lora_matmul

    for n, k in ((F, D), (D, F)):
        weights = [nf4_weight(seed, n, k) for seed in range(8)]
        dense = [normal(seed, (n, k), k**-0.5) for seed in range(2)]
        a, b = normal(1, (k, 16), 0.02, "float32"), normal(2, (16, n), 0.02, "float32")
        for m in (1, 16, 64, 128, 512, 4096, 16384):
            names = ("triton", "triton_in_loop", "mosaic", None) if m < 4096 else ("xla", "triton", "mosaic", None)
            x, dy = normal(3, (m, k)), normal(4, (m, n))
            flops, case = 2 * m * n * k, f"M {m}, {k} -> {n}"
            cublas = lambda x, w: jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())))  # noqa: E731
            report("LoRA linear, forward", case, "cuBLAS, bf16, no LoRA", cublas, [(x, w) for w in dense], flops=flops)
            for name in names:
                f = functools.partial(lora_matmul, scale=1.0, implementation=name)
                label = name or "chosen"
                report("LoRA linear, forward", case, label, f, [(x, w, a, b) for w in weights], flops=flops)
            if m < 4096:
                continue
            for name in ("xla", "triton", None):

                def dx(x, dy, w, a, b, name=name):
                    return jax.vjp(lambda x: lora_matmul(x, w, a, b, 1.0, implementation=name), x)[1](dy)[0]

                sets = [(x, dy, w, a, b) for w in weights[:4]]
                report("LoRA linear, dx", case, name or "chosen", dx, sets, flops=flops)


def mlp() -> None:
    """gate, up, SwiGLU and down with adapters, and q, k, v, forward and backward."""
    import jax

    from lora_jax.kernels.nf4.mlp import lora_mlp
    from lora_jax.kernels.nf4.shared_input import Projection, lora_matmuls

    def layers(seed, shapes):
        weights = [nf4_weight(10 * seed + i, n, k) for i, (n, k) in enumerate(shapes)]
        adapters = [
            (normal(i, (k, 16), 0.02, "float32"), normal(i, (16, n), 0.02, "float32"))
            for i, (n, k) in enumerate(shapes)
        ]
        return weights, adapters

    def both(f):
        def run(x, dys, weights, factors):
            def of(x, factors):
                return f(x, [Projection(w, a, b) for w, (a, b) in zip(weights, factors, strict=True)])

            out, pull = jax.vjp(of, x, factors)
            out, dys = jax.lax.optimization_barrier((out, dys))  # backward begins when forward has ended
            return out, pull(dys)

        return run

    # "xla" is the composition of `lora_matmul`, which chooses for itself.
    for m in (4096, 16384):
        x, dy = normal(1, (m, D)), normal(2, (m, D), 0.01)
        sets = [(x, dy, *layers(seed, ((F, D), (F, D), (D, F)))) for seed in range(2)]
        qkv = ((D, D), (D // 4, D), (D // 4, D))
        dys = tuple(normal(3, (m, n), 0.01) for n, _ in qkv)
        narrow = [(x, dys, *layers(seed, qkv)) for seed in range(4)]
        for name in ("xla", "triton", None):
            f = both(lambda x, parts, name=name: lora_mlp(x, *parts, implementation=name))
            report("LoRA MLP, fwd + bwd", f"M {m}", name or "chosen", f, sets, flops=12 * m * D * F)
            f = both(lambda x, parts, name=name: lora_matmuls(x, parts, implementation=name))
            report("LoRA q, k, v, fwd + bwd", f"M {m}", name or "chosen", f, narrow, flops=6 * m * D * D)


def attention() -> None:
    """Causal attention of 32 query and 8 key heads: dense, packed, windowed, softcapped, and other head sizes."""
    import jax
    import jax.numpy as jnp

    from lora_jax.kernels.attention import flash_attention

    def cases() -> Iterator[tuple[str, int, int, int, dict[str, Any], float]]:
        yield "2 x 2048", 2, 2048, 128, {}, 0
        yield "1 x 8192", 1, 8192, 128, {}, 0
        yield "1 x 32768", 1, 32768, 128, {}, 0
        yield "8192 as 16 documents of 512", 1, 8192, 128, {"documents": 512}, 8192 * 512 / 2
        yield "1 x 32768, window 4096", 1, 32768, 128, {"window": 4096}, 32768 * 4096 - 4096 * 4096 / 2
        yield "1 x 8192, softcap 50", 1, 8192, 128, {"softcap": 50.0}, 0
        for dim in (64, 80, 96, 192, 256):
            yield f"1 x 8192, head_dim {dim}", 1, 8192, dim, {}, 0

    for case, batch, length, dim, features, pairs in cases():
        q, k, v = (normal(i, (batch, length, heads, dim)) for i, heads in enumerate((32, 8, 8)))
        dout = normal(3, q.shape)
        start = None
        if size := features.pop("documents", 0):
            start = jnp.broadcast_to(jnp.arange(length) // size * size, (batch, length)).astype(jnp.int32)
        flops = 4 * batch * 32 * (pairs or length * length / 2) * dim
        # XLA's own is measured where cuDNN refuses the case.
        for name in ("xla" if features.get("softcap") else "cudnn", "triton", "mosaic", None):

            def forward(q, k, v, name=name, start=start, features=features):
                return flash_attention(q, k, v, segment_start=start, implementation=name, **features)

            def both(q, k, v, dout, forward=forward):
                out, pull = jax.vjp(forward, q, k, v)
                return out, pull(dout)

            label = name or "chosen"
            report("attention, forward", case, label, forward, [(q, k, v)], flops=flops)
            report("attention, fwd + bwd", case, label, both, [(q, k, v, dout)], flops=3.5 * flops)


def loss() -> None:
    """lm_head and cross-entropy with a frozen head, forward and backward."""
    import jax

    from lora_jax.kernels.loss import Head, linear_cross_entropy

    w = normal(1, (V, D), 0.02)
    for m in (4096, 16384):
        x = normal(2, (m, D))
        labels = jax.random.randint(jax.random.key(3), (m,), 0, V)

        def both(x, w, labels):
            return jax.value_and_grad(lambda x: linear_cross_entropy(x, Head(w), labels)[0])(x)

        report("lm_head + cross-entropy, fwd + bwd", f"T {m}", "chosen", both, [(x, w, labels)], flops=4 * m * D * V)


def elementwise() -> None:
    """RMSNorm, RoPE and SwiGLU, forward and backward, alone (inside a step XLA fuses them with their neighbours)."""
    import jax
    import jax.numpy as jnp

    from lora_jax.kernels.rms_norm import rms_norm
    from lora_jax.kernels.rope import RopeConfig, apply_rope, rope_tables

    def both(f):
        def run(dy, *args):
            out, pull = jax.vjp(f, *args)
            out, dy = jax.lax.optimization_barrier((out, dy))  # backward begins when forward has ended
            return out, pull(dy)

        return run

    sets = [(normal(i, (8192, D)), normal(i + 9, (8192, D))) for i in range(4)]
    weight = normal(1, (D,))
    f = both(lambda x: rms_norm(x, weight, 1e-5))
    report("RMSNorm, fwd + bwd", "8192 x 4096", "chosen", f, sets, bytes=5 * 8192 * D * 2)
    cos, sin = rope_tables(RopeConfig(), 128, jnp.arange(4096)[None])
    heads = [(normal(i, (1, 4096, 32, 128)), normal(i + 9, (1, 4096, 32, 128))) for i in range(4)]
    rope = both(lambda x: apply_rope(x, cos, sin))
    report("RoPE, fwd + bwd", "4096 x 32 x 128", "chosen", rope, heads, bytes=4 * 4096 * D * 2)
    glu = [tuple(normal(i + 9 * j, (4096, F)) for j in range(3)) for i in range(2)]
    swiglu = both(lambda gate, up: jax.nn.silu(gate) * up)
    report("SwiGLU, fwd + bwd", "4096 x 14336", "chosen", swiglu, glu, bytes=8 * 4096 * F * 2)


def experts() -> None:
    """The experts' layer of Mixtral: 8 experts, 2 a token, 4096 tokens; routing, gather, 3 matmuls, SwiGLU, scatter."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from lora_jax.kernels import dispatch
    from lora_jax.kernels.nf4 import dequantize
    from lora_jax.models.decoder import Context
    from lora_jax.models.linear import value

    class Ragged(nnx.Module):
        """The experts by `jax.lax.ragged_dot` of dequantised weights."""

        def __init__(self, experts):
            self.experts = experts

        def __call__(self, rows, group_sizes, _):
            dot = functools.partial(jax.lax.ragged_dot, group_sizes=group_sizes, preferred_element_type=jnp.float32)

            def linear(x, one):
                w, a, b = (value(v) for v in (one.weight, one.lora_a, one.lora_b))
                dense = jnp.swapaxes(dequantize(w, x.dtype), 1, 2)
                thin = dot(x, a.astype(x.dtype)).astype(x.dtype)
                return (dot(x, dense) + dot(thin, (one.scale * b).astype(x.dtype))).astype(x.dtype)

            gate, up, down = (getattr(self.experts, name) for name in self.experts.names)
            return linear(jax.nn.silu(linear(rows, gate)) * linear(rows, up), down)

    tokens, layer = 4096, _mixtral_experts()
    x, dy, zero = normal(3, (1, tokens, D)), normal(4, (1, tokens, D)), jnp.int32(0)
    for name in ("ragged_dot", "xla", "triton", "mosaic", "chosen"):
        if name == "ragged_dot":
            graph, state = nnx.split(layer)
            whole = nnx.merge(graph, state)
            whole.experts = Ragged(whole.experts)
        else:
            whole = layer
        graph, state = nnx.split(whole)

        def forward(x, dy, state, graph=graph, name=name):
            with dispatch.using(**({"grouped_lora_matmul": name} if name in ("xla", "triton", "mosaic") else {})):
                return nnx.merge(graph, state)(x, Context(x, x, None, 0, None), zero)

        def both(x, dy, state, forward=forward):
            y, pull = jax.vjp(lambda x: forward(x, dy, state), x)
            return y, pull(dy)

        label, sets, flops = f"NF4 + {name}" if name == "ragged_dot" else name, [(x, dy, state)], 12 * tokens * D * F
        report("MoE layer, forward", "8 experts, 2 of 4096 tokens", label, forward, sets, flops=flops)
        report("MoE layer, forward + dx", "8 experts, 2 of 4096 tokens", label, both, sets, flops=2 * flops)


def _mixtral_experts() -> Any:
    """Router and experts of a Mixtral layer, NF4 but for the router, with adapters of rank 16 on all experts."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from lora_jax.models.linear import value
    from lora_jax.models.moe import MoE
    from lora_jax.models.registry import config_from_hf

    hf = {"architectures": ["MixtralForCausalLM"], "hidden_size": D, "intermediate_size": F, "vocab_size": 32000}
    hf |= {
        "num_hidden_layers": 1,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
    }
    hf |= {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "hidden_act": "silu", "tie_word_embeddings": False}
    config = config_from_hf(hf | {"num_local_experts": 8, "num_experts_per_tok": 2})
    layer: Any = MoE(config, config.moe, None, lead=(), dtype=jnp.bfloat16)  # pyright: ignore[reportArgumentType]
    layer.gate.weight.set_value(normal(1, (8, D), D**-0.5))
    for i, name in enumerate(layer.experts.names):
        one = getattr(layer.experts, name)
        _, n, k = value(one.weight).shape
        one.weight.set_value(jax.tree.map(lambda *w: jnp.stack(w), *(nf4_weight(8 * i + e, n, k) for e in range(8))))
        one.lora_a = nnx.LoRAParam(normal(30 + i, (8, k, 16), k**-0.5, "float32"))
        one.lora_b = nnx.LoRAParam(normal(40 + i, (8, 16, n), 0.02, "float32"))
    return layer


GROUPS: dict[str, Callable[[], None]] = {
    f.__name__: f for f in (dequantize, linear, mlp, attention, loss, elementwise, experts)
}


if __name__ == "__main__":
    main()
