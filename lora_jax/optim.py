"""The optimizer: AdamW as torch's, gradient clipping as torch's, learning-rate schedules by Hugging Face's formulas.

The parts are optax transformations, so any other optax optimizer can take their place in `train_step`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_jax.adam8bit import scale_by_adam8bit
from lora_jax.config import SCHEDULERS, SFTConfig

Schedule = Callable[[Any], Any]  # number of completed optimizer steps -> learning rate of the next one


def make_optimizer(config: SFTConfig, total_steps: int) -> tuple[optax.GradientTransformation, Schedule]:
    """AdamW with clipping and schedule from a config.

    One update is, with g the gradient scaled to a global norm of at most `max_grad_norm` and lr = schedule(t - 1):

        m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2
        w = w - lr * (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay * w)

    which is `torch.optim.AdamW` (Loshchilov and Hutter 2019, arXiv:1711.05101). All leaves are decayed, as in Hugging
    Face, which exempts only biases and norms and finds none among LoRA parameters. With `config.optim_bits` 8, m and v
    are stored between steps as `scale_by_adam8bit` describes. `config.optim_is_paged` is not looked at: that is
    `keep_on_host`, which must stand outside all else.

    lr is multiplied by `config.loraplus_lr_ratio` for B and DoRA's magnitudes (LoRA+, Hayou et al., arXiv:2402.12354,
    as PEFT groups parameters); adapters on embeddings and whole copies have their own peaks, see `SFTConfig`.

    Args:
        config: the settings.
        total_steps: optimizer steps of the whole run, where the schedule ends.

    Returns:
        The transformation, and the schedule by itself. The schedule takes the number of completed steps; an int gives a
        float computed on the host, a traced value gives a traced float32.
    """
    schedule = make_schedule(config, total_steps)
    scale_by_adam = scale_by_adam8bit if config.optim_bits == 8 else optax.scale_by_adam
    parts = [
        scale_by_adam(b1=config.adam_beta1, b2=config.adam_beta2, eps=config.adam_epsilon),
        optax.scale_by_learning_rate(schedule),
    ]
    if config.weight_decay:
        parts.insert(1, optax.add_decayed_weights(config.weight_decay))
    if config.loraplus_lr_ratio is not None or config.embedding_learning_rate is not None:
        parts.append(_scale_by_kind(config))
    if config.max_grad_norm:
        parts.insert(0, clip_by_global_norm(config.max_grad_norm))
    return optax.chain(*parts), schedule


def _scale_by_kind(config: SFTConfig) -> optax.GradientTransformation:
    """Multiplies the updates of some leaves, by their place in the tree: groups of parameters with other rates."""

    def factor(path: Any) -> float:
        place = jax.tree_util.keystr(path)
        if "trained" in place:
            return (config.embedding_learning_rate or config.learning_rate) / config.learning_rate
        if config.loraplus_lr_ratio is None:
            return 1.0
        if "embed_tokens" in place:
            return config.loraplus_lr_embedding / config.learning_rate
        return config.loraplus_lr_ratio if "lora_b" in place or "lora_magnitude" in place else 1.0

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        return jax.tree_util.tree_map_with_path(
            lambda path, u: u if (f := factor(path)) == 1.0 else u * jnp.asarray(f, u.dtype), updates
        ), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scale updates by min(1, max_norm / (norm + 1e-6)), as `torch.nn.utils.clip_grad_norm_` does.

    optax's own function divides by the norm alone, which differs by a relative 1e-6 / norm.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        scale = jnp.minimum(1.0, max_norm / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


class GuardState(NamedTuple):
    """State of `stop_at_nonfinite`."""

    inner: Any  # state of the wrapped optimizer
    ok: jax.Array  # bool []: every gradient so far was finite


def stop_at_nonfinite(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Wrap an optimizer so that from the first non-finite gradient on neither parameters nor its state change.

    The trainer reads a step's metrics while the next step runs, so it stops a step late; this keeps what it stops with
    as it was before the bad step. Updates and state of finite steps are passed through bit for bit, and the norm is one
    that clipping computes anyway.
    """

    def init(params: Any) -> GuardState:
        return GuardState(optimizer.init(params), jnp.asarray(True))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        ok = state.ok & jnp.isfinite(optax.tree.norm(updates))
        new_updates, new_inner = optimizer.update(updates, state.inner, params)
        new_updates = jax.tree.map(lambda u: jnp.where(ok, u, jnp.zeros_like(u)), new_updates)
        new_inner = jax.tree.map(lambda new, old: jnp.where(ok, new, old), new_inner, state.inner)
        return new_updates, GuardState(new_inner, ok)

    return optax.GradientTransformation(init, update)


