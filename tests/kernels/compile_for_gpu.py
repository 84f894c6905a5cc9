"""Compiles the Pallas-Triton kernels for a GPU that is not there: `python compile_for_gpu.py sm_80`.

Needs the packages that `make cuda-compiler` puts into .cuda, and the environment that test_compile_for_gpus.py sets.
XLA compiles down to machine code, so this finds what does not lower, what ptxas refuses, and tiles whose shared memory
the card does not have. Prints one line of JSON for each kernel:
{"family": ..., "name": ..., "seconds": ..., "error": null or text}.
"""

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, SingleDeviceSharding

from lora_jax.kernels import dispatch
from lora_jax.kernels.nf4.format import NF4Layer, NF4Weight


@dataclasses.dataclass(frozen=True)
class Card:
    """What XLA has to know of a GPU. Sizes in bytes."""

    kind: str  # a device kind that Pallas knows
    sms: int
    shared: int  # of one block, if it asks for it
    shared_sm: int
    threads_sm: int
    l2: int
    memory: int
    bandwidth: int  # bytes/s
    ghz: float


CARDS = {  # the data-centre card of the generation, or the consumer card where the two differ in shared memory
    "sm_80": Card("NVIDIA A100", 108, 166912, 167936, 2048, 41943040, 85 * 10**9, 2040 * 10**9, 1.41),
    "sm_86": Card("NVIDIA A10", 82, 101376, 102400, 1536, 6291456, 25 * 10**9, 936 * 10**9, 1.70),  # RTX 3090
    "sm_89": Card("NVIDIA GeForce RTX 4090", 128, 101376, 102400, 1536, 75497472, 25 * 10**9, 1010 * 10**9, 2.52),
    "sm_90": Card("NVIDIA H100", 132, 232448, 233472, 2048, 52428800, 85 * 10**9, 3350 * 10**9, 1.98),
}

Program = tuple[str, Callable, tuple]  # name, function, its arguments as jax.ShapeDtypeStruct
bf16 = jnp.bfloat16


def shape(*dims: int, dtype: Any = bf16) -> jax.ShapeDtypeStruct:
    """An argument without data."""
    return jax.ShapeDtypeStruct(dims, dtype)


def _adapter_last(f):
    return lambda x, w, sizes, thin, b: f(x, w, sizes, thin=thin, b=b)


def _gated(*args, clamp):
    from lora_jax.kernels.grouped import triton_gated

    bias = args[6] if len(args) > 6 else None
    return triton_gated.backward(*args[:6], bias, activation="gelu_tanh", clamp=clamp)


def grouped(capability: str) -> Iterator[Program]:
    """Every tile of the grouped matmul's table, both directions."""
    from lora_jax.kernels.grouped import mosaic, rows, triton

    m, e, n, k, r = 300, 4, 384, 256, 16
    sizes = shape(e, dtype=jnp.int32)
    for tile in triton.tiles(int(capability[3:])):
        for contract, (c, d) in ((1, (k, n)), (0, (n, k))):
            f = functools.partial(triton.grouped_matmul, contract=contract, tile=tile)
            yield (
                f"grouped_matmul contract={contract} {tile}",
                _adapter_last(f),
                (shape(m, c), shape(e, n, k), sizes, shape(m, r), shape(e, r, d)),
            )
    f = functools.partial(triton.grouped_outer, tile=triton.OUTER)
    yield "grouped_outer", f, (shape(m, k), shape(m, r), sizes)
    if capability == "sm_90":
        for r in (16, 64):
            for n in (512, 384, 128):  # a tile each
                for contract, w in ((1, shape(e, n, k)), (0, shape(e, k, n))):
                    f = functools.partial(mosaic.grouped_matmul, contract=contract)
                    args = shape(m, k), w, sizes, shape(m, r), shape(e, r, n)
                    yield f"grouped_matmul mosaic contract={contract} R={r} N={n}", _adapter_last(f), args
    for double in (False, True):
        weight = NF4Weight.abstract((e, n, k), double)
        adapter = (shape(7, r), shape(e, r, n)) if double else ()
        yield f"grouped few_rows double={double}", triton.few_rows, (shape(7, k), weight, sizes, *adapter)
    yield "take_rows", rows.take_rows, (shape(m, k), shape(2 * m, dtype=jnp.int32))
    for clamp, bias in ((None, ()), ((1.702, 7.0), (shape(e, 2 * n),))):
        f = functools.partial(_gated, clamp=clamp)
        floats = shape(m, dtype=jnp.float32)
        args = shape(m, 2 * n), shape(m, n), floats, sizes, shape(m, 2 * r), shape(m, r), *bias
        yield f"grouped gated backward clamp={clamp}", f, args
    index = shape(dtype=jnp.int32)
    layer = NF4Layer(NF4Weight.abstract((3, e, n, k), True), index)  # pyright: ignore[reportArgumentType]
    yield "grouped few_rows of a layer", triton.few_rows, (shape(7, k), layer, sizes)
    yield "grouped dense of a layer", triton.dense, (layer,)
    # More than 2^32 bytes in the stack: offsets of 64 bits.
    layer = NF4Layer(NF4Weight.abstract((20, 8, 14336, 4096), True), index)  # pyright: ignore[reportArgumentType]
    yield "grouped dense of a layer in a large stack", triton.dense, (layer,)


