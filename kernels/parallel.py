"""What one device does for the others: the collectives of code that runs on every device of a mesh at once.

Inside `jax.shard_map` the layers run as they do on one device, on this device's share of rows, weights or heads; the
functions here are where they meet. An axis that the program is not mapped over has size 1, and then every function
returns what it was given: on one device no operation is added.

A device's loss is its share of a sum, and so is a gradient until `lora_jax.sharding` adds them up. Over "tensor" the
activations between layers are the same on all devices; `enter` and `leave` say where that begins and ends (Shoeybi et
al., "Megatron-LM", arXiv 1909.08053, section 3).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lora_jax.kernels.nf4.format import NESTED_BLOCK, NF4Layer, NF4Weight, beside_all_scales

__all__ = [
    "AXES",
    "ROW_AXES",
    "Shard",
    "enter",
    "first_token",
    "gathered",
    "index",
    "keep_all_but_gathered",
    "leave",
    "local_labels",
    "log_sum_exp",
    "own_rows",
    "place_key",
    "rows_from_experts",
    "rows_from_vocabulary",
    "rows_to_experts",
    "rows_to_vocabulary",
    "sharing",
    "shifted",
    "size",
    "take_rows",
    "to_heads",
    "to_sequence",
    "total",
]

AXES = ("data", "fsdp", "expert", "context", "tensor")  # of a mesh, neighbours last: they talk most
ROW_AXES = ("data", "fsdp", "expert")  # those that share out the rows of a batch
_TOKEN_AXES = (*ROW_AXES, "context")


def size(axis: str) -> int:
    """Devices along an axis of the mesh that the traced program is mapped over; 1 if it is not."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[axis] if axis in mesh.manual_axes else 1


def index(*axes: str) -> jax.Array | int:
    """This device's number along the axes, the first the slowest; 0 for none."""
    axes = sharing(*axes)
    return jax.lax.axis_index(axes) if axes else 0


def sharing(*axes: str) -> tuple[str, ...]:
    """Those of the axes that have more than one device."""
    return tuple(axis for axis in axes if size(axis) > 1)


# ---- weights ------------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shard:
    """This device's share of a stack of frozen weights."""

    value: jax.Array | NF4Weight  # [L, N, K] or [L, E, N, K], with N, K and E as far as they are here
    fsdp: bool = dataclasses.field(metadata={"static": True})  # rows are shared out over "fsdp", to be gathered
    split: int | None = dataclasses.field(metadata={"static": True})  # -2 or -1: the axis that "tensor" has divided

    @property
    def axes(self) -> tuple[str, ...]:
        """Mesh axes that share out the rows, the first the slowest."""
        return ("tensor",) * (self.split == -2) + ("fsdp",) * self.fsdp

    def entry(self, at: jax.Array) -> "Shard":
        """This device's share of entry `at` of the stack; without second-level scales, unless "tensor" divides it."""
        value = self.value
        if isinstance(value, NF4Weight) and self.split is None:
            value = NF4Weight(value.packed, value.absmax)
        take = functools.partial(jax.lax.dynamic_index_in_dim, index=at, keepdims=False, allow_negative_indices=False)
        return dataclasses.replace(self, value=jax.tree.map(take, value))

    def with_scales(self, whole: jax.Array | NF4Weight, at: jax.Array) -> jax.Array | NF4Weight | NF4Layer:
        """Entry `at` of the stack, of which `gathered` made `whole`, with second-level scales if it has any."""
        if not isinstance(self.value, NF4Weight) or not isinstance(whole, NF4Weight) or self.split is not None:
            return whole
        return beside_all_scales(whole, self.value, at) if self.value.double_quantized else whole


def gathered(shards: Sequence[Shard]) -> list[jax.Array | NF4Weight]:
    """The weights [..., N, K] of which these are shares, whole but for what "tensor" has divided.

    Their second-level scales are in the stack that they are an entry of; see `Shard.with_scales`.

    Their rows travel over "fsdp" in the bytes that they are stored in. The compiler makes one collective of all arrays
    of a type (see `_compiler_options` in step.py): each has its price, of about 80 us between four H100s, whatever it
    carries. To lay all bytes in one array, and cut the result, took 18 of a step's 279 ms.
    """
    values = [shard.value for shard in shards]
    places = [i for i, shard in enumerate(shards) if shard.fsdp]
    if size("fsdp") > 1 and places:
        parts = [part for i in places for part in _in_rows(values[i])]
        whole = [jax.lax.all_gather(x, "fsdp", axis=axis, tiled=True) for x, axis in parts]
        for i in places:
            values[i] = _with_rows(values[i], [whole.pop(0) for _ in _in_rows(values[i])])
    for i, shard in enumerate(shards):
        if shard.split is not None and isinstance(value := values[i], NF4Weight):
            values[i] = _with_plain_scales(value, shard.split)
    return values


