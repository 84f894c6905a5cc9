"""Mixtures of experts: the layer against a dense formula, storage, adapters, and what published models are made of.

Whole families are compared with transformers and PEFT in test_families.py.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from lora_jax import get_peft_model
from lora_jax.export.peft import adapter_tensors, load_adapter, save_adapter
from lora_jax.hf_checkpoint import Checkpoint, read_json
from lora_jax.kernels.nf4 import NF4Weight, dequantize, quantize
from lora_jax.models.decoder import Context, Decoder
from lora_jax.models.linear import Linear, value
from lora_jax.models.registry import config_from_hf
from lora_jax.remat import PRESETS
from lora_jax.step import sum_of_losses
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
    with pytest.raises(ValueError, match="lora_dropout on experts is not implemented"):
        get_peft_model(tiny.open_model(folder), target_modules=["w1"], lora_dropout=0.1, verbose=False)
    with pytest.raises(ValueError, match="lora_dropout on gate is not implemented"):
        get_peft_model(tiny.open_model(folder), target_modules=["gate"], lora_dropout=0.1, verbose=False)


# ---- training -----------------------------------------------------------------------------------------------------


def test_no_plan_of_rematerialisation_changes_loss_or_gradients(folder):
    model = tiny.randomize_adapter(get_peft_model(tiny.open_model(folder, "nf4-double"), r=4, verbose=False))
    graph, lora, frozen = model.split()
    ids = jnp.asarray(tiny.ids(2, 23))

    def run(plan):
        def loss(lora):
            return sum_of_losses(graph, lora, frozen, {"input_ids": ids, "labels": ids}, remat=plan)[0]

        return jax.jit(jax.value_and_grad(loss))(lora)

    want = run("none")
    for plan in PRESETS:
        for got, wanted in zip(jax.tree.leaves(run(plan)), jax.tree.leaves(want), strict=True):
            # Float32 sums in another order.
            assert np.linalg.norm(got - wanted) <= 1e-5 * np.linalg.norm(wanted), plan


# ---- published models ---------------------------------------------------------------------------------------------

MIXTRAL_8X7B = {
    "architectures": ["MixtralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
MIXTRAL_8X22B = {
    **MIXTRAL_8X7B,
    "hidden_size": 6144,
    "intermediate_size": 16384,
    "max_position_embeddings": 65536,
    "num_attention_heads": 48,
    "num_hidden_layers": 56,
}
QWEN_MOE_A27B = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_position_embeddings": 8192,
    "max_window_layers": 21,
    "model_type": "qwen2_moe",
    "moe_intermediate_size": 1408,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "shared_expert_intermediate_size": 5632,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
GPT_OSS_20B = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "quantization_config": {"quant_method": "mxfp4"},
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}

DEEPSEEK_V2_LITE = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "v_head_dim": 128,
    "vocab_size": 102400,
}
DEEPSEEK_V3 = {  # without the layer that predicts a further token
    **DEEPSEEK_V2_LITE,
    "architectures": ["DeepseekV3ForCausalLM"],
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "rope_scaling": {**DEEPSEEK_V2_LITE["rope_scaling"], "mscale": 1.0, "mscale_all_dim": 1.0},
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "vocab_size": 129280,
}


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (MIXTRAL_8X7B, 46_702_792_704),
        (MIXTRAL_8X22B, 140_620_634_112),
        (QWEN_MOE_A27B, 14_315_784_192),
        (QWEN3_30B_A3B, 30_532_122_624),
        (GPT_OSS_20B, 20_914_757_184),
        (DEEPSEEK_V2_LITE, 15_706_484_224),
        (DEEPSEEK_V3, 671_026_419_200),
    ],
    ids=[
        "Mixtral-8x7B",
        "Mixtral-8x22B",
        "Qwen1.5-MoE-A2.7B",
        "Qwen3-30B-A3B",
        "gpt-oss-20b",
        "DeepSeek-V2-Lite",
        "DeepSeek-V3",
    ],
)
def test_published_models_have_their_number_of_parameters(config, parameters):
    """As the hub counts them in the safetensors."""
    _, state = nnx.split(Decoder(config_from_hf(config), jnp.bfloat16))
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == parameters
