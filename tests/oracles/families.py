"""Small random models of one family: folders by transformers, and what transformers and PEFT compute with them.

OUT_DIR/0, OUT_DIR/1, ... receive, for configurations drawn from a seed:

* model/: the folder as save_pretrained writes it; every second one has its config.json in the form of hub files.
* adapter/: a random LoRA adapter on every linear layer, as PEFT writes it.
* arrays.npz: `prompt_0`, `prompt_1` (ids [T]), `logits_0`, `logits_1` (of the base model, float32 [T, V]), a batch
  padded on the right (`input_ids`, `labels`, int64 [2, T]) and its `loss` with the adapter, mean over the label tokens.
* grads.safetensors: the gradients of that loss, under the adapter's names.
* greedy.json: 12 greedy tokens of the base model after each prompt, with margins (see hf_generate.py).

Windows and original contexts are shorter than the sequences. Weights are scaled so that positions, windows, norms, caps
and biases all show in the logits, which spread by about 2.
"""
# pyright: reportMissingImports=false

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_model  # noqa: F401  (sets threads, no progress bars)
import numpy as np
import torch
import transformers
from hf_generate import generate
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONTEXT = 32  # that scaled rotations were "pretrained" for
LENGTHS = (53, 7)  # of the prompts
Rng = np.random.Generator


def pick(rng: Rng, *options):
    """Return one of the options."""
    return options[rng.integers(len(options))]


def shape(rng: Rng, **changes) -> dict[str, Any]:
    """Return sizes: heads may share keys, be wider than hidden / heads, and rows may cut NF4 blocks."""
    heads, kv_heads, hidden = pick(rng, (4, 2, 64), (4, 1, 64), (6, 3, 96), (4, 4, 80), (2, 1, 64))
    return {
        "vocab_size": 256,
        "hidden_size": hidden,
        "intermediate_size": pick(rng, 96, 128, 160),
        "num_hidden_layers": pick(rng, 2, 3, 4),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 256,
        "rms_norm_eps": pick(rng, 1e-5, 1e-6),
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        "tie_word_embeddings": pick(rng, True, False),
        **changes,
    }


def rope(rng: Rng, *kinds: str, theta: float | None = None, **more) -> dict[str, Any]:
    """Return rope parameters of one of the kinds."""
    kind = pick(rng, *kinds)
    numbers = {
        "default": {},
        "linear": {"factor": 4.0},
        "dynamic": {"factor": 2.0},
        "yarn": {"factor": 8.0, "original_max_position_embeddings": CONTEXT},
        "llama3": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": CONTEXT,
        },
    }[kind]
    return {"rope_type": kind, "rope_theta": theta or pick(rng, 1e4, 5e5), **numbers, **more}


def llama(rng: Rng) -> dict[str, Any]:
    """With every kind of rotation that does not depend on the length of the row, and sometimes biases."""
    biases = {"attention_bias": pick(rng, True, False), "mlp_bias": pick(rng, True, False)}
    return {**shape(rng, **biases), "rope_parameters": rope(rng, "default", "llama3", "linear", "yarn")}


def llama_dynamic(rng: Rng) -> dict[str, Any]:
    """With a rotation that changes with every token beyond the context, which prompts leave and generation does not."""
    return {**shape(rng), "max_position_embeddings": 38, "rope_parameters": rope(rng, "dynamic")}


def qwen2(rng: Rng) -> dict[str, Any]:
    """With biases; a window from some layer on, or for the layers named, or not at all."""
    config = shape(rng, rope_parameters=rope(rng, "default", "yarn"))
    window = pick(
        rng,
        {},
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0},
    )
    return {**config, **window}


def qwen3(rng: Rng) -> dict[str, Any]:
    """With norms of every head, wide heads, and sometimes biases."""
    return {**qwen2(rng), "head_dim": pick(rng, 16, 24, 32), "attention_bias": pick(rng, True, False)}


def gemma(rng: Rng) -> dict[str, Any]:
    """With heads of a width of their own."""
    config = shape(rng, head_dim=pick(rng, 16, 24, 32), attention_bias=pick(rng, False, False, True))
    return {**config, "rope_parameters": rope(rng, "default", theta=1e4)}


def gemma2(rng: Rng) -> dict[str, Any]:
    """With caps low enough to matter, a window in every other layer or in those named."""
    config = gemma(rng)
    layers = pick(rng, 2, 4, 5)
    named = {"layer_types": [pick(rng, "sliding_attention", "full_attention") for _ in range(layers)]}
    return {
        **config,
        **pick(rng, {}, {}, named),
        "num_hidden_layers": layers,
        "query_pre_attn_scalar": pick(rng, 10, 24, 64),
        "sliding_window": pick(rng, 5, 12),
        "attn_logit_softcapping": pick(rng, 2.0, 5.0, None),
        "final_logit_softcapping": pick(rng, 3.0, None),
    }


