"""Mixtures of experts: a router sends every token to a few of many MLPs, whose results it weighs.

Token-expert pairs are sorted by expert and multiplied by grouped matmuls: no token is dropped, and all shapes are
static. Fedus et al. (arXiv 2101.03961) has the idea, Gale et al. (arXiv 2211.15841) that of not dropping.

Routers are frozen unless they are asked for, and the loss that keeps experts evenly loaded in pretraining is not added.
"""

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from lora_jax.kernels.grouped import grouped_lora_matmul
from lora_jax.kernels.nf4.mlp import ACTIVATIONS
from lora_jax.models.linear import Linear, value

if TYPE_CHECKING:
    from lora_jax.models.decoder import Context, DecoderConfig

__all__ = ["ExpertLinear", "Experts", "MoE", "MoEConfig", "Router"]


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """The mixture of experts that takes the place of some layers' MLP."""

    num_experts: int
    top_k: int  # experts that a token goes to
    intermediate_size: int  # of an expert
    layers: tuple[int, ...]  # numbers of the layers that have one; the others have an MLP
    normalize: bool  # the weights of a token's experts are divided by their sum
    shared_size: int | None = None  # intermediate size of an MLP that every token goes through as well; None for none
    shared: str = "shared_expert"  # Hugging Face's name of that MLP
    shared_gate: bool = False  # that MLP's result is multiplied by a sigmoid of the token
    block: str = "mlp"  # Hugging Face's name of it in a layer
    router: str = "gate"  # and of its router
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")  # and of the linears of an expert
    bias: bool = False  # of router and experts
    sigmoid: bool = False  # scores are sigmoids, and a bias is added for the choice alone; else they are a softmax
    groups: tuple[int, int] | None = None  # number of groups of experts, and of the best ones that a token chooses from
    scale: float = 1.0  # factor of the weights
    clamp: tuple[float, float] | None = None  # (alpha, limit) of gpt-oss's `clamped_swiglu` in place of the activation


class Router(Linear):
    """The linear layer that scores the experts of a token. It stays in 16 bits, and has an adapter only by its name."""

    e_score_correction_bias: nnx.Param | None = None  # [N], added to scores for the choice of experts

    def __call__(self, x: jax.Array) -> jax.Array:  # pyright: ignore[reportIncompatibleMethodOverride]
        """x [M, D] -> logits [M, N] in float32."""
        logits = _wide(x, value(self.weight).astype(x.dtype).T)
        if self.lora_a is not None:
            a, b = (value(v).astype(x.dtype) for v in (self.lora_a, self.lora_b))
            logits += self.scale * _wide(_wide(x, a).astype(x.dtype), b)
        return logits if self.bias is None else logits + value(self.bias).astype(jnp.float32)


class ExpertLinear(Linear):
    """One linear layer for each expert: W [E, N, K], LoRA's A [E, K, R] and B [E, R, N]."""

    def __init__(self, experts: int, k: int, n: int, *, lead: tuple[int, ...], dtype: DTypeLike, bias: bool = False):
        super().__init__(k, n, lead=(*lead, experts), dtype=dtype, bias=bias)
        self.experts = experts

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, rows: jax.Array, group_sizes: jax.Array
    ) -> jax.Array:
        """rows [M, K], sorted by expert, group_sizes[e] of them for expert e -> [M, N]."""
        w, a, b, bias = (value(v) for v in (self.weight, self.lora_a, self.lora_b, self.bias))
        y = grouped_lora_matmul(rows, w, group_sizes, a, b, self.scale)
        if bias is None:
            return y
        return y + jnp.repeat(bias.astype(y.dtype), group_sizes, axis=0, total_repeat_length=y.shape[0])


class Experts(nnx.Module):
    """The MLPs, down(activation(gate(x)) * up(x))."""

    def __init__(self, config: "DecoderConfig", moe: MoEConfig, *, lead: tuple[int, ...], dtype: DTypeLike):
        d, f = config.hidden_size, moe.intermediate_size
        self.names = moe.projections
        for name, (k, n) in zip(self.names, ((d, f), (d, f), (f, d)), strict=True):
            setattr(self, name, ExpertLinear(moe.num_experts, k, n, lead=lead, dtype=dtype, bias=moe.bias))
        self.activation, self.clamp = config.activation, moe.clamp

    def __call__(self, rows: jax.Array, group_sizes: jax.Array) -> jax.Array:
        """rows [M, D], sorted by expert -> [M, D]."""
        gate, up, down = (getattr(self, name) for name in self.names)
        g = checkpoint_name(gate(rows, group_sizes), "gate")
        u = checkpoint_name(up(rows, group_sizes), "up")
        h = ACTIVATIONS[self.activation](g) * u if self.clamp is None else clamped_swiglu(g, u, *self.clamp)
        return down(h, group_sizes)


def clamped_swiglu(gate: jax.Array, up: jax.Array, alpha: float, limit: float) -> jax.Array:
    """min(gate, c) sigmoid(alpha min(gate, c)) (clip(up, -c, c) + 1), c being the limit (gpt-oss)."""
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return gate * jax.nn.sigmoid(alpha * gate) * (up + 1)