def _in_rows(value: jax.Array | NF4Weight) -> list[tuple[jax.Array, int]]:
    """The arrays of a weight that are shared out by rows, and the axis of the rows."""
    if not isinstance(value, NF4Weight):
        return [(value, value.ndim - 2)]
    flat = value.absmax.ndim < value.packed.ndim  # 64 does not divide K
    return [(value.packed, value.packed.ndim - 2), (value.absmax, value.absmax.ndim - (1 if flat else 2))]


def _with_rows(value: jax.Array | NF4Weight, arrays: list[jax.Array]) -> jax.Array | NF4Weight:
    if not isinstance(value, NF4Weight):
        return arrays[0]
    return dataclasses.replace(value, packed=arrays[0], absmax=arrays[1])


def _with_plain_scales(w: NF4Weight, split: int) -> NF4Weight:
    """The same weight with float32 scales: its second-level scales count blocks of the whole weight, not of a part."""
    if w.nested_absmax is None or w.nested_offset is None or w.nested_code is None:
        return w
    rows, blocks = w.absmax.shape[-2:]
    first_row = index("tensor") * rows if split == -2 else 0
    first_block = index("tensor") * blocks if split == -1 else 0
    in_a_row = blocks * (size("tensor") if split == -1 else 1)
    place = (first_row + jnp.arange(rows))[:, None] * in_a_row + first_block + jnp.arange(blocks)

    def decode(codes, absmax, offset, code):
        # Rounded before the offset is added; see `dequantize_absmax`.
        return jax.lax.optimization_barrier(code[codes.astype(jnp.int32)] * absmax[place // NESTED_BLOCK]) + offset

    for _ in range(w.packed.ndim - 2):
        decode = jax.vmap(decode)
    return NF4Weight(w.packed, decode(w.absmax, w.nested_absmax, w.nested_offset, w.nested_code))


def keep_all_but_gathered(layer: Callable) -> Callable:
    """`jax.checkpoint` that keeps every value for backward but weights that were gathered, or copied from the host."""
    moved = ("all_gather", "device_put")
    again = (
        *moved,
        "slice",
        "dynamic_slice",
        "reshape",
        "squeeze",
        "broadcast_in_dim",
        "transpose",
        "bitcast_convert_type",
    )
    return jax.checkpoint(layer, policy=lambda primitive, *_, **__: primitive.name not in again, prevent_cse=False)


# ---- "tensor": heads and features are shared out, tokens are not ----------------------------------------------------


def enter(x: jax.Array) -> jax.Array:
    """Activations that all devices along "tensor" have, for layers that each has a part of: backward adds up."""
    return _identity_then_sum(x, sharing("tensor"))


def leave(x: jax.Array) -> jax.Array:
    """Adds up what the devices along "tensor" have computed; the result and its gradient are the same on all."""
    return _sum_then_identity(x, sharing("tensor"))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _plus(x, axes):
    return jax.lax.psum(x, axes)


_plus.defvjp(lambda x, axes: (_plus(x, axes), None), lambda axes, _, dy: (dy,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _same(x, axes):
    return x


_same.defvjp(lambda x, axes: (x, None), lambda axes, _, dy: (jax.lax.psum(dy, axes),))


def _sum_then_identity(x, axes):
    return _plus(x, axes) if axes else x


def _identity_then_sum(x, axes):
    return _same(x, axes) if axes else x


def total(tree):
    """Sums over all tokens, from those of this device's tokens; backward adds up as well."""
    axes = sharing(*_TOKEN_AXES)
    return jax.tree.map(lambda x: _same(_plus(x, axes), axes), tree) if axes else tree


def place_key(key: jax.Array) -> jax.Array:
    """A random key of this device's tokens."""
    axes = sharing(*_TOKEN_AXES)
    return jax.random.fold_in(key, jax.lax.axis_index(axes)) if axes else key


# ---- the vocabulary -------------------------------------------------------------------------------------------------


def take_rows(table: jax.Array, ids: jax.Array, axes: tuple[str, ...], dtype: DTypeLike) -> jax.Array:
    """Rows of a table [V, D] that is shared out over `axes` of ("tensor", "fsdp"), for ids int32 [B, T]: [B, T, D].

    Tokens travel, since they are fewer bytes than the table: every device looks up what it has of all ids.
    """
    if not axes:
        return jnp.take(table, ids, axis=0).astype(dtype)
    ids = rows_to_vocabulary(ids, axes)
    local = ids - index(*axes) * table.shape[0]
    inside = (local >= 0) & (local < table.shape[0])
    rows = jnp.take(table, jnp.where(inside, local, 0), axis=0).astype(dtype)
    rows = jnp.where(inside[..., None], rows, 0)
    if "fsdp" in axes:
        rows = jax.lax.psum_scatter(rows, "fsdp", scatter_dimension=0, tiled=True)
    return leave(rows)


def rows_to_vocabulary(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Rows [M, ...] of all devices that share out the vocabulary, [F M, ...]; over "tensor" they have the same."""
    return jax.lax.all_gather(x, "fsdp", axis=0, tiled=True) if "fsdp" in axes else x


def rows_from_vocabulary(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """[F M, ...], which every device has its addend of -> [M, ...], the sums for this device's rows."""
    if "fsdp" in axes:
        x = jax.lax.psum_scatter(x, "fsdp", scatter_dimension=0, tiled=True)
    return jax.lax.psum(x, "tensor") if "tensor" in axes else x


def own_rows(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """[F M, ...], the same on all devices -> [M, ...], this device's."""
    if "fsdp" not in axes:
        return x
    rows = x.shape[0] // size("fsdp")
    return jax.lax.dynamic_slice_in_dim(x, index("fsdp") * rows, rows)


def local_labels(labels: jax.Array, vocab: int, axes: tuple[str, ...]) -> jax.Array:
    """Labels as columns of this device's `vocab` columns; another device's become `vocab`, negative ones stay."""
    if not axes:
        return labels
    local = labels - index(*axes) * vocab
    return jnp.where(labels < 0, labels, jnp.where((local >= 0) & (local < vocab), local, vocab))


def log_sum_exp(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """log sum exp over the devices; has no gradient."""
    if not axes:
        return x
    top = jax.lax.pmax(x, axes)
    return top + jnp.log(jax.lax.psum(jnp.exp(x - top), axes))


# ---- "expert": the experts of a mixture are shared out ---------------------------------------------------------------


def rows_to_experts(x: jax.Array) -> jax.Array:
    """Tokens [M, ...] of all devices along "expert", [P M, ...]."""
    return jax.lax.all_gather(x, "expert", axis=0, tiled=True) if size("expert") > 1 else x


def rows_from_experts(x: jax.Array) -> jax.Array:
    """[P M, D], which every device has its addend of -> [M, D], the sums for this device's tokens."""
    return jax.lax.psum_scatter(x, "expert", scatter_dimension=0, tiled=True) if size("expert") > 1 else x


# ---- "context": the tokens of a row are shared out -------------------------------------------------------------------


def shifted(labels: jax.Array, fill: int) -> jax.Array:
    """labels[:, t + 1] at t, int [B, T], and `fill` at the end of a row, which is the last device's."""
    count = size("context")
    if count == 1:
        return jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=fill)
    # A device that nobody sends to gets zeros.
    following = jax.lax.ppermute(labels[:, :1], "context", [(i + 1, i) for i in range(count - 1)])
    following = jnp.where(index("context") == count - 1, fill, following)
    return jnp.concatenate([labels[:, 1:], following], axis=1)


def first_token(length: int) -> jax.Array | int:
    """Place in the row of the first of this device's `length` tokens."""
    return index("context") * length


def to_heads(x: jax.Array) -> jax.Array:
    """[B, T of this device, heads, H] -> [B, T, heads of this device, H] (Jacobs et al., arXiv 2309.14509)."""
    return jax.lax.all_to_all(x, "context", split_axis=2, concat_axis=1, tiled=True)


def to_sequence(x: jax.Array) -> jax.Array:
    """The inverse of `to_heads`."""
    return jax.lax.all_to_all(x, "context", split_axis=1, concat_axis=2, tiled=True)