def gemma3(rng: Rng) -> dict[str, Any]:
    """With periods of two to six layers, and two rotations."""
    config = gemma2(rng)
    return {
        **config,
        "attn_logit_softcapping": None,
        "num_hidden_layers": pick(rng, 3, 5, 6),
        "layer_types": None,
        "sliding_window_pattern": pick(rng, 2, 3, 6),
        "rope_parameters": {
            "full_attention": rope(rng, "default", "linear", theta=1e6),
            "sliding_attention": rope(rng, "default", theta=1e4),
        },
    }


def gemma3_image(rng: Rng) -> dict[str, Any]:
    """The same as the text part of a model that reads images."""
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"image_token_index": 255, "boi_token_index": 254, "eoi_token_index": 253, "mm_tokens_per_image": 4}
    text = {**gemma3(rng), "tie_word_embeddings": True, "final_logit_softcapping": None}
    return {"text_config": text, "vision_config": {**vision, "image_size": 28, "patch_size": 14}, **tokens}


def mistral(rng: Rng) -> dict[str, Any]:
    """Nemo's wide heads, with a window and without."""
    window = {"sliding_window": pick(rng, None, 9)}
    return {**shape(rng, head_dim=pick(rng, 16, 32)), "rope_parameters": rope(rng, "default", "yarn"), **window}


def mistral_image(rng: Rng) -> dict[str, Any]:
    """The same as the text part of a model that reads images."""
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**mistral(rng), "tie_word_embeddings": False}
    vision |= {"image_size": 28, "patch_size": 14, "head_dim": 16}
    return {"text_config": text, "vision_config": vision, "image_token_index": 255, "tie_word_embeddings": False}


