"""Base and adapter as one weight, tensor by tensor: W + scale (A B)^T in float32."""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.fused_experts import Part, assemble
from lora_jax.hf_checkpoint import Checkpoint
from lora_jax.kernels.nf4 import NF4Weight, dequantize
from lora_jax.models.decoder import Slot
from lora_jax.models.hf_config import further_layers
from lora_jax.models.linear import Embedding, Linear, layer_of, value

if TYPE_CHECKING:
    from lora_jax.model import CausalLM

__all__ = ["MERGE_BASES", "MergedTensor", "as_stored", "merged_tensors", "tensors_beside"]

MERGE_BASES = ("dequantized", "original")


@dataclasses.dataclass(frozen=True)
class MergedTensor:
    """One tensor of the merged model, computed when it is read."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]  # float32


def merged_tensors(model: "CausalLM", merge_base: str = "dequantized") -> dict[str, MergedTensor]:
    """Every tensor of the model by its Hugging Face name, with the adapter merged in; the model is not changed.

    Args:
      model: with or without an adapter.
      merge_base: "dequantized" adds the adapter to the weights it was trained on, so that the merged model is the
        trained one; "original" adds it to the 16-bit weights of the source, which differ from those by the error of
        quantisation.

    Raises:
      ValueError: unknown merge_base, or the source holds only quantised weights and "original" is asked for.
      FileNotFoundError: "original", and the source's files are gone.
    """
    if merge_base not in MERGE_BASES:
        raise ValueError(f"merge_base={merge_base!r} is unknown; known are {', '.join(MERGE_BASES)}")
    checkpoint = Checkpoint(model.source) if merge_base == "original" else None
    if checkpoint and (quantized := [n for n in model.module.slots() if checkpoint.quant_state(n)]):
        raise ValueError(
            f"merge_base='original': {model.source} holds {len(quantized)} weights in NF4 only; use 'dequantized', or "
            "load the 16-bit model and put the adapter on it"
        )

    return {
        name: MergedTensor(slot.shape, functools.partial(_read, name, slot, checkpoint))
        for name, slot in model.module.slots().items()
    }


def tensors_beside(model: "CausalLM") -> dict[str, MergedTensor]:
    """What the source holds beside the model's tensors, float32, unchanged.

    That is its vision tower, or layers that predict further tokens.

    Raises:
      FileNotFoundError: the source's files are gone.
      ValueError: it is quantised.
    """
    prefix, further = model.config.hf_prefix, further_layers(model.hf_config)
    if prefix == "model" and not further:
        return {}
    checkpoint = Checkpoint(model.source)
    if prefix == "model":
        names = [name for name in checkpoint.names if name.startswith(further)]
    else:
        names = [name for name in checkpoint.names if not name.startswith((f"{prefix}.", "lm_head."))]
    if quantized := [name for name in names if ".quant_state." in name]:
        raise ValueError(f"{model.source} holds {quantized[0]}: merge into the 16-bit model instead")
    return {
        name: MergedTensor(checkpoint.shape(name), lambda name=name: checkpoint.read(name).astype(np.float32))
        for name in names
    }


def as_stored(source: Checkpoint, tensors: dict[str, MergedTensor]) -> dict[str, MergedTensor]:
    """The tensors by their names in the source's files, those of single experts put together where the files do so."""
    stored, parts = {}, {}
    for name, tensor in tensors.items():
        if (part := source.part(name)) is None:
            stored[source.stored_name(name)] = tensor
        else:
            parts.setdefault(source.stored_name(name), {})[name] = part
    for whole, own in parts.items():
        stored[whole] = _together(own, source.whole_shape(next(iter(own))), tensors)
    return stored


def _together(parts: dict[str, Part], shape: tuple[int, ...], tensors: dict[str, MergedTensor]) -> MergedTensor:
    return MergedTensor(shape, lambda: assemble(parts, shape, lambda name: tensors[name].read()))


def _read(name: str, slot: Slot, checkpoint: Checkpoint | None) -> np.ndarray:
    owner = slot.owner
    trained = getattr(owner, "trained", None)
    if slot.attribute == "weight" and trained is not None:
        return np.asarray(value(trained), np.float32)
    if checkpoint is not None:
        weight = checkpoint.read(name).astype(np.float32)
    else:
        weight = _dense(value(slot.variable), slot.index)
    if slot.attribute != "weight" or not isinstance(owner, Linear | Embedding) or owner.lora_a is None:
        return weight
    a, b = _dense(value(owner.lora_a), slot.index), _dense(value(owner.lora_b), slot.index)
    product = np.float32(owner.scale) * (a @ b)
    return weight + (product.T if isinstance(owner, Linear) else product)


def _dense(stored: jax.Array | NF4Weight, index: int | tuple[int, int] | None) -> np.ndarray:
    """A weight, or one of a stack of them, as float32 on the host."""
    one = stored if index is None else layer_of(stored, index)
    return np.asarray(_dequantize(one, jnp.float32) if isinstance(one, NF4Weight) else one, np.float32)


_dequantize = jax.jit(dequantize, static_argnums=1)
