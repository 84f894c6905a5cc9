"""DoRA, rsLoRA, LoRA+, PiSSA, OLoRA, LoftQ, ranks by pattern, trained embeddings and head: here and against PEFT."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_jax import LoraConfig, SFTConfig, get_peft_model, load_adapter
from lora_jax.export.merge import merged_tensors
from lora_jax.export.peft import adapter_tensors
from lora_jax.optim import make_optimizer
from lora_jax.step import sum_of_losses, train_step
from tests import tiny

PATTERNS: dict[str, Any] = {
    "rank_pattern": {"q_proj": 2, r"layers\.1\..*\.up_proj": 8},
    "alpha_pattern": {"v_proj": 3, "model.layers.0.self_attn.o_proj": 5},
}
KINDS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "dora, rslora": {"use_dora": True, "use_rslora": True},
    "rslora": {"use_rslora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter_16": {"init_lora_weights": "pissa_niter_16"},
    "pissa, rslora, patterns": {"init_lora_weights": "pissa", "use_rslora": True, **PATTERNS},
    "olora": {"init_lora_weights": "olora"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "patterns": PATTERNS,
    "dora, patterns": {"use_dora": True, **PATTERNS},
    "some layers": {"layers_to_transform": [1], "layers_pattern": "layers", "use_dora": True},
    "copies": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "ends": {"target_modules": ["embed_tokens", "lm_head", "v_proj"]},
    "loraplus": {"loraplus_lr_ratio": 8.0},
    "loraplus, dora": {"loraplus_lr_ratio": 8.0, "use_dora": True},
}
FROM_WEIGHT = ("pissa", "olora")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.write_folder(tmp_path_factory.mktemp("tiny") / "model", tokenizer=False)


def adapted(folder: Path, nf4: str | None = None, **options):
    options = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"} | options
    options.pop("loraplus_lr_ratio", None)
    return get_peft_model(tiny.open_model(folder, nf4), verbose=False, **options)


# Here: start, export and merge.


ALWAYS = ("dora, patterns", "pissa, rslora, patterns", "olora")
SOMETIMES = [k for k in KINDS if "loraplus" not in k and k not in ("rslora", "copies", "ends", *ALWAYS)]


@pytest.mark.parametrize("nf4", [None, pytest.param("nf4-double", marks=pytest.mark.slow)], ids=["f32", "nf4"])
@pytest.mark.parametrize("kind", [*ALWAYS, *(pytest.param(kind, marks=pytest.mark.slow) for kind in SOMETIMES)])
def test_start_export_and_merge(folder, tmp_path, kind, nf4):
    """A fresh adapter changes nothing; one that was trained is the same model after saving, loading and merging."""
    ids = tiny.ids(2, 17)
    base = np.asarray(tiny.open_model(folder, nf4).logits(ids))
    model = adapted(folder, nf4, **KINDS[kind])
    # Float32 through two layers; logits spread by 2, and the terms that cancel are as large as the weights.
    np.testing.assert_allclose(model.logits(ids), base, rtol=0, atol=5e-5)
    tiny.randomize_adapter(model, scale=0.05)
    trained = np.asarray(model.logits(ids))
    assert np.abs(trained - base).max() > 0.5
    saved = model.save_pretrained(tmp_path / "adapter")
    loaded = load_adapter(tiny.open_model(folder, nf4), saved)
    np.testing.assert_array_equal(loaded.logits(ids), trained)
    written = json.loads((saved / "adapter_config.json").read_text())
    assert written["init_lora_weights"] is True
    assert written["r"] == (8 if "pissa" in kind or kind == "olora" else 4)
    merged = model.save_pretrained_merged(tmp_path / "merged", dtype="float32", verbose=False)
    np.testing.assert_allclose(tiny.open_model(merged).logits(ids), trained, rtol=0, atol=1e-4)


def test_dora_norms_are_those_of_the_sum(folder):
    """gain = m / ||W + s (A B)^T||, against float64 from the weights, dense and in NF4."""
    for nf4 in (None, "nf4"):
        model = tiny.randomize_adapter(adapted(folder, nf4, use_dora=True, use_rslora=True), scale=0.3)
        weights = merged_tensors(tiny.open_model(folder, nf4))
        tensors = adapter_tensors(model)
        for name in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
            a, b, m = (
                tensors[f"base_model.model.{name}.{part}"].astype(np.float64)
                for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
            )
            total = weights[f"{name}.weight"].read() + 6 / 2 * b @ a
            want = m[:, None] * total / np.linalg.norm(total, axis=1, keepdims=True)
            # Rows of norm 1.5; the norms come from the binomial formula, in float32.
            np.testing.assert_allclose(merged_tensors(model)[f"{name}.weight"].read(), want, rtol=0, atol=1e-6)
            block = model.module.layers[0]
            linear = getattr(block.self_attn, "k_proj", None) if "k_proj" in name else block.mlp.down_proj
            index = int(name.split(".")[2])
            one = jax.tree.map(lambda leaf, i=index: leaf[i], linear)
            x = np.random.default_rng(1).normal(size=(5, a.shape[1]))
            np.testing.assert_allclose(one(jnp.asarray(x, jnp.float32)), x @ want.T, rtol=0, atol=3e-5)


def test_the_start_of_pissa_is_the_principal_part(folder):
    tensors = adapter_tensors(adapted(folder, init_lora_weights="pissa"))
    fast = adapter_tensors(adapted(folder, init_lora_weights="pissa_niter_16"))
    weights = merged_tensors(tiny.open_model(folder))
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        u, s, vt = np.linalg.svd(weights[f"{name}.weight"].read().astype(np.float64), full_matrices=False)
        want = (u[:, :4] * s[:4]) @ vt[:4]
        for found, error in ((tensors, 1e-5), (fast, 1e-2)):  # random matrices have no gap in their spectrum
            a, b = (found[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
            assert np.abs(6 / 4 * b[:, :4] @ a[:4] - want).max() < error
            np.testing.assert_array_equal(a[4:], a[:4])
            np.testing.assert_array_equal(b[:, 4:], -b[:, :4])


def test_loftq_starts_nearer_to_the_original(folder):
    model = adapted(folder, "nf4", init_lora_weights="loftq", r=16)
    quantized, original = (merged_tensors(tiny.open_model(folder, nf4)) for nf4 in ("nf4", None))
    for name, tensor in merged_tensors(model).items():
        if not name.endswith("proj.weight"):
            continue
        want, without = original[name].read(), quantized[name].read()
        singular = np.linalg.svd(want - without, compute_uv=False)
        # The best approximation of what is missing leaves the other singular values.
        np.testing.assert_allclose(
            np.linalg.norm(want - tensor.read()), np.linalg.norm(singular[16:]), rtol=1e-3, err_msg=name
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_lora_weights": "pisa"}, "init_lora_weights='pisa' .* True, 'gaussian'.* Did you mean 'pissa'"),
        ({"init_lora_weights": "eva"}, r"'eva' is not supported \(it needs activations of your data\)"),
        ({"init_lora_weights": False}, "starts with a random B"),
        ({"init_lora_weights": "pissa", "lora_dropout": 0.1}, "the adapter is the principal part"),
        ({"init_lora_weights": "pissa", "use_dora": True}, "not implemented together"),
        ({"init_lora_weights": "pissa", "r": 33}, r"k_proj is \[N, K\] = \[32, 64\] and has no 33 singular"),
        ({"init_lora_weights": "loftq"}, "this model has none in NF4"),
        ({"loftq_config": {"loftq_iter": 1}}, 'loftq_config is for init_lora_weights="loftq"'),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 5}}, "further iterations change the base"),
        ({"use_dora": True, "target_modules": ["lm_head"]}, "use_dora=True is not implemented for lm_head"),
        ({"use_dora": True, "target_modules": ["embed_tokens"]}, "is not implemented for model.embed_tokens"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\] is the rank"),
        ({"layers_pattern": "blocks"}, "the list of layers is called 'layers'"),
        ({"bias": "all"}, "bias='all' is not supported: biases stay frozen"),
        ({"qat_scheme": "int4"}, "quantisation-aware training is not implemented"),
    ],
)
def test_refusals_change_nothing(folder, options, message):
    model = tiny.open_model(folder)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, verbose=False, **options)
    assert model.lora_config is None
    assert not jax.tree.leaves(model.split()[1])


def test_other_libraries_arguments_of_get_peft_model(folder, capsys):
    model = tiny.open_model(folder)
    unsloth: dict[str, Any] = {"bias": "none", "use_gradient_checkpointing": "unsloth", "loftq_config": None}
    get_peft_model(model, r=4, max_seq_length=64, task_type="CAUSAL_LM", verbose=False, **unsloth)
    assert "get_peft_model: max_seq_length has no effect: it was given to from_pretrained" in capsys.readouterr().err
    with pytest.raises(TypeError, match="unknown argument 'lora_aplha'. Did you mean 'lora_alpha'"):
        get_peft_model(tiny.open_model(folder), lora_aplha=3)
    with pytest.raises(TypeError, match="LoraConfig: unknown argument 'target_module'. Did you mean 'target_modules'"):
        LoraConfig(target_module=["q_proj"])


def test_a_step_of_lora_plus_moves_b_further(folder):
    """One step of plain SGD would not do: AdamW's first step has the size of the rate, whatever the gradient."""
    model = tiny.randomize_adapter(adapted(folder, use_dora=True, modules_to_save=["lm_head"]), scale=0.05)
    config = SFTConfig(learning_rate=1e-3, lr_scheduler_type="constant", loraplus_lr_ratio=4.0)
    config = dataclasses.replace(config, embedding_learning_rate=1e-4)
    optimizer, _ = make_optimizer(config, 10)
    graph, lora, frozen = model.split()
    ids = jnp.asarray(tiny.ids(2, 16))[None]
    options: Any = {"graph": graph, "optimizer": optimizer}
    new, _, _ = train_step(lora, optimizer.init(lora), frozen, {"input_ids": ids, "labels": ids}, **options)
    moved = jax.tree_util.tree_map_with_path(lambda path, a, b: float(np.median(np.abs(a - b))), new, lora)
    for path, size in jax.tree_util.tree_leaves_with_path(moved):
        place = jax.tree_util.keystr(path)
        want = 1e-4 if "trained" in place else 1e-3 if "lora_a" in place else 4e-3
        # Adam's epsilon takes a little off where gradients are small.
        np.testing.assert_allclose(size, want, rtol=0.02, err_msg=place)


