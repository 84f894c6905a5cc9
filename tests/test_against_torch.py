"""The whole path against transformers, PEFT and bitsandbytes, on tiny random models and on SmolLM2."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax
import lora_jax.export.peft
import lora_jax.lora
from lora_jax.export.merge import merged_tensors
from lora_jax.hf_checkpoint import Checkpoint
from lora_jax.kernels.nf4 import NF4Weight, dequantize, quantize
from lora_jax.kernels.nf4.format import CODE, dequantize_absmax, nested_code
from lora_jax.model import CausalLM
from tests import tiny

pytestmark = pytest.mark.oracle

KINDS = [
    "llama",
    "llama1",
    "llama-h96",
    "llama-h40",
    "llama-rope-llama3",
    "llama-rope-linear",
    "llama-rope-dynamic",
    "llama-rope-yarn",
    "llama-rope-yarn-options",
    "llama-bias",
    "llama-tied",
    "mistral",
    "mistral-nemo",
]
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Once upon a time, in a village between two rivers, there lived a clockmaker who",
]


@pytest.fixture(scope="module", params=["transformers 5", "hub"])
def tiny_models(request, tmp_path_factory, oracle) -> tuple[Path, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(folder of all tiny models, inputs, transformers' logits), with config.json in one of its two forms."""
    folder = tmp_path_factory.mktemp("tiny")
    classic = ["--classic", "--max-shard-size", "50KB"] if request.param == "hub" else []
    oracle("tiny_models.py", folder / "models", "--all", *classic)
    rng = np.random.default_rng(0)
    inputs = {"prompt_0": rng.integers(0, 256, 100), "prompt_1": rng.integers(0, 256, 7)}
    mask = np.ones((2, 60), np.int64)
    mask[0, :23] = 0
    inputs |= {"padded_ids": rng.integers(0, 256, (2, 60)), "padded_mask": mask}
    np.savez(folder / "in.npz", **inputs)
    oracle("hf_logits.py", folder / "models", folder / "in.npz", folder / "out.npz", "--each")
    return folder / "models", inputs, dict(np.load(folder / "out.npz"))


@pytest.mark.parametrize("kind", KINDS)
def test_tiny_models_equal_transformers(tiny_models, kind):
    folder, inputs, want = tiny_models
    model = tiny.open_model(folder / kind)
    # Logits spread by 2; float32 through two or three layers of width 64 leaves some 1e-6, at most 1.8e-5 on either
    # side (llama-tied, against float64).
    for name in ("prompt_0", "prompt_1"):
        got = np.asarray(model.logits(inputs[name][None]))[0]
        assert np.abs(got - want[f"{kind}/{name}"]).max() < 4e-5
    if kind == "llama-rope-dynamic":
        return  # transformers stretches by the longest row of the batch with its padding, we without
    got = np.asarray(model.logits(inputs["padded_ids"], inputs["padded_mask"]))
    real = inputs["padded_mask"] == 1
    assert np.abs(got - want[f"{kind}/padded_logits"])[real].max() < 4e-5


@pytest.fixture(scope="module")
def smol(smollm2):
    return lora_jax.from_pretrained(smollm2, load_in_4bit=False, dtype="float32", progress=False)


def long_text() -> str:
    """English of some 2,500 tokens that no model has seen."""
    rng = np.random.default_rng(5)
    who, did, what = (
        ["The baker", "My neighbour", "An engineer", "Her sister"],
        ["sold", "found", "painted"],
        ["a boat", "two clocks", "the old fence"],
    )
    when = ["in March", "before breakfast", "after the storm", "on a Tuesday"]
    return " ".join(
        f"{rng.choice(who)} {rng.choice(did)} {rng.choice(what)} {rng.choice(when)}, "
        f"and {rng.integers(2, 99)} people came to see it."
        for _ in range(130)
    )


