"""lm_head and cross-entropy in chunks of rows, with the gradient taken in the forward pass.

Logits [tokens, V] would be the largest array of a training step (2 GiB for 4096 tokens of Llama 3 in float32, several
times over). The loss of a row depends on its own logits alone, so a loop over chunks of rows computes logits, loss and
gradient of one chunk, keeps the gradient with respect to the inputs, [tokens, D], and forgets the logits. Backward then
only scales what forward kept.

H100, V 128256, D 4096, T 4096, frozen head, milliseconds of kernels: Mosaic 11.6 (two matmuls 10.7, gradient of the
logits 0.7) with 0.26 GiB of temporary arrays, XLA 12.7 with 0.37; both a tenth more when repeated until the card
throttles. Logits rounded to bfloat16 made XLA no faster, and would be rounded where it matters.
"""

import dataclasses
import functools
import importlib
import math
from types import ModuleType

import jax
import jax.numpy as jnp

from lora_jax.kernels.dispatch import on_gpu, resolve
from lora_jax.kernels.nf4 import NF4Weight, lora_matmul
from lora_jax.kernels.parallel import (
    local_labels,
    log_sum_exp,
    own_rows,
    rows_from_vocabulary,
    rows_to_vocabulary,
    size,
)

__all__ = ["IGNORE_INDEX", "Head", "chunk_rows", "linear_cross_entropy"]

IGNORE_INDEX = -100  # the label that marks a token without loss, as in PyTorch
_CHUNK_BYTES = 2**28  # of the logits of one chunk


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Head:
    """The weights of lm_head. Gradients are taken for `trained`, `a` and `b`; the base weight is frozen."""

    weight: jax.Array | NF4Weight  # [V, D], frozen
    trained: jax.Array | None = None  # [V, D], a copy that is trained and used in place of `weight`
    a: jax.Array | None = None  # LoRA factor [D, R]
    b: jax.Array | None = None  # LoRA factor [R, V]
    scale: float = dataclasses.field(default=1.0, metadata={"static": True})  # factor of the LoRA product
    softcap: float | None = dataclasses.field(default=None, metadata={"static": True})  # c in c tanh(logits / c)
    # Mesh axes that share out V: the weights are this device's share, see lora_jax.kernels.parallel.
    axes: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})

    def logits(self, x: jax.Array) -> jax.Array:
        """Logits [..., V] in float32 of hidden states x [..., D]."""
        return _capped(self._product(x), self.softcap)

    def _product(self, x: jax.Array) -> jax.Array:
        """The logits before softcap."""
        if self.trained is not None:
            return _matmul(x, self.trained)
        if self.a is None and not isinstance(self.weight, NF4Weight):
            return _matmul(x, self.weight)
        return lora_matmul(x, self.weight, self.a, self.b, self.scale).astype(jnp.float32)


def _capped(logits: jax.Array, softcap: float | None) -> jax.Array:
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


@jax.custom_vjp
def _matmul(x, w):
    """x [..., D] times w^T for w [V, D], in float32."""
    dims = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, w.astype(x.dtype), dims, preferred_element_type=jnp.float32)


def _matmul_fwd(x, w):
    return _matmul(x, w), (x, w)


def _matmul_bwd(residuals, dlogits):
    """Rounds the gradient of the logits to the dtype of x; otherwise all of w would be widened to float32."""
    x, w = residuals
    dlogits = dlogits.astype(x.dtype)
    dx = jnp.dot(dlogits, w.astype(x.dtype), preferred_element_type=jnp.float32).astype(x.dtype)
    rows = tuple(range(x.ndim - 1))
    dw = jax.lax.dot_general(dlogits, x, ((rows, rows), ((), ())), preferred_element_type=jnp.float32)
    return dx, dw.astype(w.dtype)


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


