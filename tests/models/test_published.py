"""Published configurations (tools/published.py): the model is built without arrays, its tensors counted."""

import json
import math

import jax.numpy as jnp
import pytest

from lora_jax.fused_experts import parts_of, renamed
from lora_jax.models.decoder import Decoder
from lora_jax.models.registry import config_from_hf
from lora_jax.tools.published import GEMMA_3_4B, PUBLISHED


@pytest.mark.parametrize("name", PUBLISHED)
def test_number_of_parameters(name):
    config, want = PUBLISHED[name]
    slots = Decoder(config_from_hf(config), jnp.bfloat16).slots()
    assert sum(math.prod(slot.shape) for slot in slots.values()) == want


@pytest.mark.oracle
@pytest.mark.rotate
@pytest.mark.parametrize("first", range(3))
def test_names_and_shapes_are_those_of_transformers(first, oracle, tmp_path):
    """Every tensor of every third model above, where transformers builds it without memory, and no other."""
    configs = {name: PUBLISHED[name][0] for name in list(PUBLISHED)[first::3]}
    (tmp_path / "in.json").write_text(json.dumps(configs))
    oracle("hf_names.py", tmp_path / "in.json", tmp_path / "out.json")
    by_transformers = json.loads((tmp_path / "out.json").read_text())
    for name, hf in configs.items():
        config = config_from_hf(hf)
        own = (f"{config.hf_prefix}.", *(() if config.tie_embeddings else ("lm_head.",)))
        shapes = {n: tuple(shape) for n, shape in by_transformers[name].items() if n.startswith(own)}
        parts = parts_of(shapes, shapes.__getitem__, config.architecture)
        of_experts = {part.whole for part in parts.values()}
        want = {renamed(n, config.architecture): shape for n, shape in shapes.items() if n not in of_experts}
        want |= {n: part.shape(shapes[part.whole]) for n, part in parts.items()}
        assert {n: slot.shape for n, slot in Decoder(config, jnp.bfloat16).slots().items()} == want, name


def test_what_gemma_3_4b_leaves_out():
    config = config_from_hf(GEMMA_3_4B)
    assert config.windows == ((1024,) * 5 + (None,)) * 5 + (1024,) * 4
    assert (config.rope.theta, config.rope.kind, config.rope.factor) == (1e6, "linear", 8.0)
    assert (config.local_rope.theta, config.local_rope.kind) == (1e4, "default")
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.attention_scale) == (8, 4, 256, 1 / 16)
