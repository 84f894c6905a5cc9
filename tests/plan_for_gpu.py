"""Compiles whole training steps for a GPU that is not there and compares the planner: `python plan_for_gpu.py sm_90`.

Needs what compile_for_gpu.py needs (see there), whose cards these are. Prints one line of JSON for each case: bytes of
arguments and temporary arrays by the compiler's count and by the planner's estimate, and how often the forward kernel
of attention stands in the program.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_jax import CausalLM, LoraConfig, SFTConfig, make_train_step, plan
from lora_jax.cards import card_of
from lora_jax.kernels import dispatch
from lora_jax.kernels.nf4 import NF4Weight
from lora_jax.models.decoder import Decoder
from lora_jax.models.registry import config_from_hf
from lora_jax.optim import make_optimizer
from lora_jax.remat import NAMES, RematPlan
from lora_jax.tools.bench_step import SHAPES
from tests.kernels.compile_for_gpu import target

CARDS = {"sm_80": "A100 80GB", "sm_86": "RTX 3090", "sm_89": "RTX 4090", "sm_90": "H100"}
KEPT = dict.fromkeys(NAMES, "save")
MIXED = RematPlan(((6, {**KEPT, "input": "offload"}), (None, {"gate": "save", "thin": "save"})))
MIXTRAL = {**SHAPES["llama3.1-8b"], "vocab_size": 32000, "num_hidden_layers": 8, "num_local_experts": 8,
           "num_experts_per_tok": 2, "architectures": ["MixtralForCausalLM"]}  # fmt: skip
ONE, EIGHT = SHAPES["llama3.2-1b"], SHAPES["llama3.1-8b"]
# name: shape, rank, micro-batches, rows, tokens, plan
CASES: dict[str, tuple[dict[str, Any], int, int, int, int, str | RematPlan]] = {
    "1b-full": (ONE, 16, 1, 2, 2048, "full"),
    "1b-short": (ONE, 16, 1, 1, 1024, "full"),
    "1b-long": (ONE, 16, 1, 1, 32768, "full"),
    "1b-mixed": (ONE, 16, 1, 2, 2048, MIXED),
    "1b-r64": (ONE, 64, 1, 2, 2048, "full"),
    "8b-full": (EIGHT, 16, 1, 2, 2048, "full"),
    "8b-selective": (EIGHT, 16, 1, 2, 2048, "selective"),
    "8b-offload": (EIGHT, 16, 1, 2, 2048, "offload"),
    "8b-gate": (EIGHT, 16, 1, 2, 2048, RematPlan(((None, {**KEPT, "gate": "offload"}),))),
    "8b-8k-gate": (
        EIGHT,
        16,
        1,
        1,
        8192,
        RematPlan(((None, {"input": "offload", "gate": "offload", "thin": "save"}),)),
    ),
    "8b-none": (EIGHT, 16, 1, 2, 2048, "none"),
    "8b-mixed": (EIGHT, 16, 1, 2, 2048, RematPlan(((8, KEPT), (None, {"gate": "save", "thin": "save"})))),
    "8b-accumulate": (EIGHT, 16, 4, 2, 2048, "full"),
    "8b-r64": (EIGHT, 64, 1, 2, 2048, "full"),
    "8b-r128": (EIGHT, 128, 1, 2, 2048, "selective"),
    "8b-short": (EIGHT, 8, 1, 1, 512, "full"),
    "8b-8k": (EIGHT, 16, 1, 1, 8192, "full"),
    "8b-8k-selective": (EIGHT, 16, 1, 1, 8192, "selective"),
    "8b-16k": (EIGHT, 16, 1, 1, 16384, "full"),
    "8b-32k": (EIGHT, 16, 1, 1, 32768, "offload"),
    "13b-full": (SHAPES["llama2-13b"], 16, 1, 1, 2048, "full"),
    "13b-4k": (SHAPES["llama2-13b"], 16, 1, 2, 4096, "full"),
    "13b-selective": (SHAPES["llama2-13b"], 16, 1, 1, 2048, "selective"),
    "70b-short": (SHAPES["llama3.3-70b"], 16, 1, 1, 512, "full"),
    "70b-offload": (SHAPES["llama3.3-70b"], 16, 1, 1, 4096, "offload"),
    "mixtral": (MIXTRAL, 16, 1, 1, 2048, "full"),
    "mixtral-selective": (MIXTRAL, 16, 1, 2, 2048, "selective"),
}

CASES |= {name: (ONE, 16, 1, 2, 2048, plan) for name, plan in (("1b-dora", "full"), ("1b-dora-selective", "selective"))}
CASES |= {"1b-pissa": (ONE, 64, 1, 2, 2048, "full"), "8b-dora": (EIGHT, 16, 1, 2, 2048, "full")}
CASES |= {"8b-pissa": (EIGHT, 16, 1, 2, 2048, "selective")}
KINDS: dict[str, dict[str, Any]] = {"dora": {"use_dora": True}, "pissa": {"init_lora_weights": "pissa"}}


def config_of(name: str) -> LoraConfig:
    """The adapter of a case."""
    kind = next((more for kind, more in KINDS.items() if kind in name), {})
    return LoraConfig(r=CASES[name][1], **kind)


def abstract_model(hf: dict[str, Any], config: LoraConfig) -> CausalLM:
    """A QLoRA model with shapes in place of arrays."""
    module = Decoder(config_from_hf(hf), jnp.bfloat16)
    for _, _, part in module.block_linears():
        *lead, n, k = part.weight.get_value().shape
        part.weight.set_value(NF4Weight.abstract((*lead, n, k), True))
        a, b, norm = (jax.ShapeDtypeStruct((*lead, *s), jnp.float32) for s in ((k, config.r), (config.r, n), (n,)))
        part.lora_a, part.lora_b = nnx.LoRAParam(a), nnx.LoRAParam(b)
        if config.start == "pissa":
            part.start_a, part.start_b = nnx.Param(a), nnx.Param(b)
        if config.use_dora:
            part.lora_magnitude, part.weight_norm = nnx.LoRAParam(norm), nnx.Param(norm)
    model = CausalLM(module, hf_config=hf, source=Path())
    model.lora_config = config
    return model


def compare(capability: str, name: str) -> dict[str, Any]:
    """Compiles one case and estimates it."""
    shape, _, accumulation, rows, length, remat = CASES[name]
    hf = {"architectures": ["LlamaForCausalLM"], **shape}
    model, start = abstract_model(hf, config_of(name)), time.perf_counter()
    optimizer, _ = make_optimizer(SFTConfig(), 1000)
    step: Any = make_train_step(model, optimizer, remat=remat)
    _, lora, frozen = model.split()
    ids = jax.ShapeDtypeStruct((accumulation, rows, length), jnp.int32)
    arguments = (lora, jax.eval_shape(optimizer.init, lora), frozen, {"input_ids": ids, "labels": ids})
    sharding, mesh = target(capability)
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)
    with jax.sharding.use_abstract_mesh(mesh):
        compiled = step.trace(*arguments).lower().compile()
    stats, text = compiled.memory_analysis(), compiled.as_text()
    work = plan.of_config(hf, config_of(name), rows, length, accumulation=accumulation)
    need = plan.memory(work, RematPlan.of(remat), card_of(CARDS[capability]))
    calls = [line for line in text.splitlines() if "custom-call(" in line and "attention_forward" in line]
    return {
        "case": name,
        "capability": capability,
        "compiled": stats.argument_size_in_bytes + stats.temp_size_in_bytes,
        "estimate": need.total,
        "host": stats.host_temp_size_in_bytes,
        "host_estimate": need.host,
        "attention_forward": len(calls),
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    """Compares the cases named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("capability", choices=CARDS)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []])
    args = parser.parse_args()
    # This process has no device, and compiles for one.
    dispatch.default_platform = lambda: "gpu"
    dispatch.compute_capability = lambda: ".".join(args.capability.removeprefix("sm_"))
    for name in args.cases or CASES:
        print(json.dumps(compare(args.capability, name)), flush=True)


if __name__ == "__main__":
    main()