class MoE(nnx.Module):
    """Router, experts, and an MLP for every token where there is one."""

    def __init__(
        self,
        config: "DecoderConfig",
        moe: MoEConfig,
        shared: nnx.Module | None,
        *,
        lead: tuple[int, ...],
        dtype: DTypeLike,
    ):
        self.moe = moe
        router = Router(config.hidden_size, moe.num_experts, lead=lead, dtype=dtype, bias=moe.bias)
        if moe.sigmoid:
            correction = jax.ShapeDtypeStruct((*lead, moe.num_experts), jnp.float32)
            router.e_score_correction_bias = nnx.Param(correction)
        setattr(self, moe.router, router)
        self.experts = Experts(config, moe, lead=lead, dtype=dtype)
        if shared is not None:
            setattr(self, moe.shared, shared)
            if moe.shared_gate:
                self.shared_expert_gate = Router(config.hidden_size, 1, lead=lead, dtype=dtype)

    def __call__(self, x: jax.Array, context: "Context", layer: jax.Array) -> jax.Array:
        """x [B, T, D] -> [B, T, D]."""
        tokens = x.reshape(-1, x.shape[-1])
        weights, chosen = self.route(tokens)
        order = jnp.argsort(chosen.reshape(-1))  # the pairs of token and expert, by expert
        place = jnp.argsort(order)  # of each pair among them
        group_sizes = jnp.bincount(chosen.reshape(-1), length=self.moe.num_experts)
        y = self.experts(_rows_of_pairs(tokens, order, place), group_sizes.astype(jnp.int32))
        y = _permute(y, place, order).reshape(*chosen.shape, -1)
        out = jnp.einsum("mk,mkd->md", weights, y, preferred_element_type=jnp.float32)
        if self.moe.shared_size is not None:
            out += self._shared(tokens, context, layer)
        return out.astype(x.dtype).reshape(x.shape)

    def route(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """tokens [M, D] -> (weights, float32 [M, k], of the experts that a token goes to; their numbers, int32)."""
        router: Router = getattr(self, self.moe.router)
        logits = router(tokens)
        scores = jax.nn.sigmoid(logits) if self.moe.sigmoid else jax.nn.softmax(logits, axis=-1)
        _, chosen = jax.lax.top_k(self._preference(jax.lax.stop_gradient(scores), router), self.moe.top_k)
        # Saved as the other few numbers of a token are: rounded otherwise, backward could send it to another expert.
        chosen = checkpoint_name(chosen, "thin")
        weights = jnp.take_along_axis(scores, chosen, axis=-1)
        if self.moe.normalize:
            weights /= weights.sum(axis=-1, keepdims=True)
        return weights * self.moe.scale, chosen

    def _preference(self, scores: jax.Array, router: Router) -> jax.Array:
        """By what experts are chosen: float32 [M, N]; a group is as good as its best expert, or its best two."""
        if router.e_score_correction_bias is not None:
            scores += value(router.e_score_correction_bias)
        if self.moe.groups is None:
            return scores
        number, kept = self.moe.groups
        grouped = scores.reshape(len(scores), number, -1)
        of_group = jax.lax.top_k(grouped, 2 if self.moe.sigmoid else 1)[0].sum(axis=-1)
        _, best = jax.lax.top_k(of_group, kept)
        inside = (best[..., None] == jnp.arange(number)).any(axis=1)
        return jnp.where(inside[..., None], grouped, -jnp.inf).reshape(scores.shape)

    def _shared(self, tokens: jax.Array, context: "Context", layer: jax.Array) -> jax.Array:
        y = getattr(self, self.moe.shared)(tokens[None], context, layer)[0].astype(jnp.float32)
        return y * jax.nn.sigmoid(self.shared_expert_gate(tokens)) if self.moe.shared_gate else y


@jax.custom_vjp
def _rows_of_pairs(x: jax.Array, order: jax.Array, place: jax.Array) -> jax.Array:
    """The token of every pair: x [M, D], pairs numbered token by token, order and place [M k] -> [M k, D].

    Backward gathers too, where that of a plain gather would add up rows in any order.
    """
    return x.at[order // (order.size // x.shape[0])].get(mode="clip")


def _rows_of_pairs_fwd(x, order, place):
    return _rows_of_pairs(x, order, place), (place, x.shape[0])


def _rows_of_pairs_bwd(residuals, dy):
    place, tokens = residuals
    rows = dy.at[place].get(mode="clip").reshape(tokens, -1, dy.shape[-1])
    return rows.sum(axis=1, dtype=jnp.float32).astype(dy.dtype), None, None


_rows_of_pairs.defvjp(_rows_of_pairs_fwd, _rows_of_pairs_bwd)


@jax.custom_vjp
def _permute(y: jax.Array, permutation: jax.Array, inverse: jax.Array) -> jax.Array:
    """y[permutation], whose backward gathers by the inverse."""
    return y.at[permutation].get(mode="clip")


def _permute_fwd(y, permutation, inverse):
    return _permute(y, permutation, inverse), inverse


def _permute_bwd(inverse, dy):
    return dy.at[inverse].get(mode="clip"), None, None


_permute.defvjp(_permute_fwd, _permute_bwd)


def _wide(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.dot(x, y, preferred_element_type=jnp.float32)
