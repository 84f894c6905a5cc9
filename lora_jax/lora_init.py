"""How an adapter starts: at zero, or as a part of the frozen weight.

    y = x W^T + s x A B                       "default", "gaussian": B = 0, so y is that of the frozen layer
    y = x W^T + s x (A B - A0 B0)             "pissa", "pissa_niter_N", "olora": A = A0 and B = B0 are a part of W
    y = x W^T + s x A B                       "loftq": s A B is what quantisation took from W, as far as the rank goes

PiSSA and OLoRA are published as an adapter on the residual weight W - s (A0 B0)^T. That is the same function of A and
B. Here the frozen weight stays as it is: nothing is quantised a second time, the adapter is an ordinary one of twice
the rank on the base that everyone has, and the start is exactly the base model.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.config import did_you_mean
from lora_jax.kernels.nf4 import NF4Weight
from lora_jax.models.decoder import full_names
from lora_jax.models.linear import Linear, decoded, value

__all__ = ["FROM_WEIGHT", "check_kind", "dense", "from_weights", "norms_of_rows", "starts_in_weight"]

_PISSA_FAST = re.compile(r"pissa_niter_([1-9][0-9]*)")
FROM_WEIGHT = ("pissa", "pissa_niter_N", "olora", "loftq")

# PEFT's others, and why they are not here.
_REFUSED = {
    "eva": "it needs activations of your data",
    "corda": "it needs activations of your data",
    "lora_ga": "it needs gradients of your data",
    "orthogonal": "it is not implemented",
    "mica": "it is not implemented",
}


def check_kind(kind: bool | str) -> str:
    """ "default", "gaussian", or one of FROM_WEIGHT. Raises ValueError for any other `init_lora_weights`."""
    if kind is True:
        return "default"
    name = kind.lower() if isinstance(kind, str) else kind
    if name in ("default", "gaussian", "pissa", "olora", "loftq") or _PISSA_FAST.fullmatch(str(name)):
        return str(name)
    known = f"True, 'gaussian', {', '.join(map(repr, FROM_WEIGHT))}"
    if kind is False:
        raise ValueError(f"init_lora_weights=False starts with a random B, which changes the model; there are {known}")
    why = f" ({_REFUSED[str(name)]})" if name in _REFUSED else ""
    hint = did_you_mean(kind, ("gaussian", *FROM_WEIGHT))
    raise ValueError(f"init_lora_weights={kind!r} is not supported{why}; there are {known}.{hint}")


def starts_in_weight(kind: str) -> bool:
    """Whether the start is a part of the weight, which is then subtracted: PiSSA and OLoRA."""
    return kind.startswith("pissa") or kind == "olora"


def from_weights(
    kind: str,
    name: str,
    stack,
    module: Linear,
    rank: int,
    scale: float,
    keys: jax.Array,
    original: Callable[[str], np.ndarray] | None,
) -> tuple[jax.Array, jax.Array] | None:
    """A [..., K, R] and B [..., R, N] of all layers of a stack that start from their weights, float32.

    Args:
      kind: one of FROM_WEIGHT.
      name, stack, module: an entry of `Decoder.named_modules`.
      rank, scale: of the adapter.
      keys: a random key a layer, for the randomised decomposition.
      original: reads a tensor of the checkpoint; for "loftq".

    Returns:
      The factors; None for "loftq" where the layer is not quantised, so that there is nothing to make up for.
    """
    stored = value(module.weight)
    if kind == "loftq" and not isinstance(stored, NF4Weight):
        return None
    pairs = []
    for number, (full, index) in enumerate(full_names(name, stack, module)):
        weight = dense(stored, index)
        if kind == "loftq":
            assert original is not None
            weight = jnp.asarray(original(f"{full}.weight"), jnp.float32) - weight
        if kind == "olora":
            pairs.append(_olora(weight, rank))
        elif (fast := _PISSA_FAST.fullmatch(kind)) is not None:
            key = keys if stack is None else keys[number]
            pairs.append(_low_rank(weight, rank, scale, key, int(fast[1])))
        else:
            pairs.append(_low_rank(weight, rank, scale))
    if stack is None:
        return pairs[0]
    a, b = zip(*pairs, strict=True)
    return jnp.stack(a), jnp.stack(b)


def dense(stored: jax.Array | NF4Weight, index: int | tuple[int, int] | None) -> jax.Array:
    """A weight, or one of a stack of them, float32 [N, K]."""
    return jnp.asarray(decoded(stored, index), jnp.float32)


def norms_of_rows(stored: jax.Array | NF4Weight, stack) -> jax.Array:
    """Norm of each row of a weight, or of every one of a stack: float32 [..., N]."""
    if stack is None:
        return _norms(dense(stored, None))
    return jnp.stack([_norms(dense(stored, index)) for index in range(stack.count)])


@jax.jit
def _norms(w):
    return jnp.sqrt(jnp.sum(w * w, axis=1))


@jax.jit(static_argnums=(1, 4))
def _low_rank(w, rank: int, scale: float, key: Any = None, iterations: int = 0):
    """A [K, R], B [R, N] with s (A B)^T the best approximation of W [N, K] of that rank, or nearly so.

    The singular values are shared evenly (Meng et al., arXiv 2404.02948, equations 2 and 3; for LoftQ, Li et al.,
    arXiv 2310.08659, equation 8). With iterations the decomposition is that of Halko et al., arXiv 0909.4061,
    algorithms 4.4 and 5.1: of W in a subspace that holds its first singular vectors nearly.
    """
    if iterations:
        wide = jax.random.normal(key, (w.shape[1], min(rank + 8, *w.shape)), w.dtype)
        q = jnp.linalg.qr(w @ wide)[0]
        for _ in range(iterations):
            q = jnp.linalg.qr(w @ jnp.linalg.qr(w.T @ q)[0])[0]
        u, s, vt = jnp.linalg.svd(q.T @ w, full_matrices=False)
        u = q @ u
    else:
        u, s, vt = jnp.linalg.svd(w, full_matrices=False)
    root = jnp.sqrt(s[:rank] / scale)
    return vt[:rank].T * root, (u[:, :rank] * root).T


@jax.jit(static_argnums=1)
def _olora(w, rank):
    """A [K, R], B [R, N]: the first columns of Q, and rows of R, of W = Q R (Büyükakyüz, arXiv 2406.01775).

    They are those of the first columns of W alone. PEFT scales their product when it takes it off the weight.
    """
    q = jnp.linalg.qr(w[:, :rank])[0]
    return (q.T @ w).T, q.T