def keep_on_host(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Wrap an optimizer so that the arrays of its state lie in pinned host memory between steps.

    A step copies them to the device, updates them there and copies them back, so their memory is free on the device
    during forward and backward. Scalars stay on the device. The values are those of the wrapped optimizer, bit for bit.
    Nothing may compute with the state outside, so put this around all other wrappers.

    Raises:
        ValueError: the backend has no pinned host memory.
    """
    device = jax.local_devices()[0]
    if "pinned_host" not in {memory.kind for memory in device.addressable_memories()}:
        raise ValueError(
            f"A paged optimizer keeps its state in pinned host memory, which JAX's backend {device.platform!r} does "
            "not offer. Use optim='adamw_8bit' or 'adamw_torch', which keep it on the device."
        )

    def move(tree: Any, space: Any) -> Any:
        return jax.tree.map(lambda x: jax.device_put(x, space) if x.ndim else x, tree)

    def init(params: Any) -> Any:
        return move(optimizer.init(params), jax.memory.Space.Host)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        new_updates, new_state = optimizer.update(updates, move(state, jax.memory.Space.Device), params)
        return new_updates, move(new_state, jax.memory.Space.Host)

    return optax.GradientTransformation(init, update)


def make_schedule(config: SFTConfig, total_steps: int) -> Schedule:
    """The learning rate by number of completed steps, as `transformers.get_scheduler` computes it.

    Every schedule but "constant" and "inverse_sqrt" is, with w warmup steps and n total steps,

        linear:                (n - s) / (n - w)
        cosine:                (1 + cos(2 pi c p)) / 2           with p = (s - w) / (n - w), c = num_cycles = 0.5
        cosine_with_restarts:  (1 + cos(pi ((c p) mod 1))) / 2   with c = num_cycles = 1
        cosine_with_min_lr:    cosine * (1 - min_lr_rate) + min_lr_rate
        polynomial:            ((lr - lr_end) (1 - p)^power + lr_end) / lr   with lr_end = 1e-7, power = 1
        constant_with_warmup:  1

    times the learning rate, after s / w for s < w. "inverse_sqrt" is 1 / sqrt((s + t - w) / t) with t = timescale,
    which is w or, without warmup, 10,000. Raises ValueError for `lr_scheduler_kwargs` that the schedule lacks.
    """
    name, peak, warmup = config.lr_scheduler_type, config.learning_rate, config.get_warmup_steps(total_steps)
    decay = _decay(name, peak, warmup, total_steps, dict(config.lr_scheduler_kwargs or {}))
    if name == "constant":
        return lambda step: peak

    def schedule(step: Any) -> Any:
        # The host asks with an int for logging, the compiled step with a traced count.
        xp = np if isinstance(step, int) else jnp
        step = step if xp is np else jnp.asarray(step, jnp.float32)
        factor = xp.where(step < warmup, step / max(1, warmup), decay(step, xp))
        return float(peak * factor) if xp is np else peak * factor

    return schedule


def _decay(name: str, peak: float, warmup: int, total: int, kwargs: dict[str, Any]) -> Callable[[Any, Any], Any]:
    """The factor after warmup, as a function of (step, numpy or jax.numpy)."""
    span = max(1, total - warmup)
    defaults: dict[str, dict[str, Any]] = {
        "cosine": {"num_cycles": 0.5},
        "cosine_with_restarts": {"num_cycles": 1},
        "cosine_with_min_lr": {"num_cycles": 0.5, "min_lr": None, "min_lr_rate": None},
        "polynomial": {"lr_end": 1e-7, "power": 1.0},
        "inverse_sqrt": {"timescale": None},
    }
    known = defaults.get(name, {})
    if unknown := sorted(set(kwargs) - set(known)):
        raise ValueError(
            f"SFTConfig: lr_scheduler_type={name!r} has no argument {', '.join(unknown)} (lr_scheduler_kwargs). "
            f"It has: {', '.join(known) or 'none'}."
        )
    given = known | kwargs
    cycles = given.get("num_cycles", 0.0)

    def progress(step: Any) -> Any:
        return (step - warmup) / span

    def cosine(step: Any, xp: Any, floor: float = 0.0) -> Any:
        factor = 0.5 * (1.0 + xp.cos(math.pi * 2.0 * cycles * progress(step)))
        return xp.maximum(0.0, factor * (1.0 - floor) + floor)

    def restarts(step: Any, xp: Any) -> Any:
        p = progress(step)
        return xp.where(p >= 1.0, 0.0, xp.maximum(0.0, 0.5 * (1.0 + xp.cos(math.pi * ((cycles * p) % 1.0)))))

    def polynomial(step: Any, xp: Any) -> Any:
        remaining = xp.maximum(0.0, 1.0 - progress(step))
        return ((peak - given["lr_end"]) * remaining ** given["power"] + given["lr_end"]) / peak

    if name == "polynomial" and given["lr_end"] >= peak:
        raise ValueError(f"SFTConfig: lr_end={given['lr_end']} must be smaller than learning_rate={peak}.")
    if name == "linear":
        return lambda step, xp: xp.maximum(0.0, (total - step) / span)
    if name == "cosine":
        return cosine
    if name == "cosine_with_restarts":
        return restarts
    if name == "cosine_with_min_lr":
        floor = _minimum_rate(given, peak)
        return lambda step, xp: cosine(step, xp, floor)
    if name == "polynomial":
        return polynomial
    if name == "inverse_sqrt":
        scale = given["timescale"] or warmup or 10_000
        return lambda step, xp: 1.0 / xp.sqrt(xp.maximum(step + scale - warmup, 1e-9) / scale)
    if name in ("constant", "constant_with_warmup"):
        return lambda step, xp: 1.0
    raise ValueError(f"SFTConfig: got lr_scheduler_type={name!r}; wanted one of {', '.join(SCHEDULERS)}.")


def _minimum_rate(given: dict[str, Any], peak: float) -> float:
    if (given["min_lr"] is None) == (given["min_lr_rate"] is None):
        raise ValueError(
            "SFTConfig: lr_scheduler_type='cosine_with_min_lr' wants exactly one of min_lr and min_lr_rate in "
            f"lr_scheduler_kwargs; got min_lr={given['min_lr']}, min_lr_rate={given['min_lr_rate']}."
        )
    return given["min_lr_rate"] if given["min_lr_rate"] is not None else given["min_lr"] / peak
