"""bench_families: what it counts, and that it makes and trains models of every kind, at tiny sizes."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lora_jax import LoraConfig
from lora_jax.models.moe import MoE
from lora_jax.models.registry import config_from_hf
from lora_jax.plan import of_config
from lora_jax.tools import bench_families
from lora_jax.tools.bench_step import abstract_model, random_weights, token_ids
from lora_jax.tools.published import PUBLISHED

TINY = {
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_attention_heads": 4,
    "vocab_size": 512,
    "head_dim": 32,
    "num_local_experts": 8,
    "num_experts": 8,
    "n_routed_experts": 8,
    "kv_lora_rank": 64,
}


def tiny(name: str) -> dict:
    hf, _ = PUBLISHED[name]
    heads = 4 if "Deepseek" in hf["architectures"][0] else 2
    fields = {k: v for k, v in hf.items() if k != "layer_types"}
    return {**fields, **{k: v for k, v in TINY.items() if k in hf}, "num_key_value_heads": heads}


def test_parameters_that_a_token_meets():
    def of(name: str) -> int:
        return bench_families.active_parameters(config_from_hf(PUBLISHED[name][0]))

    embedding, norms = 128256 * 4096, 65 * 4096
    assert of("Llama-3.1-8B") == PUBLISHED["Llama-3.1-8B"][1] - embedding - norms
    # All less embedding, norms, routers and six of eight experts.
    embedding, norms, routers, experts = 32000 * 4096, 65 * 4096, 32 * 8 * 4096, 32 * 6 * 3 * 4096 * 14336
    assert of("Mixtral-8x7B") == PUBLISHED["Mixtral-8x7B"][1] - embedding - norms - routers - experts
    assert all(name in PUBLISHED for name in bench_families.MODELS)


@pytest.mark.parametrize("name", ["gemma-2-9b", "SmolLM3-3B", "Llama-3.2-1B"])  # tied, by the class or by the file
def test_models_are_those_of_their_files(name):
    hf = PUBLISHED[name][0]
    module = abstract_model(hf).module
    assert module.config == config_from_hf(hf)
    held = sum(w.size * w.dtype.itemsize for w in jax.tree.leaves(nnx.state(module)))
    assert held == of_config(hf, LoraConfig(), 1, 128).weights


def test_tokens_spread_over_experts_as_in_trained_models(monkeypatch):
    """Beside small embeddings, what random layers add sends all tokens of the deeper layers to the same few experts."""
    hf = {**tiny("Qwen3-30B-A3B"), "num_hidden_layers": 12, "num_experts": 32, "num_experts_per_tok": 2}
    counts, route = [], MoE.route

    def counted(self, tokens):
        weights, chosen, scores = route(self, tokens)
        jax.debug.callback(lambda chosen: counts.append(np.bincount(chosen.ravel(), minlength=32)), chosen)
        return weights, chosen, scores

    monkeypatch.setattr(MoE, "route", counted)
    model = abstract_model(hf)
    nnx.update(model.module, jax.jit(lambda: random_weights(nnx.state(model.module), model.config))())
    model.module(jnp.asarray(token_ids(1, 512, 512), jnp.int32))
    jax.effects_barrier()
    assert len(counts) == 12
    assert max(count.max() for count in counts) < 4 * 512 * 2 / 32  # of the mean


@pytest.mark.slow  # 30 s to compile
def test_models_of_every_kind_train(monkeypatch, tmp_path):
    names = ["Llama-3.1-8B", "Qwen3-30B-A3B", "DeepSeek-V2-Lite", "gpt-oss-20b"]
    for name in names:
        monkeypatch.setitem(PUBLISHED, name, (tiny(name), 0))
    out = tmp_path / "out.json"
    monkeypatch.setattr(
        sys, "argv", ["bench", "--models", *names, "--case", "2x64", "--threads", "2", "--out", str(out)]
    )
    bench_families.main()
    results = json.loads(out.read_text())["results"]
    assert [result["model"] for result in results] == names
    assert results[0]["share"] == 1
    for result in results:
        assert "error" not in result, result
        assert result["losses"][-1] < result["losses"][0] and result["tokens_per_s"] > 0 and result["gib"] > 0
