"""The leaves of every model: linear layers and embeddings that can carry an adapter, and the norm.

Every module takes `lead`, the leading axes of its arrays: (n,) for a stack of n equal layers, () for a single module.
A stacked module is never called; the layer loop calls it on the slices of one layer. Modules are made with
`jax.ShapeDtypeStruct` in place of arrays, so that building a model costs nothing; loading fills them in.

Variables of type `nnx.LoRAParam` are trained, variables of type `nnx.Param` are frozen. Attributes that may hold a
variable later start as `nnx.data(None)`: NNX takes a plain None for a constant that never becomes one.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from lora_jax.kernels.loss import Head
from lora_jax.kernels.nf4 import NF4Weight, dequantize
from lora_jax.kernels.nf4.matmul import lora_matmul
from lora_jax.kernels.nf4.shared_input import Projection, project
from lora_jax.kernels.parallel import Shard, take_rows
from lora_jax.kernels.rms_norm import branch_rms_norm, rms_norm
from lora_jax.models.streamed import Streamed, is_on_host, to_device

__all__ = ["Embedding", "Linear", "RMSNorm", "decoded", "entry", "factors", "layer_of", "set_layer", "value"]


def value(variable: nnx.Variable | None) -> Any:
    """The array (or NF4Weight) of a variable, or None."""
    return None if variable is None else variable.get_value()


def layer_of(stack, index):
    """Entry `index` of a stack of arrays or NF4Weights; compiled once a shape, unlike `stack[3]` and `stack[4]`.

    With two leading axes the index is a pair, as it is of `set_layer`.
    """
    if isinstance(stack, NF4Weight) and isinstance(codes := stack.packed, Streamed):
        layer, *expert = index if isinstance(index, tuple) else (index,)
        of_layer = codes.of(np.asarray(codes.buffers[layer]))
        packed = jnp.asarray(of_layer[tuple(expert)])
        return dataclasses.replace(_layer_of(dataclasses.replace(stack, packed=()), index), packed=packed)
    return _layer_of(stack, index)


@jax.jit
def _layer_of(stack, index):
    for i in index if isinstance(index, tuple) else (index,):
        stack = jax.tree.map(lambda leaf, i=i: entry(leaf, i), stack)
    return stack


def entry(stack: jax.Array, index: jax.Array) -> jax.Array:
    """Entry `index`, not negative, of a stack."""
    return jax.lax.dynamic_index_in_dim(stack, index, keepdims=False, allow_negative_indices=False)


def decoded(stored: jax.Array | NF4Weight, index: int | tuple[int, int] | None) -> jax.Array:
    """A weight [N, K], or entry `index` of a stack of them, on the device: as it is held, or float32 if that is NF4."""
    stored = to_device(stored)
    one = stored if index is None else layer_of(stored, index)
    return _dequantize(one, jnp.float32) if isinstance(one, NF4Weight) else one


_dequantize = jax.jit(dequantize, static_argnums=1)


def set_layer(stack, new, index):
    """The stack with entry `index` replaced, in place: the stack that was passed is gone."""
    if isinstance(stack, NF4Weight) and isinstance(codes := stack.packed, Streamed):
        layer, *expert = index if isinstance(index, tuple) else (index,)
        codes.of(codes.buffers[layer])[tuple(expert)] = np.asarray(new.packed)
        rest = _set_layer(dataclasses.replace(stack, packed=()), dataclasses.replace(new, packed=()), index)
        return dataclasses.replace(rest, packed=codes)
    return _set_layer(stack, new, index)


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(stack, new, index):
    return jax.tree.map(lambda leaf, n: leaf.at[index].set(n.astype(leaf.dtype)), stack, new)


def factors(module: "Linear | Embedding", index: int | tuple[int, int] | None = None) -> tuple[Any, Any]:
    """LoRA's A [K, R] and B [R, N] as the forward pass uses them, of all entries of a stack or of one; None without.

    Where the adapter started as a part of the weight (PiSSA, OLoRA), they are [A, A0] and [B, -B0] of twice the rank,
    A0 and B0 being that start: W + s (A B - A0 B0)^T is what those methods call the adapter on the residual weight.
    """

    def part(variable):
        whole = value(variable)
        return whole if index is None or whole is None else layer_of(whole, index)

    a, b = part(module.lora_a), part(module.lora_b)
    if (start := getattr(module, "start_a", None)) is None:
        return a, b
    return jnp.concatenate([a, part(start)], axis=-1), jnp.concatenate([b, -part(module.start_b)], axis=-2)


def _empty(shape: tuple[int, ...], dtype: DTypeLike) -> nnx.Param:
    return nnx.Param(jax.ShapeDtypeStruct(shape, dtype))


class Linear(nnx.Module):
    """y = x W^T + bias, W [N, K] as in a Hugging Face checkpoint, frozen; plus a LoRA product if there is one."""

    def __init__(self, k: int, n: int, *, lead: tuple[int, ...], dtype: DTypeLike, bias: bool = False):
        self.weight = _empty((*lead, n, k), dtype)
        self.bias: nnx.Param | None = _empty((*lead, n), dtype) if bias else None
        self.trained: nnx.LoRAParam | None = nnx.data(None)  # [N, K], a trained copy (only lm_head has one)
        self.lora_a: nnx.LoRAParam | None = nnx.data(None)  # [K, R]
        self.lora_b: nnx.LoRAParam | None = nnx.data(None)  # [R, N]
        self.start_a: nnx.Param | None = nnx.data(None)  # [K, R], frozen: see `factors`
        self.start_b: nnx.Param | None = nnx.data(None)  # [R, N]
        self.lora_magnitude: nnx.LoRAParam | None = nnx.data(None)  # [N], DoRA's norm of each row of the weight
        self.weight_norm: nnx.Param | None = nnx.data(None)  # [N], that of the frozen weight; with lora_magnitude only
        self.scale = 1.0
        self.dropout = 0.0

    @property
    def features(self) -> tuple[int, int]:
        """(N, K): output and input features."""
        n, k = value(self.weight).shape[-2:]
        return n, k

    def __call__(self, x: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        """x [..., K] -> [..., N]; without a key there is no dropout."""
        return project(x, self.projection(dropout_key))

    def projection(self, dropout_key: jax.Array | None = None) -> Projection:
        """This layer as an operand of functions of several layers; without a key there is no dropout."""
        rate = self.dropout if dropout_key is not None else 0.0
        a, b = factors(self)
        gain = None if self.lora_magnitude is None else value(self.lora_magnitude) / self._norms(a, b)
        return Projection(value(self.weight), a, b, self.scale, value(self.bias), rate, dropout_key, gain)

    def _norms(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """Norms of the rows of W + s (A B)^T, float32 [N], a constant for the gradient.

        DoRA (Liu et al., arXiv 2402.09353, equation 5, and section 4.3 for the gradient). By the binomial formula the
        weight itself is only needed for W A, a matmul of R rows, and is not decoded for the norms' sake.
        """
        a, b = jax.lax.stop_gradient((a, b))
        cross = lora_matmul(a.T, value(self.weight))  # (W A)^T
        squared = value(self.weight_norm) ** 2 + 2 * self.scale * jnp.sum(cross * b, axis=0)
        squared += self.scale**2 * jnp.sum(jnp.dot(jnp.dot(a.T, a), b) * b, axis=0)
        return jax.lax.stop_gradient(jnp.sqrt(jnp.maximum(squared, jnp.finfo(jnp.float32).tiny)))

    def head(self, softcap: float | None = None) -> Head:
        """This layer as the head of the loss, on the device if it is in the host's memory."""
        weight, axes = _share(self.weight)
        if not isinstance(weight, NF4Weight) and is_on_host(weight):
            weight = jax.device_put(weight, jax.memory.Space.Device)
        return Head(weight, value(self.trained), *factors(self), scale=self.scale, softcap=softcap, axes=axes)


