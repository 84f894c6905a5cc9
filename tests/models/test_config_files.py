"""config.json of every family: both its forms, what follows from it for each layer, and what is refused."""

import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_jax import get_peft_model
from lora_jax.export.peft import adapter_tensors, load_adapter
from lora_jax.models.decoder import Decoder
from lora_jax.models.registry import ARCHITECTURES, config_from_hf
from tests import tiny

FACTORS = {"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [3.0, 3.5, 4.0, 4.5]}  # of 8 rotated features


def hf(architecture: str, **changes: Any) -> dict[str, Any]:
    """A tiny config.json without the fields whose default is tested; ... removes a field."""
    fields = {**tiny.config(rope_theta=..., hidden_act=..., tie_word_embeddings=...), "num_hidden_layers": 6}
    fields |= {"architectures": [architecture], "head_dim": 16, **changes}
    return {name: value for name, value in fields.items() if value is not ...}


def read(architecture: str, **changes: Any):
    return config_from_hf(hf(architecture, **changes))


def test_every_architecture_reads_a_small_file():
    for architecture in ARCHITECTURES:
        if ARCHITECTURES[architecture] in DENSE:
            assert read(architecture).num_layers == 6


DENSE = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "olmo2", "smollm3", "granite")
DENSE += ("glm4", "exaone4", "seed_oss")
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "factor": 8.0}


@pytest.mark.parametrize(
    "architecture",
    [
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "Olmo2ForCausalLM",
        "SmolLM3ForCausalLM",
        "Glm4ForCausalLM",
        "Exaone4ForCausalLM",
        "SeedOssForCausalLM",
    ],
)
def test_two_forms_of_one_rotation(architecture):
    hub = read(architecture, rope_theta=5e5, rope_scaling=YARN)
    assert read(architecture, rope_parameters={"rope_theta": 5e5, **YARN}) == hub
    assert (hub.rope.kind, hub.rope.theta, hub.rope.factor) == ("yarn", 5e5, 4.0)


def test_two_forms_of_two_rotations():
    hub = {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "rope_scaling": LINEAR, "sliding_window_pattern": 3}
    both = {"full_attention": {"rope_theta": 5e5, **LINEAR}, "sliding_attention": {"rope_theta": 2e4}}
    types = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    config = read("Gemma3ForCausalLM", **hub)
    assert read("Gemma3ForCausalLM", rope_parameters=both, layer_types=types) == config
    assert (config.rope.kind, config.rope.theta, config.local_rope.kind, config.local_rope.theta) == (
        "linear",
        5e5,
        "default",
        2e4,
    )
    default = read("Gemma3ForCausalLM")
    assert (default.rope.theta, default.local_rope.theta) == (1e6, 1e4)
    olmo = read("Olmo3ForCausalLM", rope_theta=5e5, rope_scaling=YARN)
    assert (olmo.rope.kind, olmo.local_rope.kind, olmo.local_rope.theta) == ("yarn", "default", 5e5)
    own = {"full_attention": {"rope_theta": 2e4}, "sliding_attention": {"rope_theta": 3e4}}
    for fields, theta, local_theta in (
        ({}, 5e5, 5e5),
        ({"rope_theta": 2e4}, 2e4, 5e5),  # of hub files: the layers with a window keep 5e5
        ({"rope_theta": 2e4, "rope_scaling": YARN}, 2e4, 5e5),
        ({"rope_theta": 2e4, "rope_parameters": {"sliding_attention": own["sliding_attention"]}}, 2e4, 3e4),
        ({"rope_theta": 4e4, "rope_parameters": own}, 2e4, 3e4),
    ):
        olmo = read("Olmo3ForCausalLM", **fields)
        assert (olmo.rope.theta, olmo.local_rope.theta, olmo.local_rope.kind) == (theta, local_theta, "default")


def test_scaling_of_gpt_oss_that_no_file_names():
    """null, as absent, is the class's own; only "default" is none."""
    for fields in ({}, {"rope_scaling": None}, {"rope_parameters": None}, {"rope_scaling": {}}):
        rope = read("GptOssForCausalLM", num_local_experts=4, num_experts_per_tok=2, rope_theta=2e4, **fields).rope
        assert (rope.kind, rope.factor, rope.original_max_position, rope.truncate) == ("yarn", 32.0, 4096, False), (
            fields
        )
        assert rope.theta == 2e4
    for name in ("rope_scaling", "rope_parameters"):
        assert read("GptOssForCausalLM", **{name: {"rope_type": "default"}}).rope.kind == "default"


