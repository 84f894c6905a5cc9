"""Weights of layers that stay in the host's memory: a GPU copies a layer's when it needs them.

For models whose weights do not fit a device even in NF4. Only the codes are moved: 31 of 32 parts of a weight.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from lora_jax.kernels.nf4 import NF4Weight

if TYPE_CHECKING:
    from lora_jax.models.decoder import Decoder

__all__ = ["Streamed", "is_on_host", "make_room", "offload", "on_device", "pin", "to_device", "to_host"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Streamed:
    """The codes of a stack of NF4 weights in the host's memory: a buffer for each layer, with those of all its weights.

    So a GPU copies a layer at once, by its copy engine. To take entries out of stacked arrays would need its cores,
    which are then not there for the layer before: 8 layers' matmuls took 47.6 ms beside copies, 46.6 alone, and 53.0
    beside such entries (H100).
    """

    buffers: Sequence[Any]  # uint8 [bytes of a layer] each, pinned: the same ones in all weights of a stack
    offset: int = dataclasses.field(metadata={"static": True})  # of this weight, in each
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})  # [L, N, K/2] or [L, E, N, K/2]

    @property
    def dtype(self) -> np.dtype:
        """uint8."""
        return np.dtype(np.uint8)

    @property
    def ndim(self) -> int:
        """Of all layers' codes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Of all layers' codes."""
        return math.prod(self.shape)

    def of(self, buffer: Any) -> Any:
        """The codes of the layer whose buffer this is, [N, K/2] or [E, N, K/2]; a view of a numpy buffer."""
        return buffer[self.offset : self.offset + math.prod(self.shape[1:])].reshape(self.shape[1:])


def make_room(module: "Decoder") -> None:
    """Gives every NF4 weight of the layers room for its codes in numpy buffers, for `set_layer` to fill them.

    Raises:
      ValueError: there is none.
    """
    stacks: dict[int, list] = {}
    for _, stack, part in module.block_linears():
        if isinstance(part.weight.get_value(), NF4Weight):
            stacks.setdefault(stack.first, []).append(part.weight)
    if not stacks:
        raise ValueError("offload_layers is for weights in NF4, of which the layers have none: set load_in_4bit=True")
    for weights in stacks.values():
        shapes = [weight.get_value().packed.shape for weight in weights]
        sizes = [math.prod(shape[1:]) for shape in shapes]
        buffers = [np.zeros(sum(sizes), np.uint8) for _ in range(shapes[0][0])]
        offsets = itertools.accumulate(sizes[:-1], initial=0)
        for weight, offset, shape in zip(weights, offsets, shapes, strict=True):
            weight.set_value(dataclasses.replace(weight.get_value(), packed=Streamed(buffers, offset, shape)))


def pin(module: "Decoder") -> None:
    """Moves the buffers of `make_room` into memory that a GPU copies from without waiting for the host.

    Raises:
      ValueError: the backend has no such memory.
    """
    place = _pinned()
    moved: dict[int, tuple[jax.Array, ...]] = {}  # by stack
    for _, stack, part in module.block_linears():
        weight = part.weight.get_value()
        if isinstance(weight, NF4Weight) and isinstance(codes := weight.packed, Streamed):
            if stack.first not in moved:
                for layer, buffer in enumerate(
                    codes.buffers
                ):  # in the list that all have, so that it is not held twice
                    codes.buffers[layer] = jax.device_put(buffer, place)  # pyright: ignore[reportIndexIssue]
                moved[stack.first] = tuple(codes.buffers)
            codes = dataclasses.replace(codes, buffers=moved[stack.first])
            part.weight.set_value(dataclasses.replace(weight, packed=codes))


def _pinned() -> jax.sharding.Sharding:
    device = jax.local_devices()[0]
    if "pinned_host" not in {memory.kind for memory in device.addressable_memories()}:
        raise ValueError(f"JAX's backend {device.platform!r} offers no pinned host memory to keep weights in")
    return jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")


def to_host(x: jax.Array | np.ndarray) -> jax.Array:
    """An array in memory of the host that a GPU copies from without waiting for it.

    Raises:
      ValueError: the backend has no such memory.
    """
    return jax.device_put(x, _pinned())


def on_device(x: Any) -> bool:
    """Whether an array, or what stands for one, is in the device's memory and not in the host's."""
    if isinstance(x, np.ndarray):
        return False
    return getattr(getattr(x, "sharding", None), "memory_kind", None) != "pinned_host"


def to_device(x: Any) -> Any:
    """An array of `to_host` on the device; anything else as it is."""
    if not isinstance(x, jax.Array) or on_device(x):
        return x
    return jax.device_put(x, jax.sharding.SingleDeviceSharding(next(iter(x.devices()))))


def offload(module: "Decoder") -> None:
    """Moves the codes of all NF4 weights of the layers into the host's memory.

    Raises:
      ValueError: the backend has no pinned host memory.
    """
    held = {name: part.weight.get_value() for name, _, part in module.block_linears()}
    make_room(module)
    for name, _, part in module.block_linears():
        codes = getattr(part.weight.get_value(), "packed", None)
        if isinstance(codes, Streamed):
            for layer, buffer in enumerate(codes.buffers):
                codes.of(buffer)[...] = np.asarray(held[name].packed[layer])
    pin(module)


def is_on_host(array: Any) -> bool:
    """Whether an array, which may be traced, lies in the host's memory, from where a GPU has to fetch it."""
    return jax.typeof(array).memory_space == jax.memory.Space.Host