def phi3(rng: Rng) -> dict[str, Any]:
    """With longrope, whose short factors hold up to 32 tokens; partial rotation; a window over all layers."""
    config = shape(rng)
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    partial = pick(rng, 1.0, 0.5, *([0.75] if head_dim % 8 == 0 else []))
    factors = {n: (1 + 3 * rng.random(int(head_dim * partial) // 2)).tolist() for n in ("short_factor", "long_factor")}
    long = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": partial, **factors}
    plain = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": partial}
    return {
        **config,
        "original_max_position_embeddings": CONTEXT,
        "rope_parameters": pick(rng, long, long, plain),
        "sliding_window": pick(rng, None, 11),
    }


def olmo2(rng: Rng) -> dict[str, Any]:
    """With few keys' heads, and sometimes biases."""
    return {**shape(rng, attention_bias=pick(rng, True, False)), "rope_parameters": rope(rng, "default", "yarn")}


def olmo3(rng: Rng) -> dict[str, Any]:
    """With a window in three of four layers, whose rotation has a base of its own (5e5 where no file says it)."""
    both = {"full_attention": rope(rng, "default", "yarn", theta=2e4)}
    both["sliding_attention"] = rope(rng, "default", theta=5e5)
    return {**shape(rng), "num_hidden_layers": pick(rng, 4, 5), "sliding_window": 7, "rope_parameters": both}


def smollm3(rng: Rng) -> dict[str, Any]:
    """With layers without rotation, at an interval or as named, and a window in these."""
    config = shape(rng, num_hidden_layers=pick(rng, 3, 4, 5), mlp_bias=pick(rng, True, False))
    named = {"no_rope_layers": [int(rng.integers(2)) for _ in range(config["num_hidden_layers"])]}
    return {
        **config,
        "rope_parameters": rope(rng, "default", "yarn", "linear"),
        **pick(rng, {"no_rope_layer_interval": 2}, {}, named),
        **pick(rng, {}, {"use_sliding_window": True, "sliding_window": 9}),
    }


def granite(rng: Rng) -> dict[str, Any]:
    """With factors that no power of two would hide."""
    return {
        **shape(rng, attention_bias=pick(rng, True, False), mlp_bias=pick(rng, True, False)),
        "rope_parameters": rope(rng, "default", "llama3"),
        "embedding_multiplier": 1 + 5 * rng.random(),
        "attention_multiplier": 0.1 + 0.3 * rng.random(),
        "residual_multiplier": 0.2 + rng.random(),
        "logits_scaling": 1 + 5 * rng.random(),
    }


def glm4(rng: Rng) -> dict[str, Any]:
    """With half of each head rotated, or a share that is named, and mostly biases."""
    config = shape(rng, head_dim=pick(rng, 16, 24, 32), attention_bias=pick(rng, True, True, False))
    partial = pick(rng, {}, {"partial_rotary_factor": pick(rng, 0.25, 0.75, 1.0)})
    return {**config, "rope_parameters": rope(rng, "default", "yarn", **partial)}


def exaone4(rng: Rng) -> dict[str, Any]:
    """With a window and no rotation elsewhere, by a period or in the layers named, or without windows."""
    config = shape(rng, num_hidden_layers=pick(rng, 3, 4, 5), rope_parameters=rope(rng, "default", "llama3"))
    layers = config["num_hidden_layers"]
    named = [pick(rng, "sliding_attention", "full_attention") for _ in range(layers)]
    return {
        **config,
        **pick(
            rng,
            {"sliding_window": 9, "sliding_window_pattern": pick(rng, 2, 3, 4)},
            {"sliding_window": 9, "sliding_window_pattern": "LG", "layer_types": named},
            {"sliding_window": None, "layer_types": ["full_attention"] * layers},
        ),
    }


def seed_oss(rng: Rng) -> dict[str, Any]:
    """With every combination of biases, and wide heads. Its dropout is for training alone and turned off."""
    biases = {"attention_bias": pick(rng, True, True, False), "attention_out_bias": pick(rng, True, False)}
    config = shape(rng, head_dim=pick(rng, 16, 24, 32), mlp_bias=pick(rng, True, False), **biases)
    return {**config, "rope_parameters": rope(rng, "default", "yarn"), "residual_dropout": 0.0}


# Name -> (class, configuration, names of the linear layers).
IN_TEXT = r"model\.language_model\..*\.(q|k|v|o|gate|up|down)_proj"
FAMILIES: dict[str, tuple[str, Callable[[Rng], dict[str, Any]], list[str] | str]] = {
    "llama": ("LlamaForCausalLM", llama, LINEARS),
    "llama-dynamic": ("LlamaForCausalLM", llama_dynamic, LINEARS),
    "qwen2": ("Qwen2ForCausalLM", qwen2, LINEARS),
    "qwen3": ("Qwen3ForCausalLM", qwen3, LINEARS),
    "gemma": ("GemmaForCausalLM", gemma, LINEARS),
    "gemma2": ("Gemma2ForCausalLM", gemma2, LINEARS),
    "gemma3": ("Gemma3ForCausalLM", gemma3, LINEARS),
    "gemma3-image": ("Gemma3ForConditionalGeneration", gemma3_image, IN_TEXT),
    "phi3": ("Phi3ForCausalLM", phi3, ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
    "olmo2": ("Olmo2ForCausalLM", olmo2, LINEARS),
    "olmo3": ("Olmo3ForCausalLM", olmo3, LINEARS),
    "smollm3": ("SmolLM3ForCausalLM", smollm3, LINEARS),
    "granite": ("GraniteForCausalLM", granite, LINEARS),
    "glm4": ("Glm4ForCausalLM", glm4, [*LINEARS[:4], "gate_up_proj", "down_proj"]),
    "exaone4": ("Exaone4ForCausalLM", exaone4, LINEARS),
    "seed-oss": ("SeedOssForCausalLM", seed_oss, LINEARS),
    "mistral": ("MistralForCausalLM", mistral, LINEARS),
    "mistral-image": ("Mistral3ForConditionalGeneration", mistral_image, IN_TEXT),
}


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Fill every parameter with normal numbers scaled by what it does."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config.get_text_config()
    plus_one = "gemma" in config.model_type
    embedding_scale = config.hidden_size**0.5 if plus_one else getattr(config, "embedding_multiplier", 1.0)
    head_std = 2 * getattr(config, "logits_scaling", 1.0) / config.hidden_size**0.5
    for name, param in model.named_parameters():
        noise = torch.randn(param.shape, generator=generator)
        if name.endswith("norm.weight"):
            value = 0.2 * noise + (0 if plus_one else 1)
        elif name.endswith("bias"):
            value = 0.5 * noise
        elif name.endswith("lm_head.weight") or (name.endswith("embed_tokens.weight") and config.tie_word_embeddings):
            value = head_std * noise
        elif name.endswith("embed_tokens.weight"):
            value = noise / embedding_scale
        else:
            sharper = 1.5 if "q_proj" in name or "k_proj" in name else 1.0
            value = sharper * noise / param.shape[-1] ** 0.5
        param.data.copy_(value)
    for name, buffer in model.named_buffers():
        if name.endswith("correction_bias"):  # of scores between 0 and 1
            buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))


def write_classic_config(folder: Path, given: dict[str, Any]) -> None:
    """Rewrite config.json as hub files of transformers 4: rope_theta, rope_scaling, torch_dtype.

    Biases that are as the class has them by default are left out.
    """
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.44.0"
    text, given = config.get("text_config", config), given.get("text_config", given)
    scaling = text.pop("rope_parameters")
    if "sliding_attention" in scaling:
        if "gemma3" in text["model_type"]:
            text["rope_local_base_freq"] = scaling["sliding_attention"]["rope_theta"]
        scaling = scaling["full_attention"]
    text["rope_theta"] = scaling.pop("rope_theta")
    text["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
    if given.get("layer_types") is None:
        text.pop("layer_types", None)
        if "_sliding_window_pattern" in text:
            text["sliding_window_pattern"] = text.pop("_sliding_window_pattern")
    if scaling.get("partial_rotary_factor"):
        text["partial_rotary_factor"] = scaling.pop("partial_rotary_factor")
    default = transformers.AutoConfig.for_model(text["model_type"])
    for name in ("attention_bias", "mlp_bias"):
        if name in text and text[name] == getattr(default, name, None):
            del text[name]
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def add_adapter(model, targets: list[str] | str, folder: Path, seed: int):
    """Put a random adapter of rank 4 on a model, write it, and return the PEFT model."""
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=targets))
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        if param.requires_grad:
            param.data.copy_(torch.randn(param.shape, generator=generator) * 0.4 / param.shape[-1] ** 0.5)
    model.save_pretrained(folder, save_embedding_layers=False)  # which else it does for lm_head
    return model


def loss_and_gradients(model, ids: np.ndarray, labels: np.ndarray, lengths: np.ndarray) -> torch.Tensor:
    """Leave gradients in `.grad` and return the mean loss of the label tokens."""
    mask = torch.arange(ids.shape[1])[None] < torch.tensor(lengths)[:, None]
    logits = model(input_ids=torch.tensor(ids), attention_mask=mask.long(), use_cache=False).logits
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), torch.tensor(labels)[:, 1:].flatten(), ignore_index=-100)
    loss.backward()
    return loss.detach()