def test_forms_of_longrope():
    more = {"original_max_position_embeddings": 32}
    new = read(
        "Phi3ForCausalLM", rope_parameters={"rope_type": "longrope", "partial_rotary_factor": 0.5, **FACTORS}, **more
    )
    for name in ("longrope", "su", "yarn"):  # the last two in old files
        scaling = {"type": name, **FACTORS}
        assert read("Phi3ForCausalLM", rope_scaling=scaling, partial_rotary_factor=0.5, **more) == new
    assert (new.rope.kind, new.rope.original_max_position, new.rope.factor) == ("longrope", 32, 8.0)
    assert (new.rotary_dim, new.rope.long_factor) == (8, (3.0, 3.5, 4.0, 4.5))


def test_forms_of_partial_rotation():
    assert (read("Glm4ForCausalLM").rotary_dim, read("Glm4ForCausalLM").interleaved) == (8, True)
    hub = read("Glm4ForCausalLM", partial_rotary_factor=0.75, rope_theta=5e5, rope_scaling=YARN)
    new = {"rope_type": "yarn", "rope_theta": 5e5, "partial_rotary_factor": 0.75, **YARN}
    assert read("Glm4ForCausalLM", rope_parameters=new) == hub
    assert (hub.rotary_dim, hub.rope.kind, hub.rope.theta) == (12, "yarn", 5e5)


# Layers


def test_windows():
    assert read("Gemma2ForCausalLM", sliding_window=7).windows == (7, None) * 3
    assert read("Gemma3ForCausalLM", sliding_window=7).windows == (7,) * 5 + (None,)
    assert read("Olmo3ForCausalLM", sliding_window=7).windows == (7, 7, 7, None, 7, 7)
    assert read("Phi3ForCausalLM", sliding_window=7).windows == (7,) * 6
    exaone = read("Exaone4ForCausalLM", sliding_window=7)
    assert (exaone.windows, exaone.nope_layers) == ((7, 7, 7, None, 7, 7), (3,))
    exaone = read("Exaone4ForCausalLM", sliding_window=None, sliding_window_pattern=None)
    assert (exaone.windows, exaone.nope_layers) == ((None,) * 6, ())
    named = ["full_attention"] * 5 + ["sliding_attention"]
    assert read("Gemma2ForCausalLM", sliding_window=7, layer_types=named).windows == (None,) * 5 + (7,)
    qwen = {"sliding_window": 7, "max_window_layers": 4}
    assert read("Qwen2ForCausalLM", **qwen).windows == (None,) * 6  # as all published ones: named, not used
    assert read("Qwen2ForCausalLM", **qwen, use_sliding_window=True).windows == (None,) * 4 + (7,) * 2


def test_layers_without_rotation():
    assert read("SmolLM3ForCausalLM").nope_layers == (3,)
    assert read("SmolLM3ForCausalLM", no_rope_layer_interval=2).nope_layers == (1, 3, 5)
    assert read("SmolLM3ForCausalLM", no_rope_layers=[0, 1, 1, 1, 0, 1]).nope_layers == (0, 4)
    assert read("SmolLM3ForCausalLM", use_sliding_window=True, sliding_window=7).windows == (None,) * 3 + (
        7,
        None,
        None,
    )


