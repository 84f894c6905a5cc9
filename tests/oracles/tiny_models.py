"""Write a small random model, float32 by default, by transformers' own save_pretrained. `--list` prints the kinds.

Lengths that matter: rope kinds were "pretrained" for 32 positions (dynamic changes beyond 32), the window is 8 keys.
The weights are scaled so that logits spread by about 2 and attention is far from uniform: positions, masks and biases
all show in the logits.
"""
# pyright: reportMissingImports=false

import argparse
import json
from pathlib import Path

import hf_model  # noqa: F401  (sets threads, no progress bars)
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

BASE = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "pad_token_id": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


def rope(rope_type: str, **values) -> dict:
    """Return rope_parameters with a base of 10000."""
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **values}}


KINDS: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {}),
    "llama1": ("llama", {"num_key_value_heads": 4, "num_hidden_layers": 3}),  # no grouped queries
    "llama-h96": (
        "llama",
        {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 6},
    ),  # rows cut NF4 blocks
    # k_proj is [20, 40]: 800 weights, the last NF4 block has 32.
    "llama-h40": ("llama", {"hidden_size": 40, "intermediate_size": 56}),
    "llama-rope-llama3": (
        "llama",
        rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
    ),
    "llama-rope-linear": ("llama", rope("linear", factor=4.0)),
    "llama-rope-dynamic": ("llama", {**rope("dynamic", factor=2.0), "max_position_embeddings": 32}),
    "llama-rope-yarn": ("llama", rope("yarn", factor=8.0, original_max_position_embeddings=32)),
    "llama-rope-yarn-options": (
        "llama",
        rope(
            "yarn",
            factor=8.0,
            original_max_position_embeddings=32,
            beta_fast=4.0,
            beta_slow=0.5,
            mscale=0.707,
            mscale_all_dim=1.3,
            truncate=False,
        ),
    ),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": 8, "num_hidden_layers": 3}),
    "mistral-nemo": ("mistral", {"sliding_window": None, "head_dim": 32}),  # 4 heads of 32 on a width of 64
}
CLASSES = {"llama": (LlamaConfig, LlamaForCausalLM), "mistral": (MistralConfig, MistralForCausalLM)}


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Fill every parameter with normal numbers scaled by what it does."""
    generator = torch.Generator().manual_seed(seed)
    width = model.config.hidden_size
    head_std = 2 / width**0.5  # the final norm gives a width of unit variance: logits of standard deviation 2
    for name, param in model.named_parameters():
        noise = torch.randn(param.shape, generator=generator)
        if name.endswith("norm.weight"):
            value = 1 + 0.2 * noise
        elif name.endswith("bias"):
            value = 0.5 * noise
        elif name == "lm_head.weight" or (name == "model.embed_tokens.weight" and model.config.tie_word_embeddings):
            value = head_std * noise
        elif name == "model.embed_tokens.weight":
            value = noise
        else:
            sharper = 1.5 if "q_proj" in name or "k_proj" in name else 1.0
            value = sharper * noise / param.shape[-1] ** 0.5
        param.data.copy_(value)


def write_classic_config(folder: Path) -> None:
    """Rewrite config.json as hub files of transformers 4: rope_theta, rope_scaling, torch_dtype, few defaults."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    if scaling["rope_type"] in ("linear", "dynamic"):
        scaling["type"] = scaling.pop("rope_type")  # these two are older than the key rope_type
    config["rope_scaling"] = None if scaling.get("rope_type") == "default" else scaling
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.44.0"
    if config["head_dim"] * config["num_attention_heads"] == config["hidden_size"]:
        del config["head_dim"]
    if config["num_key_value_heads"] == config["num_attention_heads"]:
        del config["num_key_value_heads"]
    for name in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
        if config.get(name) is False:
            del config[name]
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def main() -> None:
    """Read the arguments and write OUT_DIR, or print the kinds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", type=Path, nargs="?")
    parser.add_argument("kind", nargs="?", choices=KINDS, metavar="KIND")
    parser.add_argument("--list", action="store_true", help="print the kinds, one a line")
    parser.add_argument("--all", action="store_true", help="write every kind, to OUT_DIR/KIND")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--classic", action="store_true", help="config.json in the form of hub files of transformers 4")
    parser.add_argument("--max-shard-size", default="5GB", help="for example 50KB, for a sharded folder with an index")
    args = parser.parse_args()
    if args.list:
        print("\n".join(KINDS))
        return
    if args.out_dir is None or (args.kind is None) != args.all:
        parser.error("give OUT_DIR and a KIND, or OUT_DIR and --all")
    for kind in KINDS if args.all else [args.kind]:
        folder = args.out_dir / kind if args.all else args.out_dir
        family, changes = KINDS[kind]
        config_class, model_class = CLASSES[family]
        model = model_class(config_class(**{**BASE, **changes}))
        randomize(model, args.seed)
        model.to(getattr(torch, args.dtype)).save_pretrained(folder, max_shard_size=args.max_shard_size)
        if args.classic:
            write_classic_config(folder)


if __name__ == "__main__":
    main()