@pytest.mark.turns("long runs of torch")
def test_smollm2_logits_equal_transformers(smol, smollm2, oracle, tmp_path):
    model, tokenizer = smol
    inputs = {f"prompt_{i}": np.array(tokenizer(text)["input_ids"]) for i, text in enumerate(PROMPTS)}
    inputs["prompt_3"] = np.array(tokenizer(long_text())["input_ids"])
    assert len(inputs["prompt_3"]) >= 2048
    rows = [inputs["prompt_0"], inputs["prompt_2"]]
    width = max(map(len, rows))
    inputs["padded_ids"] = np.stack([np.pad(row, (width - len(row), 0)) for row in rows])
    inputs["padded_mask"] = np.stack([np.pad(np.ones_like(row), (width - len(row), 0)) for row in rows])
    np.savez(tmp_path / "in.npz", **inputs)
    oracle("hf_logits.py", smollm2, tmp_path / "in.npz", tmp_path / "out.npz")
    want = np.load(tmp_path / "out.npz")
    worst = {}
    for name in ("prompt_0", "prompt_1", "prompt_2", "prompt_3"):
        worst[name] = np.abs(np.asarray(model.logits(inputs[name][None]))[0] - want[name]).max()
    got = np.asarray(model.logits(inputs["padded_ids"], inputs["padded_mask"]))
    worst["padded"] = np.abs(got - want["padded_logits"])[inputs["padded_mask"] == 1].max()
    print("largest difference of a logit:", worst)
    # Logits reach 40. transformers' own float32 result is up to 1.7e-4 away from its float64 result.
    assert max(worst.values()) <= 2e-4


@pytest.mark.turns("long runs of torch")
def test_greedy_generation_equals_transformers(smol, smollm2, oracle, tmp_path):
    model, tokenizer = smol
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    request = {"prompts": prompts, "max_new_tokens": 24, "batched": True, "eos_token_id": []}
    (tmp_path / "in.json").write_text(json.dumps(request))
    oracle("hf_generate.py", smollm2, tmp_path / "in.json", tmp_path / "out.json")
    want = json.loads((tmp_path / "out.json").read_text())
    out = model.generate(prompts, max_new_tokens=24, eos_token_id=[])
    for row, tokens, margins in zip(out[:, max(map(len, prompts)) :], want["tokens"], want["margins"], strict=True):
        for got, wanted, margin in zip(row, tokens, margins, strict=True):
            if margin < 1e-3:  # two tokens as good as equal: rounding decides, and the rest may differ
                break
            assert got == wanted


# Training


