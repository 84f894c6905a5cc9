"""Reading config.json, the names of tensors, and that a layer of fused projections is the layer it was."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import get_peft_model
from lora_jax.kernels.dispatch import using
from lora_jax.kernels.nf4.shared_input import halves
from lora_jax.kernels.rope import RopeConfig
from lora_jax.models import decoder
from lora_jax.models.decoder import Decoder
from lora_jax.models.registry import config_from_hf
from lora_jax.step import sum_of_losses
from tests import tiny

MISTRAL = {"architectures": ["MistralForCausalLM"]}


def read(**changes):
    """The decoder's config of the tiny config.json, changed; ... removes a field."""
    return config_from_hf({k: v for k, v in tiny.config(**changes).items() if v is not ...})


def test_llama_fields():
    config = read(attention_bias=True, mlp_bias=True, tie_word_embeddings=True, head_dim=32)
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (320, 64, 128)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (2, 4, 2, 32)
    assert (config.max_position, config.rms_norm_eps) == (256, 1e-5)
    assert config.windows == (None, None)
    assert (config.qkv_bias, config.out_bias, config.mlp_bias, config.tie_embeddings) == (True,) * 4
    assert config.rope == RopeConfig(theta=10000.0, original_max_position=256, max_position=256)


def test_defaults_are_transformers():
    absent = ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta", "tie_word_embeddings")
    config = read(**dict.fromkeys((*absent, "hidden_act", "head_dim"), ...))
    assert (config.num_kv_heads, config.head_dim, config.max_position, config.rms_norm_eps) == (4, 16, 2048, 1e-6)
    assert config.rope.theta == 10000.0
    assert not (config.tie_embeddings or config.qkv_bias or config.out_bias or config.mlp_bias)
    assert read(num_key_value_heads=None, head_dim=None) == read(num_key_value_heads=4)
    mistral = read(**MISTRAL, num_attention_heads=16, **dict.fromkeys(absent, ...))
    assert (mistral.num_kv_heads, mistral.max_position, mistral.windows) == (8, 131072, (4096,) * 2)


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 2.0,
    "high_freq_factor": 5.0,
    "original_max_position_embeddings": 64,
}
YARN = {"factor": 4.0, "beta_fast": 16.0, "attention_factor": 1.5, "truncate": False}


@pytest.mark.parametrize(
    ("scaling", "want"),
    [
        ({"rope_type": "llama3", **LLAMA3}, {"kind": "llama3", "factor": 8.0, "low_freq_factor": 2.0}),
        ({"rope_type": "linear", "factor": 2}, {"kind": "linear", "factor": 2.0}),
        ({"rope_type": "dynamic", "factor": 2.0}, {"kind": "dynamic", "factor": 2.0}),
        (
            {"rope_type": "yarn", **YARN},
            {"kind": "yarn", "beta_fast": 16.0, "attention_factor": 1.5, "truncate": False},
        ),
        ({"rope_type": "default"}, {"kind": "default", "factor": 1.0}),
    ],
)
def test_both_forms_of_rope(scaling, want):
    classic = read(rope_theta=500000.0, rope_scaling=scaling).rope
    older = {"type" if key == "rope_type" else key: value for key, value in scaling.items()}
    assert read(rope_theta=500000.0, rope_scaling=older).rope == classic
    assert read(rope_theta=..., rope_parameters={"rope_theta": 500000.0, **scaling}).rope == classic
    assert classic.theta == 500000.0
    assert classic.max_position == 256
    assert classic.original_max_position == scaling.get("original_max_position_embeddings", 256)
    for name, value in want.items():
        assert getattr(classic, name) == value


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": ...}, "config.json: vocab_size must be a whole number above 0, got None"),
        ({"hidden_size": 0}, "hidden_size must be a whole number above 0, got 0"),
        ({"intermediate_size": "128"}, "intermediate_size must be .* got '128'"),
        ({"num_hidden_layers": ...}, "num_hidden_layers must be"),
        ({"num_attention_heads": -1}, "num_attention_heads must be .* got -1"),
        ({"num_attention_heads": 6, "num_key_value_heads": 3}, "num_attention_heads=6 must divide hidden_size=64"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 must divide num_attention_heads=4"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be .* got 0"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; implemented are silu, swish, gelu_pytorch_tanh"),
        ({"rope_scaling": {"rope_type": "ntk"}}, "rope type 'ntk' is not .* known are default, linear"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope type 'longrope' needs a number 'short_factor'"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "mrope_section": [1]}}, "'mrope_section' .* not implemented"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not implemented for this architecture"),
        ({"rope_scaling": {"type": "linear"}}, "rope type 'linear' needs a number 'factor'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'llama3' needs a number 'low_freq_factor'"),
        ({"architectures": ...}, "architecture None is not implemented; known are LlamaForCausalLM, MistralFor"),
        ({"architectures": []}, "architecture None is not implemented"),
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture 'GPT2LMHeadModel' is not implemented; known are"),
    ],
)
def test_errors_name_the_field(changes, message):
    with pytest.raises(ValueError, match=message):
        read(**changes)