class Embedding(nnx.Module):
    """Token embeddings [V, D], frozen; a trained copy or a LoRA product stands beside them if asked for.

    The frozen table may stay in the host's memory (`offload`): rows of it are then looked up there, by `rows`.
    """

    def __init__(self, vocab: int, dim: int, *, dtype: DTypeLike):
        self.weight = _empty((vocab, dim), dtype)
        self.offloaded = False
        self.trained: nnx.LoRAParam | None = nnx.data(None)  # [V, D]
        self.lora_a: nnx.LoRAParam | None = nnx.data(None)  # [V, R]
        self.lora_b: nnx.LoRAParam | None = nnx.data(None)  # [R, D]
        self.scale = 1.0
        self.dropout = 0.0

    @property
    def features(self) -> tuple[int, int]:
        """(D, V), so that LoRA's A is [V, R] and B is [R, D]."""
        v, d = value(self.weight).shape
        return d, v

    def offload(self) -> None:
        """Keeps the table in the host's memory from now on, as a numpy array."""
        self.weight.set_value(np.asarray(value(self.weight)))
        self.offloaded = True

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """ids int [...] -> [..., D], rows of an offloaded table. Raises IndexError for an id it does not have."""
        table = value(self.weight)
        # As integers: numpy copies rows of a type that it does not know element by element.
        return table.view(np.dtype(f"u{table.itemsize}")).take(ids, axis=0).view(table.dtype)

    def __call__(self, ids: jax.Array, dtype: DTypeLike, rows: jax.Array | None = None) -> jax.Array:
        """ids int32 [...] -> [..., D] in `dtype`; `rows`: of the frozen table, if they were looked up before."""
        weight, axes = _share(self.weight)
        if rows is not None and self.trained is None:
            x = rows.astype(dtype)
        else:
            x = take_rows(weight if self.trained is None else value(self.trained), ids, axes, dtype)
        if self.lora_a is not None:
            a, b = value(self.lora_a), value(self.lora_b)
            x += self.scale * jnp.dot(take_rows(a, ids, axes, dtype), b.astype(dtype))
        return x

    def head(self, softcap: float | None = None) -> Head:
        """The tied head of the loss; what is trained is trained in both places."""
        weight, axes = _share(self.weight)
        a, b = (None if v is None else value(v).T for v in (self.lora_b, self.lora_a))
        return Head(weight, value(self.trained), a, b, scale=self.scale, softcap=softcap, axes=axes)


def _share(weight: nnx.Param) -> tuple[Any, tuple[str, ...]]:
    """The table [V, D] that is here, and the mesh axes that share out its rows."""
    table = value(weight)
    return (table.value, table.axes) if isinstance(table, Shard) else (table, ())


class RMSNorm(nnx.Module):
    """Root-mean-square norm with a frozen weight [D], or 1 + weight for a factor."""

    def __init__(self, dim: int, eps: float, *, lead: tuple[int, ...], dtype: DTypeLike, plus_one: bool = False):
        self.weight = _empty((*lead, dim), dtype)
        self.eps, self.plus_one = eps, plus_one

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> the same shape and dtype."""
        return rms_norm(x, value(self.weight), self.eps, plus_one=self.plus_one)

    def branch(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(x, its norm), for the input of a branch beside the residual stream."""
        return branch_rms_norm(x, value(self.weight), self.eps, plus_one=self.plus_one)
