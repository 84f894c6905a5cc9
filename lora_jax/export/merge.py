"""Base and adapter as one weight, tensor by tensor: W + scale (A B)^T in float32, for DoRA with its rows scaled."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import jax
import numpy as np

from lora_jax.fused_experts import Part, assemble
from lora_jax.hf_checkpoint import Checkpoint
from lora_jax.kernels.nf4 import NF4Weight
from lora_jax.models.decoder import Slot
from lora_jax.models.hf_config import further_layers
from lora_jax.models.linear import Embedding, Linear, decoded, factors, value

if TYPE_CHECKING:
    from lora_jax.model import CausalLM

__all__ = ["MERGE_BASES", "MergedTensor", "as_stored", "merged_tensors", "tensors_beside"]

MERGE_BASES = ("dequantized", "original")


_BLOCK = 1 << 22  # elements computed at a time


@dataclasses.dataclass(frozen=True)
class MergedTensor:
    """One tensor of the merged model, computed when it is read."""

    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[np.ndarray]]  # float32, some rows (entries of the first axis) at a time, in order

    def read(self) -> np.ndarray:
        """The whole, float32."""
        out, start = np.empty(self.shape, np.float32), 0
        for block in self.blocks():
            out[start : start + len(block)] = block
            start += len(block)
        return out


def merged_tensors(
    model: "CausalLM", merge_base: str = "dequantized", *, with_adapter: bool = True
) -> dict[str, MergedTensor]:
    """Every tensor of the model by its Hugging Face name, with the adapter merged in; the model is not changed.

    Args:
      model: with or without an adapter.
      merge_base: "dequantized" adds the adapter to the weights it was trained on, so that the merged model is the
        trained one; "original" adds it to the 16-bit weights of the source, which differ from those by the error of
        quantisation.
      with_adapter: False for the base alone.

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
        name: MergedTensor(slot.shape, functools.partial(_blocks, name, slot, checkpoint, with_adapter))
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
        name: MergedTensor(checkpoint.shape(name), lambda name=name: _in_blocks(checkpoint.read(name)))
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
    def blocks() -> Iterator[np.ndarray]:
        for expert in range(shape[0]):
            own = {n: dataclasses.replace(part, expert=0) for n, part in parts.items() if part.expert == expert}
            yield assemble(own, (1, *shape[1:]), lambda name: tensors[name].read())

    return MergedTensor(shape, blocks)


def _blocks(name: str, slot: Slot, checkpoint: Checkpoint | None, with_adapter: bool) -> Iterator[np.ndarray]:
    owner = slot.owner
    trained = getattr(owner, "trained", None) if with_adapter else None
    if slot.attribute == "weight" and trained is not None:
        yield from _in_blocks(np.asarray(value(trained)))
        return
    weight = _stored(value(slot.variable), slot.index) if checkpoint is None else checkpoint.read(name)
    if not (with_adapter and slot.attribute == "weight" and isinstance(owner, Linear | Embedding)):
        yield from _in_blocks(weight)
        return
    if owner.lora_a is None:
        yield from _in_blocks(weight)
        return
    a, b = (np.asarray(factor, np.float32) for factor in factors(owner, slot.index))
    left, right = (b.T, a.T) if isinstance(owner, Linear) else (a, b)
    magnitude = getattr(owner, "lora_magnitude", None)
    lengths = None if magnitude is None else np.asarray(_stored(value(magnitude), slot.index), np.float32)
    start = 0
    for block in _in_blocks(weight):
        rows = slice(start, start + len(block))
        block = block + np.float32(owner.scale) * (left[rows] @ right)
        if lengths is not None:
            norms = np.sqrt(np.sum(block * block, axis=1, dtype=np.float64)).astype(np.float32)
            block = (lengths[rows] / norms)[:, None] * block
        yield block
        start = rows.stop


def _in_blocks(stored: np.ndarray) -> Iterator[np.ndarray]:
    rows = max(1, _BLOCK // max(1, stored[:1].size))
    for start in range(0, len(stored), rows):
        yield np.asarray(stored[start : start + rows], np.float32)


def _stored(stored: jax.Array | NF4Weight, index: int | tuple[int, int] | None) -> np.ndarray:
    """A weight, or one of a stack of them, on the host, as it is held or float32 if that is NF4."""
    return np.asarray(decoded(stored, index))
