"""The merged model quantised again, as the `*-bnb-4bit` checkpoints on the hub: NF4 that bitsandbytes loads as it is.

The linear layers of all blocks are in NF4 with blocks of 64 and doubly quantised scales; embeddings, head, norms and
biases keep 16 bits, and so do experts and their routers, since transformers' integration of bitsandbytes replaces
linear layers only. A weight NAME [N, K] is stored as

    NAME                                    uint8 [N K / 2, 1], two codes a byte
    NAME.absmax                             uint8 [blocks], indices into nested_quant_map
    NAME.nested_absmax                      float32 [blocks / 256, rounded up]
    NAME.nested_quant_map, NAME.quant_map   float32 [256], [16]
    NAME.quant_state.bitsandbytes__nf4      JSON as uint8: types, block sizes, shape, nested_offset
"""

import functools
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.export.merge import MergedTensor
from lora_jax.export.safetensors_writer import Contents
from lora_jax.kernels.nf4 import NF4Weight, quantize
from lora_jax.kernels.nf4.format import BLOCK, CODE, NESTED_BLOCK
from lora_jax.models.decoder import full_names
from lora_jax.models.linear import Linear
from lora_jax.models.moe import ExpertLinear, Router

if TYPE_CHECKING:
    from lora_jax.model import CausalLM

__all__ = ["nf4_names", "quantization_config", "quantized"]

_QUANT_STATE = "quant_state.bitsandbytes__nf4"


def nf4_names(model: "CausalLM") -> set[str]:
    """Names of the weights that `quantized` quantises."""
    return {name for name, yes in _linears(model).items() if yes}


def _linears(model: "CausalLM") -> dict[str, bool]:
    """The weights of linear layers, by name -> whether it is quantised."""
    return {
        f"{full}.weight": stack is not None and not isinstance(module, Router | ExpertLinear)
        for name, stack, module in model.module.named_modules()
        if isinstance(module, Linear)
        for full, _ in full_names(name, stack, module)
    }


def quantization_config(model: "CausalLM", dtype: str) -> dict[str, Any]:
    """The entry of config.json.

    Args:
      model: the model that is written.
      dtype: name of the dtype to compute in.
    """
    kept = {name.removesuffix(".weight").rpartition(".")[2] for name, yes in _linears(model).items() if not yes}
    kept = {name for name in kept if not any(n.endswith(f".{name}.weight") for n in nf4_names(model))}
    beside = () if model.config.hf_prefix == "model" else ("vision_tower", "multi_modal_projector")
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": sorted({"lm_head", *kept, *beside}),
        "llm_int8_threshold": 6.0,
    }


def quantized(contents: Contents, tensors: Mapping[str, MergedTensor], weights: set[str]) -> Contents:
    """Those contents of a checkpoint with some weights in NF4.

    Args:
      contents: in 16 bits.
      tensors: the same in float32.
      weights: names of those to quantise.
    """
    shapes, dtypes, owners = {}, {}, {}
    dtype = str(next(iter(contents.dtypes.values())))
    for name, shape in contents.shapes.items():
        if name not in weights:
            shapes[name], dtypes[name] = shape, contents.dtypes[name]
            continue
        for ending, part in _parts(NF4Weight.abstract(shape, True), dtype, 0.0).items():
            shapes[name + ending], dtypes[name + ending] = part.shape, np.dtype(part.dtype)
            owners[name + ending] = name, ending

    @functools.lru_cache(maxsize=1)  # the parts of a weight are written one after the other
    def parts(name: str) -> dict[str, Any]:
        values = tensors[name].read()
        if not np.isfinite(values).all():
            raise ValueError(f"{name} is not finite after merging; the adapter has diverged, so nothing was written")
        weight = jax.device_get(_quantize(jnp.asarray(values)))
        return _parts(weight, dtype, float(weight.nested_offset))

    def blocks(name: str) -> Iterable[np.ndarray]:
        if name not in owners:
            return contents.blocks(name)
        weight, ending = owners[name]
        return [parts(weight)[ending]]

    return Contents(shapes, dtypes, blocks)


def _parts(weight: NF4Weight, dtype: str, offset: float) -> dict[str, Any]:
    """The tensors of a weight by the endings of their names; arrays, or what has shape and dtype alone."""

    def flat(array: Any, *last: int) -> Any:
        shape = (int(np.prod(array.shape)), *last)
        return array.reshape(shape) if isinstance(array, np.ndarray) else jax.ShapeDtypeStruct(shape, array.dtype)

    state = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": dtype,
        "shape": list(weight.shape),
        "nested_blocksize": NESTED_BLOCK,
        "nested_dtype": "float32",
        "nested_offset": offset,
    }
    text = json.dumps(state).ljust(_STATE_BYTES).encode()
    return {
        "": flat(weight.packed, 1),
        ".absmax": flat(weight.absmax),
        ".nested_absmax": flat(weight.nested_absmax),
        ".nested_quant_map": flat(weight.nested_code),
        ".quant_map": CODE,
        f".{_QUANT_STATE}": np.frombuffer(text, np.uint8),
    }


_STATE_BYTES = 256  # longer than any: the shapes of a file's tensors are written before its values are known
_quantize = jax.jit(functools.partial(quantize, double_quantize=True))
