"""Every family against transformers and PEFT, on small random models that tests/oracles/families.py writes."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_jax.export.merge import merged_tensors
from lora_jax.export.peft import adapter_tensors, load_adapter
from lora_jax.hf_checkpoint import Checkpoint
from lora_jax.model import CausalLM
from lora_jax.step import sum_of_losses
from tests import tiny

FAMILIES = ["llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gemma3-image", "phi3", "olmo2", "olmo3", "smollm3"]
FAMILIES += ["granite", "mistral", "mistral-image", "glm4", "exaone4", "seed-oss", "llama-dynamic"]
MOE_FAMILIES = ["mixtral", "qwen2-moe", "qwen3-moe", "gpt-oss", "deepseek-v2", "deepseek-v3"]  # by moe_families.py
FAMILIES += MOE_FAMILIES
BALANCED = [name for name in MOE_FAMILIES if "deepseek" not in name]  # those whose class has a loss that balances
COUNT = 4  # configurations of a family

one_of_all = [
    pytest.mark.oracle,
    pytest.mark.rotate,
    pytest.mark.parametrize(("family", "seed"), [(family, seed) for family in FAMILIES for seed in range(COUNT)]),
]


def each_configuration(test):
    for mark in one_of_all:
        test = mark(test)
    return test


@pytest.fixture(scope="session")
def written(oracle, tmp_path_factory):
    """written(family, seed) -> folder; one process of transformers a family."""

    @functools.cache
    def write(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family)
        script = "moe_families.py" if family in MOE_FAMILIES else "families.py"
        oracle(script, folder, family, "--count", COUNT)
        return folder

    return lambda family, seed: write(family) / str(seed)


@each_configuration
def test_logits_equal_transformers(written, family, seed):
    folder = written(family, seed)
    arrays = np.load(folder / "arrays.npz")
    model = tiny.open_model(folder / "model")
    for i in range(2):
        got = np.asarray(model.logits(arrays[f"prompt_{i}"][None]))[0]
        want = arrays[f"logits_{i}"]
        assert want.std() > 0.5
        # Float32 through up to six layers; logits spread by 2.
        assert np.abs(got - want).max() < 1e-4


def loss_and_gradients(
    model: CausalLM, batch: dict[str, np.ndarray], **options
) -> tuple[float, int, dict[str, np.ndarray]]:
    """Sum of the losses, number of label tokens, and the gradient of the sum under PEFT's names."""
    graph, lora, frozen = model.split()
    arrays = {name: jnp.asarray(array, jnp.int32) for name, array in batch.items()}

    @jax.jit
    def run(lora):
        return jax.value_and_grad(lambda lora: sum_of_losses(graph, lora, frozen, arrays, **options), has_aux=True)(
            lora
        )

    before = jax.tree.map(jnp.copy, lora)
    (loss, count), grads = run(lora)
    model.update_lora(grads)
    tensors = adapter_tensors(model)
    model.update_lora(before)
    return float(loss), int(count), tensors


@each_configuration
def test_gradients_equal_peft(written, family, seed):
    folder = written(family, seed)
    arrays = np.load(folder / "arrays.npz")
    model = load_adapter(tiny.open_model(folder / "model"), folder / "adapter")
    loss, count, got = loss_and_gradients(model, {name: arrays[name] for name in ("input_ids", "labels")})
    assert loss / count == pytest.approx(float(arrays["loss"]), rel=1e-5)
    want = load_file(folder / "grads.safetensors")
    assert set(got) == set(want)
    for name, tensor in want.items():
        # Float32 sums over 90 tokens and up to six layers.
        assert np.linalg.norm(got[name] / count - tensor) <= 1e-4 * np.linalg.norm(tensor), name
        unused = ".experts." in name and not tensor.any()  # no token went to this expert
        assert unused or np.linalg.norm(tensor) > 1e-6, name


