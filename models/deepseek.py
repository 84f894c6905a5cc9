"""DeepSeek V2, V2-Lite, V3, R1 and what is published in their format (Moonlight): latent attention and many experts.

The first layers have an MLP, the others experts beside one that every token goes through. V2 scores experts by a
softmax; V3 (arXiv 2412.19437, section 2.1.2) by sigmoids, and chooses them by these plus a bias. Both may choose among
the experts of the best groups only. Layers that predict further tokens are left out.
"""

import math
from typing import Any

from lora_jax.models.decoder import DecoderConfig
from lora_jax.models.hf_config import decoder_config, refuse, required, rope_from_hf
from lora_jax.models.mla import LatentConfig
from lora_jax.models.moe import MoEConfig

__all__ = ["config_from_hf"]

V2 = {
    "vocab_size": 102400,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "moe_intermediate_size": 1407,
    "first_k_dense_replace": 0,
    "routed_scaling_factor": 1.0,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "topk_method": "greedy",
    "n_group": None,
    "topk_group": None,
}
V3 = {
    **V2,
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "max_position_embeddings": 4096,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "moe_intermediate_size": 2048,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "routed_scaling_factor": 2.5,
    "topk_method": "noaux_tc",
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
}


def config_from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """Reads config.json; absent fields have the defaults of transformers' DeepseekV2Config or V3. Raises ValueError."""
    v3 = hf["architectures"][0] == "DeepseekV3ForCausalLM"
    hf = {**(V3 if v3 else V2), **hf}
    heads = required(hf, "num_attention_heads")
    refuse(hf, num_key_value_heads=heads, moe_layer_freq=1, ep_size=1)
    if v3:
        refuse(hf, scoring_func="sigmoid", topk_method="noaux_tc")
    else:
        refuse(hf, scoring_func="softmax", norm_topk_prob=False)
    latent = LatentConfig(
        query_rank=None if hf["q_lora_rank"] is None else required(hf, "q_lora_rank"),
        key_value_rank=required(hf, "kv_lora_rank"),
        plain_dim=required(hf, "qk_nope_head_dim"),
        rotated_dim=required(hf, "qk_rope_head_dim"),
        value_dim=required(hf, "v_head_dim"),
    )
    head_dim = latent.plain_dim + latent.rotated_dim
    rope = rope_from_hf(hf)
    # Attention is sharpened where yarn's formula for cos and sin leaves that out.
    sharper = 1.0
    if rope.kind != "default" and rope.mscale_all_dim and rope.factor > 1:
        sharper = 0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1.0
    return decoder_config(
        {**hf, "num_key_value_heads": heads, "head_dim": head_dim},
        rope=rope,
        rotary_dim=latent.rotated_dim,
        interleaved=bool(hf.get("rope_interleave", True)) if v3 else True,
        attention_scale=head_dim**-0.5 * sharper**2,
        mla=latent,
        moe=_moe(hf, v3),
    )


def _moe(hf: dict[str, Any], v3: bool) -> MoEConfig:
    grouped = v3 or hf["topk_method"] == "group_limited_greedy"
    if not v3 and not grouped and hf["topk_method"] != "greedy":
        raise ValueError(
            f"config.json: topk_method={hf['topk_method']!r} is not implemented, only greedy and group_limited_greedy"
        )
    size, layers = required(hf, "moe_intermediate_size"), required(hf, "num_hidden_layers")
    return MoEConfig(
        num_experts=required(hf, "n_routed_experts"),
        top_k=required(hf, "num_experts_per_tok"),
        intermediate_size=size,
        layers=tuple(range(hf["first_k_dense_replace"] or 0, layers)),
        normalize=v3 and bool(hf["norm_topk_prob"]),
        shared_size=size * required(hf, "n_shared_experts"),
        shared="shared_experts",
        sigmoid=v3,
        groups=(required(hf, "n_group"), required(hf, "topk_group")) if grouped else None,
        scale=float(hf["routed_scaling_factor"]),
    )
