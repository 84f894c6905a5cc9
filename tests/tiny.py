"""A tiny random Llama as a Hugging Face folder, with a byte-level tokenizer and a chat template."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from lora_jax.hf_checkpoint import Checkpoint, read_json
from lora_jax.loading import load_decoder
from lora_jax.model import CausalLM
from lora_jax.models.decoder import Decoder
from lora_jax.models.registry import config_from_hf
from tests.export.tiny_gguf import random_weights

VOCAB = 320
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SPECIALS = {"<|begin|>": 256, "<|end|>": 257, "<|eot|>": 258}


def config(**changes: Any) -> dict[str, Any]:
    """config.json of two layers of width 64: 4 heads, 2 of keys and values, as hub files have it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "eos_token_id": 257,
        **changes,
    }


def write_folder(
    folder: Path,
    hf: dict[str, Any] | None = None,
    weights: dict[str, np.ndarray] | None = None,
    *,
    shards: int = 1,
    tokenizer: bool = True,
) -> Path:
    """Writes a model folder; weights are random, in the dtype config.json names, unless given."""
    hf = config() if hf is None else hf
    if weights is None:
        dtype = DTYPES[hf["torch_dtype"]]
        weights = {name: w.astype(dtype) for name, w in random_weights(hf).items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf, indent=2))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 258]}))
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        where = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(weights)}
        for file in set(where.values()):
            save_file({name: w for name, w in weights.items() if where[name] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    if tokenizer:
        write_tokenizer(folder)
    return folder


def write_random(folder: Path, hf: dict[str, Any], seed: int = 0, scale: float = 1.5) -> Path:
    """Writes a model folder of any architecture without a tokenizer; weights are random, float32, norms around one.

    Linear layers multiply what they get by `scale`: the larger, the more layers amplify roundings.
    """
    slots = Decoder(config_from_hf(hf), np.float32).slots()
    rng = np.random.default_rng(seed)
    noise = {name: rng.normal(size=slot.shape) for name, slot in slots.items()}
    scaled = {n: 1 + 0.2 * x if "norm" in n else scale * x / x.shape[-1] ** 0.5 for n, x in noise.items()}
    return write_folder(folder, hf, {n: np.float32(x) for n, x in scaled.items()}, tokenizer=False)


def write_tokenizer(folder: Path) -> None:
    """One id for each byte, then begin, end and end of turn."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {piece: i for i, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    settings |= {"bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def open_model(folder: Path, nf4: str | None = None, dtype: Any = jnp.float32) -> CausalLM:
    """The model without its tokenizer, whose import takes a while."""
    hf = read_json(folder / "config.json")
    module = load_decoder(Checkpoint(folder), hf, nf4=nf4, dtype=dtype, progress=False)
    return CausalLM(module, hf_config=hf, source=folder)


def randomize_adapter(model: CausalLM, seed: int = 0, scale: float = 0.1) -> CausalLM:
    """Gives every trained leaf normal noise on top, so that the adapter matters."""
    _, lora, _ = model.split()
    rng = np.random.default_rng(seed)
    model.update_lora(jax.tree.map(lambda x: x + jnp.asarray(scale * rng.normal(size=x.shape), x.dtype), lora))
    return model


def ids(batch: int, length: int, seed: int = 0) -> np.ndarray:
    """Random token ids, int32 [batch, length]."""
    return np.random.default_rng(seed).integers(0, 256, (batch, length)).astype(np.int32)
