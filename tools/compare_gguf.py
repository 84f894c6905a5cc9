"""Whole GGUF files of SmolLM2-135M-Instruct beside those that llama-quantize makes of the same float32 file.

    python -m lora_jax.tools.compare_gguf --out results.json
    python -m lora_jax.tools.compare_gguf --types q4_k_m q2_k --tokens 100

For each type: whether every tensor has the same type and the same bytes, which entries of the metadata differ, and the
perplexity in llama.cpp, on a text that neither the importance matrix nor the file has seen: the reference of Python in
`pydoc_data.topics`, in windows of 100 tokens. Types of 4 bits and fewer are compared once more with an importance
matrix, the mean squares of the inputs of all linear layers over another part of that text; of their metadata, the
entries that say where it came from are missing in llama.cpp's files here, since llama-quantize itself writes them. The
width of SmolLM2, 576, does not divide by 256, so two thirds of the tensors are of types that stand in for K-quants.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors import safe_open

from lora_jax.export.gguf import FILE_TYPES, write_ggufs
from lora_jax.export.llamacpp import LlamaCpp
from lora_jax.tools.bench_step import environment
from lora_jax.tools.llama_quantize import LlamaQuantize, fetch_llama_quantize
from lora_jax.tools.smollm2 import fetch_smollm2

__all__ = ["compare", "differences", "importance", "perplexity", "write_imatrix"]

_WINDOW = 100  # tokens that are read before the next window begins anew
_WEIGHTED = ("q4_k_m", "q4_k_s", "q4_1", "q4_0", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k", "q2_k_l")


class _Tensor:
    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        with safe_open(path, "numpy") as file:
            self.shape = tuple(file.get_slice(name).get_shape())

    def read(self) -> np.ndarray:
        with safe_open(self.path, "numpy") as file:
            return file.get_tensor(self.name)


def compare(folder: Path, scratch: Path, types: Sequence[str], tokens: int) -> list[dict[str, Any]]:
    """A row for each type, and for each of `_WEIGHTED` with an importance matrix.

    Args:
      folder: of SmolLM2, float32.
      scratch: for the files.
      types: keys of `lora_jax.export.gguf.FILE_TYPES`.
      tokens: whose perplexity is measured; 0 for none.

    Raises as `lora_jax.tools.llama_quantize`.
    """
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    llama = LlamaQuantize(fetch_llama_quantize())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [topics[name] for name in sorted(topics) if topics[name].isascii()]
    seen, unseen = (tokenizer("\n".join(part))["input_ids"] for part in (texts[0::2], texts[1::2]))
    config = json.loads((folder / "config.json").read_text())
    path = folder / "model.safetensors"
    with safe_open(path, "numpy") as file:
        tensors = {name: _Tensor(path, name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    names = ["f32", *(name for name in types if name != "f32")]
    written = write_ggufs({name: scratch / f"{name}.gguf" for name in names}, tensors, config, folder, name="SmolLM2")
    (exact,) = written["f32"]
    runs = [(name, written[name][0], None) for name in names]
    if weighted := [name for name in types if name in _WEIGHTED]:
        means = importance({name: tensor.read() for name, tensor in tensors.items()}, config, seen[:512])
        write_imatrix(scratch / "imatrix.gguf", means)
        paths = {name: scratch / f"{name}-weighted.gguf" for name in weighted}
        options: dict[str, Any] = {"name": "SmolLM2", "imatrix": scratch / "imatrix.gguf"}
        written = write_ggufs(paths, tensors, config, folder, **options)
        runs += [(name, written[name][0], means) for name in weighted]
    rows = []
    for name, ours, means in runs:
        row: dict[str, Any] = {"type": name, "importance": means is not None, "bytes": ours.stat().st_size}
        theirs = scratch / "theirs.gguf"
        llama.file(exact, theirs, int(FILE_TYPES[name][0]), threads=2, importance=means, wide_ends=name == "q2_k_l")
        row |= differences(ours, theirs)
        if tokens:
            row["perplexity"] = perplexity(ours, unseen[:tokens], len(tokenizer))
            # of the same bytes it is the same
            same = not row["types that differ"] and not row["bytes that differ"] and name != "q4_k_m"
            row["perplexity, llama-quantize"] = (
                row["perplexity"] if same else perplexity(theirs, unseen[:tokens], len(tokenizer))
            )
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        rows.append(row)
    return rows


def differences(ours: Path, theirs: Path) -> dict[str, Any]:
    """How many tensors differ in type or bytes, and which entries of the metadata."""
    readers = [gguf.GGUFReader(path) for path in (ours, theirs)]
    found, want = ({tensor.name: tensor for tensor in reader.tensors} for reader in readers)
    types = [name for name in found.keys() | want.keys() if _type(found, name) != _type(want, name)]
    both = [name for name in want if name not in types]
    values = [name for name in both if not np.array_equal(_bytes(found[name]), _bytes(want[name]))]
    fields = [{key: field.contents() for key, field in reader.fields.items()} for reader in readers]
    other = sorted(key for key in fields[0].keys() | fields[1].keys() if fields[0].get(key) != fields[1].get(key))
    return {"tensors": len(want), "types that differ": len(types), "bytes that differ": len(values), "metadata": other}


def _type(tensors: Mapping[str, Any], name: str) -> Any:
    return tensors[name].tensor_type if name in tensors else None


def _bytes(tensor: Any) -> np.ndarray:
    return np.ascontiguousarray(tensor.data).reshape(-1).view(np.uint8)


def perplexity(path: Path, ids: Sequence[int], vocab_size: int) -> float:
    """exp of the mean negative log-probability that llama.cpp gives each token, in windows of `_WINDOW`."""
    total, count = 0.0, 0
    with LlamaCpp(path, vocab_size) as llama:
        for start in range(0, len(ids), _WINDOW):
            window = list(ids[start : start + _WINDOW])
            for i in range(1, len(window)):
                # The token is forced, so that its own log-probability is among those that are given.
                options: dict[str, Any] = {"logit_bias": [[window[i], 1000.0]], "cache_prompt": True}
                answer = llama.complete(window[:i], n_predict=1, n_probs=1, **options)
                entry = answer["completion_probabilities"][0]
                assert entry["id"] == window[i]
                total, count = total - entry["logprob"], count + 1
    return math.exp(total / count)


def importance(weights: Mapping[str, np.ndarray], config: Mapping[str, Any], ids: Sequence[int]) -> dict[str, Any]:
    """Mean squares of the inputs of the linear layers of a Llama, by llama.cpp's names: what llama-imatrix measures.

    Args:
      weights: float32 by Hugging Face's names.
      config: config.json.
      ids: of a text, which is read as a whole.
    """
    heads, kv_heads, length = config["num_attention_heads"], config["num_key_value_heads"], len(ids)
    head_dim = config["hidden_size"] // heads
    theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    angles = np.arange(length)[:, None] * theta ** (-np.arange(0, head_dim, 2) / head_dim)
    cos, sin = (np.tile(f(angles), 2).astype(np.float32) for f in (np.cos, np.sin))
    future = np.triu(np.full((length, length), -np.inf, np.float32), 1)
    found = {}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config["rms_norm_eps"]) * weights[name]

    def split(x: np.ndarray, count: int, rotated: bool) -> np.ndarray:
        x = x.reshape(length, count, head_dim).swapaxes(0, 1)
        first, second = np.split(x, 2, axis=-1)
        x = x * cos + np.concatenate([-second, first], -1) * sin if rotated else x
        return np.repeat(x, heads // count, axis=0)

    x = weights["model.embed_tokens.weight"][list(ids)]
    for i in range(config["num_hidden_layers"]):

        def linear(x: np.ndarray, module: str, name: str, i: int = i) -> np.ndarray:
            found[f"blk.{i}.{name}.weight"] = np.square(x).mean(0)
            return x @ weights[f"model.layers.{i}.{module}.weight"].T

        h = norm(x, f"model.layers.{i}.input_layernorm.weight")
        q = split(linear(h, "self_attn.q_proj", "attn_q"), heads, True)
        k = split(linear(h, "self_attn.k_proj", "attn_k"), kv_heads, True)
        v = split(linear(h, "self_attn.v_proj", "attn_v"), kv_heads, False)
        scores = q @ k.swapaxes(1, 2) / np.float32(math.sqrt(head_dim)) + future
        p = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (p / p.sum(-1, keepdims=True) @ v).swapaxes(0, 1).reshape(length, -1)
        x = x + linear(mixed, "self_attn.o_proj", "attn_output")
        h = norm(x, f"model.layers.{i}.post_attention_layernorm.weight")
        gate = linear(h, "mlp.gate_proj", "ffn_gate")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(h, "mlp.up_proj", "ffn_up"), "mlp.down_proj", "ffn_down")
    return found


def write_imatrix(path: Path, means: Mapping[str, np.ndarray]) -> None:
    """An importance matrix as llama-imatrix writes it."""
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["pydoc_data.topics"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, values in means.items():
        writer.add_tensor(f"{name}.in_sum2", values.reshape(1, -1).astype(np.float32))
        writer.add_tensor(f"{name}.counts", np.ones((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Compares, prints a line for each file and writes them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=list(FILE_TYPES), choices=FILE_TYPES)
    parser.add_argument("--tokens", type=int, default=400, help="whose perplexity is measured; 0 for none")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows = compare(fetch_smollm2(), Path(scratch), args.types, args.tokens)
    if args.out:
        result = {"environment": environment(), "model": "SmolLM2-135M-Instruct", "tokens": args.tokens, "files": rows}
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