@pytest.mark.oracle
@pytest.mark.rotate
@pytest.mark.parametrize(("family", "seed"), [(f, seed) for f in BALANCED for seed in range(COUNT)])
def test_balancing_experts_equals_transformers(written, family, seed):
    folder = written(family, seed)
    arrays, balanced = np.load(folder / "arrays.npz"), np.load(folder / "balanced.npz")
    model = load_adapter(tiny.open_model(folder / "model"), folder / "adapter")
    batch = {name: arrays[name] for name in ("input_ids", "labels")} | {"attention_mask": balanced["attention_mask"]}
    loss, count, got = loss_and_gradients(model, batch, router_aux_loss_coef=1.0)
    assert loss / count == pytest.approx(float(balanced["loss"]), rel=1e-5)
    assert loss / count > float(arrays["loss"]) + 1  # it is at least about k
    want, without = load_file(folder / "balanced.safetensors"), load_file(folder / "grads.safetensors")
    assert set(got) == set(want)
    for name, tensor in want.items():
        # Float32 sums over 90 tokens and up to six layers.
        assert np.linalg.norm(got[name] / count - tensor) <= 1e-4 * np.linalg.norm(tensor), name
    # Far more than the tolerance, where the loss reaches at all.
    changes = [np.linalg.norm(want[n] - without[n]) / np.linalg.norm(want[n]) for n in want if ".0.self_attn." in n]
    assert np.median(changes) > 1e-2


@each_configuration
def test_packed_rows_equal_their_documents(written, family, seed):
    folder = written(family, seed)
    model = load_adapter(tiny.open_model(folder / "model"), folder / "adapter")
    rng = np.random.default_rng(seed)
    lengths = (19, 41, 6)  # shorter and longer than windows and contexts
    documents = [rng.integers(0, 256, n) for n in lengths]
    packed = {
        "input_ids": np.concatenate(documents),
        "labels": np.concatenate([np.r_[-100, d[1:]] for d in documents]),
        "positions": np.concatenate([np.arange(n) for n in lengths]),
        "segment_start": np.repeat([0, 19, 60], lengths),
    }
    # One document a row, with padding at the end that counts as a document of its own.
    rows = {name: np.zeros((3, max(lengths)), int) for name in ("input_ids", "labels", "positions")}
    rows["labels"] -= 100
    for i, (n, document) in enumerate(zip(lengths, documents, strict=True)):
        rows["input_ids"][i, :n], rows["labels"][i, :n], rows["positions"][i, :n] = document, document, np.arange(n)
    got_loss, got_count, got = loss_and_gradients(model, {name: array[None] for name, array in packed.items()})
    want_loss, want_count, want = loss_and_gradients(model, rows)
    # Sums of the same float32 terms in another order.
    assert (got_loss, got_count) == (pytest.approx(want_loss, rel=1e-5), want_count)
    for name in got:
        assert np.linalg.norm(got[name] - want[name]) <= 1e-4 * np.linalg.norm(want[name]), name


@each_configuration
def test_greedy_tokens_equal_transformers(written, family, seed):
    folder = written(family, seed)
    arrays, want = np.load(folder / "arrays.npz"), json.loads((folder / "greedy.json").read_text())
    model = tiny.open_model(folder / "model")
    prompts = [arrays["prompt_0"][:25].tolist(), arrays["prompt_1"].tolist()]
    out = model.generate(prompts, max_new_tokens=12, eos_token_id=[])
    for prompt, row, tokens, margins in zip(prompts, out, want["tokens"], want["margins"], strict=True):
        for i, (wanted, margin) in enumerate(zip(tokens, margins, strict=True)):
            if margin < 1e-3:  # two tokens as good as equal: rounding decides, and the rest may differ
                break
            assert row[25 + i] == wanted
            # Without a cache.
            ids = np.zeros((1, 64), int)
            so_far = [*prompt, *tokens[:i]]
            ids[0, 64 - len(so_far) :] = so_far
            mask = np.arange(64)[None] >= 64 - len(so_far)
            assert np.argmax(np.asarray(model.logits(ids, mask))[0, -1]) == wanted


@each_configuration
def test_saved_folder_holds_the_same_tensors(written, family, seed, tmp_path):
    folder = written(family, seed) / "model"
    model = tiny.open_model(folder)
    model.save_pretrained_merged(tmp_path / "saved", dtype="float32", verbose=False)
    source, saved = Checkpoint(folder), Checkpoint(tmp_path / "saved")
    assert sorted(saved.names) == sorted(source.names)
    for name in source.names:
        np.testing.assert_array_equal(saved.read(name), source.read(name), err_msg=name)
    assert (tmp_path / "saved" / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert {name: t.shape for name, t in merged_tensors(model).items()}.keys() <= set(source.names)