def batches_of_text(tokenizer, steps: int, micro: int, rows: int, length: int) -> dict[str, np.ndarray]:
    """Padded rows of text, a third of their labels masked."""
    ids = np.array(tokenizer(long_text())["input_ids"])
    rng = np.random.default_rng(1)
    shape = (steps, micro, rows, length)
    input_ids, labels, mask = np.zeros(shape, np.int32), np.full(shape, -100, np.int32), np.zeros(shape, np.int32)
    for where in np.ndindex(shape[:3]):
        n, start = rng.integers(length // 2, length + 1), rng.integers(0, len(ids) - length)
        input_ids[where][:n] = ids[start : start + n]
        labels[where][:n] = np.where(rng.random(n) < 1 / 3, -100, ids[start : start + n])
        mask[where][:n] = 1
    return {"input_ids": input_ids, "labels": labels, "attention_mask": mask}


@pytest.mark.rotate
@pytest.mark.parametrize("quantized", [False, True], ids=["lora", "qlora"])
def test_twenty_steps_equal_peft(quantized, smollm2, oracle, tmp_path):
    """Same start, same batches, AdamW: the loss at every step, and the adapter at the end."""
    model, tokenizer = lora_jax.from_pretrained(smollm2, load_in_4bit=quantized, dtype="float32", progress=False)
    lora_jax.get_peft_model(model, r=8, lora_alpha=16, verbose=False)
    lora_jax.export.peft.save_adapter(model, tmp_path / "start")
    # Linear warm-up and decay, as in real runs. Adam divides by the size of the gradient, so where a first gradient is
    # near zero the rounding of either library decides a whole step's sign: at full rate from the first step on, a few
    # elements drift so far that some tensors differ by 4e-3 (and two roundings of ours by 1e-3).
    rates = [1e-3 * min(i, 20 - i) / 10 for i in range(20)]
    settings = {"lr": rates, "weight_decay": 0.01, "eps": 1e-8, "betas": [0.9, 0.999]}
    targets = list(lora_jax.lora.DEFAULT_TARGETS)
    (tmp_path / "config.json").write_text(json.dumps({"r": 8, "alpha": 16, "target_modules": targets, **settings}))
    # One micro-batch where weights are decoded for each, which takes most of the time.
    batches = batches_of_text(tokenizer, steps=20, micro=1 if quantized else 2, rows=2, length=48)
    np.savez(tmp_path / "batches.npz", **batches)
    base = []
    if quantized:  # PEFT trains on exactly the weights that our NF4 base stands for
        weights = {n: t.read() for n, t in merged_tensors(model).items() if n.endswith("proj.weight")}
        save_file(weights, tmp_path / "base.safetensors")
        base = ["--base-weights", tmp_path / "base.safetensors"]
    files = (smollm2, tmp_path / "config.json", tmp_path / "batches.npz", tmp_path / "peft")
    oracle("peft_train.py", *files, "--init-dir", tmp_path / "start", *base, timeout=1200)

    optimizer = optax.adamw(lambda step: jnp.asarray(rates)[step], eps=1e-8, weight_decay=0.01)
    step = lora_jax.make_train_step(model, optimizer)
    _, lora, frozen = model.split()
    opt_state, losses, norms = optimizer.init(lora), [], []
    for i in range(20):
        batch = {name: jnp.asarray(batches[name][i]) for name in ("input_ids", "labels")}
        lora, opt_state, metrics = step(lora, opt_state, frozen, batch)
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
    model.update_lora(lora)

    want = np.load(tmp_path / "peft" / "losses.npy")
    print("losses", losses[0], losses[-1], "largest difference", np.abs(losses - want).max())
    assert want[-1] < want[0] - 0.3  # it learns, so the comparison means something
    assert np.abs(losses - want).max() <= 1e-4
    # Before the two sides have drifted apart: a spike in a later step magnifies what differs.
    np.testing.assert_allclose(norms[:5], np.load(tmp_path / "peft" / "grad_norms.npy")[:5], rtol=1e-4)
    ours, theirs = (
        lora_jax.export.peft.adapter_tensors(model),
        load_file(tmp_path / "peft/adapter/adapter_model.safetensors"),
    )
    assert set(ours) == set(theirs)
    errors = {name: np.linalg.norm(ours[name] - theirs[name]) / np.linalg.norm(theirs[name]) for name in ours}
    worst = max(errors, key=errors.__getitem__)
    median = float(np.median(list(errors.values())))
    print("worst tensor", worst, errors[worst], "median", median)
    assert errors[worst] <= 1e-3


@pytest.fixture(scope="module")
def adapted(smollm2):
    """SmolLM2 in NF4 with an adapter that matters."""
    model, tokenizer = lora_jax.from_pretrained(smollm2, dtype="float32", progress=False)
    lora_jax.get_peft_model(model, r=8, lora_alpha=16, verbose=False)
    _, lora, _ = model.split()
    keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(lora))))
    model.update_lora(jax.tree.map(lambda x: 0.02 * jax.random.normal(next(keys), x.shape), lora))
    return model, tokenizer