def nf4_prologue(capability: str) -> Iterator[Program]:
    """The dequantising kernels and those for adapters beside them, as the layers call them, forward and backward."""
    from lora_jax.kernels.nf4 import lora_matmul
    from lora_jax.kernels.nf4.mlp import lora_mlp
    from lora_jax.kernels.nf4.shared_input import Projection, lora_matmuls

    def layer(x, w, a, b):
        y, pull = jax.vjp(lambda x, a, b: lora_matmul(x, w, a, b, 0.5, implementation="triton"), x, a, b)
        return pull(jnp.ones_like(y))

    def mlp(x, weights, factors, activation="silu"):
        def f(x, factors):
            projections = (Projection(w, a, b, 0.5) for w, (a, b) in zip(weights, factors, strict=True))
            return lora_mlp(x, *projections, activation=activation, implementation="triton")

        y, pull = jax.vjp(f, x, factors)
        return pull(jnp.ones_like(y))

    def shared(x, weights, factors):
        def f(x, factors):
            projections = [Projection(w, a, b, 0.5) for w, (a, b) in zip(weights, factors, strict=True)]
            return lora_matmuls(x, projections, implementation="triton")

        ys, pull = jax.vjp(f, x, factors)
        return pull(jax.tree.map(jnp.ones_like, ys))

    def adapter(n, k, rank):
        return shape(k, rank, dtype=jnp.float32), shape(rank, n, dtype=jnp.float32)

    for double in (False, True):
        for m in (1, 300):
            w = NF4Weight.abstract((384, 256), double)
            yield f"lora_matmul double={double} M={m}", layer, (shape(m, 256), w, *adapter(384, 256, 16))
    for rank in (16, 64):
        shapes = ((384, 256), (384, 256), (256, 384))
        weights = tuple(NF4Weight.abstract(nk, True) for nk in shapes)
        factors = tuple(adapter(*nk, rank) for nk in shapes)
        for m in (256, 300):
            yield f"lora_mlp M={m} R={rank}", mlp, (shape(m, 256), weights, factors)
        gelu = functools.partial(mlp, activation="gelu_tanh")
        yield f"lora_mlp gelu R={rank}", gelu, (shape(256, 256), weights, factors)
        shapes = ((512, 1024), (128, 1024), (128, 1024))
        weights = tuple(NF4Weight.abstract(nk, True) for nk in shapes)
        yield f"lora_matmuls R={rank}", shared, (shape(300, 1024), weights, tuple(adapter(*nk, rank) for nk in shapes))


def nf4_in_loop(capability: str) -> Iterator[Program]:
    """Every tile of the matmuls that dequantise in their main loop."""
    from lora_jax.kernels.nf4 import triton_matmul

    n, k, r = 14336, 4096, 16
    w = NF4Weight.abstract((n, k), True)
    for m in (1, 4, 16, 64, 100, 300):
        config = triton_matmul.choose(m, n, k)
        f = functools.partial(triton_matmul.matmul, config=config)
        yield f"nf4 matmul M={m} {config}", f, (shape(m, k), w, shape(k, r), shape(r, n))
        if isinstance(config, triton_matmul.ManyRows):
            f = functools.partial(triton_matmul.many_rows_transposed, config=config)
            yield f"nf4 matmul transposed M={m} {config}", f, (shape(m, n), w, shape(k, r), shape(r, n))
    layer = NF4Layer(NF4Weight.abstract((3, n, k), True), shape(dtype=jnp.int32))  # pyright: ignore[reportArgumentType]
    for m in (1, 16, 64):
        yield f"nf4 matmul of a layer M={m}", triton_matmul.matmul, (shape(m, k), layer, shape(k, r), shape(r, n))
    if capability == "sm_90":
        from lora_jax.kernels.nf4 import mosaic_few

        for m, weight in ((1, w), (16, layer), (17, w), (64, layer)):
            yield f"nf4 few rows mosaic M={m}", mosaic_few.matmul, (shape(m, k), weight, shape(k, r), shape(r, n))


def loss(capability: str) -> Iterator[Program]:
    """The gradient of the cross-entropy, written over the logits."""
    from lora_jax.kernels.loss import triton

    f32 = functools.partial(shape, dtype=jnp.float32)
    labels = shape(64, dtype=jnp.int32)
    yield "cross_entropy_gradient", triton.gradient, (shape(64, 1024, dtype=jnp.float16), f32(4, 64), f32(64), labels)


