"""AdamW, clipping and schedules against numbers from torch and transformers."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax.config import SFTConfig
from lora_jax.optim import clip_by_global_norm, keep_on_host, make_optimizer, make_schedule, stop_at_nonfinite

# transformers 5.24, get_scheduler(name, SGD(lr=2e-4), num_warmup_steps=3, num_training_steps=10, kwargs):
# get_last_lr() / 2e-4 before step 1, ..., 11, to nine digits.
_WARMUP = [0.0, 0.333333333, 0.666666667]
SCHEDULES: dict[str, tuple[dict, list[float]]] = {
    "linear": ({}, [*_WARMUP, 1.0, 0.857142857, 0.714285714, 0.571428571, 0.428571429, 0.285714286, 0.142857143, 0.0]),
    "cosine": ({}, [*_WARMUP, 1.0, 0.950484434, 0.811744901, 0.611260467, 0.388739533, 0.188255099, 0.049515566, 0.0]),
    "cosine_with_restarts": (
        {"num_cycles": 2},
        [*_WARMUP, 1.0, 0.811744901, 0.388739533, 0.049515566, 0.950484434, 0.611260467, 0.188255099, 0.0],
    ),
    "cosine_with_min_lr": (
        {"min_lr_rate": 0.1},
        [*_WARMUP, 1.0, 0.955435991, 0.830570411, 0.65013442, 0.44986558, 0.269429589, 0.144564009, 0.1],
    ),
    "polynomial": (
        {"power": 2.0, "lr_end": 1e-5},
        [*_WARMUP, 1.0, 0.747959184, 0.534693878, 0.360204082, 0.224489796, 0.12755102, 0.0693877551, 0.05],
    ),
    "constant": ({}, [1.0] * 11),
    "constant_with_warmup": ({}, [*_WARMUP] + [1.0] * 8),
    "inverse_sqrt": (
        {"timescale": 8},
        [*_WARMUP, 1.0, 0.942809042, 0.894427191, 0.852802865, 0.816496581, 0.784464541, 0.755928946, 0.730296743],
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_equals_transformers(name: str):
    kwargs, expected = SCHEDULES[name]
    warmup = 0 if name == "constant" else 3
    schedule = make_schedule(SFTConfig(lr_scheduler_type=name, lr_scheduler_kwargs=kwargs, warmup_steps=warmup), 10)
    on_host = [schedule(step) / 2e-4 for step in range(11)]
    np.testing.assert_allclose(on_host, expected, rtol=0, atol=1e-9)  # expected has nine digits
    compiled = [jax.jit(schedule)(jnp.int32(step)) / 2e-4 for step in range(11)]
    np.testing.assert_allclose(compiled, expected, rtol=0, atol=5e-7)  # float32, and its cosine near 0


def test_schedule_arguments_are_checked():
    with pytest.raises(ValueError, match="'linear' has no argument num_cycles"):
        make_schedule(SFTConfig(lr_scheduler_kwargs={"num_cycles": 2}), 10)
    with pytest.raises(ValueError, match="exactly one of min_lr and min_lr_rate"):
        make_schedule(SFTConfig(lr_scheduler_type="cosine_with_min_lr"), 10)
    with pytest.raises(ValueError, match="must be smaller than learning_rate"):
        make_schedule(SFTConfig(lr_scheduler_type="polynomial", lr_scheduler_kwargs={"lr_end": 1.0}), 10)


def test_min_lr_is_a_rate_of_the_peak():
    args: Any = {"lr_scheduler_type": "cosine_with_min_lr", "learning_rate": 4e-4}
    by_value = make_schedule(SFTConfig(**args, lr_scheduler_kwargs={"min_lr": 1e-4}), 20)
    by_rate = make_schedule(SFTConfig(**args, lr_scheduler_kwargs={"min_lr_rate": 0.25}), 20)
    assert [by_value(s) for s in range(21)] == [by_rate(s) for s in range(21)]
    assert by_value(20) == pytest.approx(1e-4, rel=1e-12)


# torch 2.13, AdamW(lr=0.1, betas=(0.9, 0.99), eps=1e-3, weight_decay=0.1), clip_grad_norm_(1.0) before each of 4 steps,
# gradient of element k of parameter i at step t: sin(1.7 k + 0.9 t + i) 10^(1 - t). The norms fall from 19 to 0.02, so
# that steps with and without clipping, and an epsilon that matters, are all there.
_START = ([[0.5, -1.25, 2.0], [0.03125, 0.75, -0.5]], [1e-3, -2.0])
_END = (
    [
        [0.2791232168674469, -1.511688232421875, 2.2495968341827393],
        [0.3146666884422302, 0.38045522570610046, -0.7178152799606323],
    ],
    [-0.3391052186489105, -1.969128966331482],
)


def _gradients(params: list[jax.Array], t: int) -> list[jax.Array]:
    def one(i: int, p: jax.Array) -> jax.Array:
        k = np.arange(p.size).reshape(p.shape)
        return jnp.asarray(np.sin(k * 1.7 + t * 0.9 + i) * 10.0 ** (1 - t), jnp.float32)

    return [one(i, p) for i, p in enumerate(params)]


def _adamw_config(**kwargs: Any) -> SFTConfig:
    given = {"learning_rate": 0.1, "adam_beta2": 0.99, "adam_epsilon": 1e-3, "weight_decay": 0.1, "max_grad_norm": 1.0}
    return SFTConfig(lr_scheduler_type="constant", **{**given, **kwargs})


def test_adamw_with_clipping_equals_torch():
    optimizer, _ = make_optimizer(_adamw_config(), 4)
    params = [jnp.asarray(p, jnp.float32) for p in _START]
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    for t in range(4):
        params, state = step(params, state, _gradients(params, t))
    for got, want in zip(params, _END, strict=True):
        # float32 with another order of the same operations: a few units in the last place of values near 2
        np.testing.assert_allclose(got, np.asarray(want), rtol=2e-6, atol=5e-7)


@pytest.mark.parametrize("max_grad_norm", [None, 0.0])
def test_no_clipping_on_request(max_grad_norm: float | None):
    params = [jnp.asarray(p, jnp.float32) for p in _START]
    gradients = _gradients(params, 0)
    config = _adamw_config(max_grad_norm=max_grad_norm, adam_epsilon=10.0)  # a large epsilon: the update has a scale
    plain = optax.adamw(0.1, b1=0.9, b2=0.99, eps=10.0, weight_decay=0.1)
    optimizer, _ = make_optimizer(config, 4)
    got = optimizer.update(gradients, optimizer.init(params), params)[0]
    want = plain.update(gradients, plain.init(params), params)[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, want)


def test_clip_divides_by_norm_plus_1e_6():
    gradients = [jnp.array([3.0, 4.0]), jnp.array([12.0])]  # norm 13
    scaled: Any = clip_by_global_norm(6.5).update(gradients, optax.EmptyState())[0]
    np.testing.assert_allclose(scaled[1], [12.0 * 6.5 / (13.0 + 1e-6)], rtol=1e-7)
    untouched: Any = clip_by_global_norm(13.1).update(gradients, optax.EmptyState())[0]
    np.testing.assert_array_equal(untouched[0], gradients[0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nothing_changes_from_the_first_nonfinite_gradient_on(bad: float):
    optimizer, _ = make_optimizer(_adamw_config(), 4)
    guarded: Any = stop_at_nonfinite(optimizer)
    params = [jnp.asarray(p, jnp.float32) for p in _START]
    good = _gradients(params, 0)
    updates, state = guarded.update(good, guarded.init(params), params)
    plain_updates, plain_state = optimizer.update(good, optimizer.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, (updates, state.inner), (plain_updates, plain_state))

    after = state
    for gradients in ([good[0], good[1].at[0].set(bad)], good):  # the second is finite again
        updates, after = guarded.update(gradients, after, params)
        assert all(not np.any(u) for u in jax.tree.leaves(updates))
        assert not after.ok
        jax.tree.map(np.testing.assert_array_equal, after.inner, state.inner)


@pytest.mark.parametrize(
    ("name", "bits"), [("adamw_torch", 32), ("adamw_8bit", 8), ("paged_adamw_32bit", 32), ("paged_adamw_8bit", 8)]
)
def test_the_name_says_how_many_bits_the_state_has(name: str, bits: int):
    optimizer, _ = make_optimizer(_adamw_config(optim=name), 4)
    state = optimizer.init({"large": jnp.ones((64, 128)), "small": jnp.ones(16)})
    floats = 2 * 16 + (2 * 64 * 128 if bits == 32 else 2 * 64 * 128 // 256)
    assert sum(x.size for x in jax.tree.leaves(state) if x.dtype == jnp.float32) == floats
    assert sum(x.size for x in jax.tree.leaves(state) if x.dtype == jnp.uint8) == (0 if bits == 32 else 2 * 64 * 128)


@pytest.mark.parametrize("name", ["paged_adamw_32bit", "paged_adamw_8bit"])
def test_paged_state_is_on_the_host_between_steps_and_the_same(name: str):
    rng = np.random.default_rng(0)
    start = {"large": rng.normal(size=(3, 70, 40)), "small": rng.normal(size=16)}
    gradients = [jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), start) for _ in range(3)]
    inner = stop_at_nonfinite(make_optimizer(_adamw_config(optim=name), 4)[0])

    def train(optimizer: Any) -> tuple[Any, Any, int]:
        def step(params, state, gradient):
            updates, state = optimizer.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

        compiled: Any = jax.jit(step, donate_argnums=(0, 1))
        # Bound to a device, as results are, so that the step compiles once.
        params = jax.device_put(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), start), jax.devices()[0])
        state = jax.tree.map(lambda x: jax.device_put(x, x.sharding), optimizer.init(params))
        for gradient in gradients:
            params, state = compiled(params, state, gradient)
        return params, state, compiled._cache_size()

    params, state, compilations = train(keep_on_host(inner))
    plain_params, plain_state, _ = train(inner)
    jax.tree.map(np.testing.assert_array_equal, (params, state), (plain_params, plain_state))
    assert compilations == 1
    on_device = jax.devices()[0].default_memory().kind
    for leaf in jax.tree.leaves(state):
        assert leaf.sharding.memory_kind == ("pinned_host" if leaf.ndim else on_device)
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves((params, plain_state))} == {on_device}


def test_paging_wants_pinned_host_memory(monkeypatch: pytest.MonkeyPatch):
    device = SimpleNamespace(platform="abacus", addressable_memories=lambda: [SimpleNamespace(kind="device")])
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    with pytest.raises(ValueError, match="pinned host memory, which JAX's backend 'abacus' does not offer.*adamw_8bit"):
        keep_on_host(optax.adam(1e-3))
