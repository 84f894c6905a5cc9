"""Adapters: which modules get one, how they start, that they train, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax import LoraConfig, get_peft_model, load_adapter, make_eval_step, make_train_step
from lora_jax.export.merge import merged_tensors
from lora_jax.export.peft import adapter_tensors
from lora_jax.lora import parameter_counts
from lora_jax.step import sum_of_losses
from tests import tiny

# (K, N) of the linears of one block of the tiny model.
SHAPES = {"q_proj": (64, 64), "k_proj": (64, 32), "v_proj": (64, 32), "o_proj": (64, 64)}
SHAPES |= {"gate_proj": (64, 128), "up_proj": (64, 128), "down_proj": (128, 64)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_folder(tmp_path_factory.mktemp("tiny") / "model", tokenizer=False)


@pytest.fixture(scope="module")
def four_layers(tmp_path_factory):
    hf = tiny.config(num_hidden_layers=4)
    return tiny.write_folder(tmp_path_factory.mktemp("tiny") / "four", hf, tokenizer=False)


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    hf = tiny.config(tie_word_embeddings=True)
    return tiny.write_folder(tmp_path_factory.mktemp("tiny") / "tied", hf, tokenizer=False)


def adapted(folder, **options):
    return get_peft_model(tiny.open_model(folder), verbose=False, **options)


def modules_with_adapter(model) -> set[str]:
    """Full names, from the names of the exported tensors."""
    names = {name.removeprefix("base_model.model.") for name in adapter_tensors(model)}
    return {name.partition(".lora_")[0] for name in names if ".lora_" in name}


def in_layers(layers, *names: str) -> set[str]:
    inner = {n: "mlp" if n in ("gate_proj", "up_proj", "down_proj") else "self_attn" for n in SHAPES}
    return {f"model.layers.{i}.{inner[name]}.{name}" for i in layers for name in names}


# Which modules get an adapter.


@pytest.mark.parametrize(
    ("targets", "want"),
    [
        (None, in_layers((0, 1), *SHAPES)),
        (["q_proj", "v_proj"], in_layers((0, 1), "q_proj", "v_proj")),
        (("mlp.up_proj",), in_layers((0, 1), "up_proj")),
        (["model.layers.1.mlp.up_proj", "k_proj"], in_layers((1,), "up_proj") | in_layers((0, 1), "k_proj")),
        ("all-linear", in_layers((0, 1), *SHAPES)),
        (r"model\.layers\.0\..*(q|k)_proj", in_layers((0,), "q_proj", "k_proj")),
        (r".*\.(gate_proj|lm_head)|lm_head", in_layers((0, 1), "gate_proj") | {"lm_head"}),
        (["q_proj", "lm_head", "embed_tokens"], in_layers((0, 1), "q_proj") | {"lm_head", "model.embed_tokens"}),
    ],
)
def test_target_modules(folder, targets, want):
    assert modules_with_adapter(adapted(folder, target_modules=targets)) == want


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_proj", "query"]}, "'query' matches no module; there are embed_tokens, lm_head, q_proj"),
        ({"target_modules": "layers.*proj"}, "'layers.*proj' matches no module"),  # a full match is wanted
        ({"target_modules": "("}, r"target_modules='\(' is not a regular expression: missing \)"),
        ({"target_modules": []}, "nothing would be trained"),
        ({"target_modules": ["input_layernorm"]}, "'input_layernorm' matches no module"),
        ({"r": 0}, "r is the rank of the adapter and must be a whole number of at least 1, got 0"),
        ({"r": -4}, "got -4"),
        ({"r": 8.0}, "got 8.0"),
        ({"lora_dropout": 1.0}, r"lora_dropout is a probability in \[0, 1\), got 1.0"),
        ({"lora_dropout": -0.1}, r"in \[0, 1\), got -0.1"),
        ({"lora_dropout": float("nan")}, "got nan"),
        ({"lora_alpha": 0}, "lora_alpha must be a number above 0, got 0"),
        ({"lora_alpha": float("nan")}, "got nan"),
        ({"layers_to_transform": 2}, r"layers_to_transform names \[2\], the model has layers 0 to 1"),
        ({"layers_to_transform": [-1, 0]}, r"names \[-1\]"),
        ({"layers_to_transform": []}, "layers_to_transform is empty"),
        ({"layers_to_transform": [1], "target_modules": ["lm_head"]}, "'lm_head' matches no module"),  # as in PEFT
        ({"modules_to_save": ["norm"]}, r"modules_to_save: \['norm'\] cannot be trained whole; 'lm_head'"),
        ({"modules_to_save": ["norm"], "target_modules": "all-linear"}, r"\['norm'\] cannot be trained whole"),
        ({"modules_to_save": ["lm_head"], "target_modules": ["lm_head"]}, r"\['lm_head'\]: either .* not both"),
    ],
)
def test_settings_out_of_range_change_nothing(folder, options, message):
    model = tiny.open_model(folder)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, verbose=False, **options)
    assert model.lora_config is None
    assert not jax.tree.leaves(model.split()[1])
    assert len(model.module.layers) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]},
        {"modules_to_save": ["embed_tokens", "lm_head"], "target_modules": ["q_proj"]},
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["lm_head", "embed_tokens", "q_proj"]},
    ],
)
def test_a_tied_head_is_the_embedding_matrix(tied, options):
    """Either name means the one matrix, which counts once."""
    model = tiny.randomize_adapter(adapted(tied, r=4, **options))
    embedding = model.module.embed_tokens
    assert "embed_tokens" in (model.lora_config.modules_to_save or model.lora_config.target_modules)
    assert "lm_head" not in {*model.lora_config.modules_to_save, *(model.lora_config.target_modules or ())}
    whole = embedding.trained is not None
    trained, _ = parameter_counts(model)
    assert trained == 2 * 2 * 4 * 64 + (tiny.VOCAB * 64 if whole else 4 * (tiny.VOCAB + 64))
    matrix = (
        embedding.trained[...] if whole else embedding.weight[...] + 4.0 * embedding.lora_a[...] @ embedding.lora_b[...]
    )
    x = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    # Float32 sums of 64 products in another order.
    np.testing.assert_allclose(model.module.head().logits(x), x @ np.asarray(matrix).T, rtol=0, atol=1e-4)
    ids = tiny.ids(1, 5)
    np.testing.assert_allclose(embedding(ids, np.float32), np.asarray(matrix)[ids], rtol=0, atol=1e-5)


def test_a_tied_head_takes_no_dropout(tied):
    with pytest.raises(ValueError, match="lora_dropout on embed_tokens is not implemented"):
        adapted(tied, target_modules=["embed_tokens"], lora_dropout=0.1)


def test_a_second_adapter_is_refused(folder):
    model = adapted(folder, r=4)
    with pytest.raises(ValueError, match="has an adapter already; load the base model again"):
        get_peft_model(model, verbose=False)
    assert model.lora_config.r == 4


def test_config_object_and_its_forms(folder):
    config = LoraConfig(r=4, target_modules=["q_proj"], layers_to_transform=1, modules_to_save=["lm_head"])
    assert (config.target_modules, config.layers_to_transform, config.modules_to_save) == (
        ("q_proj",),
        (1,),
        ("lm_head",),
    )
    assert LoraConfig(target_modules=None) == LoraConfig()
    model = get_peft_model(tiny.open_model(folder), config, verbose=False)
    assert model.lora_config == config
    assert modules_with_adapter(model) == in_layers((1,), "q_proj")


# Start.


def test_scale():
    assert LoraConfig(r=8, lora_alpha=32).scale == 4
    assert LoraConfig(r=16, lora_alpha=32, use_rslora=True).scale == 8  # 32 / sqrt(16)


def test_the_scale_reaches_the_product(folder):
    """B = 1 / R: logits of a model with twice alpha, or with rsLoRA, are those of merged weights computed here."""
    for options, scale in (({"lora_alpha": 8}, 2), ({"lora_alpha": 8, "use_rslora": True}, 4)):
        model = tiny.randomize_adapter(adapted(folder, r=4, target_modules=["q_proj"], **options))
        tensors, base = adapter_tensors(model), merged_tensors(tiny.open_model(folder))
        name = "model.layers.1.self_attn.q_proj"
        a, b = (tensors[f"base_model.model.{name}.lora_{x}.weight"].astype(np.float64) for x in "AB")
        want = base[f"{name}.weight"].read() + scale * b @ a
        np.testing.assert_allclose(merged_tensors(model)[f"{name}.weight"].read(), want, atol=1e-6)


def test_start_is_seeded_bounded_and_independent_of_the_other_modules(folder):
    first = adapter_tensors(adapted(folder, random_state=1))
    again = adapter_tensors(adapted(folder, random_state=1))
    other = adapter_tensors(adapted(folder, random_state=2))
    alone = adapter_tensors(adapted(folder, random_state=1, target_modules=["up_proj"]))
    one_layer = adapter_tensors(adapted(folder, random_state=1, layers_to_transform=1))
    seen = []
    for name, tensor in first.items():
        np.testing.assert_array_equal(tensor, again[name])
        for subset in (alone, one_layer):
            if name in subset:
                np.testing.assert_array_equal(tensor, subset[name])
        if "lora_B" in name:
            assert not tensor.any()
            continue
        assert tensor.shape == (16, SHAPES[name.split(".")[-3]][0])
        bound = tensor.shape[1] ** -0.5
        assert np.abs(tensor).max() <= bound
        assert np.abs(tensor).max() > 0.97 * bound  # at least 1024 draws: all below with probability 1e-14
        # Standard deviation of the mean of n uniform numbers in +-bound is bound / sqrt(3 n).
        assert np.abs(tensor.mean()) < 4 * bound / np.sqrt(3 * tensor.size)
        assert (tensor != other[name]).mean() > 0.99
        seen.append(tensor.reshape(-1)[:64])
    assert len({tuple(values) for values in seen}) == len(seen)  # no two modules or layers start alike


def test_parameter_counts_and_what_is_printed(folder, capsys):
    model = get_peft_model(tiny.open_model(folder), r=4)
    trained = 2 * sum(4 * (k + n) for k, n in SHAPES.values())
    base = 2 * (sum(k * n for k, n in SHAPES.values()) + 2 * 64) + 2 * tiny.VOCAB * 64 + 64
    assert parameter_counts(model) == (trained, trained + base) == (8192, 123200)
    assert capsys.readouterr().out == "trainable parameters: 8,192 of 123,200 (6.65%)\n"
    quantized = get_peft_model(tiny.open_model(folder, nf4="nf4-double"), r=4, verbose=False)
    assert parameter_counts(quantized) == (trained, trained + base)  # logical size


# Layer selection.


@pytest.mark.parametrize(
    "nf4", [pytest.param(kind, marks=pytest.mark.rotate(str(kind))) for kind in (None, "nf4-double")]
)
@pytest.mark.parametrize(
    ("layers", "stacks"),
    [
        (0, [(0, 1), (1, 3)]),
        ([1, 2], [(0, 1), (1, 2), (3, 1)]),
        ([3, 0], [(0, 1), (1, 2), (3, 1)]),
        (range(4), [(0, 4)]),
    ],
    ids=["first", "middle", "ends", "all"],
)
def test_layers_to_transform(four_layers, tmp_path, nf4, layers, stacks):
    base = tiny.open_model(four_layers, nf4)
    ids = tiny.ids(2, 12)
    before, weights = np.asarray(base.logits(ids)), {n: t.read() for n, t in merged_tensors(base).items()}
    model = get_peft_model(base, r=4, layers_to_transform=layers, target_modules=["q_proj", "down_proj"], verbose=False)
    assert [(s.first, s.count) for s in model.module.layers] == stacks
    chosen = [layers] if isinstance(layers, int) else sorted(layers)
    assert modules_with_adapter(model) == in_layers(chosen, "q_proj", "down_proj")
    for name, tensor in merged_tensors(model).items():  # cut stacks hold the same layers
        np.testing.assert_array_equal(tensor.read(), weights[name], err_msg=name)
    # B is zero. Cut stacks are other programs, whose sums may differ in their order; logits spread by 2.
    np.testing.assert_allclose(model.logits(ids), before, atol=2e-5)

    model.save_pretrained(tmp_path / "adapter")
    loaded = load_adapter(tiny.open_model(four_layers, nf4), tmp_path / "adapter")
    assert [(s.first, s.count) for s in loaded.module.layers] == stacks
    want = adapter_tensors(model)
    got = adapter_tensors(loaded)
    assert set(got) == set(want)
    for name, tensor in got.items():
        np.testing.assert_array_equal(tensor, want[name])


def test_a_regex_can_choose_layers(four_layers):
    model = adapted(four_layers, target_modules=r"model\.layers\.[02]\.mlp\.up_proj")
    assert modules_with_adapter(model) == in_layers((0, 2), "up_proj")
    assert [(s.first, s.count) for s in model.module.layers] == [(0, 1), (1, 1), (2, 1), (3, 1)]


# Training: gradients.


def batch(seed=0, rows=2, length=16):
    ids = tiny.ids(rows, length, seed)
    return {"input_ids": jnp.asarray(ids), "labels": jnp.asarray(ids)}


def gradients(model):
    graph, lora, frozen = model.split()
    grads = jax.grad(lambda lora: sum_of_losses(graph, lora, frozen, batch())[0])(lora)
    paths = jax.tree_util.tree_leaves_with_path(grads)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in paths}


@pytest.mark.rotate
@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["lm_head", "embed_tokens"], "target_modules": ["q_proj"]},
        {"modules_to_save": ["lm_head"], "target_modules": []},
        {"target_modules": ["lm_head", "embed_tokens", "v_proj"]},
        {"target_modules": "all-linear"},
    ],
    ids=["copies", "head only", "lora on both ends", "all-linear"],
)
def test_every_trained_leaf_has_a_gradient_and_merging_keeps_the_logits(folder, tmp_path, options):
    model = tiny.randomize_adapter(adapted(folder, r=4, **options))
    grads = gradients(model)
    for path, grad in grads.items():
        assert np.isfinite(grad).all(), path
        # Of embeddings only the rows of tokens that occur have one.
        per_layer = np.abs(grad).reshape(grad.shape[0], -1).max(1) if "layers" in path else np.abs(grad).max()
        assert np.all(per_layer > 0), path
    ids = tiny.ids(2, 12)
    moved = np.abs(np.asarray(model.logits(ids)) - np.asarray(tiny.open_model(folder).logits(ids))).max()
    assert moved > 0.1
    model.save_pretrained_merged(tmp_path / "merged", dtype="float32", verbose=False)
    merged = tiny.open_model(tmp_path / "merged")
    # Two ways of adding the same float32 numbers; logits reach 10.
    np.testing.assert_allclose(merged.logits(ids), model.logits(ids), atol=3e-5)


def test_trained_copies_start_as_the_weights_in_float32(tmp_path):
    hf = tiny.config(torch_dtype="bfloat16")
    model = tiny.open_model(tiny.write_folder(tmp_path, hf, tokenizer=False), dtype=jnp.bfloat16)
    get_peft_model(model, modules_to_save=["embed_tokens", "lm_head"], verbose=False)
    for name in ("embed_tokens", "lm_head"):
        module = getattr(model.module, name)
        assert module.trained.get_value().dtype == jnp.float32
        np.testing.assert_array_equal(module.trained.get_value(), module.weight.get_value().astype(jnp.float32))


def test_gradient_of_embeddings_equals_a_finite_difference(folder):
    """Directional derivative in float32: central difference with steps of 1e-3 along a random direction."""
    model = tiny.randomize_adapter(adapted(folder, r=4, target_modules=["embed_tokens", "lm_head"]))
    graph, lora, frozen = model.split()
    loss = jax.jit(lambda lora: sum_of_losses(graph, lora, frozen, batch())[0])
    rng = np.random.default_rng(1)
    direction = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), lora)
    grads = jax.grad(loss)(lora)
    got = sum(jax.tree.leaves(jax.tree.map(lambda g, d: float(jnp.vdot(g, d)), grads, direction)))
    step = 1e-3
    ends = [float(loss(jax.tree.map(lambda x, d, s=s: x + s * d, lora, direction))) for s in (step, -step)]
    # The loss is some 150 nats, so its difference carries an error of about 1e-5 / 2e-3; third derivatives are smaller.
    assert got == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-2, abs=0.05)


# Dropout.


def test_dropout_follows_the_seed_in_training_and_is_off_in_evaluation(folder):
    model = tiny.randomize_adapter(adapted(folder, r=4, lora_dropout=0.5))
    _, lora, frozen = model.split()
    optimizer = optax.sgd(0.0)
    step = make_train_step(model, optimizer)

    def loss(seed):
        copy = jax.tree.map(jnp.copy, lora)  # the step takes its arguments for good
        stacked = {name: x[None] for name, x in batch().items()} | {"seed": jnp.uint32(seed)}
        return float(step(copy, optimizer.init(copy), frozen, stacked)[2]["loss"])

    losses = [loss(seed) for seed in (1, 2, 3)]
    assert loss(1) == losses[0]
    assert len(set(losses)) == 3
    evaluated = make_eval_step(model)(lora, frozen, batch())
    plain = tiny.randomize_adapter(adapted(folder, r=4))
    want = make_eval_step(plain)(plain.split()[1], frozen, batch())
    assert float(evaluated["loss_sum"]) == float(want["loss_sum"])
    assert int(evaluated["num_label_tokens"]) == 30
    assert all(abs(value - float(want["loss_sum"]) / 30) > 1e-4 for value in losses)


def test_dropout_on_the_head_is_refused(folder):
    with pytest.raises(ValueError, match="lora_dropout on lm_head is not implemented"):
        get_peft_model(tiny.open_model(folder), target_modules=["lm_head"], lora_dropout=0.1, verbose=False)