def attention(capability: str) -> Iterator[Program]:
    """Forward and backward of every line of the tables, with every feature and with none."""
    from lora_jax.kernels.attention import flash_attention

    def program(features):
        def f(q, k, v, sinks, start):
            arguments = dict(segment_start=start, window=100, softcap=50.0, sinks=sinks) if features else {}
            attend = functools.partial(flash_attention, implementation="triton", **arguments)
            out, pull = jax.vjp(attend, q, k, v)
            return pull(jnp.ones_like(out))

        return f

    for dim, value_dim in ((64, 64), (80, 80), (128, 128), (192, 128), (256, 256)):
        for features in (False, True):
            if features and dim in (80, 192):  # tiles of several parts: once is enough
                continue
            q, k, v = shape(1, 500, 4, dim), shape(1, 500, 2, dim), shape(1, 500, 2, value_dim)
            rest = (shape(4, dtype=jnp.float32), shape(1, 500, dtype=jnp.int32))
            yield f"attention {dim}/{value_dim} features={features}", program(features), (q, k, v, *rest)


def rms_norm(capability: str) -> Iterator[Program]:
    """Forward and backward, with a residual and without, one and several rows a program."""
    from lora_jax.kernels import rms_norm_triton as triton

    for dim, residual in ((4096, True), (300, False), (128, False)):
        x, vector, inverse = shape(64, dim), shape(dim), shape(64, dtype=jnp.float32)
        forward = functools.partial(triton.forward, eps=1e-5, plus_one=False)
        backward = functools.partial(triton.backward, plus_one=True)
        yield f"rms_norm forward {dim}", forward, (x, vector, x if residual else None)
        yield f"rms_norm backward {dim}", backward, (x, vector, inverse, x, x if residual else None)


FAMILIES: dict[str, Callable[[str], Iterator[Program]]] = {
    "attention": attention,
    "grouped": grouped,
    "loss": loss,
    "nf4_in_loop": nf4_in_loop,
    "nf4_prologue": nf4_prologue,
    "rms_norm": rms_norm,
}


def devices(capability: str, count: int = 1) -> list[Any]:
    """Cards of CARDS of one host."""
    card = CARDS[capability]
    major, minor = capability.removeprefix("sm_")
    config = f"""
      gpu_device_info {{
        threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
        shared_memory_per_block_optin: {card.shared} shared_memory_per_core: {card.shared_sm}
        threads_per_core_limit: {card.threads_sm} core_count: {card.sms} fpus_per_core: 128
        block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        memory_bandwidth: {card.bandwidth} l2_cache_size: {card.l2} clock_rate_ghz: {card.ghz}
        device_memory_size: {card.memory} registers_per_core_limit: 65536 registers_per_block_limit: 65536
        cuda_compute_capability {{ major: {major} minor: {minor} }}
      }}
      platform_name: "CUDA" device_description_str: "{card.kind}"
      dnn_version_info {{ major: 9 minor: 10 patch: 0 }}"""
    return topologies.get_topology_desc("", "cuda", target_config=config, topology=f"1x1x{count}").devices


def target(capability: str) -> tuple[SingleDeviceSharding, AbstractMesh]:
    """Sharding to put on the arguments, and the mesh to trace under, for a card of CARDS."""
    card, (device,) = CARDS[capability], devices(capability)
    abstract = AbstractDevice(device_kind=card.kind, num_cores=card.sms, platform="cuda")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=abstract)
    return SingleDeviceSharding(device), mesh


def main() -> None:
    """Compiles every program of every family and prints what became of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("capability", choices=CARDS)
    parser.add_argument("--family", choices=FAMILIES, action="append")
    parser.add_argument(
        "--quarter", type=int, choices=range(4), help="every fourth program of large families, from this one on"
    )
    args = parser.parse_args()
    dispatch.default_platform = lambda: "gpu"  # this process has no device, and compiles for one
    sharding, mesh = target(args.capability)
    for family in args.family or FAMILIES:
        programs = list(FAMILIES[family](args.capability))
        whole = args.quarter is None or len(programs) < 8
        for name, f, shapes in programs if whole else programs[args.quarter :: 4]:
            start, error = time.perf_counter(), None
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
            try:
                with jax.sharding.use_abstract_mesh(mesh):
                    jax.jit(f).trace(*shapes).lower().compile()
            except Exception as e:  # reported; the others are compiled all the same
                error = f"{type(e).__name__}: {e}"
            seconds = round(time.perf_counter() - start, 2)
            print(json.dumps({"family": family, "name": name, "seconds": seconds, "error": error}), flush=True)


if __name__ == "__main__":
    main()