@pytest.mark.turns("long runs of torch")
def test_peft_loads_our_adapter(adapted, smollm2, oracle, tmp_path):
    model, tokenizer = adapted
    ids = np.array(tokenizer(PROMPTS[2])["input_ids"])
    np.savez(tmp_path / "in.npz", prompt_0=ids)
    weights = {n: t.read() for n, t in merged_tensors(_without_adapter(smollm2)).items() if n.endswith("proj.weight")}
    save_file(weights, tmp_path / "base.safetensors")
    model.save_pretrained(tmp_path / "adapter")
    arguments = (smollm2, tmp_path / "in.npz", tmp_path / "out.npz", "--base-weights", tmp_path / "base.safetensors")
    oracle("hf_logits.py", *arguments)
    base = np.load(tmp_path / "out.npz")["prompt_0"]
    oracle("hf_logits.py", *arguments, "--adapter", tmp_path / "adapter")
    want = np.load(tmp_path / "out.npz")["prompt_0"]
    got = np.asarray(model.logits(ids[None]))[0]
    print("difference", np.abs(got - want).max(), "effect of the adapter", np.abs(want - base).max())
    # As for the base model. On a CPU with AVX-512 XLA's float32 logits are 1.5e-4 from a float64 run and torch's 6e-5.
    assert np.abs(got - want).max() <= 2e-4
    assert np.abs(want - base).max() > 0.1


def _without_adapter(folder: Path) -> CausalLM:
    return lora_jax.from_pretrained(folder, dtype="float32", progress=False)[0]


@pytest.mark.turns("long runs of torch")
def test_transformers_loads_the_merged_folder(adapted, oracle, tmp_path):
    model, tokenizer = adapted
    model.save_pretrained_merged(tmp_path / "merged", tokenizer, dtype="float32", max_shard_size=10**8, verbose=False)
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 1
    report = json.loads(oracle("hf_check_folder.py", tmp_path / "merged"))
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    assert not report["quantization_config"]
    ids = np.array(tokenizer(PROMPTS[0])["input_ids"])
    np.savez(tmp_path / "in.npz", prompt_0=ids)
    oracle("hf_logits.py", tmp_path / "merged", tmp_path / "in.npz", tmp_path / "out.npz")
    want = np.load(tmp_path / "out.npz")["prompt_0"]
    assert np.abs(np.asarray(model.logits(ids[None]))[0] - want).max() <= 2e-4


# bitsandbytes


def hard_tensors(smollm2: Path) -> dict[str, np.ndarray]:
    """SmolLM2's tensors of one layer, random ones, zeros, ties and tiny ones, in three dtypes."""
    rng = np.random.default_rng(0)
    checkpoint = Checkpoint(smollm2)
    midpoints = (CODE[1:] + CODE[:-1]) / np.float32(2)
    cases = {
        "random": rng.normal(size=(96, 128)),
        "narrow": rng.normal(size=(30, 96)),  # 64 does not divide 96
        "cut": rng.normal(size=(7, 10)),  # the last block is short
        "zeros": np.zeros((8, 64)),
        "tiny": rng.normal(size=(8, 64)) * 1e-30,
        "ties": np.resize(np.append(midpoints, 1.0), (16, 64)),
        "outliers": rng.standard_t(1.5, size=(64, 256)),
    }
    names = [n for n in checkpoint.names if ".layers.7." in n and n.endswith("proj.weight")]
    cases |= {name.replace(".", "_"): checkpoint.read(name) for name in names}
    dtypes = {"f32": np.float32, "bf16": ml_dtypes.bfloat16, "f16": np.float16}
    return {f"{k}_{d}": np.clip(v, -6e4, 6e4).astype(t) for k, v in cases.items() for d, t in dtypes.items()}


