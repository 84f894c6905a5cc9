"""Small random mixtures of experts: what families.py writes, of these.

transformers keeps the experts of a layer in two tensors. For the adapter and its gradients they are taken apart into
one torch.nn.Linear each, so that PEFT adapts them one by one, under the names of published checkpoints. The third
of every four folders holds its weights as the class has them, the others as they are published.

Where the class has a loss that balances the load of experts, balanced.npz ("attention_mask", and "loss": mean
cross-entropy plus that loss) and balanced.safetensors (its gradients) are written, too.
"""
# pyright: reportMissingImports=false

from pathlib import Path
from typing import Any

import families
import numpy as np
import torch
import transformers
from families import LENGTHS, LINEARS, Rng, pick, rope, shape
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn


def mixtral(rng: Rng) -> dict[str, Any]:
    """With four or eight experts, and a window or not."""
    return {
        **shape(rng),
        "rope_parameters": rope(rng, "default"),
        "num_local_experts": pick(rng, 4, 8),
        "num_experts_per_tok": pick(rng, 1, 2, 3),
        "sliding_window": pick(rng, None, 9),
    }


def qwen2_moe(rng: Rng) -> dict[str, Any]:
    """With an expert for all tokens, some layers without experts, and sometimes a window in every other layer."""
    return {
        **shape(rng),
        "rope_parameters": rope(rng, "default", "yarn"),
        "num_experts": pick(rng, 4, 6),
        "num_experts_per_tok": pick(rng, 2, 3),
        "moe_intermediate_size": pick(rng, 32, 48),
        "shared_expert_intermediate_size": pick(rng, 64, 80),
        "norm_topk_prob": pick(rng, True, False),
        "qkv_bias": pick(rng, True, False),
        **pick(rng, {}, {"decoder_sparse_step": 2}, {"mlp_only_layers": [1]}, {"mlp_only_layers": [0]}),
        **pick(rng, {}, {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}),
    }


def qwen3_moe(rng: Rng) -> dict[str, Any]:
    """With norms of every head, wide heads, and some layers without experts."""
    window = pick(rng, {}, {"use_sliding_window": True, "sliding_window": 9})
    config = {**qwen2_moe(rng), "head_dim": pick(rng, 16, 24, 32), "attention_bias": pick(rng, True, False)}
    for name in ("shared_expert_intermediate_size", "qkv_bias", "use_sliding_window", "max_window_layers"):
        config.pop(name, None)
    return {**config, **window}


def gpt_oss(rng: Rng) -> dict[str, Any]:
    """With sinks, biases, and a window in every other layer or in those named; limits low enough to matter."""
    config = shape(rng, num_hidden_layers=pick(rng, 2, 3, 4))
    layers = config["num_hidden_layers"]
    named = {"layer_types": [pick(rng, "sliding_attention", "full_attention") for _ in range(layers)]}
    return {
        **config,
        **pick(rng, {}, named),
        "head_dim": pick(rng, 16, 24),
        "rope_parameters": rope(rng, "yarn", "default", "yarn", truncate=False),
        "num_local_experts": pick(rng, 4, 6),
        "num_experts_per_tok": pick(rng, 2, 3),
        "sliding_window": pick(rng, 5, 12),
        "swiglu_limit": pick(rng, 1.0, 2.0),
    }


def deepseek_v2(rng: Rng) -> dict[str, Any]:
    """With and without a short vector of queries and groups of experts, and a dense first layer or not."""
    config = shape(rng, attention_bias=pick(rng, True, False))
    yarn = {"mscale": pick(rng, 0.7, 1.0), "mscale_all_dim": pick(rng, 0.7, 0.9)}
    groups = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": pick(rng, 2, 3)}
    return {
        **config,
        "num_key_value_heads": config["num_attention_heads"],
        "rope_parameters": pick(rng, rope(rng, "default"), rope(rng, "yarn", **yarn)),
        "q_lora_rank": pick(rng, 24, None),
        "kv_lora_rank": 40,
        "qk_nope_head_dim": pick(rng, 16, 24),
        "qk_rope_head_dim": pick(rng, 8, 16),
        "v_head_dim": pick(rng, 12, 20),
        "n_routed_experts": 8,
        "num_experts_per_tok": pick(rng, 2, 3),
        "n_shared_experts": pick(rng, 1, 2),
        "moe_intermediate_size": pick(rng, 32, 48),
        "first_k_dense_replace": pick(rng, 0, 1),
        "routed_scaling_factor": pick(rng, 1.0, 2.5),
        **pick(rng, {}, groups),
    }


def deepseek_v3(rng: Rng) -> dict[str, Any]:
    """With sigmoids and a bias for choosing experts; rotated features interleaved or not."""
    v3 = {"n_group": pick(rng, 1, 4), "norm_topk_prob": pick(rng, True, False)}
    v3["topk_group"] = 1 if v3["n_group"] == 1 else 2
    v3 |= {"rope_interleave": pick(rng, True, False)}
    config = deepseek_v2(rng)
    config.pop("topk_method", None)
    return {**config, **v3}


