"""Mixtures of experts: the layer against a dense formula, storage, adapters, and what published models are made of.

Whole families are compared with transformers and PEFT in test_families.py.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file

from lora_jax import SFTConfig, SFTTrainer, get_peft_model
from lora_jax.batches import BatchIterator, Example
from lora_jax.export.peft import adapter_tensors, load_adapter, save_adapter
from lora_jax.hf_checkpoint import Checkpoint, read_json
from lora_jax.kernels.nf4 import NF4Weight, dequantize, quantize
from lora_jax.models.decoder import Context, Decoder
from lora_jax.models.linear import Linear, value
from lora_jax.models.moe import RouterLoad
from lora_jax.models.registry import config_from_hf
from lora_jax.remat import PRESETS
from lora_jax.step import sum_of_losses, train_step
from lora_jax.tools.published import DEEPSEEK_V3
from tests import tiny

EXPERTS = 5
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
}
TARGETS = ["q_proj", "v_proj", "w1", "w2", "w3"]


def mixtral_weights(config, seed=0):
    """Random weights by the names of published checkpoints."""
    shapes = {name: slot.shape for name, slot in Decoder(config_from_hf(config), np.float32).slots().items()}
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in shapes.items():
        noise = rng.normal(size=shape)
        weights[name] = np.float32(1 + 0.2 * noise if name.endswith("norm.weight") else noise * 1.5 / shape[-1] ** 0.5)
    return weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = tiny.config(**MIXTRAL)
    where = tmp_path_factory.mktemp("mixtral") / "model"
    return tiny.write_folder(where, config, mixtral_weights(config), tokenizer=False)


# ---- the layer ----------------------------------------------------------------------------------------------------


def make_layer(seed, experts, top_k, normalize, shared):
    """One layer in float32, every linear with an adapter."""
    config = config_from_hf(tiny.config(**MIXTRAL, hidden_size=40))
    changes = {"num_experts": experts, "top_k": top_k, "normalize": normalize, "intermediate_size": 24}
    moe = dataclasses.replace(config.moe, **changes, **({"shared_size": 20, "shared_gate": True} if shared else {}))
    block = Decoder(dataclasses.replace(config, num_layers=1, moe=moe), np.float32).layers[0]
    layer = getattr(block, moe.block)
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape) / shape[-1] ** 0.5, jnp.float32)

    for _, module in nnx.iter_modules(layer):
        if isinstance(module, Linear):
            *lead, n, k = value(module.weight).shape[1:]
            module.weight.set_value(draw(*lead, n, k))
            module.lora_a = nnx.LoRAParam(draw(*lead, 3, k).swapaxes(-1, -2))
            module.lora_b = nnx.LoRAParam(draw(*lead, n, 3).swapaxes(-1, -2))
            module.scale = 0.7
    return layer


def dense(layer, x):
    """Every expert for every token: x [M, D] -> [M, D]."""

    def weight(module):  # [..., K, N]
        return jnp.swapaxes(value(module.weight), -1, -2) + 0.7 * value(module.lora_a) @ value(module.lora_b)

    def mlp(x, gate, up, down):
        return (jax.nn.silu(x @ gate) * (x @ up)) @ down

    scores = jax.nn.softmax(x @ weight(layer.gate))
    kth = jnp.sort(scores)[:, -layer.moe.top_k, None]
    scores = jnp.where(scores >= kth, scores, 0)
    if layer.moe.normalize:
        scores /= scores.sum(axis=1, keepdims=True)
    parts = [weight(getattr(layer.experts, name)) for name in layer.moe.projections]
    y = jnp.zeros_like(x)
    for e in range(layer.moe.num_experts):
        y += scores[:, e, None] * mlp(x, *(part[e] for part in parts))
    if layer.moe.shared_size is None:
        return y
    shared = layer.shared_expert
    gate = jax.nn.sigmoid(x @ weight(layer.shared_expert_gate))
    return y + gate * mlp(x, *(weight(part) for part in (shared.gate_proj, shared.up_proj, shared.down_proj)))


@pytest.mark.rotate
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "normalize", "shared"),
    [(37, 5, 2, True, False), (1, 7, 3, False, True), (6, 16, 1, False, False), (9, 4, 4, True, True)],
)
def test_values_and_gradients_equal_a_dense_formula(tokens, experts, top_k, normalize, shared):
    """Also where experts get no token, one token, or all of them; the router's adapter has gradients too."""
    layer = make_layer(tokens, experts, top_k, normalize, shared)
    graph, lora, frozen = nnx.split(layer, nnx.LoRAParam, ...)
    rng = np.random.default_rng(tokens)
    x, dy = (jnp.asarray(rng.normal(size=(1, tokens, 40)), jnp.float32) for _ in range(2))
    context = Context(x, x, None, 0, None)

    def run(formula):
        def loss(lora, x):
            y = formula(nnx.merge(graph, lora, frozen), x)
            return (y * dy).sum(), y

        (_, y), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(lora, x)
        return y, grads

    got, got_grads = run(lambda layer, x: layer(x, context, jnp.int32(0)))
    want, want_grads = run(lambda layer, x: dense(layer, x[0])[None])
    # Float32 sums of up to 40 terms, one after the other.
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
    for got, want in zip(jax.tree.leaves(got_grads), jax.tree.leaves(want_grads), strict=True):
        assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)
    if top_k < experts:
        assert all(np.linalg.norm(leaf) > 1e-3 for leaf in jax.tree.leaves(got_grads))


