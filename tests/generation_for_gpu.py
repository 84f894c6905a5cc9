"""Compiles a step of generation for a GPU that is not there: `python generation_for_gpu.py`.

Needs what kernels/compile_for_gpu.py needs (see there). Prints one line of JSON for each implementation of the linear
layers: the operations of the program that copy packed weights or parts of them, and its bytes of temporary arrays.
"""

import json
import re
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import LoraConfig
from lora_jax.generation import _forward
from lora_jax.kernels import dispatch
from lora_jax.kernels.nf4 import matmul
from lora_jax.kernels.nf4.format import NF4Layer
from lora_jax.models import decoder
from tests.kernels.compile_for_gpu import target
from tests.plan_for_gpu import abstract_model

# Rows of 64 blocks, and enough layers that XLA keeps the loop.
CONFIG = dict(architectures=["LlamaForCausalLM"], hidden_size=256, intermediate_size=512, num_hidden_layers=6,
              num_attention_heads=4, num_key_value_heads=2, vocab_size=512, max_position_embeddings=512)  # fmt: skip
CASES = (("sm_90", "mosaic", 1), ("sm_89", "triton_in_loop", 1))  # card, implementation for few rows, rows
COPY = re.compile(r"= (u8\[[\d,]+\])\S* (dynamic-slice|slice|copy|gather|concatenate|dynamic-update-slice)\(")


def compiled_step(capability: str, implementation: str, rows: int) -> Any:
    """One new token for each of the rows."""
    table = ({"n": 512, "k": 256, "rows": [{"m": None, "forward": implementation, "dx": "triton"}]},)
    matmul.tuning = lambda op: table
    dispatch.compute_capability = lambda: ".".join(capability.removeprefix("sm_"))
    model = abstract_model(CONFIG, LoraConfig(r=4))
    graph, lora, frozen = model.split()
    cache = jax.eval_shape(lambda: model.module.new_cache(rows, 64))
    ids, start = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((rows, 1), (rows,)))
    sharding, mesh = target(capability)
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), (lora, frozen, ids, start, cache)
    )
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(_forward(graph), donate_argnums=4).trace(*arguments).lower().compile()


def report(name: str, *case) -> None:
    """Prints what became of a case."""
    compiled = compiled_step(*case)
    copies = sorted({f"{what} {shape}" for shape, what in COPY.findall(compiled.as_text())})
    stats = compiled.memory_analysis()
    print(json.dumps({"case": name, "copies": copies, "temporary": stats.temp_size_in_bytes}), flush=True)


def main() -> None:
    """Every case, and one whose layers are cut out of their stack."""
    dispatch.default_platform = lambda: "gpu"  # this process has no device, and compiles for one
    for case in CASES:
        report(f"{case[1]} {case[2]}", *case)
    entry = decoder._entry

    def cut(leaf, index, buffer):
        layer = entry(leaf, index, buffer)
        return layer.cut() if isinstance(layer, NF4Layer) else layer

    decoder._entry = cut
    report("cut", *CASES[0])


if __name__ == "__main__":
    main()