# Against PEFT.


def batches(steps: int, length: int = 24) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(7).integers(0, 256, (steps, 1, 3, length)).astype(np.int64)
    ids[:, :, :, 1::2] = (ids[:, :, :, 0::2] * 7 + 3) % 256  # something to learn
    return {"input_ids": ids, "labels": ids, "attention_mask": np.ones_like(ids)}


def signs(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], rank: int) -> dict[str, np.ndarray]:
    """By module, which rows of A have the other sign: singular vectors have none of their own."""
    found = {}
    for name, a in theirs.items():
        if name.endswith("lora_A.weight"):
            found[name.removesuffix("lora_A.weight")] = np.sign(np.sum(ours[name][: len(a)] * a, axis=1))
    return found


@pytest.mark.oracle
@pytest.mark.rotate
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "pissa_niter_16"])  # which draws random numbers
def test_training_equals_peft(folder, oracle, tmp_path, kind):
    """First gradients, the loss of every step, and what PEFT makes of our export, to 1e-4."""
    options, steps, lr = dict(KINDS[kind]), 4, 2e-3
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    options.setdefault("target_modules", names)
    start = options.get("init_lora_weights", "default")
    model = adapted(folder, **options)
    data = batches(steps)
    np.savez(tmp_path / "batches.npz", **data)
    settings = {"lr": lr, "weight_decay": 0.01, "eps": 1e-8, "betas": [0.9, 0.999], "r": 4, "alpha": 6, **options}
    if kind == "copies":
        settings["ensure_weight_tying"] = False
    (tmp_path / "config.json").write_text(json.dumps(settings))
    arguments: list[Any] = [folder, tmp_path / "config.json", tmp_path / "batches.npz", tmp_path / "peft"]
    if start not in FROM_WEIGHT:  # those change PEFT's base, so PEFT has to start by itself
        model.save_pretrained(tmp_path / "start")
        arguments += ["--init-dir", tmp_path / "start"]
    oracle("peft_train.py", *arguments)

    ratio = options.get("loraplus_lr_ratio")
    config = SFTConfig(learning_rate=lr, lr_scheduler_type="constant", weight_decay=0.01, max_grad_norm=0)
    config = dataclasses.replace(config, loraplus_lr_ratio=ratio)
    optimizer, _ = make_optimizer(config, steps)
    graph, lora, frozen = model.split()
    lora = jax.tree.map(jnp.copy, lora)  # the model gets the gradients in their place, to name them
    rank = model.lora_config.r

    first = {name: jnp.asarray(data[name][0, 0]) for name in ("input_ids", "labels")}
    grads = jax.grad(lambda lora: jnp.divide(*sum_of_losses(graph, lora, frozen, first)))(lora)
    begun = adapter_tensors(model)
    model.update_lora(grads)
    ours = adapter_tensors(model)
    theirs = {name.removesuffix("_vector.weight") + "_vector" * name.endswith("_vector.weight"): g for name, g in
              load_file(tmp_path / "peft" / "first_grads.safetensors").items()}  # fmt: skip
    theirs = {name.replace(".modules_to_save", ""): g for name, g in theirs.items()}
    flips = {}
    if start in FROM_WEIGHT:
        flips = signs(begun, load_file(tmp_path / "peft" / "init" / "adapter_model.safetensors"), rank)
    assert set(ours) == set(theirs)
    for name, want in theirs.items():
        got = ours[name]
        if start in FROM_WEIGHT:
            flip = flips[name.partition("lora_")[0]]
            got = got[: len(want)] * flip[:, None] if "lora_A" in name else got[:, : want.shape[1]] * flip
        error = np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-8)
        assert error < 1e-4, (name, error)

    model.update_lora(lora)
    opt_state, losses = optimizer.init(lora), []
    how: Any = {"graph": graph, "optimizer": optimizer}
    step = jax.jit(lambda lora, opt_state, batch: train_step(lora, opt_state, frozen, batch, **how))
    for i in range(steps):
        batch = {name: jnp.asarray(data[name][i]) for name in ("input_ids", "labels")}
        lora, opt_state, metrics = step(lora, opt_state, batch)
        losses.append(float(metrics["loss"]))
    want = np.load(tmp_path / "peft" / "losses.npy")
    assert np.abs(np.array(losses) - want).max() <= 1e-4

    model.update_lora(lora)
    model.save_pretrained(tmp_path / "adapter")
    ids = tiny.ids(1, 40, seed=3)[0].astype(np.int64)
    np.savez(tmp_path / "in.npz", prompt_0=ids)
    oracle("hf_logits.py", folder, tmp_path / "in.npz", tmp_path / "out.npz", "--adapter", tmp_path / "adapter")
    logits = np.load(tmp_path / "out.npz")["prompt_0"]
    assert np.abs(np.asarray(model.logits(ids[None]))[0] - logits).max() <= 1e-4
    assert np.abs(np.asarray(tiny.open_model(folder).logits(ids[None]))[0] - logits).max() > 0.01