# ---- storage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double", [False, True])
def test_each_expert_is_quantised_by_itself(folder, double):
    model = tiny.open_model(folder, "nf4-double" if double else "nf4")
    checkpoint = Checkpoint(folder)
    (stack,) = model.module.layers
    moe = stack.block_sparse_moe
    assert value(moe.gate.weight).shape == (2, EXPERTS, 64)  # the router stays as it is
    for name in ("w1", "w2", "w3"):
        stored = value(getattr(moe.experts, name).weight)
        assert isinstance(stored, NF4Weight)
        assert stored.shape[:2] == (2, EXPERTS)
        for layer, expert in itertools.product(range(2), range(EXPERTS)):
            dense = checkpoint.read(f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}.weight")
            want = quantize(jnp.asarray(dense), double)
            for got, leaf in zip(jax.tree.leaves(stored), jax.tree.leaves(want), strict=True):
                np.testing.assert_array_equal(got[layer, expert], leaf)


@pytest.mark.turns("mixtures in NF4 and with dropout")
def test_a_quantised_model_is_that_of_its_dequantised_weights(folder, tmp_path):
    model = tiny.randomize_adapter(get_peft_model(tiny.open_model(folder, "nf4"), r=4, verbose=False))
    weights = {name: Checkpoint(folder).read(name) for name in Checkpoint(folder).names}
    for name in weights:
        if "_proj." in name or ".experts." in name:
            weights[name] = np.asarray(dequantize(quantize(jnp.asarray(weights[name]), False), jnp.float32))
    tiny.write_folder(tmp_path / "model", tiny.config(**MIXTRAL), weights, tokenizer=False)
    other = load_adapter(tiny.open_model(tmp_path / "model"), save_adapter(model, tmp_path / "adapter"))
    ids = tiny.ids(2, 11)
    # The same float32 products, in other orders.
    np.testing.assert_allclose(model.logits(ids), other.logits(ids), rtol=0, atol=1e-4)


GPT_OSS = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "head_dim": 16,
    "sliding_window": 5,
    "rope_scaling": None,
}