def test_nf4_equals_bitsandbytes(smollm2, oracle, tmp_path):
    tensors = hard_tensors(smollm2)
    save_file(tensors, tmp_path / "in.safetensors")
    oracle("bnb_nf4.py", tmp_path / "in.safetensors", tmp_path / "out.safetensors")
    want = load_file(tmp_path / "out.safetensors")
    np.testing.assert_array_equal(want["code"], CODE)
    np.testing.assert_array_equal(want["nested_code"], nested_code())
    different = blocks = 0
    for name, w in tensors.items():
        single = quantize(jnp.asarray(w), False)
        flat = lambda x: np.asarray(x).reshape(-1)  # noqa: E731
        np.testing.assert_array_equal(flat(single.packed), want[f"{name}.packed"].reshape(-1), err_msg=name)
        np.testing.assert_array_equal(flat(single.absmax), want[f"{name}.absmax"], err_msg=name)
        np.testing.assert_array_equal(np.asarray(dequantize(single, w.dtype)), want[f"{name}.dequant"], err_msg=name)

        # What bitsandbytes has double-quantised reads back exactly.
        state = NF4Weight(
            single.packed,
            jnp.asarray(want[f"{name}.double.absmax"]).reshape(single.absmax.shape),
            jnp.asarray(want[f"{name}.double.nested_absmax"]),
            jnp.asarray(want[f"{name}.double.offset"]),
            jnp.asarray(want["nested_code"]),
        )
        got = jax.jit(dequantize_absmax)(state)
        np.testing.assert_array_equal(flat(got), want[f"{name}.double.absmax_dequant"], err_msg=name)
        np.testing.assert_array_equal(
            np.asarray(dequantize(state, w.dtype)), want[f"{name}.double.dequant"], err_msg=name
        )

        # Our own double quantisation: the mean may differ in its last bit, and bitsandbytes' CPU kernel does not always
        # take the nearest of the 256 values (up to 3 steps off, in up to 0.5 % of blocks).
        double = quantize(jnp.asarray(w), True)
        np.testing.assert_array_equal(flat(double.packed), want[f"{name}.packed"].reshape(-1), err_msg=name)
        np.testing.assert_allclose(double.nested_offset, want[f"{name}.double.offset"], rtol=1e-6)
        np.testing.assert_allclose(double.nested_absmax, want[f"{name}.double.nested_absmax"], rtol=1e-5, atol=1e-37)
        if np.ptp(np.asarray(single.absmax)) > 0:  # where all scales are equal, every index means the offset
            steps = np.abs(flat(double.absmax).astype(int) - want[f"{name}.double.absmax"])
            assert steps.max() <= 3, name
            blocks += steps.size
            different += int((steps > 0).sum())
    print("double-quantised scales that differ by a step or more:", different, "of", blocks)
    assert different <= 0.005 * blocks


@pytest.mark.turns("checkpoints of bitsandbytes")
@pytest.mark.rotate
@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("kind", ["llama", "llama-h96", "smollm2"])
def test_bitsandbytes_checkpoints_load_without_requantising(kind, double, smollm2, oracle, tmp_path):
    source = smollm2
    if kind != "smollm2":
        source = tmp_path / "source"
        oracle("tiny_models.py", source, kind)
    oracle("bnb_checkpoint.py", source, tmp_path / "bnb", *(["--double"] if double else []))
    model = tiny.open_model(tmp_path / "bnb", nf4="nf4-double")
    want = load_file(tmp_path / "bnb" / "DEQUANT.safetensors")
    weight = model.module.layers[0].mlp.up_proj.weight.get_value()
    assert isinstance(weight, NF4Weight)
    assert weight.double_quantized == double
    for name, tensor in merged_tensors(model).items():
        np.testing.assert_array_equal(tensor.read().astype(want[name].dtype), want[name], err_msg=name)
    plain = tiny.open_model(tmp_path / "bnb", nf4=None, dtype=jnp.bfloat16)
    assert not isinstance(plain.module.layers[0].mlp.up_proj.weight.get_value(), NF4Weight)
    for name, tensor in merged_tensors(plain).items():
        np.testing.assert_array_equal(tensor.read(), want[name].astype(np.float32), err_msg=name)