def test_factors():
    gemma = read("Gemma2ForCausalLM", query_pre_attn_scalar=144)
    assert (gemma.embedding_scale, gemma.attention_scale) == (8.0, 1 / 12)
    assert (gemma.softcap, gemma.logit_softcap, gemma.activation, gemma.tie_embeddings) == (
        50.0,
        30.0,
        "gelu_tanh",
        True,
    )
    names = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
    granite = read("GraniteForCausalLM", **dict(zip(names, (12, 0.5, 0.25, 16), strict=True)))
    assert (granite.embedding_scale, granite.attention_scale, granite.residual_scale, granite.logit_scale) == (
        12.0,
        0.5,
        0.25,
        1 / 16,
    )


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        (
            "GemmaForCausalLM",
            {"use_bidirectional_attention": True},
            "use_bidirectional_attention=True is not implemented",
        ),
        ("Gemma2ForCausalLM", {"hidden_activation": "silu"}, "hidden_activation='silu' .* only 'gelu_pytorch_tanh'"),
        ("Gemma2ForCausalLM", {"layer_types": ["full_attention"]}, "layer_types names 1 layers, num_hidden_layers=6"),
        ("Gemma2ForCausalLM", {"layer_types": ["chunked_attention"] * 6}, "'chunked_attention'; implemented are full_"),
        ("Gemma2ForCausalLM", {"sliding_window": 0}, "sliding_window must be a whole number above 0 or null, got 0"),
        ("Gemma3ForCausalLM", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is not implemented"),
        (
            "Gemma3ForCausalLM",
            {"rope_parameters": {"rope_theta": 1e6}},
            "'rope_theta'; this architecture has a dict for",
        ),
        ("Phi3ForCausalLM", {"attention_bias": True}, "attention_bias=True is not implemented for this architecture"),
        (
            "Phi3ForCausalLM",
            {"rope_scaling": {"type": "longrope", **FACTORS}},
            "short_factor has 4 numbers; 16 rotated",
        ),
        (
            "Phi3ForCausalLM",
            {"rope_scaling": {"type": "longrope"}},
            "rope type 'longrope' needs a number 'short_factor'",
        ),
        ("Olmo2ForCausalLM", {"clip_qkv": 8.0}, "clip_qkv=8.0 is not implemented"),
        ("Exaone4ForCausalLM", {"sliding_window_pattern": "LLLG"}, "'LLLG' must be a number, or layer_types be there"),
        ("SeedOssForCausalLM", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is not implemented for this"),
        ("SmolLM3ForCausalLM", {"no_rope_layers": [1, 0]}, "no_rope_layers names 2 layers, num_hidden_layers=6"),
        ("Qwen2ForCausalLM", {"hidden_act": "relu"}, "hidden_act is 'relu'; implemented are silu"),
    ],
)
def test_what_is_refused(architecture, changes, message):
    with pytest.raises(ValueError, match=message):
        read(architecture, **changes)


# Names


@pytest.mark.parametrize(
    ("architecture", "want"),
    [
        ("Qwen2ForCausalLM", {"self_attn.q_proj.bias", "mlp.gate_proj.weight", "self_attn.v_proj.bias"}),
        ("Qwen3ForCausalLM", {"self_attn.q_norm.weight", "self_attn.k_norm.weight"}),
        ("Gemma2ForCausalLM", {"pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight"}),
        (
            "Glm4ForCausalLM",
            {"post_self_attn_layernorm.weight", "post_mlp_layernorm.weight", "mlp.gate_up_proj.weight"},
        ),
        ("Exaone4ForCausalLM", {"post_feedforward_layernorm.weight", "self_attn.q_norm.weight"}),
        ("SeedOssForCausalLM", {"self_attn.v_proj.bias", "mlp.up_proj.weight"}),
        ("Phi3ForCausalLM", {"self_attn.qkv_proj.weight", "mlp.gate_up_proj.weight", "mlp.down_proj.weight"}),
        ("Olmo2ForCausalLM", {"post_attention_layernorm.weight", "self_attn.k_norm.weight"}),
    ],
)
def test_names_of_tensors(architecture, want):
    slots = Decoder(read(architecture), jnp.float32).slots()
    assert {f"model.layers.5.{name}" for name in want} <= set(slots)
    post_norms = ("Olmo2ForCausalLM", "Exaone4ForCausalLM")
    assert ("model.layers.5.input_layernorm.weight" in slots) == (architecture not in post_norms)
    assert ("model.layers.5.self_attn.q_proj.weight" in slots) == (architecture != "Phi3ForCausalLM")


def random_folder(folder, architecture: str, **changes):
    """A folder with random weights of any dense family."""
    fields = hf(architecture, **changes)
    rng = np.random.default_rng(0)
    slots = Decoder(config_from_hf(fields), jnp.float32).slots()
    weights = {n: (rng.normal(size=s.shape) / 8).astype(np.float32) for n, s in slots.items()}
    return tiny.write_folder(folder, fields, weights, tokenizer=False)