def write(folder: Path, family: str, seed: int, families=FAMILIES, before_adapter: Callable | None = None) -> None:
    """Write everything about one configuration; `before_adapter` may change the model once its logits are written."""
    name, draw, targets = families[family]
    rng = np.random.default_rng([seed, *family.encode()])
    given = draw(rng)
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**given))
    randomize(model, seed)
    model.save_pretrained(folder / "model")
    if seed % 2:
        write_classic_config(folder / "model", given)

    # What follows is of the folder, so that both sides read the same config.json.
    model = model_class.from_pretrained(folder / "model", dtype=torch.float32, attn_implementation="eager").eval()
    prompts = [rng.integers(0, 256, n) for n in LENGTHS]
    ids = rng.integers(0, 256, (2, LENGTHS[0]))
    labels, lengths = ids.copy(), np.array([LENGTHS[0], LENGTHS[0] - 17])
    labels[1, lengths[1] :] = -100
    labels[rng.random(ids.shape) < 0.2] = -100
    arrays: dict[str, Any] = {"input_ids": ids, "labels": labels}
    for i, prompt in enumerate(prompts):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(prompt[None]), use_cache=False).logits[0]
        arrays |= {f"prompt_{i}": prompt, f"logits_{i}": logits.numpy()}
    request = {"max_new_tokens": 12, "eos_token_id": []}
    tokens, margins = zip(*(generate(model, [p.tolist()], request) for p in [prompts[0][:25], prompts[1]]), strict=True)
    greedy = {"tokens": [t[0] for t in tokens], "margins": [m[0] for m in margins]}
    (folder / "greedy.json").write_text(json.dumps(greedy))
    if isinstance(targets, list) and not given["tie_word_embeddings"]:
        targets = [*targets, "lm_head"]
    if before_adapter is not None:
        before_adapter(model)
    model = add_adapter(model, targets, folder / "adapter", seed)
    arrays["loss"] = loss_and_gradients(model, ids, labels, lengths).numpy()
    grads = {n.replace(".default", ""): p.grad for n, p in model.named_parameters() if p.requires_grad}
    save_file(grads, folder / "grads.safetensors")
    np.savez(folder / "arrays.npz", **arrays)


def main(families=FAMILIES, write: Callable[[Path, str, int], None] = write) -> None:
    """Read the arguments and write OUT_DIR."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("family", choices=families)
    parser.add_argument("--count", type=int, default=4, help="number of configurations")
    args = parser.parse_args()
    for seed in range(args.count):
        write(args.out_dir / str(seed), args.family, seed)


if __name__ == "__main__":
    main()