def gpt_oss_files(seed):
    """A model's tensors as gpt-oss is published, and as its class has them but for what is still to be decoded."""
    config = config_from_hf(tiny.config(**GPT_OSS))
    rng = np.random.default_rng(seed)
    published, plain = {}, {}
    for name, slot in Decoder(config, np.float32).slots().items():
        if ".experts." not in name:
            noise = rng.normal(size=slot.shape)
            plain[name] = np.float32(1 + 0.2 * noise if name.endswith("norm.weight") else noise / slot.shape[-1] ** 0.5)
    published |= plain
    for layer in range(config.num_layers):
        for tensor, n, k in (("gate_up_proj", 256, 64), ("down_proj", 64, 128)):
            name = f"model.layers.{layer}.mlp.experts.{tensor}"
            published[f"{name}_blocks"] = blocks = rng.integers(0, 256, (3, n, k // 32, 16)).astype(np.uint8)
            published[f"{name}_scales"] = scales = rng.integers(122, 126, (3, n, k // 32)).astype(np.uint8)
            published[f"{name}_bias"] = plain[f"{name}_bias"] = np.float32(0.5 * rng.normal(size=(3, n)))
            plain[name] = (blocks, scales)
    return published, plain


@pytest.mark.oracle
def test_mxfp4_is_decoded_as_transformers_does(oracle, tmp_path):
    published, plain = gpt_oss_files(0)
    for name, tensor in plain.items():
        if isinstance(tensor, tuple):
            np.savez(tmp_path / "in.npz", *tensor)
            oracle("moe_mxfp4.py", tmp_path / "in.npz", tmp_path / "out.npy")
            plain[name] = np.load(tmp_path / "out.npy")
            assert plain[name].std() > 0.1
    config = tiny.config(**GPT_OSS, quantization_config={"quant_method": "mxfp4"})
    packed = tiny.open_model(tiny.write_folder(tmp_path / "packed", config, published, tokenizer=False))
    tiny.write_folder(tmp_path / "plain", tiny.config(**GPT_OSS), plain, tokenizer=False)
    ids = tiny.ids(2, 9)
    # All numbers of MXFP4 are exact in bfloat16.
    np.testing.assert_array_equal(packed.logits(ids), tiny.open_model(tmp_path / "plain").logits(ids))
    packed.save_pretrained_merged(tmp_path / "saved", dtype="float32", verbose=False)
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == plain.keys()
    for name, tensor in plain.items():
        np.testing.assert_array_equal(saved[name], tensor, err_msg=name)
    assert "quantization_config" not in read_json(tmp_path / "saved" / "config.json")


# ---- adapters -----------------------------------------------------------------------------------------------------


def test_adapters_have_the_names_of_single_experts_and_come_back(folder, tmp_path):
    model = get_peft_model(tiny.open_model(folder), r=4, target_modules=TARGETS, verbose=False)
    tiny.randomize_adapter(model)
    tensors = adapter_tensors(model)
    experts = "base_model.model.model.layers.1.block_sparse_moe.experts"
    assert tensors[f"{experts}.4.w2.lora_A.weight"].shape == (4, 128)
    assert tensors[f"{experts}.4.w2.lora_B.weight"].shape == (64, 4)
    assert len(tensors) == 2 * 2 * (2 + 3 * EXPERTS)
    starts = [tensors[f"{experts}.{e}.w1.lora_A.weight"] for e in range(EXPERTS)]
    assert all(np.abs(a - b).max() > 0.1 for a, b in itertools.combinations(starts, 2))  # no expert starts as another
    back = load_adapter(tiny.open_model(folder), save_adapter(model, tmp_path / "adapter"))
    for name, tensor in adapter_tensors(back).items():
        np.testing.assert_array_equal(tensor, tensors[name])


def test_merging_changes_every_expert_by_its_own_adapter(folder, tmp_path):
    model = tiny.randomize_adapter(get_peft_model(tiny.open_model(folder), r=4, target_modules=TARGETS, verbose=False))
    model.save_pretrained_merged(tmp_path / "merged", dtype="float32", verbose=False)
    ids = tiny.ids(2, 11)
    merged = tiny.open_model(tmp_path / "merged")
    np.testing.assert_allclose(merged.logits(ids), model.logits(ids), rtol=0, atol=1e-4)  # float32 in another order
    assert np.abs(np.asarray(merged.logits(ids) - tiny.open_model(folder).logits(ids))).max() > 0.1


def test_only_some_layers(folder):
    model = get_peft_model(tiny.open_model(folder), r=2, layers_to_transform=[1], verbose=False)
    assert [stack.count for stack in model.module.layers] == [1, 1]
    assert all(name.startswith("base_model.model.model.layers.1.") for name in adapter_tensors(model))


def test_routers_are_adapted_only_by_name(folder):
    everything = get_peft_model(tiny.open_model(folder), r=2, verbose=False)
    assert not [name for name in adapter_tensors(everything) if ".gate." in name]
    router = get_peft_model(tiny.open_model(folder), r=2, target_modules=["gate"], verbose=False)
    prefix = "base_model.model.model.layers"
    want = {f"{prefix}.{i}.block_sparse_moe.gate.lora_{ab}.weight" for i in range(2) for ab in "AB"}
    assert set(adapter_tensors(router)) == want


def test_what_adapters_cannot_be(folder):
    with pytest.raises(ValueError, match="all experts of a layer get an adapter or none"):
        get_peft_model(tiny.open_model(folder), target_modules=r".*experts\.[01]\.w1", verbose=False)
    with pytest.raises(ValueError, match="lora_dropout on gate is not implemented"):
        get_peft_model(tiny.open_model(folder), target_modules=["gate"], lora_dropout=0.1, verbose=False)


# ---- training -----------------------------------------------------------------------------------------------------


@pytest.mark.turns("plans of rematerialisation")
@pytest.mark.rotate
@pytest.mark.parametrize("plan", sorted(set(PRESETS) - {"none"}))
def test_no_plan_of_rematerialisation_changes_loss_or_gradients(folder, plan):
    model = tiny.randomize_adapter(get_peft_model(tiny.open_model(folder, "nf4-double"), r=4, verbose=False))
    graph, lora, frozen = model.split()
    ids = jnp.asarray(tiny.ids(2, 23))

    def run(plan):
        def loss(lora):
            return sum_of_losses(graph, lora, frozen, {"input_ids": ids, "labels": ids}, remat=plan)[0]

        return jax.jit(jax.value_and_grad(loss))(lora)

    for got, wanted in zip(jax.tree.leaves(run(plan)), jax.tree.leaves(run("none")), strict=True):
        assert np.linalg.norm(got - wanted) <= 1e-5 * np.linalg.norm(wanted)  # float32 sums in another order


@pytest.mark.turns("mixtures in NF4 and with dropout")
def test_dropout_of_experts_is_drawn_for_every_layer_and_linear_and_not_in_evaluation(folder):
    model = get_peft_model(tiny.open_model(folder), r=4, target_modules=TARGETS, lora_dropout=0.5, verbose=False)
    graph, lora, frozen = tiny.randomize_adapter(model).split()
    batch = {name: jnp.asarray(tiny.ids(2, 13)) for name in ("input_ids", "labels")}
    run = jax.jit(lambda key: sum_of_losses(graph, lora, frozen, batch, dropout_key=key)[0])
    losses = [run(jax.random.key(seed)) for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    assert len({float(loss) for loss in [*losses, sum_of_losses(graph, lora, frozen, batch)[0]]}) == 3


# ---- the loss that keeps experts evenly loaded ----------------------------------------------------------------------


def balanced_case(folder, seed, rows=2, length=23):
    """(graph, lora, frozen, batch with pads) of a model with adapters on attention and experts."""
    model = tiny.randomize_adapter(get_peft_model(tiny.open_model(folder), r=4, verbose=False))
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 256, (rows, length))
    mask = np.arange(length) < rng.integers(length // 2, length, (rows, 1))
    labels = np.where(mask & (rng.random(ids.shape) < 0.7), ids, -100)
    batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    return *model.split(), {name: jnp.asarray(array, jnp.int32) for name, array in batch.items()}


@functools.partial(jax.jit, static_argnames=("graph", "router_aux_loss_coef", "remat", "scan_layers"))
def sum_and_grads(graph, lora, frozen, batch, **options):
    """Compiled once for all batches of a shape."""

    def f(lora):
        return sum_of_losses(graph, lora, frozen, batch, **options)

    return jax.value_and_grad(f, has_aux=True)(lora)


def assert_close(got, want):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.linalg.norm(g - w) <= 1e-5 * np.linalg.norm(w)  # float32 sums in another order


def test_balancing_loss_of_even_and_uneven_loads():
    even = RouterLoad(jnp.full(8, 30.0), jnp.full(8, 15.0), jnp.float32(120))  # k = 2
    assert float(even.balancing_loss()) == pytest.approx(2)
    one = jnp.zeros(8).at[3].set(120.0)
    assert float(RouterLoad(one, one, jnp.float32(120)).balancing_loss()) == pytest.approx(8)
    assert float(RouterLoad.none(8).balancing_loss()) == 0


@pytest.mark.turns("balancing experts")
@pytest.mark.rotate
@pytest.mark.parametrize(("scan_layers", "remat"), [(True, "full"), (False, "selective")])
def test_balancing_is_the_same_however_layers_run(folder, scan_layers, remat):
    case = balanced_case(folder, 0)
    want = sum_and_grads(*case, router_aux_loss_coef=0.5)
    assert_close(sum_and_grads(*case, router_aux_loss_coef=0.5, remat=remat, scan_layers=scan_layers), want)
    assert want[0][0] > sum_and_grads(*case)[0][0] + 0.5 * want[0][1]  # by half of at least about k for each label


def test_balancing_counts_prompts_but_no_pads(folder):
    graph, lora, frozen, batch = balanced_case(folder, 1)
    want = sum_and_grads(graph, lora, frozen, batch, router_aux_loss_coef=0.5)
    other = batch | {"input_ids": jnp.where(batch["attention_mask"] == 1, batch["input_ids"], 7)}
    assert_close(sum_and_grads(graph, lora, frozen, other, router_aux_loss_coef=0.5), want)
    del batch["attention_mask"]
    everything = sum_and_grads(graph, lora, frozen, batch, router_aux_loss_coef=0.5)
    assert abs(everything[0][0] - want[0][0]) > 1e-4 * want[0][0]


@pytest.mark.turns("balancing experts")
def test_packed_rows_are_balanced_as_their_documents(folder):
    graph, lora, frozen, batch = balanced_case(folder, 2, rows=3)
    batch["labels"] = batch["labels"].at[:, 0].set(-100)
    want = sum_and_grads(graph, lora, frozen, batch, router_aux_loss_coef=0.5)
    lengths = np.asarray(batch["attention_mask"].sum(axis=1))
    start = np.cumsum(lengths) - lengths
    packed = {name: np.concatenate([batch[name][i, :n] for i, n in enumerate(lengths)]) for name in batch}
    packed["positions"] = np.concatenate([np.arange(n) for n in lengths])
    packed["segment_start"] = np.repeat(start, lengths)
    packed = {name: jnp.asarray(array, jnp.int32)[None] for name, array in packed.items()}
    assert_close(sum_and_grads(graph, lora, frozen, packed, router_aux_loss_coef=0.5), want)


@pytest.mark.turns("balancing experts")
def test_micro_batches_are_balanced_each_and_weighted_by_their_labels(folder):
    graph, lora, frozen, batch = balanced_case(folder, 3, rows=4)
    optimizer = optax.sgd(1.0)
    micro = jax.tree.map(lambda leaf: leaf.reshape(2, 2, -1), batch)
    options = dict(graph=graph, optimizer=optimizer, router_aux_loss_coef=0.5)
    new, _, metrics = jax.jit(functools.partial(train_step, **options))(lora, optimizer.init(lora), frozen, micro)
    halves = [{name: array[i] for name, array in micro.items()} for i in range(2)]
    parts = [sum_and_grads(graph, lora, frozen, half, router_aux_loss_coef=0.5) for half in halves]
    assert parts[0][0][1] != parts[1][0][1]
    count = sum(part[0][1] for part in parts)
    assert metrics["num_label_tokens"] == count
    assert float(metrics["loss"]) == pytest.approx(float(sum(part[0][0] for part in parts) / count), rel=1e-6)
    want = jax.tree.map(lambda x, *grads: x - sum(grads) / count, lora, *(part[1] for part in parts))
    assert_close(new, want)


@pytest.mark.turns("balancing experts")
def test_trainer_balances_and_masks_pads(folder, tmp_path):
    rows = [{"input_ids": tiny.ids(1, n, seed=n)[0].tolist()} for n in (9, 17, 30)]
    losses = []
    for coef in (None, 0.5):
        model = get_peft_model(tiny.open_model(folder), r=4, verbose=False)
        args = dict(output_dir=str(tmp_path / str(coef)), per_device_train_batch_size=3, max_steps=1, disable_tqdm=True)
        trainer = SFTTrainer(model, SFTConfig(**args, router_aux_loss_coef=coef), train_dataset=rows)
        batch = trainer._batches.batch(0)
        losses.append(trainer.train().training_loss)
    assert sorted(batch["attention_mask"][0].sum(axis=1)) == [9, 17, 30]
    graph, lora, frozen = get_peft_model(tiny.open_model(folder), r=4, verbose=False).split()
    loss, count = sum_of_losses(
        graph, lora, frozen, {name: jnp.asarray(array[0]) for name, array in batch.items()}, router_aux_loss_coef=0.5
    )
    assert losses[1] == pytest.approx(float(loss / count), rel=1e-5)
    assert losses[1] > losses[0] + 0.9


@pytest.mark.parametrize("packing", [True, False])
def test_attention_mask_of_batches(packing):
    examples = [Example(np.full(n, 7, np.int32), np.full(n, 7, np.int32)) for n in (5, 3, 9, 2, 8)]
    batches = BatchIterator(examples, batch_size=2, packing=packing, max_length=10, attention_mask=True)
    for step in range(batches.steps_per_epoch):
        batch = batches.batch(step)
        np.testing.assert_array_equal(batch["attention_mask"], batch["input_ids"] == 7)  # pads are 0


def test_what_cannot_be_balanced(folder):
    with pytest.raises(ValueError, match="router_aux_loss_coef=-1; wanted 0 or above"):
        SFTConfig(router_aux_loss_coef=-1)
    ids = jnp.asarray(tiny.ids(1, 5))
    for config, error, message in (
        (tiny.config(), ValueError, "LlamaForCausalLM has no experts"),
        (DEEPSEEK_V3, NotImplementedError, "score experts by sigmoids"),
    ):
        model = Decoder(config_from_hf(config), jnp.float32)
        with pytest.raises(error, match=message):
            jax.eval_shape(lambda ids, model=model: model(ids, counted=ids)[0], ids)
