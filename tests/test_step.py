"""The training step: packing and accumulation change nothing, the compiled program keeps no dense weight."""

import re
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lora_jax
import lora_jax.step as step_module
from lora_jax.batches import Example, pack_batch, pad_batch
from lora_jax.lora import add_adapters
from lora_jax.models.decoder import Decoder, DecoderConfig
from lora_jax.models.registry import config_from_hf
from lora_jax.remat import PRESETS, RematPlan
from lora_jax.sharding import make_mesh, put_batch
from lora_jax.step import make_eval_step, make_train_step, sum_of_losses, train_step

LAYERS, WIDTH, WIDE, VOCAB = 3, 64, 192, 320


def config(**changes) -> DecoderConfig:
    hf = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": WIDE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return config_from_hf({**hf, **changes})


def make_model(dtype=jnp.float32, nf4=True, dropout=0.0, **changes) -> lora_jax.CausalLM:
    """A random model with a random adapter (B is not zero)."""
    import pathlib

    from lora_jax.kernels.nf4 import quantize
    from lora_jax.models.linear import Linear, RMSNorm

    module = Decoder(config(**changes), dtype)
    rng = np.random.default_rng(0)
    for _, stack, part in module.named_modules():
        shape = part.weight.get_value().shape
        w = (
            1 + 0.1 * rng.normal(size=shape)
            if isinstance(part, RMSNorm)
            else rng.normal(size=shape) * shape[-1] ** -0.5
        )
        w = jnp.asarray(w, jnp.bfloat16).astype(dtype)  # the same weights and NF4 codes in every dtype
        if nf4 and stack is not None and isinstance(part, Linear):
            w = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[quantize(layer) for layer in w])
        part.weight.set_value(w)
    model = lora_jax.CausalLM(module, hf_config={}, source=pathlib.Path("random"))
    lora_config = lora_jax.LoraConfig(r=4, lora_dropout=dropout)
    add_adapters(module, lora_config)
    model.lora_config = lora_config
    _, lora, _ = model.split()
    leaves, structure = jax.tree.flatten(lora)
    model.update_lora(
        jax.tree.unflatten(structure, [jnp.asarray(rng.normal(size=x.shape) * 0.1, x.dtype) for x in leaves])
    )
    assert isinstance(lora, nnx.State)
    return model


def smoothed(outputs, labels, num_items_in_batch):
    """Cross-entropy with a fifth of each label given to all tokens."""
    scores = jax.nn.log_softmax(outputs.logits[:, :-1])
    hit = jnp.take_along_axis(scores, jnp.maximum(labels[:, 1:], 0)[..., None], -1)[..., 0]
    return -jnp.sum((labels[:, 1:] != -100) * (0.8 * hit + 0.2 * scores.mean(-1))) / num_items_in_batch


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_loss_of_ones_own_is_differentiated(devices):
    """Over micro-batches with different numbers of labels, against the formula at once."""
    model = make_model(nf4=False, num_hidden_layers=1)
    graph, lora, frozen = model.split()
    rng = np.random.default_rng(3)
    ids = rng.integers(0, VOCAB, (2, 2, 17))
    labels = np.where(rng.random(ids.shape) < [[[0.2]], [[0.7]]], ids, -100)

    def at_once(lora):
        module = nnx.merge(graph, lora, frozen)
        x, _ = module(jnp.asarray(ids.reshape(4, 17), jnp.int32))
        outputs = types.SimpleNamespace(logits=module.head().logits(x))
        return smoothed(outputs, jnp.asarray(labels.reshape(4, 17)), (labels[..., 1:] != -100).sum())

    want, gradient = jax.jit(jax.value_and_grad(at_once))(lora)
    batch: Any = {"input_ids": jnp.asarray(ids, jnp.int32), "labels": jnp.asarray(labels, jnp.int32)}
    if devices > 1:
        model.shard(make_mesh({"fsdp": devices}, devices=jax.devices()[:devices]))
        with pytest.raises(NotImplementedError, match="compute_loss_func is not implemented for a mesh with fsdp=2"):
            make_train_step(model, optax.sgd(1.0), compute_loss_func=smoothed)
        model.shard(mesh := make_mesh({"data": devices}, devices=jax.devices()[:devices]))
        batch = put_batch(batch, mesh)
    step = make_train_step(model, optax.sgd(1.0), remat="none", compute_loss_func=smoothed)
    _, mine, frozen = model.split()
    before = jax.tree.map(np.array, mine)
    after, _, metrics = step(mine, optax.sgd(1.0).init(mine), frozen, batch)
    assert float(metrics["loss"]) == pytest.approx(float(want), rel=1e-6)
    for old, new, g in zip(*map(jax.tree.leaves, (before, after, gradient)), strict=True):
        np.testing.assert_allclose(old - np.asarray(new), g, atol=2e-6)  # float32 sums in another order