@pytest.mark.parametrize(("window", "want"), [(..., 4096), (None, None), (8, 8)])
def test_mistral_window(window, want):
    config = read(**MISTRAL, sliding_window=window, attention_bias=True)
    assert config.windows == (want, want)
    assert not config.qkv_bias  # Mistral has none, whatever the file says
    assert config.architecture == "MistralForCausalLM"


# Names and shapes of tensors.


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("biases", [False, True])
def test_slots_are_hugging_face_tensors(tied, biases):
    config = read(tie_word_embeddings=tied, attention_bias=biases, mlp_bias=biases, head_dim=32)
    want = {"model.embed_tokens.weight": (320, 64), "model.norm.weight": (64,)}
    want |= {} if tied else {"lm_head.weight": (320, 64)}
    linears = {"q_proj": (128, 64), "k_proj": (64, 64), "v_proj": (64, 64), "o_proj": (64, 128)}
    linears = {f"self_attn.{name}": shape for name, shape in linears.items()}
    linears |= {"mlp.gate_proj": (128, 64), "mlp.up_proj": (128, 64), "mlp.down_proj": (64, 128)}
    for i in range(2):
        for name, shape in linears.items():
            want[f"model.layers.{i}.{name}.weight"] = shape
            if biases:
                want[f"model.layers.{i}.{name}.bias"] = shape[:1]
        for name in ("input_layernorm", "post_attention_layernorm"):
            want[f"model.layers.{i}.{name}.weight"] = (64,)
    for kinds in (None, ["a", "b"]):  # one stack or two: the same tensors
        decoder = Decoder(config, jnp.float32, kinds)
        assert len(decoder.layers) == (1 if kinds is None else 2)
        assert {name: slot.shape for name, slot in decoder.slots().items()} == want


# Several projections at once.


@pytest.mark.parametrize("remat", ["none", "selective"])
def test_fused_projections_change_a_step_by_less_than_bfloat16_does(remat, tmp_path):
    """One layer; the same NF4 codes in every precision."""
    folder = tiny.write_folder(tmp_path / "model", tiny.config(num_hidden_layers=1), tokenizer=False)
    ids = jnp.asarray(tiny.ids(2, 24))

    def run(dtype, **implementations):
        model = tiny.open_model(folder, "nf4-double", dtype)
        tiny.randomize_adapter(get_peft_model(model, r=4, verbose=False), scale=0.05)
        graph, lora, frozen = model.split()

        def loss(lora):
            return sum_of_losses(graph, lora, frozen, {"input_ids": ids, "labels": ids}, remat=remat)[0]

        with using(**implementations):
            value, grads = jax.jit(jax.value_and_grad(loss))(lora)
        return [np.asarray(x, np.float64) for x in (value, *jax.tree.leaves(grads))]

    want, plain = run(jnp.float32), run(jnp.bfloat16)
    fused = run(jnp.bfloat16, lora_matmuls="triton", lora_mlp="triton")
    assert len(want) == 15
    for one, other, exact in zip(fused, plain, want, strict=True):
        size = np.linalg.norm(exact)
        assert 0 < np.linalg.norm(one - exact) < 1.2 * np.linalg.norm(other - exact) + 0.005 * size
        assert np.linalg.norm(one - other) < 0.05 * size  # other roundings; 0.02 to 0.035 for two layers


def test_fused_gate_and_up_in_nf4_are_two_layers(tmp_path, monkeypatch):
    """Phi-3's gate_up_proj runs as gate and up, whose codes are rows of it; apart from rounding nothing changes."""
    hf = {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "intermediate_size": 256}
    tiny.write_random(tmp_path / "model", tiny.config(**hf))
    model = tiny.open_model(tmp_path / "model", "nf4-double")
    tiny.randomize_adapter(get_peft_model(model, r=4, verbose=False))
    graph, lora, frozen = model.split()
    batch = {"input_ids": tiny.ids(2, 16), "labels": tiny.ids(2, 16)}

    def gradient():
        return jax.jit(jax.value_and_grad(lambda lora: sum_of_losses(graph, lora, frozen, batch)[0]))(lora)

    used = []
    monkeypatch.setattr(decoder, "halves", lambda p: used.append(both := halves(p)) or both)
    got = gradient()
    assert used and None not in used
    monkeypatch.setattr(decoder, "halves", lambda p: None)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(gradient()), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * np.abs(other).max())  # float32
