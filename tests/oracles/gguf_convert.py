"""GGUF files by llama.cpp's own converter (its Python package, which `make test-oracles` puts beside the environment).

For every folder MODELS_DIR/NAME the files OUT_DIR/NAME.f32.gguf, .f16.gguf, .bf16.gguf and .q8_0.gguf. Each folder
must hold a byte-level BPE tokenizer that cuts text as GPT-2's does, or as Qwen2's if transformers makes it one: the
converter knows tokenizers by hashes of those published, so it is told that. Families whose converter wants a
SentencePiece file take that tokenizer, too.
"""
# pyright: reportMissingImports=false

import argparse
import sys
from pathlib import Path

CONVERTER = Path(sys.prefix) / "llama.cpp"
sys.path.insert(0, str(CONVERTER))  # before site-packages: it brings a `gguf` of its own

if not CONVERTER.is_dir():
    sys.exit(f"llama.cpp's converter is not in {CONVERTER}; run `make oracle-env` again")

import gguf  # noqa: E402
import torch  # noqa: E402


class TensorNames:
    """gguf.MODEL_TENSOR with None for what it lacks: the package's `gguf` is older than its converter.

    Only architectures that are not converted here mention such names, but they do so when they are imported.
    """

    def __getattr__(self, name: str):
        """Return the member."""
        return getattr(MODEL_TENSOR, name, None)


MODEL_TENSOR = gguf.MODEL_TENSOR
gguf.MODEL_TENSOR = TensorNames()

from conversion import ModelBase, ModelType, TextModel, get_model_architecture, get_model_class  # noqa: E402

TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}


def convert(folder: Path, out: Path, file_type: str) -> None:
    """Write one file, as convert_hf_to_gguf.py does."""
    hparams = ModelBase.load_hparams(folder, False)
    model_class = get_model_class(get_model_architecture(hparams, ModelType.TEXT))
    if model_class.__name__ in ("GemmaModel", "Gemma2Model", "Phi3MiniModel", "Glm4Model"):
        model_class.set_vocab = TextModel._set_vocab_gpt2
    model_class(folder, TYPES[file_type], out).write()


def main() -> None:
    """Read the arguments and convert."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models_dir", type=Path)
    parser.add_argument("out_dir", type=Path)
    args = parser.parse_args()
    TextModel.get_vocab_base_pre = lambda _, tokenizer: (
        "qwen2" if type(tokenizer).__name__ == "Qwen2Tokenizer" else "gpt-2"
    )
    for folder in sorted(args.models_dir.iterdir()):
        for file_type in TYPES:
            with torch.inference_mode():
                convert(folder, args.out_dir / f"{folder.name}.{file_type}.gguf", file_type)


if __name__ == "__main__":
    main()
