"""Tokenizers from the files that Mistral publishes, in transformers and in llama.cpp: one line of JSON.

    python -m tests.tokenizer_files FILE WORK_DIR

FILE is a tekken.json or a SentencePiece model of the package mistral-common; that package and sentencepiece, which
transformers takes to read them, must be on the path. WORK_DIR receives a model folder and its GGUF file. Printed are
the texts whose ids differ: ours and llama.cpp's, ours and mistral-common's, ours and those of the folder saved again.
"""
# pyright: reportMissingImports=false

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from lora_jax.export.gguf import write_gguf
from lora_jax.loading import load_tokenizer
from tests.export.tiny_gguf import TRICKY, hf_config, random_weights, sources
from tests.llamacpp import LlamaCpp


def folder_of(file: Path, folder: Path) -> tuple[Path, dict[str, Any]]:
    """A model folder whose only tokenizer is that file."""
    tekken = file.suffix == ".json"
    config = {**hf_config(), "model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    config["vocab_size"] = 131072 if tekken else 32768
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(file, folder / ("tekken.json" if tekken else "tokenizer.model"))
    if not tekken:  # as in Mistral's folders
        settings = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True}
        settings |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder, config


def ids_of_mistral(file: Path, texts: list[str]) -> list[list[int]]:
    """What mistral-common makes of plain text, BOS first."""
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    tokenizer = MistralTokenizer.from_file(str(file)).instruct_tokenizer.tokenizer
    return [tokenizer.encode(text, bos=True, eos=False) for text in texts]


def main() -> None:
    """Compares one file."""
    file, work = map(Path, sys.argv[1:])
    folder, config = folder_of(file, work / "model")
    tokenizer = load_tokenizer(folder)
    tokenizer.save_pretrained(work / "saved")
    again = load_tokenizer(work / "saved")
    plain = [text for text in TRICKY if not any(token in text for token in tokenizer.all_special_tokens + ["[INST]"])]
    mistral = dict(zip(plain, ids_of_mistral(file, plain), strict=True))
    path = write_gguf(work / "model.gguf", sources(random_weights(config)), config, folder, "q8_0", progress=False)
    different: dict[str, list[str]] = {"llama.cpp": [], "mistral-common": [], "saved": []}
    with LlamaCpp(path, config["vocab_size"]) as llama:
        for text in TRICKY:
            whole, alone = tokenizer(text)["input_ids"], tokenizer(text, add_special_tokens=False)["input_ids"]
            if llama.tokenize(text, add_special=True) != whole or llama.tokenize(text) != alone:
                different["llama.cpp"].append(text)
            if mistral.get(text, whole) != whole:
                different["mistral-common"].append(text)
            if again(text)["input_ids"] != whole:
                different["saved"].append(text)
    facts = {"fast": tokenizer.is_fast, "bos": tokenizer("a")["input_ids"][0], "size": len(tokenizer)}
    print(json.dumps({"texts": len(TRICKY), "plain": len(plain), "different": different, **facts}))


if __name__ == "__main__":
    main()
