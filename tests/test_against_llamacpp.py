"""Our logits against llama.cpp on the GGUF files we write, with real weights and a merged adapter."""

import jax
import numpy as np
import pytest

import lora_jax
from tests.llamacpp import LlamaCpp, centred_difference

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Once upon a time, in a village between two rivers, there lived a clockmaker who",
]


def log_probs(model: lora_jax.CausalLM, ids: list[int]) -> np.ndarray:
    """Ours at the last position, float32 [V]; what is put behind it, for fewer shapes to compile, it does not see."""
    padded = np.pad(ids, (0, -len(ids) % 64))
    return np.asarray(jax.nn.log_softmax(model.logits(padded[None])[0, len(ids) - 1]))


def distance(theirs: np.ndarray, ours: np.ndarray) -> float:
    """Largest difference, less the median one: llama.cpp's server normalises to some 1e-4 only."""
    return float(np.abs(centred_difference(theirs, ours)).max())


@pytest.fixture(scope="module")
def adapted(smollm2):
    """SmolLM2 in float32 with an adapter that changes its answers."""
    model, tokenizer = lora_jax.from_pretrained(smollm2, load_in_4bit=False, dtype="float32", progress=False)
    lora_jax.get_peft_model(model, r=8, verbose=False)
    _, lora, _ = model.split()
    keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(lora))))
    model.update_lora(jax.tree.map(lambda x: 0.02 * jax.random.normal(next(keys), x.shape), lora))
    return model, tokenizer


@pytest.mark.turns("real models and whole programs")
def test_smollm2_logits_equal_llamacpp(smollm2, tmp_path):
    model, tokenizer = lora_jax.from_pretrained(smollm2, load_in_4bit=False, dtype="float32", progress=False)
    (path,) = model.save_pretrained_gguf(tmp_path, tokenizer, "f32", verbose=False)
    long_prompt = " ".join(f"Line {i}: {i} boats and {i * 7 % 13} clocks were counted." for i in range(140))
    prompts = [tokenizer(text)["input_ids"] for text in [*PROMPTS, long_prompt]]
    assert len(prompts[-1]) >= 2048
    with LlamaCpp(path, model.config.vocab_size, n_ctx=4096) as server:
        differences = [distance(server.logprobs(ids), log_probs(model, ids)) for ids in prompts]
    print("largest centred difference of a log-probability:", differences)
    assert max(differences) <= 5e-4


@pytest.mark.rotate
@pytest.mark.parametrize("rounded", ["bf16", "q8_0"])
def test_the_merged_adapter_in_llamacpp(adapted, smollm2, tmp_path, rounded):
    """F32 equals the adapted model; BF16 and Q8_0 load and stay within what their rounding explains."""
    model, tokenizer = adapted
    files = model.save_pretrained_gguf(tmp_path, tokenizer, ["f32", rounded], verbose=False)
    ids = tokenizer(PROMPTS[2])["input_ids"]
    ours = log_probs(model, ids)
    base, _ = lora_jax.from_pretrained(smollm2, load_in_4bit=False, dtype="float32", progress=False)
    assert np.abs(ours - log_probs(base, ids)).max() > 0.1  # the adapter matters
    limits = {"F32": 5e-4, "BF16": 0.3, "Q8_0": 1.0}  # largest log-probability difference over 49,152 tokens
    for path, name in zip(files, ("F32", rounded.upper()), strict=True):
        limit = limits[name]
        assert name in path.name
        with LlamaCpp(path, model.config.vocab_size) as server:
            theirs = server.logprobs(ids)
        divergence = float(np.sum(np.exp(ours) * (ours - theirs)))
        print(name, "largest", distance(theirs, ours), "KL", divergence)
        assert distance(theirs, ours) <= limit
        assert abs(divergence) < 0.02