def linear_cross_entropy(
    x: jax.Array, head: Head, labels: jax.Array, *, chunk: int | None = None, implementation: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Sum of the negative log-likelihoods of `labels` under softmax(head(x)), and how many labels count.

    Args:
      x: hidden states [M, D] after the final norm.
      head: lm_head; gradients flow to x and to the trained parts of the head.
      labels: int32 [M], the token that each row should predict, or IGNORE_INDEX for none.
      chunk: rows whose logits exist at once; None for as many as take about 256 MiB.
      implementation: "xla", "mosaic" (Hopper), or None to choose.

    Returns:
      (sum of the losses in nats, float32 []; number of labels that are not IGNORE_INDEX, int32 []).

    Raises:
      ValueError: shapes do not fit.
      NotImplementedError: the named implementation cannot do this call.
    """
    vocab, dim = head.weight.shape
    if x.ndim != 2 or x.shape[1] != dim or labels.shape != x.shape[:1]:
        raise ValueError(
            f"linear_cross_entropy: a head of [V, D] = [{vocab}, {dim}] wants x [M, {dim}] and labels [M]; "
            f"got x {x.shape}, labels {labels.shape}"
        )
    supported = {"xla": None, "mosaic": lambda: _why_not_mosaic(x, head)}
    implementation = resolve("linear_cross_entropy", implementation, supported, on_gpu("mosaic"))
    multiple, itemsize = (_module("mosaic").ROWS, 2) if implementation == "mosaic" else (1, 4)
    if chunk is None:
        chunk = chunk_rows(vocab, itemsize) // (size("fsdp") if "fsdp" in head.axes else 1)
    chunks = -(-len(labels) // chunk)
    rows = -(-len(labels) // (chunks * multiple)) * multiple  # chunks of one size, with little padding
    padding = -len(labels) % rows
    x = jnp.pad(x, ((0, padding), (0, 0))).reshape(-1, rows, dim)
    labels = jnp.pad(labels, (0, padding), constant_values=IGNORE_INDEX).reshape(-1, rows)
    trained = (head.trained, head.a, head.b)
    loss: jax.Array = _chunked(x, trained, head, labels, implementation)
    return loss, jnp.sum(labels != IGNORE_INDEX, dtype=jnp.int32)


def chunk_rows(vocab: int, itemsize: int) -> int:
    """Rows whose logits exist at once by default, for logits of `itemsize` bytes."""
    return max(256, 2 ** round(math.log2(_CHUNK_BYTES / (itemsize * vocab))))


def _module(name: str) -> ModuleType:
    """A file of this folder, imported late: Pallas takes a second to import and is not needed everywhere."""
    return importlib.import_module(f"lora_jax.kernels.loss.{name}")


def _why_not_mosaic(x, head: Head) -> str | None:
    if head.a is not None or isinstance(head.weight, NF4Weight):
        return "a LoRA adapter on the head and an NF4 head are not supported"
    return _module("mosaic").why_not(x, head.weight)


def _chunk_loss(logits, labels, axes):
    """Loss of one chunk and the log-sum-exp of its rows: logits [C, V], labels [C]."""
    counted = labels != IGNORE_INDEX
    lse = log_sum_exp(_log_sum_exp(logits), axes)
    target = jnp.take_along_axis(logits, jnp.where(counted, labels, 0)[:, None], axis=1)[:, 0]
    return _sum(lse, target, labels, logits.shape[1], axes), lse


def _sum(lse, target, labels, vocab, axes):
    """Sum of the losses of this device's rows; `target` is the label's logit where this device has its column."""
    if axes:
        target = jax.lax.psum(jnp.where(labels < vocab, target, 0.0), axes)
    return jnp.sum(own_rows(jnp.where(labels != IGNORE_INDEX, lse - target, 0.0), axes))


def _log_sum_exp(logits):
    """jax.nn.logsumexp over the last axis of [C, V], reading the logits once: maximum and sum in one reduction.

    In two steps, because XLA adds up one by one on a CPU: after 49,152 terms the loss was 1e-4 too low.
    """

    def combine(one, other):
        (max_one, sum_one), (max_other, sum_other) = one, other
        top = jnp.maximum(max_one, max_other)
        return top, sum_one * jnp.exp(max_one - top) + sum_other * jnp.exp(max_other - top)

    start = (jnp.float32(-1e30), jnp.float32(0))  # finite, for -inf less -inf is NaN
    rows, vocab = logits.shape
    width = max(d for d in range(1, min(vocab, 512) + 1) if vocab % d == 0)
    parts = logits.reshape(rows, vocab // width, width)
    parts = jax.lax.reduce((parts, jnp.ones_like(parts)), start, combine, (2,))
    top, total = jax.lax.reduce(parts, start, combine, (1,))
    return top + jnp.log(total)


def _chunk_loss_and_gradient(x, trained, head, labels, implementation):
    """(loss, gradients of x and of the trained parts) of one chunk.

    The derivative of the loss is written out, because it can then be rounded where it is computed: one pass over the
    logits [C, V] for the log-sum-exp, one that reads them and writes softmax less one-hot in the dtype of x.
    """

    if implementation == "mosaic":
        return _mosaic_loss_and_gradient(x, trained, head, labels)
    x, labels = _to_vocabulary(x, labels, head)

    def product(x, trained):
        return dataclasses.replace(head, trained=trained[0], a=trained[1], b=trained[2])._product(x)

    raw, pull = jax.vjp(product, x, trained)
    logits = _capped(raw, head.softcap)
    loss, lse = _chunk_loss(logits, labels, head.axes)
    # A label that does not count equals no column.
    one_hot = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) == labels[:, None]
    dlogits = jnp.where((labels != IGNORE_INDEX)[:, None], jnp.exp(logits - lse[:, None]), 0.0) - one_hot
    if head.softcap is not None:
        dlogits *= 1 - (logits / head.softcap) ** 2
    dx, dtrained = pull(dlogits)
    return loss, (rows_from_vocabulary(dx, head.axes), dtrained)


def _to_vocabulary(x, labels, head):
    """x and labels of all rows that this device has columns of the logits of, and the labels as such columns."""
    labels = local_labels(rows_to_vocabulary(labels, head.axes), head.weight.shape[0], head.axes)
    return rows_to_vocabulary(x, head.axes), labels


def _mosaic_loss(x, w, labels, softcap, axes):
    """Loss of one chunk, log-sum-exp of its rows, and the logits as mosaic.py leaves them."""
    below, maximum, total = _module("mosaic").logits_and_statistics(x, w, softcap)
    top = jnp.max(maximum, axis=0)
    lse = log_sum_exp(top + jnp.log(jnp.sum(total * jnp.exp(maximum - top), axis=0)), axes)
    chosen = w[jnp.where(labels != IGNORE_INDEX, labels, 0)]
    target = _capped(jnp.sum(x.astype(jnp.float32) * chosen.astype(jnp.float32), axis=1), softcap)
    return _sum(lse, target, labels, w.shape[0], axes), lse, below, maximum


def _mosaic_loss_and_gradient(x, trained, head, labels):
    w = head.weight if trained[0] is None else trained[0]
    x, labels = _to_vocabulary(x, labels, head)
    loss, lse, below, maximum = _mosaic_loss(x, w.astype(x.dtype), labels, head.softcap, head.axes)
    dlogits = _module("triton").gradient(below, maximum, lse, labels, head.softcap)
    dx, dw = _matmul_bwd((x, w), dlogits)
    return loss, (rows_from_vocabulary(dx, head.axes), (None if trained[0] is None else dw, None, None))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _chunked(x, trained, head, labels, implementation):
    head = dataclasses.replace(head, trained=trained[0], a=trained[1], b=trained[2])

    def body(total, chunk):
        rows, columns = _to_vocabulary(chunk[0], chunk[1], head)
        if implementation == "mosaic":
            w = head.weight if head.trained is None else head.trained
            return total + _mosaic_loss(rows, w.astype(x.dtype), columns, head.softcap, head.axes)[0], None
        return total + _chunk_loss(head.logits(rows), columns, head.axes)[0], None

    return jax.lax.scan(body, jnp.float32(0), (x, labels))[0]


def _chunked_fwd(x, trained, head, labels, implementation):
    def body(carry, chunk):
        total, grads = carry
        value, (dx, dtrained) = _chunk_loss_and_gradient(chunk[0], trained, head, chunk[1], implementation)
        grads = jax.tree.map(lambda total, new: total + new.astype(total.dtype), grads, dtrained)
        return (total + value, grads), dx

    # Sums over chunks are kept in float32 whatever the dtype of the parameters.
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), trained)
    (total, grads), dx = jax.lax.scan(body, (jnp.float32(0), zeros), (x, labels))
    return total, (dx, jax.tree.map(lambda g, p: g.astype(p.dtype), grads, trained))


def _chunked_bwd(implementation, residuals, cotangent):
    del implementation
    dx, dtrained = jax.tree.map(lambda g: (cotangent * g).astype(g.dtype), residuals)
    return dx, dtrained, None, None


_chunked.defvjp(_chunked_fwd, _chunked_bwd)