def examples(n: int, low: int, high: int, seed=0) -> list[Example]:
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(n):
        ids = rng.integers(0, VOCAB, rng.integers(low, high + 1)).astype(np.int32)
        labels = np.where(rng.random(len(ids)) < 0.4, -100, ids).astype(np.int32)
        labels[0] = -100
        out.append(Example(ids, labels))
    return out


def loss_and_grads(model, batch, **options):
    graph, lora, frozen = model.split()
    batch = {name: jnp.asarray(array) for name, array in batch.items()}

    @jax.jit
    def run(lora, batch):
        def mean(lora):
            loss, count = sum_of_losses(graph, lora, frozen, batch, **options)
            return loss / count, count

        return jax.value_and_grad(mean, has_aux=True)(lora)

    (loss, count), grads = run(lora, batch)
    return float(loss), int(count), grads


def assert_close(got, want, tolerance):
    for (path, g), (_, w) in zip(*map(jax.tree_util.tree_leaves_with_path, (got, want)), strict=True):
        assert np.linalg.norm(g - w) <= tolerance * np.linalg.norm(w), jax.tree_util.keystr(path)


@pytest.mark.rotate
@pytest.mark.parametrize("window", [None, 7])
def test_packed_rows_give_the_loss_and_gradient_of_padded_rows(window):
    changes = {} if window is None else {"architectures": ["MistralForCausalLM"], "sliding_window": window}
    model = make_model(**changes)
    rows = examples(7, 3, 30)
    padded = pad_batch(rows, 32, pad_id=5)
    packed = pack_batch(rows, [[0, 1, 4], [2, 3], [5, 6]], 96, pad_id=5)
    loss, count, grads = loss_and_grads(model, padded)
    packed_loss, packed_count, packed_grads = loss_and_grads(model, packed)
    assert count == packed_count
    assert abs(loss - packed_loss) < 1e-5 * loss  # the same terms summed in another order
    assert_close(packed_grads, grads, 1e-4)


def test_what_stands_in_padding_and_in_neighbours_does_not_matter():
    model = make_model()
    rows = examples(3, 10, 20)
    loss, _, grads = loss_and_grads(model, pad_batch(rows, 32, pad_id=5))
    other_loss, _, other_grads = loss_and_grads(model, pad_batch(rows, 32, pad_id=77))
    assert loss == other_loss
    assert_close(other_grads, grads, 1e-6)
    # Another second document: the loss of the first alone must not move.
    first = pack_batch(rows, [[0, 1]], 64, 5)
    second = pack_batch([rows[0], Example(rows[1].input_ids[::-1].copy(), rows[1].labels)], [[0, 1]], 64, 5)
    for batch in (first, second):
        batch["labels"][0, len(rows[0]) :] = -100
    assert loss_and_grads(model, first)[0] == loss_and_grads(model, second)[0]