@pytest.mark.parametrize("stored", ["language_model.model.", "model.language_model."])
def test_the_text_part_of_a_model_that_reads_images(tmp_path, stored):
    """Loads under both names that files have for it; its vision tower is neither trained nor lost."""
    text = {k: v for k, v in hf("Gemma3ForCausalLM", num_hidden_layers=2).items() if k != "architectures"}
    fields = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text, "torch_dtype": "float32"}
    slots = Decoder(config_from_hf(fields), jnp.float32).slots()
    rng = np.random.default_rng(0)
    weights = {n.replace("model.language_model.", stored): rng.normal(size=s.shape) / 8 for n, s in slots.items()}
    weights["vision_tower.layers.0.q_proj.weight"] = rng.normal(size=(4, 6))
    weights = {name: w.astype(np.float32) for name, w in weights.items()}
    folder = tiny.write_folder(tmp_path / "model", fields, weights, tokenizer=False)
    model = get_peft_model(tiny.open_model(folder), target_modules=["q_proj"], r=2, verbose=False)
    model.save_pretrained(tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    # In full, since PEFT would find a q_proj in the vision tower too.
    assert settings["target_modules"] == [f"model.language_model.layers.{i}.self_attn.q_proj" for i in range(2)]
    again = load_adapter(tiny.open_model(folder), tmp_path / "adapter")
    assert adapter_tensors(again).keys() == adapter_tensors(model).keys()
    model.save_pretrained_merged(tmp_path / "merged", dtype="float32", verbose=False)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged.keys() == weights.keys()
    for name, tensor in weights.items():  # B is zero, so the adapter changes nothing
        np.testing.assert_array_equal(merged[name], tensor, err_msg=name)
    weights[f"{stored}layers.0.self_attn.other.weight"] = np.zeros((2, 2), np.float32)
    with pytest.raises(ValueError, match="tensors that this architecture does not have: .*self_attn.other.weight"):
        tiny.open_model(tiny.write_folder(tmp_path / "more", fields, weights, tokenizer=False))


@pytest.mark.parametrize(
    ("architecture", "attention"),
    [("Phi3ForCausalLM", {"qkv_proj"}), ("Glm4ForCausalLM", {"q_proj", "k_proj", "v_proj"})],
)
def test_fused_projections_take_one_adapter_each(tmp_path, architecture, attention):
    model = tiny.open_model(random_folder(tmp_path / "model", architecture, num_hidden_layers=2))
    for target, whole in (("q_proj", "qkv_proj"), ("gate_proj", "gate_up_proj"), ("up_proj", "gate_up_proj")):
        if target not in attention:
            refusal = f"'{target}' matches no module.*{target} is a part of {whole} in this model"
            with pytest.raises(ValueError, match=refusal):
                get_peft_model(model, target_modules=[target, "o_proj"], verbose=False)
    get_peft_model(model, r=4, verbose=False)
    adapted = {
        name.rpartition(".")[2] for name, _, module in model.module.named_modules() if getattr(module, "lora_a", None)
    }
    assert adapted == attention | {"o_proj", "gate_up_proj", "down_proj"}


@pytest.mark.parametrize("types", ["ss", "sf", "fs"])
def test_how_far_layers_with_windows_see(tmp_path, types):
    """In layers of one stack that differ in their windows: which tokens' logits a token reaches, with a cache too."""
    kinds = {"s": "sliding_attention", "f": "full_attention"}
    folder = random_folder(
        tmp_path / "model",
        "Gemma2ForCausalLM",
        num_hidden_layers=2,
        sliding_window=5,
        layer_types=[kinds[t] for t in types],
    )
    model = tiny.open_model(folder)
    ids = tiny.ids(1, 20)
    other = ids.copy()
    other[0, 3] += 1
    changed = np.abs(np.asarray(model.logits(ids)) - np.asarray(model.logits(other)))[0].max(-1) > 0
    reach = 2 * (5 - 1) if types == "ss" else 16  # each layer hands a token on by four
    assert list(np.flatnonzero(changed)) == list(range(3, 3 + reach + 1))
    out = model.generate(ids, max_new_tokens=3, eos_token_id=[])
    for i in range(3):
        assert np.argmax(np.asarray(model.logits(out[:, : 20 + i]))[0, -1]) == out[0, 20 + i]