# Name -> (class, configuration, names of the linear layers).
ATTENTION = LINEARS[:4]
ALL_LINEAR = r".*\.layers\..*(_proj|kv_a_proj_with_mqa)"
FAMILIES = {
    "mixtral": ("MixtralForCausalLM", mixtral, [*ATTENTION, "w1", "w2", "w3"]),
    "qwen2-moe": ("Qwen2MoeForCausalLM", qwen2_moe, LINEARS),
    "qwen3-moe": ("Qwen3MoeForCausalLM", qwen3_moe, LINEARS),
    "gpt-oss": ("GptOssForCausalLM", gpt_oss, LINEARS),
    "deepseek-v2": ("DeepseekV2ForCausalLM", deepseek_v2, ALL_LINEAR),
    "deepseek-v3": ("DeepseekV3ForCausalLM", deepseek_v3, ALL_LINEAR),
}


class ListedExperts(nn.ModuleList):
    """The experts of a layer, one module each."""

    def __init__(self, fused: nn.Module, names: tuple[str, str, str]):
        super().__init__()
        self.names = names
        for gate_up, down in zip(fused.gate_up_proj.data, fused.down_proj.data, strict=True):
            gate, up = gate_up.chunk(2)
            self.append(nn.ModuleDict({n: linear(w) for n, w in zip(names, (gate, up, down), strict=True)}))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        """Compute every expert for every token, which is simple, and weigh them."""
        gate, up, down = self.names
        out = torch.zeros_like(hidden_states)
        for e, expert in enumerate(self):
            weight = torch.where(top_k_index == e, top_k_weights, 0).sum(-1, keepdim=True)
            h = self.activate(expert[gate](hidden_states), expert[up](hidden_states))
            out = out + weight * expert[down](h)
        return out

    def activate(self, gate, up):
        """Return what goes down."""
        return nn.functional.silu(gate) * up


class ListedGptOssExperts(ListedExperts):
    """Those of gpt-oss, with biases and a clamp."""

    def __init__(self, fused: nn.Module):
        nn.ModuleList.__init__(self)
        self.names, self.clamp = ("gate_proj", "up_proj", "down_proj"), fused._apply_gate
        for e in range(fused.num_experts):
            gate_up, bias = fused.gate_up_proj.data[e].T, fused.gate_up_proj_bias.data[e]
            layers = [linear(gate_up[0::2], bias[0::2]), linear(gate_up[1::2], bias[1::2])]
            layers.append(linear(fused.down_proj.data[e].T, fused.down_proj_bias.data[e]))
            self.append(nn.ModuleDict(dict(zip(self.names, layers, strict=True))))

    def activate(self, gate, up):
        """Clamp as the class does, which wants both in turns."""
        return self.clamp(torch.stack([gate, up], dim=-1).flatten(-2))


def linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Linear:
    """Return a layer that has this weight and bias."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight.data.copy_(weight)
    if bias is not None:
        layer.bias.data.copy_(bias)
    return layer


def list_experts(model: nn.Module) -> None:
    """Take the experts of every layer apart, in place."""
    names = ("w1", "w3", "w2") if model.config.model_type == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            is_gpt_oss = model.config.model_type == "gpt_oss"
            fused = layer.mlp.experts
            layer.mlp.experts = ListedGptOssExperts(fused) if is_gpt_oss else ListedExperts(fused, names)
    model.config.model_type = "listed"  # or PEFT would adapt the tensors that are no longer there


def rename(file: Path) -> None:
    """Give the tensors of an adapter the names of published checkpoints."""
    save_file({n.replace(".mlp.", ".block_sparse_moe."): t for n, t in load_file(file).items()}, file)


def save_fused(folder: Path) -> None:
    """Write the weights of a folder again, as the class has them."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if name not in tied}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_balanced(folder: Path, model_class: type) -> None:
    """Write loss and gradients with the loss that balances the load of experts, at a coefficient of 1."""
    model = model_class.from_pretrained(folder / "model", dtype=torch.float32, attn_implementation="eager").eval()
    list_experts(model)
    model = PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True)
    arrays = np.load(folder / "arrays.npz")
    ids, labels = (torch.tensor(arrays[name]) for name in ("input_ids", "labels"))
    lengths = torch.tensor([LENGTHS[0], LENGTHS[0] - 17])
    mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
    out = model(input_ids=ids, attention_mask=mask, use_cache=False, output_router_logits=True)
    logits = out.logits[:, :-1].flatten(0, 1)
    loss = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100) + out.aux_loss
    loss.backward()
    np.savez(folder / "balanced.npz", loss=loss.detach().numpy(), attention_mask=mask.numpy())
    grads = {n.replace(".default", ""): p.grad for n, p in model.named_parameters() if p.requires_grad}
    save_file(grads, folder / "balanced.safetensors")


def write(folder: Path, family: str, seed: int) -> None:
    """Write everything about one configuration."""
    families.write(folder, family, seed, FAMILIES, list_experts)
    if "deepseek" not in family:
        write_balanced(folder, getattr(transformers, FAMILIES[family][0]))
    if family == "mixtral":
        rename(folder / "adapter" / "adapter_model.safetensors")
        rename(folder / "grads.safetensors")
        rename(folder / "balanced.safetensors")
    if seed % 4 == 2 and family != "gpt-oss":
        save_fused(folder / "model")


if __name__ == "__main__":
    families.main(FAMILIES, write)