def test_the_result_does_not_depend_on_the_split_into_micro_batches():
    model = make_model()
    batch = pad_batch(examples(8, 2, 30, seed=3), 32, pad_id=0)
    optimizer = optax.sgd(1.0)
    results = []
    for micro in (1, 2, 8):
        _, lora, frozen = model.split()
        lora = jax.tree.map(jnp.copy, lora)
        split = {name: jnp.asarray(array.reshape(micro, 8 // micro, 32)) for name, array in batch.items()}
        step = make_train_step(model, optimizer)
        results.append(step(lora, optimizer.init(lora), frozen, split))
    for lora, _, metrics in results[1:]:
        assert metrics["num_label_tokens"] == results[0][2]["num_label_tokens"]
        assert abs(metrics["loss"] - results[0][2]["loss"]) < 1e-5
        assert_close(lora, results[0][0], 1e-5)  # parameters after a step of size one: gradients of size 0.1 to 1


def test_dropout_depends_on_the_seed_and_evaluation_has_none():
    model = make_model(dropout=0.3)
    batch = {name: jnp.asarray(array)[None] for name, array in pad_batch(examples(2, 20, 30), 32, pad_id=0).items()}
    optimizer = optax.sgd(0.1)
    step, losses = make_train_step(model, optimizer), []
    for seed in (1, 1, 2):
        _, lora, frozen = model.split()
        lora = jax.tree.map(jnp.copy, lora)
        metrics = step(lora, optimizer.init(lora), frozen, {**batch, "seed": jnp.uint32(seed)})[2]
        losses.append(float(metrics["loss"]))
    assert losses[0] == losses[1] != losses[2]
    _, lora, frozen = model.split()
    evaluate = make_eval_step(model)
    micro = {name: array[0] for name, array in batch.items()}
    one, two = evaluate(lora, frozen, micro), evaluate(lora, frozen, micro)
    assert float(one["loss_sum"]) == float(two["loss_sum"])
    assert int(one["num_label_tokens"]) == int((batch["labels"] >= 0).sum())


def test_metrics_name_every_trained_leaf():
    model = make_model()
    graph, lora, frozen = model.split()
    batch = {name: jnp.asarray(array)[None] for name, array in pad_batch(examples(2, 20, 30), 32, pad_id=0).items()}
    optimizer = optax.sgd(0.0)
    _, _, metrics = train_step(lora, optimizer.init(lora), frozen, batch, graph=graph, optimizer=optimizer)
    norms = metrics["leaf_grad_norms"]
    assert len(norms) == len(jax.tree.leaves(lora)) == 14
    assert norms["layers.0.mlp.up_proj.lora_a"].shape == (LAYERS,)
    assert all(np.all(np.asarray(n) > 0) for n in norms.values())
    total = np.sqrt(sum(float(np.sum(np.square(n))) for n in norms.values()))
    assert abs(total - float(metrics["grad_norm"])) < 1e-5 * total


# The compiled program


def shapes_in(text: str) -> list[tuple[int, ...]]:
    """Shape of every float array in an optimised program."""
    found = re.findall(r"\b(?:f32|bf16|f16)\[([\d,]*)\]", text)
    return [tuple(int(d) for d in dims.split(",") if d) for dims in found]


@pytest.mark.rotate
@pytest.mark.parametrize("remat", PRESETS)
def test_the_compiled_step_keeps_no_dense_weight_and_no_logits(remat):
    """No dequantised weight is saved, stacked or carried, and no array of tokens times vocabulary exists."""
    layers, tokens, vocab = 5, 4096, 131072
    model = make_model(num_hidden_layers=layers, vocab_size=vocab, hidden_size=128, intermediate_size=384)
    optimizer = optax.adam(1e-3)
    _, lora, frozen = model.split()
    spec = jax.ShapeDtypeStruct((1, 2, tokens // 2), jnp.int32)
    step = make_train_step(model, optimizer, remat=remat)
    compiled = step.lower(lora, optimizer.init(lora), frozen, {"input_ids": spec, "labels": spec}).compile()
    text = compiled.as_text()
    stacked = {s for s in shapes_in(text) if len(s) >= 3 and s[0] == layers}
    dense = {(384, 128), (128, 384), (128, 128), (64, 128)}
    assert not {s for s in stacked if s[1:] in dense}  # not stacked, as weights saved for backward would be
    for line in text.splitlines():  # not carried around the loop over layers
        if " while(" in line:
            carried = [s for s in shapes_in(line.split(" while(")[0])]
            assert not dense & set(carried), line[:200]
    assert not {s for s in shapes_in(text) if np.prod(s) >= tokens * vocab}
    # Two or three copies of one chunk of logits (256 MiB), and what the layers keep.
    assert compiled.memory_analysis().temp_size_in_bytes < tokens * vocab * 4 / 2


def test_nf4_weights_are_the_only_large_arguments_and_nothing_frozen_is_returned():
    model = make_model()
    optimizer = optax.adam(1e-3)
    _, lora, frozen = model.split()
    spec = jax.ShapeDtypeStruct((1, 2, 32), jnp.int32)
    out = jax.eval_shape(
        make_train_step(model, optimizer), lora, optimizer.init(lora), frozen, {"input_ids": spec, "labels": spec}
    )
    assert jax.tree.structure(out[0]) == jax.tree.structure(lora)
    assert {leaf.dtype for leaf in jax.tree.leaves(out[0])} == {jnp.dtype("float32")}
    returned = sum(leaf.size for leaf in jax.tree.leaves(out))
    assert returned < 3.1 * sum(leaf.size for leaf in jax.tree.leaves(lora)) + 1000


@pytest.mark.gpu
@pytest.mark.parametrize("remat", PRESETS)
def test_a_bfloat16_step_on_the_gpu_is_near_the_float32_one(remat):
    """Rows of 256 tokens, so that the fast paths (cuDNN attention) run; the same NF4 weights in both."""
    batch = {name: jnp.asarray(array)[None] for name, array in pad_batch(examples(2, 200, 256), 256, pad_id=0).items()}
    results = []
    for dtype in (jnp.float32, jnp.bfloat16):
        model = make_model(dtype, hidden_size=256, num_attention_heads=4)
        optimizer = optax.sgd(1.0)
        graph, lora, frozen = model.split()
        start = jax.tree.map(jnp.copy, lora)
        step = make_train_step(model, optimizer, remat=remat)
        new, _, metrics = step(jax.tree.map(jnp.copy, lora), optimizer.init(lora), frozen, batch)
        results.append((float(metrics["loss"]), jax.tree.map(lambda a, b: np.asarray(a - b), start, new)))
    (loss, grads), (loss16, grads16) = results
    assert abs(loss - loss16) < 2e-2 * loss  # bfloat16 keeps 8 bits; three layers and a loss of about 6
    assert_close(grads16, grads, 0.25)  # 0.09 to 0.13 on a CPU: a random model amplifies every rounding


def test_more_than_two_copies_of_a_layer_are_let_run_at_once(monkeypatch):
    """XLA waits for the third otherwise."""
    limit = "xla_gpu_experimental_parallel_async_compute_limit"
    two, three = ({name: "offload" for name in names} for names in (("input", "gate"), ("input", "gate", "up")))
    model: Any = types.SimpleNamespace(streams_layers=False, mesh=None)
    assert step_module._compiler_options(RematPlan(((None, three),)), model) is None  # on a CPU
    monkeypatch.setattr(step_module, "default_platform", lambda: "gpu")
    cases = ((((None, two),), False, False), (((1, two), (None, three)), False, True), (((None, two),), True, True))
    for groups, streams, more in cases:
        model.streams_layers = streams
        assert (limit in step_module._compiler_options(RematPlan(groups), model)) == more
