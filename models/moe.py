"""Mixtures of experts: a router sends every token to a few of many MLPs, whose results it weighs.

Token-expert pairs are sorted by expert and multiplied by grouped matmuls: no token is dropped, and all shapes are
static. Fedus et al. (arXiv 2101.03961) has the idea, Gale et al. (arXiv 2211.15841) that of not dropping.

Routers are frozen unless they are asked for. `RouterLoad` has the loss that keeps experts evenly loaded in pretraining.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from lora_jax.kernels import parallel
from lora_jax.kernels.grouped import grouped_lora_mlp
from lora_jax.kernels.grouped.rows import rows_of_pairs, sums_of_pairs
from lora_jax.models.linear import Linear, value

if TYPE_CHECKING:
    from lora_jax.models.decoder import Context, DecoderConfig

__all__ = ["ExpertLinear", "Experts", "MoE", "MoEConfig", "Router", "RouterLoad"]


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterLoad:
    """How tokens fall on experts: sums over tokens and layers, float32."""

    chosen: jax.Array  # [E]: tokens that have the expert among their k
    scores: jax.Array  # [E]: the expert's probability, before it was chosen or not
    tokens: jax.Array  # []: tokens, counted in every layer

    @staticmethod
    def none(experts: int) -> "RouterLoad":
        """That of no token."""
        return RouterLoad(jnp.zeros(experts), jnp.zeros(experts), jnp.zeros(()))

    def __add__(self, other: "RouterLoad") -> "RouterLoad":
        return jax.tree.map(jnp.add, self, other)

    def balancing_loss(self) -> jax.Array:
        """E sum_e f_e p_e, float32 []: k where experts are evenly loaded, up to E where k of them get everything.

        f_e is the share of tokens that have expert e among their k, p_e the mean probability of e; gradients flow
        through p. Fedus et al. (arXiv 2101.03961), equations 4 to 6, with k in place of one expert and with the means
        over the tokens of all layers at once, as transformers takes them.
        """
        tokens = jnp.maximum(self.tokens, 1)
        return self.chosen.size * jnp.sum(self.chosen / tokens * self.scores / tokens)


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


class Experts(nnx.Module):
    """The MLPs, down(activation(gate(x)) * up(x))."""

    def __init__(self, config: "DecoderConfig", moe: MoEConfig, *, lead: tuple[int, ...], dtype: DTypeLike):
        d, f = config.hidden_size, moe.intermediate_size
        self.names = moe.projections
        for name, (k, n) in zip(self.names, ((d, f), (d, f), (f, d)), strict=True):
            setattr(self, name, ExpertLinear(moe.num_experts, k, n, lead=lead, dtype=dtype, bias=moe.bias))
        self.activation, self.clamp = config.activation, moe.clamp

    def __call__(
        self,
        rows: jax.Array,
        group_sizes: jax.Array,
        weights: jax.Array,
        dropout_keys: Sequence[jax.Array | None] = (None,) * 3,
    ) -> jax.Array:
        """What experts make of tokens, times the weights of the experts, but for the bias of down.

        Args:
          rows: [M, D], sorted by expert.
          group_sizes: int32 [E], rows of each expert.
          weights: float32 [M].
          dropout_keys: of gate, up and down.

        Returns:
          [M, D] in the dtype of rows.
        """
        layers = (getattr(self, name) for name in self.names)
        gate, up, down = (layer.projection(key) for layer, key in zip(layers, dropout_keys, strict=True))
        down = down._replace(bias=None)  # see `bias`
        return grouped_lora_mlp(
            rows, gate, up, down, group_sizes, weights, activation=self.activation, clamp=self.clamp
        )

    def bias(self, weights: jax.Array, chosen: jax.Array) -> jax.Array | float:
        """What biases of down add to tokens that go to experts [M, k] with weights [M, k]: float32 [M, D]."""
        down: ExpertLinear = getattr(self, self.names[2])
        if down.bias is None:
            return 0.0
        bias = value(down.bias)
        of_expert = chosen[..., None] == jnp.arange(len(bias))
        return _wide(jnp.einsum("mk,mke->me", weights, of_expert).astype(bias.dtype), bias)


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
        return self.with_load(x, context, layer)[0]

    def with_load(self, x: jax.Array, context: "Context", layer: jax.Array) -> tuple[jax.Array, RouterLoad | None]:
        """x [B, T, D] -> (the same as a call, how the tokens that `context.counted` counts fall on experts)."""
        tokens = x.reshape(-1, x.shape[-1])
        weights, chosen, scores = self.route(tokens)
        keys = [context.key(layer, site) for site in (8, 9, 10)]  # 4 to 6 are of a shared MLP, 7 of attention
        mine = self._here(tokens, weights, chosen)
        out = parallel.rows_from_experts(self._routed(*mine, keys=keys))
        if self.moe.shared_size is not None:
            out += self._shared(tokens, context, layer)
        return out.astype(x.dtype).reshape(x.shape), self._load(chosen, scores, context.counted)

    def _here(self, tokens: jax.Array, weights: jax.Array, chosen: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The arguments of `_routed` for the experts that this device has: all of them, unless "expert" shares them."""
        if (devices := parallel.size("expert")) == 1:
            return tokens, weights, chosen
        tokens, weights, chosen = (parallel.rows_to_experts(x) for x in (tokens, weights, chosen))
        chosen = parallel.local_labels(chosen, self.moe.num_experts // devices, ("expert",))
        # The others come last, and belong to no expert.
        return tokens, jnp.where(chosen < self.moe.num_experts // devices, weights, 0), chosen

    def _routed(self, tokens: jax.Array, weights: jax.Array, chosen: jax.Array, *, keys: Sequence) -> jax.Array:
        """What the experts add up to: tokens [M, D], weights and numbers of experts [M, k] -> float32 [M, D]."""
        order = jnp.argsort(chosen.reshape(-1))  # the pairs of token and expert, by expert
        place = jnp.zeros_like(order).at[order].set(jnp.arange(order.size), unique_indices=True)  # of each among them
        order, place = (checkpoint_name(one, "thin") for one in (order, place))  # as small, and slow to sort again
        # Counted by comparing: a GPU adds up pair by pair what is scattered to few places.
        here = jnp.arange(self.moe.num_experts // parallel.size("expert"))
        group_sizes = (chosen.reshape(-1, 1) == here).sum(axis=0, dtype=jnp.int32)
        rows, of_rows = rows_of_pairs(tokens, order, place), _permute(weights.reshape(-1), order, place)
        y = self.experts(rows, group_sizes, of_rows, keys)
        return sums_of_pairs(y, order, place, len(tokens)) + self.experts.bias(weights, chosen)

    def _load(self, chosen: jax.Array, scores: jax.Array, counted: jax.Array | None) -> RouterLoad | None:
        if counted is None:
            return None
        counted = counted.reshape(-1, 1).astype(jnp.float32)
        has = (chosen[..., None] == jnp.arange(self.moe.num_experts)).any(axis=1)
        return RouterLoad((counted * has).sum(axis=0), (counted * scores).sum(axis=0), counted.sum())

    def route(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Chooses experts: tokens [M, D] -> (weights, numbers, scores).

        Returns:
          Weights of the experts that a token goes to, float32 [M, k]; their numbers, int32 [M, k]; and the scores of
          all experts, float32 [M, E].
        """
        router: Router = getattr(self, self.moe.router)
        logits = router(tokens)
        scores = jax.nn.sigmoid(logits) if self.moe.sigmoid else jax.nn.softmax(logits, axis=-1)
        _, chosen = jax.lax.top_k(self._preference(jax.lax.stop_gradient(scores), router), self.moe.top_k)
        # Saved as the other few numbers of a token are: rounded otherwise, backward could send it to another expert.
        chosen = checkpoint_name(chosen, "thin")
        # As a sum: the gradient of a gather is a scatter, which takes a GPU ten times as long.
        weights = jnp.where(chosen[..., None] == jnp.arange(self.moe.num_experts), scores[:, None], 0).sum(axis=-1)
        if self.moe.normalize:
            weights /= weights.sum(axis=-1, keepdims=True)
        return weights * self.moe.scale, chosen, scores

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
